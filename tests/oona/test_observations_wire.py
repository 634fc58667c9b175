"""Every field of an observation crosses the bus, whatever a later version adds to it."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from esper.errors import EnvelopeError
from esper.oona import observations
from esper.protocol import SITE_FEATURES, Observation

pytestmark = pytest.mark.unit


def full(num_sites: int = 3, num_alternatives: int = 2) -> Observation:
    draw = np.random.default_rng(num_sites)
    floats = draw.normal(size=(num_sites,))
    floats[:1] = math.nan
    table = draw.normal(size=(num_sites, num_alternatives))
    return Observation(
        step=7, total_steps=None, held_out=math.nan, held_out_initial=2.5, params=10, host_params=9,
        budget_params=None, flops_per_step=1.5, host_flops_per_step=1.0, budget_flops=None,
        site_names=tuple(f"s{i}" for i in range(num_sites)), sites=draw.normal(size=(num_sites, len(SITE_FEATURES))),
        hidden=np.arange(num_sites), grown=np.arange(num_sites), eligible=np.ones(num_sites, dtype=np.bool_),
        chunk_site=np.zeros(0, dtype=np.int64), chunk_index=np.zeros(0, dtype=np.int64), chunk_pressure=np.zeros(0),
        alive=(), verdicts=(), stopped="enough", unit_params=floats, unit_flops=floats + 1, train_loss=0.5,
        loss_noise=math.nan, lr_share=0.25, price=0.1, fit_explained=floats, fit_error=floats * 2,
        alternatives=tuple(f"b{i}" for i in range(num_alternatives)), alternative_params=table,
        alternative_flops=table + 1, kinds=("linear_span",) * num_sites, offers=((("a", "b"), ("c", "d")),) * num_sites,
        family="mlp", optimizer="adamw", untold=3,
    )  # fmt: skip


def same(a: object, b: object) -> bool:
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and a.dtype == b.dtype and np.array_equal(a, b, equal_nan=a.dtype.kind == "f")
    return a == b or (isinstance(a, float) and isinstance(b, float) and math.isnan(a) and math.isnan(b))


@pytest.mark.parametrize("num_sites", [0, 1, 5000])
def test_every_field_crosses(num_sites: int) -> None:
    sent = full(num_sites)
    read = observations.decode(observations.encode(sent))
    for field in dataclasses.fields(Observation):
        assert same(getattr(sent, field.name), getattr(read, field.name)), field.name


def test_the_example_sets_every_field() -> None:
    given = full()
    for field in dataclasses.fields(Observation):
        if field.default is not dataclasses.MISSING:
            assert not same(getattr(given, field.name), field.default) or field.name == "loss_noise", field.name


def test_an_earlier_sender_is_understood() -> None:
    names = {f.name: f.default for f in dataclasses.fields(Observation) if f.default is not dataclasses.MISSING}
    sent = dataclasses.replace(full(), **names)
    assert observations.decode(observations.encode(sent)).unit_params is None


def test_what_does_not_go_together_is_refused() -> None:
    with pytest.raises(EnvelopeError, match="of all 3 sites"):
        observations.decode(observations.encode(dataclasses.replace(full(), kinds=("linear_span",))))
