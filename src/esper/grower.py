"""The loop: attach to a model, and let it grow while it trains.

::

    y = host_module(x)                  # hooks: y itself, or y + alpha * branch
    loss.backward(); optimizer.step()   # the user's own
    grower.step(loss):                  # the only place where anything changes
        guard                           # damage or divergence: suspects leave, or everything goes back
        learn                           # grafted branches and annexes, in step with the host
        advance                         # every cohort by its state's gate; alpha moves
        every `interval` steps: observe -> decide -> act        (dormant: what the step before has begun to read)
"""

from __future__ import annotations

import fnmatch
import html
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from esper import export as exporting
from esper.absorption import absorb_growth
from esper.accounts import Accounts
from esper.commands import apply, obey
from esper.config import BudgetConfig, Config
from esper.decision import Early, Glance, foresee, glance, is_blind, is_deciding, look, measure_held_out, senses
from esper.evidence.evaluator import Evaluator, Loss
from esper.evidence.judge import Judge
from esper.evidence.twins import as_given, plain_step
from esper.guard import Guard
from esper.journal import Journal
from esper.kasmina.discovery import discover
from esper.kasmina.execution import Kasmina
from esper.kasmina.host import HostClock, read_loss
from esper.kasmina.isolation import undisturbed
from esper.kasmina.ledger import Ledger, forward_flops
from esper.kasmina.preconditions import check_choices, check_host, check_optimizers
from esper.misuse import check_reports, warn_if_misplaced, warn_if_stuck
from esper.orders import Keeping, Orders
from esper.protocol import Absorbed, AnyEvent, Command, Lifecycle, Observation, SiteInfo, Stopped, Verdict
from esper.rest import Rest
from esper.safety.shelf import Shelf
from esper.safety.training import Training
from esper.stages import Stages
from esper.state import Loop, Setup
from esper.stored import Stored
from esper.summary import Report, attached, describe
from esper.tamiyo import Controller, make_controller
from esper.trials import Trials


