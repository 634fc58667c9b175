"""How trees of older schema versions become those of today: one explicit function for each version.

``MIGRATIONS[n]`` takes a tree of schema ``n`` and returns it as schema ``n + 1`` has it. Whoever changes what a tree
means raises :data:`esper.safety.manifest.SCHEMA_VERSION`, adds the function here and commits a golden checkpoint of the
version before under ``tests/safety/golden``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

from esper.safety.manifest import SCHEMA_VERSION, RefusedError
from esper.safety.tree import Tree

Migration = Callable[[Tree], Tree]


def _copies_and_snapshots_are_parts(tree: Tree) -> Tree:
    """1 to 2: twins, audit copies, snapshots and the commands since them are parts of a grower's state.

    Before, it only named the cohorts that had a copy, and a process that went on from it began without snapshots.
    """
    for state in _grower_states(tree):
        numbers = state.pop("copies")
        state["esper"]["trials"]["copies"] = numbers
        state["esper"]["copies"] = {"twins": [], "watch": None, "kept": []}
        state["esper"] |= {"snapshots": [], "applied": []}
        state["setup"]["config"]["safety"]["stored_snapshot_bytes"] = 256 << 20
        state["version"] = 2
    return tree


MIGRATIONS: dict[int, Migration] = {1: _copies_and_snapshots_are_parts}


def migrated(
    tree: Tree, schema: int, migrations: Mapping[int, Migration] = MIGRATIONS, target: int = SCHEMA_VERSION
) -> Tree:
    """The tree as ``target`` has it.

    Raises
    ------
    RefusedError
        A step on the way is missing.
    """
    for version in range(schema, target):
        if version not in migrations:
            raise RefusedError(
                f"a checkpoint of schema {schema} needs a migration from {version} to {version + 1}, got none; "
                "load it with the Esper that wrote it and save it again"
            )
        tree = migrations[version](tree)
    return tree


def _grower_states(tree: Tree) -> Iterator[dict[str, Any]]:
    """What a grower has told, wherever a checkpoint holds it: alone, as the training of a run, or as a snapshot in
    either (which has no ``setup`` and no part that only stored states have)."""
    places = [tree, cast("dict[Any, Any]", tree).get("training")] if isinstance(tree, dict) else []
    for place in places:
        if isinstance(place, dict) and {"version", "esper"} <= set(cast("dict[Any, Any]", place)):
            state = cast("dict[str, Any]", place)
            yield state
            yield from (kept["tree"] for kept in state["esper"].get("snapshots", ()))
