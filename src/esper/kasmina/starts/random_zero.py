"""``random_zero``: random input weights, zero output weights (the function-preserving start of Net2Net-like growth)."""

from __future__ import annotations

import torch

from esper.config import FitConfig
from esper.kasmina.bank import Bank
from esper.kasmina.capture import Rows
from esper.kasmina.starts.start import STARTS, HostUnits, Start, StartReport


@STARTS.register("random_zero")
class RandomZero(Start):
    needs_rows = False
    keeps_draw = True
    preserves_function = True
    sanity = "none"

    def prepare(
        self,
        bank: Bank,
        rows: Rows | None,
        config: FitConfig,
        generator: torch.Generator,
        host: HostUnits | None = None,
    ) -> StartReport:
        bank.scale_output(0.0)
        return StartReport()
