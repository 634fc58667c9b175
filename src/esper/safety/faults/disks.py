"""What faults of the disk share: another disk under the writers of checkpoints, and the newest checkpoint's files."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

from esper.safety import checkpoint
from esper.safety.disk import Disk, LocalDisk
from esper.safety.faults.fault import Subject
from esper.safety.manifest import manifest_name


@contextmanager
def under_writers(disk: Callable[[], Disk]) -> Generator[None]:
    """Writers and readers of checkpoints use what ``disk`` returns, asked anew for each."""
    original = checkpoint.LocalDisk
    checkpoint.LocalDisk = disk  # type: ignore[misc,assignment]  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        checkpoint.LocalDisk = original


def folder_of(subject: Subject) -> Path:
    assert subject.folder is not None  # whoever injects a fault of the disk has one
    return subject.folder


def newest_files(subject: Subject) -> list[Path]:
    """Files of the newest checkpoint, the manifest last; none where nothing was saved."""
    folder = folder_of(subject)
    numbers = checkpoint.manifest_numbers(LocalDisk(), folder)
    if not numbers:
        return []
    manifest = checkpoint.read_manifest(LocalDisk(), folder, numbers[0])
    return [*(folder / file.name for file in manifest.files), folder / manifest_name(numbers[0])]


@contextmanager
def replaced_content(path: Path, content: bytes) -> Generator[None]:
    """A file holds something else for a while."""
    original = path.read_bytes()
    path.write_bytes(content)
    try:
        yield
    finally:
        if path.exists():  # whoever went on from an older checkpoint may have put it away
            path.write_bytes(original)
