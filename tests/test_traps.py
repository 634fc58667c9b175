"""Traps of PyTorch: in-place edits, unexpected calls of modules, transforms, compilation, misplaced steps."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from tests.models import Batch, Mlp, Pair, Transformer, mse, rows, same_bits, tokens
from tests.rigs import EVERY, attach, branch_gradients, graft, host_gradients
from torch import Tensor, nn

import esper
from esper.protocol import Lifecycle, Warned

pytestmark = pytest.mark.integration

S = Lifecycle


# ----------------------------------------------------------------------------------------------------------------------
# In-place edits


class InPlace(nn.Module):
    """Activations that overwrite what the sites return, as ``nn.ReLU(inplace=True)`` does."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(8, 6), nn.Linear(6, 12), nn.Linear(12, 4)
        self.edit_input = False

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.fc1(x), inplace=True)
        if self.edit_input:
            x.mul_(2)
        return self.fc3(F.relu_(self.fc2(h)))


@pytest.mark.parametrize("grafted", [False, True], ids=["capturing", "grafted"])
def test_an_in_place_activation_after_a_site(grafted: bool) -> None:
    rig = attach(InPlace(), sites=esper.SitesConfig(layers=True))
    if grafted:
        graft(rig, "fc1-fc2")
        assert rig.grower.kasmina.sites["fc1-fc2"].adds
    else:
        rig.germinate("fc1-fc2", start="negative_gradient")
        rig.train(3)
        capture = rig.grower.kasmina.sites["fc1-fc2"].capture
        assert capture is not None
        kept = capture.rows()
        assert (kept.y < 0).any(), "y was to be copied before the activation overwrote it"
        assert (kept.g[kept.y < 0] == 0).all() and (kept.g[kept.y > 0] != 0).any()
    rig.train(3)
    assert all(site.refused is None for site in rig.grower.kasmina.sites.values())


def test_an_input_that_is_edited_inside_a_span_makes_it_unusable_not_wrong() -> None:
    rig = attach(InPlace())
    model = rig.model
    assert isinstance(model, InPlace)
    model.edit_input = True
    alone = InPlace()
    alone.load_state_dict(model.state_dict())
    with torch.no_grad():
        x = torch.randn(3, 8)
        assert same_bits(model(x.clone()), alone(x))
    refused = rig.grower.kasmina.sites["fc1-fc2"].refused
    assert refused is not None and "edited in place" in refused


def test_an_input_edited_under_a_grafted_span_is_an_error() -> None:
    rig = attach(InPlace())
    graft(rig, "fc1-fc2")
    rig.model.edit_input = True  # type: ignore[assignment]
    with torch.no_grad(), pytest.raises(esper.SiteError, match=r"must run as it did.*edited in place.*undo the change"):
        rig.model(torch.randn(3, 8))


# ----------------------------------------------------------------------------------------------------------------------
# Modules that do not run as expected


def test_attention_projections_are_left_out_with_a_reason() -> None:
    rig = attach(Transformer(), batches=tokens(10), held_out=tokens(16))
    reasons = {skipped.name: skipped.reason for skipped in rig.grower.discovery.skipped}
    assert "inner workings are not known" in reasons["attention.0.out_proj"]
    assert all("out_proj" not in info.name for info in rig.grower.sites())


