"""Checkpoints: a folder in which the newest acknowledged state survives whatever happens while the next is written.

::

    checkpoint-00000007-000.safetensors   tensors: temporary name, fsync, rename
    checkpoint-00000007.json              the folder is synced, then the manifest comes last: its rename is the commit
                                          the folder is synced again: only now `save` returns
    checkpoint-00000005.*                 then older ones go: their manifest, a sync of the folder, their tensors

So a manifest that can be seen has all its files, whatever a power cut keeps of what was not synced. Loading checks the
seal, sizes, hashes and the digest of the whole tree before anything is handed out; nothing is unpickled or imported.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from esper.errors import StateError
from esper.safety import manifest as manifests
from esper.safety.disk import Disk, LocalDisk, make_folders, write_whole
from esper.safety.manifest import Manifest, RefusedError, StoredFile
from esper.safety.migrations import MIGRATIONS, Migration, migrated
from esper.safety.tensor_files import PART_BYTES, decoded, parts, put_together, without_aliases
from esper.safety.tree import Tree, digest, join, split

LOCK = "checkpoints.lock"
_TEMPORARY = ".part"
_LOST = (errno.EIO, errno.ENOENT, errno.EFBIG, errno.EINVAL, errno.ELOOP)
"""What reading says of a file that is damaged, missing or replaced (by a link, a folder); anything else, such as no
permission or too many open files, says nothing about the checkpoint, and an older one must not stand in for it."""


@dataclass(frozen=True, kw_only=True)
class Damage:
    """A checkpoint that cannot be loaded, and why."""

    number: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class Saved:
    """A checkpoint that is on the disk. ``left_behind`` says why older ones could not be removed."""

    number: int
    step: int
    num_bytes: int
    left_behind: str | None = None


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A checkpoint that held in every respect. ``passed_over`` are newer ones that did not: tell the user."""

    tree: Tree
    manifest: Manifest
    passed_over: tuple[Damage, ...] = ()

    @property
    def step(self) -> int:
        return self.manifest.step


