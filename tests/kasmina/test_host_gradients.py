"""Gradient norms at sites: read before the user zeroes them, free of the loss scale, only while somebody asks."""

from __future__ import annotations

import pytest
import torch
from tests.models import Mlp, Pair, mse
from tests.rigs import attach, graft
from torch import Tensor, nn

from esper.protocol import Lifecycle, SetStrategy

pytestmark = pytest.mark.component


def norm_of(*weights: Tensor) -> float:
    return float(torch.cat([w.grad.flatten() for w in weights if w.grad is not None]).norm())


def test_it_is_what_the_optimizer_got() -> None:
    rig = attach(Mlp())
    model, clock = rig.model, rig.grower.clock
    assert isinstance(model, Mlp)
    clock.measure_gradients({"fc1-fc2"})
    mse(model, rig.batches[0]).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    wanted = norm_of(model.fc1.weight, model.fc2.weight)
    rig.optimizer.step()
    rig.optimizer.zero_grad(set_to_none=False)
    assert clock.gradient_norm("fc1-fc2") == pytest.approx(wanted, rel=1e-6)
    assert 0 < wanted < 0.01
    assert clock.gradient_norm("fc2-fc3") is None, "nobody asked"
    clock.measure_gradients({"fc1-fc2"})
    assert clock.gradient_norm("fc1-fc2") is None, "an earlier step's norm is not this step's"
    model.fc1.requires_grad_(False)
    model.fc2.requires_grad_(False)
    rig.optimizer.zero_grad()
    rig.optimizer.step()
    assert clock.gradient_norm("fc1-fc2") is None, "no gradient, no norm"


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("unscaled", [False, True], ids=["", "unscaled by the user"])
def test_the_loss_scale_is_divided_out(fused: bool, unscaled: bool) -> None:
    model = Pair()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    rig = attach(model, optimizer, track=[scaler])
    mse(model, rig.batches[0]).backward()
    wanted = norm_of(model.fc1.weight, model.fc2.weight)
    optimizer.zero_grad()
    rig.grower.clock.measure_gradients({"fc1-fc2"})
    scaler.scale(mse(model, rig.batches[0])).backward()
    if unscaled:
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    assert rig.grower.clock.gradient_norm("fc1-fc2") == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["tail first", "head first"])
def test_each_site_is_read_at_its_own_optimizer(order: tuple[int, int]) -> None:
    model = Mlp()
    optimizers = [
        torch.optim.AdamW(model.fc3.parameters(), 1e-2),
        torch.optim.SGD([*model.fc1.parameters(), *model.fc2.parameters()], 1e-2),
    ]
    rig = attach(model, optimizers)  # type: ignore[arg-type]
    rig.grower.clock.measure_gradients({"fc1-fc2", "fc2-fc3"})
    mse(model, rig.batches[0]).backward()
    wanted = norm_of(model.fc1.weight, model.fc2.weight), norm_of(model.fc2.weight, model.fc3.weight)
    for number in order:
        optimizers[number].step()
    found = [rig.grower.clock.gradient_norm(site) for site in ("fc1-fc2", "fc2-fc3")]
    assert found == pytest.approx(wanted, rel=1e-6)


def test_they_are_measured_while_a_strategy_wants_them_only() -> None:
    rig = attach(Mlp())
    rig.train()
    clock = rig.grower.clock
    cohort = graft(rig, "fc2-fc3")
    rig.grower.kasmina.set_paused(cohort, False, clock.steps)
    assert clock._measured == ()
    rig.grower.kasmina.set_alpha(cohort, 0.1)
    rig.order(SetStrategy(cohort=cohort.number, strategy="grad_norm_gated"))
    assert clock._measured == ("fc2-fc3",) and cohort.held_by == "no gradient at the site", "not asked in time"
    rig.train()
    (norm,) = cohort.memory["fc2-fc3"]["norms"]
    assert cohort.held_by is None and norm > 0
    rig.until(cohort, Lifecycle.STABILIZATION)
    assert clock._measured == ()
