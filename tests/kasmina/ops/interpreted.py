"""Run by ``test_interpreter.py`` under ``TRITON_INTERPRET=1``; on a machine with a GPU it can be run by itself.

Kernels against references on poisoned memory, and the paths of the product that lead to them: eager, in place,
compiled, under an optimizer, in a hooked model. Numbers are fp32 in the interpreter, which gets bf16 wrong.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from tests.example_sites import EXAMPLES, attached, plant
from torch import Tensor, nn

from esper.bench import parity
from esper.bench.ops import operation as problems_of
from esper.kasmina.bank import Bank
from esper.kasmina.capture import Rows
from esper.kasmina.chunks import chunk_bounds
from esper.kasmina.incubator import fit
from esper.kasmina.ops import dispatch
from esper.kasmina.ops import fit as fits
from esper.kasmina.ops.graft import Seats, graft, reference
from esper.kasmina.ops.telemetry import record_statistics
from esper.kasmina.optim import Hyperparameters, SlotAdamW
from esper.kasmina.telemetry import TelemetryBuffer
from esper.protocol import SiteKind

pytestmark = pytest.mark.component

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = parity.DTYPES if torch.cuda.is_available() else (torch.float32,)


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    with parity.poisoned_memory():
        yield


@pytest.mark.parametrize("operation", dispatch.OPERATIONS)
def test_kernels_equal_their_reference(operation: str) -> None:
    lines = list(problems_of(operation).check(DEVICE, DTYPES))
    assert len(lines) >= 9
    assert [line for line in lines if not line["equal"]] == []


@pytest.mark.parametrize("operation", dispatch.OPERATIONS)
def test_the_twin_is_taken(operation: str) -> None:
    assert dispatch.runs_triton(operation, torch.empty(0, device=DEVICE))


# ----------------------------------------------------------------------------------------------------------------------
# Graft


def _seeds(near: bool = False) -> tuple[dict[str, Tensor], Seats]:
    source = torch.Generator().manual_seed(3)
    draw = lambda *shape: torch.randn(shape, generator=source).to(DEVICE)  # noqa: E731
    params = {"w1": draw(4, 5, 3), "b1": draw(4, 5), "w2": draw(4, 3, 5), "alpha": draw(4)}
    columns = torch.arange(12) if near else torch.randperm(15, generator=source)[:12]
    return params, Seats.of(columns.view(4, 3), 12 if near else 15, DEVICE)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("mode", ["new", "in-place", "compiled"])
def test_gradients_pass_through_a_layer_and_an_edit_in_place(mode: str, whole: bool) -> None:
    params, seats = _seeds(near=whole)
    width = 12 if whole else 15
    layer = nn.Linear(6, width).to(DEVICE)
    x = torch.randn(2, 7, 6, device=DEVICE)

    def forward(here: Tensor, *leaves: Tensor) -> Tensor:
        return graft(layer(here), *leaves, seats, writable=mode == "in-place")

    step = torch.compile(forward, fullgraph=True, backend="aot_eager") if mode == "compiled" else forward
    results: list[list[Tensor]] = []
    for ours in (True, False):
        leaves = [value.clone().requires_grad_() for value in params.values()]
        here = x.clone().requires_grad_()
        out = step(here, *leaves) if ours else reference.graft(layer(here), *leaves, seats.flat)
        out = F.relu(out, inplace=True)
        found = torch.autograd.grad(out.square().sum(), [here, *layer.parameters(), *leaves])
        results.append([out.detach(), *found])
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)


def test_frozen_seeds_let_the_gradient_through() -> None:
    params, seats = _seeds()
    y = torch.randn(5, 15, device=DEVICE, requires_grad=True)
    got = torch.autograd.grad(graft(y, *params.values(), seats).sum(), y)[0]
    wanted = torch.autograd.grad(reference.graft(y, *params.values(), seats.flat).sum(), y)[0]
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


def test_without_gradients_the_memory_given_up_is_used() -> None:
    params, seats = _seeds()
    y = torch.randn(5, 15, device=DEVICE)
    wanted = reference.graft(y, *params.values(), seats.flat)
    kept = y.clone()
    fresh = graft(y, *params.values(), seats)
    assert torch.equal(y, kept) and fresh.data_ptr() != y.data_ptr()
    out = graft(y, *params.values(), seats, writable=True)
    assert out.data_ptr() == y.data_ptr()
    for found in (fresh, out):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_who_saved_the_memory_gets_an_error_not_a_wrong_gradient() -> None:
    params, seats = _seeds()
    y = nn.Linear(6, 15).to(DEVICE)(torch.randn(5, 6, device=DEVICE))
    saved = y.square()
    out = graft(y, *params.values(), seats, writable=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (saved.sum() + out.sum()).backward()


def test_no_rows_are_no_work() -> None:
    params, seats = _seeds()
    y = torch.randn(0, 15, device=DEVICE, requires_grad=True)
    leaves = [value.requires_grad_() for value in params.values()]
    out = graft(y, *leaves, seats)
    assert out.shape == (0, 15)
    found = torch.autograd.grad(out.sum(), [y, *leaves])
    assert all(not bool(value.any()) for value in found)


def test_a_function_transform_sees_plain_operations() -> None:
    params, seats = _seeds()
    y = torch.randn(5, 15, device=DEVICE)
    got = torch.func.grad(lambda y: graft(y, *params.values(), seats).square().sum())(y)
    wanted = torch.func.grad(lambda y: reference.graft(y, *params.values(), seats.flat).square().sum())(y)
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("whole", [False, True])
def test_the_nodes_of_a_compiled_graph_keep_pytorchs_rules(whole: bool) -> None:
    params, seats = _seeds(near=whole)
    y = torch.randn(2, 3, 12 if whole else 15, device=DEVICE, requires_grad=True)
    leaves = [value.requires_grad_() for value in params.values()]
    places = (seats.columns, seats.own, seats.whole, seats.runs, seats.own_runs, seats.rising)
    torch.library.opcheck(torch.ops.esper.graft.default, (y, *leaves, *places), atol=1e-4, rtol=1e-4)
    sizes = torch.from_numpy(chunk_bounds(y.shape[-1], 3)).diff()
    layout = (torch.arange(3).repeat_interleave(sizes).to(DEVICE), sizes.float().to(DEVICE))
    statistics = torch.zeros(2, 3, device=DEVICE)
    torch.library.opcheck(torch.ops.esper.record_statistics.default, (statistics, y.detach(), -1, 4, *layout))


# ----------------------------------------------------------------------------------------------------------------------
# Telemetry


@pytest.mark.parametrize(("shape", "axis"), [((64, 10), -1), ((3, 16, 10), -1), ((4, 10, 5, 3), 1)], ids=str)
@pytest.mark.parametrize("rows", [7, 1000])
def test_a_buffer_records_the_same(
    shape: tuple[int, ...], axis: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    y = torch.randn(shape, device=DEVICE)
    views = {
        "as it is": y,
        "transposed": y.transpose(0, -2).contiguous().transpose(0, -2) if y.dim() > 2 else y,
        "sliced": torch.cat([y, y], dim=0)[::2],
        "half": y.half(),
    }
    for name, view in views.items():
        buffers = [TelemetryBuffer(chunk_bounds(10, 4), rows, DEVICE) for _ in range(2)]
        buffers[0].record(view, axis)
        with monkeypatch.context() as patch:
            patch.setenv("ESPER_OPS", "reference")
            patch.setattr(dispatch, "_verdicts", {})
            buffers[1].record(view, axis)
        torch.testing.assert_close(buffers[0].statistics, buffers[1].statistics, atol=1e-6, rtol=1e-5, msg=name)


def test_a_compiled_graph_records() -> None:
    sizes = torch.tensor([2.0, 3.0], device=DEVICE)
    chunk_of = torch.tensor([0, 0, 1, 1, 1], device=DEVICE)
    y = torch.randn(9, 5, device=DEVICE)
    eager, traced = torch.zeros(2, 2, device=DEVICE), torch.zeros(2, 2, device=DEVICE)

    def both(out: Tensor, y: Tensor) -> Tensor:
        record_statistics(out, y, -1, 4, chunk_of, sizes)
        return y * 2

    both(eager, y)
    torch.compile(both, fullgraph=True, backend="aot_eager")(traced, y)
    assert torch.equal(eager, traced) and bool(eager.any())


# ----------------------------------------------------------------------------------------------------------------------
# In the product


def _hooked() -> tuple[nn.Sequential, Bank, Tensor]:
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(6, 15), nn.ReLU(inplace=True), nn.Linear(15, 4)).to(DEVICE)
    x = torch.randn(9, 6, device=DEVICE)
    kasmina = attached(model, x, layers=True)
    columns = torch.randperm(15)[:12].view(4, 3)
    bank = plant(kasmina, "0", "chunk_mlp", units=5, columns=columns, alpha=0.5)
    bank.set_learning(True)
    return model, bank, x


def test_a_hooked_model_trains_as_with_the_references(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = SlotAdamW(lr_boost=2.0, warmup_steps=3)
    losses: list[list[float]] = []
    ends: list[dict[str, Tensor]] = []
    for choice in ("", "reference"):
        monkeypatch.setenv("ESPER_OPS", choice)
        monkeypatch.setattr(dispatch, "_verdicts", {})
        model, bank, x = _hooked()
        assert dispatch.runs_triton("graft", x) == (choice == "")
        losses.append([])
        for _ in range(4):
            loss = model(x).square().mean()
            loss.backward()
            optimizer.step(bank, Hyperparameters("adamw", 0.01, 0.1))
            losses[-1].append(float(loss.detach()))
        ends.append({name: value.detach().clone() for name, value in bank.params.items()})
        ends[-1] |= {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and losses[0][-1] < losses[0][0]
    assert ends[0].keys() == ends[1].keys()
    for name, value in ends[0].items():
        torch.testing.assert_close(value, ends[1][name], atol=1e-5, rtol=1e-4)


def test_a_hook_of_the_user_keeps_what_it_saw() -> None:
    model, _, x = _hooked()
    seen: list[Tensor] = []
    model[0].register_forward_hook(lambda _module, _args, y: seen.append(y), prepend=True)
    model(x)
    plain = nn.Linear(6, 15).to(DEVICE)
    plain.load_state_dict(model[0].state_dict())
    assert torch.equal(seen[0], plain(x)), "an output that somebody else may hold is not written"


def test_compiled_and_copied_models_compute_the_same() -> None:
    model, _, x = _hooked()
    wanted = model(x).detach()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x).detach(), wanted, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(copy.deepcopy(model)(x).detach(), wanted, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("columns", [None, 2])
def test_seeds_of_their_own_columns_are_fitted_in_one_launch(
    columns: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same end as by the loop, the same draws, and neither the loop nor the slots' optimizer is asked."""
    source = torch.Generator().manual_seed(1)
    y, target = (torch.randn(40, 6, generator=source).to(DEVICE) for _ in range(2))
    rows = Rows(y[:, :5], y, y, torch.arange(40), torch.arange(40) % 4)
    seats = None if columns is None else torch.randperm(6, generator=source)[: 2 * columns].view(2, columns)
    ends: list[dict[str, Tensor]] = []
    for choice in ("", "reference"):
        monkeypatch.setenv("ESPER_OPS", choice)
        monkeypatch.setattr(dispatch, "_verdicts", {})
        assert dispatch.runs_triton("fit", y) == (choice == "")
        source.manual_seed(4)
        bank = Bank(
            "chunk_mlp", EXAMPLES[SiteKind.LINEAR_LAYER][0].geometry, units=3, reads=5, columns=seats,
            generator=source, device=DEVICE,
        )  # fmt: skip
        before = bank.params["w1"].clone()
        with monkeypatch.context() as patch:
            if choice == "":
                patch.setattr(fits.reference, "fit", lambda *_: pytest.fail("the loop ran"))
            fit(bank, rows, target, steps=3, batch_rows=16, lr=0.01, generator=source)
        assert not torch.equal(before, bank.params["w1"])
        ends.append({name: value.detach().clone() for name, value in bank.params.items()})
        ends[-1]["draw"] = torch.rand(1, generator=source)
    for name, value in ends[0].items():
        torch.testing.assert_close(value, ends[1][name], atol=1e-6, rtol=1e-5)


