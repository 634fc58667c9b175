from __future__ import annotations

import math
from typing import Any

import pytest

from esper.errors import ConfigError, UnknownNameError
from esper.runs import PRESET_NAMES, RunOptions
from esper.runs.presets import check_preset

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"seeds": 0}, "seeds must be at least 1, got 0; use 3"),
        ({"steps": 9}, "steps must be at least 10, got 9; use 1000"),
        ({"lr": (1e-3, 0.0)}, r"lr must be positive and finite, got \(0.001, 0.0\); use 3e-3"),
        ({"lr": (math.inf,)}, "lr must be positive and finite"),
        ({"lr": (math.nan,)}, "lr must be positive and finite"),
        ({"seed": -1}, "seed must lie between 0 and 2147483647, got -1"),
        ({"seed": 2**31}, "seed must lie between 0 and 2147483647"),
        ({"device": "gpu"}, "device must be auto, cpu or cuda, got 'gpu'; use auto"),
        ({"size": "big"}, "size must be auto, cpu or gpu, got 'big'; use auto"),
        ({"jobs": 0}, "jobs must be at least 1, got 0; use 1"),
    ],
)
def test_values_that_cannot_be(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RunOptions(**given)


def test_smallest_values() -> None:
    options = RunOptions(seeds=1, steps=10, lr=(1e-9,), seed=0, jobs=1)
    assert (options.preset, options.controls, options.data) == ("digits", True, None)


@pytest.mark.parametrize("name", PRESET_NAMES)
def test_known_presets(name: str) -> None:
    check_preset(name)


@pytest.mark.parametrize(
    ("name", "message"),
    [("digit", "no preset is called 'digit'; did you mean 'digits'"), ("x", "'x'; known: digits, code-lm, vision")],
)
def test_unknown_presets(name: str, message: str) -> None:
    with pytest.raises(UnknownNameError, match=message):
        check_preset(name)


def test_names_load_on_first_use() -> None:
    import esper.runs as runs

    assert callable(runs.load_grown) and callable(runs.execute)
    with pytest.raises(AttributeError, match="has no attribute 'executes'"):
        _ = runs.executes
