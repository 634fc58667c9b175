"""A place and a choice as one row of numbers.

What is unknown is zero *and* flagged by a feature of its own: zero alone would look like an ordinary value.
Categories are one column each, with one for names that are not listed (plug-ins). The layout is versioned: rows of
different layouts must never meet in one posterior.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from esper.worth.place import SITE_KINDS, Choice, Place

LAYOUT = 1
"""Raised when the meaning or order of features changes."""

FAMILIES = ("mlp", "conv", "transformer", "recurrent")
OPTIMIZERS = ("adaptive", "sgd")
BLUEPRINTS = (
    "affine", "attention", "bottleneck", "bottleneck_conv", "chunk_mlp", "depthwise_conv", "gated", "low_rank",
)  # fmt: skip
STARTS = ("copy", "gradmax", "negative_gradient", "random_zero", "reconstruction", "tiny")

_NUMBERS: dict[str, tuple[float, float]] = {
    "log_in": (4.0, 2.0), "log_out": (4.0, 2.0), "log_hidden": (3.0, 2.0), "fill": (1.0, 2.0), "progress": (0.3, 0.3),
    "loss_level": (-1.0, 1.0), "price": (0.5, 1.0), "energy": (0.0, 1.0), "last_gain": (0.0, 0.1), "age": (0.2, 0.2),
}  # fmt: skip
"""Centre and size by which a place's numbers come near to [-1, 1]."""
_BOUND = 3.0
"""No number of a place counts for more than this."""


def _choice_names() -> list[str]:
    return [
        *(f"blueprint={name}" for name in (*BLUEPRINTS, "other")), *(f"start={name}" for name in (*STARTS, "other")),
        "growth", "growth^2", "seeds", "scale", "scale^2", "lr_scale", "lr_scale^2",
    ]  # fmt: skip


_PLACE_NAMES = [
    *(f"kind={name}" for name in (*SITE_KINDS, "other")),
    *(f"family={name}" for name in (*FAMILIES, "other")),
    *(f"optimizer={name}" for name in (*OPTIMIZERS, "other")),
    *(name for name in _NUMBERS),
    *(f"{name}?" for name in _NUMBERS),
]
_MODIFIERS = ("adaptive", "progress", "conv", "small")
_MODIFIED = [*(f"start={name}" for name in STARTS), "growth", "scale", "lr_scale"]
FEATURE_NAMES: tuple[str, ...] = (
    "1", *_PLACE_NAMES, *_choice_names(), *(f"{name}*{by}" for by in _MODIFIERS for name in _MODIFIED),
)  # fmt: skip
"""Names of the columns, in their order."""


def encode(place: Place, choice: Choice) -> npt.NDArray[np.float64]:
    """``(D,)`` float64: one row for a :class:`~esper.worth.posterior.LinearPosterior`. Always finite."""
    numbers = {name: _scaled(getattr(place, name), *_NUMBERS[name]) for name in _NUMBERS}
    flags = [float(getattr(place, name) is None) for name in _NUMBERS]
    growth, scale, lr_scale = (_log2(value) for value in (choice.growth, choice.scale, choice.lr_scale))
    starts = _one_hot(choice.start, STARTS)
    mine = [
        *_one_hot(choice.blueprint, BLUEPRINTS), *starts, growth, growth**2, math.log2(max(1, choice.seeds)) / 3,
        scale, scale**2, lr_scale, lr_scale**2,
    ]  # fmt: skip
    modifiers = (
        {"adaptive": 1.0, "sgd": -1.0}.get(place.optimizer, 0.0),
        numbers["progress"],
        1.0 if place.family == "conv" or "conv" in place.kind else 0.0,
        -numbers["log_hidden"],
    )
    modified = [*starts[:-1], growth, scale, lr_scale]
    row = [
        1.0, *_one_hot(place.kind, SITE_KINDS), *_one_hot(place.family, FAMILIES),
        *_one_hot(place.optimizer, OPTIMIZERS), *numbers.values(), *flags, *mine,
        *(value * by for by in modifiers for value in modified),
    ]  # fmt: skip
    return np.array(row, dtype=np.float64)


def prior_precision(strength: float = 1.0) -> npt.NDArray[np.float64]:
    """``(D,)``: interactions are believed in less than main effects."""
    return np.array([strength * (4.0 if "*" in name else 1.0) for name in FEATURE_NAMES])


def _scaled(value: float | None, centre: float, size: float) -> float:
    if value is None:
        return 0.0
    return max(-_BOUND, min(_BOUND, (value - centre) / size))


def _log2(value: float) -> float:
    """Octaves, halved so that a factor of four counts one."""
    return max(-_BOUND, min(_BOUND, math.log2(max(value, 1e-6)) / 2))


def _one_hot(name: str, known: Sequence[str]) -> list[float]:
    """One column a known name, and a last one for any other; the empty text (unknown) counts as another name."""
    return [float(name == item) for item in known] + [float(name not in known)]
