"""Progress for people on stderr: a line a decision, and now and then how things stand.

ASCII only. On a terminal the newest state is a live line; elsewhere (a file, a pipe, ``TERM=dumb``) no control
character is ever written and a heartbeat comes at most once a minute.
"""

from __future__ import annotations

import os
import shutil
import textwrap
import time
from collections.abc import Callable, Mapping
from typing import TextIO

from esper.observe.history import Cohort, RunHistory, SeedRun
from esper.observe.progress import controls_line, decision_line, done_line, heartbeat_line
from esper.protocol import (
    SCHEMA_VERSION,
    Absorbed,
    AnyEvent,
    ArmFinished,
    Germinated,
    HeldOut,
    Lifecycle,
    Record,
    Refused,
    Restored,
    RunFinished,
    RunStarted,
    Stopped,
    TrainLoss,
    Transitioned,
    Warned,
)

HEARTBEAT_SECONDS = 60.0
LIVE_SECONDS = 0.2
_RESTORED = ("RESTORED", "31")
_DECIDED = {
    Lifecycle.FOSSILIZED: ("KEPT", "32"),
    Lifecycle.CULLED: ("REJECTED", "33"),
    Lifecycle.CANCELLED: ("CANCELLED", "33"),
    Lifecycle.ROLLED_BACK: ("ROLLED BACK", "31"),
}


