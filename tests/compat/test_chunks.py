"""Splitting and concatenating loses nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.models import same_bits

from esper.compat import ChunkManager
from esper.errors import SiteError
from esper.kasmina.chunks import columns_of

pytestmark = pytest.mark.unit

DTYPES = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.complex64, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
)  # fmt: skip


@st.composite
def layouts(draw: st.DrawFn) -> tuple[int, int]:
    features = draw(st.integers(1, 300) | st.sampled_from([1024, 8192]))
    return features, draw(st.integers(1, features) | st.sampled_from([1, features]))


@given(layouts(), st.sampled_from(DTYPES), st.lists(st.integers(0, 3), max_size=3), st.integers(0, 2**32))
def test_split_and_concatenate_is_lossless(
    layout: tuple[int, int], dtype: torch.dtype, lead: list[int], seed: int
) -> None:
    """Every bit pattern: NaN payloads, -0.0 and infinities come back as they were."""
    features, num_chunks = layout
    size = torch.tensor([], dtype=dtype).element_size()
    source = torch.Generator().manual_seed(seed)
    raw = torch.randint(0, 2 if dtype is torch.bool else 256, (*lead, features * size), generator=source)
    x = raw.to(torch.uint8).view(dtype)
    manager = ChunkManager(features, num_chunks)
    chunks = manager.split(x)
    assert len(chunks) == num_chunks and all(chunk.dtype is dtype for chunk in chunks)
    widths = [chunk.shape[-1] for chunk in chunks]
    assert max(widths) - min(widths) <= 1 and sum(widths) == features
    assert all(chunk.data_ptr() == 0 or chunk._base is not None for chunk in chunks), "views, not copies"
    assert same_bits(manager.concatenate(chunks), x)


@given(layouts())
def test_chunks_are_the_columns_that_seeds_own(layout: tuple[int, int]) -> None:
    manager = ChunkManager(*layout)
    columns = torch.arange(layout[0])
    for number in {0, layout[1] // 2, layout[1] - 1}:
        assert manager.split(columns)[number].tolist() == columns_of(manager.bounds, number).tolist()


def test_gradients_pass_whole() -> None:
    x = torch.randn(3, 10, requires_grad=True)
    manager = ChunkManager(10, 4)
    (gradient,) = torch.autograd.grad((manager.concatenate(manager.split(x)) * torch.arange(10)).sum(), x)
    assert torch.equal(gradient, torch.arange(10.0).expand(3, 10))


def test_channels_of_a_convolution() -> None:
    x = torch.randn(2, 7, 5, 5)
    manager = ChunkManager(7, 3, dim=1)
    assert [tuple(chunk.shape) for chunk in manager.split(x)] == [(2, 3, 5, 5), (2, 2, 5, 5), (2, 2, 5, 5)]
    assert torch.equal(manager.concatenate(manager.split(x)), x)


def test_refusals() -> None:
    manager = ChunkManager(10, 4)
    with pytest.raises(SiteError, match=r"chunks must be between 1 and out_features=10, got 11; pass chunks=10"):
        ChunkManager(10, 11)
    with pytest.raises(SiteError, match=r"must have 10 features on axis -1, got shape \(3, 9\)"):
        manager.split(torch.zeros(3, 9))
    with pytest.raises(SiteError, match=r"got shape \(\)"):
        manager.split(torch.zeros(()))
    with pytest.raises(SiteError, match=r"got 3 with 7 features for 4 with 10; pass all of them, in order"):
        manager.concatenate(manager.split(torch.zeros(10))[1:])
    with pytest.raises(SiteError, match="in order"):
        manager.concatenate(manager.split(torch.zeros(10))[::-1])
    for wrong in (2.5, "4", None, True):
        with pytest.raises(SiteError, match=f"chunks must be a whole number, got {wrong!r}"):
            ChunkManager(10, wrong)  # type: ignore[arg-type]
    with pytest.raises(SiteError, match=r"out_features must be a whole number, got 10\.0"):
        ChunkManager(10.0, 2)  # type: ignore[arg-type]
    with pytest.raises(SiteError, match=r"must be a tensor, got list"):
        manager.split([0.0] * 10)  # type: ignore[arg-type]
    with pytest.raises(SiteError, match=r"on axis 5, got shape \(3, 10\)"):
        ChunkManager(10, 4, dim=5).split(torch.zeros(3, 10))


def test_numbers_and_sequences_of_any_make() -> None:
    manager, x = ChunkManager(np.int64(10), np.int32(4)), torch.arange(10)  # type: ignore[arg-type]
    assert torch.equal(manager.concatenate(iter(manager.split(x))), x)
