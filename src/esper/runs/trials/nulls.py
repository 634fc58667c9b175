"""Null trials: cohorts that can add nothing by construction, put before a real grower's gates.

After every step their branches are set back to what the host could compute with other weights, so that whatever the
host comes to lean on, nothing was gained. Accepting one is an error.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from esper.config import Config, SitesConfig
from esper.grower import Grower
from esper.kasmina.bank import Bank
from esper.kasmina.site import Site
from esper.protocol import AnyEvent
from esper.runs.trials.records import TrialRecord
from esper.runs.trials.tasks import GATE_BATCHES, TRAIN_ROWS, Rows, Task, split, squared
from esper.runs.trials.training import Recipe, Setup, train_plainly, trial_config
from esper.runs.trials.trial import UNKNOWN, is_finite, train_growing, trial_record

SETTLED = 250
INPUTS, SIGNAL, OUTPUTS = 10, 6, 3
Hold = Callable[[nn.Module, Site, Bank], None]
Prepare = Callable[[Setup, nn.Module], None]


def null_trial(number: int) -> TrialRecord:
    """Grow host ``number``, whose every cohort (of the kind that is its turn) is a null one."""
    started = time.perf_counter()
    kind = list(KINDS)[number % len(KINDS)]
    setup, (hold, prepare) = _setup(number, pure_noise=kind == "nothing to learn"), KINDS[kind]
    events: list[AnyEvent] = []
    nulls: set[int] = set()
    model = setup.host()
    prepare(setup, model)

    def keep(grower: Grower, _: int) -> None:
        (site,) = grower.kasmina.sites.values()
        if kind == "copies of grown units" and site.annex is None:
            return  # the first one kept is real: later ones copy it
        for cohort, bank in site.banks.items():
            if cohort in nulls or cohort not in site.grafted:  # what was real once stays so
                nulls.add(cohort)
                hold(model, site, bank)

    grower = train_growing(setup, model, _config(kind, number), events, audit=False, after_step=keep)
    return trial_record(
        setup, f"null: {kind}", events, grower.verdicts, headroom=UNKNOWN, effect=UNKNOWN, finite=is_finite(model),
        seconds=time.perf_counter() - started, nulls=frozenset(nulls),
    )  # fmt: skip


def _config(kind: str, number: int) -> Config:
    config = trial_config(number, twins=False)
    if kind != "a linear map on a linear layer":
        return config
    # While a host still learns fast, a second map beside its layer does help it: as a step of training.
    later = dataclasses.replace(config.tamiyo, first=SETTLED)
    return dataclasses.replace(config, sites=SitesConfig(layers=True, include=("2",)), tamiyo=later)


def _setup(number: int, *, pure_noise: bool) -> Setup:
    """A teacher's outputs of which some inputs know nothing, or noise alone."""
    choose = torch.Generator().manual_seed(number)
    gate_rows = (8, 16, 32)[int(torch.randint(3, (), generator=choose))]
    x = torch.randn(TRAIN_ROWS + GATE_BATCHES * gate_rows + 64, INPUTS, generator=choose)
    noise = (0.1, 0.3, 0.6)[int(torch.randint(3, (), generator=choose))]
    inner = torch.randn(SIGNAL, 8, generator=choose) * 1.5 / SIGNAL**0.5
    y = torch.tanh(x[:, :SIGNAL] @ inner) @ torch.randn(8, OUTPUTS, generator=choose) / 8**0.5
    drawn = torch.randn(y.shape, generator=choose)
    rows: Rows = x, drawn if pure_noise else y + noise * drawn
    width = 3 + int(torch.randint(8, (), generator=choose))

    def build(scale: int) -> nn.Module:
        return nn.Sequential(nn.Linear(INPUTS, scale * width), nn.ReLU(), nn.Linear(scale * width, OUTPUTS))

    task = Task("teacher-student", "mlp", build, squared, width, 1.0 if pure_noise else noise, *split(rows, gate_rows))
    return Setup(number, task, Recipe.drawn(choose, task), choose)


# ----------------------------------------------------------------------------------------------------------------------
# What keeps a branch from adding anything


@torch.no_grad()
def _nothing(model: nn.Module, site: Site, bank: Bank) -> None:
    """A low-rank map that the layer could hold itself, or a task in which there is nothing to learn."""


@torch.no_grad()
def _constant(model: nn.Module, site: Site, bank: Bank) -> None:
    """Hidden units that ignore their input: an offset, which the layer's bias already is."""
    bank.params["w1"].zero_()
    bank.params["b1"].clamp_(min=0.5)


@torch.no_grad()
def _copied(model: nn.Module, site: Site, bank: Bank) -> None:
    """Copies of the host's hidden units: their output weights could be the host's own."""
    head = model.get_submodule("0")
    assert isinstance(head, nn.Linear)
    _copy_units(bank, head.weight, head.bias)


@torch.no_grad()
def _copied_annex(model: nn.Module, site: Site, bank: Bank) -> None:
    """Copies of units that are already permanent."""
    annex = site.annex
    assert annex is not None
    _copy_units(bank, annex.params["w1"][0], annex.params["b1"][0])


def _copy_units(bank: Bank, weight: Tensor, bias: Tensor) -> None:
    turn = torch.arange(bank.units) % len(weight)
    bank.params["w1"][:, :, : weight.shape[1]] = weight[turn]
    bank.params["b1"][:] = bias[turn]


@torch.no_grad()
def _distracted(model: nn.Module, site: Site, bank: Bank) -> None:
    """Hidden units that read only inputs on which the target does not depend."""
    bank.params["w1"][..., :SIGNAL].zero_()


# ----------------------------------------------------------------------------------------------------------------------
# What a host must be like, so that nothing is left for such a branch to put right


def _as_it_is(setup: Setup, model: nn.Module) -> None:
    """Nothing needs to be done to the host."""


def _converged(setup: Setup, model: nn.Module) -> None:
    """Trained three times as long as a trial takes, by a rate that goes down to zero each time.

    A map beside the layer of a host that has much to learn does help it, as a step of training.
    """
    for _ in range(3):
        train_plainly(dataclasses.replace(setup, recipe=Recipe("adamw", 1e-2, decays=True)), model)


def _blind(setup: Setup, model: nn.Module) -> None:
    """What it makes of the irrelevant inputs is nothing, and stays so.

    A host that weighs them, as first weights do, is better with units that cancel this: they would not be null.
    """
    head = model.get_submodule("0")
    assert isinstance(head, nn.Linear)
    with torch.no_grad():
        head.weight[:, SIGNAL:] = 0.0
    seen = (torch.arange(INPUTS) < SIGNAL).to(head.weight.dtype)
    head.weight.register_hook(lambda grad: grad * seen)


KINDS: dict[str, tuple[Hold, Prepare]] = {
    "a linear map on a linear layer": (_nothing, _converged),
    "a constant": (_constant, _as_it_is),
    "copies of hidden units": (_copied, _as_it_is),
    "copies of grown units": (_copied_annex, _as_it_is),
    "units that read irrelevant inputs only": (_distracted, _blind),
    "nothing to learn": (_nothing, _as_it_is),
}
