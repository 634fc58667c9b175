"""Traps of PyTorch, each of which has caught somebody: in-place edits, scaled losses, recomputation, copies, transforms."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import esper
from esper.kasmina.cohort import Cohort
from esper.protocol import Lifecycle, Telemetry, Warned
from tests.models import (
    MLP,
    Batch,
    Mlp,
    Pair,
    Rig,
    Transformer,
    assert_same_state,
    attach,
    mse,
    rows,
    same_bits,
    snapshot,
    tokens,
)

pytestmark = pytest.mark.component

S = Lifecycle


def graft(rig: Rig, *sites: str, alpha: float = 0.5) -> Cohort:
    """A cohort in GRAFTING, paused, with a branch of visible size."""
    cohort = rig.germinate(*sites)
    rig.until(cohort, S.GRAFTING)
    rig.grower.kasmina.set_alpha(cohort, alpha)
    rig.grower.kasmina.set_paused(cohort, True, rig.grower.clock.steps)
    source = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for site in cohort.sites:
            for value in rig.bank(cohort, site).params.values():
                value.copy_(0.5 * torch.randn(value.shape, generator=source))
    return cohort


def branch_gradients(rig: Rig, cohort: Cohort) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for site in cohort.sites:
        for name, value in rig.bank(cohort, site).params.items():
            assert value.grad is not None, f"{site}.{name} was to get a gradient"
            found[f"{site}.{name}"] = value.grad.clone()
            value.grad = None
    return found


def host_gradients(rig: Rig) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in rig.model.named_parameters() if p.grad is not None}


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
# Gradients: zeroed, scaled, accumulated, skipped


def learnt(loop: Callable[[Rig, Cohort], None], **optimizer: Any) -> tuple[Rig, dict[str, Tensor]]:
    """The branch's weights after ``loop`` has trained a host with a grafted branch."""
    torch.manual_seed(0)
    model = Pair()
    rig = attach(model, torch.optim.AdamW(model.parameters(), 1e-2, eps=1e-6, **optimizer))
    cohort = graft(rig, "fc1-fc2")
    loop(rig, cohort)
    return rig, {name: value.detach().clone() for name, value in rig.bank(cohort).params.items()}


def plainly(rig: Rig, _: Cohort) -> None:
    for batch in rig.batches[:6]:
        rig.optimizer.zero_grad()
        loss = mse(rig.model, batch)
        loss.backward()
        rig.optimizer.step()
        rig.grower.step(loss)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_may_be_zeroed_before_the_growers_step(set_to_none: bool) -> None:
    def zeroed(rig: Rig, _: Cohort) -> None:
        for batch in rig.batches[:6]:
            loss = mse(rig.model, batch)
            loss.backward()
            rig.optimizer.step()
            rig.optimizer.zero_grad(set_to_none=set_to_none)
            rig.grower.step(loss)

    (one, weights), (two, others) = learnt(plainly), learnt(zeroed)
    assert_same_state(weights, others)
    assert_same_state(snapshot(one.model), snapshot(two.model))


def test_a_branch_follows_the_schedule_of_the_host() -> None:
    def frozen(rig: Rig, _: Cohort) -> None:
        before = {name: value.detach().clone() for name, value in rig.bank(_).params.items()}
        rig.optimizer.param_groups[0]["lr"] = 0.0
        plainly(rig, _)
        assert_same_state(before, {name: value.detach() for name, value in rig.bank(_).params.items()})

    learnt(frozen)


