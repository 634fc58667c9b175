"""Ctrl-C that cannot be lost.

Python raises ``KeyboardInterrupt`` wherever the program happens to be. In a destructor, in a weak reference's callback
or in a library's own catch-all it is swallowed, and the run would go on as if nothing had been asked. So the request
is also remembered, and the training loop obeys what was remembered.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType

_asked = threading.Event()


@contextmanager
def remembered() -> Generator[None]:
    """While this lasts, an interrupt that gets lost is raised again by :func:`obey`. For the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread gets signals, and only it may say what they do
        return
    before = signal.signal(signal.SIGINT, _remember)
    try:
        yield
    finally:
        _asked.clear()
        signal.signal(signal.SIGINT, before)


def obey() -> None:
    """Raise ``KeyboardInterrupt`` if one was asked for. Called once a training step."""
    if _asked.is_set():
        raise KeyboardInterrupt


def _remember(number: int, frame: FrameType | None) -> None:
    _asked.set()
    raise KeyboardInterrupt
