"""PyTorch's own caches of convolutions on a CPU, held small: they fill for hours and look like a leak.

Importing this does not import torch.
"""

from __future__ import annotations

import os

CAPACITY = 16
"""Convolutions of one shape each. By default 1,024 are kept, and a host that grows has new shapes all the time."""
VARIABLES = ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")


def hold() -> None:
    """Ask for small caches, unless the user has asked for some size; must come before torch is imported."""
    for name in VARIABLES:
        os.environ.setdefault(name, str(CAPACITY))
