"""The command log: nothing acknowledged is lost, nothing is applied twice, damage is not repaired in silence."""

from __future__ import annotations

import contextlib
import itertools
import random
from pathlib import Path
from typing import Any

import pytest

from esper.errors import StateError
from esper.safety.command_log import CommandLog, Position, read_log
from esper.safety.disk import Disk, LocalDisk
from esper.safety.simulation.disk import SimulatedDisk
from esper.safety.simulation.faults import FaultyDisk, ProcessDeath

pytestmark = pytest.mark.component

LOG = Path("/simulated/run/commands.jsonl")


def fill(disk: Disk, count: int, path: Path = LOG, acknowledged: list[str] | None = None) -> Position:
    """Append ``count`` commands, numbered on from those that are there."""
    with CommandLog(path, disk=disk) as log:
        for number in range(len(log), len(log) + count):
            log.append(f"c{number}", step=number, payload={"germinate": ["site", number]})
            if acknowledged is not None:
                acknowledged.append(f"c{number}")
        return log.position


def ids(disk: Disk, path: Path = LOG) -> list[str]:
    with CommandLog(path, disk=disk) as log:
        return [entry.id for entry in log.after(Position())]


def test_commands_come_back_in_order_and_after_a_position(tmp_path: Path) -> None:
    path = tmp_path / "run" / "commands.jsonl"
    middle = fill(LocalDisk(), 3, path)
    fill(LocalDisk(), 2, path)
    with CommandLog(path) as log:
        assert [(e.id, e.step, e.payload) for e in log.after(middle)] == [
            (f"c{n}", n, {"germinate": ["site", n]}) for n in (3, 4)
        ]
        assert "c0" in log and "c9" not in log and log.num_bytes_cut == 0
        assert Position(**log.position.tree()) == log.position
    assert [entry.id for entry in read_log(path)[0]] == ["c0", "c1", "c2", "c3", "c4"]
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_repeated_command_is_written_once() -> None:
    disk = SimulatedDisk()
    with CommandLog(LOG, disk=disk) as log:
        assert log.append("a", step=1, payload=[1])
        assert not log.append("a", step=9, payload=[1])
        with pytest.raises(StateError, match="got 'a' for two"):
            log.append("a", step=9, payload=[2])
    assert ids(disk) == ["a"]


@pytest.mark.parametrize("payload", [float("nan"), {1, 2}, [[]] * 60_000, "x" * (1 << 20)])
def test_what_cannot_be_read_back_is_refused(payload: Any) -> None:
    disk = SimulatedDisk()
    with CommandLog(LOG, disk=disk) as log:
        with pytest.raises(StateError):
            log.append("a", step=1, payload=payload)
        assert log.append("a", step=1, payload=None)


def test_too_deep_a_payload_is_refused() -> None:
    payload: list[Any] = []
    for _ in range(40):
        payload = [payload]
    with CommandLog(LOG, disk=SimulatedDisk()) as log, pytest.raises(StateError, match="32 deep"):
        log.append("a", step=1, payload=payload)


def test_one_writer_and_none_after_closing() -> None:
    disk = SimulatedDisk()
    with CommandLog(LOG, disk=disk) as log, pytest.raises(StateError, match="one writer"):
        CommandLog(LOG, disk=disk)
    with pytest.raises(StateError, match="while open"):
        log.append("a", step=0, payload=1)
    log.close()


def test_a_position_of_another_run_is_refused() -> None:
    disk = SimulatedDisk()
    position = fill(disk, 3)
    other = SimulatedDisk()
    with CommandLog(LOG, disk=other) as log:
        for number in range(3):
            log.append(f"d{number}", step=number, payload=None)
        for place in (position, Position(count=9, seal=position.seal), Position(count=-1, seal=position.seal)):
            with pytest.raises(StateError, match="go on from the checkpoint's position"):
                log.after(place)


@pytest.mark.parametrize("death", ["death", "half"])
def test_death_at_every_operation(death: str) -> None:
    counted = FaultyDisk(SimulatedDisk())
    fill(counted, 6)
    fill(counted, 2)
    for number in range(counted.num_operations):
        disk, acknowledged = SimulatedDisk(), list[str]()
        faulty = FaultyDisk(disk, {number: death})
        with pytest.raises(ProcessDeath):
            fill(faulty, 6, acknowledged=acknowledged)
            fill(faulty, 2, acknowledged=acknowledged)
        disk.kill()
        assert ids(disk)[: len(acknowledged)] == acknowledged, f"death at {number}"


