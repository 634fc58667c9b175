"""A run's or a training's link to a bus: everything of Oona put together, and nothing that the training waits for.

::

    link = Link("redis://localhost", run="my-run", job="first", folder="runs/my-run")
    link.follow("runs/my-run/events.jsonl")        # the run's events go out
    with link.serving(grower):                     # telemetry and answers go out, commands come in
        ...                                        # train
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from esper.errors import BusError
from esper.karn import FieldReport
from esper.kasmina.execution import Kasmina
from esper.oona import envelope as wire
from esper.oona import health, observations, outbox
from esper.oona.address import open_bus
from esper.oona.backoff import Backoff, CircuitBreaker
from esper.oona.behind import bytes_left, unless_behind
from esper.oona.courier import Courier
from esper.oona.desk import Desk
from esper.oona.ears import JOB, Ears
from esper.oona.envelope import Envelope
from esper.oona.follower import Follower
from esper.oona.incoming import Verify, anybody, nobody
from esper.oona.intake import Intake
from esper.oona.outbox import Classify, Outbox
from esper.oona.publisher import TelemetryPublisher
from esper.oona.report_log import ReportLog, field_report
from esper.oona.schemas import HEALTH_SCHEMA, HEARTBEAT_SCHEMA, OBSERVATION_SCHEMA, Heartbeat
from esper.oona.sender import Sender
from esper.oona.signing import Keyring, Verifier
from esper.oona.spool import SEGMENT_BYTES, Spool
from esper.oona.stores import open_claims
from esper.oona.topics import HEALTH, HEARTBEATS, OBSERVATIONS
from esper.protocol import Observation, Order, Pause, Resume

HEARTBEAT_S = 5.0
SWEEP_S = 60.0
OBSERVATION_VALID_S = 30.0


class Journal(Protocol):
    """Where a training says what its user should know."""

    def warn(self, key: str, message: str, step: int) -> None: ...


class Loop(Protocol):
    """What a training remembers from step to step."""

    @property
    def paused(self) -> str | None: ...


class Training(Protocol):
    """A grower, seen from here."""

    watcher: Callable[[Observation], None] | None

    @property
    def kasmina(self) -> Kasmina: ...

    @property
    def journal(self) -> Journal: ...

    @property
    def loop(self) -> Loop: ...

    def serve(self, desk: Desk | None, *, checkpoints: bool = False) -> None: ...


@dataclass(frozen=True, kw_only=True)
class LinkLimits:
    """Bounds of a link.

    ``behind_bytes``: how far the run's logs may be ahead of the bus before growth pauses and commands are refused.
    ``spool_bytes``: telemetry that may wait on the disk. ``stop_s``: how long the end may take.
    """

    behind_bytes: int = 64 << 20
    spool_bytes: int = 256 << 20
    stop_s: float = 5.0


class Link:
    """A connection of one run to a bus.

    Parameters
    ----------
    url:
        See :mod:`esper.oona.address`.
    run, job:
        Who this is on the bus; ``job`` is a training in the run, empty for the run as a whole.
    folder:
        Where cursors and the spool are kept; one link's own.
    allow_unsigned:
        Take unsigned commands although others can reach the bus. Without a key (``ESPER_BUS_KEY``) and without this, a
        remote bus brings none.
    run_logs:
        Further logs, each with its cursor, that another link sends: they count for the bound too.
    keyring:
        Keys that were read before; by default they come from the environment.

    Raises
    ------
    ConfigError
        The address or the keys cannot be used.
    """

    def __init__(
        self,
        url: str,
        *,
        run: str,
        job: str = "",
        folder: str | Path,
        allow_unsigned: bool = False,
        limits: LinkLimits | None = None,
        run_logs: Sequence[tuple[Path, Path]] = (),
        keyring: Keyring | None = None,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        given = os.environ if environ is None else environ
        self._bus = open_bus(url, given)
        self._keyring = keyring or Keyring.from_environment(given)
        self._claims = open_claims(url, given)
        self._folder, self.limits = Path(folder), limits or LinkLimits()
        self._allow_unsigned = allow_unsigned
        self._sender = Sender(source="esper/kasmina", run=run, subject=job, keyring=self._keyring, claims=self._claims)
        self._breaker, self._backoff = CircuitBreaker(), Backoff()
        self._courier = Courier(on_close=self._farewell)
        self._outboxes: list[Outbox] = []
        self._reports = ReportLog(self._folder)
        self._reporting: Outbox | None = None
        self._publisher: TelemetryPublisher | None = None
        self._ears: Ears | None = None
        self._desk: Desk | None = None
        self._grower: Training | None = None
        self._run_logs = tuple(run_logs)
        self._run_behind, self._looked_at = 0, float("-inf")
        self._asked: str | None = None
        """The order with which growth was paused or resumed last."""
        self._beaten = float("-inf")
        self._step: int | None = None

    @property
    def address(self) -> str:
        """Where the bus is, without secrets."""
        return self._bus.address

    @property
    def takes_commands(self) -> bool:
        """Whether anybody may command this training over the bus."""
        return self._verify() is not nobody

    # ---------------------------------------------------------------------------------------------- parts

    def follow(self, events: str | Path) -> None:
        """Send an event log, from where an earlier link has got to."""
        follower = Follower(Path(events), self._folder / "events.cursor")
        self._send_log("events", follower, outbox.event)
        self._send_reports()
        self._courier.start()

    def report(self, reports: Iterable[FieldReport]) -> int:
        """Send what became of the cohorts of trainings that are over, each report once; returns how many are new.

        They are on the disk when this returns: what the bus does not get in this life, the next link here sends.

        Raises
        ------
        StateError
            The disk refused.
        """
        num = self._reports.write(reports)
        self._send_reports().nudge()
        self._courier.start()
        return num

    @contextmanager
    def serving(self, grower: Training, commands: str | Path, *, checkpoints: bool = False) -> Generator[Link]:
        """While this lasts the training is heard and can be commanded; enter it before anything is loaded.

        Parameters
        ----------
        commands:
            The log of this training's commands; it belongs to its checkpoints.
        checkpoints:
            The loop looks at ``grower.checkpoint_due`` after each step.

        Raises
        ------
        StateError
            The log is in use, damaged, or another training's.
        """
        answers = Follower(Path(commands), self._folder / "answers.cursor", end=self._desk_bytes)
        sending = self._send_log("answers", answers, outbox.acknowledgement)
        desk = Desk(
            commands, run=self._sender.run, job=self._sender.subject, on_written=sending.nudge,
            verify=unless_behind(self._verify(), self._is_behind),
        )  # fmt: skip
        self._desk = desk
        intake = Intake(self._bus, self._sender, desk)
        self._publisher = TelemetryPublisher(
            self._bus, self._sender, make_spool=self._spool, breaker=self._breaker, backoff=self._backoff
        )
        self._ears = Ears(self._bus, self._sender, group=f"ears {self._sender.run}/{self._sender.subject}")
        errands = {"telemetry": self._publisher.run, "orders": intake.run, "ears": self._ears.run}
        for name, errand in (errands | {"claims": self._sweep}).items():
            self._courier.add(name, errand)
        if self._reports.path.exists():  # of an earlier life
            self._send_reports()
        self._desk, self._grower = desk, grower
        grower.serve(desk, checkpoints=checkpoints)
        grower.watcher = self.look
        try:
            self._courier.start()
            yield self
            desk.end("the training is over")
            self._last_call(intake)
        finally:
            grower.watcher = None
            self.stop()
            grower.serve(None)
            desk.close()

    def _last_call(self, intake: Intake) -> None:
        """In order: what is on its way in is refused, the refusals and all other answers go out; for a bounded time."""
        end = time.monotonic() + self.limits.stop_s
        intake.last_call = True
        intake.done.wait(self.limits.stop_s / 2)
        while self.bytes_behind and time.monotonic() < end:
            time.sleep(0.02)

    def follow_answers(self, commands: str | Path, cursor: str | Path) -> Outbox:
        """Send what an earlier life of a training has answered and could not tell."""
        sending = self._send_log(
            f"answers in {commands}", Follower(Path(commands), Path(cursor)), outbox.acknowledgement
        )
        self._courier.start()
        return sending

    def stop(self) -> bool:
        """Send what can be sent in a bounded time and end; whether the thread has ended. Stopping twice is fine."""
        return self._courier.stop(self.limits.stop_s)

    # ---------------------------------------------------------------------------------------------- the training's

    def look(self, observation: Observation) -> None:
        """At a decision point, in the training thread: telemetry out, a heartbeat, and what is wrong with the bus."""
        assert self._grower is not None and self._publisher is not None
        self._step = observation.step
        self._offer_health()
        if time.monotonic() - self._beaten >= HEARTBEAT_S:
            self._beaten = time.monotonic()
            self._publisher.offer(HEARTBEATS, self._heartbeat, num_bytes=512, valid_s=2 * HEARTBEAT_S)
        trouble = self._courier.trouble()
        if trouble is not None:
            text = f"nothing goes over the bus any more: {trouble}; training goes on"
            self._grower.journal.warn("bus", text, observation.step)
        self._hold_back()

    @property
    def heard(self) -> float | None:
        """When a controller was heard last that steers this training (``time.monotonic``)."""
        return None if self._ears is None else self._ears.heard

    @property
    def heard_any(self) -> float | None:
        """When any controller was heard last."""
        return None if self._ears is None else self._ears.heard_any

    def observe(self, observation: Observation) -> None:
        """Send an observation to whoever steers."""
        if self._publisher is None:  # outside of serving(): nobody is to be told
            return
        size = 200 * len(observation.site_names) + 200 * len(observation.verdicts) + 4096
        build = functools.partial(self._observed, observation)
        self._publisher.offer(OBSERVATIONS, build, num_bytes=size, valid_s=OBSERVATION_VALID_S)

    def counts(self) -> dict[str, object]:
        """What was sent, dropped and waits, and how the courier's errands fare."""
        told: dict[str, object] = {"errands": self._courier.counts()}
        if self._publisher is not None:
            told["telemetry"] = self._publisher.counts()
        told["logs"] = [each.counts() | {"bytes_behind": each.behind()[0]} for each in self._outboxes]
        return told

    # ---------------------------------------------------------------------------------------------- how

    def _offer_health(self) -> None:
        assert self._grower is not None and self._publisher is not None and self._step is not None
        snapshot = health.collect(self._grower.kasmina, self._step)

        def build(counts: Mapping[str, int]) -> Envelope:
            return self._sender.envelope(HEALTH_SCHEMA, snapshot.pack(counts))

        # Where the bus is slower than large reports come, the newest says most.
        self._publisher.offer(HEALTH, build, num_bytes=snapshot.num_bytes, supersedes=snapshot.is_large)

    def _heartbeat(self, counts: Mapping[str, int]) -> Envelope:
        paused = self._grower is not None and self._grower.loop.paused is not None
        beat = Heartbeat(
            role=JOB, every_s=HEARTBEAT_S, step=self._step, state="paused" if paused else "training",
            counts=dict(counts),
        )  # fmt: skip
        return self._sender.envelope(HEARTBEAT_SCHEMA, wire.write_json(beat))

    def _observed(self, observation: Observation, counts: Mapping[str, int]) -> Envelope:
        return self._sender.envelope(OBSERVATION_SCHEMA, observations.encode(observation))

    @property
    def bytes_behind(self) -> int:
        """How far the logs that this link sends are ahead of the bus."""
        return sum(each.behind()[0] for each in self._outboxes)

    def _behind(self) -> int:
        """How far this training's logs and its run's are ahead of the bus; looked up once a second."""
        if time.monotonic() - self._looked_at >= 1.0:
            self._looked_at = time.monotonic()
            self._run_behind = sum(bytes_left(*log) for log in self._run_logs)
        return self.bytes_behind + self._run_behind

    def _is_behind(self) -> bool:
        return self._behind() > self.limits.behind_bytes

    def _hold_back(self) -> None:
        """Past the bound growth pauses, so that what has to be told stays bounded; below half of it it goes on.

        What a person has paused is not ours to resume: whose pause it is stands in its reason, and checkpoints keep it.
        """
        assert self._desk is not None and self._grower is not None
        if self._asked is not None and self._desk.is_open(self._asked):
            return
        behind, paused = self._behind(), self._grower.loop.paused
        command: Pause | Resume | None = None
        if paused is None and behind > self.limits.behind_bytes:
            reason = f"{_HELD} {behind:,} bytes behind the run's logs, more than {self.limits.behind_bytes:,}"
            command = Pause(reason=reason)
        elif paused is not None and paused.startswith(_HELD) and behind <= self.limits.behind_bytes // 2:
            command = Resume(reason="the bus has caught up")
        if command is not None:
            self._asked = wire.fresh_id()
            self._desk.submit(Order(id=self._asked, command=command, issuer="oona"))

    def _verify(self) -> Verify:
        if self._keyring is not None:
            return Verifier(self._keyring).check
        return anybody if self._allow_unsigned or not self._bus.is_remote else nobody

    def _send_log(self, name: str, follower: Follower, classify: Classify) -> Outbox:
        sending = Outbox(
            self._bus, self._sender, follower, classify, breaker=self._breaker, backoff=self._backoff
        )  # fmt: skip
        self._outboxes.append(sending)
        self._courier.add(name, sending.run)
        return sending

    def _send_reports(self) -> Outbox:
        if self._reporting is None:
            self._reporting = self._send_log("reports", self._reports.follower(), field_report)
        return self._reporting

    def _desk_bytes(self) -> int:
        return 0 if self._desk is None else self._desk.num_bytes

    def _spool(self) -> Spool:
        most = self.limits.spool_bytes
        return Spool(self._folder / "spool", max_bytes=most, segment_bytes=min(SEGMENT_BYTES, max(1, most // 4)))

    async def _sweep(self, stop: asyncio.Event) -> None:
        """Claims whose time is over go, where the store does not see to that."""
        while self._claims is not None and not stop.is_set():
            await self._claims.store.sweep()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), SWEEP_S)

    async def _farewell(self) -> None:
        with contextlib.suppress(BusError):  # a broker that is gone cannot be taken leave of
            await self._bus.close()
        if self._claims is not None:
            with contextlib.suppress(BusError):
                await self._claims.store.close()


_HELD = "the bus is"
"""How the reason of a pause begins that is not a person's."""
