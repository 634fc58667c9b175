"""Captured rows are the right ones, normalised, within budget, and taken without touching the host."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.example_sites import EXAMPLES
from torch import Tensor

from esper.kasmina.capture import Capture, rows_per_batch
from esper.kasmina.geometry import Geometry
from esper.protocol import SiteKind

pytestmark = pytest.mark.unit

LINEAR = EXAMPLES[SiteKind.LINEAR_SPAN][0].geometry
CONV = EXAMPLES[SiteKind.CONV_SPAN][0].geometry


def _capture(geometry: Geometry = LINEAR, *, batches: int = 2, rows: int = 1000) -> Capture:
    return Capture(geometry, num_batches=batches, rows_per_batch=rows, generator=torch.Generator().manual_seed(0))


def _feed(
    capture: Capture, shape: tuple[int, ...], *, scale: float = 1.0, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """One forward and backward; returns x, y and dL/dy (before scaling)."""
    generator = torch.Generator().manual_seed(seed)
    axis = 1 if capture.geometry.kind.is_conv else len(shape) - 1
    y_shape = [*shape]
    y_shape[axis] = capture.geometry.out_features
    x = torch.randn(shape, generator=generator)
    y = torch.randn(y_shape, generator=generator).requires_grad_()
    g = torch.randn(y_shape, generator=generator)
    capture.record(x, y)
    (y * g * scale).sum().backward()
    return x, y.detach(), g


def test_rows_of_x_y_and_gradient_belong_together() -> None:
    capture = _capture(rows=7)
    fed = [_feed(capture, (4, 5, 5), seed=i) for i in range(2)]
    rows = capture.rows()
    assert rows.x.shape == (14, 5) and rows.y.shape == rows.g.shape == (14, 6)
    for row in range(14):
        x, y, g = fed[int(rows.batch[row])]
        where = (x.reshape(-1, 5) == rows.x[row]).all(1).nonzero().item()
        assert torch.equal(y.reshape(-1, 6)[where], rows.y[row])
        own = g.reshape(-1, 6)[where]
        torch.testing.assert_close(rows.g[row] / rows.g[row].norm(), own / own.norm())
        assert int(rows.cluster[row]) % 4 == where // 5, "rows of one sequence share a cluster"
    assert len(torch.unique(rows.x, dim=0)) == 14, "no row twice"
    assert rows.positions == 14


@given(st.integers(1, 60), st.integers(1, 60), st.integers(0, 1 << 16))
def test_no_row_is_drawn_twice_and_every_stretch_gives_its_share(total: int, wanted: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    capture = Capture(LINEAR, num_batches=1, rows_per_batch=wanted, generator=generator)
    x = torch.arange(float(total))[:, None].expand(-1, 5)
    y = torch.zeros(total, 6, requires_grad=True)
    capture.record(x, y)
    y.sum().backward()
    drawn = capture.rows().x[:, 0].long()
    size = min(total, wanted)
    assert len(drawn) == size and len(torch.unique(drawn)) == size
    assert all(int(row) in range(i * total // size, (i + 1) * total // size) for i, row in enumerate(drawn))


def test_clusters_of_different_batches_differ() -> None:
    capture = _capture(batches=3)
    for i in range(3):
        _feed(capture, (4, 2, 5), seed=i)
    rows = capture.rows()
    for one in range(3):
        for other in range(one):
            shared = set(rows.cluster[rows.batch == one].tolist()) & set(rows.cluster[rows.batch == other].tolist())
            assert not shared


def test_images_are_kept_whole() -> None:
    capture = _capture(CONV, rows=3)
    x, y, g = _feed(capture, (5, 3, 6, 6))
    _feed(capture, (5, 3, 6, 6), seed=1)
    rows = capture.rows()
    assert rows.x.shape == (6, 3, 6, 6) and rows.g.shape == (6, 6, 6, 6) and rows.positions == 6 * 36
    for row in range(3):
        where = [bool(torch.equal(image, rows.x[row])) for image in x].index(True)
        assert torch.equal(y[where], rows.y[row]) and int(rows.cluster[row]) == where
        torch.testing.assert_close(rows.g[row] / rows.g[row].norm(), g[where] / g[where].norm())


@pytest.mark.parametrize("scale", [2.0**16, 1e-3, 3.0])
def test_loss_scaling_does_not_matter(scale: float) -> None:
    plain, scaled = _capture(), _capture()
    for i in range(2):
        _feed(plain, (8, 5), seed=i)
        _feed(scaled, (8, 5), seed=i, scale=scale * (i + 1))
    torch.testing.assert_close(scaled.rows().g, plain.rows().g)
    for number in range(2):
        part = plain.rows().g[plain.rows().batch == number]
        assert float(part.square().mean()) == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize("scale", [math.nan, math.inf, 0.0])
def test_batches_without_a_usable_gradient_are_dropped_and_counted(scale: float) -> None:
    capture = _capture(batches=3)
    _feed(capture, (8, 5))
    _feed(capture, (8, 5), seed=1, scale=scale)
    _feed(capture, (8, 5), seed=2)
    rows = capture.rows()
    assert capture.full and capture.dropped_batches == 1
    assert torch.unique(rows.batch).tolist() == [0, 2] and len(rows.x) == 16
    assert torch.isfinite(rows.g).all()
    assert len(capture.rows().x) == 16 and capture.dropped_batches == 1, "reading twice counts once"


def test_inputs_that_are_not_finite_are_dropped_too() -> None:
    capture = _capture(batches=1)
    x, y = torch.randn(4, 5), torch.randn(4, 6, requires_grad=True)
    x[2, 1] = math.inf
    capture.record(x, y)
    y.sum().backward()
    assert len(capture.rows().x) == 0 and capture.dropped_batches == 1


def test_copies_are_taken_before_the_user_edits() -> None:
    capture = _capture(batches=1)
    x, y = torch.randn(4, 5), torch.randn(4, 6, requires_grad=True)
    kept = x.clone()
    capture.record(x, y)
    x.zero_()
    out = torch.relu_(y * 1.0)
    out.sum().backward()
    rows = capture.rows()
    assert torch.equal(rows.x.sort(0).values, kept.sort(0).values)


def test_stops_when_full_and_ignores_what_has_no_gradient() -> None:
    capture = _capture(batches=1)
    capture.record(torch.randn(4, 5), torch.randn(4, 6))
    assert capture.filled == 0
    y1, y2 = torch.randn(4, 6, requires_grad=True), torch.randn(4, 6, requires_grad=True)
    capture.record(torch.randn(4, 5), y1)
    capture.record(torch.randn(4, 5), y2)  # two forwards before one backward
    (y1.sum() + y2.sum()).backward()
    assert capture.filled == 1 and capture.full
    _feed(capture, (4, 5))
    assert capture.filled == 1
    assert capture.num_bytes == 4 * 5 * 4 + 2 * 4 * 6 * 4 + 4 * 8


def test_starts_again_when_the_site_reads_more() -> None:
    capture = _capture(batches=3)
    _feed(capture, (4, 5))
    _feed(capture, (4, 5), seed=1)
    for i in range(3):
        _feed(capture, (4, 7), seed=2 + i)
    assert capture.full and capture.rows().x.shape == (12, 7)


def test_draws_from_its_own_generator(unchanged_rng: None) -> None:
    rows = []
    for _ in range(2):
        capture = _capture(rows=3)
        _feed(capture, (20, 5))
        rows.append(capture.rows().x)
    assert torch.equal(rows[0], rows[1])


def test_an_empty_capture_has_no_rows() -> None:
    rows = _capture().rows()
    assert len(rows.x) == len(rows.g) == 0 and len(torch.unique(rows.batch)) == 0


@given(
    st.sampled_from([LINEAR, CONV, EXAMPLES[SiteKind.CONV_LAYER][0].geometry]),
    st.integers(1, 5000),
    st.integers(1, 64),
    st.integers(16, 200_000),
    st.integers(2, 16),
    st.integers(1 << 16, 1 << 24),
)  # fmt: skip
def test_the_byte_budget_holds(
    geometry: Geometry, positions: int, samples: int, rows: int, batches: int, max_bytes: int
) -> None:
    batch_rows = positions * samples
    kept = rows_per_batch(geometry, batch_rows, samples, rows=rows, batches=batches, max_bytes=max_bytes)
    assert 1 <= kept <= (samples if geometry.kind.is_conv else batch_rows)
    stride = geometry.head_conv.stride[0] ** 2 if geometry.head_conv is not None else 1
    each = positions if geometry.kind.is_conv else 1
    size = 4 * each * (geometry.in_features * stride + 2 * geometry.out_features)
    assert kept == 1 or kept * size * batches <= max_bytes