class Detour(nn.Module):
    """Can run its layers in ways in which the probe has not seen them."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.way = "straight"

    def forward(self, x: Tensor) -> Tensor:
        if self.way == "silent":  # a call of forward passes the hooks by
            return self.head(self.fc2.forward(F.relu(self.fc1.forward(x))).sin())
        if self.way == "unused":
            return self.head(x)
        y = self.fc2(F.relu(self.fc1(x)))
        if self.way == "twice":
            y = self.fc2(F.relu(self.fc1(y)))
        if self.way == "head twice":
            y = self.fc2(F.relu(self.fc1(self.fc1(x))))
        if self.way == "tail twice":
            y = self.fc2(y)
        return self.head(y.sin())


def test_a_site_that_is_silent_while_its_gradients_live_is_an_error() -> None:
    rig = attach(Detour())
    rig.model.way = "silent"  # type: ignore[assignment]
    with pytest.raises(esper.SilentSiteError, match=r"silent \(fc1-fc2\).*build the Grower first"):
        rig.train()


def test_a_site_that_is_silent_without_gradients_is_idle() -> None:
    rig = attach(Detour())
    rig.model.way = "unused"  # type: ignore[assignment]
    rig.train(12)
    rig.model.way = "straight"  # type: ignore[assignment]
    rig.train(12)
    site = rig.grower.kasmina.sites["fc1-fc2"]
    assert site.refused is None and site.telemetry.reported


@pytest.mark.parametrize("way", ["twice", "head twice", "tail twice"])
def test_layers_that_begin_to_run_twice_make_the_site_unusable(way: str) -> None:
    torch.manual_seed(2)
    model = Detour()
    alone = copy.deepcopy(model)
    rig = attach(model)
    model.way = alone.way = way
    out = model(rig.batches[0][0])
    assert same_bits(out, alone(rig.batches[0][0]))
    refused = rig.grower.kasmina.sites["fc1-fc2"].refused
    assert refused is not None and ("again" in refused or "twice" in refused or "more than once" in refused)


@pytest.mark.parametrize("way", ["twice", "head twice", "tail twice"])
def test_layers_that_run_twice_under_a_grafted_branch_are_an_error(way: str) -> None:
    rig = attach(Detour())
    graft(rig, "fc1-fc2")
    rig.model.way = way  # type: ignore[assignment]
    with pytest.raises(esper.SiteError, match="must run as it did when it was grown"):
        rig.model(rig.batches[0][0])


def test_a_site_that_is_lost_before_the_graft_cancels_its_cohort() -> None:
    rig = attach(Detour(), telemetry=EVERY)
    cohort = rig.germinate("fc1-fc2", start="random_zero")
    assert cohort.state is S.TRAINING
    rig.model.way = "twice"  # type: ignore[assignment]
    rig.train(2)
    (verdict,) = rig.grower.verdicts
    assert verdict.state is S.CANCELLED and verdict.reason.startswith("fc1-fc2: ")


# ----------------------------------------------------------------------------------------------------------------------
# Function transforms


@pytest.mark.parametrize("grafted", [False, True], ids=["watched", "grafted"])
@pytest.mark.parametrize("transform", ["vmap", "vmap of grad"])
def test_vmap_is_refused_clearly(transform: str, grafted: bool) -> None:
    rig = attach(Pair())
    if grafted:
        graft(rig, "fc1-fc2")
    model, (x, wanted) = rig.model, rig.batches[0]
    params = {name: p.detach() for name, p in model.named_parameters()}

    def loss(params: dict[str, Tensor], x: Tensor, wanted: Tensor) -> Tensor:
        return (torch.func.functional_call(model, params, (x,)) - wanted).square().mean()

    rig.grower.kasmina.watch(True)
    mapped = loss if transform == "vmap" else torch.func.grad(loss)
    with pytest.raises(esper.SiteError, match=r"must not run under vmap.*export\(\) a plain model first"):
        torch.vmap(mapped, in_dims=(None, 0, 0))(params, x, wanted)


def test_other_transforms_see_the_grown_function() -> None:
    rig = attach(Pair())
    cohort = graft(rig, "fc1-fc2")
    x, wanted = rig.batches[0]
    params = {name: p.detach() for name, p in rig.model.named_parameters()}

    def loss(params: dict[str, Tensor]) -> Tensor:
        return (torch.func.functional_call(rig.model, params, (x,)) - wanted).square().mean()

    found = torch.func.grad(loss)(params)
    rig.backward()
    for name, value in host_gradients(rig).items():
        torch.testing.assert_close(found[name], value)
    assert branch_gradients(rig, cohort)


# ----------------------------------------------------------------------------------------------------------------------
# Where the calls go


def test_a_misplaced_step_warns_once() -> None:
    rig = attach(Pair())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for batch in rig.batches[:5]:
            loss = mse(rig.model, batch)
            loss.backward()
            rig.grower.step(loss)
            rig.optimizer.step()
            rig.optimizer.zero_grad()
    (warning,) = [w for w in caught if issubclass(w.category, RuntimeWarning)]
    assert "between backward() and optimizer.step()" in str(warning.message)
    assert [type(event) for event in rig.events].count(Warned) == 1


def test_a_well_placed_step_does_not_warn() -> None:
    rig = attach(Pair())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rig.train(20)
    assert Warned not in [type(event) for event in rig.events]


def test_a_grower_without_an_optimizer_step_warns_once() -> None:
    rig = attach(Pair())
    with pytest.warns(RuntimeWarning, match="1000 times without an optimizer step"):
        for _ in range(1000):
            rig.grower.step(1.0)
    rig.grower.step(1.0)
    assert rig.grower.clock.steps == 0 and rig.grower.loop.last_step == 0


def test_iterating_a_loader_of_held_out_batches_moves_no_stream(unchanged_rng: None) -> None:
    state = torch.get_rng_state()
    model = Pair()
    torch.set_rng_state(state)
    seen: list[Batch] = rows(15)
    loader = torch.utils.data.DataLoader(seen, batch_size=None, shuffle=True)  # type: ignore[arg-type]
    rig = attach(model, held_out=loader)
    assert len(rig.grower._evaluator.batches) == 15


def test_a_detached_model_can_be_attached_again() -> None:
    rig = attach(Mlp())
    rig.train(2)
    rig.grower.detach()
    again = attach(rig.model, rig.optimizer)
    again.train(2)
    assert again.grower.clock.steps == 2
