"""What each of the eleven states adds to the forward pass, who learns in it, and how a cohort gets in and out."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import esper
from esper.commands import apply
from esper.export.merge import strip
from esper.kasmina.cohort import Cohort
from esper.kasmina.lifecycle import TABLE
from esper.protocol import (
    Cancel,
    Command,
    Cull,
    Germinate,
    Lifecycle,
    Pause,
    Resume,
    RollBack,
    SeedPlan,
    SetBudget,
    SetStrategy,
    Stop,
    Transitioned,
)
from tests.models import MLP, QUICK, Mlp, Pair, Rig, assert_same_state, attach, mse, rows, same_bits, snapshot

pytestmark = pytest.mark.component

S = Lifecycle
PATH = (S.TRAINING, S.GRAFTING, S.STABILIZATION, S.EVALUATING, S.FINE_TUNING)
"""The way of a seed that is kept, from GERMINATED on."""
ALPHA = 0.4


def hold(state: Lifecycle, model: nn.Module | None = None) -> tuple[Rig, Cohort | None]:
    """A host with one cohort resting in ``state``, its branch of visible size; ended ones at the moment of their end."""
    rig = attach(model or Pair())
    rig.train(2)
    if state is S.DORMANT:
        return rig, None
    cohort = rig.germinate(start="negative_gradient")
    assert cohort.state is S.GERMINATED
    kasmina, step = rig.grower.kasmina, rig.grower.clock.steps
    for passed in PATH:
        if state is cohort.state or (state in (S.CULLED, S.CANCELLED, S.ROLLED_BACK) and cohort.state is S.EVALUATING):
            break
        kasmina.move(cohort, passed, step)
        if passed is S.GRAFTING:
            kasmina.drop_captures(cohort)
            kasmina.graft(cohort)
            kasmina.set_alpha(cohort, ALPHA)
            for site in cohort.sites:
                make_visible(rig.bank(cohort, site))
    if state is S.FOSSILIZED:
        rig.grower.stages.verdicts.clear()
        kasmina.fossilise(cohort, step, rig.grower.clock.hosts)
    elif state in (S.CULLED, S.CANCELLED, S.ROLLED_BACK):
        rig.grower.stages.end(cohort, state, step, "test")
    else:
        kasmina.set_paused(cohort, True, step)
    return rig, cohort


def make_visible(bank: Any) -> None:
    source = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for value in bank.params.values():
            value.copy_(0.5 * torch.randn(value.shape, generator=source))


def host_of(model: nn.Module) -> nn.Module:
    """A copy without any hook."""
    plain = copy.deepcopy(model)
    strip(plain)
    for parameter in plain.parameters():
        parameter.grad = None
    return plain


def delta(params: dict[str, Tensor], x: Tensor) -> Tensor:
    """The branch written out by hand for one seed."""
    return F.linear(F.gelu(F.linear(x, params["w1"][0], params["b1"][0])), params["w2"][0])


def expected_gain(rig: Rig, state: Lifecycle) -> tuple[float, dict[str, Tensor]] | None:
    """Alpha and parameters of what must be in the forward pass, from the table's own column."""
    site = rig.grower.kasmina.sites["fc1-fc2"]
    kind = TABLE[state].forward
    if kind == "annex":
        assert site.annex is not None
        return 1.0, {name: value.detach().clone() for name, value in site.annex.params.items()}
    if kind in ("slot", "fading"):
        (bank,) = site.banks.values()
        return ALPHA, {name: value.detach().clone() for name, value in bank.params.items()}
    return None


# ----------------------------------------------------------------------------------------------------------------------
# State by state


