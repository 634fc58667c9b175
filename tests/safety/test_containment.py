"""What a plug-in or an evaluation raises ends the cohort it happened to, not the run; what must pass, passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.models import Mlp, mse
from tests.rigs import Rig, attach, host_of
from torch import nn

import esper
from esper.commands import obey
from esper.errors import CONTAINED, AttachError, EsperError, contained
from esper.kasmina.strategies import STRATEGIES, GraftContext, Move, Strategy
from esper.protocol import Germinate, Lifecycle, Refused, SeedPlan, SiteKind
from esper.safety.tree import digest

pytestmark = pytest.mark.integration

S = Lifecycle


def unharmed(rig: Rig, word: str) -> None:
    """The cohort has ended with the reason, its events say so, and training goes on."""
    (verdict,) = rig.grower.verdicts
    assert verdict.state in (S.ROLLED_BACK, S.CANCELLED) and word in verdict.reason
    told = [e for e in rig.events if type(e).__name__ == "Transitioned" and e.target is verdict.state]
    assert len(told) == 1 and word in told[0].reason
    assert rig.grower.kasmina.cohorts == {} and len(rig.grower.kasmina.table.occupied()) == 0
    rig.train(12)


class Breaking:
    """A loss for evaluations that raises when told to; the training's own is another one."""

    error: BaseException | None = None

    def __call__(self, model: nn.Module, batch: Any) -> torch.Tensor:
        if self.error is not None:
            raise self.error
        return mse(model, batch)


ERRORS = [RuntimeError("boom"), torch.OutOfMemoryError("out of memory"), KeyError("label"), ZeroDivisionError("0")]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_an_evaluation_that_raises(error: Exception) -> None:
    loss = Breaking()
    rig = attach(Mlp(), loss=loss)
    rig.train(6)
    cohort = rig.until(rig.germinate(), S.STABILIZATION)
    loss.error = error
    host = [p.detach().clone() for p in rig.model.parameters()]
    for _ in range(40):
        if cohort.number not in rig.grower.kasmina.cohorts:
            break
        host = [p.detach().clone() for p in rig.model.parameters()]
        rig.train()
    loss.error = None
    assert len(host) == 6
    unharmed(rig, f"EVALUATING failed with {type(error).__name__}")


def test_a_held_out_loss_that_raises_is_said_once_and_measured_again_later() -> None:
    loss = Breaking()
    rig = attach(Mlp(), loss=loss, held_out_every=5)
    rig.train(4)
    loss.error = RuntimeError("no disk")
    with pytest.warns(RuntimeWarning, match=r"cannot be measured \(RuntimeError: no disk\)") as caught:
        rig.train(12)
    assert len(caught) == 1
    loss.error = None
    rig.train(5)
    assert rig.grower.held_out == rig.grower.held_out


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3), AssertionError("ours")])
def test_what_must_pass_passes(error: BaseException) -> None:
    loss = Breaking()
    rig = attach(Mlp(), loss=loss)
    rig.train(6)
    rig.until(rig.germinate(), S.STABILIZATION)
    loss.error = error
    with pytest.raises(type(error)):
        rig.train(40)


def test_esper_s_own_errors_are_raised_again() -> None:
    error = AttachError("a rule")
    assert isinstance(error, CONTAINED) and isinstance(error, EsperError)
    with pytest.raises(AttachError):
        contained(error)
    assert contained(RuntimeError()) == "RuntimeError" and contained(KeyError("x")) == "KeyError: 'x'"


@pytest.mark.usefixtures("own_registries")
def test_a_strategy_that_raises() -> None:
    @STRATEGIES.register("breaking")
    class _(Strategy):
        def advance(self, context: GraftContext, config: esper.GraftConfig) -> Move:
            raise ValueError("no idea")

    rig = attach(Mlp())
    rig.train(3)
    cohort = rig.germinate(start="negative_gradient", strategy="breaking")
    for _ in range(40):
        if cohort.number not in rig.grower.kasmina.cohorts:
            break
        rig.train()
    unharmed(rig, "GRAFTING failed with ValueError: no idea")


def broken_module(fails: Callable[[], bool]) -> type[nn.Module]:
    class Broken(nn.Module):
        def __init__(self, in_features: int, out_features: int) -> None:
            super().__init__()
            if fails():
                raise torch.OutOfMemoryError("tried to allocate 2 GiB")
            self.map = nn.Linear(in_features, out_features)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.map(x)

    return Broken


