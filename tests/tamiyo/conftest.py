"""Observations as a run would show them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from esper.protocol import SITE_FEATURES, CohortView, Lifecycle, Observation, Verdict

Observe = Callable[..., Observation]


def site_rows(spans: int, layers: int, conv: bool, width: int, hidden: int) -> np.ndarray:
    sites = np.full((spans + layers, len(SITE_FEATURES)), np.nan)
    columns = {name: index for index, name in enumerate(SITE_FEATURES)}
    sites[:, columns["is_span"]] = [1.0] * spans + [0.0] * layers
    sites[:, columns["is_conv"]] = float(conv)
    sites[:, columns["log_in"]] = sites[:, columns["log_out"]] = math.log(width)
    sites[:spans, columns["log_hidden"]] = math.log(hidden)
    return sites


@pytest.fixture
def observe() -> Observe:
    """Build an observation of ``spans`` Linear spans (64 -> 32 -> 64) and ``layers`` layers (64 -> 64) at step 100."""

    def build(
        *, spans: int = 4, layers: int = 0, conv: bool = False, width: int = 64, hidden: int = 32, **changes: Any
    ) -> Observation:
        num = spans + layers
        fields: dict[str, Any] = {
            "step": 100,
            "total_steps": 1000,
            "held_out": 1.0,
            "held_out_initial": 2.0,
            "params": 20_000,
            "host_params": 20_000,
            "budget_params": None,
            "flops_per_step": 4e6,
            "host_flops_per_step": 4e6,
            "budget_flops": None,
            "site_names": tuple(f"blocks.{row}" for row in range(num)),
            "sites": site_rows(spans, layers, conv, width, hidden),
            "hidden": np.array([hidden] * spans + [0] * layers, dtype=np.int64),
            "grown": np.zeros(num, dtype=np.int64),
            "eligible": np.ones(num, dtype=np.bool_),
            "chunk_site": np.zeros(0, dtype=np.int64),
            "chunk_index": np.zeros(0, dtype=np.int64),
            "chunk_pressure": np.zeros(0, dtype=np.float64),
            "alive": (),
            "verdicts": (),
            "stopped": None,
        }
        return Observation(**(fields | changes))

    return build


@pytest.fixture
def view() -> Callable[[Lifecycle], CohortView]:
    def build(state: Lifecycle) -> CohortView:
        return CohortView(
            cohort=0, state=state, steps_in_state=1, sites=("blocks.0",), num_seeds=1, alpha=1.0, added_params=10
        )

    return build


@pytest.fixture
def verdict() -> Callable[..., Verdict]:
    def build(
        state: Lifecycle = Lifecycle.FOSSILIZED, gain: float = 0.1, cost: float = 0.1, reason: str = ""
    ) -> Verdict:
        return Verdict(
            cohort=0,
            step=90,
            state=state,
            sites=("blocks.0",),
            gain=gain,
            gain_low=gain / 2,
            gain_high=gain * 2,
            added_params=100,
            added_flops_share=cost,
            reason=reason,
        )

    return build
