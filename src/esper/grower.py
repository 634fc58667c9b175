"""The loop: attach to a model, and let it grow while it trains.

::

    y = host_module(x)                  # hooks: y itself, or y + alpha * branch
    loss.backward(); optimizer.step()   # the user's own
    grower.step(loss):                  # the only place where anything changes
        guard                           # non-finite: the newest branches leave at once
        learn                           # grafted branches and annexes, in step with the host
        advance                         # every cohort by its state's gate; alpha moves
        every `interval` steps: observe -> decide -> act
"""

from __future__ import annotations

import math
import queue
import time
import warnings
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from esper import export as exporting
from esper.commands import apply
from esper.config import Config
from esper.errors import SilentSiteError
from esper.evidence.evaluator import Evaluator, Loss
from esper.evidence.judge import Judge
from esper.kasmina.discovery import discover
from esper.kasmina.execution import Kasmina
from esper.kasmina.host import HostClock
from esper.kasmina.isolation import undisturbed
from esper.kasmina.ledger import forward_flops
from esper.kasmina.preconditions import check_choices, check_host
from esper.observation import observe
from esper.protocol import (
    AlphaMoved,
    AnyEvent,
    Attached,
    Command,
    HeldOut,
    Lifecycle,
    Observation,
    Overhead,
    SiteInfo,
    Stopped,
    Telemetry,
    TrainLoss,
    Verdict,
    Warned,
)
from esper.stages import Stages
from esper.summary import Report, describe
from esper.tamiyo import Controller, make_controller


