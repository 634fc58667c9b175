"""New designs: where they come from, that none is made twice, and that a failed one is never heard of again."""

from __future__ import annotations

import sys
from collections import Counter

import msgspec
import pytest
from tests.karn.made import PLACE, choice, design, experience, report

from esper.errors import ConfigError
from esper.karn import Architect, Design, Site, Snapshot
from esper.karn.archive import Archive
from esper.karn.design import GROWTHS, LR_SCALES, SCALES, SEEDS, content_name, on_grid
from esper.karn.generation import Menu, Pair, breed
from esper.worth import Choice

pytestmark = pytest.mark.component

MENU: Menu = {
    "linear_span": [
        Pair("bottleneck", "random_zero", True, True), Pair("bottleneck", "tiny", False, True),
        Pair("bottleneck", "copy", False, True),
    ],
    "norm_layer": [Pair("affine", "random_zero", False, False)],
}  # fmt: skip


def snapshot(*extra: Design) -> Snapshot:
    """Two elites of one kind, one of them bred before."""
    one, two = design("random_zero", generation=2), design("tiny", choice=choice("tiny", growth=1.0))
    reports = tuple(
        report(number, choice=d.choice, design=d.name, gain=gain)
        for number, (d, gain) in enumerate([(one, 0.2), (one, 0.1), (two, 0.3), (two, None)])
    )
    return Snapshot(reports=reports, designs=(one, two, *extra))


def passes(design: Design) -> str | None:
    return None


def test_lineage_says_where_a_design_comes_from() -> None:
    pytest.importorskip("ribs", reason="the karn extra")
    elites = {d.name: d for d in snapshot().designs}
    made = breed(snapshot(), MENU, passes, num=60, seed=1)
    assert {d.operator for d in made} == {"mutation", "crossover", "random"}
    for new in made:
        assert new.status == "passed" and new.created > 0 and new.kind == "linear_span"
        parents = [elites[name] for name in new.parents]
        assert len(parents) == {"random": 0, "mutation": 1, "crossover": 2}[new.operator]
        assert new.generation == (1 + max(p.generation for p in parents) if parents else 0)
        if new.operator == "crossover":
            for gene in ("growth", "seeds", "scale", "lr_scale", "start"):
                assert getattr(new.choice, gene) in {getattr(p.choice, gene) for p in parents} | {1.0}


def test_designs_lie_on_the_grid_and_hold_nothing_that_does_nothing() -> None:
    pytest.importorskip("ribs", reason="the karn extra")
    for new in breed(Snapshot(), MENU, passes, num=80, seed=2):
        assert on_grid(new.choice) == new.choice
        assert new.choice.growth in GROWTHS and new.choice.seeds in SEEDS and new.choice.lr_scale in LR_SCALES
        assert new.choice.scale in (SCALES if new.choice.start == "random_zero" else (1.0,))
        if new.kind == "norm_layer":
            assert (new.choice.growth, new.choice.scale) == (1.0, 1.0)


def test_the_same_snapshot_and_seed_breed_the_same_and_nothing_twice() -> None:
    pytest.importorskip("ribs", reason="the karn extra")
    first = breed(snapshot(), MENU, passes, num=20, seed=3)
    again = breed(snapshot(), MENU, passes, num=20, seed=3)
    assert [d.name for d in first] == [d.name for d in again]
    assert len({d.name for d in first}) == 20
    later = breed(snapshot(*first), MENU, passes, num=20, seed=3)
    assert not {d.name for d in first} & {d.name for d in later}


def test_a_failed_design_is_kept_with_its_reason_and_never_proposed() -> None:
    pytest.importorskip("ribs", reason="the karn extra")

    def test(new: Design) -> str | None:
        return "its output is not finite" if new.choice.lr_scale > 1 else None

    made = breed(snapshot(), MENU, test, num=30, seed=4)
    failed = [d for d in made if d.status == "failed"]
    assert failed and all(d.reason == "its output is not finite" and d.choice.lr_scale > 1 for d in failed)
    architect = Architect(snapshot(*made), uniform=True)
    site = Site(place=PLACE, offers=tuple((p.blueprint, p.start) for p in MENU["linear_span"]), reference=8.0,
                asked=8, most=1000)  # fmt: skip
    proposed = {p.design.name for p in architect.candidates(site)}
    assert {d.name for d in made if d.status == "passed"} <= proposed
    assert not {d.name for d in failed} & proposed
    again = breed(snapshot(*made), MENU, test, num=30, seed=4)
    assert not {d.name for d in failed} & {d.name for d in again}


def test_when_everything_near_is_known_the_search_ends() -> None:
    pytest.importorskip("ribs", reason="the karn extra")
    only: Menu = {"norm_layer": MENU["norm_layer"]}
    made = breed(Snapshot(), only, passes, num=50, seed=0)
    assert len(made) == len(SEEDS[:3]) * len(LR_SCALES)


def test_the_archive_keeps_the_best_of_each_cell() -> None:
    pytest.importorskip("ribs", reason="the karn extra")
    good, bad = design(choice=choice("tiny", growth=1.0)), design(choice=choice("tiny", growth=1.0, lr_scale=2.0))
    dear = design(choice=choice("tiny", growth=8.0))
    other = design("copy")
    reports = tuple(
        report(number, choice=d.choice, design=d.name, gain=gain, added_flops_share=cost)
        for number, (d, gain, cost) in enumerate(
            [(good, 0.2, 0.5), (bad, 0.1, 0.5), (dear, 0.1, 3.0), (other, 0.05, 0.5)]
        )
    )
    archive = Archive(Snapshot(reports=reports, designs=(good, bad, dear, other, design("gradmax"))))
    assert len(archive) == 3, "one of a cell was better, one design was never used"
    assert [d.name for d in archive.elites] == [good.name, other.name, dear.name]
    drawn = Counter(d.name for d in archive.draw(300))
    assert set(drawn) == {good.name, other.name, dear.name} and min(drawn.values()) > 60


def test_unlisted_names_share_a_cell() -> None:
    pytest.importorskip("ribs", reason="the karn extra")
    mine = Design(kind="mine", choice=Choice(blueprint="mine", start="mine", growth=1.0))
    reports = (report(0, choice=mine.choice, design=mine.name),)
    assert [d.name for d in Archive(Snapshot(reports=reports, designs=(mine,))).elites] == [mine.name]


def test_what_is_missing_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ribs", None)
    monkeypatch.setitem(sys.modules, "ribs.archives", None)
    with pytest.raises(ConfigError, match=r"pip install 'esper-morph\[karn\]'"):
        breed(Snapshot(), MENU, passes, num=1, seed=0)


def test_names_follow_from_the_content() -> None:
    one = choice("tiny", growth=2.0)
    near = msgspec.structs.replace(one, growth=2.2)
    assert content_name("linear_span", one) == content_name("linear_span", near) == design(choice=one).name
    assert content_name("conv_span", one) != content_name("linear_span", one)
    assert len({content_name("linear_span", msgspec.structs.replace(one, scale=s)) for s in SCALES}) == len(SCALES)


def test_experience_breeds_among_what_was_kept() -> None:
    pytest.importorskip("ribs", reason="the karn extra")
    reports = experience("tiny", 60)
    known = tuple(design(choice=r.placements[0].choice, operator="observed") for r in reports[:6])
    archive = Archive(Snapshot(reports=reports, designs=known))
    assert archive.elites[0].choice.start == "tiny"
