"""Copied and saved hosts keep their branches and record nothing."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable

import pytest
import torch
from tests.models import MLP, same_bits
from tests.rigs import EVERY, attach, graft
from torch import nn

from esper.protocol import Lifecycle

pytestmark = pytest.mark.integration

S = Lifecycle


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


def test_a_copy_carries_no_captures() -> None:
    rig = attach(MLP.build())
    rig.germinate(start="negative_gradient")
    rig.train(2)
    for module in copy.deepcopy(rig.model).modules():
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
            for site in getattr(hook, "sites", [getattr(hook, "site", None)]):
                assert site is not None and site.capture is None and site.telemetry is None and not site.engaged
