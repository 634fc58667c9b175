"""Attached and dormant, a model computes what it computed before: bit for bit, in every output, gradient and weight."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from tests.models import (
    CONV,
    DROPOUT_MLP,
    MLP,
    TASKS,
    TRANSFORMER,
    Pair,
    Task,
    Transformer,
    assert_same_state,
    mse,
    rows,
    same_bits,
    snapshot,
    tokens,
)
from tests.rigs import Rig, adamw, attach, momentum_sgd, trajectory
from torch import Tensor, nn

import esper
from esper.protocol import HeldOut, Telemetry

pytestmark = pytest.mark.integration


def join(model: nn.Module, optimizer: torch.optim.Optimizer, task: Task) -> Rig:
    """Watch often and evaluate often: whatever Esper does while dormant happens many times."""
    held_out = torch.utils.data.DataLoader(task.batches(16, seed=7), batch_size=None, shuffle=True)
    return attach(
        model, optimizer, held_out=held_out, telemetry=esper.TelemetryConfig(every=2), interval=5, held_out_every=20,
        sites=esper.SitesConfig(layers=True),
    )  # fmt: skip


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("task", TASKS, ids=str)
def test_200_steps_leave_the_bits_of_a_run_without_esper(task: Task, bf16: bool) -> None:
    alone = trajectory(task, 200, bf16=bf16)
    rigs: list[Rig] = []
    watched = trajectory(task, 200, join, bf16=bf16, each=lambda rig, _: rigs.append(rig) if not rigs else None)
    watched.assert_equals(alone)
    events = rigs[0].events
    assert sum(isinstance(event, HeldOut) for event in events) >= 10, "evaluations were to happen in between"
    seen = [event for event in events if isinstance(event, Telemetry)]
    assert len(seen) == 40 and all(v == v for v in seen[-1].activation_var), "telemetry was to be read in between"


@pytest.mark.parametrize("task", [MLP, CONV], ids=str)
def test_momentum_sgd_with_clipping_is_left_alone_too(task: Task) -> None:
    alone = trajectory(task, 40, optimizer=momentum_sgd, clip=0.1)
    trajectory(task, 40, join, optimizer=momentum_sgd, clip=0.1).assert_equals(alone)


@pytest.mark.parametrize("task", [DROPOUT_MLP, TRANSFORMER], ids=str)
def test_detached_the_host_is_as_before(task: Task) -> None:
    alone = trajectory(task, 30)
    trajectory(task, 30, join, each=lambda rig, step: rig.grower.detach() if step == 0 else None).assert_equals(alone)
    model = task.build()
    rig = attach(model, batches=task.batches(10), held_out=task.batches(16))
    rig.grower.detach()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not rig.optimizer._optimizer_step_pre_hooks and not rig.optimizer._optimizer_step_post_hooks


@pytest.mark.parametrize("task", TASKS, ids=str)
def test_attaching_changes_no_key_no_group_no_flag_no_stream(task: Task, unchanged_rng: None) -> None:
    state = torch.get_rng_state()
    model = task.build()
    model.modules_before = [name for name, _ in model.named_modules()]  # type: ignore[assignment]
    optimizer = adamw(model)
    next(iter(model.children())).eval()
    flags = [module.training for module in model.modules()]
    weights, keys = snapshot(model), list(model.state_dict())
    groups = copy.deepcopy(optimizer.state_dict())
    owned = [id(p) for group in optimizer.param_groups for p in group["params"]]
    torch.set_rng_state(state)
    rig = attach(model, optimizer, batches=task.batches(10), held_out=task.batches(16))
    assert list(model.state_dict()) == keys
    assert_same_state(snapshot(model), weights)
    assert optimizer.state_dict() == groups
    assert [id(p) for group in optimizer.param_groups for p in group["params"]] == owned
    assert [module.training for module in model.modules()] == flags
    assert [name for name, _ in model.named_modules()] == model.modules_before
    assert all(p.grad is None for p in model.parameters())
    assert rig.grower.kasmina.params == sum(p.numel() for p in model.parameters())


SPECIAL = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 0.0, 1e-45, 1.0, -1.0])


def _signed(y: Tensor) -> Tensor:
    return torch.where(y == 0, -y.abs(), y)


class Signed(nn.Sequential):
    """Its last layers hand on -0.0 for every zero: a matrix product would lose its sign."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(1, 6), nn.ReLU(), nn.Linear(6, 1), nn.ReLU(), nn.Linear(1, 1))

    def sign(self) -> None:
        """From now on; a layer that is found to compute something else is no site."""
        for layer in (self[2], self[4]):
            layer.forward = lambda x, layer=layer: _signed(F.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize("layers", [False, True], ids=["spans", "layers"])
@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
def test_special_values_pass_as_they_are(layers: bool, autocast: bool) -> None:
    def run(watched: bool) -> tuple[Tensor, list[Tensor]]:
        torch.manual_seed(0)
        model = Signed()
        for parameter in model.parameters():
            nn.init.constant_(parameter, float(parameter.dim() == 2))
        if watched:
            held_out = [(torch.ones(2, 1), torch.ones(2, 1))] * 16
            rig = attach(model, held_out=held_out, sites=esper.SitesConfig(layers=layers))
            assert len(rig.grower.sites()) >= 1 + layers
            assert all(site.engaged for site in rig.grower.kasmina.sites.values())
        model.sign()
        x = SPECIAL[:, None].clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = model(x)
        y.backward(SPECIAL.flip(0)[:, None].to(y.dtype))
        return y.detach(), [x.grad, *(p.grad for p in model.parameters())]  # type: ignore[list-item]

    (plain, gradients), (watched, watched_gradients) = run(False), run(True)
    assert plain.isnan().any() and plain.isinf().any(), "NaN and inf were to reach the output"
    assert (plain.signbit() & (plain == 0)).any(), "-0.0 was to reach the output"
    assert same_bits(plain, watched)
    assert all(same_bits(one, two) for one, two in zip(gradients, watched_gradients, strict=True))


def test_a_dormant_site_returns_the_very_tensor_of_the_host() -> None:
    rig = attach(Pair())
    seen: list[Tensor] = []
    model = rig.model
    assert isinstance(model, Pair)
    original = nn.Linear.forward
    model.fc2.forward = lambda x: seen.append(original(model.fc2, x)) or seen[-1]  # type: ignore[method-assign, func-returns-value]
    out = model(rows(1)[0][0])
    assert out is seen[0]
    assert out._backward_hooks is None


@pytest.mark.parametrize(
    ("model", "held_out"),
    [(Pair(), rows(16)), (CONV.build(), CONV.batches(16)), (Transformer(), tokens(16))],
    ids=["pair", "conv", "transformer"],
)
def test_the_users_own_evaluation_is_not_recorded(model: nn.Module, held_out: list[tuple[Tensor, Tensor]]) -> None:
    rig = attach(model, batches=held_out, held_out=held_out)
    rig.train(2)
    before = {name: site.num_calls for name, site in rig.grower.kasmina.sites.items()}
    for context in (torch.no_grad(), torch.inference_mode()):
        model.eval()
        with context:
            rig.grower.kasmina.watch(True)
            mse(model, held_out[0])
        model.train()
    assert {name: site.num_calls for name, site in rig.grower.kasmina.sites.items()} == before
    rig.train(2)
    assert all(site.refused is None for site in rig.grower.kasmina.sites.values())


class Counting(Pair):
    """Writes a buffer in every forward, whatever the mode."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


def test_a_buffer_that_every_forward_writes_counts_the_users_forwards_alone() -> None:
    rig = attach(Counting(), interval=1, held_out_every=1)
    rig.train(5)
    assert float(rig.model.calls) == 5


def test_each_own_flag_and_buffer_survives_an_evaluation() -> None:
    model = CONV.build()
    rig = attach(model, batches=CONV.batches(10), held_out=CONV.batches(16, seed=7))
    rig.train(3)
    model.get_submodule("blocks.0.norm1").eval()
    flags, state = [module.training for module in model.modules()], snapshot(model)
    objects = [id(buffer) for buffer in model.buffers()]
    rig.grower.judge.held_out(4)
    assert [module.training for module in model.modules()] == flags
    assert_same_state(snapshot(model), state)
    assert [id(buffer) for buffer in model.buffers()] == objects
