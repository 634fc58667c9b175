"""Observations of any kind: sensors that are silent, ceilings or none, cohorts alive and ended."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from hypothesis import strategies as st

from esper.protocol import SITE_FEATURES, CohortView, Lifecycle, Observation, Verdict

SITES = 5
"""Most sites of a random observation."""
NAN = float("nan")
_NAMES = st.integers(0, 10_000)


@st.composite
def random_observation(draw: st.DrawFn, most: int = SITES) -> Observation:
    """Everything drawn by NumPy from one seed, so that examples are cheap; hypothesis shrinks what matters."""
    num = draw(st.integers(1, most))
    rng = np.random.default_rng(draw(_NAMES))
    missing = draw(st.sampled_from([0.0, 0.2, 1.0]))
    return make(rng, num, missing)


def make(rng: np.random.Generator, num: int, missing: float = 0.2) -> Observation:
    """An observation of ``num`` sites; each sensor is silent with probability ``missing``."""

    def holes(values: np.ndarray) -> np.ndarray:
        return np.where(rng.random(values.shape) < missing, NAN, values)

    def maybe(value: Any) -> Any:
        return None if rng.random() < missing else value

    def number(value: float) -> float:
        return NAN if rng.random() < missing else float(value)

    column = {name: index for index, name in enumerate(SITE_FEATURES)}
    is_span = rng.random(num) < 0.7
    hidden = np.where(is_span, rng.integers(1, 300, num), 0)
    sites = holes(np.exp(rng.normal(0, 2, (num, len(SITE_FEATURES)))))
    sites[:, column["is_span"]], sites[:, column["is_conv"]] = is_span, rng.random(num) < 0.3
    sites[:, column["log_in"]] = np.log(rng.integers(1, 2000, num))
    sites[:, column["log_out"]] = np.log(rng.integers(1, 2000, num))
    sites[:, column["log_hidden"]] = np.where(is_span, np.log(np.maximum(hidden, 1)), NAN)
    names = tuple(f"site.{row}" for row in range(num))
    host = int(rng.integers(100, 100_000))
    step = int(rng.integers(0, 1000))
    held_out = number(np.exp(rng.normal()))
    return Observation(
        step=step, total_steps=maybe(1000), held_out=held_out, held_out_initial=number(np.exp(rng.normal())),
        params=int(host * (1 + rng.random())), host_params=host,
        budget_params=maybe(int(host * (1 + 3 * rng.random()))),
        flops_per_step=number(2e6 * (1 + rng.random())), host_flops_per_step=1e6,
        budget_flops=maybe(1e6 * (1 + 5 * rng.random())), site_names=names, sites=sites,
        hidden=hidden.astype(np.int64), grown=np.where(is_span, rng.integers(0, 50, num), 0).astype(np.int64),
        eligible=rng.random(num) < 0.7, chunk_site=np.zeros(0, np.int64), chunk_index=np.zeros(0, np.int64),
        chunk_pressure=np.zeros(0), alive=_alive(rng, names), verdicts=_verdicts(rng, names, step),
        stopped=None if rng.random() < 0.9 else "by hand",
        unit_params=maybe(holes(rng.integers(1, 600, num).astype(np.float64))),
        unit_flops=maybe(holes(rng.integers(1, 60_000, num).astype(np.float64))),
        train_loss=number(np.exp(rng.normal())), loss_noise=number(rng.random()), lr_share=number(rng.random()),
        price=number(rng.random() / 10), fit_explained=maybe(holes(rng.normal(0, 0.3, num))),
        fit_error=maybe(holes(rng.random(num))), alternatives=("affine", "gated", "of their own"),
        alternative_params=holes(rng.integers(1, 600, (num, 3)).astype(np.float64)),
        alternative_flops=holes(rng.integers(1, 60_000, (num, 3)).astype(np.float64)),
    )  # fmt: skip


def _alive(rng: np.random.Generator, names: tuple[str, ...]) -> tuple[CohortView, ...]:
    """Cohorts on sites of their own."""
    order = rng.permutation(names).tolist()
    found: list[CohortView] = []
    for number in range(int(rng.integers(0, 3))):
        held = tuple(order.pop() for _ in range(int(rng.integers(1, 3))) if order)
        if held:
            found.append(
                CohortView(
                    cohort=number, state=Lifecycle(int(rng.integers(1, 11))), steps_in_state=int(rng.integers(0, 50)),
                    sites=held, num_seeds=len(held), alpha=float(rng.random()), added_params=10,
                )
            )  # fmt: skip
    return tuple(found)


def _verdicts(rng: np.random.Generator, names: tuple[str, ...], step: int) -> tuple[Verdict, ...]:
    found: list[Verdict] = []
    for number in range(int(rng.integers(0, 4))):
        gain = float(rng.normal()) if rng.random() < 0.8 else math.nan
        found.append(
            Verdict(
                cohort=10 + number, step=int(rng.integers(0, step + 1)),
                state=Lifecycle(int(rng.choice([7, 8, 9, 10]))), sites=(str(rng.choice(names)),), gain=gain,
                gain_low=gain - 0.1, gain_high=gain + 0.1, added_params=10, added_flops_share=0.1, reason="",
                gain_shrunken=gain / 2,
            )
        )  # fmt: skip
    return tuple(found)