class Grower:
    """Grows ``model`` while the user's own loop trains it.

    Parameters
    ----------
    model:
        Any ``nn.Module`` with Linear-activation-Linear or Conv2d-activation-Conv2d paths. Its parameters, state_dict
        keys and forward signature stay as they are.
    optimizer:
        The optimizer, or several; the first one's steps are the clock.
    loss:
        ``loss(model, batch)`` returns the mean loss of a held-out batch.
    evaluate:
        Held-out batches (a list or a DataLoader), at least eight; never batches that are trained on. They decide what
        is kept, so score the result on other data.
    track:
        Schedulers, a GradScaler, whatever belongs to the training state.
    controller:
        A :class:`~esper.tamiyo.Controller`, or ``None`` for the one that ``config.tamiyo.controller`` names.
    on_event:
        Called with every event, in the training thread; keep it short.

    Raises
    ------
    AttachError, SiteError, UnknownNameError
        When the model, the optimizer or the data cannot be used; nothing was changed then.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer],
        *,
        loss: Loss,
        evaluate: Iterable[Any],
        track: Iterable[Any] = (),
        config: Config | None = None,
        controller: Controller | None = None,
        on_event: Callable[[AnyEvent], None] | None = None,
    ) -> None:
        self.config = config or Config()
        self.model = model
        check_host(model)
        check_choices(model, self.config)
        optimizers = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)
        self.controller = controller or make_controller(
            self.config.tamiyo.controller, self.config.tamiyo, seed=self.config.seed
        )
        evidence = self.config.evidence
        self._evaluator = Evaluator(
            model,
            loss,
            evaluate,
            calibration_share=evidence.calibration_share,
            confirm_share=evidence.confirm_share,
            seed=self.config.seed,
        )
        with undisturbed(model):
            discovery = discover(model, self._evaluator.run_one, self.config.sites)
            self._probe_flops = forward_flops(model, self._evaluator.run_one)
        self.discovery = discovery
        self.clock = HostClock(optimizers, discovery.sites, track)
        self.kasmina = Kasmina(model, discovery, self.config, adaptive=self.clock.adaptive)
        self.ledger = self._evaluator.ledger
        self._probe_rows, self._dtypes = self._measure_probe_rows()
        self._evaluator.forward_cost = self._evaluation_cost
        self.judge = Judge(self._evaluator, self.kasmina.sites, evidence, seed=self.config.seed)
        self._on_event = on_event
        self._commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._losses: deque[Tensor] = deque(maxlen=self.config.graft.stabilize_window)
        self._spent: dict[str, float] = defaultdict(float)
        self._overhead_since = 0
        self._warned: set[str] = set()
        self._calls_without_step = 0
        self._last_step = 0
        self._params_budget = self.config.budget.params
        self._flops_share = self.config.budget.flops_share
        self._held_out_initial = math.nan
        self.stopped: str | None = None
        self.stages = Stages(
            self.kasmina, self.judge, self.clock, self.ledger, self.config, self._emit, self._losses
        )
        self.kasmina.watch(True)  # the first step tells whether every site reports
        self._emit(
            Attached(
                step=0, sites=tuple(self.sites()), skipped=discovery.skipped, host_params=self.kasmina.host_params,
                covered_params=sum(info.weights for info in self.sites()), total_steps=self.config.total_steps,
            )
        )  # fmt: skip

    # ---------------------------------------------------------------------------------------------- the step

    def step(self, loss: Tensor | float) -> None:
        """Call once after each ``optimizer.step()`` (or once a micro-batch: only real steps count).

        ``loss`` is the user's training loss; it is read, never differentiated.
        """
        if self.clock.steps == self._last_step:
            self._without_host_step()
            return
        self._warn_if_misplaced()
        self._last_step, self._calls_without_step = self.clock.steps, 0
        step = self._last_step
        self._losses.append(loss.detach() if isinstance(loss, Tensor) else torch.tensor(float(loss)))
        self.kasmina.note_rows(step)
        with self._timed("learn"):
            self._count_host_flops()
            if self.clock.overflowed(stepped=True):
                self.kasmina.forget_gradients()  # they hold those of a step that the scaler has skipped
            self.kasmina.learn(self.clock.hosts, inverse_scale=self.clock.inverse_scale)
        if step == 1:
            self._check_reports()
        at_decision = step % self.config.interval == 0
        if at_decision:
            self._guard(step)
        self._obey(step)
        with self._timed("advance"):
            self.stages.advance(step)
        if at_decision:
            self._decide(step)
        self.kasmina.watch((step + 1) % self.config.telemetry.every == 0)

    def submit(self, command: Command) -> None:
        """Queue a command; it is judged and applied inside the next :meth:`step`. Safe from any thread."""
        self._commands.put(command)

    def finish(self) -> None:
        """End of training: start nothing more, and bring what is alive to an end.

        Cohorts whose acceptance was confirmed become permanent if they still hold; all others are removed at once.
        """
        step = self._last_step
        self._stop("end of training")
        for cohort in list(self.kasmina.cohorts.values()):
            cohort.paused = False
            if cohort.state is Lifecycle.FINE_TUNING:
                cohort.entered = step - self.config.graft.fine_tune_steps
                self.stages.advance(step)
        for cohort in list(self.kasmina.cohorts.values()):
            self.stages.expel(cohort, step, "training ended before it was judged")
        self._measure_held_out(step)
        self._report_overhead(step)

    # ---------------------------------------------------------------------------------------------- what users read

    def sites(self, pattern: str = "*") -> list[SiteInfo]:
        """Sites whose name matches a glob pattern."""
        import fnmatch

        return [plan.info for name, plan in self.kasmina.plans.items() if fnmatch.fnmatch(name, pattern)]

    @property
    def verdicts(self) -> tuple[Verdict, ...]:
        """How every cohort ended, oldest first."""
        return tuple(self.stages.verdicts)

    @property
    def stopped_because(self) -> str:
        """Why growth ended, in a sentence."""
        return self.stopped or "growth has not stopped"

    @property
    def held_out(self) -> float:
        """Latest held-out loss; NaN before the first decision."""
        return self.stages.held_out

    def report(self) -> Report:
        """What grew, where, what it gained and what it cost."""
        return Report.of(self)

    def export(self, *, tolerance: float | None = None) -> nn.Module:
        """A plain copy of the grown model: wider layers, no Esper inside, checked equal on a held-out batch.

        Raises
        ------
        ExportError
            While cohorts are on trial, or when the copy's loss differs by more than ``tolerance`` (relative).
        """
        plain = exporting.merged(self.model, self.kasmina)
        allowed = exporting.default_tolerance(self._dtypes) if tolerance is None else tolerance
        batch = self._evaluator.batches[0]
        exporting.check_equal(self.model, plain, self._evaluator.loss, batch, tolerance=allowed)
        return plain

    def export_structure(self) -> dict[str, dict[str, int]]:
        """The layers that :meth:`export` has widened, with their sizes."""
        return exporting.structure(exporting.merged(self.model, self.kasmina), self.kasmina)

    def detach(self) -> None:
        """Remove every hook. Call :meth:`export` first to keep what was grown."""
        self.kasmina.detach()
        self.clock.detach()

    def __repr__(self) -> str:
        return describe(self)

    def _repr_html_(self) -> str:
        import html

        return f"<pre>{html.escape(describe(self))}</pre>"

    # ---------------------------------------------------------------------------------------------- decide

    def _decide(self, step: int) -> None:
        if step % self.config.held_out_every == 0 or math.isnan(self._held_out_initial):
            with self._timed("evidence"):
                self._measure_held_out(step)
        with self._timed("observe"):
            observation = self._observe(step)
        self._publish(step, observation)
        if self.stopped is None:
            with self._timed("decide"):
                commands = self.controller.decide(observation)
            for command in commands:
                apply(self, command, step, issuer="tamiyo")

    def _observe(self, step: int) -> Observation:
        return observe(
            self.kasmina,
            step=step,
            total_steps=self.config.total_steps,
            held_out=self.stages.held_out,
            held_out_initial=self._held_out_initial,
            host_flops=self.host_flops_per_step,
            budget_params=self._params_budget,
            budget_flops=self.budget_flops,
            verdicts=self.stages.verdicts,
            stopped=self.stopped,
        )

    def _obey(self, step: int) -> None:
        while True:
            try:
                command = self._commands.get_nowait()
            except queue.Empty:
                return
            apply(self, command, step, issuer="operator")

    def _stop(self, reason: str) -> None:
        if self.stopped is None:
            self.stopped = reason
            self._emit(Stopped(step=self._last_step, reason=reason))

    # ---------------------------------------------------------------------------------------------- guards

    def _guard(self, step: int) -> None:
        """Non-finite losses or gradients: what is on trial leaves at once, the newest first."""
        damaged = self.kasmina.damaged()
        recent = torch.stack([value.float() for value in self._losses])
        suspects = [c for c in self.kasmina.cohorts.values() if c.state >= Lifecycle.GRAFTING and c.alpha > 0]
        if not damaged and not bool(torch.isfinite(recent).all()):
            damaged = sorted(suspects, key=lambda cohort: -cohort.born)[:1]
            if not damaged:
                self._warn("loss", "the training loss is not finite and nothing of Esper is on trial: it is the host's")
            self._losses.clear()
        for cohort in damaged:
            self.stages.expel(cohort, step, "guard: a non-finite loss, gradient or parameter")

    def _check_reports(self) -> None:
        """A site whose weight got a gradient but whose hook never ran is an error, not a healthy silence."""
        silent = [
            name
            for name, site in self.kasmina.sites.items()
            if site.refused is None and self.kasmina.rows_per_step[name] == 0 and self.clock.gradients_live(name)
            and site.telemetry is not None and not site.telemetry.reported
        ]
        if silent:
            raise SilentSiteError(
                f"every site must report in a step in which its weights get gradients, {len(silent)} of "
                f"{len(self.kasmina.sites)} are silent ({', '.join(silent[:3])}); the model was probably compiled "
                "before the Grower was attached: build the Grower first and call torch.compile(model) afterwards "
                "(torch._dynamo.reset() clears an earlier compilation)"
            )

    def _without_host_step(self) -> None:
        self._calls_without_step += 1
        if self.clock.overflowed(stepped=False):
            self.kasmina.forget_gradients()
        if self._calls_without_step == 1000:
            self._warn(
                "no step",
                "grower.step was called 1000 times without an optimizer step; call it after optimizer.step(), and "
                "pass the optimizer that is stepped",
            )

    def _warn_if_misplaced(self) -> None:
        if self.clock.backwards_since_step > 0:
            self._warn(
                "misplaced",
                "grower.step(loss) was called between backward() and optimizer.step(); call it after "
                "optimizer.step(), so that grown units learn from the same gradients as the host",
            )

    def _warn(self, key: str, message: str) -> None:
        if key not in self._warned:
            self._warned.add(key)
            warnings.warn(message, RuntimeWarning, stacklevel=3)
            self._emit(Warned(step=self._last_step, message=message))

    # ---------------------------------------------------------------------------------------------- measures

    @property
    def host_flops_per_step(self) -> float:
        """Forward FLOPs of the host alone in one training step."""
        reference = next(iter(self._probe_rows))
        return self._probe_flops * self.kasmina.rows_per_step[reference] / max(1, self._probe_rows[reference])

    @property
    def budget_flops(self) -> float | None:
        return None if self._flops_share is None else self._flops_share * self.host_flops_per_step

    def set_budget(self, params: int | None, flops_share: float | None) -> None:
        """Change the ceiling (``None`` removes it)."""
        self._params_budget, self._flops_share = params, flops_share

    def _measure_probe_rows(self) -> tuple[dict[str, int], set[torch.dtype]]:
        """Output rows of each site in one held-out batch (hooks are attached; nothing is recorded)."""
        from esper.kasmina.rows import count_rows

        with undisturbed(self.model):
            return count_rows(self.discovery.sites, self._evaluator.run_one)

    def _evaluation_cost(self, num_batches: int) -> float:
        return num_batches * (self._probe_flops + self.kasmina.added_flops_per_step(self._probe_rows))

    def _count_host_flops(self) -> None:
        self.ledger.add("host", 3.0 * self.host_flops_per_step)
        self.ledger.add("branches", 3.0 * self.kasmina.added_flops_per_step())

    def _measure_held_out(self, step: int) -> None:
        loss = self.judge.held_out(self.config.evidence.held_out_batches)
        self.stages.held_out = loss
        if math.isnan(self._held_out_initial):
            self._held_out_initial = loss
        self._emit(HeldOut(step=step, loss=loss, params=self.kasmina.params, flops=self.ledger.total))

    # ---------------------------------------------------------------------------------------------- events

    def _publish(self, step: int, observation: Observation) -> None:
        self._emit(TrainLoss(step=step, loss=float(self._losses[-1]) if self._losses else math.nan, flops=self.ledger.total))
        from esper.protocol import SITE_FEATURES

        columns = {name: tuple(observation.sites[:, i].tolist()) for i, name in enumerate(SITE_FEATURES)}
        self._emit(
            Telemetry(
                step=step, sites=observation.site_names, activation_mean=columns["activation_mean"],
                activation_var=columns["activation_var"], gradient_energy=columns["gradient_energy"],
                grown=tuple(observation.grown.tolist()),
            )
        )  # fmt: skip
        for cohort in self.kasmina.cohorts.values():
            if cohort.state is Lifecycle.GRAFTING:
                held = "paused" if cohort.paused else cohort.reason or None
                self._emit(AlphaMoved(step=step, cohort=cohort.number, alpha=cohort.alpha, held_by=held))
        if step - self._overhead_since >= 100:
            self._report_overhead(step)

    def _report_overhead(self, step: int) -> None:
        if step > self._overhead_since:
            spent = {part: 1000 * seconds for part, seconds in self._spent.items()}
            self._emit(Overhead(step=step, num_steps=step - self._overhead_since, milliseconds=spent))
            self._spent.clear()
            self._overhead_since = step

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self._spent[part] += time.perf_counter() - start

    def _emit(self, event: AnyEvent) -> None:
        if self._on_event is not None:
            self._on_event(event)