def test_a_fit_of_no_steps_changes_nothing() -> None:
    params, seats = _seeds()
    y, kept = torch.randn(5, 15, device=DEVICE), [value.clone() for value in params.values()]
    for draws in (torch.zeros(0, 4, dtype=torch.int64), torch.zeros(3, 0, dtype=torch.int64)):
        fits.fit(params["w1"], params["b1"], params["w2"], seats, y, y, draws, 0.1)
    assert all(map(torch.equal, params.values(), kept))


@pytest.mark.parametrize("slots", [1, 3])
def test_an_isolated_fit_takes_the_fused_optimizer_and_ends_where_pytorchs_does(
    slots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = torch.Generator().manual_seed(1)
    x, y = (torch.randn(40, size, generator=source).to(DEVICE) for size in (5, 6))
    rows = Rows(x, y, y, torch.arange(40), torch.arange(40) % 4)
    columns = None if slots == 1 else torch.randperm(6, generator=source).view(3, 2)
    ends: list[dict[str, Tensor]] = []
    for choice in ("", "reference"):
        monkeypatch.setenv("ESPER_OPS", choice)
        monkeypatch.setattr(dispatch, "_verdicts", {})
        source.manual_seed(4)
        bank = Bank(
            "bottleneck", EXAMPLES[SiteKind.LINEAR_SPAN][0].geometry, units=2, reads=5, columns=columns,
            generator=source, device=DEVICE,
        )  # fmt: skip
        fit(bank, rows, y, steps=2, batch_rows=16, lr=0.01, generator=source)
        ends.append({name: value.detach().clone() for name, value in bank.params.items()})
    for name, value in ends[0].items():
        torch.testing.assert_close(value, ends[1][name], atol=1e-5, rtol=1e-4)
