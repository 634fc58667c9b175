"""Commands on stacked hosts: what is refused changes nothing, and says why."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tests.greenhouse.twins import Scripted

from esper.config import EvidenceConfig
from esper.errors import EsperError
from esper.evidence.acceptance import Acceptance, splits_of
from esper.greenhouse.family import HELD_OUT_BATCHES, HostSpec, family_named
from esper.greenhouse.germination import apply
from esper.greenhouse.hosts import Hosts
from esper.greenhouse.observing import observe
from esper.greenhouse.real import RealHost
from esper.greenhouse.stages import finish
from esper.protocol import Cancel, Cull, Germinate, Lifecycle, Pause, SeedPlan, Stop

pytestmark = pytest.mark.component


def host(steps: int = 120, **changed: object) -> Hosts:
    spec = HostSpec(family="teacher", task=0, seed=0, lr=1e-2, steps=steps)
    config = dataclasses.replace(family_named("teacher").config, total_steps=steps, **changed)
    hosts = Hosts([spec], config)
    hosts.advance(20)
    return hosts


def ask(hosts: Hosts, *sites: str, **plan: object) -> str | None:
    given = {"start": "random_zero", "width": 4, **plan}
    return apply(hosts, 0, Germinate(seeds=tuple(SeedPlan(site=site, **given) for site in sites)))


def test_refusals_say_why_and_change_nothing() -> None:
    hosts = host()
    before = hosts.network.values.clone()
    for reason, sites, plan in (
        ("at least one seed", (), {}),
        ("each site once", ("0-2", "0-2"), {}),
        ("at most 96 units", ("0-2",), {"width": 96}),
    ):
        refusal = ask(hosts, *sites, **plan)
        assert refusal is not None and reason in refusal and hosts.lives[0].refused[-1] == refusal
    refusal = apply(hosts, 0, Cull(cohort=7, reason="test"))
    assert refusal is not None and "no active cohort has the number 7" in refusal
    assert not hosts.lives[0].cohorts and torch.equal(hosts.network.values, before)
    assert ask(hosts, "0-2") is None
    refusal = ask(hosts, "0-2")
    assert refusal is not None and "has a seed or rests" in refusal


def test_what_still_captures_can_be_withdrawn_and_not_culled() -> None:
    hosts = host()
    assert ask(hosts, "2-4", start="tiny") is None
    refusal = apply(hosts, 0, Cull(cohort=1, reason="test"))
    assert refusal is not None and "GERMINATED -> CULLED is not a legal transition" in refusal
    assert hosts.lives[0].cohorts[1].state is Lifecycle.GERMINATED and not hosts.lives[0].verdicts
    assert apply(hosts, 0, Cancel(cohort=1, reason="test")) is None
    assert [verdict.state for verdict in hosts.lives[0].verdicts] == [Lifecycle.CANCELLED]


def test_what_stacks_do_not_know_raises() -> None:
    hosts = host()
    for match, plan in (
        ("known: 0-2, 2-4", {"site": "9-11"}),
        ("the blueprint bottleneck", {"site": "0-2", "blueprint": "low_rank"}),
        ("the start negative_gradient, random_zero, tiny, got 'gradmax'", {"site": "0-2", "start": "gradmax"}),
        ("the strategy fixed_ramp", {"site": "0-2", "strategy": "drift_controlled"}),
        ("a whole site", {"site": "0-2", "seeds": 2}),
        ("at least 1, got 0", {"site": "0-2", "width": 0}),
    ):
        with pytest.raises(EsperError, match=match):
            apply(hosts, 0, Germinate(seeds=(SeedPlan(**plan),)))
    with pytest.raises(EsperError, match="got Pause"):
        apply(hosts, 0, Pause(cohort=1))


@pytest.mark.parametrize(
    ("asked", "named", "start", "units"),
    [
        (2, "tiny", "tiny", 2), (3, "tiny", "tiny", 3), (13, "tiny", "tiny", 3), (None, "tiny", "tiny", 3),
        (13, "negative_gradient", "negative_gradient", 13), (13, None, "random_zero", 13),
        (None, None, "random_zero", 8),
    ],
)  # fmt: skip
def test_seeds_have_the_start_and_size_that_a_grower_gives_them(
    asked: int | None, named: str | None, start: str, units: int
) -> None:
    """Three outputs: tiny makes at most three units."""
    spec = HostSpec(family="teacher", task=0, seed=0, lr=1e-2, steps=40, widths=(6, 8))
    config = dataclasses.replace(family_named("teacher").config, total_steps=40)
    hosts = Hosts([spec], config)
    hosts.advance(20)
    command = Germinate(seeds=(SeedPlan(site="2-4", width=asked, start=named),))
    assert apply(hosts, 0, command) is None
    seed = hosts.lives[0].cohorts[1].seeds[1]
    assert (seed.start, seed.units) == (start, units) and (1 in hosts.lives[0].captures) == (start != "random_zero")
    real = RealHost(spec, Scripted(lambda seen: [command] if seen.step == 20 else []), config)
    while not real.grower.kasmina.cohorts:
        real.step()
    (cohort,) = real.grower.kasmina.cohorts.values()
    bank = real.grower.kasmina.sites["2-4"].banks[1]
    assert (cohort.members["2-4"].start, bank.units, bank.num_params) == (start, units, seed.params)


def test_a_start_of_the_configuration_is_taken_where_a_plan_names_none() -> None:
    config = family_named("teacher").config
    for start in ("random_zero", "tiny", "negative_gradient"):
        hosts = host(fit=dataclasses.replace(config.fit, start=start))
        assert ask(hosts, "2-4", start=None, width=40) is None
        seed = hosts.lives[0].cohorts[1].seeds[1]
        assert (seed.start, seed.units) == (start, 3 if start == "tiny" else 40)  # tiny: as many as there are outputs


def test_the_first_layer_is_bounded_by_what_its_units_read_as_well() -> None:
    """Spirals have two inputs: with the bias three directions, whatever the next layer's width."""
    hosts = Hosts([HostSpec(family="spirals", task=0, seed=0, lr=1e-2, widths=(12, 12))])
    hosts.advance(20)
    assert ask(hosts, "0-2", "2-4", start="tiny", width=9) is None
    assert [seed.units for seed in hosts.lives[0].cohorts[1].seeds.values()] == [3, 4]
    assert apply(hosts, 0, Cancel(cohort=1, reason="test")) is None
    assert hosts.lives[0].embargo[0] > hosts.step_count and not hosts.lives[0].captures


