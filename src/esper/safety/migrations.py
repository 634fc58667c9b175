"""How trees of older schema versions become those of today: one explicit function for each version.

``MIGRATIONS[n]`` takes a tree of schema ``n`` and returns it as schema ``n + 1`` has it. Whoever changes what a tree
means raises :data:`esper.safety.manifest.SCHEMA_VERSION`, adds the function here and commits a golden checkpoint of the
version before under ``tests/safety/golden``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from esper.safety.manifest import SCHEMA_VERSION, RefusedError
from esper.safety.tree import Tree

Migration = Callable[[Tree], Tree]

MIGRATIONS: dict[int, Migration] = {}
"""Nothing yet: version 1 is the first."""


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