def lost(seed: int) -> bool:
    rng = random.Random(seed)
    disk, acknowledged = SimulatedDisk(), list[str]()
    for _ in range(3):
        faulty = FaultyDisk(disk, {rng.randrange(30): rng.choice(("death", "half", "EIO", "short"))})
        with contextlib.suppress(ProcessDeath, StateError):
            fill(faulty, 8, acknowledged=acknowledged)
        disk.cut_power(rng) if rng.random() < 0.6 else disk.kill()
        found = ids(disk)
        if found[: len(acknowledged)] != acknowledged or len(set(found)) < len(found):
            return True
        acknowledged = found
    return False


def test_power_cuts_and_refusals_lose_nothing() -> None:
    assert not any(lost(seed) for seed in range(200))


@pytest.mark.long
def test_very_many_power_cuts_and_refusals_lose_nothing() -> None:
    assert not any(lost(seed) for seed in range(5000))


def test_after_an_error_the_log_takes_nothing_until_it_is_read_again() -> None:
    disk = SimulatedDisk()
    faulty = FaultyDisk(disk)
    with CommandLog(LOG, disk=faulty) as log:
        log.append("a", step=0, payload=None)
        faulty.faults[faulty.num_operations + 1] = "EIO"
        with pytest.raises(StateError, match="before it is acknowledged"):
            log.append("b", step=0, payload=None)
        with pytest.raises(StateError, match="nothing after an error"):
            log.append("c", step=0, payload=None)
        assert "b" not in log
    assert ids(disk) == ["a"]


def test_a_first_line_that_was_refused_does_not_come_back() -> None:
    """Its sync has failed and it was cut off: the log looks empty, but the disk may hold the line all the same."""
    for operation, seed in itertools.product(range(10), range(40)):
        disk = SimulatedDisk()
        try:
            with CommandLog(LOG, disk=FaultyDisk(disk, {operation: "EIO"})) as log:
                log.append("c" * (seed + 1), step=1, payload=[])
        except StateError:
            seen = ids(disk)  # who is told "refused" looks here first
            disk.cut_power(random.Random(seed))
            assert ids(disk) == seen, (operation, seed)


def test_an_unfinished_line_is_cut_off_and_told() -> None:
    disk = SimulatedDisk()
    fill(disk, 3)
    whole = disk.read(LOG, 1 << 20)
    last = whole.rindex(b"\n", 0, -1) + 1
    for size in range(last, len(whole)):
        disk.overwrite(LOG, whole[:size])
        assert read_log(LOG, disk=disk)[1] == size - last
        with CommandLog(LOG, disk=disk) as log:
            assert len(log) == 2 and log.num_bytes_cut == size - last
        assert disk.read(LOG, 1 << 20) == whole[:last]
    disk.overwrite(LOG, whole[: last + 5] + bytes(len(whole) - last - 6) + b"\n")
    assert ids(disk) == ["c0", "c1"]


def flipped(count: int) -> int:
    """Flips of one bit that go unnoticed: the log reads as if nothing had happened, but it has."""
    disk, rng = SimulatedDisk(), random.Random(0)
    fill(disk, 12)
    whole = disk.read(LOG, 1 << 20)
    unnoticed = 0
    for _ in range(count):
        data = bytearray(whole)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        disk.overwrite(LOG, bytes(data))
        try:
            entries, num_bytes_cut = read_log(LOG, disk=disk)
        except StateError:
            continue
        unnoticed += num_bytes_cut == 0 or len(entries) < 11
    return unnoticed


def test_flipped_bits_are_found() -> None:
    assert flipped(400) == 0


@pytest.mark.long
def test_two_thousand_flipped_bits_in_the_log_are_found() -> None:
    assert flipped(2000) == 0


def test_lines_that_are_left_out_moved_or_doubled_are_found() -> None:
    disk = SimulatedDisk()
    fill(disk, 4)
    lines = disk.read(LOG, 1 << 20).splitlines(keepends=True)
    for changed in (lines[1:], lines[:1] + lines[2:], [lines[1], lines[0], *lines[2:]], [*lines, lines[-1]]):
        disk.overwrite(LOG, b"".join(changed))
        with pytest.raises(StateError, match="must be a whole command in order"):
            CommandLog(LOG, disk=disk)


def test_hostile_lines_are_refused() -> None:
    from esper.safety import command_log

    disk = SimulatedDisk()
    for body in (b"[]", b'{"id":1,"step":0,"payload":0}', b'{"id":"a","step":true,"payload":0}', b"[" * 5000, b"\xff"):
        seal = command_log._seal(body, command_log._START)
        handle = disk.create(Path(f"/simulated/{seal}"))
        handle.write(b'{"seal":"' + seal.encode() + b'","command":' + body + b"}\n")
        with pytest.raises(StateError):
            read_log(Path(f"/simulated/{seal}"), disk=disk)


def test_a_log_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(StateError, match="needs a folder it can write"):
        CommandLog(tmp_path / "file" / "commands.jsonl")
    (tmp_path / "log").mkdir()
    with pytest.raises(StateError, match="must be usable"):
        CommandLog(tmp_path / "log")
