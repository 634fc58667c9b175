"""Branches that are the user's own modules: registered once, checked where they are to sit."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from tests.example_sites import EXAMPLES, attached
from torch import Tensor, nn

import esper
from esper.config import FitConfig
from esper.errors import EsperError
from esper.kasmina.bank import Bank
from esper.kasmina.blueprints import BLUEPRINTS
from esper.kasmina.cohort import Cohort
from esper.protocol import Lifecycle, SeedPlan, SiteKind

pytestmark = pytest.mark.component


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    known = dict(BLUEPRINTS._items)
    yield
    BLUEPRINTS._items.clear()
    BLUEPRINTS._items.update(known)


def _refusal(factory: object, **options: object) -> str | None:
    esper.register_module("mine", **options)(factory)  # type: ignore[arg-type]
    return BLUEPRINTS["mine"].refusal(EXAMPLES[SiteKind.NORM_LAYER][0].geometry)


def test_the_decorator_gives_the_class_back() -> None:
    @esper.register_module("mine")
    class Mine(nn.Linear):
        pass

    assert isinstance(Mine(2, 3), nn.Linear) and "mine" in BLUEPRINTS
    with pytest.raises(ValueError, match="twice"):
        esper.register_module("mine")(Mine)


def test_a_cell_that_is_run_again_replaces_its_module_and_another_one_does_not() -> None:
    def define() -> type[nn.Module]:
        class Cell(nn.Linear):
            pass

        return esper.register_module("mine")(Cell)

    define()
    again = define()
    assert BLUEPRINTS["mine"].factory is again  # type: ignore[attr-defined]
    for name in ("mine", "low_rank"):
        with pytest.raises(esper.ConfigError, match="twice"):
            esper.register_module(name)(nn.Linear)
    with pytest.raises(esper.ConfigError, match="is registered under a name"):
        esper.register_module(nn.Linear)  # type: ignore[arg-type]


def test_modules_that_do_not_fit_are_refused_with_a_reason() -> None:
    assert _refusal(nn.Linear) is None


@pytest.mark.parametrize(
    ("factory", "reason"),
    [
        (lambda i, o: nn.Linear(i, o + 1), r"must return shape \(2, 4, 6\) for \(2, 4, 6\), got \(2, 4, 7\)"),
        (lambda i, o: nn.Linear(i + 1, o), "does not take what the site offers"),
        (lambda i, o: nn.GRU(i, o, batch_first=True), "got tuple"),
        (lambda i, o: nn.Sequential(nn.Linear(i, o), nn.Dropout(0.1)), "Dropout would advance"),
        (lambda i, o: nn.GRU(i, o, 2, dropout=0.1), "GRU would advance"),
    ],
)
def test_misfits(factory: object, reason: str) -> None:
    import re

    given = _refusal(factory)
    assert given is not None and re.search(reason, given), given


@pytest.mark.parametrize(
    "options",
    [
        {"kinds": (SiteKind.LINEAR_SPAN,)},
        {"kinds": ()},
        {"reads": "input"},
        {"kinds": (SiteKind.NORM_LAYER,), "reads": "columns"},
    ],
)
def test_places_that_a_module_cannot_take_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(EsperError, match="sits on layer kinds and reads"):
        esper.register_module("mine", **options)  # type: ignore[arg-type]


def test_making_modules_leaves_the_random_streams_alone(unchanged_rng: None) -> None:
    esper.register_module("mine", kinds=(SiteKind.RECURRENT_LAYER,), reads="input")(nn.Linear)
    example = EXAMPLES[SiteKind.RECURRENT_LAYER][0]

    def bank(seed: int) -> Bank:
        return Bank("mine", example.geometry, units=1, reads=5, columns=None,
                    generator=torch.Generator().manual_seed(seed), device=torch.device("cpu"))  # fmt: skip

    one, two, other = bank(1), bank(1), bank(2)
    assert one.params["module.weight"].shape == (1, 6, 5), "it reads the site's input"
    assert torch.equal(one.params["module.weight"], two.params["module.weight"])
    assert not torch.equal(one.params["module.weight"], other.params["module.weight"])


def test_norm_statistics_inside_a_module_move_while_it_trains() -> None:
    def normed(i: int, o: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(i, o, 1), nn.BatchNorm2d(o))

    esper.register_module("mine", kinds=(SiteKind.CHANNEL_NORM_LAYER,))(normed)
    example = EXAMPLES[SiteKind.CHANNEL_NORM_LAYER][1]
    bank = Bank("mine", example.geometry, units=1, reads=6, columns=torch.tensor([[0, 1], [2, 3]]),
                generator=torch.Generator(), device=torch.device("cpu"))  # fmt: skip
    before = bank.buffers["module.1.running_var"].clone()
    y = 3.0 * example.y()
    bank.branch(y, training=False, generator=None)
    assert torch.equal(bank.buffers["module.1.running_var"], before)
    bank.branch(y, training=True, generator=None)
    assert bool((bank.buffers["module.1.running_var"] != before).all())


class Reader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.out = nn.LayerNorm(6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(x))


def test_germination_says_why_a_blueprint_cannot_sit_where_it_was_sent() -> None:
    kasmina = attached(Reader(), torch.randn(5, 6), layers=True)

    def germinate(**plan: object) -> None:
        kasmina.germinate(
            [SeedPlan(site="norm", **plan)], step=1, host_flops=1.0, budget_params=None, budget_flops=None
        )  # type: ignore[arg-type]

    with pytest.raises(EsperError, match=r"must be \(batch, positions, features\), got 2 dimensions"):
        germinate(blueprint="attention")
    with pytest.raises(EsperError, match="reads more than those; use 'random_zero'"):
        germinate(blueprint="affine", start="negative_gradient")
    with pytest.raises(EsperError, match="sits on conv_layer, got site 'norm' of kind norm_layer; use 'affine'"):
        germinate(blueprint="depthwise_conv")


def test_a_start_from_the_configuration_gives_way_on_layers() -> None:
    """The configuration is written with spans in mind; what a plan names is what it gets, or refused."""
    kasmina = attached(Reader(), torch.randn(5, 6), layers=True, fit=FitConfig(start="gradmax"))
    for number, (site, blueprint) in enumerate([("norm", "affine"), ("out", "low_rank")], 1):
        cohort = kasmina.germinate(
            [SeedPlan(site=site, blueprint=blueprint)], step=1, host_flops=1.0, budget_params=None, budget_flops=None
        )
        assert isinstance(cohort, Cohort) and cohort.number == number
        assert cohort.members[site].start == "random_zero"
    with pytest.raises(EsperError, match="got 'low_rank' on a linear_layer"):
        kasmina.nursery._resolve(SeedPlan(site="out", blueprint="low_rank", start="gradmax"), 1)


@pytest.mark.parametrize(
    ("blueprint", "units"), [("affine", 1), ("low_rank", 2), ("own", 1)], ids=["affine", "low_rank", "own"]
)
def test_many_seeds_of_a_layer_share_its_default_width(blueprint: str, units: int) -> None:
    esper.register_module("own")(nn.Linear)
    model = nn.Sequential(nn.Linear(6, 6))
    kasmina = attached(model, torch.randn(5, 6), layers=True)
    plan = SeedPlan(site="0", blueprint=blueprint, start="random_zero", seeds=3, keep=2)
    made = kasmina.germinate([plan], step=1, host_flops=1.0, budget_params=None, budget_flops=None)
    assert isinstance(made, Cohort) and made.num_seeds == 3
    bank = kasmina.sites["0"].banks[made.number]
    assert (bank.units, bank.num_slots) == (units, 3)
    kasmina.move(made, Lifecycle.TRAINING, 1)
    left = kasmina.thin(made, "0", np.array([0, 2]), 2, 0)
    assert len(left) == 1 and bank.num_slots == 2 and bank.columns is not None
    assert bank.columns.tolist() == [[0, 1], [4, 5]]
    y = torch.zeros(4, 6)
    bank.alpha.fill_(1.0)
    for value in bank.params.values():
        value.detach().fill_(0.5)
    out = bank.scatter(y, bank.branch(bank.pick(torch.ones(4, 6), y), training=False, generator=None))
    assert torch.equal(out[0] != 0, torch.tensor([True, True, False, False, True, True]))
