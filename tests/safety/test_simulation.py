"""One seed drives a whole small world; every promise holds in all of them, and every planted bug is found."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from esper.errors import StateError
from esper.safety import checkpoint, command_log, disk, manifest
from esper.safety.checkpoint import Checkpoints
from esper.safety.command_log import CommandLog
from esper.safety.disk import Disk
from esper.safety.simulation import world
from esper.safety.simulation.disk import SimulatedDisk, SimulatedLock
from esper.safety.simulation.world import simulate

pytestmark = pytest.mark.component

CI_SEEDS, LONG_SEEDS, CANARY_SEEDS = 120, 100_000, 500


def run_all(seeds: Iterable[int]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for seed in seeds:
        outcome = simulate(seed)
        assert not outcome.violations, f"seed {seed}: {outcome.violations}\n" + "\n".join(outcome.trace)
        counts.update(outcome.counts)
    return counts


def test_no_promise_is_broken_in_any_world() -> None:
    counts = run_all(range(CI_SEEDS))
    for what in ("commands", "repeated", "refused", "saves", "refused saves", "second writers refused", "rotten"):
        assert counts[what] > 10, f"the worlds hardly try {what}: {counts}"


@pytest.mark.long
@pytest.mark.timeout(0)
def test_no_promise_is_broken_in_any_of_very_many_worlds() -> None:
    print(dict(run_all(range(LONG_SEEDS))))


def test_a_seed_says_everything() -> None:
    for seed in range(10):
        assert simulate(seed).trace == simulate(seed).trace
    assert simulate(1).trace != simulate(2).trace


# ----------------------------------------------------------------------------------------------------------------------
# Planted bugs. Each is one that has been made somewhere; each must be found.

Patch = pytest.MonkeyPatch
Wrap = Callable[[Disk], Disk]


class SloppyDisk:
    """Forgets those syncs that ``forgets(kind, name, last name that was given)`` says."""

    def __init__(self, inner: Any, forgets: Callable[[str, str, str], bool]) -> None:
        self._inner, self._forgets, self._last = inner, forgets, ""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def create(self, path: Path) -> Any:
        return SloppyHandle(self._inner.create(path), self._forgets("sync", path.name, self._last))

    def open_log(self, path: Path) -> Any:
        return SloppyHandle(self._inner.open_log(path), self._forgets("sync", path.name, self._last))

    def rename(self, old: Path, new: Path) -> None:
        self._inner.rename(old, new)
        self._last = new.name

    def unlink(self, path: Path) -> None:
        self._inner.unlink(path)
        self._last = f"without {path.name}"

    def sync_folder(self, folder: Path) -> None:
        if not self._forgets("sync_folder", folder.name, self._last):
            self._inner.sync_folder(folder)


class SloppyHandle:
    def __init__(self, inner: Any, forgets: bool) -> None:
        self._inner, self._is_forgetful = inner, forgets

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def sync(self) -> None:
        if not self._is_forgetful:
            self._inner.sync()


def forgetting(forgets: Callable[[str, str, str], bool]) -> Callable[[Patch], Wrap]:
    return lambda patch: lambda inner: SloppyDisk(inner, forgets)


def planted(plant: Callable[[Patch], object]) -> Callable[[Patch], Wrap]:
    def apply(patch: Patch) -> Wrap:
        plant(patch)
        return lambda inner: inner

    return apply


def tensors_in_place(patch: Patch) -> None:
    """Written under their final names."""

    def write(self: Checkpoints, name: str, data: bytes) -> None:
        handle = self._disk.create(self.folder / name)
        handle.write(data)
        handle.sync()

    patch.setattr(Checkpoints, "_write", write)


def rename_before_sync(patch: Patch) -> None:
    def write(disk: Disk, temporary: Path, path: Path, parts: Iterable[bytes]) -> None:
        handle = disk.create(temporary)
        for part in parts:
            handle.write(part)
        disk.rename(temporary, path)
        disk.sync_folder(path.parent)
        handle.sync()

    patch.setattr(checkpoint, "write_whole", write)


def acknowledge_first(patch: Patch) -> None:
    append = CommandLog.append

    def later(self: CommandLog, command_id: str, *, step: int, payload: Any) -> bool:
        with contextlib.suppress(StateError):
            return append(self, command_id, step=step, payload=payload)
        return True

    patch.setattr(CommandLog, "append", later)


def forget_ids(patch: Patch) -> None:
    number = iter(range(10**9))
    append = CommandLog.append
    patch.setattr(CommandLog, "__contains__", lambda self, command_id: False)
    patch.setattr(
        CommandLog,
        "append",
        lambda self, command_id, *, step, payload: append(
            self, f"{command_id}/{next(number)}", step=step, payload={**payload, "id": command_id}
        ),
    )
    apply = world.apply
    patch.setattr(world, "apply", lambda state, command_id, payload: apply(state, command_id.split("/")[0], payload))


def no_hashes(patch: Patch) -> None:
    patch.setattr(manifest, "_unsealed", lambda data: data[len(manifest._HEAD) + 64 + len(manifest._MIDDLE) : -2])
    no_digest_no_hashes_of_tensors(patch)


def no_digest_no_hashes_of_tensors(patch: Patch) -> None:
    patch.setattr(checkpoint, "_hashed", lambda d, f, m: ((x, d.read(f / x.name, 1 << 30)) for x in m.files))
    real = checkpoint.digest
    patch.setattr(checkpoint, "digest", lambda tree: Anything(real(tree)))


class Anything(str):
    """Equal to every digest."""

    __hash__ = str.__hash__

    def __ne__(self, other: object) -> bool:
        return False


def prune_by_number(patch: Patch) -> None:
    patch.setattr(Checkpoints, "_is_good", lambda self, number: True)


def prune_first(patch: Patch) -> None:
    """Room is made before the new checkpoint is safe."""
    save = Checkpoints.save

    def eager(self: Checkpoints, tree: Any, *, step: int) -> Any:
        for number in checkpoint.manifest_numbers(self._disk, self.folder):
            self._disk.unlink(self.folder / manifest.manifest_name(number))
        return save(self, tree, step=step)

    patch.setattr(Checkpoints, "save", eager)


def replay_everything(patch: Patch) -> None:
    patch.setattr(CommandLog, "after", lambda self, position: list(self._entries.values()))


def replay_nothing(patch: Patch) -> None:
    patch.setattr(CommandLog, "after", lambda self, position: [])


def keep_the_unfinished_line(patch: Patch) -> None:
    def opened(self: CommandLog) -> None:
        data = self._disk.read(self.path, 1 << 30) if self._disk.exists(self.path) else b""
        for entry, seal, end in command_log._entries(data, self.path):
            self._take(entry, seal)
            self._size = end
        self._handle = self._disk.open_log(self.path)
        self._handle.sync()
        self._disk.sync_folder(self.path.parent)

    patch.setattr(CommandLog, "_open", opened)


def believe_what_is_read(patch: Patch) -> None:
    """The log's last line counts, whether it is on the disk or only in memory."""

    def opened(self: CommandLog) -> None:
        data = self._disk.read(self.path, 1 << 30) if self._disk.exists(self.path) else b""
        for entry, seal, end in command_log._entries(data, self.path):
            self._take(entry, seal)
            self._size = end
        self._handle = self._disk.open_log(self.path)
        if len(data) > self._size:
            self._handle.truncate(self._size)
        self._disk.sync_folder(self.path.parent)

    patch.setattr(CommandLog, "_open", opened)


