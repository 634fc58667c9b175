"""What runs under compute-sanitizer: every kernel of every operation is reached, without a GPU to try it on."""

from __future__ import annotations

import importlib

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: pip install 'esper-morph[triton]'")

from benchmarks.ops import sanitize
from tests.kasmina.ops.ahead_of_time import recorded
from triton.runtime.jit import JITFunction

from esper.kasmina.ops import dispatch

pytestmark = pytest.mark.component

CPU = torch.device("cpu")


@pytest.mark.parametrize("operation", dispatch.OPERATIONS)
def test_a_walk_launches_every_kernel(operation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Launches are noted instead of done: what they are given is what a GPU would be given."""
    monkeypatch.setattr(dispatch, "INTERPRETED", True)
    monkeypatch.setattr(dispatch, "_verdicts", {(operation, CPU): True})
    kernels = importlib.import_module(f"esper.kasmina.ops.{operation}.triton")
    every = {
        name for name, value in vars(kernels).items() if isinstance(value, JITFunction) and name.endswith("_kernel")
    }
    with recorded(kernels) as launches:
        calls = sanitize.walk(operation, CPU)
    assert calls >= 20 and len(launches) >= calls
    assert {launch.kernel.__name__ for launch in launches} == every


def test_every_operation_has_a_walk() -> None:
    assert tuple(sanitize.WALKS) == dispatch.OPERATIONS
