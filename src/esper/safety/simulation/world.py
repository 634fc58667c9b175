"""One seed drives a small run on a simulated disk: training steps, commands, checkpoints, deaths, power cuts, rot.

The trainer goes through the lifecycle table, the command log and the checkpoints of the real run; a step is one line of
integer arithmetic. An observer who sees everything holds what was promised against what is there. The same seed gives
the same trace, byte for byte.
"""

from __future__ import annotations

import contextlib
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from esper.errors import StateError, TransitionError
from esper.kasmina.lifecycle import TABLE, check
from esper.protocol import Lifecycle
from esper.safety.checkpoint import Checkpoints, load, manifest_numbers, problem
from esper.safety.command_log import CommandLog, Position
from esper.safety.disk import Disk
from esper.safety.simulation.disk import SimulatedDisk
from esper.safety.simulation.faults import FaultyDisk, ProcessDeath
from esper.safety.tree import Tree, digest

NUM_SEEDS = 4
KEEP = 2
SAVE_EVERY_S = 8.0
FOLDER = Path("/simulated/run/checkpoints")
LOG = Path("/simulated/run/commands.jsonl")
_BAD_SECTOR = re.compile(r"\d+ read checkpoint-(\d+)\S* EIO")
_ERRORS = ("ENOSPC", "EIO", "EACCES", "short")


@dataclass
class Outcome:
    """What a simulated run did. ``violations`` are broken promises; there must be none."""

    trace: list[str] = field(default_factory=list[str])
    violations: list[str] = field(default_factory=list[str])
    counts: dict[str, int] = field(default_factory=dict[str, int])

    def count(self, what: str) -> None:
        self.counts[what] = self.counts.get(what, 0) + 1


class Trainer:
    """The part of a run that can die: its state, and how commands change it."""

    def __init__(self, disk: Disk) -> None:
        self.checkpoints = Checkpoints(FOLDER, kind="simulated", keep=KEEP, disk=disk)
        self.log = CommandLog(LOG, disk=disk)
        self.loaded = self.checkpoints.load()
        self.state: dict[str, Any] = first_state() if self.loaded is None else self.loaded.tree
        for entry in self.log.after(Position(**self.state["position"])):
            while self.state["step"] < entry.step:
                advance(self.state)
            apply(self.state, entry.id, entry.payload)
            self.state["position"]["count"] += 1
        self.state["position"] = self.log.position.tree()

    def obey(self, command_id: str, payload: dict[str, int]) -> bool:
        """Apply a command once, or raise; when this returns it may be acknowledged."""
        if command_id not in self.log:
            check(int(self.state["lifecycle"][payload["seed"]]), payload["target"])
        if not self.log.append(command_id, step=self.state["step"], payload=payload):
            return False
        apply(self.state, command_id, payload)
        self.state["position"] = self.log.position.tree()
        return True

    def save(self) -> int:
        return self.checkpoints.save(self.state, step=self.state["step"]).number


def first_state() -> dict[str, Any]:
    weights = torch.arange(6, dtype=torch.int64)
    lifecycle = np.zeros(NUM_SEEDS, dtype=np.int8)
    return {"step": 0, "weights": weights, "lifecycle": lifecycle, "applied": [], "position": Position().tree()}


def advance(state: dict[str, Any]) -> None:
    """One training step."""
    state["step"] += 1
    state["weights"] = state["weights"] * 6364136223846793005 + state["step"]


def apply(state: dict[str, Any], command_id: str, payload: dict[str, int]) -> None:
    """A transition of one seed; an end state is followed by a new seed."""
    target = payload["target"]
    state["lifecycle"] = state["lifecycle"].copy()
    state["lifecycle"][payload["seed"]] = target if TABLE[target].successors else Lifecycle.DORMANT
    state["weights"] = state["weights"] + target * 1000 + payload["seed"]
    state["applied"].append(command_id)


def simulate(
    seed: int, *, actions: int = 60, lives: int = 4, wrap: Callable[[Disk], Disk] = lambda disk: disk
) -> Outcome:
    """Run one world. ``wrap`` puts a faulty part between the trainer and its disk, for planted bugs."""
    world = _World(seed, wrap)
    for _ in range(lives):
        world.live(actions)
    world.faults = {}
    with contextlib.suppress(StateError):  # it is among the violations
        world.start()
    return world.outcome