def go_on_after_an_error(patch: Patch) -> None:
    """A command that the disk refused is applied all the same."""
    obey = world.Trainer.obey

    def obstinate(self: world.Trainer, command_id: str, payload: dict[str, int]) -> bool:
        try:
            return obey(self, command_id, payload)
        except StateError:
            world.apply(self.state, command_id, payload)
            raise

    patch.setattr(world.Trainer, "obey", obstinate)


def meet_the_damaged_again(patch: Patch) -> None:
    patch.setattr(Checkpoints, "_set_aside", lambda self, numbers: None)


def first_writer_only_asked_once(patch: Patch) -> None:
    patch.setattr(SimulatedDisk, "lock", lambda self, path: SimulatedLock({}, path))


def trust_the_folder(patch: Patch) -> None:
    """A folder that is there is taken to be safe."""

    def make(d: Disk, folder: Path) -> None:
        missing = [path for path in (folder, *folder.parents[:-1]) if not d.exists(path)]
        for path in reversed(missing):
            d.make_folder(path)
            d.sync_folder(path.parent)

    for module in (checkpoint, command_log, disk):
        patch.setattr(module, "make_folders", make)


def manifest_first(patch: Patch) -> None:
    """The commit point comes before what it commits."""
    save = Checkpoints.save

    def hasty(self: Checkpoints, tree: Any, *, step: int) -> Any:
        written: list[tuple[str, bytes]] = []
        write = Checkpoints._write
        with pytest.MonkeyPatch.context() as inner:

            def delayed(s: Checkpoints, name: str, data: bytes) -> None:
                written.append((name, data))
                if name.endswith(".json"):
                    for part in reversed(written):
                        write(s, *part)

            inner.setattr(Checkpoints, "_write", delayed)
            return save(self, tree, step=step)

    patch.setattr(Checkpoints, "save", hasty)


