"""What a run costs: FLOPs of a host step and of a held-out batch, booked as they are spent, under a ceiling."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from esper.config import BudgetConfig
from esper.evidence.evaluator import Evaluator
from esper.kasmina.discovery import Discovery
from esper.kasmina.execution import Kasmina
from esper.kasmina.isolation import undisturbed
from esper.kasmina.rows import count_rows


class Accounts:
    """FLOPs of one run, and its budget.

    Parameters
    ----------
    probe_flops:
        Forward FLOPs of the host alone on the first held-out batch. A training step is scaled from it by the rows
        that pass a site.

    Attributes
    ----------
    budget:
        The ceiling; replaced as a whole when it changes.
    dtypes:
        What the sites compute in (under autocast not the weights' own).
    """

    def __init__(
        self,
        model: nn.Module,
        evaluator: Evaluator,
        discovery: Discovery,
        kasmina: Kasmina,
        *,
        probe_flops: float,
        budget: BudgetConfig,
    ) -> None:
        self.budget = budget
        self.ledger = evaluator.ledger
        self._kasmina = kasmina
        self._probe_flops = probe_flops
        with undisturbed(model):  # hooks are attached by now; nothing is recorded
            counted: tuple[dict[str, int], set[torch.dtype]] = count_rows(discovery.sites, evaluator.run_one)
        self._probe_rows, self.dtypes = counted
        evaluator.forward_cost = self._evaluation_cost

    @property
    def host_flops_per_step(self) -> float:
        """Forward FLOPs of the host alone in one training step."""
        reference = next(iter(self._probe_rows))
        return self._probe_flops * self._kasmina.rows_per_step[reference] / max(1, self._probe_rows[reference])

    @property
    def budget_flops(self) -> float | None:
        """Most forward FLOPs a step may have; ``None`` without a ceiling."""
        return None if self.budget.flops_share is None else self.budget.flops_share * self.host_flops_per_step

    @property
    def training_flops(self) -> float:
        """FLOPs of one training step of the network as it is now: a forward, a backward at twice its cost, and what
        branches compute again in it."""
        kasmina = self._kasmina
        return 3.0 * (self.host_flops_per_step + kasmina.added_flops_per_step()) + kasmina.repeated_flops_per_step()

    @property
    def host_step_flops(self) -> float:
        """FLOPs of one training step of the host alone: a forward, and a backward at twice its cost."""
        return 3.0 * self.host_flops_per_step

    def count_step(self) -> None:
        """Book one training step."""
        self.ledger.add("host", self.host_step_flops)
        if not self._kasmina.at_rest:
            self.ledger.add("branches", self._kasmina.branch_flops_per_step)

    def _evaluation_cost(self, num_batches: int) -> float:
        return num_batches * (self._probe_flops + self._kasmina.added_flops_per_step(self._probe_rows))

    def state(self) -> dict[str, Any]:
        """What was spent, and the ceiling."""
        return {"spent": self.ledger.state(), "budget": asdict(self.budget)}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state` has told."""
        self.budget = BudgetConfig(**state["budget"])
        self.ledger.restore(state["spent"])
