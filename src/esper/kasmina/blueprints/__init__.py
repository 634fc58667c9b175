"""Blueprints: parametrised residual branches with a declared cost. One file and one registration each."""

from esper.kasmina.blueprints import bottleneck, bottleneck_conv, chunk_mlp, low_rank
from esper.kasmina.blueprints.blueprint import BLUEPRINTS, Axes, Blueprint, Cost, Parts
from esper.kasmina.blueprints.chunk import ChunkBlueprint, with_seeds

__all__ = [
    "BLUEPRINTS", "Axes", "Blueprint", "ChunkBlueprint", "Cost", "Parts", "bottleneck", "bottleneck_conv", "chunk_mlp",
    "low_rank", "with_seeds",
]  # fmt: skip
