"""Proposals: the same from the same, what experience shows, within what is offered and allowed."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
import pytest
from tests.karn.made import OFFERS, PLACE, choice, design, experience, report

from esper.errors import ConfigError, UnknownNameError
from esper.karn import Architect, Site, Snapshot, selections
from esper.karn.experience import posterior, rows, standings
from esper.karn.selection import Candidates, find_selection, selection
from esper.worth import FEATURE_NAMES, LinearPosterior, compressed, encode

pytestmark = pytest.mark.unit

SITE = Site(place=PLACE, offers=OFFERS, reference=8.0, asked=8, most=16)
NAMES = ("efficiency", "hybrid", "novelty", "performance", "risk", "stability")


def starts(architect: Architect, num: int = 40, site: Site = SITE) -> Counter[str]:
    found = (architect.propose([site], seed=(seed,))[0] for seed in range(num))
    return Counter(proposal.design.choice.start for proposal in found if proposal is not None)


def test_the_same_snapshot_and_seed_give_the_same_proposals() -> None:
    reports = experience()
    one, two = Architect(Snapshot(reports=reports)), Architect(Snapshot(reports=tuple(reversed(reports))))
    sites = [SITE, replace(SITE, asked=4)]
    for seed in range(10):
        assert one.propose(sites, seed=(0, seed)) == one.propose(sites, seed=(0, seed)) == two.propose(
            sites, seed=(0, seed)
        )  # fmt: skip
    assert len({str(one.propose(sites, seed=(1, seed))) for seed in range(10)}) > 1


@pytest.mark.parametrize("strategy", ["efficiency", "hybrid", "performance", "stability", "risk"])
def test_what_did_well_is_proposed_more_often(strategy: str) -> None:
    """By chance each of the six starts has one proposal in six."""
    found = starts(Architect(Snapshot(reports=experience("gradmax", 240)), strategy=strategy), 20)
    assert found["gradmax"] >= 14, found


def test_without_experience_everything_gets_its_turn() -> None:
    assert len(starts(Architect(Snapshot()), 60)) == len(OFFERS)
    even = starts(Architect(Snapshot(reports=experience("gradmax", 240)), uniform=True), 300)
    assert min(even.values()) > 25, "drawn evenly, whatever is known"


def test_worth_depends_on_the_place() -> None:
    """``tiny`` does well under an adaptive optimizer only, ``copy`` under SGD only."""
    sgd = msgspec.structs.replace(PLACE, optimizer="sgd")
    reports = []
    for number in range(200):
        place, start = ((PLACE, sgd)[number % 2], ("tiny", "copy")[number // 2 % 2])
        good = (place is PLACE) == (start == "tiny")
        reports.append(report(number, start=start, place=place, gain=0.2 if good else None))
    architect = Architect(Snapshot(reports=tuple(reports)), strategy="stability")
    offers = (("bottleneck", "tiny"), ("bottleneck", "copy"))
    assert starts(architect, 1, replace(SITE, offers=offers)) == Counter(["tiny"])
    assert starts(architect, 1, replace(SITE, offers=offers, place=sgd)) == Counter(["copy"])


def test_candidates_stay_within_what_there_may_be() -> None:
    architect = Architect(Snapshot(designs=(design(choice=choice("tiny", growth=16.0)),)))
    found = list(architect.candidates(SITE))
    assert {p.width * p.seeds for p in found} == {4, 8, 16} and len(found) == 3 * len(OFFERS)
    capped = list(architect.candidates(replace(SITE, most=8)))
    assert {p.width * p.seeds for p in capped} == {4, 8}
    assert list(architect.candidates(replace(SITE, offers=()))) == []
    assert architect.propose([replace(SITE, offers=())], seed=(0,)) == [None]


def test_designs_are_candidates_where_they_fit_and_never_after_a_failure() -> None:
    fits = design(choice=choice("tiny", growth=2.0, seeds=4, lr_scale=2.0))
    elsewhere = design(kind="conv_span")
    observed = design(choice=choice("copy", growth=1.4142135623730951), operator="observed")
    untested = design(choice=choice("copy", lr_scale=0.5), status="untested")
    failed = design(choice=choice("gradmax"), operator="random", status="failed", reason="NaN")
    architect = Architect(Snapshot(designs=(fits, elsewhere, observed, untested, failed)))
    names = [p.design.name for p in architect.candidates(SITE)]
    assert fits.name in names and len(names) == len(set(names))
    assert not {elsewhere.name, untested.name, failed.name, observed.name} & set(names)
    (proposal,) = [p for p in architect.candidates(SITE) if p.design.name == fits.name]
    assert (proposal.width, proposal.seeds) == (4, 4)
    assert fits.name not in [p.design.name for p in architect.candidates(replace(SITE, offers=OFFERS[:1]))]


def test_a_narrow_site_gets_at_least_a_unit() -> None:
    found = list(Architect(Snapshot()).candidates(replace(SITE, reference=1.0, asked=1, most=1)))
    assert found and all((p.width, p.seeds) == (1, 1) for p in found)


def test_a_cohort_over_several_sites_is_one_row() -> None:
    one, two = report(0, start="tiny").placements[0], report(0, start="copy").placements[0]
    parts = (msgspec.structs.replace(one, share=0.75), msgspec.structs.replace(two, share=0.25))
    x, y = rows([report(0, placements=parts), report(1, gain=0.2, held_out=None), report(2, placements=())])
    assert y.tolist() == [[compressed(0.2), compressed(0.1), 1.0]], "what says nothing is no row"
    np.testing.assert_allclose(x[0], 0.75 * encode(one.place, one.choice) + 0.25 * encode(two.place, two.choice))
    assert posterior([]).num_rows == 0


def test_how_a_design_has_done() -> None:
    known = design(choice=choice("tiny"))
    reports = (report(0, start="tiny"), report(1, start="tiny", gain=None), report(2, start="copy", design="lost"))
    done = standings(Snapshot(reports=reports, designs=(known,)))
    assert (done[known.name].num, done[known.name].kept) == (2, 1)
    assert done[known.name].efficiency == pytest.approx(0.2 / 3) and done[known.name].cost == 0.5
    assert "lost" not in done and len(done) == 2, "a name that nobody knows gives way to the content's own"


# ----------------------------------------------------------------------------------------------------------------------
# Selections


def planted(efficiency: list[float], gain: list[float], kept: list[float], seen: list[int]) -> Candidates:
    """Candidates with features of their own, each seen so often with these values."""
    num = len(seen)
    known = LinearPosterior(np.ones(num), num_targets=3, rate=0.01)
    for column in np.flatnonzero(seen):
        row = np.eye(num)[[column] * seen[column]]
        known.update(row.reshape(-1, num), np.array([[efficiency[column], gain[column], kept[column]]] * seen[column]))
    return Candidates(np.eye(num), known, known.mean)


@pytest.mark.parametrize(
    ("name", "best"),
    [("efficiency", 0), ("performance", 1), ("stability", 2), ("novelty", 3), ("risk", 4), ("hybrid", 4)],
)
def test_each_selection_has_a_favourite_of_its_own(name: str, best: int) -> None:
    planned = planted(
        efficiency=[1.1, 0.0, 0.0, 0.0, 0.9], gain=[0.0, 1.0, 0.1, 0.0, 0.9], kept=[0.2, 0.3, 1.0, 0.0, 0.9],
        seen=[1, 40, 400, 0, 400],
    )  # fmt: skip
    draw = planned.draw.copy()
    draw[0, 0] = 2.0  # the first one, hardly known, is drawn as better than it is expected to be
    scores = find_selection(name)(Candidates(planned.features, planned.known, draw))
    assert int(np.argmax(scores)) == best


def test_selections_by_name() -> None:
    assert selections() == NAMES
    with pytest.raises(UnknownNameError, match=r"no selection is called 'hybird'; did you mean 'hybrid'\? known: eff"):
        Architect(Snapshot(), strategy="hybird")
    with pytest.raises(ConfigError, match="must be unique, got 'risk' twice"):
        selection("risk")(find_selection("risk"))
    assert len(FEATURE_NAMES) == posterior([]).num_features


def test_registering_one(monkeypatch: Any) -> None:
    from esper.karn import selection as module

    monkeypatch.setattr(module, "_STRATEGIES", dict(module._STRATEGIES))
    selection("first")(lambda candidates: -np.arange(len(candidates.features), dtype=float))
    assert Architect(Snapshot(), strategy="first").propose([SITE], seed=(0,)) == [
        next(iter(Architect(Snapshot()).candidates(SITE)))
    ]