class _World:
    """The disk, the clients, the clock and the observer."""

    def __init__(self, seed: int, wrap: Callable[[Disk], Disk]) -> None:
        self.rng = random.Random(seed)
        self.disk, self.wrap = SimulatedDisk(), wrap
        self.outcome = Outcome()
        self.clock = self.saved_at = 0.0
        self.faults: dict[int, str] = {}
        self.sent: list[tuple[str, dict[str, int]]] = []
        self.acknowledged: list[str] = []
        self.saved: dict[int, str] = {}
        """Digest by number of every checkpoint that was tried; those acknowledged are in ``acked_saves`` too."""
        self.acked_saves: list[int] = []
        self.rotten: set[int] = set()

    def live(self, actions: int) -> None:
        """One life of the process: start, act, end in one of several ways."""
        self.faults = self._plan()
        try:
            trainer = self.start()
            if trainer is not None:
                most = actions if self.rng.random() < 0.6 else 3  # trouble comes soon after trouble
                for _ in range(self.rng.randrange(most)):
                    self._act(trainer)
        except ProcessDeath:
            self._note("death")
        except StateError as error:  # the log is broken: this process may not go on
            self._note(f"gave up: {type(error).__name__}")
        self._end()

    def start(self) -> Trainer | None:
        """What a restart finds must be what was promised."""
        faulty = FaultyDisk(self.wrap(self.disk), self.faults)
        try:
            trainer = Trainer(faulty)
        except StateError as error:
            if not any(fault in _ERRORS for fault in self.faults.values()):
                self._violate(f"a restart was refused: {error}")
            raise
        finally:
            # Not to be read once is as bad as rot: it is passed over, told and set aside.
            bad_sectors = (_BAD_SECTOR.fullmatch(line) for line in faulty.log)
            self.rotten |= {int(found[1]) for found in bad_sectors if found}
        self._check_checkpoints(trainer)
        self._check_state(trainer)
        return trainer

    def _plan(self) -> dict[int, str]:
        """At most two operations fail, the last of them for good."""
        faults: dict[int, str] = {}
        if self.rng.random() < 0.5:
            faults[self.rng.randrange(80)] = self.rng.choice(_ERRORS)
        if self.rng.random() < 0.7:
            faults[self.rng.randrange(100)] = self.rng.choice(("death", "half"))
        return faults

    def _end(self) -> None:
        if self.rng.random() < 0.5:
            self.disk.cut_power(self.rng)
            self._note("power cut")
        else:
            self.disk.kill()
            self._note("killed")
        intact = [n for n in self.acked_saves if n not in self.rotten and self._is_there(n)]
        # What is kept are two; both must be well for one to rot.
        if len(intact) >= KEEP and intact[-KEEP:] == self.acked_saves[-KEEP:] and self.rng.random() < 0.2:
            self._rot(intact[-1])

    # ---------------------------------------------------------------------------------------------- what happens

    def _act(self, trainer: Trainer) -> None:
        self.clock += self.rng.expovariate(1.0) if self.rng.random() < 0.98 else -self.rng.uniform(0, 100)
        kind = self.rng.random()
        if abs(self.clock - self.saved_at) >= SAVE_EVERY_S:  # a clock that was set back must not stop the saves
            self._save(trainer)
        elif kind < 0.5:
            advance(trainer.state)
        elif kind < 0.97:
            self._command(trainer)
        else:
            self._intrude()

    def _command(self, trainer: Trainer) -> None:
        """A client sends something new, or repeats an old command because it has not heard of it."""
        if self.sent and self.rng.random() < 0.3:
            command_id, payload = self.rng.choice(self.sent)
        else:
            seed = self.rng.randrange(NUM_SEEDS)
            successors = list(TABLE[int(trainer.state["lifecycle"][seed])].successors)
            target = int(self.rng.choice(successors if self.rng.random() < 0.8 else list(Lifecycle)))
            command_id, payload = f"c{len(self.sent)}", {"seed": seed, "target": target}
            self.sent.append((command_id, payload))
        before = digest(trainer.state)
        try:
            is_new = trainer.obey(command_id, payload)
        except TransitionError:
            if digest(trainer.state) != before:
                self._violate("a refused command changed the state")
            self.outcome.count("refused")
            return
        except StateError:
            if digest(trainer.state) != before:
                self._violate("a command that was not written changed the state")
            raise
        self._note(f"acknowledged {command_id} at {trainer.state['step']}")
        self.outcome.count("commands" if is_new else "repeated")
        if command_id not in self.acknowledged:
            self.acknowledged.append(command_id)

    def _save(self, trainer: Trainer) -> None:
        self.saved_at = self.clock
        number = trainer.checkpoints.next_number
        self.saved[number] = digest(trainer.state)
        before = self._num_intact()
        try:
            trainer.save()
        except StateError:
            self.outcome.count("refused saves")
            self._note("save refused")
            return
        self.acked_saves.append(number)
        self.outcome.count("saves")
        self._note(f"saved {number} at {trainer.state['step']}")
        if self._num_intact() < min(KEEP, before + 1):
            self._violate("a save removed an intact checkpoint that was still needed")

    def _intrude(self) -> None:
        """A second writer comes while the first is alive."""
        for make in (
            lambda: Checkpoints(FOLDER, kind="simulated", disk=self.disk),
            lambda: CommandLog(LOG, disk=self.disk),
        ):
            try:
                make()
            except StateError:
                self.outcome.count("second writers refused")
            else:
                self._violate("a second writer was let in")

    def _rot(self, number: int) -> None:
        """One bit of an acknowledged checkpoint flips while nothing runs."""
        names = [name for name in self.disk.names(FOLDER) if name.startswith(f"checkpoint-{number:08d}")]
        path = FOLDER / self.rng.choice(names)
        data = bytearray(self.disk.read(path, 1 << 30))
        data[self.rng.randrange(len(data))] ^= 1 << self.rng.randrange(8)
        self.disk.overwrite(path, bytes(data))
        self.rotten.add(number)
        self.outcome.count("rotten")
        self._note(f"rot in {path.name}")

    # ---------------------------------------------------------------------------------------------- what must hold

    def _check_checkpoints(self, trainer: Trainer) -> None:
        """The newest acknowledged one is there; what can be seen is whole; damage is told."""
        healthy = [n for n in self.acked_saves if n not in self.rotten]
        number = 0 if trainer.loaded is None else trainer.loaded.manifest.number
        if healthy and number < healthy[-1]:
            self._violate(f"checkpoint {healthy[-1]} was acknowledged, but {number} was loaded")
        if trainer.loaded is None:
            return
        if (
            trainer.loaded.manifest.digest != self.saved[number]
            or digest(load(FOLDER, disk=self.disk).tree) != self.saved[number]
        ):
            self._violate(f"checkpoint {number} is not what was saved")
        passed = {damage.number for damage in trainer.loaded.passed_over}
        if passed - self.rotten:
            self._violate(f"checkpoints {sorted(passed - self.rotten)} were damaged by no rot")
        for seen in manifest_numbers(self.disk, FOLDER):
            if seen not in self.rotten and problem(self.disk, FOLDER, seen) is not None:
                self._violate(f"the manifest of {seen} can be seen, but it does not load")
        self.acked_saves = [n for n in self.acked_saves if n <= number] + (
            [number] if number not in self.acked_saves else []
        )

    def _check_state(self, trainer: Trainer) -> None:
        """Every acknowledged command is in the state once, in order, and the state is what they make."""
        applied: list[str] = trainer.state["applied"]
        if len(set(applied)) != len(applied):
            self._violate("a command was applied twice")
        missing = [command for command in self.acknowledged if command not in applied]
        if missing:
            self._violate(f"{missing} were acknowledged and are lost")
        if [command for command in applied if command in self.acknowledged] != self.acknowledged:
            self._violate("commands were applied in another order than acknowledged")
        if digest(trainer.state) != digest(replayed(trainer)):
            self._violate("the state is not what its commands make")
        self.acknowledged = list(applied)  # what a restart has found stays
        self._note(f"started at {trainer.state['step']} with {len(applied)} commands")
        self.outcome.count("starts")

    def _num_intact(self) -> int:
        """Checkpoints of which a client was told, and that load."""
        return sum(self._is_there(n) and problem(self.disk, FOLDER, n) is None for n in set(self.acked_saves))

    def _is_there(self, number: int) -> bool:
        return self.disk.exists(FOLDER) and number in manifest_numbers(self.disk, FOLDER)

    def _note(self, what: str) -> None:
        self.outcome.trace.append(f"{self.clock:.6f} {what}")

    def _violate(self, what: str) -> None:
        self.outcome.violations.append(what)
        self._note(f"VIOLATION {what}")


def replayed(trainer: Trainer) -> Tree:
    """The state as the commands of the log make it from the beginning."""
    state = first_state()
    for entry in trainer.log.after(Position()):
        while state["step"] < entry.step:
            advance(state)
        apply(state, entry.id, entry.payload)
    while state["step"] < trainer.state["step"]:
        advance(state)
    state["position"] = trainer.log.position.tree()
    return state
