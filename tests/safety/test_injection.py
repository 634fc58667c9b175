"""Faults: each strikes where it says, leaves nothing of itself behind, and can be told from one that never came."""

from __future__ import annotations

import inspect
import itertools
import math
import time
from collections.abc import Callable

import pytest
import torch
from tests.models import Pair
from tests.rigs import Rig, attach, host_of, keep_visible
from torch import nn

import esper
from esper.errors import ConfigError, UnknownNameError
from esper.kasmina.blueprints import BLUEPRINTS
from esper.kasmina.hooks import armed
from esper.protocol import Germinate, Lifecycle, SeedPlan
from esper.runs.trials import faulty
from esper.runs.trials.faults import fault_names, fault_trial
from esper.runs.trials.faulty import FaultyRun, same_weights
from esper.runs.trials.injection import BrokenOffError, Injection, inconsistencies, time_limit
from esper.runs.trials.training import Setup
from esper.safety.faults import FAULTS, Expectation, Fault, InjectedError, Moment, NotRefusedError, Strikes, Subject

pytestmark = pytest.mark.component

ELSEWHERE = (Moment.SAVING, Moment.COMMANDED)
STEP_FAULTS = [name for name in FAULTS if FAULTS[name].moment not in ELSEWHERE]


def subject_of(rig: Rig) -> Subject:
    def second() -> object:
        return esper.Grower(
            rig.model, rig.optimizer, loss=rig.grower._evaluator.loss, evaluate=rig.grower._evaluator.batches
        )

    return Subject(
        model=rig.model, optimizers=[rig.optimizer], sites=rig.grower.kasmina.sites, attach=second,
    )  # fmt: skip


def traces(rig: Rig) -> list[object]:
    """Everything a fault may take hold of."""
    modules = list(rig.model.modules())
    with armed(rig.grower.kasmina.sites):  # they are off in steps in which no site has work
        hooks = [(dict(module._forward_pre_hooks), dict(module._forward_hooks)) for module in modules]
    return [
        hooks,
        dict(rig.optimizer._optimizer_step_pre_hooks), dict(rig.optimizer._optimizer_step_post_hooks),
        [group["lr"] for group in rig.optimizer.param_groups],
        [sorted(vars(BLUEPRINTS[name])) for name in BLUEPRINTS],
        [time.time, time.monotonic, time.perf_counter],
    ]  # fmt: skip


def act(fault: Fault, rig: Rig) -> Strikes:
    """Give a fault what it waits for; an error may come out."""
    with fault.inject(subject_of(rig)) as strikes:
        try:
            if fault.moment is Moment.GERMINATION:
                plans = tuple(SeedPlan(site=info.name, width=2) for info in rig.grower.sites())
                rig.grower.submit(Germinate(seeds=plans))
            if fault.moment is Moment.JUDGEMENT:
                with time_limit(0.2):
                    rig.grower.judge.held_out(1)
            rig.train(1)
        except (InjectedError, torch.OutOfMemoryError, BrokenOffError, RuntimeError):
            pass
    return strikes


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", STEP_FAULTS)
def test_a_fault_strikes_and_takes_everything_back(name: str) -> None:
    fault, rig = FAULTS[name], attach(Pair())
    rig.train(2)
    if fault.moment is Moment.GRAFTED:
        rig.until(rig.germinate(), Lifecycle.GRAFTING)
    before = traces(rig)
    assert act(fault, rig).num > 0
    assert traces(rig) == before
    assert fault.does and fault.patience >= 1 and fault.lasts >= 1
    assert inspect.getdoc(type(fault)), "a fault's docstring says what must hold"


def test_the_registry_refuses_what_it_does_not_know() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'nan_batch'"):
        fault_names(["nan_bach"])
    with pytest.raises(ConfigError, match="unique"):
        FAULTS.register("nan_batch")(type(FAULTS["inf_batch"]))
    assert fault_names(["two_growers", "nan_batch", "two_growers"]) == ("two_growers", "nan_batch")
    assert set(fault_names(["all"])) == set(FAULTS)


# ----------------------------------------------------------------------------------------------------------------------
# What each does


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(5, 4), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.embedding(x))


@pytest.mark.parametrize(("name", "is_nan"), [("nan_batch", True), ("inf_batch", False), ("host_nan", True)])
def test_batch_faults_spoil_training_and_not_evaluation(name: str, is_nan: bool) -> None:
    for model, x in ((nn.Linear(4, 3), torch.ones(2, 4)), (Tokens(), torch.zeros(2, 2, dtype=torch.int64))):
        clean = model(x).detach()
        subject = Subject(model=model, optimizers=[], sites={}, attach=lambda: None)
        with FAULTS[name].inject(subject) as strikes:
            out = model(x)
            assert not torch.isfinite(out).all() and bool(out.isnan().any()) == is_nan
            assert torch.equal(out[1:], clean[1:]), "one row was to be spoilt"
            with torch.no_grad():
                model.eval()
                assert torch.equal(model(x), clean)
                model.train()
            out.sum().backward()
        assert strikes.num == 1
        assert not all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_the_exploding_rate_is_the_users_again_after_each_step() -> None:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    before = model.weight.detach().clone()
    with FAULTS["exploding_lr"].inject(Subject(model=model, optimizers=[optimizer], sites={}, attach=lambda: None)):
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        assert optimizer.param_groups[0]["lr"] == 0.1
    assert float((model.weight - before).abs().max().detach()) > 1e3


