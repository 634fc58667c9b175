"""What a host could have had without growth: the loss of the best static network at the same FLOPs, measured once.

For each task networks of several fixed shapes were trained for as many steps, each at its own best learning rate, on
three seeds (``benchmarks/controller/frontier.py``). The frontier is the lower envelope over the host's own shape at
several scales, straight in the logarithm of FLOPs. The reward of a run is how far below it the run ended, in standard
deviations between seeds. An envelope picks the luckiest of its points, so it is a little too good.

``any_shape`` takes in networks of equal widths as well: what somebody who knows the best proportions could have had.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

import numpy as np

from esper.errors import ConfigError
from esper.greenhouse.family import Family, data_of, family_named

LEARNING_RATES = (1e-2, 2e-2, 4e-2)
"""The grid that every static network, and every growing arm, chooses from."""
FACTORS = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
"""Static shapes: the host's own widths times these ..."""
EVEN = (8, 16, 24, 32, 48, 64)
"""... and the same width in every layer."""
_LEAST_SHARE = 0.25
"""A task's deviation counts as at least this share of its family's median one: it is itself an estimate."""


def shapes_of(family: Family, task: int, *, own: bool = False) -> list[tuple[int, ...]]:
    """Static shapes to try on a task, the host's ``own`` at several scales first."""
    start = data_of(family, task).widths
    scaled = [tuple(_scaled(start, factor)) for factor in FACTORS]
    even = [(width,) * family.num_sites for width in EVEN]
    return list(dict.fromkeys(scaled if own else scaled + even))


@dataclass(frozen=True)
class Frontier:
    """One task's static networks.

    ``flops`` ascending and ``losses`` never rising, of the networks on the envelope; ``deviation`` is the standard
    deviation of the final loss between seeds.
    """

    flops: tuple[float, ...]
    losses: tuple[float, ...]
    deviation: float

    @classmethod
    def of(cls, flops: Sequence[float], losses: Sequence[float], deviation: float) -> Frontier:
        """The envelope of measured points."""
        kept: list[tuple[float, float]] = []
        for cost, loss in sorted(zip(flops, losses, strict=True)):
            if not kept or loss < kept[-1][1]:
                kept.append((cost, loss))
        return cls(tuple(cost for cost, _ in kept), tuple(loss for _, loss in kept), deviation)

    def loss_at(self, flops: float) -> float:
        """Loss of the best static network at so many FLOPs; the ends go on level."""
        return float(np.interp(math.log(flops), np.log(self.flops), self.losses))

    def reward(self, loss: float, flops: float) -> float:
        """How far a run that cost ``flops`` in all ended below the frontier, in seed deviations.

        A loss that is not finite counts as ten deviations above.
        """
        if not math.isfinite(loss):
            return -10.0
        return (self.loss_at(flops) - loss) / self.deviation


@cache
def _measured(family: str, any_shape: bool) -> dict[int, Frontier]:
    path = files("esper.greenhouse") / "frontiers" / f"{family_named(family).name}.json"
    if not path.is_file():
        raise ConfigError(
            f"no frontier of family {family!r} was measured; run benchmarks/controller/frontier.py --family {family}"
        )
    tasks = json.loads(path.read_text(encoding="utf-8"))["tasks"]
    usual = float(np.median([task["deviation"] for task in tasks.values()]))
    found: dict[int, Frontier] = {}
    for number, task in tasks.items():
        own = [row for row, shape in enumerate(task["shapes"]) if _is_scaled(shape, task["shapes"][0])]
        if any_shape and len(own) == len(task["shapes"]):
            continue  # no other shape was measured
        points = range(len(task["shapes"])) if any_shape else own
        flops, losses = ([task[name][row] for row in points] for name in ("flops", "losses"))
        found[int(number)] = Frontier.of(flops, losses, max(task["deviation"], _LEAST_SHARE * usual))
    return found


def _is_scaled(shape: Sequence[int], start: Sequence[int]) -> bool:
    return any(list(shape) == _scaled(start, factor) for factor in FACTORS)


def _scaled(start: Sequence[int], factor: float) -> list[int]:
    return [round(factor * width) for width in start]


def tasks_of(family: str, *, any_shape: bool = False) -> tuple[int, ...]:
    """Tasks of a family whose frontier is known."""
    return tuple(sorted(_measured(family, any_shape)))


def frontier_of(family: str, task: int, *, any_shape: bool = False) -> Frontier:
    """The frontier of one task: of the host's own shape at several scales, or of ``any_shape`` that was measured.

    Raises
    ------
    ConfigError
        It was never measured.
    """
    known = _measured(family, any_shape)
    if task not in known:
        raise ConfigError(
            f"the frontier of task {task} of family {family!r} was not measured; measured: "
            f"{', '.join(map(str, known)) or 'none'}"
        )
    return known[task]
