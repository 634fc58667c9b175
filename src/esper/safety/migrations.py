"""How trees of older schema versions become those of today: one explicit function for each version.

``MIGRATIONS[n]`` takes a tree of schema ``n`` and returns it as schema ``n + 1`` has it. Whoever changes what a tree
means raises :data:`esper.safety.manifest.SCHEMA_VERSION`, adds the function here and commits a golden checkpoint of the
version before under ``tests/safety/golden``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, cast

import numpy as np

from esper.safety.manifest import SCHEMA_VERSION, RefusedError
from esper.safety.tree import Tree

Migration = Callable[[Tree], Tree]

_NUMBERS_2 = {
    "cohort": "i8", "step": "i8", "state": "i1", "gain": "f8", "gain_low": "f8", "gain_high": "f8",
    "gain_shrunken": "f8", "added_params": "i8", "added_flops_share": "f8",
}  # fmt: skip
_PERMANENT_1 = 7
"""Code of a cohort that was kept."""


def verdicts_in_columns(tree: Tree) -> Tree:
    """1 to 2: the verdicts of a run were a list of dictionaries, which grew with every cohort; now they are arrays.

    The run is the whole tree (``Grower.save``) or its part ``training`` (``esper run``); other trees hold no verdicts.
    """
    if not isinstance(tree, dict):
        return tree
    whole = cast("dict[str, Any]", tree)
    if "esper" not in whole:
        return {**whole, "training": verdicts_in_columns(whole["training"])} if "training" in whole else whole
    esper = whole["esper"]
    stages = {name: value for name, value in esper["stages"].items() if name != "looks"}
    stages["verdicts"] = _columns(esper["stages"]["verdicts"], esper["stages"]["looks"])
    return {**whole, "version": 2, "esper": {**esper, "stages": stages}}


def _columns(verdicts: list[dict[str, Any]], looks: list[tuple[float, float]]) -> Tree:
    sets = {sites: number for number, sites in enumerate(dict.fromkeys(tuple(v["sites"]) for v in verdicts))}
    permanent = [verdict for verdict in verdicts if verdict["state"] == _PERMANENT_1]
    return {
        "told": {name: np.array([v[name] for v in verdicts], dtype) for name, dtype in _NUMBERS_2.items()},
        "reasons": [verdict["reason"] for verdict in verdicts],
        "sites": np.array([sets[tuple(verdict["sites"])] for verdict in verdicts], np.int64),
        "site_sets": list(sets),
        "ended": dict(Counter(verdict["state"] for verdict in verdicts)),
        "last_gain": {site: verdict["gain"] for verdict in verdicts for site in verdict["sites"]},
        "last_growth": {site: verdict["step"] for verdict in permanent for site in verdict["sites"]},
        "looks": np.array(looks, np.float64).reshape(-1, 2),
    }


def copies_and_snapshots_are_parts(tree: Tree) -> Tree:
    """2 to 3: twins, audit copies, snapshots and the commands since them are parts of a grower's state.

    Before, it only named the cohorts that had a copy, and a process that went on from it began without snapshots. From
    here on a state may hold other states: later migrations must look into ``esper/snapshots/*/tree`` too (which have
    neither ``setup`` nor the parts that only stored states have).
    """
    if not isinstance(tree, dict):
        return tree
    whole = cast("dict[str, Any]", tree)
    if "esper" not in whole:
        return (
            {**whole, "training": copies_and_snapshots_are_parts(whole["training"])} if "training" in whole else whole
        )
    state = {name: value for name, value in whole.items() if name != "copies"}
    config = whole["setup"]["config"]
    safety = {**config["safety"], "stored_snapshot_bytes": 256 << 20}
    parts = {"copies": {"twins": [], "watch": None, "kept": []}, "snapshots": [], "applied": []}
    trials = {**whole["esper"]["trials"], "copies": whole["copies"]}
    return {
        **state,
        "version": 3,
        "esper": {**whole["esper"], "trials": trials, **parts},
        "setup": {**whole["setup"], "config": {**config, "safety": safety}},
    }


MIGRATIONS: dict[int, Migration] = {1: verdicts_in_columns, 2: copies_and_snapshots_are_parts}
"""By the version that they start from."""


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
