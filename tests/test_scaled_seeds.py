"""What a plan may say beyond form and size: scales that are honoured all the way down, and the name of a design."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.rigs import attach
from torch import nn

import esper
from esper.errors import EsperError
from esper.kasmina.bank import Bank
from esper.kasmina.blueprints import BLUEPRINTS
from esper.kasmina.family import host_family
from esper.kasmina.geometry import Activation, Geometry
from esper.kasmina.germination import offers
from esper.kasmina.optim import Hyperparameters, SlotAdamW
from esper.kasmina.starts import STARTS
from esper.protocol import Attached, Germinate, Germinated, Lifecycle, SeedPlan, SiteKind

pytestmark = pytest.mark.component

GEOMETRY = Geometry(
    kind=SiteKind.LINEAR_SPAN, in_features=5, out_features=4, hidden_features=6, head_bias=True,
    activation=Activation("relu"), head_std=0.4, tail_std=0.3,
)  # fmt: skip


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4))


def bank(**scales: float) -> Bank:
    return Bank(
        "bottleneck", GEOMETRY, units=3, reads=5, columns=None, generator=torch.Generator().manual_seed(0),
        device=torch.device("cpu"), **scales,
    )  # fmt: skip


def test_scale_multiplies_what_units_read_by_and_nothing_else() -> None:
    plain, scaled = bank(), bank(scale=3.0)
    assert torch.equal(scaled.params["w1"], 3.0 * plain.params["w1"])
    assert torch.equal(scaled.params["b1"], plain.params["b1"]) and torch.equal(
        scaled.params["w2"], plain.params["w2"]
    )  # fmt: skip


@pytest.mark.parametrize("rule", ["adamw", "adam", "sgd"])
def test_lr_scale_multiplies_the_step(rule: str) -> None:
    steps: list[torch.Tensor] = []
    for scale in (1.0, 0.25):
        one = bank(lr_scale=scale)
        one.set_learning(True)
        before = one.params["w1"].detach().clone()
        for value in one.params.values():
            value.grad = torch.ones_like(value)
        host = Hyperparameters(rule, 0.01, 0.0, peak_lr=0.01)
        SlotAdamW(lr_boost=2.0, lr_ceiling=1.0, warmup_steps=1).step(one, host)
        steps.append(one.params["w1"].detach() - before)
    torch.testing.assert_close(steps[1], 0.25 * steps[0])


def test_both_reach_the_bank_and_the_event() -> None:
    rig = attach(mlp())
    cohort = rig.germinate(scale=2.0, lr_scale=0.5, design="abc")
    assert rig.bank(cohort).lr_scale == 0.5 and cohort.members["0-2"].scale == 2.0
    (event,) = [e for e in rig.events if isinstance(e, Germinated)]
    assert (event.scales, event.lr_scales, event.designs) == ((2.0,), (0.5,), ("abc",))
    assert event.params == (rig.bank(cohort).num_params,) and event.model_params == 82
    assert event.added_flops_share == cohort.added_flops_share > 0
    same = attach(mlp())
    twin = same.germinate()
    assert torch.equal(rig.bank(cohort).params["w1"], 2.0 * same.bank(twin).params["w1"])


def test_what_is_permanent_learns_with_its_neighbours() -> None:
    rig = attach(mlp(), evidence=esper.EvidenceConfig(accept="always"))
    cohort = rig.germinate(lr_scale=0.5)
    rig.until(cohort, Lifecycle.FOSSILIZED)
    annex = rig.grower.kasmina.sites["0-2"].annex
    assert annex is not None and annex.lr_scale == 1.0


def test_both_survive_a_saved_state() -> None:
    """Trained on from there, the loaded run is the saved one to the last bit."""
    rig, other = attach(mlp()), attach(mlp())
    cohort = rig.germinate(scale=2.0, lr_scale=0.5, design="abc")
    rig.until(cohort, Lifecycle.GRAFTING)
    rig.train(2)
    other.grower.load_state_dict(rig.grower.state_dict())
    other.turn = rig.turn
    again = other.grower.kasmina.cohorts[cohort.number]
    assert other.bank(again).lr_scale == 0.5
    assert (again.members["0-2"].scale, again.members["0-2"].design) == (2.0, "abc")
    for one in (rig, other):
        one.train(5)
    assert all(torch.equal(v, other.bank(again).params[n]) for n, v in rig.bank(cohort).params.items())


def test_a_state_from_before_there_were_scales_is_read() -> None:
    state = bank().state()
    del state["lr_scale"]
    assert Bank.of(state, GEOMETRY, torch.device("cpu")).lr_scale == 1.0


@pytest.mark.parametrize(
    ("plan", "told"),
    [
        ({"scale": 0.0}, "a plan's scale must be positive and finite, got 0.0"),
        ({"lr_scale": float("inf")}, "a plan's lr_scale must be positive and finite, got inf"),
        ({"scale": 2.0, "start": "tiny"}, "multiplies random first weights, got 2.0 for the start 'tiny'"),
        ({"scale": 2.0, "start": "copy"}, "use 'random_zero'"),
    ],
)
def test_scales_that_would_do_nothing_are_refused(plan: dict[str, Any], told: str) -> None:
    rig = attach(mlp())
    rig.order(Germinate(seeds=(SeedPlan(site="0-2", **{"start": "random_zero", **plan}),)))
    assert told in rig.refused()[-1].reason and not rig.grower.kasmina.cohorts


def test_a_form_without_units_has_nothing_to_scale() -> None:
    rig = attach(mlp(), sites=esper.SitesConfig(layers=True))
    plan = SeedPlan(site="2", blueprint="affine", start="random_zero", scale=2.0)
    rig.order(Germinate(seeds=(plan,)))
    assert "got 2.0 for 'affine' on '2', which has none" in rig.refused()[-1].reason


def test_seeds_of_one_bank_share_their_scales() -> None:
    rig = attach(mlp())
    plans = [SeedPlan(site="0-2", chunks=(c,), width=1, start="random_zero", lr_scale=1.0 + c) for c in range(2)]
    rig.order(Germinate(seeds=tuple(plans)))
    assert "must share blueprint, width, start, scales" in rig.refused()[-1].reason


@pytest.mark.parametrize("start", [name for name in STARTS.names if STARTS[name].keeps_draw])
def test_starts_that_keep_the_draw_do_depend_on_it(start: str) -> None:
    found: list[torch.Tensor] = []
    fit = esper.FitConfig(steps=10, batch_rows=32, min_t=-1e9, reconstruction_threshold=1e9)
    for scale in (1.0, 4.0):
        rig = attach(mlp(), fit=fit)
        cohort = rig.germinate(start=start, scale=scale)
        rig.until(cohort, Lifecycle.GRAFTING)
        found.append(rig.bank(cohort).params["w1"].detach())
    assert float((found[0] - found[1]).abs().max()) > 0.01


# ----------------------------------------------------------------------------------------------------------------------
# What a controller is told of a site and its host


def test_offers_are_what_a_germination_takes() -> None:
    """Every pair that is offered is taken, and every other one on this kind of site is refused."""
    rig = attach(mlp(), sites=esper.SitesConfig(layers=True))
    for site in rig.grower.kasmina.sites.values():
        offered = offers(site)
        assert offered and len(set(offered)) == len(offered)
        for blueprint in BLUEPRINTS:
            for start in set(STARTS.names) - {"gradient_svd"}:
                plan = SeedPlan(site=site.info.name, blueprint=blueprint, start=start, width=2)
                try:
                    rig.grower.kasmina.nursery._resolve(plan, 0)
                    taken = True
                except EsperError:
                    taken = False
                assert taken == ((blueprint, start) in offered), (blueprint, start)


def test_an_observation_says_what_may_sit_where_and_what_host_it_is() -> None:
    seen: list[Any] = []

    class Looks:
        def decide(self, observation: Any) -> tuple[()]:
            seen.append(observation)
            return ()

        def state(self) -> dict[str, Any]:
            return {}

        def load(self, state: dict[str, Any]) -> None:
            pass

    rig = attach(mlp(), controller=Looks())
    rig.train(5)
    observation = seen[0]
    assert observation.kinds == ("linear_span",) and ("bottleneck", "tiny") in observation.offers[0]
    assert (observation.family, observation.optimizer) == ("mlp", "adaptive")
    (event,) = [e for e in rig.events if isinstance(e, Attached)]
    assert (event.family, event.optimizer) == ("mlp", "adaptive")
    model = mlp()
    (plain,) = [
        e for e in attach(model, torch.optim.SGD(model.parameters(), 0.1)).events if isinstance(e, Attached)
    ]  # fmt: skip
    assert plain.optimizer == "sgd"


@pytest.mark.parametrize(
    ("model", "family"),
    [
        (nn.Sequential(nn.Linear(2, 2)), "mlp"),
        (nn.Sequential(nn.Conv1d(2, 2, 1), nn.Linear(2, 2)), "conv"),
        (nn.Sequential(nn.Embedding(2, 2), nn.Linear(2, 2)), "transformer"),
        (nn.Sequential(nn.Conv2d(2, 2, 1), nn.MultiheadAttention(2, 1)), "transformer"),
        (nn.Sequential(nn.Embedding(2, 2), nn.GRU(2, 2)), "recurrent"),
    ],
)
def test_families_of_hosts(model: nn.Module, family: str) -> None:
    assert host_family(model) == family