def test_accumulated_steps_count_once_and_equal_a_large_batch() -> None:
    def in_parts(rig: Rig, _: Cohort) -> None:
        start = rig.grower.clock.steps
        for turn in range(4):
            for part in range(4):
                x, wanted = rig.batches[turn]
                batch = x[4 * part : 4 * part + 4], wanted[4 * part : 4 * part + 4]
                loss = mse(rig.model, batch) / 4
                loss.backward()
                if part == 3:
                    rig.optimizer.step()
                    rig.optimizer.zero_grad()
                rig.grower.step(loss)
        assert rig.grower.clock.steps == start + 4
        assert rig.grower.kasmina.rows_per_step["fc1-fc2"] == 16
        assert rig.grower.kasmina.rows_per_batch["fc1-fc2"] == 4

    def at_once(rig: Rig, _: Cohort) -> None:
        for batch in rig.batches[:4]:
            loss = mse(rig.model, batch)
            loss.backward()
            rig.optimizer.step()
            rig.optimizer.zero_grad()
            rig.grower.step(loss)

    (one, weights), (two, others) = learnt(in_parts), learnt(at_once)
    for name, value in weights.items():
        torch.testing.assert_close(value, others[name], rtol=1e-4, atol=1e-5)
    for name, value in snapshot(one.model).items():
        torch.testing.assert_close(value, snapshot(two.model)[name], rtol=1e-4, atol=1e-5)


BAD = 3
"""The step whose loss overflows."""


def scaled(order: str, scaler: torch.amp.GradScaler) -> Callable[[Rig, Cohort], None]:
    """A loop with a GradScaler in which one step is skipped; ``order`` says where the user puts the other calls."""

    def loop(rig: Rig, cohort: Cohort) -> None:
        start, number = rig.grower.clock.steps, 0
        for turn in range(7):
            if order != "zero last":
                rig.optimizer.zero_grad(set_to_none=order != "zeros")
            loss = mse(rig.model, rig.batches[number])
            scaler.scale(loss * (float("inf") if turn == BAD else 1.0)).backward()
            scaler.step(rig.optimizer)
            if order != "late update":
                scaler.update()
            if order == "zero last":
                rig.optimizer.zero_grad()
            rig.grower.step(loss)
            if order == "late update":
                scaler.update()
            number += turn != BAD
        assert rig.grower.clock.steps == start + 6, "the skipped step was not to count"
        # an update() after the grower's step tells of the overflow when the next gradients are already mixed in
        assert float(rig.bank(cohort).moments.steps[0]) == 6 - (order == "late update"), "nor for the branch"
        rig.grower._guard(rig.grower.clock.steps)
        assert cohort.state is S.GRAFTING and not rig.grower.verdicts, "an overflow is ordinary, not a fault"

    return loop


@pytest.mark.parametrize("growth", [2, 1000], ids=["growing", "steady"])
@pytest.mark.parametrize("order", ["zero last", "zero first", "zeros", "late update"])
def test_a_step_that_the_scaler_skips_is_skipped_by_the_branch(order: str, growth: int) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=growth)

    def join(rig: Rig, cohort: Cohort) -> None:
        rig.grower.clock._scaler = scaler  # what track=[scaler] does
        scaled(order, scaler)(rig, cohort)

    (one, weights), (two, others) = learnt(join), learnt(plainly)
    if order == "late update":
        assert all(torch.isfinite(value).all() for value in weights.values())
        return
    for name, value in weights.items():
        torch.testing.assert_close(value, others[name], rtol=1e-4, atol=1e-5)
    for name, value in snapshot(one.model).items():
        torch.testing.assert_close(value, snapshot(two.model)[name], rtol=1e-4, atol=1e-5)


def test_a_fused_optimizer_skips_by_itself_and_the_step_does_not_count() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)

    def join(rig: Rig, cohort: Cohort) -> None:
        rig.grower.clock._scaler = scaler
        scaled("zero last", scaler)(rig, cohort)

    (_, weights), (_, others) = learnt(join, fused=True), learnt(plainly)
    for name, value in weights.items():
        torch.testing.assert_close(value, others[name], rtol=1e-4, atol=1e-5)


@pytest.mark.unit
def test_a_scaler_among_what_is_tracked_is_found() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    rig = attach(Pair(), track=[object(), scaler])
    rig.backward()
    scaler.scale(torch.zeros(()))
    rig.optimizer.step()
    assert rig.grower.clock.inverse_scale == 1 / 8


