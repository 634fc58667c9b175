"""Commands on their way into the queue: Python itself does not check what they hold."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch

from esper.errors import ConfigError
from esper.orders import Orders
from esper.protocol import Command, Cull, Germinate, SeedPlan, SetBudget

pytestmark = pytest.mark.unit


def _plan(**values: Any) -> Germinate:
    return Germinate(seeds=(SeedPlan(**{"site": "a", **values}),))


def _taken(command: Command) -> Command:
    orders = Orders()
    orders.put(command)
    order = orders.take(1)
    assert order is not None and orders.take(1) is None
    orders.restore(orders.state())
    return order.command


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (_plan(chunks=(1.5,)), "Germinate must hold .*Expected `int`, got `float` - at `$.seeds[0].chunks[0]`"),
        (_plan(width=2.5), "Expected `int | null`, got `float` - at `$.seeds[0].width`"),
        (_plan(blueprint=3), "Expected `str | null`, got `int` - at `$.seeds[0].blueprint`"),
        (_plan(site=None), "Expected `str`, got `null`"),
        (_plan(strategy=object()), "got a object"),
        (Germinate(seeds=None), "Expected `array`, got `null` - at `$.seeds`"),  # type: ignore[arg-type]
        (Germinate(seeds=("a",)), "Expected `object`, got `str` - at `$.seeds[0]`"),  # type: ignore[arg-type]
        (Cull(cohort="1", reason=""), "Cull must hold .*Expected `int`, got `str` - at `$.cohort`"),  # type: ignore[arg-type]
        (None, "a command must be one of Cancel, .*Stop, got NoneType; see esper.protocol"),
        (SeedPlan(site="a"), "got SeedPlan; see esper.protocol"),
        (Germinate, "got StructMeta"),
    ],
)
def test_what_is_no_command_never_waits(command: Any, message: str) -> None:
    orders = Orders()
    parts = map(re.escape, message.split(".*"))
    with pytest.raises(ConfigError, match=".*".join(parts)):
        orders.put(command)
    assert orders.take(1) is None and orders.is_empty


@pytest.mark.parametrize(
    "chunks",
    [[0, 1, 2], range(3), np.arange(3), (np.int64(0), np.int32(1), 2), torch.arange(3), (0, torch.tensor(1), 2)],
    ids=str,
)
def test_numbers_of_other_libraries_become_pythons(chunks: Any) -> None:
    (seed,) = _taken(_plan(chunks=chunks, width=np.int64(4), scale=np.float32(0.5))).seeds  # type: ignore[union-attr]
    assert seed == SeedPlan(site="a", chunks=(0, 1, 2), width=4, scale=0.5)
    assert {type(chunk) for chunk in seed.chunks} == {int} and type(seed.width) is int


@pytest.mark.parametrize("command", [_plan(chunks=(0,), keep=3), Cull(cohort=1, reason="x"), SetBudget(flops=2)])
def test_a_whole_command_is_what_comes_out(command: Command) -> None:
    assert _taken(command) == command