def test_clocks_jump_by_a_day_both_ways() -> None:
    with FAULTS["clock_jumps"].inject(Subject(model=nn.Linear(1, 1), optimizers=[], sites={}, attach=lambda: None)):
        readings = [time.monotonic() for _ in range(4)]
    steps = [later - earlier for earlier, later in itertools.pairwise(readings)]
    assert min(steps) < -80_000 and max(steps) > 80_000
    assert abs(time.monotonic() - readings[0]) > 80_000


def test_a_second_grower_that_is_let_in_is_an_error() -> None:
    subject = Subject(model=nn.Linear(1, 1), optimizers=[], sites={}, attach=lambda: None)
    with pytest.raises(NotRefusedError), FAULTS["two_growers"].inject(subject):
        pass


def test_a_call_that_hangs_is_broken_off() -> None:
    started = time.monotonic()
    with pytest.raises(BrokenOffError, match="may take"), time_limit(0.05):
        time.sleep(5)
    assert time.monotonic() - started < 4
    with time_limit(None):
        pass


# ----------------------------------------------------------------------------------------------------------------------
# Whole trials


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", list(FAULTS))
def test_what_must_hold_after_it_holds(name: str) -> None:
    record = fault_trial(2, faults=(name,))
    assert record.struck > 0 and record.held, record.detail
    assert record.phase != "never came" and record.kind == name


def failing(*_: object, **__: object) -> torch.Tensor:
    raise IndexError("no such unit")


def test_a_branch_that_raises_adds_nothing_and_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = attach(Pair())
    cohort = rig.germinate("fc1-fc2")
    rig.until(cohort, Lifecycle.GRAFTING)
    monkeypatch.setattr(BLUEPRINTS[rig.bank(cohort).blueprint], "hidden", failing)
    x = rig.batches[0][0]
    assert torch.equal(rig.model(x), host_of(rig.model)(x))
    rig.train(2 * rig.grower.config.interval)
    assert [verdict.state for verdict in rig.grower.verdicts] == [Lifecycle.ROLLED_BACK]
    assert "IndexError: no such unit" in rig.grower.verdicts[0].reason


def test_a_permanent_branch_that_raises_is_the_callers_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaving it out would silently make another network of it."""
    rig = attach(Pair())
    keep_visible(rig, "fc1-fc2", 3)
    monkeypatch.setattr(BLUEPRINTS["bottleneck"], "hidden", failing)
    with pytest.raises(IndexError, match="no such unit"):
        rig.model(rig.batches[0][0])


class Trace(Fault):
    """Says that it leaves no trace, and nudges a weight."""

    does = "one weight is moved"
    moment, expects, leaves_no_trace = Moment.GRAFTED, Expectation.SURVIVES, True

    def inject(self, subject: Subject):  # type: ignore[no-untyped-def]
        return _Nudged(subject)


class _Nudged:
    def __init__(self, subject: Subject) -> None:
        self.subject = subject

    def __enter__(self) -> Strikes:
        with torch.no_grad():
            next(iter(self.subject.model.parameters())).view(-1)[0] += 1e-6
        return Strikes(1)

    def __exit__(self, *_: object) -> None:
        pass


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> Callable[[Fault], None]:
    def plant(fault: Fault) -> None:
        monkeypatch.setitem(FAULTS._items, "planted", fault)

    return plant


def test_a_trace_is_found(planted: Callable[[Fault], None]) -> None:
    planted(Trace())
    record = fault_trial(2, faults=("planted",))
    assert not record.held and "otherwise" in record.detail


def test_a_run_without_a_fault_is_the_same_twice() -> None:
    runs = [FaultyRun(Setup.of(2), None) for _ in range(2)]
    for run in runs:
        run.take_steps(60)
    assert same_weights(runs[0].grower, runs[1].grower)
    with torch.no_grad():
        next(iter(runs[1].model.parameters())).view(-1)[0] += 1e-6
    assert not same_weights(runs[0].grower, runs[1].grower)


def test_half_made_changes_are_found() -> None:
    rig = attach(Pair())
    cohort = rig.germinate()
    assert inconsistencies(rig.grower) == []
    rig.grower.kasmina.cohorts.pop(cohort.number)
    found = inconsistencies(rig.grower)
    assert any("banks of no cohort" in text for text in found) and any("belong to no cohort" in text for text in found)


def test_a_fault_whose_moment_never_comes_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faulty, "STEPS", 25)
    record = fault_trial(2, faults=("nan_batch",))
    assert record.struck == 0 and not record.held and record.detail == "it never struck"
    assert math.isnan(FaultyRun(Setup.of(2), None).level)


def test_an_injection_ends_by_itself() -> None:
    rig = attach(Pair())
    injection = Injection(FAULTS["evaluation_raises"], lambda grower: None)
    assert injection.is_waiting and not injection.is_acting
    injection.begin(rig.grower, 10)
    for clock in range(10, 10 + FAULTS["evaluation_raises"].patience):
        assert injection.is_acting, clock
        injection.after_step(clock)
    assert not injection.is_acting and injection.struck_at is None
