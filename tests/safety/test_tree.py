"""State trees: what is split joins again, bit for bit, and every difference changes the digest."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from esper.errors import StateError
from esper.safety.tree import copy_of, digest, join, split

pytestmark = pytest.mark.unit

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool)


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    values = torch.randn(shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
    return (values * 3).to(draw(st.sampled_from(DTYPES)))


@st.composite
def arrays(draw: st.DrawFn) -> np.ndarray[Any, Any]:
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    dtype = draw(st.sampled_from(("f4", "i8", "u4", "?", "i1")))
    return np.random.default_rng(draw(st.integers(0, 99))).integers(0, 2, shape).astype(dtype)


plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6) | st.binary(max_size=4)
keys = st.text(max_size=4) | st.integers(0, 9) | st.just("$")
trees = st.recursive(
    plain | tensors() | arrays(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(keys, inner, max_size=3).filter(lambda d: len({str(key) for key in d}) == len(d))
    ),
    max_leaves=8,
)


def same(a: Any, b: Any) -> bool:
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and bool((a == b).all())
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float) and math.isnan(a):
        return math.isnan(b)
    return a == b and math.copysign(1, a) == math.copysign(1, b) if isinstance(a, float) else a == b


@given(trees)
def test_a_tree_comes_back_through_json_as_it_was(tree: Any) -> None:
    document, parts = split(tree)
    back = join(json.loads(json.dumps(document, allow_nan=False)), parts)
    assert same(tree, back)
    assert digest(tree) == digest(back)


@given(trees, trees)
def test_equal_digests_mean_equal_trees(a: Any, b: Any) -> None:
    assert (digest(a) == digest(b)) == same(a, b)


@given(trees)
def test_a_copy_shares_no_memory(tree: Any) -> None:
    copied = copy_of(tree)
    before = digest(copied)
    for tensor in split(tree)[1].values():
        if tensor.numel():
            tensor.view(torch.uint8 if tensor.dim() else tensor.dtype).fill_(1)
    assert digest(copied) == before


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        ({"a": [object()]}, "object at '/a/0'"),
        ({"a": {(1, 2): 3}}, "key in a state is a plain value, got tuple"),
        ({1: 0, "1": 0}, "differ as text"),
        (np.array([object()]), "dtype object"),
        ({"a": {1, 2}}, "set at '/a'"),
        (np.float64(1), "float64"),
    ],
)
def test_what_cannot_be_kept_is_refused_with_its_place(tree: Any, said: str) -> None:
    with pytest.raises(StateError, match=said):
        split(tree)


def test_keys_with_slashes_do_not_meet() -> None:
    tree = {"a/b": torch.zeros(1), "a": {"b": torch.ones(1)}, "a~1b": torch.ones(2)}
    document, parts = split(tree)
    assert len(parts) == 3
    assert same(tree, join(document, parts))


def test_a_tree_without_end_is_refused() -> None:
    tree: list[Any] = []
    tree.append(tree)
    with pytest.raises(StateError, match="64 deep"):
        split(tree)


@pytest.mark.parametrize(
    "document",
    [
        {"$": "tensor", "v": "/b"},
        {"$": "tensor", "v": []},
        {"$": "import", "v": "os.system"},
        {"$": ["float"], "v": 1},
        {"$": "float", "v": "1e999"},
        {"$": "bytes", "v": "zz"},
        {"$": "bytes"},
        {"$": "tuple", "v": 3},
        {"$": "dict", "v": [[1]]},
        {"$": "dict", "v": [[[1], 2]]},
        {"$": "array", "v": "", "dtype": "O", "shape": [1]},
        {"$": "array", "v": "", "dtype": "f4", "shape": [3]},
        {"$": "array", "v": "", "dtype": "no such", "shape": [1]},
        {"$": "array", "v": ""},
        [{"$": "tensor", "v": ""}],
    ],
)
def test_a_damaged_document_is_refused(document: Any) -> None:
    with pytest.raises(StateError):
        join(document, {"": torch.zeros(8, dtype=torch.uint8)})


def test_a_tensor_without_a_place_is_refused() -> None:
    with pytest.raises(StateError, match="1 without one"):
        join({"a": 1}, {"/b": torch.zeros(1)})