BUGS: dict[str, Callable[[Patch], Wrap]] = {
    "tensors are not synced": forgetting(lambda kind, name, last: kind == "sync" and ".safetensors" in name),
    "the manifest is not synced": forgetting(lambda kind, name, last: kind == "sync" and ".json." in name),
    "the folder is not synced before the manifest": forgetting(
        lambda kind, name, last: kind == "sync_folder" and last.endswith(".safetensors")
    ),
    "the folder is not synced after the manifest": forgetting(
        lambda kind, name, last: kind == "sync_folder" and last.endswith(".json")
    ),
    "the folder is not synced while old ones go": forgetting(
        lambda kind, name, last: kind == "sync_folder" and last.startswith("without")
    ),
    "the folder of the run is not synced": forgetting(lambda kind, name, last: kind == "sync_folder" and name == "run"),
    "commands are not synced": forgetting(lambda kind, name, last: kind == "sync" and name == "commands.jsonl"),
    "files are written in place": planted(tensors_in_place),
    "files are renamed before they are synced": planted(rename_before_sync),
    "commands are acknowledged before the log": planted(acknowledge_first),
    "repeated commands are not recognised": planted(forget_ids),
    "nothing is hashed": planted(no_hashes),
    "tensors are not hashed": planted(no_digest_no_hashes_of_tensors),
    "old checkpoints go by number": planted(prune_by_number),
    "old checkpoints go first": planted(prune_first),
    "the whole log is replayed": planted(replay_everything),
    "nothing is replayed": planted(replay_nothing),
    "an unfinished line stays": planted(keep_the_unfinished_line),
    "a line in memory counts as safe": planted(believe_what_is_read),
    "a refused command is applied": planted(go_on_after_an_error),
    "a damaged checkpoint comes back": planted(meet_the_damaged_again),
    "two writers": planted(first_writer_only_asked_once),
    "a folder that is there is taken to be safe": planted(trust_the_folder),
    "the manifest comes first": planted(manifest_first),
}


def seeds_until_found(bug: str, most: int) -> int | None:
    """How many worlds it takes to find a planted bug."""
    with pytest.MonkeyPatch.context() as patch:
        wrap = BUGS[bug](patch)
        for seed in range(most):
            try:
                if simulate(seed, wrap=wrap).violations:
                    return seed + 1
            except (AssertionError, KeyError, OSError, IndexError, RuntimeError, ValueError):
                return seed + 1  # the world fell apart
    return None


SLOW = (
    "a line in memory counts as safe",
    "the folder is not synced before the manifest",
    "a folder that is there is taken to be safe",
)
QUICK = [bug for bug in BUGS if bug not in SLOW]


@pytest.mark.parametrize("bug", QUICK)
def test_a_planted_bug_is_found(bug: str) -> None:
    assert seeds_until_found(bug, CANARY_SEEDS) is not None


@pytest.mark.long
def test_every_planted_bug_is_found_within_500_worlds() -> None:
    found = {bug: seeds_until_found(bug, CANARY_SEEDS) for bug in BUGS}
    print(found)
    assert None not in found.values()