@pytest.mark.parametrize("state", list(Lifecycle), ids=lambda s: s.name)
def test_what_the_forward_adds(state: Lifecycle) -> None:
    rig, _ = hold(state)
    host = host_of(rig.model)
    for x, _wanted in rows(3, seed=21):
        with torch.no_grad():
            y, base = rig.model(x), host(x)
            added = expected_gain(rig, state)
            if added is None:
                assert same_bits(y, base)
            else:
                torch.testing.assert_close(y, base + added[0] * delta(added[1], x), rtol=1e-5, atol=1e-6)
                assert (y - base).abs().max() > 0.05, "the branch was to be visible"


@pytest.mark.parametrize("state", list(Lifecycle), ids=lambda s: s.name)
def test_who_receives_gradients(state: Lifecycle) -> None:
    """The host always, and the gradients of the very function that ran; branches only in states that learn."""
    rig, cohort = hold(state)
    host, (x, wanted) = host_of(rig.model), rig.batches[0]
    added = expected_gain(rig, state)
    learns = TABLE[state].learns == "task"
    mine = {name: value.requires_grad_() for name, value in added[1].items()} if added else {}
    expected = host(x) if added is None else host(x) + added[0] * delta(mine, x)
    (expected - wanted).square().mean().backward()
    rig.backward()
    for (name, p), q in zip(rig.model.named_parameters(), host.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None, name
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6)
    site = rig.grower.kasmina.sites["fc1-fc2"]
    banks = [site.annex] if site.annex is not None else list(site.banks.values())
    assert bool(banks) == (cohort is not None and state is not S.ROLLED_BACK)
    for bank in banks:
        assert bank is not None
        for name, value in bank.params.items():
            assert (value.grad is not None) == learns == value.requires_grad, name
            if learns:
                torch.testing.assert_close(value.grad, mine[name].grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("state", list(Lifecycle), ids=lambda s: s.name)
def test_who_moves_in_a_step(state: Lifecycle) -> None:
    rig, cohort = hold(state)
    site = rig.grower.kasmina.sites["fc1-fc2"]
    bank = site.annex if state is S.FOSSILIZED else next(iter(site.banks.values()), None)
    before = {} if bank is None else {name: value.detach().clone() for name, value in bank.params.items()}
    host = snapshot(rig.model)
    rig.train()
    assert all(not torch.equal(value, host[name]) for name, value in rig.model.state_dict().items())
    if bank is not None:
        moved = {name: not torch.equal(value, before[name]) for name, value in bank.params.items()}
        assert set(moved.values()) == {TABLE[state].learns == "task"}, moved
    if cohort is not None and state in PATH:
        assert cohort.alpha == (ALPHA if state >= S.GRAFTING else 0.0)


@pytest.mark.unit
@pytest.mark.parametrize("state", list(Lifecycle), ids=lambda s: s.name)
def test_the_table_of_seeds_says_the_same(state: Lifecycle) -> None:
    rig, cohort = hold(state)
    table = rig.grower.kasmina.table
    codes = set(table.state_tensor(0)[:, 0].tolist())
    gone = state in (S.DORMANT, S.FOSSILIZED, S.ROLLED_BACK)
    assert codes == {0 if gone else int(state)}
    assert (table.owner >= 0).all() == (not gone) and (table.owner < 0).all() == gone
    assert (table.generation == int(state is S.FOSSILIZED)).all()
    if cohort is not None and not gone:
        assert table.alpha[cohort.slots] == pytest.approx(ALPHA if TABLE[state].forward != "no" else 0.0)


# ----------------------------------------------------------------------------------------------------------------------
# Ways out


@pytest.mark.parametrize("command", [Cull, Cancel])
def test_a_culled_branch_fades_out_and_leaves_no_trace(command: type[Cull | Cancel]) -> None:
    rig, cohort = hold(S.STABILIZATION)
    assert cohort is not None
    fading = QUICK["graft"].cull_steps  # type: ignore[attr-defined]
    params = {name: value.detach().clone() for name, value in rig.bank(cohort).params.items()}
    rig.grower.submit(command(cohort=cohort.number, reason="test"))
    for step in range(1, fading + 1):
        rig.train()
        x = rig.batches[0][0]
        left = ALPHA * (1 - step / fading)
        with torch.no_grad():
            wanted = host_of(rig.model)(x) + left * delta(params, x)
            torch.testing.assert_close(rig.model(x), wanted, rtol=1e-5, atol=1e-6)
        assert cohort.alpha == pytest.approx(left, abs=1e-7)
    assert_gone(rig, cohort)


def test_a_rollback_is_at_once() -> None:
    rig, cohort = hold(S.FINE_TUNING)
    assert cohort is not None
    apply(rig.grower, RollBack(cohort=cohort.number, reason="test"), rig.grower.clock.steps, issuer="test")
    assert_gone(rig, cohort)


@pytest.mark.parametrize("state", [S.GERMINATED, S.TRAINING], ids=lambda s: s.name)
@pytest.mark.parametrize("command", [Cancel, RollBack])
def test_what_is_not_in_the_forward_pass_leaves_at_once(state: Lifecycle, command: type[Cancel | RollBack]) -> None:
    rig, cohort = hold(state)
    assert cohort is not None
    apply(rig.grower, command(cohort=cohort.number, reason="test"), rig.grower.clock.steps, issuer="test")
    assert_gone(rig, cohort)


def assert_gone(rig: Rig, cohort: Cohort) -> None:
    """The host computes what it would alone, nothing is held, and the chunks rest."""
    kasmina, step = rig.grower.kasmina, rig.grower.clock.steps
    host = host_of(rig.model)
    x = rig.batches[3][0]
    for module in (rig.model, host):
        module.zero_grad()
    out, alone = rig.model(x), host(x)
    assert same_bits(out, alone)
    out.sum().backward()
    alone.sum().backward()
    gradients = [(p.grad, q.grad) for p, q in zip(rig.model.parameters(), host.parameters(), strict=True)]
    assert all(one is not None and two is not None and same_bits(one, two) for one, two in gradients)
    rig.optimizer.zero_grad()
    assert kasmina.cohorts == {} and kasmina.live_banks == []
    assert all(not s.grafted and s.capture is None and s.annex is None for s in kasmina.sites.values())
    assert len(kasmina.table.occupied()) == 0 and (kasmina.table.owner == -1).all()
    assert (kasmina.table.embargo_until > step).all(), "its chunks were to rest"
    assert kasmina.params == sum(p.numel() for p in rig.model.parameters())
    assert [verdict.cohort for verdict in rig.grower.verdicts] == [cohort.number]
    gate = apply(rig.grower, Germinate(seeds=(SeedPlan(site="fc1-fc2"),)), step, issuer="test")
    assert not gate.passed
    later = step + QUICK["graft"].embargo + 1  # type: ignore[attr-defined]
    assert len(kasmina.table.free_chunks(0, later)) == kasmina.table.owner.size


def test_one_cohort_that_ends_leaves_the_captures_of_another() -> None:
    rig = attach(Pair())
    first = rig.germinate(start="negative_gradient", chunks=(0, 1))
    rig.order(Germinate(seeds=(SeedPlan(site="fc1-fc2", start="negative_gradient", chunks=(2, 3), width=2),)))
    second = rig.grower.kasmina.cohorts[2]
    rig.order(RollBack(cohort=first.number, reason="test"))
    assert second.state is S.GERMINATED and rig.grower.kasmina.sites["fc1-fc2"].capture is not None
    rig.until(second, S.GRAFTING)
    assert rig.grower.kasmina.sites["fc1-fc2"].capture is None


def test_captures_age_from_the_step_that_completed_them() -> None:
    rig = attach(Pair(), capture=esper.CaptureConfig(batches=2, rows=64, max_age=10))
    cohort = rig.germinate(start="negative_gradient")
    rig.order(Pause(cohort=cohort.number))
    rig.train(20)  # the rows are complete now, and grow old
    rig.order(Resume(cohort=cohort.number))
    rig.train()
    (verdict,) = rig.grower.verdicts
    assert verdict.state is S.CULLED and "age of the captures" in verdict.reason


@pytest.mark.unit
def test_captures_that_never_fill_are_cancelled() -> None:
    rig = attach(Pair(), capture=esper.CaptureConfig(batches=4, rows=64, timeout=5))
    cohort = rig.germinate(start="negative_gradient")
    for _ in range(7):  # the host steps on gradients that do not come through the site
        for parameter in rig.model.parameters():
            parameter.grad = torch.ones_like(parameter)
        rig.optimizer.step()
        rig.grower.step(1.0)
    assert [v.state for v in rig.grower.verdicts] == [S.CANCELLED] and "capture" in rig.grower.verdicts[0].reason
    assert_gone(rig, cohort)


# ----------------------------------------------------------------------------------------------------------------------
# Pauses


@pytest.mark.parametrize("strategy", ["fixed_ramp", "drift_controlled"])
def test_a_pause_holds_alpha_and_timers_and_a_resume_goes_on(strategy: str) -> None:
    graft = esper.GraftConfig(ramp_steps=10, timeout=40, warmup_steps=1, drift_threshold=1e9, embargo=20)
    rig = attach(Pair(), graft=graft, fit=esper.FitConfig(steps=10, batch_rows=32, min_t=-1e9, scales=(1e-3,)))
    cohort = rig.germinate(start="negative_gradient", strategy=strategy)
    rig.until(cohort, S.GRAFTING)
    make_visible(rig.bank(cohort))
    rig.grower.kasmina.set_alpha(cohort, 0.0)
    rig.train(3)
    assert cohort.alpha == pytest.approx(0.3)
    rig.order(Pause(cohort=cohort.number))
    alpha, epochs = cohort.alpha, int(rig.grower.kasmina.table.epochs_in_state[cohort.slots][0])
    weights = rig.bank(cohort).params["w2"].detach().clone()
    rig.train(60)  # longer than the state's timeout
    assert cohort.state is S.GRAFTING and cohort.alpha == alpha
    assert float(rig.bank(cohort).alpha) == pytest.approx(alpha)
    assert int(rig.grower.kasmina.table.epochs_in_state[cohort.slots][0]) == epochs
    (view,) = rig.grower._observe(rig.grower.clock.steps).alive
    assert view.steps_in_state <= 5, "time spent paused does not count"
    assert not torch.equal(weights, rig.bank(cohort).params["w2"]), "a paused branch goes on learning"
    rig.order(Resume(cohort=cohort.number))
    assert cohort.alpha == pytest.approx(alpha + 0.1)
    rig.train(5)
    assert cohort.alpha == pytest.approx(min(1.0, alpha + 0.6)) and cohort.state is S.GRAFTING


def test_a_pause_counts_once_and_an_end_lifts_it() -> None:
    rig, cohort = hold(S.STABILIZATION)
    assert cohort is not None
    step = rig.grower.clock.steps
    entered = cohort.entered
    assert apply(rig.grower, Pause(cohort=cohort.number), step, issuer="test").passed
    assert cohort.entered == entered, "a second pause changes nothing"
    rig.order(Cull(cohort=cohort.number, reason="test"))
    assert not cohort.paused and cohort.state is S.CULLED
    rig.train(5)
    assert rig.grower.kasmina.cohorts == {}


# ----------------------------------------------------------------------------------------------------------------------
# Commands that are refused


def fingerprint(rig: Rig) -> list[Any]:
    """Everything a command could have changed."""
    kasmina = rig.grower.kasmina
    table = {name: value.copy() for name, value in vars(kasmina.table).items() if isinstance(value, np.ndarray)}
    cohorts = {n: {k: copy.deepcopy(v) for k, v in vars(c).items()} for n, c in kasmina.cohorts.items()}
    sites: dict[str, Any] = {}
    for name, site in kasmina.sites.items():
        banks = {
            n: [b.alpha.clone(), b.learning, *(p.detach().clone() for p in b.params.values())]
            for n, b in site.banks.items()
        }
        sites[name] = (banks, set(site.grafted), id(site.capture), site.engaged, site.refused, id(site.annex))
    rest = (rig.grower._params_budget, rig.grower._flops_share, rig.grower.stopped, kasmina._next_cohort)
    return [str(table), str(cohorts), str(sites), str(rest), str(snapshot(rig.model)), len(rig.grower.verdicts)]


def plan(site: str = "fc1-fc2", **fields: Any) -> Germinate:
    return Germinate(seeds=(SeedPlan(site=site, **fields),))


ALWAYS_REFUSED: list[tuple[Command, str]] = [
    (Cull(cohort=99, reason=""), "no active cohort has the number 99; active"),
    (Cancel(cohort=99, reason=""), "no active cohort"),
    (RollBack(cohort=99, reason=""), "no active cohort"),
    (Pause(cohort=99), "no active cohort"),
    (Resume(cohort=99), "no active cohort"),
    (SetStrategy(cohort=99, strategy="fixed_ramp"), "no active cohort"),
    (SetStrategy(cohort=1, strategy="fixed_ramps"), "did you mean 'fixed_ramp'"),
    (SetBudget(params=3), "at least the host's"),
    (SetBudget(flops=0.5), "at least 1"),
    (Germinate(seeds=()), "at least one seed"),
    (plan("fc9-fc2"), "no site is called 'fc9-fc2'; known: fc1-fc2"),
    (plan(blueprint="bottelneck"), "did you mean 'bottleneck'"),
    (plan(blueprint="low_rank"), "sits on"),
    (plan(start="random"), "known: negative_gradient, random_zero, reconstruction"),
    (plan(strategy="jump"), "known: drift_controlled, fixed_ramp"),
    (plan(chunks=(0, 4)), "between 0 and 3, got 4"),
    (plan(chunks=(-1,)), "between 0 and 3, got -1"),
    (plan(chunks=(1, 1)), ""),
    (plan(width=0), "at least 1, got 0"),
    (plan(width=-4), "at least 1, got -4"),
    (plan(width=10_000_000), ""),
]


@pytest.mark.parametrize(("command", "reason"), ALWAYS_REFUSED, ids=lambda v: "" if isinstance(v, str) else repr(v)[:60])
@pytest.mark.parametrize("state", [S.DORMANT, S.TRAINING, S.EVALUATING], ids=lambda s: s.name)
def test_an_impossible_command_is_refused_and_changes_nothing(
    state: Lifecycle, command: Command, reason: str
) -> None:
    rig, _ = hold(state)
    rig.grower.set_budget(1000, None)
    before = fingerprint(rig)
    gate = apply(rig.grower, command, rig.grower.clock.steps, issuer="test")
    assert not gate.passed and reason in gate.reason, gate
    assert rig.refused()[-1].reason == gate.reason and "by test" in rig.refused()[-1].command
    assert fingerprint(rig) == before


@pytest.mark.parametrize("paused", [False, True])
def test_a_cull_that_the_table_does_not_know_is_refused(paused: bool) -> None:
    """GERMINATED leads to TRAINING, CANCELLED or ROLLED_BACK. A pause survives the refusal."""
    rig, cohort = hold(S.GERMINATED)
    assert cohort is not None
    if not paused:
        rig.grower.kasmina.set_paused(cohort, False, rig.grower.clock.steps)
    before = fingerprint(rig)
    gate = apply(rig.grower, Cull(cohort=cohort.number, reason=""), rig.grower.clock.steps, issuer="test")
    assert not gate.passed and "GERMINATED -> CULLED is not a legal transition" in gate.reason
    assert fingerprint(rig) == before and cohort.paused == paused


@pytest.mark.parametrize("state", [S.CULLED, S.CANCELLED], ids=lambda s: s.name)
@pytest.mark.parametrize(
    "command",
    [Cull(cohort=1, reason=""), Cancel(cohort=1, reason=""), RollBack(cohort=1, reason=""), Pause(cohort=1),
     Resume(cohort=1), SetStrategy(cohort=1, strategy="fixed_ramp")],
    ids=lambda c: type(c).__name__,
)  # fmt: skip
def test_an_ended_cohort_takes_no_commands(state: Lifecycle, command: Command) -> None:
    rig, _ = hold(state)
    before = fingerprint(rig)
    assert not apply(rig.grower, command, rig.grower.clock.steps, issuer="test").passed
    assert fingerprint(rig) == before


def test_chunks_with_a_live_seed_are_taken() -> None:
    rig, _ = hold(S.GRAFTING)
    before = fingerprint(rig)
    gate = apply(rig.grower, plan(chunks=(0,)), rig.grower.clock.steps, issuer="test")
    assert not gate.passed and "without a live seed" in gate.reason
    assert fingerprint(rig) == before


@pytest.mark.parametrize(
    "second",
    [
        (SeedPlan(site="fc2-fc3", chunks=(0, 1)), SeedPlan(site="fc2-fc3", chunks=(1, 2))),
        (SeedPlan(site="fc2-fc3", chunks=(0, 1)), SeedPlan(site="fc2-fc3", chunks=(2,))),
        (SeedPlan(site="fc2-fc3", chunks=(0,), width=2), SeedPlan(site="fc2-fc3", chunks=(1,), width=3)),
        (SeedPlan(site="nowhere"),),
        (SeedPlan(site="fc2-fc3", chunks=(77,)),),
    ],
    ids=["overlap", "sizes", "widths", "unknown", "chunk"],
)
def test_a_cohort_is_made_whole_or_not_at_all(second: tuple[SeedPlan, ...]) -> None:
    rig = attach(MLP.build())
    rig.train()
    before = fingerprint(rig)
    command = Germinate(seeds=(SeedPlan(site="fc1-fc2", start="negative_gradient"), *second))
    assert not apply(rig.grower, command, 1, issuer="test").passed
    assert fingerprint(rig) == before


def test_after_a_stop_nothing_germinates_and_what_lives_goes_on() -> None:
    rig, cohort = hold(S.GRAFTING)
    assert cohort is not None
    rig.order(Stop(reason="enough"))
    assert rig.grower.stopped == "enough"
    gate = apply(rig.grower, plan(), rig.grower.clock.steps, issuer="test")
    assert not gate.passed and "growth has stopped: enough" in gate.reason
    assert cohort.state is S.GRAFTING


def test_finish_leaves_permanent_growth_and_nothing_else() -> None:
    for state in (S.GERMINATED, S.TRAINING, S.GRAFTING, S.EVALUATING, S.CULLED):
        rig, cohort = hold(state)
        assert cohort is not None
        rig.grower.finish()
        assert rig.grower.kasmina.cohorts == {} and rig.grower.stopped is not None
        plain = rig.grower.export()
        assert same_bits(plain(rig.batches[0][0]), rig.model(rig.batches[0][0]))


# ----------------------------------------------------------------------------------------------------------------------
# The guard


def test_a_branch_that_turns_non_finite_leaves_at_once() -> None:
    rig, cohort = hold(S.FINE_TUNING)
    assert cohort is not None
    rig.bank(cohort).params["w1"].data[0, 0, 0] = float("nan")
    rig.grower._losses.append(torch.tensor(1.0))
    rig.grower._guard(rig.grower.clock.steps)
    assert [v.state for v in rig.grower.verdicts] == [S.ROLLED_BACK]
    assert_gone(rig, cohort)


def test_a_fading_branch_that_turns_non_finite_leaves_at_once() -> None:
    rig, cohort = hold(S.CULLED)
    assert cohort is not None
    rig.bank(cohort).params["w1"].data[0, 0, 0] = float("nan")
    rig.grower._losses.append(torch.tensor(1.0))
    rig.grower._guard(rig.grower.clock.steps)
    assert_gone(rig, cohort)


def test_a_non_finite_loss_of_the_host_is_said_to_be_the_hosts() -> None:
    rig = attach(Pair(), interval=1)
    loss = rig.backward()
    rig.optimizer.step()
    with pytest.warns(RuntimeWarning, match="it is the host's"):
        rig.grower.step(loss * float("nan"))


# ----------------------------------------------------------------------------------------------------------------------
# A whole life


@pytest.mark.e2e
def test_a_whole_life_through_the_real_gates() -> None:
    torch.manual_seed(1)
    model = Pair(hidden=2)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    rig = attach(
        model, optimizer, batches=rows(20, size=64), held_out=rows(32, seed=7, size=64),
        graft=esper.GraftConfig(ramp_steps=40, stabilize_steps=10, fine_tune_steps=20, warmup_steps=10, lr_boost=2.0),
    )  # fmt: skip
    rig.train(100)
    alone = rig.grower.judge.held_out(4)
    cohort = rig.germinate(start="random_zero", width=24)
    seen = [cohort.state]
    for _ in range(600):
        rig.train()
        if seen[-1] is not cohort.state:
            seen.append(cohort.state)
        if not rig.grower.kasmina.cohorts:
            break
    moves = [(event.source, event.target) for event in rig.events if isinstance(event, Transitioned)]
    way = [S.DORMANT, S.GERMINATED, S.TRAINING, S.GRAFTING, S.STABILIZATION, S.EVALUATING, S.FINE_TUNING, S.FOSSILIZED]
    assert moves == list(zip(way, way[1:], strict=False)), rig.grower.verdicts
    (verdict,) = rig.grower.verdicts
    assert verdict.state is S.FOSSILIZED and verdict.gain > 0 and verdict.gain_low > 0
    assert rig.grower.judge.held_out(4) < alone
    site = rig.grower.kasmina.sites["fc1-fc2"]
    assert site.annex is not None and site.annex.units == 24 and site.banks == {}
    annex = {name: value.detach().clone() for name, value in site.annex.params.items()}
    rig.train(3)
    assert all(not torch.equal(value, annex[name]) for name, value in site.annex.params.items()), "it goes on learning"
    again = rig.germinate(start="random_zero", width=4)
    assert again.state is S.TRAINING, "its chunks are dormant again in the next generation"
    rig.grower.finish()
    plain = rig.grower.export()
    assert isinstance(plain, Pair) and plain.fc1.out_features == 2 + 24
    x = rig.batches[0][0]
    torch.testing.assert_close(plain(x), rig.model(x), rtol=1e-5, atol=1e-6)


# ----------------------------------------------------------------------------------------------------------------------
# Chained spans


def keep(rig: Rig, site: str, width: int) -> None:
    """Make a visible branch at a site permanent, without its gates."""
    kasmina = rig.grower.kasmina
    cohort = rig.germinate(site, width=width)
    step = rig.grower.clock.steps
    kasmina.move(cohort, S.GRAFTING, step)
    kasmina.graft(cohort)
    make_visible(rig.bank(cohort, site))
    kasmina.set_alpha(cohort, 1.0)
    for state in (S.STABILIZATION, S.EVALUATING, S.FINE_TUNING):
        kasmina.move(cohort, state, step)
    x = rig.batches[4][0]
    with torch.no_grad():
        before = rig.model(x)
        kasmina.fossilise(cohort, step, rig.grower.clock.hosts)
        torch.testing.assert_close(rig.model(x), before, rtol=1e-5, atol=1e-6)


ORDERS = [("fc1-fc2", "fc2-fc3"), ("fc2-fc3", "fc1-fc2"), ("fc1-fc2", "fc2-fc3", "fc1-fc2", "fc2-fc3")]


@pytest.mark.integration
@pytest.mark.parametrize("order", ORDERS, ids=lambda o: " ".join(o))
def test_downstream_reads_what_upstream_has_grown(order: tuple[str, ...]) -> None:
    rig = attach(MLP.build())
    rig.train(2)
    for site in order:
        keep(rig, site, 3)
        rig.train(3)
    up, down = (rig.grower.kasmina.sites[name] for name in ("fc1-fc2", "fc2-fc3"))
    assert up.annex is not None and down.annex is not None
    grown = 3 * order.count("fc1-fc2")
    assert up.grown_units == grown and down.annex.reads == 10 + grown == down.reads
    read = down.annex.params["w1"][0, :, 10:]
    assert (read != 0).float().mean() > 0.5, "the grown inputs were to be learnt"
    plain = rig.grower.export()
    assert isinstance(plain, Mlp)
    assert plain.fc1.out_features == plain.fc2.in_features == 10 + grown
    assert plain.fc2.out_features == plain.fc3.in_features == 12 + 3 * order.count("fc2-fc3")
    for x, _ in rows(3, seed=31):
        torch.testing.assert_close(plain(x), rig.model(x), rtol=1e-5, atol=1e-6)
    assert_gradients_agree(plain, rig)


def assert_gradients_agree(plain: nn.Module, rig: Rig) -> None:
    """The host's gradients in the grown model are those of the same weights in the plain one."""
    mse(plain, rig.batches[0]).backward()
    rig.backward()
    host = dict(rig.model.named_parameters())
    for name, p in plain.named_parameters():
        part = p.grad[tuple(slice(0, size) for size in host[name].shape)]  # type: ignore[index]
        torch.testing.assert_close(part, host[name].grad, rtol=1e-4, atol=1e-6)


@pytest.mark.integration
def test_an_upstream_that_grows_while_downstream_captures() -> None:
    rig = attach(MLP.build(), capture=esper.CaptureConfig(batches=6, rows=192))
    rig.train(2)
    waiting = rig.germinate("fc2-fc3", start="negative_gradient")
    rig.train(2)
    keep(rig, "fc1-fc2", 3)
    rig.until(waiting, S.GRAFTING)
    assert rig.bank(waiting).reads == 13
    rig.train(2)
    assert waiting.state is S.GRAFTING


@pytest.mark.integration
def test_a_cohort_on_both_links_becomes_permanent_together() -> None:
    rig = attach(MLP.build())
    rig.train(2)
    cohort = rig.germinate("fc2-fc3", "fc1-fc2")
    kasmina, step = rig.grower.kasmina, rig.grower.clock.steps
    kasmina.move(cohort, S.GRAFTING, step)
    kasmina.graft(cohort)
    kasmina.set_alpha(cohort, 1.0)
    for site in cohort.sites:
        make_visible(rig.bank(cohort, site))
    rig.train(2)
    for state in (S.STABILIZATION, S.EVALUATING, S.FINE_TUNING):
        if cohort.state < state:
            kasmina.move(cohort, state, step)
    x = rig.batches[0][0]
    with torch.no_grad():
        before = rig.model(x)
        kasmina.fossilise(cohort, step, rig.grower.clock.hosts)
        torch.testing.assert_close(rig.model(x), before, rtol=1e-5, atol=1e-6)
    plain = rig.grower.export()
    torch.testing.assert_close(plain(x), rig.model(x), rtol=1e-5, atol=1e-6)


def test_an_export_leaves_the_streams_and_the_grown_model_alone(unchanged_rng: None) -> None:
    state = torch.get_rng_state()
    rig, _ = hold(S.FOSSILIZED)
    before, out = snapshot(rig.model), rig.model(rig.batches[0][0])
    torch.set_rng_state(state)
    rig.grower.export()
    assert_same_state(snapshot(rig.model), before)
    assert same_bits(rig.model(rig.batches[0][0]), out)