def test_a_branch_gradient_that_alone_is_not_finite_rolls_the_cohort_back() -> None:
    rig = attach(Pair(), interval=1)
    cohort = graft(rig, "fc1-fc2")
    loss = rig.backward()
    next(iter(rig.bank(cohort).params.values())).grad.fill_(float("nan"))
    rig.optimizer.step()
    rig.grower.step(loss)
    assert [verdict.state for verdict in rig.grower.verdicts] == [S.ROLLED_BACK]


# ----------------------------------------------------------------------------------------------------------------------
# Activation checkpointing

MODES = ("reentrant", "non-reentrant")


def recomputing(mode: str | None, dropout: float = 0.4) -> Rig:
    torch.manual_seed(4)
    return attach(Transformer(dropout, mode), batches=tokens(10), held_out=tokens(8, seed=7), telemetry=EVERY)


EVERY = esper.TelemetryConfig(every=1)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("mode", MODES)
def test_gradients_with_a_grafted_branch_inside_a_checkpoint(mode: str, dropout: float) -> None:
    """Equal to those without checkpointing: with two forwards before the backward, and the branch's own dropout."""
    found = []
    for recompute in (mode, None):
        rig = recomputing(recompute, dropout)
        cohort = graft(rig, "ffn.0.up-down", "ffn.1.up-down")
        rig.optimizer.zero_grad()
        torch.manual_seed(6)
        (mse(rig.model, rig.batches[0]) + mse(rig.model, rig.batches[1])).backward()
        found.append({**branch_gradients(rig, cohort), **host_gradients(rig)})
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], rtol=1e-4, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("mode", MODES)
def test_a_recomputation_is_not_counted_again(mode: str) -> None:
    """Telemetry once a step, each capture once a batch, the rows of one forward; and the same numbers as without."""
    seen = []
    for recompute in (mode, None):
        rig = recomputing(recompute, dropout=0.0)
        cohort = rig.germinate(start="negative_gradient")
        start = {name: int(site.telemetry.reports) for name, site in rig.grower.kasmina.sites.items()}
        rig.train(2)
        for name, site in rig.grower.kasmina.sites.items():
            assert int(site.telemetry.reports) - start[name] == 2
            assert site.capture is not None and site.capture.filled == 2
            assert rig.grower.kasmina.rows_per_step[name] == 4 * 6
        rig.grower.kasmina.set_paused(cohort, True, rig.grower.clock.steps)
        rig.train(6)
        seen.append([e for e in rig.events if isinstance(e, Telemetry)][-1])
    assert seen[0].activation_mean == pytest.approx(seen[1].activation_mean, rel=1e-5)
    assert seen[0].activation_var == pytest.approx(seen[1].activation_var, rel=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_a_dormant_host_under_checkpointing_keeps_its_bits(mode: str) -> None:
    def run(watched: bool) -> dict[str, Tensor]:
        torch.manual_seed(4)
        model = Transformer(0.3, mode)
        optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
        batches = tokens(10)
        rig = attach(model, optimizer, batches=batches, held_out=tokens(8, seed=7)) if watched else None
        for batch in batches:
            loss = mse(model, batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if rig is not None:
                rig.grower.step(loss)
        return snapshot(model)

    assert_same_state(run(True), run(False))


class Regions(nn.Module):
    """A span whose ends lie in checkpoint regions of ``cut``'s kind."""

    def __init__(self, cut: str, reentrant: bool) -> None:
        super().__init__()
        self.stem, self.fc1, self.fc2, self.head = (nn.Linear(8, 8) for _ in range(4))
        self.cut, self.reentrant = cut, reentrant

    def forward(self, x: Tensor) -> Tensor:
        def region(part: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
            return checkpoint(part, x, use_reentrant=self.reentrant) if self.training else part(x)

        x = self.stem(x)
        if self.cut == "apart":
            h = region(lambda x: F.relu(self.fc1(x)), x)
            y = region(lambda h: self.fc2(h).sin(), h)
        elif self.cut == "head":
            y = self.fc2(region(lambda x: F.relu(self.fc1(x)), x)).sin()
        elif self.cut == "tail":
            y = region(lambda h: self.fc2(h).sin(), F.relu(self.fc1(x)))
        elif self.cut == "parent":
            y = region(lambda x: self.fc2(F.relu(self.fc1(x))).sin(), x)
        else:
            y = self.fc2(F.relu(self.fc1(x))).sin()
        return self.head(y)[:, :4]


@pytest.mark.parametrize("reentrant", [True, False], ids=MODES)
@pytest.mark.parametrize("cut", ["apart", "head", "tail", "parent"])
def test_a_span_cut_by_checkpoint_regions_is_refused_and_the_host_unharmed(cut: str, reentrant: bool) -> None:
    torch.manual_seed(2)
    model = Regions(cut, reentrant)
    alone = copy.deepcopy(model)
    rig = attach(model)
    rig.train(2)
    refused = rig.grower.kasmina.sites["fc1-fc2"].refused
    assert refused is not None and "checkpoint regions" in refused
    optimizer = torch.optim.AdamW(alone.parameters(), 3e-3)
    for batch in rig.batches[:2]:
        optimizer.zero_grad()
        mse(alone, batch).backward()
        optimizer.step()
    assert_same_state(snapshot(model), snapshot(alone))
    rig.grower.submit(esper.protocol.Germinate(seeds=(esper.protocol.SeedPlan(site="fc1-fc2"),)))  # type: ignore[attr-defined]
    rig.train()
    assert not rig.grower.kasmina.cohorts and "checkpoint regions" in rig.refused()[-1].reason


@pytest.mark.parametrize("reentrant", [True, False], ids=MODES)
@pytest.mark.parametrize("cut", ["apart", "head", "tail", "parent"])
def test_regions_that_cut_a_grafted_span_are_an_error_never_a_wrong_gradient(cut: str, reentrant: bool) -> None:
    rig = attach(Regions("none", reentrant))
    graft(rig, "fc1-fc2")
    rig.model.cut = cut  # type: ignore[assignment]
    with pytest.raises(esper.SiteError, match="checkpoint regions"):
        for _ in range(2):
            rig.train()


# ----------------------------------------------------------------------------------------------------------------------
# Modules that do not run as expected


def test_attention_projections_are_left_out_with_a_reason() -> None:
    rig = attach(Transformer(), batches=tokens(10), held_out=tokens(8))
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
# Copies


def by_deepcopy(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)


def by_file(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def by_average(model: nn.Module) -> nn.Module:
    averaged = torch.optim.swa_utils.AveragedModel(model)
    averaged.update_parameters(model)
    return averaged


@pytest.mark.parametrize("way", [by_deepcopy, by_file, by_average])
@pytest.mark.parametrize("state", ["dormant", "capturing", "grafted", "permanent"])
def test_a_copy_keeps_the_branches_and_records_nothing(state: str, way: Callable[[nn.Module], nn.Module]) -> None:
    rig = attach(MLP.build(), telemetry=EVERY)
    rig.train(2)
    kasmina = rig.grower.kasmina
    if state == "capturing":
        rig.germinate(start="negative_gradient")
    elif state != "dormant":
        cohort = graft(rig, "fc1-fc2", "fc2-fc3")
        if state == "permanent":
            for target in (S.STABILIZATION, S.EVALUATING, S.FINE_TUNING):
                kasmina.move(cohort, target, rig.grower.clock.steps)
            kasmina.fossilise(cohort, rig.grower.clock.steps, rig.grower.clock.hosts)
            rig.train()
    x = rig.batches[0][0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        twin = way(rig.model)
    wanted = rig.model(x).detach()
    counts = {name: (site.num_calls, int(site.telemetry.reports)) for name, site in kasmina.sites.items()}
    filled = [site.capture.filled for site in kasmina.sites.values() if site.capture is not None]
    twin.train()
    out = twin(x)
    assert same_bits(out.detach(), wanted)
    out.sum().backward()
    assert {n: (s.num_calls, int(s.telemetry.reports)) for n, s in kasmina.sites.items()} == counts
    assert [site.capture.filled for site in kasmina.sites.values() if site.capture is not None] == filled
    assert all(p.grad is None for bank in kasmina.live_banks for p in bank.params.values())
    assert all(p.grad is None for p in rig.model.parameters())
    rig.train(3)
    assert same_bits(twin(x).detach(), wanted), "the copy was to stay as it was"
    again = way(twin)
    assert same_bits(again(x).detach(), wanted)


@pytest.mark.unit
def test_a_copy_carries_no_captures() -> None:
    rig = attach(MLP.build())
    rig.germinate(start="negative_gradient")
    rig.train(2)
    for module in copy.deepcopy(rig.model).modules():
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
            for site in getattr(hook, "sites", [getattr(hook, "site", None)]):
                assert site is not None and site.capture is None and site.telemetry is None and not site.engaged


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
# Compilation


class Compiled(nn.Module):
    """Small, but with an in-place activation behind a site."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(8, 6), nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc3(F.relu_(self.fc2(F.gelu(self.fc1(x)))))


@pytest.fixture
def fresh_dynamo() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def compiler_warnings() -> Any:
    """The compiler's own warnings are not this project's."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        yield


@pytest.mark.integration
def test_compiled_before_the_grower_was_attached(fresh_dynamo: None, compiler_warnings: None) -> None:
    model = Compiled()
    compiled = torch.compile(model, backend="eager")
    batches = rows(4)
    mse(compiled, batches[0]).backward()
    model.zero_grad()
    rig = attach(model)
    loss = mse(compiled, batches[1])
    loss.backward()
    rig.optimizer.step()
    with pytest.raises(esper.SilentSiteError, match="compiled before the Grower was attached"):
        rig.grower.step(loss)


@pytest.mark.integration
def test_compiled_after_attaching(fresh_dynamo: None, compiler_warnings: None) -> None:
    """Whole graphs; dormant bit for bit; then a grafted branch whose alpha moves without another compilation."""

    def run(watched: bool) -> tuple[dict[str, Tensor], Rig | None, Any]:
        torch.manual_seed(0)
        model = Compiled()
        optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
        rig = attach(model, optimizer) if watched else None
        compiled = torch.compile(model, fullgraph=True)
        for batch in rows(8):
            loss = mse(compiled, batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if rig is not None:
                rig.grower.step(loss)
        return snapshot(model), rig, compiled

    alone, _, _ = run(False)
    torch._dynamo.reset()
    watched, rig, compiled = run(True)
    assert_same_state(watched, alone)
    assert rig is not None and all(site.telemetry.reported for site in rig.grower.kasmina.sites.values())

    cohort = graft(rig, "fc1-fc2")
    rig.grower.kasmina.watch(False)
    x = rows(1, seed=3)[0][0]
    compiled(x)
    for alpha in (0.25, 0.75):
        rig.grower.kasmina.set_alpha(cohort, alpha)
        wanted = rig.model(x)
        rig.grower.kasmina.note_rows(rig.grower.clock.steps)  # as every real step does
        with torch._dynamo.config.patch(error_on_recompile=True):
            torch.testing.assert_close(compiled(x), wanted, rtol=1e-5, atol=1e-6)


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


def test_a_grower_without_an_optimizer_step_warns_once() -> None:
    rig = attach(Pair())
    with pytest.warns(RuntimeWarning, match="1000 times without an optimizer step"):
        for _ in range(1000):
            rig.grower.step(1.0)
    rig.grower.step(1.0)
    assert rig.grower.clock.steps == 0 and rig.grower._last_step == 0


@pytest.mark.unit
def test_iterating_a_loader_of_held_out_batches_moves_no_stream(unchanged_rng: None) -> None:
    state = torch.get_rng_state()
    model = Pair()
    torch.set_rng_state(state)
    seen: list[Batch] = rows(9)
    loader = torch.utils.data.DataLoader(seen, batch_size=None, shuffle=True)  # type: ignore[arg-type]
    rig = attach(model, held_out=loader)
    assert len(rig.grower._evaluator.batches) == 9


@pytest.mark.unit
def test_a_detached_model_can_be_attached_again() -> None:
    rig = attach(Mlp())
    rig.train(2)
    rig.grower.detach()
    again = attach(rig.model, rig.optimizer)
    again.train(2)
    assert again.grower.clock.steps == 2
