"""An interrupt that is swallowed on its way is obeyed at the next training step."""

from __future__ import annotations

import contextlib
import signal
import threading

import pytest

from esper.runs.interrupt import obey, remembered

pytestmark = pytest.mark.unit


def test_a_swallowed_interrupt_comes_back_at_the_next_step() -> None:
    before = signal.getsignal(signal.SIGINT)
    with remembered():
        obey()
        with contextlib.suppress(KeyboardInterrupt):  # as a library's own catch-all or a destructor would
            signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            obey()
    obey()  # what was asked of one run does not stop the next
    assert signal.getsignal(signal.SIGINT) is before


def test_other_threads_leave_the_handler_alone() -> None:
    before = signal.getsignal(signal.SIGINT)
    seen: list[object] = []

    def work() -> None:
        with remembered():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]