class Checkpoints:
    """The one writer of a folder of checkpoints.

    Parameters
    ----------
    folder:
        Made if it is missing. What a killed writer left unfinished in it is removed.
    kind:
        What the trees are; another kind is refused on loading.
    keep:
        How many of the newest intact checkpoints stay.

    Raises
    ------
    StateError
        Another writer has the folder, or it cannot be used.
    """

    def __init__(
        self, folder: str | Path, *, kind: str, keep: int = 2, disk: Disk | None = None, part_bytes: int = PART_BYTES
    ) -> None:
        if keep < 1:
            raise StateError(f"at least one checkpoint is kept, got keep={keep}; use 2")
        self.folder, self.kind, self.keep = Path(folder), kind, keep
        self._disk, self._part_bytes = disk or LocalDisk(), part_bytes
        self._good: set[int] = set()
        """Numbers that are known to be whole: acknowledged here, or read and hashed."""
        self._uncertain: set[int] = set()
        """Numbers whose last sync failed: they may vanish, so nothing is removed on their account."""
        try:
            make_folders(self._disk, self.folder)
            self._lock = self._disk.lock(self.folder / LOCK)
        except BlockingIOError as error:
            raise StateError(
                f"checkpoints have one writer, but another process (or this one) already writes {self.folder}; "
                "wait for that run to end, or choose another folder"
            ) from error
        except OSError as error:
            raise StateError(f"checkpoints need a folder they can write, got {self.folder} ({error})") from error
        try:
            self._recover()
        except OSError as error:
            self.close()
            raise StateError(f"{self.folder} must be usable for checkpoints ({error}); check the disk") from error
        except BaseException:
            self.close()
            raise

    def save(self, tree: Tree, *, step: int) -> Saved:
        """Write a checkpoint; when this returns it survives a power cut.

        Raises
        ------
        StateError
            The tree cannot be stored, or the disk refused it: the checkpoints before this one are untouched.
        """
        number, self.next_number = self.next_number, self.next_number + 1
        document, tensors = split(tree)
        distinct, aliases = without_aliases(tensors)
        try:
            files = self._write_tensors(number, distinct)
            self._disk.sync_folder(self.folder)
            manifest = Manifest(
                format=manifests.FORMAT, schema=manifests.SCHEMA_VERSION, kind=self.kind, number=number, step=step,
                written_by=versions(), digest=digest(tree), files=files, aliases=aliases, document=document,
            )  # fmt: skip
            encoded = manifests.encode(manifest)
            self._write(manifests.manifest_name(number), encoded)
        except (OSError, StateError) as error:
            self._discard(number)
            raise self._refused(number, error) from error
        self._uncertain.add(number)
        try:
            self._disk.sync_folder(self.folder)  # nothing is acknowledged, and nothing older removed, before this
        except OSError as error:
            raise self._refused(number, error) from error
        self._uncertain.discard(number)
        self._good.add(number)
        total = len(encoded) + sum(file.bytes for file in files)
        return Saved(number=number, step=step, num_bytes=total, left_behind=self._prune())

    def load(self, *, migrations: Mapping[int, Migration] = MIGRATIONS) -> Loaded | None:
        """The newest intact checkpoint; ``None`` if none was ever written. See :func:`load`.

        Newer ones that are damaged are set aside (``damaged-...``): the run that goes on from an older one is another
        than the one they belong to, and must not meet them if they become readable again.
        """
        if not _numbers(self._disk, self.folder):
            return None
        loaded = load(self.folder, kind=self.kind, disk=self._disk, migrations=migrations)
        self._good.add(loaded.manifest.number)
        try:
            self._set_aside({damage.number for damage in loaded.passed_over})
        except OSError as error:
            raise StateError(f"damaged checkpoints in {self.folder} must be set aside ({error}); move them") from error
        return loaded

    def close(self) -> None:
        """Let the next writer in. Closing twice is harmless."""
        self._lock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _recover(self) -> None:
        """Remove what nobody can use; make what can be seen safe against a power cut."""
        names = self._disk.names(self.folder)
        numbers = [number for name in names if (number := manifests.number_of(_final(name))) is not None]
        self.next_number = max(numbers, default=0) + 1
        self._disk.sync_folder(self.folder)
        self._remove_orphans(names)

    def _remove_orphans(self, names: list[str]) -> None:
        """Temporary files, and tensors without a manifest."""
        for name in names:
            number = manifests.number_of(_final(name))
            if number is not None and (name != _final(name) or manifests.manifest_name(number) not in names):
                self._disk.unlink(self.folder / name)

    def _set_aside(self, numbers: set[int]) -> None:
        """Rename what belongs to checkpoints, manifests first."""
        names = [name for name in self._disk.names(self.folder) if manifests.number_of(name) in numbers]
        for suffix in (".json", ".safetensors"):
            for name in names:
                if name.endswith(suffix):
                    self._disk.rename(self.folder / name, self.folder / f"damaged-{name}")
            if names:
                self._disk.sync_folder(self.folder)

    def _write_tensors(self, number: int, tensors: dict[str, Tensor]) -> tuple[StoredFile, ...]:
        files: list[StoredFile] = []
        for part, data in enumerate(parts(tensors, self._part_bytes)):
            name = manifests.tensors_name(number, part)
            self._write(name, data)
            files.append(StoredFile(name=name, bytes=len(data), sha256=hashlib.sha256(data).hexdigest()))
        return tuple(files)

    def _write(self, name: str, data: bytes) -> None:
        write_whole(self._disk, self.folder / f".{name}{_TEMPORARY}", self.folder / name, [data])

    def _discard(self, number: int) -> None:
        """Free the disk of a checkpoint that was not finished, as far as it lets us; it is no use to anybody."""
        with contextlib.suppress(OSError):
            for name in self._disk.names(self.folder):
                if manifests.number_of(_final(name)) == number:
                    self._disk.unlink(self.folder / name)

    def _refused(self, number: int, error: Exception) -> StateError:
        before = max((n for n in manifest_numbers_or_none(self._disk, self.folder) if n < number), default=None)
        kept = "there is none before it" if before is None else f"checkpoint {before} is as it was"
        return StateError(
            f"checkpoint {number} must reach the disk, but {self.folder} did not take it ({error}); {kept}; "
            "free disk space or choose another folder, then save again"
        )

    def _prune(self) -> str | None:
        """Remove checkpoints older than the ``keep`` newest intact ones; returns what stood in the way."""
        try:
            old, good = list[int](), 0
            for number in manifest_numbers(self._disk, self.folder):
                if good >= self.keep:
                    old.append(number)
                else:
                    good += self._is_good(number)
            for number in old:
                self._disk.unlink(self.folder / manifests.manifest_name(number))
            if old:
                self._disk.sync_folder(self.folder)  # a manifest must not come back without its tensors
            self._remove_orphans(self._disk.names(self.folder))
        except OSError as error:
            return f"older checkpoints could not be removed ({error})"
        return None

    def _is_good(self, number: int) -> bool:
        if number in self._uncertain:
            return False
        if number not in self._good and problem(self._disk, self.folder, number) is None:
            self._good.add(number)
        return number in self._good