def test_a_stop_is_for_good_and_a_site_rests_after_a_cull() -> None:
    hosts = host()
    assert ask(hosts, "0-2", width=None) is None
    hosts.advance(20)
    assert apply(hosts, 0, Cull(cohort=1, reason="test")) is None
    hosts.advance(20)
    life = hosts.lives[0]
    assert life.verdicts[-1].state is Lifecycle.CULLED and not life.cohorts and life.embargo[0] > hosts.step_count
    assert observe(hosts, 0).eligible.tolist() == [False, True]
    refusal = ask(hosts, "0-2")
    assert refusal is not None and "rests" in refusal
    assert ask(hosts, "2-4") is None
    assert apply(hosts, 0, Cancel(cohort=2, reason="test")) is None  # captures nothing yet: gone at once
    assert life.verdicts[-1].state is Lifecycle.CANCELLED and not life.cohorts
    assert apply(hosts, 0, Stop(reason="enough")) is None and life.stopped == "enough"
    refusal = ask(hosts, "2-4")
    assert refusal is not None and "growth has stopped: enough" in refusal


def test_a_capture_or_a_ramp_out_of_time_ends() -> None:
    config = family_named("teacher").config
    hosts = host(capture=dataclasses.replace(config.capture, batches=50, timeout=10))
    assert ask(hosts, "0-2", start="negative_gradient") is None
    hosts.advance(20)
    assert [v.state for v in hosts.lives[0].verdicts] == [Lifecycle.CANCELLED]
    hosts = host(graft=dataclasses.replace(config.graft, ramp_steps=10, stabilize_steps=1000, timeout=30))
    assert ask(hosts, "0-2") is None
    hosts.advance(60)
    assert hosts.lives[0].verdicts[-1].reason == "out of time: stability"


