"""Chunks lose nothing, for any size."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from esper.errors import SiteError
from esper.kasmina.chunks import chunk_bounds, columns_of, default_num_chunks

pytestmark = pytest.mark.unit


@st.composite
def _sizes(draw: st.DrawFn) -> tuple[int, int]:
    features = draw(st.integers(1, 10_000))
    return features, draw(st.integers(1, features))


@given(_sizes())
def test_bounds_are_a_partition_into_nearly_equal_slices(sizes: tuple[int, int]) -> None:
    features, chunks = sizes
    bounds = chunk_bounds(features, chunks)
    assert bounds.dtype == np.int64 and bounds.shape == (chunks + 1,)
    assert bounds[0] == 0 and bounds[-1] == features
    widths = np.diff(bounds)
    assert widths.min() >= 1 and widths.max() - widths.min() <= 1


def test_every_split_of_every_small_size_is_lossless() -> None:
    for features in range(1, 40):
        x = torch.arange(3 * features, dtype=torch.float32).reshape(3, features)
        for chunks in range(1, features + 1):
            bounds = chunk_bounds(features, chunks)
            pieces = torch.tensor_split(x, bounds[1:-1].tolist(), dim=-1)
            assert len(pieces) == chunks
            assert torch.equal(torch.cat(pieces, dim=-1), x)
            assert all(torch.equal(a, b) for a, b in zip(pieces, torch.tensor_split(x, chunks, dim=-1), strict=True))


@given(_sizes(), st.data())
def test_columns_of_equals_a_plain_loop(sizes: tuple[int, int], data: st.DataObject) -> None:
    features, chunks = sizes
    chosen = data.draw(st.lists(st.integers(0, chunks - 1), max_size=30))
    bounds = chunk_bounds(features, chunks)
    expected = [column for c in chosen for column in range(bounds[c], bounds[c + 1])]
    columns = columns_of(bounds, chosen)
    assert columns.dtype == np.int64
    assert columns.tolist() == expected


@given(_sizes(), st.randoms(use_true_random=False))
def test_gather_and_scatter_through_columns_is_lossless(sizes: tuple[int, int], random: object) -> None:
    features, chunks = sizes
    order = list(range(chunks))
    random.shuffle(order)  # type: ignore[attr-defined]
    x = np.arange(features)
    columns = columns_of(chunk_bounds(features, chunks), order)
    restored = np.full(features, -1)
    restored[columns] = x[columns]
    assert np.array_equal(restored, x) and columns.size == features


def test_thousands_of_chunks_are_ordinary() -> None:
    bounds = chunk_bounds(1_000_003, 8192)
    assert np.array_equal(columns_of(bounds, np.arange(8192)), np.arange(1_000_003))


@pytest.mark.parametrize(("features", "expected"), [(1, 1), (64, 64), (1024, 1024), (1025, 1024), (50_000, 1024)])
def test_default_is_one_a_feature_up_to_1024(features: int, expected: int) -> None:
    assert default_num_chunks(features) == expected


@pytest.mark.parametrize("chunks", [100, 65, 0, -1])
def test_a_wrong_number_of_chunks_is_refused_with_the_remedy(chunks: int) -> None:
    with pytest.raises(SiteError) as caught:
        chunk_bounds(64, chunks)
    assert str(caught.value) == (
        f"chunks must be between 1 and out_features=64, got {chunks}; pass chunks=64 for one chunk a feature"
    )


@pytest.mark.parametrize("features", [0, -3])
def test_a_site_without_features_is_refused(features: int) -> None:
    with pytest.raises(SiteError, match="out_features must be at least 1"):
        chunk_bounds(features, 1)
    with pytest.raises(SiteError, match="out_features must be at least 1"):
        default_num_chunks(features)


@pytest.mark.parametrize("chunk", [-1, 8])
def test_a_chunk_outside_the_site_is_refused(chunk: int) -> None:
    with pytest.raises(SiteError, match=f"between 0 and 7, got {chunk}"):
        columns_of(chunk_bounds(64, 8), [0, chunk])


def test_a_mask_is_not_taken_for_indices() -> None:
    with pytest.raises(SiteError, match="must be integers, got bool"):
        columns_of(chunk_bounds(64, 8), np.ones(8, dtype=bool))
