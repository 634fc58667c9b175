"""What a controller sees equals what a slow look at every seed and chunk finds."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.models import Pair
from tests.rigs import QUICK, Idle, Rig, attach
from torch import Tensor, nn

import esper
from esper.decision import look, recent_losses
from esper.kasmina.blueprints import BLUEPRINTS
from esper.kasmina.defaults import default_blueprint
from esper.observation import NUM_PRESSING, observe
from esper.protocol import SITE_FEATURES, Germinate, Lifecycle, Observation, SeedPlan
from esper.tamiyo import make_controller
from esper.tamiyo.actions import Operation, Scope, commands, draw, masks
from esper.verdicts import Verdicts

pytestmark = pytest.mark.component

SITES, CHUNKS = 5, 32
COLUMN = {name: index for index, name in enumerate(SITE_FEATURES)}


class Spans(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(2, 3) for _ in range(SITES))
        self.tails = nn.ModuleList(nn.Linear(3, CHUNKS) for _ in range(SITES))

    def forward(self, x: Tensor) -> Tensor:
        pairs = zip(self.heads, self.tails, strict=True)
        return torch.stack([tail(torch.tanh(head(x))).mean() for head, tail in pairs]).sum()


def _loss(model: nn.Module, batch: Tensor) -> Tensor:
    return (model(batch) - 1).square()


@pytest.fixture(scope="module")
def grower() -> esper.Grower:
    torch.manual_seed(0)
    model = Spans()
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    held_out = [torch.randn(4, 2) for _ in range(16)]
    grower = esper.Grower(
        model, optimizer, loss=_loss, evaluate=held_out, config=esper.Config(**QUICK), controller=Idle()
    )
    loss = _loss(model, held_out[0])
    loss.backward()
    optimizer.step()
    grower.step(loss)
    return grower


def _look(grower: esper.Grower, step: int) -> Observation:
    return observe(
        grower.kasmina, step=step, total_steps=None, held_out=1.0, held_out_initial=2.0, host_flops=1e6,
        budget_params=None, budget_flops=None, verdicts=Verdicts(), stopped=None,
    )  # fmt: skip


def _naive(grower: esper.Grower, step: int) -> dict[str, Any]:
    """One chunk at a time."""
    kasmina, table = grower.kasmina, grower.kasmina.table
    found: dict[str, Any] = {"eligible": [], "free": [], "energy": [], "pressing": []}
    for number, site in enumerate(kasmina.sites.values()):
        energy = site.telemetry.gradient_energy.tolist()  # type: ignore[union-attr]
        free = live = 0
        for chunk in range(CHUNKS):
            row = number * CHUNKS + chunk
            owner = int(table.owner[row])
            free += owner < 0 and int(table.embargo_until[row]) <= step
            live += owner >= 0 and int(table.seed_id[owner]) >= 0
            if math.isfinite(energy[chunk]):
                found["pressing"].append((-energy[chunk], number, chunk))
        found["eligible"].append(free == CHUNKS and not live)
        found["free"].append(free / CHUNKS)
        found["energy"].append(sum(energy) / CHUNKS)
    found["pressing"] = sorted(found["pressing"])[:NUM_PRESSING]
    return found


ENERGY = st.sampled_from([0.0, 0.5, 0.5, 2.0, float("nan")]) | st.floats(0, 4, width=32)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_observation_and_decision_equal_a_look_at_every_chunk(grower: esper.Grower, data: st.DataObject) -> None:
    kasmina, table, step = grower.kasmina, grower.kasmina.table, 100
    names = list(kasmina.sites)
    table.embargo_until[:] = 0
    kasmina.refresh()  # what was written into the table is a change
    for site in kasmina.sites.values():
        values = data.draw(st.lists(ENERGY, min_size=CHUNKS, max_size=CHUNKS))
        site.telemetry.gradient_energy.copy_(torch.tensor(values))  # type: ignore[union-attr]
    resting = data.draw(
        st.lists(st.tuples(st.integers(0, SITES * CHUNKS - 1), st.sampled_from([100, 101])), max_size=3)
    )
    for row, until in resting:
        table.embargo_until[row] = until
    wanted = data.draw(st.lists(st.integers(0, SITES - 1), max_size=3, unique=True))
    cohorts = []
    for number in wanted:
        plan = SeedPlan(site=names[number], seeds=data.draw(st.integers(1, CHUNKS)), width=1, start="random_zero")
        made = kasmina.germinate([plan], step=200, host_flops=1.0, budget_params=None, budget_flops=None)
        cohorts.append(made)
    seen, naive = _look(grower, step), _naive(grower, step)
    assert seen.eligible.tolist() == naive["eligible"]
    assert seen.sites[:, COLUMN["free_chunk_share"]].tolist() == naive["free"]
    assert np.allclose(seen.sites[:, COLUMN["gradient_energy"]], naive["energy"], rtol=1e-5, equal_nan=True)
    pressing = zip(-seen.chunk_pressure, seen.chunk_site, seen.chunk_index, strict=True)
    assert [tuple(entry) for entry in pressing] == naive["pressing"]
    assert [view.num_seeds for view in seen.alive] == [len(cohort.slots) for cohort in cohorts]
    config = esper.TamiyoConfig(first=0, seeds_per_site=3)
    commands = make_controller("heuristic", config).decide(seen)
    chosen = [name for name, free in zip(names, naive["eligible"], strict=True) if free]
    if cohorts or not chosen:
        assert commands == ()
    else:
        (command,) = commands
        assert isinstance(command, Germinate) and [plan.site for plan in command.seeds] == chosen
        assert all((plan.seeds, plan.width, plan.keep) == (3, 1, None) for plan in command.seeds)
    for cohort in cohorts:
        grower.stages.expel(cohort, 200, "test")


# ----------------------------------------------------------------------------------------------------------------------
# What learned controllers read besides


def _with_layers() -> Rig:
    return attach(Pair(), sites=esper.SitesConfig(layers=True))


def test_other_blueprints_and_what_a_unit_of_them_costs() -> None:
    rig = _with_layers()
    rig.train(1)
    kasmina = rig.grower.kasmina
    seen = look(rig.grower, 1)
    assert "affine" in seen.alternatives and seen.alternative_params is not None and seen.alternative_flops is not None
    for row, site in enumerate(kasmina.sites.values()):
        for column, name in enumerate(seen.alternatives):
            blueprint, kind = BLUEPRINTS[name], site.info.kind
            stated = seen.alternative_params[row, column], seen.alternative_flops[row, column]
            if kind not in blueprint.kinds or name == default_blueprint(kind) or blueprint.refusal(site.geometry):
                assert np.isnan(stated).all()
                continue
            cost = blueprint.cost(site.geometry, units=1, columns=site.info.out_features, reads=site.reads)
            rows = kasmina.rows_per_step[site.info.name]
            assert stated == (cost.params, cost.flops_per_row * rows)


def test_losses_learning_rate_and_price() -> None:
    rig = attach(Pair())
    schedule = torch.optim.lr_scheduler.LambdaLR(rig.optimizer, lambda step: 0.5**step)
    rig.train(1)
    schedule.step()
    rig.train(1)
    seen = look(rig.grower, 2)
    losses = [float(loss) for loss in rig.grower.loop.losses]
    assert seen.train_loss == pytest.approx(np.mean(losses))
    assert seen.loss_noise == pytest.approx(np.std(losses, ddof=1) / np.mean(losses))
    assert seen.lr_share == pytest.approx(0.5)
    assert seen.price == rig.grower.config.tamiyo.min_gain_per_cost
    assert all(math.isnan(value) for value in recent_losses([]))
    assert math.isnan(recent_losses([torch.tensor(2.0)])[1])


def test_what_a_fit_has_explained_is_told_as_long_as_its_seeds_live() -> None:
    rig = attach(Pair())
    cohort = rig.germinate("fc1-fc2", start="negative_gradient")
    rig.until(cohort, Lifecycle.GRAFTING)
    report = cohort.members["fc1-fc2"].report
    seen = look(rig.grower, rig.grower.clock.steps)
    assert seen.fit_explained is not None and seen.fit_error is not None
    assert seen.fit_explained[0] == report.explained
    assert seen.fit_error[0] == pytest.approx(abs(report.explained / report.t_statistic))
    rig.grower.stages.expel(cohort, rig.grower.clock.steps, "test")
    gone = look(rig.grower, rig.grower.clock.steps).fit_explained
    assert gone is not None and np.isnan(gone).all()


@pytest.mark.parametrize("number", range(3))
def test_what_is_drawn_within_the_masks_is_not_refused(number: int) -> None:
    """The masks know no blueprint; the gates do."""
    rng = np.random.default_rng(number)
    rig = attach(
        Pair(), sites=esper.SitesConfig(layers=True), budget=esper.BudgetConfig(params=int(rng.integers(400, 1000)))
    )  # fmt: skip
    rig.train(1)
    scope = Scope(operations=("wait", "germinate", "cull"), most_on_trial=None)
    kinds: set[str] = set()
    for _ in range(40):
        rig.train(1)
        seen = look(rig.grower, rig.grower.clock.steps)
        action = draw(masks(seen, scope), rng)
        kinds.add(Operation(action.operation).name)
        for command in commands(action, seen):
            rig.grower.submit(command)
        rig.train(1)
    assert kinds == {"WAIT", "GERMINATE", "CULL"}
    assert [event.reason for event in rig.refused()] == []