def test_a_fit_that_costs_too_much_is_left_out_and_the_branch_starts_from_zero() -> None:
    config = family_named("teacher").config
    hosts = host(fit=dataclasses.replace(config.fit, max_share=1e-6))
    assert ask(hosts, "0-2", start="negative_gradient") is None
    hosts.advance(20)
    cohort = hosts.lives[0].cohorts[1]
    assert hosts.lives[0].ledger.spent["fit"] == 0 and cohort.seeds[0].preserves_function and cohort.alpha == 1.0
    hosts = host(fit=dataclasses.replace(config.fit, max_share=None, steps=12))
    assert ask(hosts, "0-2", start="negative_gradient") is None
    hosts.advance(20)
    assert hosts.lives[0].ledger.spent["fit"] > 0
    seen = observe(hosts, 0)
    assert seen.fit_explained is not None and seen.fit_explained[0] == hosts.lives[0].cohorts[1].seeds[0].explained


@pytest.mark.parametrize("start", ["tiny", "negative_gradient"])
def test_a_seed_whose_captures_hold_nothing_is_culled(start: str) -> None:
    hosts = host(fit=dataclasses.replace(family_named("teacher").config.fit, max_share=None, steps=12))
    assert ask(hosts, "0-2", start=start) is None
    while len(hosts.lives[0].captures[0].g) < hosts.config.capture.batches - 1:
        hosts.advance(1)
    for g in hosts.lives[0].captures[0].g:
        g.fill_(float("nan"))
    hosts.advance(2)
    (verdict,) = hosts.lives[0].verdicts
    assert verdict.state is Lifecycle.CULLED and verdict.reason == "sanity: no captured batch can be used"


def test_without_judgement_everything_stays() -> None:
    hosts = host(evidence=EvidenceConfig(control="plain", accept="always"))
    assert ask(hosts, "0-2", "2-4") is None
    hosts.advance(100)
    finish(hosts)
    assert hosts.lives[0].grown == [4, 4] and hosts.lives[0].verdicts[-1].state is Lifecycle.FOSSILIZED


def test_at_the_end_an_accepted_cohort_stays_if_it_holds() -> None:
    config = family_named("teacher").config
    always = EvidenceConfig(control="plain", accept="always")
    hosts = host(evidence=always, graft=dataclasses.replace(config.graft, fine_tune_steps=1000))
    assert ask(hosts, "0-2") is None
    hosts.advance(100)
    assert hosts.lives[0].cohorts[1].state is Lifecycle.FINE_TUNING
    finish(hosts)
    assert hosts.lives[0].grown == [4, 0] and not hosts.lives[0].cohorts


def test_a_copy_of_the_evidence_goes_its_own_way() -> None:
    import copy

    config = family_named("teacher").config
    evidence = Acceptance(splits_of(config.evidence, HELD_OUT_BATCHES, 0), config.evidence)
    evidence.evaluate(1, lambda indices: [0.01 * (1 + i % 3) for i in indices], [0.02] * 6, further=True)
    twin = copy.deepcopy(evidence)
    looks = [e.evaluate(2, lambda indices: [0.02] * len(indices), [0.02] * 6, further=False) for e in (evidence, twin)]
    assert looks[0].result == looks[1].result and looks[0].gate == looks[1].gate
    twin.forget(2)
    assert twin.splits is evidence.splits and twin.fdr is not evidence.fdr
