"""A state that is another run's, or damaged, is refused with the difference; nothing is changed then."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.models import Mlp, Pair, rows
from tests.rigs import Rig, attach, host_of, momentum_sgd

import esper
from esper.protocol import Cull, Lifecycle, Pause
from esper.safety.tree import digest

pytestmark = pytest.mark.component


def grown(**settings: Any) -> Rig:
    rig = attach(Mlp(), **settings)
    rig.train(3)
    rig.until(rig.germinate(start="negative_gradient"), Lifecycle.GRAFTING)
    return rig


def test_a_state_of_the_very_run_is_accepted() -> None:
    rig = grown()
    saved = rig.grower.state_dict()
    rig.train(3)
    assert digest(rig.grower.state_dict()) != digest(saved)
    rig.grower.load_state_dict(saved)
    assert digest(rig.grower.state_dict()) == digest(saved)


def refused(rig: Rig, state: Any, message: str) -> None:
    before = digest(rig.grower.state_dict())
    parameters = [(id(p), p.detach().clone()) for p in rig.model.parameters()]
    with pytest.raises(esper.StateError, match=message):
        rig.grower.load_state_dict(state)
    assert digest(rig.grower.state_dict()) == before
    assert all(id(p) == i and torch.equal(p, v) for p, (i, v) in zip(rig.model.parameters(), parameters, strict=True))


def scheduled(rig: Rig) -> list[Any]:
    return [torch.optim.lr_scheduler.ConstantLR(rig.optimizer)]


def other_scheduler() -> Rig:
    model = Mlp()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    return attach(model, optimizer, track=[torch.optim.lr_scheduler.ConstantLR(optimizer)])


def two_groups() -> Rig:
    model = Mlp()
    parts = list(model.parameters())
    return attach(model, torch.optim.AdamW([{"params": parts[:2]}, {"params": parts[2:]}], 3e-3))


def with_sgd() -> Rig:
    model = Mlp()
    return attach(model, momentum_sgd(model))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: attach(Pair()), r"2 extra \(fc3.bias, fc3.weight\); build the same model"),
        (lambda: attach(Mlp(11)), r"fc1.weight of the model must be as it was saved, \(10, 8\).*got \(11, 8\)"),
        (lambda: attach(Mlp().double(), batches=[(x.double(), y.double()) for x, y in rows(10)],
                        held_out=[(x.double(), y.double()) for x, y in rows(16, seed=7)]), "torch.float32, got"),
        (with_sgd, r"optimizers must be those of the saved run, \['AdamW'\], got \['SGD'\]"),
        (two_groups, r"sizes \[6\], got \[2, 4\]"),
        (other_scheduler, r"tracked must be those of the saved run, \[\], got \['ConstantLR'\]"),
        (lambda: attach(Mlp(), interval=7), r"config.interval: 5 saved, 7 here"),
        (lambda: attach(Mlp(), sites=esper.SitesConfig(chunks=2)), r"config.sites.chunks: None saved, 2 here"),
        (lambda: attach(Mlp(), held_out=rows(17, seed=7)), r"held_out.batches: 16 saved, 17 here"),
        (lambda: attach(Mlp(), held_out=rows(16, seed=8)), r"held_out.sha256: '\w{64}' saved, '\w{64}' here"),
    ],
)  # fmt: skip
def test_another_runs_state_is_refused_with_the_difference(build: Callable[[], Rig], message: str) -> None:
    other = build()
    other.train(2)
    refused(other, grown().grower.state_dict(), message)


def without(*path: str) -> Callable[[Any], None]:
    def damage(tree: Any) -> None:
        for key in path[:-1]:
            tree = tree[key]
        del tree[path[-1]]

    return damage


def put(value: Any, *path: Any) -> Callable[[Any], None]:
    def damage(tree: Any) -> None:
        for key in path[:-1]:
            tree = tree[key]
        tree[path[-1]] = value

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (put(99, "version"), "version 3, got 99"),
        (without("random"), r"\['random'\] missing or extra"),
        (put(0, "more"), r"\['more'\] missing or extra"),
        (without("esper", "judge"), r"state of Esper must have the keys .* got \['judge'\]"),
        (without("host", "state", "fc1.bias"), r"1 missing \(fc1.bias\)"),
        (without("training", "fc1"), r"1 missing \(fc1\)"),
        (without("random", "cuda"), "KeyError: 'cuda'"),
        (put((), "random", "python"), "cannot be read"),
        (without("optimizers", 0, "state", "param_groups"), "KeyError"),
        (without("esper", "kasmina", "table", "owner"), "'owner' must hold 16 values of int32, got None"),
        (put(torch.zeros(3), "esper", "kasmina", "table", "owner"), "'owner' must hold"),
        (without("esper", "kasmina", "sites", "fc1-fc2", "banks", 1, "moments"), "KeyError: 'moments'"),
        (put("weed", "esper", "kasmina", "sites", "fc1-fc2", "banks", 1, "blueprint"), "no blueprint is called 'weed'"),
        (without("esper", "clock", "hosts"), "KeyError"),
        (put({}, "esper", "judge", "fdr"), "level, num_tests"),
        (put([{"type": "dance"}], "esper", "orders"), "cannot be read"),
        (put(None, "esper", "loop", "losses"), "cannot be read"),
    ],
)
def test_a_damaged_state_changes_nothing(damage: Callable[[Any], None], message: str) -> None:
    rig = grown()
    state = rig.grower.state_dict()
    damage(state)
    rig.train(2)
    refused(rig, state, message)


@pytest.mark.parametrize("thing", [None, 3, [], {}])
def test_what_is_no_state_is_refused(thing: Any) -> None:
    refused(grown(), thing, "state")


def test_commands_that_wait_are_part_of_the_state() -> None:
    rig = grown()
    rig.grower.submit(Pause(cohort=1))
    rig.grower.submit(Cull(cohort=1, reason="no"))
    saved = rig.grower.state_dict()
    other = attach(Mlp())
    other.grower.load_state_dict(saved)
    other.train()
    assert [verdict.reason for verdict in other.grower.verdicts] == ["no"]


def test_a_tracked_thing_without_a_state_is_named_once() -> None:
    with pytest.warns(RuntimeWarning, match="a tracked object has no state_dict and load_state_dict") as caught:
        rig = attach(Mlp(), track=[object()])
        rig.grower.load_state_dict(rig.grower.state_dict())
    assert len(caught) == 1


def test_a_grown_host_that_was_absorbed_loads_into_one_as_wide() -> None:
    rig = attach(Mlp(), evidence=esper.EvidenceConfig(accept="always"))
    rig.train(2)
    cohort = rig.germinate(width=3)
    for _ in range(80):
        if cohort.number not in rig.grower.kasmina.cohorts:
            break
        rig.train()
    rig.grower.absorb()
    rig.train(3)
    saved = rig.grower.state_dict()
    refused(attach(Mlp()), saved, r"fc1.weight of the model must be as it was saved, \(13, 8\)")
    wide = host_of(rig.model)
    with torch.no_grad():
        for parameter in wide.parameters():
            parameter.zero_()
    again = attach(wide, evidence=esper.EvidenceConfig(accept="always"))
    again.grower.load_state_dict(saved)
    again.turn = rig.turn
    assert digest(again.grower.state_dict()) == digest(saved)
    for one in (rig, again):
        one.grower.kasmina.table.embargo_until[:] = 0
        one.germinate(width=2)
        one.train(30)
    assert digest(again.grower.state_dict()) == digest(rig.grower.state_dict())
