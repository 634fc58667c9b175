"""Blueprints: parametrised residual branches with a declared cost. One file and one registration each."""

from esper.kasmina.blueprints import (
    affine,
    attention,
    bottleneck,
    bottleneck_conv,
    chunk_mlp,
    depthwise_conv,
    gated,
    low_rank,
)
from esper.kasmina.blueprints.blueprint import BLUEPRINTS, Axes, Blueprint, Cost, Parts, Port, refusal_of
from esper.kasmina.blueprints.fused import FusedBlueprint
from esper.kasmina.blueprints.module import register_module

__all__ = [
    "BLUEPRINTS",
    "Axes",
    "Blueprint",
    "Cost",
    "FusedBlueprint",
    "Parts",
    "Port",
    "affine",
    "attention",
    "bottleneck",
    "bottleneck_conv",
    "chunk_mlp",
    "depthwise_conv",
    "gated",
    "low_rank",
    "refusal_of",
    "register_module",
]
