"""Plug-ins from user code: one class and one decorator, then a name that the configuration knows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from tests.models import Pair
from tests.rigs import QUICK, attach

import esper
from esper.config import FitConfig, GraftConfig, TamiyoConfig
from esper.kasmina.blueprints import BLUEPRINTS
from esper.kasmina.blueprints.bottleneck import Bottleneck
from esper.kasmina.strategies import STRATEGIES
from esper.plugins import Bank, Blueprint, GraftContext, HostUnits, Move, Rows, Start, StartReport, Strategy, known
from esper.protocol import Command, Germinate, Lifecycle, Observation, SeedPlan, SiteKind
from esper.tamiyo import registry as controllers

pytestmark = [pytest.mark.unit, pytest.mark.usefixtures("own_registries")]


class Halves(Strategy):
    """Half, then whole."""

    def advance(self, context: GraftContext, config: GraftConfig) -> Move:
        return Move(0.5 if context.alpha < 0.5 else 1.0)


class Small(Start):
    """Random, but small."""

    needs_rows = False
    preserves_function = False
    sanity = "none"

    def prepare(
        self, bank: Bank, rows: Rows | None, config: FitConfig, generator: torch.Generator,
        host: HostUnits | None = None,
    ) -> StartReport:  # fmt: skip
        bank.scale_output(1e-3)
        return StartReport()


class Once:
    """A controller that germinates nothing."""

    def __init__(self, config: TamiyoConfig, *, seed: int) -> None:
        self.seen = 0

    def decide(self, observation: Observation) -> Sequence[Command]:
        self.seen += 1
        return ()

    def state(self) -> dict[str, Any]:
        return {}

    def load(self, state: dict[str, Any]) -> None:
        return None


@pytest.mark.e2e
def test_every_family_is_usable_by_name() -> None:
    assert esper.register_strategy("halves")(Halves) is Halves
    assert esper.register_start("small")(Small) is Small
    assert esper.register_blueprint("wider")(type("Wider", (Bottleneck,), {})).__name__ == "Wider"
    esper.register_controller("once")(Once)  # type: ignore[arg-type]
    model = Pair()
    grower = esper.Grower(
        model,
        torch.optim.AdamW(model.parameters()),
        loss=lambda model, batch: model(batch).square().mean(),
        evaluate=[torch.randn(4, 8) for _ in range(16)],
        config=esper.Config(
            **{  # type: ignore[arg-type]
                **QUICK,
                "graft": esper.GraftConfig(strategy="halves", ramp_steps=2),
                "fit": esper.FitConfig(start="small", scales=(1.0,)),
                "tamiyo": esper.TamiyoConfig(controller="once"),
            }
        ),
    )
    assert isinstance(grower.controller, Once)
    rig = attach(Pair(), graft=esper.GraftConfig(strategy="halves", ramp_steps=2))
    cohort = rig.germinate(start="small", blueprint="wider")
    table = rig.grower.kasmina.table
    (slot,) = cohort.slots
    assert (cohort.strategy, cohort.members["fc1-fc2"].start, rig.bank(cohort).blueprint) == (
        "halves",
        "small",
        "wider",
    )
    assert STRATEGIES.name(int(table.strategy[slot])) == "halves"
    assert BLUEPRINTS.name(int(table.blueprint[slot])) == "wider"
    rig.until(cohort, Lifecycle.GRAFTING)
    rig.grower.kasmina.set_alpha(cohort, 0.0)
    alphas = []
    for _ in range(2):
        rig.train()
        alphas.append(cohort.alpha)
    assert alphas == [0.5, 1.0]


def _raises(*_args: Any, **_named: Any) -> Any:
    raise ZeroDivisionError("of the user's own")


BROKEN: dict[str, tuple[str, Callable[[], object]]] = {
    "refusal": (
        "it raised ZeroDivisionError: of the user's own; mend it",
        lambda: esper.register_blueprint("broken")(type("Broken", (Bottleneck,), {"refusal": _raises})),
    ),
    "cost": (
        "ZeroDivisionError: of the user's own",
        lambda: esper.register_blueprint("broken")(type("Broken", (Bottleneck,), {"cost": _raises})),
    ),
    "factory": (
        "it raised ZeroDivisionError: of the user's own; mend it",
        lambda: esper.register_module("broken")(_raises),
    ),
    "no module": (
        "its factory must return an nn.Module, got NoneType; mend it",
        lambda: esper.register_module("broken")(lambda _in, _out: None),  # type: ignore[arg-type, return-value]
    ),
    "start": (
        "start 'broken' raised ZeroDivisionError: of the user's own; mend it",
        lambda: esper.register_start("broken")(type("Broken", (Small,), {"refusal": _raises})),
    ),
}


@pytest.mark.parametrize("family", BROKEN)
def test_a_broken_plug_in_that_nobody_uses_harms_nobody(family: str) -> None:
    """Every site is asked what it can carry, by every observation; the plug-in of one cell must not end a training."""
    message, register = BROKEN[family]
    register()
    model = Pair()
    rig = attach(model, torch.optim.AdamW(model.parameters()), sites=esper.SitesConfig(layers=True))
    rig.train(12)
    kind = SiteKind.LINEAR_LAYER if family in ("factory", "no module") else SiteKind.LINEAR_SPAN
    site = next(site.name for site in rig.grower.sites() if site.kind is kind)
    named = {"start": "broken"} if family == "start" else {"blueprint": "broken"}
    rig.grower.submit(Germinate(seeds=(SeedPlan(site=site, **named),)))
    rig.train(1)
    assert message in rig.refused()[-1].reason


def test_kinds_that_do_not_exist_are_refused() -> None:
    with pytest.raises(esper.EsperError, match=r"must be of esper.protocol.SiteKind, got span; known: linear_span"):
        esper.register_module("odd", kinds=("span",))  # type: ignore[arg-type]
    esper.register_module("odd", kinds=("linear_layer",))(torch.nn.Linear)  # type: ignore[arg-type]
    assert BLUEPRINTS["odd"].kinds == {SiteKind.LINEAR_LAYER}


def test_known_lists_every_family() -> None:
    before = known()
    esper.register_strategy("halves")(Halves)
    assert set(before) == {"strategy", "start", "blueprint", "controller"}
    assert set(known()["strategy"]) == {*before["strategy"], "halves"}
    assert "heuristic" in before["controller"] and "bottleneck" in before["blueprint"]


def test_a_config_refuses_what_nobody_registered_and_lists_the_rest() -> None:
    esper.register_strategy("halves")(Halves)
    with pytest.raises(
        esper.UnknownNameError, match=r"no strategy is called 'halfs'; did you mean 'halves'.*fixed_ramp"
    ):
        attach(Pair(), graft=esper.GraftConfig(strategy="halfs"))


def again() -> Iterator[type[Strategy]]:
    """The same definition, run twice as by a notebook."""
    for size in (0.25, 0.75):

        class Cell(Strategy):
            step = size

            def advance(self, context: GraftContext, config: GraftConfig) -> Move:
                return Move(self.step)

        yield Cell


def test_a_cell_run_twice_replaces_and_anything_else_is_refused() -> None:
    for cell in again():
        esper.register_strategy("cell")(cell)
    assert isinstance(STRATEGIES["cell"], cell) and vars(type(STRATEGIES["cell"]))["step"] == 0.75
    code = STRATEGIES.code("cell")
    esper.register_strategy("later")(Halves)
    assert STRATEGIES.code("cell") == code, "codes in stored states stay"
    for taken, cls in (("cell", Halves), ("cell", cell), ("fixed_ramp", Halves)):
        with pytest.raises(esper.ConfigError, match=f"strategy names must be unique, got '{taken}' twice"):
            esper.register_strategy(taken)(cls)
    assert isinstance(STRATEGIES["cell"], cell)


def test_controllers_may_be_defined_anew_too() -> None:
    made = [type("Cell", (Once,), {"__qualname__": "Cell", "__module__": __name__}) for _ in range(2)]
    for one in made:
        esper.register_controller("cell")(one)  # type: ignore[arg-type]
    assert isinstance(controllers.make_controller("cell", TamiyoConfig()), made[1])
    with pytest.raises(esper.ConfigError, match="must be unique, got 'cell' twice"):
        esper.register_controller("cell")(Once)  # type: ignore[arg-type]


class Unfinished(Strategy):
    pass


class Vague(Start):
    needs_rows = False

    def prepare(
        self, bank: Bank, rows: Rows | None, config: FitConfig, generator: torch.Generator,
        host: HostUnits | None = None,
    ) -> StartReport:  # fmt: skip
        return StartReport()


class Boastful(Small):
    sanity = "proven"


class Bare(Blueprint):
    pass


@pytest.mark.parametrize(
    ("register", "cls", "message"),
    [
        (esper.register_strategy, Unfinished, "a strategy must define all .* Unfinished leaves out advance; add"),
        (esper.register_strategy, Small, r"must be a subclass of esper.plugins.Strategy, got <class .*Small'> for 'x'"),
        (esper.register_strategy, Halves(), "must be a subclass of esper.plugins.Strategy, got <"),
        (esper.register_start, Vague, "a start must define all .* Vague leaves out preserves_function, sanity; add"),
        (esper.register_start, Boastful, "sanity must be one of gradient, reconstruction, none, got 'proven'"),
        (esper.register_blueprint, Bare, "a blueprint must define all .* leaves out cost, hidden, .*, kinds, axes"),
    ],
    ids=lambda value: getattr(value, "__name__", "instance") if not isinstance(value, str) else "",
)
def test_an_incomplete_plug_in_is_refused_where_it_is_defined(register: Any, cls: Any, message: str) -> None:
    before = known()
    with pytest.raises(esper.ConfigError, match=message):
        register("x")(cls)
    assert known() == before


@pytest.mark.parametrize("family", ["strategy", "start", "blueprint", "controller"])
@pytest.mark.parametrize("name", [Halves, ""], ids=["no parentheses", "empty"])
def test_a_decorator_without_a_name_is_refused(family: str, name: Any) -> None:
    with pytest.raises(esper.ConfigError, match=rf"a {family} is registered under a name, .*write the decorator with"):
        getattr(esper, f"register_{family}")(name)
