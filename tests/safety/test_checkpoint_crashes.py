"""Death, power cuts, refusals and rot at every point of a save: the newest acknowledged checkpoint is always there."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.safety.stored import FOLDER, save_some, tree_of

from esper.errors import StateError
from esper.safety.checkpoint import Checkpoints, load, manifest_numbers, problem
from esper.safety.disk import Disk, LocalDisk
from esper.safety.simulation.disk import SimulatedDisk
from esper.safety.simulation.faults import FaultyDisk, ProcessDeath
from esper.safety.tree import digest

pytestmark = pytest.mark.component

SAVES = 4
ERRORS = ("ENOSPC", "EIO", "EACCES", "short")


def num_operations() -> int:
    counted = FaultyDisk(SimulatedDisk())
    save_some(counted, SAVES, [])
    return counted.num_operations


def broken_promises(disk: Disk, acknowledged: list[int], *, folder: Path = FOLDER) -> Iterator[str]:
    """What must hold of a folder after any crash, by somebody who opens it anew and saves once more."""
    if acknowledged and not disk.exists(folder):
        yield f"checkpoint {acknowledged[-1]} was acknowledged, but the folder is gone"
        return
    if disk.exists(folder):
        for number in manifest_numbers(disk, folder):
            if problem(disk, folder, number) is not None:
                yield f"checkpoint {number} can be seen, but: {problem(disk, folder, number)}"
    with Checkpoints(folder, kind="test", disk=disk) as checkpoints:
        try:
            loaded = checkpoints.load()
        except StateError as error:
            yield str(error)
            return
        number = 0 if loaded is None else loaded.manifest.number
        if acknowledged and number < acknowledged[-1]:
            yield f"checkpoint {acknowledged[-1]} was acknowledged, but {number} was loaded"
        if loaded is not None and digest(loaded.tree) != digest(tree_of(number)):
            yield f"checkpoint {number} is not what was saved"
        left = [name for name in disk.names(folder) if name.endswith(".part")]
        if left:
            yield f"temporary files were left: {left}"
        checkpoints.save(tree_of(checkpoints.next_number), step=0)


def crashed(disk: Disk, count: int, acknowledged: list[int]) -> None:
    with contextlib.suppress(ProcessDeath, StateError):
        save_some(disk, count, acknowledged)


@pytest.mark.parametrize("death", ["death", "half"])
def test_death_at_every_file_operation(death: str) -> None:
    total = num_operations()
    assert total > 60
    for number in range(total):
        disk, acknowledged = SimulatedDisk(), list[int]()
        crashed(FaultyDisk(disk, {number: death}), SAVES, acknowledged)
        disk.kill()
        assert not list(broken_promises(disk, acknowledged)), f"death at operation {number} of {total}"


def power_cut(seed: int, skipped_sync: int | None = None) -> list[str]:
    """Two lives with saves end at some operation, the last one by a power cut; what is broken then."""
    rng = random.Random(seed)
    disk, acknowledged = SimulatedDisk(), list[int]()
    skipped = frozenset[int]() if skipped_sync is None else frozenset([skipped_sync])
    for is_last in (False, True):
        faults = {rng.randrange(90 if rng.random() < 0.7 else 20): rng.choice(("death", "half"))}
        crashed(FaultyDisk(disk, faults, skipped_syncs=skipped), SAVES, acknowledged)
        if is_last or rng.random() < 0.5:
            disk.cut_power(rng)
        else:
            disk.kill()
    return list(broken_promises(disk, acknowledged))


def test_power_cuts() -> None:
    for seed in range(150):
        assert not power_cut(seed), f"seed {seed}"


@pytest.mark.long
def test_a_thousand_power_cuts() -> None:
    for seed in range(1000):
        assert not power_cut(seed), f"seed {seed}"


def num_syncs() -> int:
    counted = FaultyDisk(SimulatedDisk())
    save_some(counted, SAVES, [])
    return counted.num_syncs


def unneeded_syncs(most_seeds: int) -> list[int]:
    """Syncs whose removal nobody notices."""
    return [n for n in range(num_syncs()) if not any(power_cut(seed, skipped_sync=n) for seed in range(most_seeds))]


@pytest.mark.long
def test_every_single_sync_is_needed() -> None:
    assert num_syncs() > 20
    assert unneeded_syncs(1000) == []


@pytest.mark.parametrize("error", ERRORS)
def test_every_operation_can_be_refused(error: str) -> None:
    total = num_operations()
    refused = 0
    for number in range(total):
        disk, acknowledged = SimulatedDisk(), list[int]()
        faulty = FaultyDisk(disk, {number: error})
        try:
            save_some(faulty, SAVES, acknowledged)
        except StateError as refusal:
            refused += 1
            assert "checkpoint" in str(refusal)
        disk.kill()
        disk.cut_power(random.Random(number))
        assert not list(broken_promises(disk, acknowledged)), f"{error} at operation {number} of {total}"
    assert refused > total / 2


def test_a_refused_save_leaves_the_disk_as_it_was_and_the_next_one_works() -> None:
    disk = SimulatedDisk()
    faulty = FaultyDisk(disk)
    with Checkpoints(FOLDER, kind="test", disk=faulty) as checkpoints:
        checkpoints.save(tree_of(1), step=1)
        before = disk.content()
        faulty.faults[faulty.num_operations + 4] = "short"
        with pytest.raises(StateError, match=r"checkpoint 2 must reach the disk.*checkpoint 1 is as it was"):
            checkpoints.save(tree_of(2), step=2)
        assert disk.content() == before
        assert checkpoints.save(tree_of(3), step=3).number == 3


def test_old_ones_that_cannot_be_removed_are_told() -> None:
    faulty = FaultyDisk(SimulatedDisk())
    with Checkpoints(FOLDER, kind="test", keep=1, disk=faulty) as checkpoints:
        checkpoints.save(tree_of(1), step=1)
        start = faulty.num_operations
        checkpoints.save(tree_of(2), step=2)
        unlink = next(line for line in faulty.log[start:] if "unlink" in line)
        faulty.faults[faulty.num_operations + int(unlink.split()[0]) - start] = "EACCES"
        assert "could not be removed" in (checkpoints.save(tree_of(3), step=3).left_behind or "")
        assert checkpoints.save(tree_of(4), step=4).left_behind is None
        assert manifest_numbers(faulty, FOLDER) == [4]


# ----------------------------------------------------------------------------------------------------------------------
# Rot


def two_checkpoints() -> SimulatedDisk:
    disk = SimulatedDisk()
    save_some(disk, 2, [])
    disk.kill()
    return disk


def newest_files(disk: SimulatedDisk) -> list[str]:
    return [name for name in disk.names(FOLDER) if name.startswith("checkpoint-00000002")]


def must_fall_back(disk: SimulatedDisk, what: str) -> None:
    loaded = load(FOLDER, disk=disk)
    assert [damage.number for damage in loaded.passed_over] == [2], what
    assert digest(loaded.tree) == digest(tree_of(1)), what


def flip_bits(count: int) -> None:
    disk, rng = two_checkpoints(), random.Random(0)
    contents = {name: disk.read(FOLDER / name, 1 << 30) for name in newest_files(disk)}
    for _ in range(count):
        name = rng.choices(list(contents), [len(data) for data in contents.values()])[0]
        data = bytearray(contents[name])
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        disk.overwrite(FOLDER / name, bytes(data))
        must_fall_back(disk, name)
        disk.overwrite(FOLDER / name, contents[name])
    assert load(FOLDER, disk=disk).passed_over == ()


def test_flipped_bits_are_found() -> None:
    flip_bits(300)


@pytest.mark.long
def test_two_thousand_flipped_bits_are_found() -> None:
    flip_bits(2000)


def test_truncation_is_found() -> None:
    disk = two_checkpoints()
    for name in newest_files(disk):
        whole = disk.read(FOLDER / name, 1 << 30)
        for size in {*range(0, len(whole), 64), len(whole) - 1}:
            disk.overwrite(FOLDER / name, whole[:size])
            must_fall_back(disk, f"{name} cut to {size}")
        disk.overwrite(FOLDER / name, whole + b"\0")
        must_fall_back(disk, f"{name} with one byte more")
        disk.overwrite(FOLDER / name, whole)


# ----------------------------------------------------------------------------------------------------------------------
# The real disk, and a real SIGKILL


KILLED = """
import os, signal, sys
from pathlib import Path
from esper.safety.disk import LocalDisk
from esper.safety.simulation.faults import FaultyDisk
from tests.safety.stored import save_some
folder = Path(sys.argv[1])
for fault in sys.argv[2:]:
    number, death = fault.split()
    pid = os.fork()
    if pid == 0:
        acknowledged = []
        disk = FaultyDisk(LocalDisk(), {int(number): death}, die=lambda: os.kill(os.getpid(), signal.SIGKILL))

        class Noted(list):
            def append(self, saved):
                fd = os.open(folder / f"acknowledged-{number}-{death}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                os.write(fd, f"{saved}\\n".encode())
                os.close(fd)

        save_some(disk, 3, Noted(), folder=folder / f"{number}-{death}")
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status), (fault, status)
"""


def kill_for_real(tmp_path: Path, deaths: list[str]) -> None:
    root = Path(__file__).parents[2]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root / "src"), str(root)])}
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path), *deaths], env=env, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
    for death in deaths:
        number, kind = death.split()
        noted = tmp_path / f"acknowledged-{number}-{kind}"
        acknowledged = [int(line) for line in noted.read_text().split()] if noted.exists() else []
        assert not list(broken_promises(LocalDisk(), acknowledged, folder=tmp_path / f"{number}-{kind}")), death


@pytest.mark.skipif(not hasattr(signal, "SIGKILL") or not hasattr(os, "fork"), reason="POSIX")
def test_sigkill_at_every_sixth_operation_on_the_real_disk(tmp_path: Path) -> None:
    kill_for_real(tmp_path, [f"{n} {'half' if n % 2 else 'death'}" for n in range(0, 60, 6)])


@pytest.mark.long
@pytest.mark.skipif(not hasattr(signal, "SIGKILL") or not hasattr(os, "fork"), reason="POSIX")
def test_sigkill_at_every_operation_on_the_real_disk(tmp_path: Path) -> None:
    kill_for_real(tmp_path, [f"{n} {kind}" for n in range(60) for kind in ("death", "half")])
