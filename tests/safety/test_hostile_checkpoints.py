"""Checkpoints by somebody who means harm: every seal and hash fits, and still nothing is imported or followed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.safety.stored import save_some, tree_of

from esper.errors import StateError
from esper.safety import manifest
from esper.safety.checkpoint import Checkpoints, load
from esper.safety.disk import LocalDisk

pytestmark = pytest.mark.component
ROOT = Path(__file__).parents[2]


def seal(body: bytes) -> bytes:
    return b'{"seal":"' + hashlib.sha256(body).hexdigest().encode() + b'","manifest":' + body + b"}\n"


def forge(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """A checkpoint whose manifest says what ``change`` makes of it, with a seal that fits."""
    save_some(LocalDisk(), 1, [], folder=folder)
    path = folder / manifest.manifest_name(1)
    fields = json.loads(path.read_bytes())["manifest"]
    change(fields)
    path.write_bytes(seal(json.dumps(fields).encode()))


def replace_tensors(folder: Path, data: bytes) -> None:
    """Another file of tensors, with the size and hash that the manifest says."""

    def change(fields: dict[str, Any]) -> None:
        stored = {"name": manifest.tensors_name(1, 0), "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        fields["files"] = [stored]

    forge(folder, change)
    (folder / manifest.tensors_name(1, 0)).write_bytes(data)


@pytest.mark.parametrize(
    "name",
    [
        "../outside.safetensors", "/etc/passwd", "..", "", "checkpoint-00000001-000.safetensors/../x", "a\0b",
        "checkpoint-00000002-000.safetensors", "CHECKPOINT-00000001-000.safetensors",
        "checkpoint-00000001-000.safetensors ",
    ],
)  # fmt: skip
def test_no_file_outside_is_read(name: str, tmp_path: Path) -> None:
    forge(tmp_path / "c", lambda fields: fields["files"][0].update(name=name))
    (tmp_path / "outside.safetensors").write_bytes((tmp_path / "c" / manifest.tensors_name(1, 0)).read_bytes())
    with pytest.raises(StateError, match="are named"):
        load(tmp_path / "c")


@pytest.mark.parametrize("part", ["manifest", "tensors"])
def test_links_are_not_followed(part: str, tmp_path: Path) -> None:
    folder = tmp_path / "c"
    save_some(LocalDisk(), 1, [], folder=folder)
    path = folder / (manifest.manifest_name(1) if part == "manifest" else manifest.tensors_name(1, 0))
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StateError, match=r"Too many levels of symbolic links|symbolic"):
        load(folder)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="POSIX")
def test_a_pipe_in_the_place_of_a_file_does_not_hang(tmp_path: Path) -> None:
    save_some(LocalDisk(), 1, [], folder=tmp_path)
    (tmp_path / manifest.manifest_name(1)).unlink()
    os.mkfifo(tmp_path / manifest.manifest_name(1))
    with pytest.raises(StateError, match="not a regular file"):
        load(tmp_path)


def test_temporary_files_of_somebody_else_are_not_written_through(tmp_path: Path) -> None:
    """A link under the name that a temporary file gets: planted before opening it is removed, afterwards refused."""
    victim = tmp_path / "victim"
    victim.write_text("mine", encoding="utf-8")
    folder = tmp_path / "c"
    folder.mkdir()
    first = folder / f".{manifest.tensors_name(1, 0)}.part"
    first.symlink_to(victim)
    with Checkpoints(folder, kind="test") as checkpoints:
        checkpoints.save(tree_of(1), step=1)
        planted = checkpoints.next_number
        (folder / f".{manifest.tensors_name(planted, 0)}.part").symlink_to(victim)
        with pytest.raises(StateError, match="File exists"):
            checkpoints.save(tree_of(2), step=2)
        (folder / manifest.tensors_name(planted + 1, 0)).symlink_to(victim)
        checkpoints.save(tree_of(3), step=3)
        assert not (folder / manifest.tensors_name(planted + 1, 0)).is_symlink()
    (folder / "checkpoints.lock").unlink()
    (folder / "checkpoints.lock").symlink_to(victim)
    with pytest.raises(StateError, match="need a folder they can write"):
        Checkpoints(folder, kind="test")
    assert victim.read_text(encoding="utf-8") == "mine"


FIELDS: dict[str, list[Any]] = {
    "format": ["other", 1, None], "schema": [-1, "1", True, 2**70, None], "kind": [1, []],
    "number": [2, -1, "1", 1e400], "step": [-1, 0.5, 2**80], "written_by": [[], {"esper": 1}], "digest": ["", 7],
    "files": [{}, [1], [{"name": "x"}], 0],
    "aliases": [[], {"/x": "/y"}, {"/host/weight": "/host/turned"}],
    "document": [None, [], {"$": "import", "v": "os.system"}, {"$": "dict", "v": [[[], 1]]}, {"$": "array", "v": ""}],
}  # fmt: skip


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in FIELDS.items() for value in values])
def test_every_field_is_checked(field: str, value: Any, tmp_path: Path) -> None:
    forge(tmp_path, lambda fields: fields.update({field: value}))
    with pytest.raises(StateError):
        load(tmp_path)


@pytest.mark.parametrize("field", list(FIELDS))
def test_no_field_may_be_missing(field: str, tmp_path: Path) -> None:
    forge(tmp_path, lambda fields: fields.pop(field))
    with pytest.raises(StateError):
        load(tmp_path)


def header(text: bytes, size: int | None = None) -> bytes:
    return struct.pack("<Q", len(text) if size is None else size) + text


@pytest.mark.parametrize(
    "data",
    [
        b"", b"\x80\x04N.", header(b"{}", 2**63), header(b"[" * 100_000), header(b'{"a":' * 50_000),
        header(b'{"a":{"dtype":"F32","shape":[1099511627776,1099511627776],"data_offsets":[0,4]}}') + bytes(4),
        header(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,400]}}') + bytes(4),
        header(b'{"a":{"dtype":"OBJ","shape":[1],"data_offsets":[0,4]}}') + bytes(4),
        header(b'{"a":{"dtype":"F32","shape":[0,1099511627776],"data_offsets":[0,0]}}'),
        header(b'{"__metadata__":{"x":"y"}}'),
    ],
    ids=range(10),
)  # fmt: skip
def test_hostile_tensor_files_are_refused(data: bytes, tmp_path: Path) -> None:
    replace_tensors(tmp_path, data)
    with pytest.raises(StateError):
        load(tmp_path)


BOMBS: dict[str, Callable[[], bytes]] = {
    "deep": lambda: b"[" * (15 << 20),
    "deep, closed": lambda: b"[" * 100_000 + b"]" * 100_000,
    "deep objects": lambda: b'{"a":' * 1_000_000,
    "wide": lambda: b"[" + b"[]," * 5_000_000 + b"0]",
    "as wide as allowed": lambda: b'{"document":[' + b"[]," * 199_000 + b"0]}",
    "as many numbers as allowed": lambda: b'{"document":[' + b"999999," * 390_000 + b"0]}",
    "long string": lambda: b'{"a":"' + b"\\u0041" * 2_600_000 + b'"}',
    "no end of a string": lambda: b'{"a":"' + b"x\\" * 7_000_000,
    "long number": lambda: b'{"number":' + b"9" * 15_000_000 + b"}",
    "quotes": lambda: b'"' * (15 << 20),
    "too long": lambda: b" " * (40 << 20),
}


DEFUSED = """
import os, resource, sys, time
from esper.errors import StateError
from esper.safety.checkpoint import load

