"""What is refused, and that a refusal changes nothing; what the guard takes out."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from tests.models import MLP, Pair, same_bits, snapshot
from tests.rigs import Rig, assert_gone, attach, guard, hold

import esper
from esper.commands import apply
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
)

pytestmark = pytest.mark.integration

S = Lifecycle


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
    rest = (rig.grower.accounts.budget, rig.grower.stopped, kasmina.nursery.next_cohort)
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
    (plan("fc9-fc2"), "no site is called 'fc9-fc2'; did you mean 'fc1-fc2'? known: fc1-fc2"),
    (plan(blueprint="bottelneck"), "did you mean 'bottleneck'"),
    (plan(blueprint="low_rank"), "sits on"),
    (plan(start="random"), "known: copy, gradient_svd, gradmax, negative_gradient, random_zero, reconstruction, tiny"),
    (plan(strategy="jump"), "known: drift_controlled, fixed_ramp"),
    (plan(chunks=(0, 4)), "between 0 and 3, got 4"),
    (plan(chunks=(-1,)), "between 0 and 3, got -1"),
    (plan(chunks=(1, 1)), ""),
    (plan(width=0), "at least 1, got 0"),
    (plan(width=-4), "at least 1, got -4"),
    (plan(width=10_000_000), ""),
]


@pytest.mark.parametrize(
    ("command", "reason"), ALWAYS_REFUSED, ids=lambda v: "" if isinstance(v, str) else repr(v)[:60]
)
@pytest.mark.parametrize("state", [S.DORMANT, S.TRAINING, S.EVALUATING], ids=lambda s: s.name)
def test_an_impossible_command_is_refused_and_changes_nothing(state: Lifecycle, command: Command, reason: str) -> None:
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
        tuple(SeedPlan(site="fc2-fc3", chunks=(n,), width=2 + n, start="random_zero") for n in (0, 1)),
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
    rig.grower.loop.losses.append(torch.tensor(1.0))
    guard(rig.grower)
    assert [v.state for v in rig.grower.verdicts] == [S.ROLLED_BACK]
    assert_gone(rig, cohort)


def test_a_fading_branch_that_turns_non_finite_leaves_at_once() -> None:
    rig, cohort = hold(S.CULLED)
    assert cohort is not None
    rig.bank(cohort).params["w1"].data[0, 0, 0] = float("nan")
    rig.grower.loop.losses.append(torch.tensor(1.0))
    guard(rig.grower)
    assert_gone(rig, cohort)


def test_a_non_finite_loss_of_the_host_is_said_to_be_the_hosts() -> None:
    rig = attach(Pair(), interval=1)
    loss = rig.backward()
    rig.optimizer.step()
    with pytest.warns(RuntimeWarning, match="it is the host's"):
        rig.grower.step(loss * float("nan"))


def test_seeds_of_one_cohort_on_one_site_cover_equally_many_features() -> None:
    """Four outputs in three chunks: one chunk has two."""
    rig = attach(Pair(), sites=esper.SitesConfig(chunks=3))
    seeds = tuple(SeedPlan(site="fc1-fc2", chunks=(chunk,), start="random_zero") for chunk in range(3))
    gate = apply(rig.grower, Germinate(seeds=seeds), 0, issuer="test")
    assert not gate.passed and "must cover equally many features" in gate.reason
    assert not rig.grower.kasmina.cohorts and rig.grower.kasmina.live_banks == []
