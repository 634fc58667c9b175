"""The queue on the disk: in order, bounded, and every loss counted, whatever the disk does."""

from __future__ import annotations

import random
from collections import deque
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esper.errors import ConfigError, StateError
from esper.oona.spool import Spool, Spooled
from esper.safety.disk import LocalDisk
from esper.safety.simulation.disk import SimulatedDisk
from esper.safety.simulation.faults import FaultyDisk

pytestmark = pytest.mark.component

FOLDER = Path("/simulated/spool")


def a_record(number: int, size: int = 20) -> Spooled:
    return Spooled("kasmina.health.layer", "run/job\ud800", float(number), str(number).encode().rjust(size, b"."))


def a_spool(disk: SimulatedDisk | FaultyDisk | None = None, **sizes: int) -> Spool:
    return Spool(FOLDER, disk=disk or SimulatedDisk(), **({"max_bytes": 1000, "segment_bytes": 250} | sizes))


def drained(spool: Spool) -> list[Spooled]:
    found: list[Spooled] = []
    while records := spool.peek(3, 1000):
        found += records
        spool.done(len(records))
    return found


def test_records_come_out_as_they_went_in() -> None:
    disk = SimulatedDisk()
    spool = a_spool(disk)
    for number in range(8):
        assert spool.append(a_record(number))
    assert spool.num_records == 8
    assert spool.peek(2, 1) == [a_record(0)]  # at least one, however small the room
    assert drained(spool) == [a_record(number) for number in range(8)]
    assert (spool.num_records, spool.num_bytes, spool.peek(1, 1)) == (0, 0, [])
    assert [name for name in disk.names(FOLDER) if name.endswith(".spool")] == []
    assert spool.append(a_record(8))
    assert drained(spool) == [a_record(8)]


def test_the_next_process_goes_on_where_this_one_has_ended() -> None:
    disk = SimulatedDisk()
    spool = a_spool(disk)
    for number in range(6):
        spool.append(a_record(number))
    with pytest.raises(StateError, match="another one uses"):
        a_spool(disk)
    spool.done(len(spool.peek(4, 1000)))
    spool.close()
    spool.close()
    again = a_spool(disk)
    again.append(a_record(6))
    found = drained(again)
    assert found[-3:] == [a_record(4), a_record(5), a_record(6)]
    assert found == sorted(found, key=lambda record: record.expires)  # of the first segment some may come again


def test_beyond_the_bound_the_oldest_segment_goes_and_is_counted() -> None:
    spool = a_spool()
    for number in range(40):
        assert spool.append(a_record(number))
        assert spool.num_bytes <= 1000
    kept = drained(spool)
    lost = spool.take_losses()
    assert kept == [a_record(number) for number in range(40 - len(kept), 40)]
    assert lost.records == {"spool_full": 40 - len(kept)}
    assert spool.take_losses().records == {}


def test_a_record_that_never_fits_is_refused_and_counted() -> None:
    spool = a_spool()
    spool.append(a_record(0))
    assert not spool.append(a_record(1, size=800))
    assert spool.append(a_record(2, size=500))  # larger than a segment: one of its own
    assert spool.take_losses().records == {"spool_record_too_large": 1}
    assert drained(spool) == [a_record(0), a_record(2, size=500)]


