"""What each of the eleven states adds to the forward pass, who learns in it, and how a cohort gets out."""

from __future__ import annotations

import pytest
import torch
from tests.models import Pair, rows, same_bits, snapshot
from tests.rigs import ALPHA, PATH, QUICK, Rig, assert_gone, attach, delta, hold, host_of, make_visible
from tests.seed_tables import states
from torch import Tensor

import esper
from esper.commands import apply
from esper.decision import look
from esper.kasmina.lifecycle import TABLE
from esper.kasmina.strategies import STRATEGIES
from esper.protocol import (
    Cancel,
    Cull,
    Germinate,
    Lifecycle,
    Pause,
    Resume,
    RollBack,
    SeedPlan,
)

pytestmark = pytest.mark.integration

S = Lifecycle


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
                with torch.enable_grad():
                    last = rig.model(x).grad_fn
                assert last is not None and last.name() == "AddmmBackward0", "nothing was to follow the host's layer"
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


@pytest.mark.parametrize("state", list(Lifecycle), ids=lambda s: s.name)
def test_the_table_of_seeds_says_the_same(state: Lifecycle) -> None:
    rig, cohort = hold(state)
    table = rig.grower.kasmina.table
    codes = set(states(table, 0)[:, 0].tolist())
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
    fit = esper.FitConfig(steps=10, batch_rows=32, min_t=-1e9, unproven="cull")
    rig = attach(Pair(), capture=esper.CaptureConfig(batches=2, rows=64, max_age=10), fit=fit)
    cohort = rig.germinate(start="negative_gradient")
    rig.order(Pause(cohort=cohort.number))
    rig.train(20)  # the rows are complete now, and grow old
    rig.order(Resume(cohort=cohort.number))
    rig.train()
    (verdict,) = rig.grower.verdicts
    assert verdict.state is S.CULLED and "age of the captures" in verdict.reason


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


@pytest.mark.parametrize("strategy", list(STRATEGIES))
def test_a_pause_holds_alpha_and_timers_and_a_resume_goes_on(strategy: str) -> None:
    graft = esper.GraftConfig(
        ramp_steps=10,
        timeout=40,
        warmup_steps=1,
        embargo=20,
        pause_duration=0,  # the strategies' own pauses are off
    )
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
    (view,) = look(rig.grower, rig.grower.clock.steps).alive
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
