"""``reconstruction``: the specification's self-supervised task.

The branch is trained on captured rows to reproduce the site's own output (centred a feature, unit RMS) by mean squared
error, and passes when it does so on rows of other batches. Its output weights are then set to zero: grafted as it
stands, ``y + b(x)`` would double what the host computes, and a blend that replaces the host starves the layers before
it. What is kept are features that describe the site; the graft starts function-preserving.
"""

from __future__ import annotations

import torch

from esper.config import FitConfig
from esper.kasmina.bank import Bank
from esper.kasmina.blueprints.blueprint import BLUEPRINTS, Port
from esper.kasmina.capture import Rows
from esper.kasmina.geometry import Geometry
from esper.kasmina.incubator import check, fit
from esper.kasmina.starts.start import STARTS, HostUnits, Start, StartReport, fit_and_check_rows


def _target(rows: Rows, like: Rows) -> torch.Tensor:
    """Output of ``rows`` centred and scaled by the statistics of ``like``."""
    dims = [axis for axis in range(like.y.dim()) if axis != 1]
    mean = like.y.mean(dim=dims, keepdim=True)
    return (rows.y - mean) / (like.y - mean).square().mean().sqrt().clamp_min(1e-12)


@STARTS.register("reconstruction")
class Reconstruction(Start):
    needs_rows = True
    fits = True
    keeps_draw = True
    preserves_function = True
    sanity = "reconstruction"

    def refusal(self, blueprint: str, geometry: Geometry) -> str | None:
        if BLUEPRINTS[blueprint].port is Port.INPUT:
            return None
        return (
            "start 'reconstruction' trains a branch to reproduce the site's output, got blueprint "
            f"{blueprint!r}, which reads that output; use 'random_zero' or 'negative_gradient'"
        )

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
            bank,
            train,
            _target(train, train),
            steps=config.steps,
            batch_rows=config.batch_rows,
            lr=config.lr,
            generator=generator,
        )
        report = check(bank, held, _target(held, train), batch_rows=config.batch_rows)
        bank.scale_output(0.0)
        return StartReport(report.explained, report.t_statistic, flops + report.flops)
