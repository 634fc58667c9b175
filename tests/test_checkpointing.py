"""Activation checkpointing: a recomputation adds the same branch, counts nothing twice, pairs with nothing else."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from tests.models import Transformer, assert_same_state, mse, snapshot, tokens
from tests.rigs import EVERY, Rig, attach, branch_gradients, graft, host_gradients
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import esper
from esper.protocol import Lifecycle, Telemetry

pytestmark = pytest.mark.integration

S = Lifecycle


MODES = ("reentrant", "non-reentrant")


def recomputing(mode: str | None, dropout: float = 0.4) -> Rig:
    torch.manual_seed(4)
    return attach(Transformer(dropout, mode), batches=tokens(10), held_out=tokens(16, seed=7), telemetry=EVERY)


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
        rig = attach(model, optimizer, batches=batches, held_out=tokens(16, seed=7)) if watched else None
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