class Console:
    """Writes progress lines for the events it is given.

    Parameters
    ----------
    stream:
        Where to write, usually ``sys.stderr``.
    clock:
        Monotonic seconds; paces heartbeats.
    rank:
        Rank of this process; every rank but 0 stays silent. Default: the ``RANK`` variable, else 0.
    environ:
        Read for ``NO_COLOR``, ``FORCE_COLOR``, ``TERM``, ``RANK`` and ``COLUMNS``. Default: the process's own.
    width:
        Columns of the terminal. Default: asked from it.
    """

    def __init__(
        self,
        stream: TextIO,
        clock: Callable[[], float] = time.monotonic,
        rank: int | None = None,
        *,
        environ: Mapping[str, str] | None = None,
        width: int | None = None,
    ) -> None:
        env = os.environ if environ is None else environ
        self._stream = stream
        self._clock = clock
        text_rank = env.get("RANK", "0")
        self._rank = rank if rank is not None else int(text_rank) if text_rank.isdecimal() else 0
        terminal = stream.isatty() and env.get("TERM", "") != "dumb"
        self._is_live = terminal
        self._has_color = not env.get("NO_COLOR") and env.get("TERM") != "dumb"
        self._has_color &= terminal or env.get("FORCE_COLOR", "0") not in ("", "0")
        self._width = width
        self._history = RunHistory()
        self._last_beat: float | None = None
        self._live_text = ""

    def on_event(self, event: AnyEvent) -> None:
        """Take in one event and write what a person should see of it.

        A stream that is closed or whose reader has gone away silences the console for good: progress lines must
        not end a training run.
        """
        if self._rank == 0:
            self.on_past(event)
            self._attempt(lambda: self._show(event))

    def on_past(self, event: AnyEvent) -> None:
        """Take in an event of which nothing is to be said: an interrupted run has told it already."""
        self._history.apply(Record(v=SCHEMA_VERSION, seq=self._history.num_events, time=0.0, event=event))

    def on_note(self, text: str) -> None:
        """Write a line that no event stands for, under the same rules."""
        if self._rank == 0:
            self._attempt(lambda: self._line(text))

    def _attempt(self, write: Callable[[], None]) -> None:
        try:
            write()
        except (BrokenPipeError, ValueError) as error:
            if isinstance(error, ValueError) and not self._stream.closed:
                raise
            self._rank = -1

    def close(self) -> None:
        """End the live line, so that what follows starts on its own line."""
        if self._live_text and not self._stream.closed:
            self._stream.write("\n")
            self._stream.flush()
        self._live_text = ""

    def _show(self, event: AnyEvent) -> None:
        match event:
            case RunStarted():
                preset = f" | preset {event.preset}" if event.preset else ""
                self._line(f"run {event.run}{preset}")
            case Transitioned() if event.target in _DECIDED:
                run = self._history.seed_run(event.arm, event.seed)
                self._decision(run, run.cohort(event.cohort), event)
            case Stopped():
                self._line(f"step {event.step:<5} growth stopped: {event.reason}", run=self._run(event))
            case Warned():
                self._line(f"step {event.step:<5} warning: {event.message}", run=self._run(event))
            case Absorbed():
                self._line(
                    f"step {event.step:<5} absorbed  {event.params:,} parameters into {len(event.layers)} layers",
                    run=self._run(event),
                )
            case Restored():
                self._line(f"step {event.step:<5} RESTORED  {event.reason}", run=self._run(event), highlight=_RESTORED)
            case Refused() if self._is_news(event):
                text = f"step {event.step:<5} refused {event.command} ({event.gate}): {event.reason}"
                self._line(text, run=self._run(event))
            case ArmFinished():
                score = f"{event.score_name} {event.score:.4g}"
                self._line(f"finished  {event.arm} seed {event.seed}: {score}, loss {event.loss:.4g}")
            case RunFinished():
                for line in (done_line(self._history), controls_line(self._history)):
                    if line:
                        self._line(line)
                self.close()
            case TrainLoss() | HeldOut() | Germinated():
                self._beat(self._run(event))
            case _:
                pass

    def _run(self, event: AnyEvent) -> SeedRun:
        return self._history.seed_run(event.arm, event.seed)

    def _is_news(self, event: Refused) -> bool:
        """A gate that says the same thing again and again says it once."""
        return not any(
            other is not event and other.gate == event.gate and other.command == event.command
            for other in self._run(event).refusals
        )

    def _decision(self, run: SeedRun, cohort: Cohort, event: Transitioned) -> None:
        word, color = _DECIDED[event.target]
        self._line(decision_line(cohort, event, word), run=run, highlight=(word, color))

    def _beat(self, run: SeedRun) -> None:
        now = self._clock()
        period = LIVE_SECONDS if self._is_live else HEARTBEAT_SECONDS
        if self._last_beat is None and run.last_held_out is None:
            return  # The first sign of life says something: it waits for the first measurement.
        if self._last_beat is not None and now - self._last_beat < period:
            return
        self._last_beat = now
        text = self._tagged(heartbeat_line(run), run)
        if not self._is_live:
            self._line(text)
            return
        self._live_text = self._encodable(text)[: max(self._columns() - 1, 10)]
        self._stream.write(f"\r\x1b[2K{self._live_text}")
        self._stream.flush()

    def _line(self, text: str, *, run: SeedRun | None = None, highlight: tuple[str, str] | None = None) -> None:
        text = self._encodable(self._tagged(text, run))
        if self._is_live:
            wrapped = textwrap.wrap(
                text, self._columns() - 1, subsequent_indent=" " * 11, drop_whitespace=True, break_on_hyphens=False,
                replace_whitespace=False,
            )  # fmt: skip
            text = "\n".join(wrapped)
        if highlight is not None and self._has_color:
            word, color = highlight
            text = text.replace(word, f"\x1b[1;{color}m{word}\x1b[0m", 1)
        head = "\r\x1b[2K" if self._live_text else ""
        self._stream.write(f"{head}{text}\n")
        if self._live_text:
            self._stream.write(self._live_text)
        self._stream.flush()

    def _tagged(self, text: str, run: SeedRun | None) -> str:
        """Lines of another arm or seed than the main one say so."""
        if run is None or (run.arm == "grown" and run.seed == 0):
            return text
        return f"[{run.arm} {run.seed}] {text}"

    def _encodable(self, text: str) -> str:
        """Names come from the user: no control characters, nothing an ASCII locale cannot show."""
        return "".join(char if " " <= char <= "~" else char.encode("unicode_escape").decode() for char in text)

    def _columns(self) -> int:
        return max(self._width or shutil.get_terminal_size().columns, 20)
