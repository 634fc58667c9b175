"""What a folder of checkpoints holds, every file of it checked; for ``esper inspect``."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from esper.errors import StateError
from esper.protocol import Lifecycle
from esper.safety.checkpoint import manifest_numbers, read_manifest, read_tree
from esper.safety.disk import Disk, LocalDisk
from esper.safety.manifest import MAX_BYTES, Manifest, manifest_name
from esper.safety.tree import Tree


@dataclass(frozen=True, kw_only=True)
class Growth:
    """What a stored state says of growth."""

    sites: int
    annexes: int
    """Sites that have grown for good."""
    seeds: int
    cohorts: dict[str, str]
    """Lifecycle state of those alive, by number."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """One checkpoint. Without ``problem`` its seal, sizes, hashes and digest hold."""

    number: int
    problem: str | None
    step: int | None = None
    kind: str | None = None
    schema: int | None = None
    written_by: dict[str, str] | None = None
    files: int | None = None
    num_bytes: int | None = None
    growth: Growth | None = None

    def fields(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


def survey(folder: Path, *, disk: Disk | None = None) -> list[Facts]:
    """Every checkpoint of a folder, newest first.

    Raises
    ------
    StateError
        The folder cannot be read.
    """
    disk = disk or LocalDisk()
    try:
        numbers = manifest_numbers(disk, folder)
    except OSError as error:
        raise StateError(f"a folder of checkpoints must be readable, got {str(folder)!r} ({error})") from error
    return [_look_at(disk, folder, number) for number in numbers]


def _look_at(disk: Disk, folder: Path, number: int) -> Facts:
    try:
        manifest = read_manifest(disk, folder, number)
    except (StateError, OSError) as error:
        return Facts(number=number, problem=str(error))
    problem, growth = None, None
    try:
        growth = _growth(read_tree(disk, folder, manifest))
    except (StateError, OSError) as error:
        problem = str(error)
    return Facts(
        number=number, problem=problem, step=manifest.step, kind=manifest.kind, schema=manifest.schema,
        written_by=manifest.written_by, files=len(manifest.files) + 1, num_bytes=_size(disk, folder, manifest),
        growth=growth,
    )  # fmt: skip


def _size(disk: Disk, folder: Path, manifest: Manifest) -> int:
    own = len(disk.read(folder / manifest_name(manifest.number), MAX_BYTES + 1024))
    return own + sum(file.bytes for file in manifest.files)


def _growth(tree: Tree) -> Growth | None:
    """Of a Grower's state, or of a training that has one in it; nothing where the tree tells of none."""
    kasmina = _at(tree, "esper", "kasmina") or _at(tree, "training", "esper", "kasmina")
    sites, cohorts = _at(kasmina, "sites"), _at(kasmina, "cohorts")
    if not isinstance(sites, dict) or not isinstance(cohorts, list):
        return None
    alive = [cohort for cohort in cast("list[Any]", cohorts) if isinstance(cohort, dict)]
    members = [m for cohort in alive for m in dict(_at(cohort, "members") or {}).values()]
    grown = [site for site in cast("dict[Any, Any]", sites).values() if _at(site, "annex") or _at(site, "beside")]
    return Growth(
        sites=len(cast("dict[Any, Any]", sites)), annexes=len(grown),
        seeds=sum(int(np.size(_at(member, "slots"))) for member in members if _at(member, "slots") is not None),
        cohorts={str(_at(cohort, "number")): _state_name(_at(cohort, "state")) for cohort in alive},
    )  # fmt: skip


def _state_name(code: Any) -> str:
    return Lifecycle(code).name if type(code) is int and 0 <= code < len(Lifecycle) else "unknown"


def _at(tree: Tree, *keys: str) -> Any:
    """What is below these keys; ``None`` where there is nothing of the kind."""
    for key in keys:
        if not isinstance(tree, dict):
            return None
        tree = cast("dict[Any, Any]", tree).get(key)
    return tree