@pytest.mark.usefixtures("own_registries")
def test_no_memory_at_germination_leaves_nothing_behind() -> None:
    made: list[int] = []
    armed = [False]

    def fails() -> bool:
        made.append(1)
        return armed[0]

    esper.register_module("broken", kinds=[SiteKind.LINEAR_LAYER])(broken_module(fails))
    rig = attach(Mlp(), sites=esper.SitesConfig(layers=True))
    rig.train(3)
    spans = [info.name for info in rig.grower.sites() if info.kind.is_span]
    layer = next(info.name for info in rig.grower.sites() if not info.kind.is_span)
    before = digest({name: site.state() for name, site in rig.grower.kasmina.sites.items()})
    armed[0] = True
    plans = (SeedPlan(site=spans[0], start="negative_gradient"), SeedPlan(site=layer, blueprint="broken"))
    rig.grower.submit(Germinate(seeds=plans))
    obey(rig.grower, rig.grower._orders, None, rig.grower.clock.steps)
    (refused,) = [event for event in rig.events if isinstance(event, Refused)]
    assert "OutOfMemoryError: tried to allocate 2 GiB" in refused.reason
    assert digest({name: site.state() for name, site in rig.grower.kasmina.sites.items()}) == before
    assert rig.grower.kasmina.cohorts == {} and len(rig.grower.kasmina.table.occupied()) == 0
    armed[0] = False
    rig.order(Germinate(seeds=plans))
    assert list(rig.grower.kasmina.cohorts) == [1]


def test_a_gpu_without_headroom_refuses_a_germination(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("esper.kasmina.memory.device_bytes", lambda device: (1000, 20_000))
    rig = attach(Mlp())
    rig.train(3)
    rig.grower.submit(Germinate(seeds=(SeedPlan(site=rig.grower.sites()[0].name),)))
    rig.train()
    (refused,) = rig.refused()
    assert refused.gate == "memory" and "leave 5% of the GPU's 20000 bytes free" in refused.reason


def test_a_broken_start_does_not_stop_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    from esper.kasmina.starts.negative_gradient import NegativeGradient

    def fail(*_: Any, **__: Any) -> None:
        raise TypeError("bad rows")

    monkeypatch.setattr(NegativeGradient, "prepare", fail)
    rig = attach(Mlp())
    rig.train(3)
    cohort = rig.germinate(start="negative_gradient")
    for _ in range(30):
        if cohort.number not in rig.grower.kasmina.cohorts:
            break
        rig.train()
    unharmed(rig, "TRAINING failed with TypeError: bad rows")


@pytest.mark.usefixtures("own_registries")
def test_a_users_blueprint_that_raises_in_the_forward_pass_is_left_out_and_leaves() -> None:
    armed = [False]

    class Moody(nn.Module):
        def __init__(self, in_features: int, out_features: int) -> None:
            super().__init__()
            self.map = nn.Linear(in_features, out_features)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if armed[0]:
                raise RuntimeError("not today")
            return self.map(x)

    esper.register_module("moody", kinds=[SiteKind.LINEAR_LAYER])(Moody)
    rig = attach(Mlp(), sites=esper.SitesConfig(layers=True))
    rig.train(3)
    layer = next(info.name for info in rig.grower.sites() if not info.kind.is_span)
    rig.order(Germinate(seeds=(SeedPlan(site=layer, blueprint="moody"),)))
    cohort = next(iter(rig.grower.kasmina.cohorts.values()))
    rig.until(cohort, S.GRAFTING)
    x = rig.batches[0][0]
    armed[0] = True
    assert torch.equal(rig.model(x), host_of(rig.model)(x)), "the host's own output was to go on"
    rig.train()
    armed[0] = False
    unharmed(rig, f"its branch failed at {layer}: RuntimeError: not today")


@pytest.mark.usefixtures("own_registries")
def test_a_permanent_branch_that_raises_is_an_error() -> None:
    armed = [False]

    class Moody(nn.Module):
        def __init__(self, in_features: int, out_features: int) -> None:
            super().__init__()
            self.map = nn.Linear(in_features, out_features)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if armed[0]:
                raise RuntimeError("not today")
            return self.map(x)

    esper.register_module("moody", kinds=[SiteKind.LINEAR_LAYER])(Moody)
    evidence = esper.EvidenceConfig(accept="always")
    rig = attach(Mlp(), sites=esper.SitesConfig(layers=True), evidence=evidence)
    rig.train(3)
    layer = next(info.name for info in rig.grower.sites() if not info.kind.is_span)
    rig.order(Germinate(seeds=(SeedPlan(site=layer, blueprint="moody"),)))
    while rig.grower.kasmina.cohorts:
        rig.train()
    armed[0] = True
    with pytest.raises(RuntimeError, match="not today"):
        rig.model(rig.batches[0][0])
