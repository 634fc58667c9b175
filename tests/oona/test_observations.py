"""An observation crosses the wire exactly: NaN, empty arrays, missing fields and thousands of sites."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from esper.errors import EnvelopeError
from esper.oona import arrays, observations
from esper.oona.claims import CLAIM_BYTES
from esper.protocol import SITE_FEATURES, CohortView, Lifecycle, Observation, Verdict

pytestmark = pytest.mark.unit

_ANY = st.floats(allow_nan=True, allow_infinity=True)
_COUNT = st.integers(0, 2**53)
_NAMES = st.tuples() | st.tuples(st.text(max_size=9), st.text(max_size=9))


@st.composite
def views(draw: st.DrawFn) -> CohortView:
    return CohortView(
        cohort=draw(_COUNT), state=draw(st.sampled_from(Lifecycle)), steps_in_state=draw(_COUNT), sites=draw(_NAMES),
        num_seeds=draw(_COUNT), alpha=draw(_ANY), added_params=draw(_COUNT),
    )  # fmt: skip


@st.composite
def verdicts(draw: st.DrawFn) -> Verdict:
    return Verdict(
        cohort=draw(_COUNT), step=draw(_COUNT), state=draw(st.sampled_from(Lifecycle)), sites=draw(_NAMES),
        gain=draw(_ANY), gain_low=draw(_ANY), gain_high=draw(_ANY), added_params=draw(st.integers(-9, 9)),
        added_flops_share=draw(_ANY), reason=draw(st.text(max_size=9)), gain_shrunken=draw(_ANY),
    )  # fmt: skip


@st.composite
def all_observations(draw: st.DrawFn) -> Observation:
    num_sites = draw(st.integers(0, 5))
    num_chunks = draw(st.integers(0, 4)) if num_sites else 0

    def array(kind: Any, *shape: int, values: Any = None) -> Any:
        return draw(hnp.arrays(kind, shape, elements=values))

    return Observation(
        step=draw(_COUNT), total_steps=draw(st.none() | _COUNT), held_out=draw(_ANY), held_out_initial=draw(_ANY),
        params=draw(_COUNT), host_params=draw(_COUNT), budget_params=draw(st.none() | _COUNT),
        flops_per_step=draw(_ANY), host_flops_per_step=draw(_ANY), budget_flops=draw(st.none() | _ANY),
        site_names=tuple(draw(st.lists(st.text(max_size=9), min_size=num_sites, max_size=num_sites))),
        sites=array(np.float64, num_sites, len(SITE_FEATURES)), hidden=array(np.int64, num_sites),
        grown=array(np.int64, num_sites), eligible=array(np.bool_, num_sites),
        chunk_site=array(np.int64, num_chunks, values=st.integers(0, max(num_sites - 1, 0))),
        chunk_index=array(np.int64, num_chunks), chunk_pressure=array(np.float64, num_chunks),
        alive=tuple(draw(st.lists(views(), max_size=2))), verdicts=tuple(draw(st.lists(verdicts(), max_size=2))),
        stopped=draw(st.none() | st.text(max_size=9)),
        unit_params=draw(st.none() | hnp.arrays(np.float64, num_sites)),
        unit_flops=draw(st.none() | hnp.arrays(np.float64, num_sites)),
    )  # fmt: skip


def same(left: Any, right: Any) -> bool:
    """Equal in type and value, bit for bit in arrays; NaN equals NaN."""
    if isinstance(left, np.ndarray):
        return (left.dtype, left.shape, left.tobytes()) == (right.dtype, right.shape, right.tobytes())
    return type(left) is type(right) and repr(left) == repr(right)


def differences(left: Observation, right: Observation) -> list[str]:
    names = [field.name for field in dataclasses.fields(Observation)]
    return [name for name in names if not same(getattr(left, name), getattr(right, name))]


@settings(max_examples=60)
@given(all_observations())
def test_what_is_written_is_read(sent: Observation) -> None:
    assert differences(sent, observations.decode(observations.encode(sent))) == []


def a_large_one(num_sites: int) -> Observation:
    rng = np.random.default_rng(0)
    return Observation(
        step=100, total_steps=None, held_out=float("nan"), held_out_initial=2.5, params=10**9, host_params=10**9,
        budget_params=None, flops_per_step=1e15, host_flops_per_step=1e15, budget_flops=None,
        site_names=tuple(f"model.layers.{n}.mlp.down_proj" for n in range(num_sites)),
        sites=rng.normal(size=(num_sites, len(SITE_FEATURES))), hidden=np.arange(num_sites),
        grown=np.zeros(num_sites, np.int64), eligible=np.ones(num_sites, np.bool_),
        chunk_site=np.zeros(64, np.int64), chunk_index=np.arange(64), chunk_pressure=rng.normal(size=64), alive=(),
        verdicts=(), stopped=None, unit_params=rng.normal(size=num_sites), unit_flops=None,
    )  # fmt: skip


def test_five_thousand_sites_need_no_claim() -> None:
    sent = a_large_one(5_000)
    data = observations.encode(sent)
    assert len(data) < CLAIM_BYTES
    assert differences(sent, observations.decode(data)) == []


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"sites": np.zeros((3, 2))}, "'sites'"), ({"hidden": np.zeros(3, np.int32)}, "'hidden'"),
        ({"eligible": np.zeros(4, np.bool_)}, "'eligible'"), ({"chunk_index": np.arange(3)}, "'chunk_index'"),
        ({"chunk_site": np.array([3] * 64)}, "one of 3 sites"), ({"chunk_site": np.array([-1] * 64)}, "one of 3 sites"),
        ({"unit_params": np.zeros(2)}, "'unit_params'"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused(change: dict[str, Any], says: str) -> None:
    sent = dataclasses.replace(a_large_one(3), **change)
    with pytest.raises(EnvelopeError, match=says):
        observations.decode(observations.encode(sent))


def test_a_missing_array_or_head_is_refused() -> None:
    head = {"step": 1}
    with pytest.raises(EnvelopeError, match="what their schema says"):
        observations.decode(arrays.pack(head, {}))
    from safetensors.numpy import save

    for wrong in ({}, {"head": np.zeros(3)}, {"head": np.zeros((2, 2), np.uint8)}):
        with pytest.raises(EnvelopeError, match="a row of bytes"):
            observations.decode(save({"other": np.zeros(1), **wrong}))


@pytest.mark.parametrize("size", [0, 1 << 17, 1 << 40, (1 << 64) - 1])
def test_a_header_that_lies_about_its_size_is_refused(size: int) -> None:
    with pytest.raises(EnvelopeError):
        observations.decode(size.to_bytes(8, "little") + b"{}" * 100)


def test_what_has_no_form_is_not_sent() -> None:
    with pytest.raises(EnvelopeError, match="a form in safetensors"):
        arrays.pack({}, {"x": np.array([object()])})
    with pytest.raises(EnvelopeError, match="a form in JSON"):
        arrays.pack({"x": object()}, {})


@settings(max_examples=200)
@given(st.integers(0, 2**32), st.integers(1, 6))
def test_damage_is_refused_or_read_and_nothing_else(seed: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    data = bytearray(observations.encode(a_large_one(3)))
    for at in rng.integers(0, len(data) if seed % 2 else 900, count):
        data[at] = rng.integers(256)
    try:
        assert isinstance(observations.decode(bytes(data)), Observation)
    except EnvelopeError as error:
        assert str(error)
