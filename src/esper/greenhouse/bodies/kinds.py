"""Which body the hosts of a family have."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from esper.errors import ConfigError
from esper.greenhouse.bodies.body import Body
from esper.greenhouse.bodies.conv import ConvNet
from esper.greenhouse.bodies.mlp import MLP
from esper.greenhouse.bodies.transformer import Transformer
from esper.greenhouse.family import Family, family_named
from esper.greenhouse.tasks import SIDE

KINDS: dict[str, Callable[[Family], Body]] = {
    "mlp": lambda family: MLP(family.inputs, family.num_sites, family.outputs),
    "conv": lambda family: ConvNet(family.inputs, SIDE, family.num_sites, family.outputs),
    "transformer": lambda family: Transformer(family.inputs, family.num_sites, family.outputs),
}


@cache
def body_of(name: str) -> Body:
    """The body of a family's hosts.

    Raises
    ------
    ConfigError
        No family of that name, or its body is not known.
    """
    family = family_named(name)
    if family.body not in KINDS:
        raise ConfigError(f"a family's body must be one of {', '.join(KINDS)}, got {family.body!r} of {name!r}")
    return KINDS[family.body](family)
