"""The isolated training of a cohort: first weights of its branches, within a share of what the run will cost."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from esper.config import Config, FitConfig
from esper.kasmina.bank import Bank
from esper.kasmina.capture import Capture, Rows
from esper.kasmina.cohort import Cohort
from esper.kasmina.execution import Kasmina
from esper.kasmina.gates import Gate, sanity_gate
from esper.kasmina.incubator import step_flops
from esper.kasmina.ledger import Ledger
from esper.kasmina.starts import STARTS
from esper.protocol import AnyEvent, Fitted, Warned

FEWEST_STEPS = 10
"""A fit that can afford fewer steps is left out: its branch starts from random features and an output of zero."""


@dataclass
class Fitting:
    """Makes the first weights of cohorts.

    ``training_flops`` is what one training step of the network costs as it is now.
    """

    kasmina: Kasmina
    ledger: Ledger
    config: Config
    emit: Callable[[AnyEvent], None]
    training_flops: Callable[[], float]

    def fit(self, cohort: Cohort, name: str, step: int) -> Gate:
        """Prepare a cohort's branches on one site, and say whether they are sane."""
        site, member = self.kasmina.sites[name], cohort.members[name]
        start, bank = STARTS[member.start], site.banks[cohort.number]
        capture = site.capture if start.needs_rows else None
        rows = capture.rows(bank.reads) if capture is not None else None
        if rows is not None and site.telemetry is not None and rows.g.numel():
            site.telemetry.record_gradient(rows.g, site.geometry.feature_axis)
        self._report_dropped(capture, name, step)
        settings: FitConfig | None = self.config.fit
        if start.fits and rows is not None and rows.x.numel():
            settings = self._affordable(cohort, bank, rows, step)
            if settings is None:
                member.start, start, rows = "random_zero", STARTS["random_zero"], None
        host = self.kasmina.host_units(name) if start.needs_host else None
        report = start.prepare(bank, rows, settings or self.config.fit, self.kasmina.generator, host)
        member.report, member.preserves_function = report, start.preserves_function
        self.ledger.add("fit", report.flops)
        self.emit(
            Fitted(
                step=step, cohort=cohort.number, seed_id=int(self.kasmina.table.seed_id[member.slots[0]]), site=name,
                start=member.start, explained=report.explained, t_statistic=report.t_statistic, scale=math.nan,
                flops=report.flops,
            )
        )  # fmt: skip
        if settings is not None:
            return self._sanity(cohort, name, capture, step)
        share = self.config.fit.max_share
        return Gate("sanity", True, f"no fit for {share:.0%} of the training left: the branch starts from zero output")

    def _affordable(self, cohort: Cohort, bank: Bank, rows: Rows, step: int) -> FitConfig | None:
        """The fit's settings with as many steps as its share pays for; ``None`` where those are too few."""
        fit, total = self.config.fit, self.config.total_steps
        if fit.max_share is None or total is None:
            return fit
        grown = 1.0 + (cohort.added_flops_share if math.isfinite(cohort.added_flops_share) else 0.0)
        left = max(0, total - step) * self.training_flops() * grown
        budget = fit.max_share * left / len(cohort.members)
        steps = min(fit.steps, int(budget / max(1.0, step_flops(bank, rows, fit.batch_rows))))
        return replace(fit, steps=steps) if steps >= min(FEWEST_STEPS, fit.steps) else None

    def _sanity(self, cohort: Cohort, name: str, capture: Capture | None, step: int) -> Gate:
        member, fit = cohort.members[name], self.config.fit
        start, report = STARTS[member.start], cohort.members[name].report
        assert report is not None
        completed = capture.completed_at if capture is not None else None
        gate = sanity_gate(
            start.sanity,
            t_statistic=report.t_statistic,
            explained=report.explained,
            min_t=fit.min_t,
            max_unexplained=fit.reconstruction_threshold,
            capture_age=0 if completed is None else step - completed,
            max_age=self.config.capture.max_age,
        )
        if gate.passed or start.sanity != "gradient" or fit.unproven == "cull":
            return gate
        if not math.isfinite(report.t_statistic) and not math.isfinite(report.explained):
            return gate  # there was nothing to check it on, or it has diverged
        self.kasmina.sites[name].banks[cohort.number].scale_output(0.0)
        member.preserves_function = True
        return Gate("sanity", True, f"{gate.reason}: the fit is not used, the branch starts from zero output")

    def _report_dropped(self, capture: Capture | None, name: str, step: int) -> None:
        if capture is not None and capture.dropped_batches:
            self.emit(
                Warned(
                    step=step,
                    message=f"{name}: {capture.dropped_batches} of {capture.num_batches} captured batches held no "
                    "gradient or non-finite values and were left out of the fit",
                )
            )
