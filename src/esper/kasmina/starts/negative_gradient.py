"""``negative_gradient``: fit the branch to -dL/dy, a gradient step in function space (Friedman 2001 for boosting).

The target is scaled to unit root mean square a batch; the size of the fitted branch is then set against the size of
the site's output, and finally by real forward losses (the linear prediction has no minimum).
"""

from __future__ import annotations

import torch

from esper.config import FitConfig
from esper.kasmina.bank import Bank
from esper.kasmina.capture import Rows
from esper.kasmina.incubator import check, fit
from esper.kasmina.starts.start import STARTS, HostUnits, Start, StartReport, fit_and_check_rows, set_output_size


@STARTS.register("negative_gradient")
class NegativeGradient(Start):
    needs_rows = True
    fits = True
    keeps_draw = True
    preserves_function = False
    sanity = "gradient"

    def prepare(
        self,
        bank: Bank,
        rows: Rows | None,
        config: FitConfig,
        generator: torch.Generator,
        host: HostUnits | None = None,
    ) -> StartReport:
        if rows is None or torch.unique(rows.batch).numel() < 2:
            return StartReport()
        train, held = fit_and_check_rows(rows)
        flops = fit(
            bank, train, -train.g, steps=config.steps, batch_rows=config.batch_rows, lr=config.lr, generator=generator
        )
        report = check(bank, held, -held.g, batch_rows=config.batch_rows)
        set_output_size(bank, held, config)
        return StartReport(report.explained, report.t_statistic, flops + report.flops)
