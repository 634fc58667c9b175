"""How other threads tell a task that there is something to do."""

from __future__ import annotations

import asyncio
import contextlib


class Bell:
    """Wakes the one task that waits for it. Rung while nobody waits it is heard at the next wait.

    Ringing costs a system call if somebody waits, and next to nothing otherwise.
    """

    def __init__(self) -> None:
        self._event = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._was_rung = self._is_waited_for = False

    def ring(self) -> None:
        """From any thread."""
        self._was_rung, loop = True, self._loop
        if self._is_waited_for and loop is not None:
            self._is_waited_for = False
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(self._event.set)

    async def ring_at(self, stop: asyncio.Event) -> None:
        """Ring once ``stop`` is set."""
        await stop.wait()
        self.ring()

    async def wait(self, seconds: float) -> None:
        """Until it is rung, or was since the last wait, or until ``seconds`` are over."""
        self._loop = asyncio.get_running_loop()
        self._event.clear()
        # In this order: who rings sets its flag first and looks then.
        self._is_waited_for = True
        try:
            if not self._was_rung:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(None if seconds == float("inf") else seconds):
                        await self._event.wait()
        finally:
            self._is_waited_for = self._was_rung = False