class Grower(Stored):
    """Grows ``model`` while the user's own loop trains it.

    Parameters
    ----------
    model:
        Any ``nn.Module`` with Linear-activation-Linear, gated or conv-activation-conv paths. Its parameters,
        state_dict keys and forward signature stay as they are.
    optimizer:
        The optimizer, or several; the first one's steps are the clock.
    loss:
        ``loss(model, batch)`` returns the mean loss of a held-out batch.
    evaluate:
        Held-out batches (a list or a DataLoader), enough that a branch can be accepted at all (fourteen with default
        settings, the error says how many); never batches that are trained on. They decide what is kept, so score the
        result on other data.
    train_step:
        ``train_step(model, optimizer, batch)`` takes one training step as your loop does; only for twins
        (``EvidenceConfig.twin_share``) of loops that do more than forward, backward and step. ``optimizer`` comes as
        it was given here, one or several.
    audit:
        Further batches, read once in :meth:`finish`: every accepted cohort is scored on them, for the report. Keeps a
        copy of the model for each accepted cohort until then.
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
        train_step: Callable[[nn.Module, Any, Any], object] | None = None,
        audit: Iterable[Any] | None = None,
        track: Iterable[Any] = (),
        config: Config | None = None,
        controller: Controller | None = None,
        on_event: Callable[[AnyEvent], None] | None = None,
    ) -> None:
        self.config = config or Config()
        self.model = model
        check_host(model)
        check_choices(model, self.config)
        self.controller = controller or make_controller(
            self.config.tamiyo.controller, self.config.tamiyo, seed=self.config.seed
        )
        optimizers, single = check_optimizers(optimizer), isinstance(optimizer, Optimizer)
        self._train_step = plain_step(loss) if train_step is None else as_given(train_step, single=single)
        self._audit = audit
        self._evaluator = Evaluator.of(model, loss, evaluate, self.config.evidence, seed=self.config.seed)
        with undisturbed(model):
            self.discovery = discover(model, self._evaluator.run_one, self.config.sites)
            probe_flops = forward_flops(model, self._evaluator.run_one)
        self._attach(optimizers, track, probe_flops, on_event)

    def _attach(
        self, optimizers: list[Optimizer], track: Iterable[Any], probe_flops: float,
        on_event: Callable[[AnyEvent], None] | None,
    ) -> None:  # fmt: skip
        """Hang everything on the host; whatever goes wrong leaves no hook behind."""
        with ExitStack() as undo:
            self.training = Training(self.model, optimizers, track)
            self.clock = HostClock(optimizers, self.discovery.sites, self.training.tracked)
            undo.callback(self.clock.detach)
            self._equip(probe_flops, on_event, undo)
            undo.pop_all()

    def _equip(self, probe_flops: float, on_event: Callable[[AnyEvent], None] | None, undo: ExitStack) -> None:
        self.kasmina = Kasmina(self.model, self.discovery, self.config, adaptive=self.clock.adaptive)
        undo.callback(self.kasmina.detach)
        self.accounts = Accounts(
            self.model, self._evaluator, self.discovery, self.kasmina, probe_flops=probe_flops,
            budget=self.config.budget,
        )  # fmt: skip
        self.judge = Judge(self._evaluator, self.kasmina.sites, self.config.evidence, seed=self.config.seed)
        self.journal = Journal(on_event)
        self.keeping, self._desk = Keeping(), None
        self._orders, self._shelf = Orders(self.keeping), Shelf()
        self._early: Early | None = None
        self._rest: Rest | None = None
        self.loop = Loop(deque(maxlen=self.config.graft.stabilize_window))
        self._setup = Setup(self.config, self.sites, self._evaluator.batches)
        self.export_difference: exporting.Difference | None = None
        self.watcher: Callable[[Observation], None] | None = None
        """Called in the training thread at every decision point, with what is observed; a link to a bus listens."""
        self.trials = Trials(
            self.model, self.kasmina, self.judge, self.clock, self.ledger, self.config, self.journal.emit,
            self.journal.warn, self._train_step, self._audit, lambda: self.accounts.training_flops,
        )  # fmt: skip
        self.guard = Guard(self, self._orders, lambda twins: self._whole(waiting=False, twins=twins))
        self.stages = Stages(
            self.kasmina, self.judge, self.clock, self.ledger, self.config, self.journal.emit, self.trials,
            self.loop.losses, self.guard.may_graft,
        )  # fmt: skip
        self.kasmina.watch(True)  # the first step tells whether every site reports
        self.journal.emit(attached(self))
        for text in [*self.clock.approximations, *self.training.omissions]:
            self.journal.warn(text, text, 0)

    # ---------------------------------------------------------------------------------------------- the step

    def step(self, loss: Tensor | float, batch: Any = None) -> None:
        """Call once after each ``optimizer.step()`` (or once a micro-batch: only real steps count).

        ``loss`` is the user's training loss; it is read, never differentiated. ``batch`` is what was trained on, for
        twins; nothing else reads it.
        """
        step = self.clock.steps
        if step == self.loop.last_step:
            self._without_host_step()
            return
        if self._rest is not None:
            if self._desk is None and self._rest.counts(step, loss):
                if step >= self._rest.due:
                    self._stir(self._rest, step)
                return
            self._wake()
        warn_if_misplaced(self.clock, self.journal, self.loop.last_step)
        self.loop.last_step, self.loop.calls_without_step, self.loop.skipped = step, 0, 0
        self.loop.losses.append(read_loss(loss))
        self.guard.note(self.loop.losses[-1])
        self._work(step, batch)
        self._foresee()
        if self._desk is None:
            self._rest = Rest.of(self, self._orders)

    def _stir(self, rest: Rest, step: int) -> None:
        """What is due in a step although nothing is alive: sensors and decisions."""
        self.kasmina.note_rows(step, passes=max(1, self.clock.passes))
        self.accounts.count_step()
        if step % self.config.interval == 0:
            if is_blind(self, step):
                self.guard.glimpse(step)
            else:
                self._decide(step, self._look(step))
        self.kasmina.watch(senses(self, step + 1))
        if rest.holds:
            rest.plan(step)
        else:
            self._wake()
            with self.journal.timed("safety"):
                self.guard.after_step(self.loop.last_step)
        self._foresee()

    def _wake(self) -> None:
        self._rest = None
        self.clock.rouse()

    def _work(self, step: int, batch: Any) -> None:
        self.kasmina.note_rows(step, passes=max(1, self.clock.passes))
        with self.journal.timed("learn"):
            self.accounts.count_step()
            if self.clock.overflowed(stepped=True):
                self.kasmina.forget_gradients()  # they hold those of a step that the scaler has skipped
            self.kasmina.learn(self.clock.hosts, inverse_scale=self.clock.inverse_scale)
        with self.journal.timed("evidence"):
            self.trials.follow(batch, step)
        if step == 1:
            check_reports(self.kasmina, self.clock)
        begun = self._look(step) if step % self.config.interval == 0 else None
        obey(self, self._orders, self._desk, step)
        if self.clock.steps != step:
            return  # everything was taken back to the end of an earlier step
        with self.journal.timed("advance"):
            self.stages.advance(step)
        if begun is not None:
            self._decide(step, begun)
        if self.clock.steps != step:
            return
        self.kasmina.watch(senses(self, step + 1))
        with self.journal.timed("safety"):
            self.guard.after_step(step)

    def submit(self, command: Command) -> None:
        """Queue a command; it is judged and applied inside the next :meth:`step`. Safe from any thread."""
        self._orders.put(command)

    def stop(self, reason: str) -> None:
        """Start no further cohort. Those alive go on to their end, and so does training."""
        if self.stopped is None:
            self.loop.stopped = reason
            self.journal.emit(Stopped(step=self.loop.last_step, reason=reason))

    def set_budget(self, params: int | None, flops_share: float | None) -> None:
        """Change the ceiling (``None`` removes it).

        Raises
        ------
        ConfigError
            For a ceiling that could never hold.
        """
        self.accounts.budget = BudgetConfig(params=params, flops_share=flops_share)

    def finish(self) -> None:
        """End of training: start nothing more, and bring what is alive to an end.

        Cohorts whose acceptance was confirmed become permanent if they still hold; all others are removed at once.
        """
        step = self.loop.last_step
        self.stop("end of training")
        for cohort in [c for c in self.kasmina.cohorts.values() if c.state is Lifecycle.FINE_TUNING]:
            self.stages.decide_hold(cohort, step)
        for cohort in list(self.kasmina.cohorts.values()):
            self.stages.expel(cohort, step, "training ended before it was judged")
        measure_held_out(self, step)
        self.trials.finish(step, self.stages.verdicts)
        self.journal.report_overhead(step)

    # ---------------------------------------------------------------------------------------------- what users read

    def sites(self, pattern: str = "*") -> list[SiteInfo]:
        """Sites whose name matches a glob pattern."""
        return [plan.info for name, plan in self.kasmina.plans.items() if fnmatch.fnmatch(name, pattern)]

    @property
    def ledger(self) -> Ledger:
        """FLOPs spent so far, by part."""
        return self.accounts.ledger

    @property
    def verdicts(self) -> tuple[Verdict, ...]:
        """How cohorts ended, oldest first: all that were kept, of the others the newest thousand."""
        return self.stages.verdicts.told()

    @property
    def ended(self) -> dict[Lifecycle, int]:
        """How many cohorts have come to each end, since the beginning."""
        return dict(self.stages.verdicts.ended)

    @property
    def stopped(self) -> str | None:
        """Why growth ended; ``None`` while it goes on."""
        return self.loop.stopped

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

        ``export_difference`` then holds how much the loss, the model's and each grown layer's output differ (relative).

        Raises
        ------
        ExportError
            While cohorts are on trial, or when the copy's loss differs by more than ``tolerance`` (relative).
        """
        plain = exporting.merged(self.model, self.kasmina)
        allowed = exporting.default_tolerance(self.accounts.dtypes) if tolerance is None else tolerance
        self.export_difference = exporting.check_equal(
            self.model, plain, self._evaluator.loss, self._evaluator.batches[0], tolerance=allowed,
            plans=exporting.grown_sites(self.kasmina),
        )  # fmt: skip
        return plain

    def export_structure(self) -> dict[str, dict[str, int]]:
        """The layers that :meth:`export` has widened, with their sizes."""
        return exporting.structure(exporting.merged(self.model, self.kasmina), self.kasmina)

    def absorb(self, *, tolerance: float | None = None) -> Absorbed:
        """Move what was grown into the model's own layers, in place: wider tensors, the optimizer's state with them.

        For those who want one model and one optimizer: from here on grown units learn by the optimizer itself, at its
        learning rate, and the state_dict holds them (its shapes change, its keys do not). Parameters become *new
        objects* in the modules and in the optimizer's groups: whoever keeps a list of the old ones (a clipping list,
        an averaged copy, a wrapper) must make it anew. Growth goes on afterwards.

        Raises
        ------
        AbsorbError
            While cohorts are on trial, gradients or hooks are on the tensors, the optimizer is not Adam, AdamW or
            SGD, or processes share the model. Nothing was changed.
        ExportError
            When the wider layers would not compute the same (relative difference of the loss above ``tolerance``).
        """
        self._wake()
        absorbed = absorb_growth(self, tolerance=tolerance)
        self.guard.begin_anew(self.loop.last_step)
        self._foresee()
        return absorbed

    def detach(self) -> None:
        """Remove every hook. Call :meth:`export` first to keep what was grown."""
        self.kasmina.detach()
        self.clock.detach()
        self._shelf.close()

    def __repr__(self) -> str:
        return describe(self)

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(describe(self))}</pre>"

    # ---------------------------------------------------------------------------------------------- how

    def _foresee(self) -> None:
        self._early = foresee(self, needed=is_deciding(self, self.loop.last_step + 1))

    def _look(self, step: int) -> Glance:
        begun, self._early = glance(self, step, self._early, needed=is_deciding(self, step)), None
        self.guard.look(step, begun.reading)
        return begun

    def _decide(self, step: int, begun: Glance) -> None:
        deciding = is_deciding(self, step)
        observation = look(self, step, begun, needed=deciding)
        if deciding and observation is not None:
            with self.journal.timed("decide"):
                commands = self.controller.decide(observation)
            for note in getattr(self.controller, "notes", tuple)():  # to ask whether it is Noting takes longer
                self.journal.warn(note, note, step)
            for command in commands:
                if self.clock.steps == step:
                    apply(self, command, step, issuer="tamiyo")

    def _without_host_step(self) -> None:
        self.loop.calls_without_step += 1
        if self.clock.overflowed(stepped=False):
            self.kasmina.forget_gradients()
            self.loop.skipped += 1
            self.guard.skipped(self.loop.skipped, self.loop.last_step)
        warn_if_stuck(self.loop.calls_without_step, self.journal, self.loop.last_step)