def own():
    return resource.getrusage(resource.RUSAGE_SELF)

for folder in sys.argv[1:]:
    if os.fork() == 0:
        before, start = own().ru_maxrss, time.process_time()
        try:
            load(folder)
        except StateError as error:
            print(time.process_time() - start, own().ru_maxrss - before, str(error)[:100], flush=True)
        os._exit(0)
    os.wait()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="POSIX")
def test_bombs_are_cheap(tmp_path: Path) -> None:
    """Refused within a second, in at most four times their size and 64 MB."""
    paths = [tmp_path / str(number) / manifest.manifest_name(1) for number in range(len(BOMBS))]
    for path, bomb in zip(paths, BOMBS.values(), strict=True):
        path.parent.mkdir()
        path.write_bytes(seal(bomb()))
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    folders = [str(path.parent) for path in paths]
    done = subprocess.run([sys.executable, "-c", DEFUSED, *folders], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == len(BOMBS)
    for line, name, path in zip(lines, BOMBS, paths, strict=True):
        seconds, kilobytes = map(float, line.split()[:2])
        assert seconds < 1.0, (name, line)
        assert kilobytes * 1024 <= 4 * path.stat().st_size + (64 << 20), (name, line)


def mutate(rng: random.Random, data: bytes) -> bytes:
    """Some bytes changed, taken out, doubled, or replaced by what parsers stumble over."""
    changed = bytearray(data)
    for _ in range(rng.randrange(1, 6)):
        at = rng.randrange(len(changed) + 1)
        kind = rng.randrange(4)
        if kind == 0 and at < len(changed):
            changed[at] = rng.randrange(256)
        elif kind == 1:
            del changed[at : at + rng.randrange(20)]
        elif kind == 2:
            changed[at:at] = changed[max(0, at - rng.randrange(30)) : at]
        else:
            changed[at:at] = rng.choice(
                (b"[", b"{", b'"', b"null", b"-1", b"1e999", b"\0", b"\\ud800", b"99999999999999999999")
            )
    return bytes(changed)


def fuzz(folder: Path, count: int) -> None:
    """Mutated manifests under a fitting seal, mutated tensor files under fitting hashes."""
    save_some(LocalDisk(), 1, [], folder=folder)
    rng = random.Random(0)
    path, tensors = folder / manifest.manifest_name(1), folder / manifest.tensors_name(1, 0)
    body, good = path.read_bytes(), tensors.read_bytes()
    fields = json.loads(body)["manifest"]
    inner = body[len(manifest._HEAD) + 64 + len(manifest._MIDDLE) : -2]
    slowest = 0.0
    for number in range(count):
        if number % 2:
            path.write_bytes(seal(mutate(rng, inner)))
            tensors.write_bytes(good)
        else:
            data = mutate(rng, good)
            fields["files"][0].update(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
            path.write_bytes(seal(json.dumps(fields).encode()))
            tensors.write_bytes(data)
        start = time.process_time()
        with contextlib.suppress(StateError):
            load(folder)
        slowest = max(slowest, time.process_time() - start)
    assert slowest < 1.0


def test_mutated_checkpoints_crash_nothing(tmp_path: Path) -> None:
    fuzz(tmp_path, 400)


@pytest.mark.long
def test_very_many_mutated_checkpoints_crash_nothing(tmp_path: Path) -> None:
    fuzz(tmp_path, 20_000)


WATCHED = """
import sys
from pathlib import Path
from esper.errors import StateError
from esper.safety.checkpoint import load
load(sys.argv[1])  # everything that loading needs is imported now
seen = []
FORBIDDEN = "import exec compile pickle.find_class marshal.loads os.system subprocess.Popen socket.connect".split()
watching = False
sys.addaudithook(lambda event, args: seen.append((event, args)) if watching and event in FORBIDDEN else None)
tried = 0
for folder in sorted(Path(sys.argv[2]).iterdir()):
    watching = True
    try:
        load(folder)
    except StateError:
        pass
    watching = False
    tried += 1
assert not seen, seen
print(tried)
"""


def test_nothing_is_imported_run_or_unpickled(tmp_path: Path) -> None:
    good, bad = tmp_path / "good", tmp_path / "bad"
    bad.mkdir()
    save_some(LocalDisk(), 1, [], folder=good)
    gadgets = (b"cos\nsystem\n(S'true'\ntR.", b"\x80\x04\x8c\x05posix\x94\x8c\x06system\x94\x93\x94.")
    for number, gadget in enumerate((*gadgets, b"PK\x03\x04archive/data.pkl", header(gadgets[0]))):
        replace_tensors(bad / f"tensors{number}", gadget)
    documents: list[Any] = [
        {"$": "import", "v": "os.system"},
        {"$": "array", "v": "", "dtype": "(2,3)f4", "shape": [1]},
        {"$": "array", "v": "", "dtype": "O", "shape": [1]},
        {"$": "array", "v": "", "dtype": "f4,i4", "shape": [1]},
        {"$": "__reduce__", "v": ["os.system", "true"]},
        {"__class__": "os.system", "py/object": "os.system"},
        {"$": "tensor", "v": "__import__('os').system('true')"},
    ]
    for number, document in enumerate(documents):
        forge(bad / f"document{number}", lambda fields, document=document: fields.update(document=document))
    for field, values in FIELDS.items():
        for number, value in enumerate(values):
            forge(bad / f"{field}{number}", lambda fields, field=field, value=value: fields.update({field: value}))
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, str(good), str(bad)], env=env, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 30
