"""Reports from events: each fate, what was dropped on the way, what a rollback undoes, and a real run."""

from __future__ import annotations

import math
import warnings
from typing import Any

import msgspec
import pytest
import torch
from tests.rigs import attach
from torch import nn

from esper.config import TamiyoConfig
from esper.karn import Collector, FieldReport
from esper.protocol import (
    AnyEvent,
    Attached,
    Germinated,
    HeldOut,
    Judged,
    Lifecycle,
    Observation,
    Restored,
    RunStarted,
    SiteInfo,
    SiteKind,
    Telemetry,
    Transitioned,
)
from esper.tamiyo import make_controller
from esper.worth import Place, places

pytestmark = pytest.mark.component

NAN = math.nan
SITES = tuple(
    SiteInfo(
        name=name, kind=kind, in_features=64, out_features=16, hidden_features=hidden, num_chunks=16, weights=100
    )
    for name, kind, hidden in (("a", SiteKind.LINEAR_SPAN, 8), ("b", SiteKind.LINEAR_LAYER, 0))
)  # fmt: skip


def attached() -> Attached:
    return Attached(
        step=0, sites=SITES, skipped=(), host_params=1000, covered_params=900, total_steps=100, family="mlp",
        optimizer="sgd",
    )  # fmt: skip


def germinated(step: int = 10, cohort: int = 1, **changes: Any) -> Germinated:
    fields: dict[str, Any] = {
        "seeds": (1, 2, 3), "sites": ("a", "a", "b"), "blueprints": ("bottleneck", "bottleneck", "low_rank"),
        "starts": ("tiny", "tiny", "random_zero"), "widths": (4, 4, 2), "added_params": 700, "reason": "",
        "params": (300, 300, 100), "scales": (1.0, 1.0, 2.0), "lr_scales": (0.5, 0.5, 1.0), "designs": ("d", "d", ""),
        "model_params": 1100, "added_flops_share": 0.4,
    }  # fmt: skip
    return Germinated(step=step, cohort=cohort, **(fields | changes))


def telemetry(step: int) -> Telemetry:
    return Telemetry(
        step=step, sites=("a", "b"), activation_mean=(0.0, 0.0), activation_var=(1.0, 1.0), gradient_energy=(3.0, 1.0),
        grown=(4, 0),
    )  # fmt: skip


def held(step: int, loss: float) -> HeldOut:
    return HeldOut(step=step, loss=loss, params=1000, flops=0.0)


def judged(step: int, gain: float, stage: str = "evaluate", cohort: int = 1) -> Judged:
    return Judged(
        step=step, cohort=cohort, stage=stage, sites=("a", "b"), gain=gain, gain_low=gain - 0.1, gain_high=gain + 0.1,
        gain_shrunken=gain / 2, e_value=1.0, e_threshold=1.0, confirm_p=NAN, num_batches=5, accepted=True,
        added_params=650, added_flops_share=0.35, flops=1.0, reason="",
    )  # fmt: skip


def moved(step: int, target: Lifecycle, *seeds: int, cohort: int = 1, reason: str = "why") -> Transitioned:
    return Transitioned(
        step=step, cohort=cohort, seeds=seeds or (1, 2, 3), source=Lifecycle.EVALUATING, target=target, alpha=1.0,
        reason=reason,
    )  # fmt: skip


def collect(*events: AnyEvent, begun: bool = True) -> list[FieldReport]:
    collector = Collector("run@1", job="mine")
    first = [attached(), held(5, 2.0), telemetry(10)] if begun else []
    for event in (*first, *events):
        collector.on_event(event)
    return collector.reports()


def test_a_kept_cohort() -> None:
    fates = [moved(20, Lifecycle.EVALUATING), judged(30, 0.3), judged(40, 0.9, "hold")]
    (report,) = collect(germinated(), held(25, 1.0), *fates, moved(40, Lifecycle.FOSSILIZED, reason="it holds"))
    assert (report.id, report.job, report.germinated, report.ended) == ("run@1/grown/0/1", "mine", 10, 40)
    assert report.kept and report.reason == "it holds" and report.looks == 1
    assert (report.gain, report.gain_shrunken, report.held_out) == (0.3, 0.15, 1.0), "the acceptance test's, not hold's"
    assert (report.added_params, report.added_flops_share) == (650, 0.35)
    assert report.targets == pytest.approx((0.15 / 0.35, 0.15, 1.0))
    span, layer = report.placements
    assert (span.choice.seeds, span.choice.growth, span.width, span.params, span.share) == (2, 1.0, 4, 600, 6 / 7)
    assert (span.choice.lr_scale, layer.choice.scale) == (0.5, 2.0)
    assert layer.choice.growth == 1.0, "a rank of 2 on a smaller side of 16"
    assert span.design == "d" and len(layer.design) == 12
    assert span.place == Place(
        kind="linear_span", family="mlp", optimizer="sgd", log_in=math.log(64), log_out=math.log(16),
        log_hidden=math.log(8), fill=0.5, progress=0.1, loss_level=0.0, price=math.log(1.1), energy=math.log(1.5),
    )  # fmt: skip
    assert layer.place.fill is None and layer.place.log_hidden is None


