"""A log is read from where it was left, whatever happens to the reader or to the log."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esper.errors import StateError
from esper.oona import follower as following
from esper.oona.follower import Follower
from esper.safety.disk import Disk
from esper.safety.simulation.disk import SimulatedDisk
from esper.safety.simulation.faults import FaultyDisk, ProcessDeath

pytestmark = pytest.mark.component

CURSOR = Path("/simulated/run/cursor")


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "events.jsonl"


def a_follower(log: Path, disk: Disk | None = None, **options: Any) -> Follower:
    return Follower(log, CURSOR, disk=disk or SimulatedDisk(), **options)


def took(follower: Follower, most: int = 100, most_bytes: int = 1 << 20) -> list[bytes]:
    lines = follower.read(most, most_bytes)
    if lines:
        follower.advance(lines[-1])
    return [line.data for line in lines]


def test_lines_come_once_and_only_whole(log: Path) -> None:
    follower = a_follower(log)
    assert took(follower) == []
    log.write_bytes(b"one\ntwo\nthr")
    assert follower.num_bytes_left == 11
    assert took(follower) == [b"one", b"two"]
    assert took(follower) == []
    with log.open("ab") as stream:
        stream.write(b"ee\n\nfour\n")
    assert took(follower, most=1) == [b"three"]
    assert took(follower) == [b"", b"four"]
    assert follower.num_bytes_left == 0
    assert follower.rewrites == 0


def test_what_is_not_done_is_read_again(log: Path) -> None:
    log.write_bytes(b"one\ntwo\n")
    follower = a_follower(log)
    first, second = follower.read(10, 100)
    assert (first.start, first.end, second.start, second.end) == (0, 4, 4, 8)
    follower.advance(first)
    assert [line.data for line in follower.read(10, 100)] == [b"two"]


def test_bytes_are_bounded_but_one_line_always_fits(log: Path) -> None:
    log.write_bytes(b"x" * 3_000_000 + b"\n" + b"y\n" * 10)
    follower = a_follower(log)
    assert len(took(follower, most=1, most_bytes=10)[0]) == 3_000_000
    assert took(follower, most_bytes=5) == [b"y", b"y"]


def test_no_further_than_the_writer_has_synced(log: Path) -> None:
    log.write_bytes(b"one\ntwo\n")
    synced = [4]
    follower = a_follower(log, end=lambda: synced[0])
    assert took(follower) == [b"one"]
    assert took(follower) == []
    assert follower.num_bytes_left == 0
    synced[0] = 8
    assert took(follower) == [b"two"]


def test_the_next_process_goes_on_where_the_cursor_says(log: Path) -> None:
    disk = SimulatedDisk()
    log.write_bytes(b"one\ntwo\nthree\n")
    follower = a_follower(log, disk)
    took(follower, most=2)
    follower.save()
    took(follower)
    assert took(a_follower(log, disk)) == [b"three"]


@pytest.mark.parametrize("damage", [b"", b"{}", b"rubbish", b"[" * 100, b"\xff" * 10, bytes(100_000), None])
def test_without_a_readable_cursor_all_is_read_again(log: Path, damage: bytes | None) -> None:
    disk = SimulatedDisk()
    log.write_bytes(b"one\n")
    follower = a_follower(log, disk)
    took(follower)
    follower.save()
    good = disk.read(CURSOR, 10_000)
    disk.overwrite(CURSOR, good.replace(b"4", b"3", 1) if damage is None else damage)
    if damage is not None and len(damage) > 1 << 16:
        with pytest.raises(StateError, match="needs a place"):
            a_follower(log, disk)
        return
    assert took(a_follower(log, disk)) == [b"one"]


def test_a_log_that_was_cut_and_written_anew_is_read_from_there(log: Path) -> None:
    follower = a_follower(log)
    lines = [f"line {n}\n".encode() for n in range(100)]
    for n in range(0, 100, 5):
        log.write_bytes(b"".join(lines[: n + 5]))
        took(follower)
    log.write_bytes(b"".join([*lines[:52], b"new 52\n", b"new 53\n"]))
    again = took(follower)
    assert again[-2:] == [b"new 52", b"new 53"]
    assert again[0] in (b"line 50", b"line 45", b"line 40", b"line 30", b"line 25")  # not from the beginning
    assert follower.rewrites == 1
    assert took(follower) == []


def test_a_log_of_the_same_length_that_says_something_else_is_noticed(log: Path) -> None:
    follower = a_follower(log)
    log.write_bytes(b"one\ntwo\n")
    took(follower)
    log.write_bytes(b"one\nTWO\n")
    assert took(follower) == [b"one", b"TWO"]
    log.write_bytes(b"")
    assert took(follower) == []
    log.write_bytes(b"new\n")
    assert took(follower) == [b"new"]
    assert follower.rewrites == 2
    log.unlink()
    assert took(follower) == []
    assert follower.num_bytes_left == 0


def test_marks_are_few_and_reach_back_to_the_beginning(log: Path) -> None:
    follower = a_follower(log)
    log.write_bytes(b"".join(b"%06d\n" % n for n in range(2000)))
    while took(follower, most=1):
        assert len(follower._marks) <= following.MOST_MARKS
    assert follower._marks[0].end == 7
    follower.save()


def test_a_place_that_has_not_changed_is_not_written(log: Path) -> None:
    disk = FaultyDisk(SimulatedDisk())
    follower = a_follower(log, disk)
    before = disk.num_operations
    follower.save()
    assert disk.num_operations == before
    log.write_bytes(b"one\n")
    took(follower)
    follower.save()
    after = disk.num_operations
    follower.save()
    assert disk.num_operations == after


@pytest.mark.parametrize("seed", range(30))
def test_a_power_cut_at_any_moment_costs_repetition_only(log: Path, seed: int) -> None:
    """The log is safe; the cursor's writes may be lost, torn or reordered: nothing is skipped."""
    rng, disk = random.Random(seed), SimulatedDisk()
    lines = [f"line {n} {'x' * rng.randrange(40)}".encode() for n in range(30)]
    seen: list[bytes] = []
    for n in range(len(lines)):
        log.write_bytes(b"".join(line + b"\n" for line in lines[: n + 1]))
        faulty = FaultyDisk(disk, {rng.randrange(12): "death"} if rng.random() < 0.3 else {})
        try:
            follower = a_follower(log, faulty)
            while batch := took(follower, most=rng.randint(1, 5)):
                seen += batch
                if rng.random() < 0.7:
                    follower.save()
        except ProcessDeath:
            disk.kill()
        if rng.random() < 0.3:
            disk.cut_power(rng)
    seen += took(a_follower(log, disk))
    assert set(seen) == set(lines)
    firsts = list(dict.fromkeys(seen))
    assert firsts == lines


