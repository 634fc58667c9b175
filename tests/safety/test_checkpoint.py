"""Checkpoints on the real disk: what is stored comes back bit for bit, damage is found and told, one writer."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from tests.safety.stored import save_some, tree_of
from tests.safety.test_tree import trees

from esper.errors import StateError
from esper.safety import checkpoint, manifest
from esper.safety.checkpoint import Checkpoints, load
from esper.safety.disk import LocalDisk
from esper.safety.migrations import MIGRATIONS
from esper.safety.tensor_files import parts
from esper.safety.tree import digest

pytestmark = pytest.mark.component

GOLDEN = Path(__file__).parent / "golden"


def test_a_state_comes_back_bit_for_bit(tmp_path: Path) -> None:
    with Checkpoints(tmp_path / "a" / "b", kind="test", part_bytes=400) as checkpoints:
        saved = checkpoints.save(tree_of(7), step=7)
    loaded = load(tmp_path / "a" / "b", kind="test")
    assert digest(loaded.tree) == digest(tree_of(7)) == loaded.manifest.digest
    assert (loaded.step, saved.number, loaded.passed_over) == (7, 1, ())
    assert len(loaded.manifest.files) > 1, "the tensors are in several files"
    assert list(loaded.manifest.aliases.values()) == ["/host/weight"], "tied tensors are stored once"
    sizes = sum(path.stat().st_size for path in (tmp_path / "a" / "b").iterdir())
    assert saved.num_bytes == sizes


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(tree=trees)
def test_any_tree_comes_back(tree: Any, tmp_path: Path) -> None:
    with Checkpoints(tmp_path, kind="test", keep=1) as checkpoints:
        try:
            checkpoints.save(tree, step=0)
        except UnicodeEncodeError:
            pytest.fail("text that is no Unicode must be refused or stored")
        loaded = checkpoints.load()
    assert loaded is not None and digest(loaded.tree) == digest(tree)


def test_loaded_tensors_share_no_memory(tmp_path: Path) -> None:
    with Checkpoints(tmp_path, kind="test") as checkpoints:
        checkpoints.save(tree_of(1), step=1)
    tree = load(tmp_path).tree
    tree["host"]["weight"].fill_(0)
    assert float(tree["host"]["tied"].sum()) > 0


def test_a_large_tensor_has_a_file_of_its_own() -> None:
    tensors = {name: torch.zeros(size) for name, size in (("a", 10), ("b", 1000), ("c", 10), ("d", 10))}
    assert [len(data) > 4000 for data in parts(tensors, 400)] == [False, True, False]


def test_only_the_newest_stay(tmp_path: Path) -> None:
    save_some(LocalDisk(), 5, [], folder=tmp_path)
    numbers = {manifest.number_of(name) for name in os.listdir(tmp_path)}
    assert numbers == {4, 5, None}
    with Checkpoints(tmp_path, kind="test") as checkpoints:
        assert checkpoints.next_number == 6


def test_files_are_private(tmp_path: Path) -> None:
    save_some(LocalDisk(), 1, [], folder=tmp_path / "new")
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "new").iterdir()} == {0o600}


@pytest.mark.parametrize("what", ["tensor", "manifest", "cut", "gone", "swapped", "link", "folder"])
def test_damage_is_told_and_the_one_before_is_loaded(what: str, tmp_path: Path) -> None:
    save_some(LocalDisk(), 2, [], folder=tmp_path)
    path = tmp_path / (manifest.manifest_name(2) if what == "manifest" else manifest.tensors_name(2, 1))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    path.unlink()
    if what in ("tensor", "manifest"):
        path.write_bytes(data)
    elif what == "cut":
        path.write_bytes(data[:-1])
    elif what == "swapped":
        path.write_bytes((tmp_path / manifest.tensors_name(1, 1)).read_bytes())
    elif what == "link":
        path.symlink_to(tmp_path / manifest.tensors_name(1, 1))
    elif what == "folder":
        path.mkdir()
    loaded = load(tmp_path)
    assert loaded.manifest.number == 1 and digest(loaded.tree) == digest(tree_of(1))
    assert [damage.number for damage in loaded.passed_over] == [2]
    assert loaded.passed_over[0].reason


def test_what_was_passed_over_does_not_come_back(tmp_path: Path) -> None:
    save_some(LocalDisk(), 2, [], folder=tmp_path)
    path = tmp_path / manifest.manifest_name(2)
    good = path.read_bytes()
    path.write_bytes(good[:-2])
    with Checkpoints(tmp_path, kind="test") as checkpoints:
        loaded = checkpoints.load()
        assert loaded is not None and loaded.manifest.number == 1
    assert (tmp_path / f"damaged-{path.name}").exists() and not path.exists()
    assert load(tmp_path).passed_over == ()


def test_pruning_keeps_what_is_intact(tmp_path: Path) -> None:
    """Two are kept, but the damaged one does not count."""
    save_some(LocalDisk(), 2, [], folder=tmp_path)
    path = tmp_path / manifest.tensors_name(2, 0)
    path.write_bytes(bytes(path.stat().st_size))
    save_some(LocalDisk(), 1, [], folder=tmp_path)
    (tmp_path / manifest.manifest_name(3)).unlink()
    assert load(tmp_path).manifest.number == 1


def test_nothing_to_load_says_so(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="it has no manifest"):
        load(tmp_path)
    with pytest.raises(StateError, match="must be readable"):
        load(tmp_path / "none")
    with Checkpoints(tmp_path, kind="test") as checkpoints:
        assert checkpoints.load() is None
    save_some(LocalDisk(), 1, [], folder=tmp_path)
    (tmp_path / manifest.manifest_name(1)).write_text("{}", encoding="utf-8")
    with pytest.raises(StateError, match=r"checkpoint 1: a manifest's seal"):
        load(tmp_path)


def test_another_kind_is_refused(tmp_path: Path) -> None:
    save_some(LocalDisk(), 1, [], folder=tmp_path)
    with pytest.raises(StateError, match="kind 'grower' is needed, got 'test'"):
        load(tmp_path, kind="grower")


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may read everything")
def test_what_may_not_be_read_is_not_passed_over(tmp_path: Path) -> None:
    save_some(LocalDisk(), 2, [], folder=tmp_path)
    (tmp_path / manifest.manifest_name(2)).chmod(0)
    with pytest.raises(StateError, match="checkpoint 2 cannot be read now"):
        load(tmp_path)


def test_what_cannot_be_stored_is_refused_and_nothing_changes(tmp_path: Path) -> None:
    with Checkpoints(tmp_path, kind="test") as checkpoints:
        checkpoints.save(tree_of(1), step=1)
        before = sorted(os.listdir(tmp_path))
        for tree, said in (
            ({"a": object()}, "object at '/a'"),
            ({"a": torch.eye(2).to_sparse()}, "dense"),
            ({"a": torch.empty(2, device="meta")}, "on meta"),
            ({"a": [[]] * 400_001}, "at most 400000 values"),
        ):
            with pytest.raises(StateError, match=said):
                checkpoints.save(tree, step=2)
        assert sorted(os.listdir(tmp_path)) == before


def test_bad_arguments() -> None:
    with pytest.raises(StateError, match="keep=0"):
        Checkpoints("x", kind="test", keep=0)


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(StateError, match="need a folder they can write"):
        Checkpoints(tmp_path / "file" / "x", kind="test")


# ----------------------------------------------------------------------------------------------------------------------
# One writer


def test_a_second_writer_is_refused(tmp_path: Path) -> None:
    with Checkpoints(tmp_path, kind="test"), pytest.raises(StateError, match="have one writer"):
        Checkpoints(tmp_path, kind="test")
    Checkpoints(tmp_path, kind="test").close()


def test_a_killed_writer_leaves_no_lock(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys\nfrom esper.safety.checkpoint import Checkpoints\n"
        "c = Checkpoints(sys.argv[1], kind='test')\nc.save({'a': 1}, step=1)\nos.kill(os.getpid(), signal.SIGKILL)\n"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "src")}
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=env, timeout=120)
    assert killed.returncode == -9
    with Checkpoints(tmp_path, kind="test") as checkpoints:
        loaded = checkpoints.load()
    assert loaded is not None and loaded.tree == {"a": 1}


def test_a_reader_beside_a_writer_always_finds_a_whole_one(tmp_path: Path) -> None:
    save_some(LocalDisk(), 1, [], folder=tmp_path)
    done = threading.Event()

    def write() -> None:
        try:
            save_some(LocalDisk(), 60, [], folder=tmp_path)
        finally:
            done.set()

    writer = threading.Thread(target=write)
    writer.start()
    seen: list[int] = []
    while not done.is_set():
        loaded = load(tmp_path)
        assert digest(loaded.tree) == digest(tree_of(loaded.manifest.number))
        seen.append(loaded.manifest.number)
    writer.join()
    assert seen == sorted(seen)


# ----------------------------------------------------------------------------------------------------------------------
# Versions


def rewritten(folder: Path, number: int, change: Callable[[dict[str, Any]], object]) -> None:
    """Change fields of a manifest and seal it again, as whoever wrote it could have."""
    path = folder / manifest.manifest_name(number)
    fields = json.loads(path.read_bytes())["manifest"]
    change(fields)
    body = json.dumps(fields).encode()
    seal = hashlib.sha256(body).hexdigest().encode()
    path.write_bytes(b'{"seal":"' + seal + b'","manifest":' + body + b"}\n")


def test_a_newer_version_is_refused_and_not_replaced_by_an_older_one(tmp_path: Path) -> None:
    save_some(LocalDisk(), 2, [], folder=tmp_path)
    rewritten(tmp_path, 2, lambda fields: fields.update(schema=99))
    with pytest.raises(StateError, match=rf"schema up to {manifest.SCHEMA_VERSION}, got 99 .*--upgrade esper-morph"):
        load(tmp_path)


def test_an_older_version_goes_through_its_migrations(tmp_path: Path) -> None:
    save_some(LocalDisk(), 1, [], folder=tmp_path)
    rewritten(tmp_path, 1, lambda fields: fields.update(schema=0))
    with pytest.raises(StateError, match="migration from 0 to 1, got none"):
        load(tmp_path)
    loaded = load(tmp_path, migrations={**MIGRATIONS, 0: lambda tree: {**tree, "from": 0}})
    assert loaded.tree["from"] == 0 and loaded.tree["step"] == 1


def test_there_is_a_golden_checkpoint_of_every_version_and_it_loads() -> None:
    for version in range(1, manifest.SCHEMA_VERSION + 1):
        loaded = load(GOLDEN / f"v{version}")
        assert loaded.manifest.schema == version and loaded.passed_over == ()
        assert digest(loaded.tree) == digest(tree_of(3))


def test_no_version_is_without_its_migration() -> None:
    assert sorted(MIGRATIONS) == list(range(1, manifest.SCHEMA_VERSION))


def test_versions_are_told(tmp_path: Path) -> None:
    save_some(LocalDisk(), 1, [], folder=tmp_path)
    assert set(load(tmp_path).manifest.written_by) == {"esper", "torch", "python"} == set(checkpoint.versions())