def load(
    folder: str | Path,
    *,
    kind: str | None = None,
    disk: Disk | None = None,
    migrations: Mapping[int, Migration] = MIGRATIONS,
) -> Loaded:
    """The newest checkpoint of a folder that holds in every respect.

    Newer ones that are damaged are named in ``passed_over``. A writer may be at work in the folder meanwhile.

    Raises
    ------
    StateError
        There is no checkpoint, none is intact, or the newest is of another kind or of a newer Esper.
    """
    disk, folder = disk or LocalDisk(), Path(folder)
    for is_last_try in (False, False, True):
        numbers = _numbers(disk, folder)
        damaged: list[Damage] = []
        for number in numbers:
            try:
                manifest = read_manifest(disk, folder, number)
                if kind is not None and manifest.kind != kind:
                    raise RefusedError(
                        f"a checkpoint of kind {kind!r} is needed, got {manifest.kind!r} in {folder}; name another"
                    )
                tree = migrated(read_tree(disk, folder, manifest), manifest.schema, migrations)
            except RefusedError:
                raise
            except (StateError, OSError) as error:
                if isinstance(error, OSError) and error.errno not in _LOST:
                    raise StateError(f"checkpoint {number} cannot be read now ({error}); make it readable") from error
                damaged.append(Damage(number=number, reason=str(error)))
                continue
            return Loaded(tree=tree, manifest=manifest, passed_over=tuple(damaged))
        if is_last_try or _numbers(disk, folder) == numbers:  # else a writer has put newer ones in their place
            break
    reasons = "; ".join(f"checkpoint {damage.number}: {damage.reason}" for damage in damaged)
    raise StateError(
        f"a folder of checkpoints holds an intact one, got none in {str(folder)!r} "
        f"({reasons or 'it has no manifest'}); name another folder, or start afresh"
    )


def manifest_numbers(disk: Disk, folder: Path) -> list[int]:
    """Numbers of the checkpoints of a folder, newest first.

    Raises
    ------
    OSError
        The folder cannot be listed.
    """
    numbers = ((manifests.number_of(name), name) for name in disk.names(folder))
    return sorted((n for n, name in numbers if n is not None and name == manifests.manifest_name(n)), reverse=True)


def _numbers(disk: Disk, folder: Path) -> list[int]:
    """:func:`manifest_numbers` for those who load."""
    try:
        return manifest_numbers(disk, folder)
    except OSError as error:
        raise StateError(f"a folder of checkpoints must be readable, got {str(folder)!r} ({error})") from error


def manifest_numbers_or_none(disk: Disk, folder: Path) -> list[int]:
    """As :func:`manifest_numbers`; nothing where the folder cannot be listed."""
    try:
        return manifest_numbers(disk, folder)
    except OSError:
        return []


def read_manifest(disk: Disk, folder: Path, number: int) -> Manifest:
    """The checked manifest of one checkpoint.

    Raises
    ------
    StateError, OSError
        It is damaged, of a newer Esper or cannot be read.
    """
    data = disk.read(folder / manifests.manifest_name(number), manifests.MAX_BYTES + 1024)
    return manifests.decode(data, number=number)


def problem(disk: Disk, folder: Path, number: int) -> str | None:
    """What is wrong with one checkpoint; ``None`` when everything about it holds, its tree included."""
    try:
        read_tree(disk, folder, read_manifest(disk, folder, number))
    except (StateError, OSError) as error:
        return str(error)
    return None


def versions() -> dict[str, str]:
    """Who writes."""
    return {
        "esper": __import__("esper").__version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }


def read_tree(disk: Disk, folder: Path, manifest: Manifest) -> Tree:
    """The tree of a checkpoint, sizes, hashes and digest checked.

    Raises
    ------
    StateError, OSError
        It is damaged or cannot be read.
    """
    found = (decoded(data, file.name) for file, data in _hashed(disk, folder, manifest))
    tree = join(manifest.document, put_together(found, manifest.aliases))
    if digest(tree) != manifest.digest:
        raise StateError(f"the tree of checkpoint {manifest.number} must have its digest, got another; it is damaged")
    return tree


def _hashed(disk: Disk, folder: Path, manifest: Manifest) -> Iterator[tuple[StoredFile, bytes]]:
    for file in manifest.files:
        data = disk.read(folder / file.name, file.bytes)
        if len(data) != file.bytes:
            raise StateError(f"{file.name} must have {file.bytes} bytes, got {len(data)}; it is damaged")
        if hashlib.sha256(data).hexdigest() != file.sha256:
            raise StateError(f"{file.name} must have the SHA-256 of its manifest, got another; it is damaged")
        yield file, data


def _final(name: str) -> str:
    """The name a temporary file was to get; other names as they are."""
    if name.startswith(".") and name.endswith(_TEMPORARY):
        return name[1 : -len(_TEMPORARY)]
    return name
