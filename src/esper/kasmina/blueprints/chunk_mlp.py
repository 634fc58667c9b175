"""``chunk_mlp``: each seed reads and writes its own columns of a Linear layer's output, a small perceptron a seed.

    branch(y)[c_s] = W2_s @ silu(W1_s @ y[c_s] + b1_s)

It lets single features be bent where a layer is linear. A thousand seeds on one layer run as one operation.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esper.kasmina.blueprints.blueprint import BLUEPRINTS, Axes, Cost, Tensors, normal
from esper.kasmina.blueprints.fused import FusedBlueprint
from esper.kasmina.geometry import Geometry
from esper.kasmina.ops.graft import Seats, graft, reference
from esper.kasmina.plain import traced
from esper.protocol import SiteKind


@BLUEPRINTS.register("chunk_mlp")
class ChunkMLP(FusedBlueprint):
    """Shapes: w1 (S, U, K), b1 (S, U), w2 (S, K, U)."""

    kinds = frozenset({SiteKind.LINEAR_LAYER})
    axes = {"w1": Axes(unit=1), "b1": Axes(unit=1), "w2": Axes(unit=2, column=1)}  # noqa: RUF012
    stacks_plainly = True
    is_perceptron = True

    def resolve_units(self, geometry: Geometry, asked: int | None) -> int:
        return 8 if asked is None else asked

    def folds(self, geometry: Geometry) -> bool:
        return False

    def init(
        self, geometry: Geometry, *, num_slots: int, units: int, columns: int, reads: int, generator: torch.Generator
    ) -> tuple[Tensors, Tensors]:
        return {
            "w1": normal((num_slots, units, columns), columns**-0.5, generator),
            "b1": torch.zeros(num_slots, units),
            "w2": normal((num_slots, columns, units), units**-0.5, generator),
        }, {}

    def hidden(
        self,
        params: Tensors,
        buffers: Tensors,
        x: Tensor,
        geometry: Geometry,
        *,
        training: bool,
        generator: torch.Generator | None,
        norm_momentum: float | None = None,
    ) -> Tensor:
        return reference.hidden(x, params["w1"], params["b1"])

    def project(self, params: Tensors, h: Tensor, geometry: Geometry, *, alpha: Tensor) -> Tensor:
        return reference.project(h, params["w2"], alpha)

    def graft(self, params: Tensors, y: Tensor, seats: Seats, *, alpha: Tensor, writable: bool) -> Tensor:
        return graft(y, params["w1"], params["b1"], params["w2"], alpha, seats, writable=writable)

    def cost(self, geometry: Geometry, *, units: int, columns: int, reads: int) -> Cost:
        return Cost(units * (2 * columns + 1), 4.0 * units * columns)

    def plain(self, params: Tensors, buffers: Tensors, geometry: Geometry) -> nn.Module:
        return traced(_Seeds(**params), "ChunkSeeds")


class _Seeds(nn.Module):
    def __init__(self, w1: Tensor, b1: Tensor, w2: Tensor) -> None:
        super().__init__()
        self.w1, self.b1, self.w2 = (nn.Parameter(value.detach().clone()) for value in (w1, b1, w2))
        self.shape = (w1.shape[0], w1.shape[2])

    def forward(self, y: Tensor) -> Tensor:
        z = torch.einsum("...sk,shk->...sh", y.unflatten(-1, self.shape), self.w1.to(y)) + self.b1.to(y)
        return torch.einsum("...sh,skh->...sk", F.silu(z), self.w2.to(y)).flatten(-2)