@settings(max_examples=40)
@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 6)), max_size=12))
def test_after_any_rewriting_all_that_is_in_the_log_was_read(edits: list[tuple[int, int]]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        follower = a_follower(log)
        content: list[bytes] = []
        seen: set[tuple[int, bytes]] = set()
        for turn, (keep, new) in enumerate(edits):
            content = content[:keep] + [f"{turn}.{n}".encode() for n in range(new)]
            log.write_bytes(b"".join(line + b"\n" for line in content))
            while lines := follower.read(2, 1 << 20):
                follower.advance(lines[-1])
                seen |= {(line.start, line.data) for line in lines}
            start = 0
            for line in content:
                assert (start, line) in seen
                start += len(line) + 1


def test_a_disk_that_refuses_keeps_the_earlier_place(log: Path) -> None:
    disk = SimulatedDisk()
    log.write_bytes(b"one\ntwo\n")
    follower = a_follower(log, disk)
    took(follower, most=1)
    follower.save()
    took(follower)
    faulty = FaultyDisk(disk, {0: "ENOSPC"})
    follower._disk = faulty
    with pytest.raises(OSError, match="No space"):
        follower.save()
    assert took(a_follower(log, disk)) == [b"two"]
    with pytest.raises(StateError, match="needs a place"):
        a_follower(log, FaultyDisk(disk, {0: "EIO", 1: "EIO", 2: "EIO", 3: "EIO"}))


@pytest.mark.parametrize("error", [PermissionError(13, "denied"), OSError(5, "EIO"), NotADirectoryError(20, "x")])
def test_a_disk_that_does_not_tell_the_size_hurts_nobody_who_asks(
    log: Path, error: OSError, monkeypatch: pytest.MonkeyPatch
) -> None:
    log.write_bytes(b"one\ntwo\n")
    follower = a_follower(log)
    took(follower, most=1)

    def refuse(path: Path) -> None:
        raise error

    monkeypatch.setattr(following, "os", SimpleNamespace(stat=refuse))
    assert a_follower(log).num_bytes_left == 0
    assert follower.num_bytes_left == 4
    assert took(follower) == [b"two"]
    assert follower.num_bytes_left == 0


def test_how_far_it_is_can_be_asked_while_marks_are_taken_away(log: Path) -> None:
    """Between a look at the list of marks and a look at its last one, the reader's thread may have emptied it."""
    disk = SimulatedDisk()
    log.write_bytes(b"one\ntwo\n")
    follower = a_follower(log, disk)
    took(follower)
    follower.save()

    class Emptied(list[Any]):
        def __bool__(self) -> bool:
            return True

    follower._marks = Emptied()
    assert (follower.offset, follower.num_bytes_left) == (8, 0)
    assert a_follower(log, disk).offset == 8


def test_a_cursor_is_small(log: Path) -> None:
    disk = SimulatedDisk()
    follower = a_follower(log, disk)
    log.write_bytes(b"x\n" * 500)
    while took(follower, most=1):
        pass
    follower.save()
    assert len(disk.read(CURSOR, 1 << 20)) < 8192
    assert len(msgspec.json.decode(disk.read(CURSOR, 1 << 20))["marks"]) <= following.MOST_MARKS
