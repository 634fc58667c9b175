"""Compiled hosts under mixed precision and activation checkpointing: the same telemetry and gradients as uncompiled."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pytest
import torch
from tests.models import Mlp, Transformer, mse, tokens
from tests.rigs import EVERY, Rig, attach, branch_gradients, graft, host_gradients
from torch import Tensor

pytestmark = pytest.mark.integration


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the compiler's own
        warnings.simplefilter("ignore", FutureWarning)
        yield
    torch._dynamo.reset()


def seen(rig: Rig) -> npt.NDArray[np.float32]:
    """Mean and variance of every chunk of every site."""
    buffers = [site.telemetry for site in rig.grower.kasmina.sites.values() if site.telemetry is not None]
    return np.concatenate([buffer.snapshot()[:2].reshape(-1) for buffer in buffers])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16-scaled"])
def test_mixed_precision(dtype: torch.dtype) -> None:
    """A branch in the forward pass learns as uncompiled, steps that the scaler skips among them."""
    ends: list[dict[str, Tensor]] = []
    sensed: list[npt.NDArray[np.float32]] = []
    for compiled in (False, True):
        torch.manual_seed(2)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**17, enabled=dtype is torch.float16)
        rig = attach(Mlp(), telemetry=EVERY, track=[scaler])
        cohort = graft(rig, "fc1-fc2", "fc2-fc3")
        model = torch.compile(rig.model, backend="aot_eager", fullgraph=True) if compiled else rig.model
        for batch in rig.batches[:3] * 10:
            with torch.autocast("cpu", dtype):
                loss = mse(model, batch)
            scaler.scale(loss).backward()
            scaler.step(rig.optimizer)
            scaler.update()
            rig.optimizer.zero_grad()
            rig.grower.step(loss)
        assert dtype is torch.bfloat16 or scaler.get_scale() < 2.0**17, "steps were to be skipped"
        ends.append({f"{s}.{n}": v.detach() for s in cohort.sites for n, v in rig.bank(cohort, s).params.items()})
        ends[-1] |= {name: value.detach() for name, value in rig.model.named_parameters()}
        sensed.append(seen(rig))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, rtol=2e-2, atol=2e-3, msg=lambda text, n=name: f"{n}: {text}")
    np.testing.assert_allclose(sensed[1], sensed[0], rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("mode", ["reentrant", "non-reentrant"])
def test_checkpointing_stays_compiled(mode: str) -> None:
    """One whole graph; telemetry and all gradients are those of the host uncompiled and without checkpointing."""
    gradients: list[dict[str, Tensor]] = []
    sensed: list[npt.NDArray[np.float32]] = []
    for recompute in (None, mode):
        torch.manual_seed(4)
        rig = attach(Transformer(0.0, recompute), batches=tokens(10), held_out=tokens(16, seed=7), telemetry=EVERY)
        cohort = graft(rig, "ffn.0.up-down", "ffn.1.up-down")
        rig.optimizer.zero_grad()
        model = torch.compile(rig.model, backend="aot_eager", fullgraph=True) if recompute else rig.model
        mse(model, rig.batches[0]).backward()
        before = {name: site.telemetry.reports for name, site in rig.grower.kasmina.sites.items() if site.telemetry}
        rig.grower.kasmina.note_rows(rig.grower.clock.steps)
        if recompute:
            assert all(rig.grower.kasmina.sites[n].telemetry.reports == count + 1 for n, count in before.items())  # type: ignore[union-attr]
        assert all(rows == 4 * 6 for rows in rig.grower.kasmina.rows_per_step.values())
        gradients.append({**branch_gradients(rig, cohort), **host_gradients(rig)})
        sensed.append(seen(rig))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    for name, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], value, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(sensed[1], sensed[0], rtol=1e-5, atol=1e-6)
