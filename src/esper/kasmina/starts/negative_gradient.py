"""``negative_gradient``: fit the branch to -dL/dy, a gradient step in function space (Friedman 2001 for boosting).

The target is scaled to unit root mean square a batch; the size of the fitted branch is then set against the size of
the site's output, and finally by real forward losses (the linear prediction has no minimum).
"""

from __future__ import annotations

import math

import torch

from esper.config import FitConfig
from esper.kasmina.bank import Bank
from esper.kasmina.capture import Rows
from esper.kasmina.incubator import check, fit, what_it_reads
from esper.kasmina.starts.start import STARTS, Start, StartReport, fit_and_check_rows


@STARTS.register("negative_gradient")
class NegativeGradient(Start):
    needs_rows = True
    preserves_function = False
    sanity = "gradient"

    def prepare(self, bank: Bank, rows: Rows | None, config: FitConfig, generator: torch.Generator) -> StartReport:
        if rows is None or torch.unique(rows.batch).numel() < 2:
            return StartReport()
        train, held = fit_and_check_rows(rows)
        flops = fit(
            bank, train, -train.g, steps=config.steps, batch_rows=config.batch_rows, lr=config.lr, generator=generator
        )
        report = check(bank, held, -held.g, batch_rows=config.batch_rows)
        self._rescale(bank, held, config)
        return StartReport(report.explained, report.t_statistic, flops + report.flops)

    @staticmethod
    @torch.no_grad()
    def _rescale(bank: Bank, rows: Rows, config: FitConfig) -> None:
        """Output RMS of the branch = ``base_scale`` times the RMS of the site's output."""
        part = slice(0, 512)
        ones = torch.ones_like(bank.alpha)
        out = bank.branch(what_it_reads(bank, rows)[part].float(), alpha=ones, training=False, generator=None)
        size = float(out.square().mean().sqrt())
        if size > 0 and math.isfinite(size):
            bank.scale_output(config.base_scale * float(rows.y[part].square().mean().sqrt()) / size)
