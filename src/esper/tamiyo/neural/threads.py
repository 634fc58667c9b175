"""One thread for small networks: the last bit of a sum depends on how many there are, and so might a decision.

It is the quickest way too. On a busy machine two threads wait for each other longer than one takes for all of it.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import torch


@contextmanager
def one_thread() -> Generator[None]:
    """Compute on one thread while this lasts."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
