"""A method of all registered blueprints, replaced for a while; shared by the faults of blueprints."""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

from esper.kasmina.blueprints import BLUEPRINTS
from esper.safety.faults.fault import Subject

Replacement = Callable[..., Any]


@contextmanager
def replaced_in_blueprints(method: str, replacement: Replacement) -> Generator[None]:
    """``replacement(original, ...)`` runs in the place of ``method``."""
    changed = [BLUEPRINTS[name] for name in BLUEPRINTS]
    for blueprint in changed:
        setattr(blueprint, method, functools.partial(replacement, getattr(blueprint, method)))
    try:
        yield
    finally:
        for blueprint in changed:
            delattr(blueprint, method)  # the class's own shows again


def last_of_cohort(subject: Subject) -> Callable[[], bool]:
    """Tells, once a call, whether a cohort over all sites is at its last one: the others are already made then."""
    calls = 0

    def is_last() -> bool:
        nonlocal calls
        calls += 1
        return calls % len(subject.sites) == 0

    return is_last
