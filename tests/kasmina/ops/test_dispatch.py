"""Which implementation runs, what forces it, and that a failing one is said once and replaced."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from esper.errors import ConfigError, EsperError
from esper.kasmina.ops import dispatch
from esper.kasmina.ops.graft import Seats, graft, reference
from esper.kasmina.ops.telemetry import record_statistics
from esper.kasmina.ops.telemetry.reference import chunk_statistics

pytestmark = pytest.mark.unit

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ESPER_OPS", raising=False)
    monkeypatch.setattr(dispatch, "_verdicts", {})
    monkeypatch.setattr(dispatch, "_warned", set())


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tensors here count as a GPU's, on which no kernel can run: they are on the CPU, without the interpreter."""
    pytest.importorskip("triton", reason="triton is not installed: pip install 'esper-morph[triton]'")
    monkeypatch.setattr(dispatch, "INTERPRETED", True)
    yield


def _record(y: Tensor) -> Tensor:
    out = torch.full((2, 2), float("nan"))
    record_statistics(out, y, -1, 100, torch.tensor([0, 0, 1]), torch.tensor([2.0, 1.0]))
    return out


@pytest.mark.parametrize(
    ("word", "meant"), [("", None), ("auto", None), ("reference", "reference"), ("triton", "triton")]
)
def test_what_can_be_forced(word: str, meant: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESPER_OPS", word)
    assert dispatch.forced() == meant


def test_another_word_is_refused(monkeypatch: pytest.MonkeyPatch, as_on_a_gpu: None) -> None:
    monkeypatch.setenv("ESPER_OPS", "cuda")
    with pytest.raises(ConfigError, match=r"ESPER_OPS must be reference, triton or unset, got 'cuda'"):
        dispatch.runs_triton("telemetry", torch.empty(0))


@pytest.mark.parametrize("word", ["", "triton", "reference"])
def test_the_cpu_takes_the_reference(word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESPER_OPS", word)
    assert not any(dispatch.runs_triton(operation, torch.empty(0)) for operation in dispatch.OPERATIONS)
    dispatch.prepare(CPU)


def test_kernels_that_do_not_work_are_said_once_and_replaced(as_on_a_gpu: None) -> None:
    y = torch.randn(9, 3)
    with pytest.warns(RuntimeWarning, match=r"using plain PyTorch .*ESPER_OPS=reference silences") as said:
        found = _record(y)
        for operation in dispatch.OPERATIONS:
            assert not dispatch.runs_triton(operation, y)
    assert len(said) == 1
    assert torch.equal(found, chunk_statistics(y, torch.tensor([0, 0, 1]), torch.tensor([2.0, 1.0])))


def test_a_missing_triton_is_said_once(as_on_a_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("esper.kasmina.ops.") and name.endswith(".triton")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.warns(RuntimeWarning, match=r"Triton cannot be imported.*pip install 'esper-morph\[triton\]'") as said:
        assert not any(dispatch.runs_triton(operation, torch.empty(0)) for operation in dispatch.OPERATIONS)
    assert len(said) == 1


def test_forced_kernels_that_do_not_work_are_an_error(as_on_a_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESPER_OPS", "triton")
    with pytest.raises(EsperError, match=r"ESPER_OPS=triton needs working kernels, but the graft kernels"):
        dispatch.runs_triton("graft", torch.empty(0))


def test_a_forced_reference_is_silent(as_on_a_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESPER_OPS", "reference")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not dispatch.runs_triton("graft", torch.empty(0))


def test_kernels_that_compute_something_else_are_not_used(as_on_a_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from esper.kasmina.ops.slot_adam import triton as kernels

    monkeypatch.setattr(kernels, "step", lambda *_: None)  # leaves everything as it was
    with pytest.warns(RuntimeWarning, match="slot_adam must agree with its reference"):
        assert not dispatch.runs_triton("slot_adam", torch.empty(0))


def test_disagreement_is_found_in_any_form() -> None:
    one = torch.ones(3)
    dispatch.agree("op", [(one, one + 1e-7)], 1e-6)
    for other in (one + 1e-3, one * float("nan"), one * float("inf")):
        with pytest.raises(dispatch.DisagreementError, match="op must agree with its reference within 1e-06, result 0"):
            dispatch.agree("op", [(other, one)], 1e-6)


def test_without_kernels_the_nodes_of_a_graph_run_the_reference(as_on_a_gpu: None) -> None:
    """The compiled path on a GPU whose kernels do not build: the same values and gradients."""
    source = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(shape, generator=source)  # noqa: E731
    for features, columns in ((9, torch.randperm(9, generator=source)[:6]), (6, torch.randperm(6, generator=source))):
        seats = Seats.of(columns.view(3, 2), features, CPU)
        y = draw(2, 5, features)
        params = [draw(3, 4, 2), draw(3, 4), draw(3, 2, 4), draw(3)]
        results: list[list[Tensor]] = []
        for compiled in (True, False):
            leaves = [value.clone().requires_grad_() for value in (y, *params)]
            if compiled:
                run = torch.compile(
                    lambda y, *rest, seats=seats: graft(y, *rest, seats), backend="aot_eager", fullgraph=True
                )
                with pytest.warns(RuntimeWarning) if features == 9 else warnings.catch_warnings():
                    out = run(*leaves)
            else:
                out = reference.graft(*leaves, seats.flat)
            results.append([out.detach(), *torch.autograd.grad(out.square().sum(), leaves)])
        for got, wanted in zip(*results, strict=True):
            torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)