def test_a_tail_that_was_torn_is_cut_off_and_counted(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    for number in range(5):
        spool.append(a_record(number))
    spool.close()
    (segment,) = tmp_path.glob("*.spool")
    size = segment.stat().st_size // 5
    whole = segment.read_bytes()
    for cut in range(1, len(whole), 3):
        segment.write_bytes(whole[:cut])
        again = Spool(tmp_path)
        assert again.take_losses().damaged_bytes == cut % size
        assert again.peek(9, 10_000) == [a_record(number) for number in range(cut // size)]
        again.close()


def test_a_flipped_bit_costs_what_is_behind_it_in_its_segment_and_no_more() -> None:
    disk = SimulatedDisk()
    spool = a_spool(disk)
    for number in range(6):
        spool.append(a_record(number))
    spool.close()
    first, second = (name for name in disk.names(FOLDER) if name.endswith(".spool"))
    whole = {name: disk.read(FOLDER / name, 10_000) for name in (first, second)}
    data, in_first = whole[first], 3
    for at in range(len(data)):
        disk = SimulatedDisk()
        a_spool(disk).close()
        flipped = data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :]
        for name, content in ((first, flipped), (second, whole[second])):
            handle = disk.create(FOLDER / name)
            handle.write(content)
            handle.close()
        again = a_spool(disk)
        intact = at // (len(data) // in_first)
        assert again.take_losses().damaged_bytes == len(data) - intact * len(data) // in_first
        assert drained(again) == [a_record(number) for number in [*range(intact), *range(in_first, 6)]]


def test_damage_while_it_runs_is_counted_in_records() -> None:
    disk = SimulatedDisk()
    spool = a_spool(disk)
    for number in range(3):
        spool.append(a_record(number))
    (name,) = [name for name in disk.names(FOLDER) if name.endswith(".spool")]
    data = bytearray(disk.read(FOLDER / name, 10_000))
    data[len(data) // 3 + 20] ^= 1  # in the second record
    disk.overwrite(FOLDER / name, bytes(data))
    assert drained(spool) == [a_record(0)]
    losses = spool.take_losses()
    assert losses.records == {"spool_damaged": 2}
    assert losses.damaged_bytes == 2 * len(data) // 3
    assert spool.append(a_record(9))
    assert drained(spool) == [a_record(9)]


def test_a_segment_that_is_gone_is_counted() -> None:
    disk = SimulatedDisk()
    spool = a_spool(disk)
    spool.append(a_record(0))
    spool.append(a_record(1))
    (name,) = [name for name in disk.names(FOLDER) if name.endswith(".spool")]
    disk.unlink(FOLDER / name)
    assert drained(spool) == []
    assert spool.take_losses().records == {"spool_unreadable": 2}
    assert spool.num_records == 0


@settings(max_examples=150)
@given(st.integers(0, 2**32))
def test_nothing_is_lost_without_being_counted(seed: int) -> None:
    """Appends, peeks, faults of the disk, kills and power cuts in any order; kept + lost + delivered add up."""
    rng = random.Random(seed)
    disk = SimulatedDisk()
    faulty = FaultyDisk(disk)
    spool = a_spool(faulty)
    waiting: deque[int] = deque()
    number = 0
    for _ in range(60):
        if rng.random() < 0.1:
            faulty.faults[faulty.num_operations + rng.randrange(3)] = rng.choice(["ENOSPC", "EIO", "short"])
        before = spool.num_records
        if rng.random() < 0.7:
            kept = spool.append(a_record(number, rng.choice([20, 90, 300])))
            lost = spool.take_losses().records
            assert spool.num_records == before + 1 - lost.total()
            for _ in range(lost.total() - (not kept)):
                waiting.popleft()
            waiting.extend([number] if kept else [])
            number += 1
        else:
            found = spool.peek(rng.randint(1, 9), 500)
            unread = spool.take_losses().records
            for _ in range(unread["spool_unreadable"]):
                waiting.popleft()
            assert [int(record.expires) for record in found] == list(waiting)[: len(found)]
            taken = rng.randint(0, len(found))
            spool.done(taken)
            for _ in range(taken):
                waiting.popleft()
        assert spool.num_records == len(waiting)
        assert spool.num_bytes <= 1000


@pytest.mark.parametrize("seed", range(40))
def test_after_a_power_cut_what_is_there_is_in_order(seed: int) -> None:
    disk, rng = SimulatedDisk(), random.Random(seed)
    spool = a_spool(disk)
    for number in range(12):
        spool.append(a_record(number))
    disk.cut_power(rng)
    again = a_spool(disk)
    numbers = [int(record.expires) for record in drained(again)]
    assert numbers == sorted(set(numbers))


def test_a_folder_that_cannot_be_used_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StateError, match="needs a folder"):
        Spool(tmp_path / "file")
    disk = SimulatedDisk()
    a_spool(disk).close()
    first = FaultyDisk(disk)
    spool = a_spool(first)
    spool.append(a_record(0))
    spool.close()
    read = next(n for n, what in enumerate(first.log) if "read" in what or "names" in what) if first.log else 0
    for fault in range(read, read + 3):
        try:
            a_spool(FaultyDisk(disk, {fault: "EIO"})).close()
        except StateError as error:
            assert "spool" in str(error)


@pytest.mark.parametrize("sizes", [{"max_bytes": 10, "segment_bytes": 6}, {"segment_bytes": 0}])
def test_a_spool_has_room_for_two_segments(sizes: dict[str, int], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="two segments"):
        Spool(tmp_path, disk=LocalDisk(), **sizes)
