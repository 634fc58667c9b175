"""The telemetry op against float64 NumPy, at odd sizes, on poisoned memory."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from esper.kasmina.chunks import chunk_bounds
from esper.kasmina.ops.telemetry import chunk_statistics
from esper.kasmina.ops.telemetry.reference import row_step
from esper.kasmina.telemetry import TelemetryBuffer

pytestmark = pytest.mark.unit


def _layout(features: int, chunks: int) -> tuple[np.ndarray, torch.Tensor, torch.Tensor]:
    bounds = chunk_bounds(features, chunks)
    sizes = np.diff(bounds)
    return bounds, torch.from_numpy(np.repeat(np.arange(chunks), sizes)), torch.from_numpy(sizes.astype(np.float32))


def _numpy(y: torch.Tensor, bounds: np.ndarray) -> np.ndarray:
    exact = y.double().numpy()
    parts = [exact[:, a:b] for a, b in itertools.pairwise(bounds)]
    return np.array([[part.mean() for part in parts], [part.var() for part in parts]])


@pytest.mark.parametrize(
    ("rows", "features", "chunks"), [(1, 1, 1), (5, 123, 7), (123, 5, 5), (33, 257, 64), (2, 3, 2)]
)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 1e-5), (torch.bfloat16, 1e-5)], ids=str
)
def test_equals_float64(
    deterministic: None, rows: int, features: int, chunks: int, dtype: torch.dtype, tolerance: float
) -> None:
    bounds, chunk_of, sizes = _layout(features, chunks)
    y = (torch.randn(rows, features) * 3 + 1).to(dtype)
    out = chunk_statistics(y, chunk_of, sizes)
    assert out.dtype == torch.float32 and out.shape == (2, chunks) and not out.requires_grad
    np.testing.assert_allclose(out.numpy(), _numpy(y, bounds), rtol=tolerance, atol=tolerance)


def test_a_large_mean_does_not_cancel_the_variance() -> None:
    bounds, chunk_of, sizes = _layout(12, 3)
    y = torch.randn(500, 12) + 10_000.0
    np.testing.assert_allclose(chunk_statistics(y, chunk_of, sizes).numpy(), _numpy(y, bounds), rtol=2e-4)


@given(st.integers(1, 40), st.integers(1, 40), st.data())
def test_every_feature_counts_once(rows: int, features: int, data: st.DataObject) -> None:
    bounds, chunk_of, sizes = _layout(features, data.draw(st.integers(1, features)))
    y = torch.randn(rows, features, generator=torch.Generator().manual_seed(rows * 41 + features))
    np.testing.assert_allclose(chunk_statistics(y, chunk_of, sizes).numpy(), _numpy(y, bounds), rtol=1e-4, atol=1e-5)


def test_values_that_are_not_finite_show_in_their_chunk_only() -> None:
    _, chunk_of, sizes = _layout(6, 3)
    y = torch.ones(4, 6)
    y[1, 2] = float("nan")
    out = chunk_statistics(y, chunk_of, sizes)
    assert torch.isnan(out).tolist() == [[False, True, False]] * 2


@pytest.mark.parametrize(
    ("total", "most", "step"), [(8, 8, 1), (5, 8, 1), (9, 8, 3), (64, 8, 9), (72, 8, 9), (73, 8, 11)]
)
def test_rows_that_are_read_reach_over_the_batch_at_an_odd_step(total: int, most: int, step: int) -> None:
    assert row_step(total, most) == step
    assert len(range(0, total, step)) <= most and total - 1 - range(0, total, step)[-1] < step


@pytest.mark.parametrize("shape", [(64, 6), (4, 16, 6)])
def test_a_buffer_reads_rows_strided_over_the_whole_batch(shape: tuple[int, ...]) -> None:
    buffer = TelemetryBuffer(chunk_bounds(6, 2), 8, torch.device("cpu"))
    assert np.isnan(buffer.snapshot()).all() and not buffer.reported
    y = torch.randn(shape, requires_grad=True)
    buffer.record(y, -1)
    np.testing.assert_allclose(
        buffer.snapshot()[:2], _numpy(y.detach().reshape(-1, 6)[::9], chunk_bounds(6, 2)), rtol=1e-5, atol=1e-6
    )
    assert buffer.reported and np.isnan(buffer.snapshot()[2]).all()


def test_channels_of_images_are_the_features() -> None:
    buffer = TelemetryBuffer(chunk_bounds(4, 4), 10_000, torch.device("cpu"))
    y = torch.randn(3, 4, 5, 5)
    buffer.record(y, 1)
    np.testing.assert_allclose(buffer.snapshot()[0], y.mean((0, 2, 3)).numpy(), rtol=1e-4, atol=1e-6)
    g = torch.randn(3, 4, 5, 5)
    buffer.record_gradient(g, 1)
    np.testing.assert_allclose(buffer.snapshot()[2], g.square().mean((0, 2, 3)).numpy(), rtol=1e-5)
