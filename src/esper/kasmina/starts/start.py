"""Starts: how a branch's first weights are made. One file and one registration each."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

from esper.config import FitConfig
from esper.kasmina.bank import Bank
from esper.kasmina.capture import Rows
from esper.kasmina.registry import Registry


@dataclass(frozen=True)
class StartReport:
    """What a start measured on rows of other batches; NaN where it has no target. ``flops`` is what it cost."""

    explained: float = float("nan")
    t_statistic: float = float("nan")
    flops: float = 0.0


class Start(ABC):
    """One way to make first weights. Stateless."""

    needs_rows: bool
    """Whether the site must capture before this start can run."""
    preserves_function: bool
    """Whether the branch's output is exactly zero after it, so that alpha needs no ramp."""
    sanity: str
    """What the isolated training promises (``gradient``, ``reconstruction`` or ``none``): see ``sanity_gate``."""

    @abstractmethod
    def prepare(self, bank: Bank, rows: Rows | None, config: FitConfig, generator: torch.Generator) -> StartReport:
        """Set the first weights of ``bank`` in place."""


STARTS: Registry[Start] = Registry("start")


def fit_and_check_rows(rows: Rows) -> tuple[Rows, Rows]:
    """Split rows by training batch: the last quarter of the batches (at least one) is for checking only."""
    batches = torch.unique(rows.batch)
    held = batches[-max(1, len(batches) // 4) :]
    checking = torch.isin(rows.batch, held)
    return rows.select(~checking), rows.select(checking)