@pytest.mark.parametrize(
    ("state", "reason", "worth"),
    [
        (Lifecycle.CULLED, "gain must be above 0", (0.0, 0.0, 0.0)),
        (Lifecycle.ROLLED_BACK, "not finite", (0.0, 0.0, 0.0)),
        (Lifecycle.ROLLED_BACK, "training ended before it was judged", None),
        (Lifecycle.CANCELLED, "a person", None),
    ],
)
def test_other_fates(state: Lifecycle, reason: str, worth: Any) -> None:
    (report,) = collect(germinated(), moved(30, state, reason=reason))
    assert report.state is state and report.targets == worth and report.gain is None and not report.kept
    assert report.added_flops_share == 0.4 and report.held_out == 2.0


def test_seeds_that_were_dropped_on_the_way_are_no_part_of_it() -> None:
    dropped = moved(15, Lifecycle.CULLED, 1, 2)
    assert collect(germinated(), dropped) == [], "the layer's seed goes on"
    (report,) = collect(germinated(), dropped, judged(30, 0.2), moved(40, Lifecycle.FOSSILIZED, 3))
    assert [part.site for part in report.placements] == ["b"] and report.placements[0].share == 1.0


def test_what_was_learnt_of_a_site_is_part_of_the_next_place() -> None:
    first = [germinated(), judged(30, 0.3), moved(40, Lifecycle.FOSSILIZED)]
    second = [germinated(60, 2), moved(70, Lifecycle.CULLED, cohort=2)]
    _, report = collect(*first, held(50, 1.5), *second)
    place = report.placements[0].place
    assert (place.last_gain, place.age) == (0.3 / 1.5, 0.2) and place.loss_level == pytest.approx(math.log(0.75))


def test_what_a_restore_undoes_did_not_happen() -> None:
    events = [germinated(), germinated(25, 2), judged(30, 0.3), moved(40, Lifecycle.FOSSILIZED), held(41, 0.1)]
    back = Restored(step=45, to_step=20, cohort=1, verified=True, rewound=True, digest="", reason="")
    assert collect(*events, back) == []
    (report,) = collect(*events, back, moved(46, Lifecycle.ROLLED_BACK))
    assert (report.cohort, report.state, report.gain, report.held_out) == (1, Lifecycle.ROLLED_BACK, None, 2.0)
    again = [germinated(50, 2), moved(60, Lifecycle.CULLED, cohort=2)]
    _, other = collect(*events, back, moved(46, Lifecycle.ROLLED_BACK), *again)
    assert other.germinated == 50 and other.placements[0].place.age is None


def test_trainings_are_kept_apart_and_controls_left_out() -> None:
    events: list[AnyEvent] = [attached(), germinated(), moved(30, Lifecycle.CULLED)]
    others = [msgspec.structs.replace(event, seed=1) for event in events]
    control = [msgspec.structs.replace(event, arm="random_growth") for event in events]
    started = RunStarted(step=0, run="r", preset="digits", config={}, environment={})
    reports = collect(started, *(e for trio in zip(events, others, control, strict=True) for e in trio), begun=False)
    assert [(r.arm, r.seed, r.job) for r in reports] == [("grown", 0, "digits"), ("grown", 1, "digits")]


def test_a_log_of_an_older_esper() -> None:
    bare = {"params": (), "scales": (), "lr_scales": (), "designs": (), "model_params": 0, "added_flops_share": NAN}
    (report,) = collect(germinated(**bare), moved(30, Lifecycle.CULLED))
    assert report.added_flops_share is None and report.placements[0].place.price is None
    assert [part.params for part in report.placements] == [466, 233]
    assert report.placements[0].choice.scale == 1.0


def test_events_out_of_nowhere_are_passed_over() -> None:
    assert collect(judged(30, 0.1), moved(40, Lifecycle.FOSSILIZED), begun=False) == []
    (report,) = collect(germinated(), moved(30, Lifecycle.CULLED), begun=False)
    assert report.placements[0].place.kind == "" and report.targets == (0.0, 0.0, 0.0)


class Watched:
    """The heuristic controller, and what it saw when it germinated."""

    def __init__(self) -> None:
        config = TamiyoConfig(first=10, last_share=0.6, patience=9, min_gain_per_cost=1e-9)
        self.inner = make_controller("heuristic", config)
        self.seen: dict[int, Observation] = {}

    def decide(self, observation: Observation) -> Any:
        commands = self.inner.decide(observation)
        if commands:
            self.seen[observation.step] = observation
        return commands

    def state(self) -> Any:
        return self.inner.state()

    def load(self, state: Any) -> None:
        self.inner.load(state)


def test_the_places_of_a_real_run_are_those_that_its_controller_saw() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 3), nn.ReLU(), nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 4))
    watched, collector = Watched(), Collector("live")
    rig = attach(model, controller=watched, total_steps=400)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        rig.train(200)
        rig.grower.finish()
    for event in rig.events:
        collector.on_event(event)
    reports = collector.reports()
    assert len(reports) == len(rig.grower.verdicts) >= 3
    for report, verdict in zip(reports, sorted(rig.grower.verdicts, key=lambda v: v.cohort), strict=True):
        seen = watched.seen[report.germinated]
        around = dict(zip(seen.site_names, places(seen), strict=True))
        assert {part.site: part.place for part in report.placements} == {site: around[site] for site in verdict.sites}
        assert (report.state, report.added_params) == (verdict.state, verdict.added_params)
        assert report.added_flops_share == pytest.approx(verdict.added_flops_share)
        assert sum(part.params for part in report.placements) == verdict.added_params
        if math.isfinite(verdict.gain):
            assert (report.gain, report.gain_shrunken) == (verdict.gain, verdict.gain_shrunken)
    seen = places(next(iter(watched.seen.values())))
    assert all((site.optimizer, site.family, site.kind) == ("adaptive", "mlp", "linear_span") for site in seen)
