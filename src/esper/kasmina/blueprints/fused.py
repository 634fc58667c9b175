"""Blueprints whose branches run as one operation that adds them to the site's output on the spot."""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor

from esper.kasmina.blueprints.blueprint import Blueprint, Port, Tensors
from esper.kasmina.ops.graft import Seats


class FusedBlueprint(Blueprint):
    """Seeds that read and write their own columns, thousands of them in one operation.

    :meth:`hidden` and :meth:`project` say the same step by step; they run where seeds share columns.
    """

    port = Port.COLUMNS
    absorbs = False

    @abstractmethod
    def graft(self, params: Tensors, y: Tensor, seats: Seats, *, alpha: Tensor, writable: bool) -> Tensor:
        """``y (..., F)`` plus ``alpha (S,)`` times the branches at ``seats``, which no two of them share.

        ``writable``: the memory of ``y`` may be used for it.
        """
