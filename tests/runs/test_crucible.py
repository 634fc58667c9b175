"""What the crucible lets through and what it does not: every built-in pair, and blueprints with one fault each."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from esper.karn import Design
from esper.kasmina.blueprints import BLUEPRINTS
from esper.kasmina.blueprints.blueprint import Cost
from esper.kasmina.blueprints.bottleneck import Bottleneck
from esper.protocol import SiteKind
from esper.runs.crucible import crucible, menu
from esper.worth import Choice

pytestmark = pytest.mark.component

PAIRS = [(kind, pair) for kind, pairs in menu().items() for pair in pairs]


def made(kind: str, blueprint: str, start: str, **numbers: Any) -> Design:
    return Design(kind=kind, choice=Choice(blueprint=blueprint, start=start, **{"growth": 1.0, **numbers}))


def test_the_menu_names_every_kind() -> None:
    found = menu()
    assert set(found) == {str(kind) for kind in SiteKind} and all(found.values())
    starts = {pair.start: pair for pair in found["linear_span"]}
    assert starts["random_zero"].scalable and not starts["tiny"].scalable and starts["tiny"].sized
    affine = [p for p in found["channel_norm_layer"] if p.blueprint == "affine"]  # beside what a plug-in has registered
    assert affine and not any(p.scalable or p.sized for p in affine)


@pytest.mark.parametrize(
    ("kind", "pair"), [p for p in PAIRS if p[1].start in ("random_zero", "tiny")], ids=lambda p: str(p)[:40]
)
def test_built_in_pairs_pass(kind: str, pair: Any, unchanged_rng: None) -> None:
    assert crucible(made(kind, pair.blueprint, pair.start)) is None


def test_several_small_seeds_with_other_rates_pass() -> None:
    many = made("linear_layer", "low_rank", "random_zero", growth=2.0, seeds=2, scale=0.5, lr_scale=2.0)
    assert crucible(many) is None


class Understated(Bottleneck):
    """Declares less than it has."""

    def cost(self, *args: Any, **sizes: Any) -> Cost:
        honest = super().cost(*args, **sizes)
        return Cost(honest.params - 1, honest.flops_per_row)


class Slow(Bottleneck):
    """Needs more FLOPs than it declares."""

    def cost(self, *args: Any, **sizes: Any) -> Cost:
        honest = super().cost(*args, **sizes)
        return Cost(honest.params, honest.flops_per_row / 2)


class Loud(Bottleneck):
    """Adds something at alpha 0."""

    def project(self, params: Any, h: Tensor, geometry: Any, *, alpha: Tensor) -> Tensor:
        return super().project(params, h, geometry, alpha=alpha) + 1.0


class Infinite(Bottleneck):
    """Its weights start beyond all bounds."""

    def init(self, *args: Any, **sizes: Any) -> Any:
        params, buffers = super().init(*args, **sizes)
        return {**params, "w1": params["w1"] * torch.inf}, buffers


class Dead(Bottleneck):
    """Nothing reaches its bias."""

    def hidden(self, params: Any, *args: Any, **settings: Any) -> Tensor:
        return super().hidden({**params, "b1": params["b1"].detach()}, *args, **settings)


class Raising(Bottleneck):
    def hidden(self, *args: Any, **settings: Any) -> Tensor:
        raise ValueError("no such shape")


class Bent(Bottleneck):
    """Exports something else than it computes."""

    def merge(self, parts: Any, params: Any, *args: Any) -> Any:
        return super().merge(parts, {**params, "w2": params["w2"] * 1.5}, *args)


FAULTS = {
    Understated: "it declares", Slow: "FLOPs and needs", Loud: "adds something while alpha is 0",
    Infinite: "not finite", Dead: "no gradient reaches b1", Raising: "no such shape", Bent: "ExportError",
}  # fmt: skip


@pytest.mark.usefixtures("own_registries")
@pytest.mark.parametrize("fault", list(FAULTS), ids=lambda cls: cls.__name__)
def test_a_fault_is_found_and_named(fault: type[Bottleneck]) -> None:
    BLUEPRINTS.register("faulty")(fault)
    reason = crucible(made("linear_span", "faulty", "random_zero"))
    assert reason is not None and FAULTS[fault] in reason


@pytest.mark.parametrize(
    ("design", "told"),
    [
        (made("nowhere", "bottleneck", "random_zero"), "no kind of site is called 'nowhere'"),
        (made("linear_span", "low_rank", "random_zero"), "refused: blueprint 'low_rank' sits on"),
        (made("linear_span", "bottleneck", "tiny", scale=2.0), "refused: a plan's scale multiplies random"),
        (made("linear_span", "bottleneck", "tiniest"), "no start is called 'tiniest'"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_what_cannot_be_is_told(design: Design, told: str) -> None:
    assert told in (crucible(design) or "")
