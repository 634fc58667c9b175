"""The report's page: complete, bounded, inert, and there whatever the run has come to."""

from __future__ import annotations

import math
import re
from html.parser import HTMLParser
from pathlib import Path

import msgspec
import pytest
from tests.observe.synthetic import FATES, events, records

from esper import protocol as p
from esper.errors import EsperError
from esper.observe import EventLog, fold, render, write_report
from esper.observe.history import RunHistory
from esper.observe.report.page import MAX_BYTES
from esper.protocol import Lifecycle

pytestmark = pytest.mark.component

EVIL = '</script><script>window.pwned=1</script><img src=x onerror=pwned()>"\' onload="x"\x00\x1b]]>'


class Outline(HTMLParser):
    """Checks nesting and collects elements and attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)
        self.close()
        assert self.stack == [], self.stack

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "link"):
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag


def wrap(stream: list[p.AnyEvent]) -> RunHistory:
    return fold(p.Record(v=1, seq=i, time=1e9 + i, event=event) for i, event in enumerate(stream))


def test_a_finished_run_has_every_panel_and_every_candidate() -> None:
    page = render(fold(records()))
    outline = Outline(page)
    for title in ("Loss", "Size and budget", "Decisions", "Frontier", "Growth map", "Seed timeline",
                  "Need against spend", "Grafting", "Overhead", "Gates"):  # fmt: skip
        assert f"<h3>{title}</h3>" in page
    drawn = [attrs["data-cohort"] for _, attrs in outline.elements if "data-cohort" in attrs]
    assert sorted(drawn) == sorted([str(i) for i in range(len(FATES))] * 3)
    assert next(attrs["data-arm"] for _, attrs in outline.elements if "data-arm" in attrs) == "grown"
    assert 'http-equiv="refresh"' not in page and "nothing to" not in page
    assert "gain per cost below threshold" in page and "nan" not in re.sub(r"<script>.*</script>", "", page, flags=re.S)
    assert len(page.encode()) < MAX_BYTES


def test_an_unfinished_run_refreshes_itself() -> None:
    page = render(fold(records(finish=False)))
    Outline(page)
    assert 'http-equiv="refresh" content="5"' in page and ">running</span>" in page


@pytest.mark.parametrize("count", [0, 1, 2, 3, 8, 40, 41, 60, 75, 120])
def test_every_beginning_of_a_run_has_a_page(count: int) -> None:
    page = render(wrap(list(events(seeds=1))[:count]))
    Outline(page)
    assert 'class="empty"' in page
    if count == 0:
        assert "has not written its first event" in page
    if count == 3:
        assert "No candidate was germinated yet" in page and "No telemetry was recorded yet" in page


def test_a_cohort_before_its_judgement_says_so() -> None:
    stream = list(events(seeds=1))
    end = next(i for i, event in enumerate(stream) if isinstance(event, p.Judged))
    assert "no cohort was judged yet" in render(wrap(stream[:end]))


def poisoned(event: p.AnyEvent) -> p.AnyEvent:
    """Every text of an event hostile; names of arms included."""

    def swap(value: object) -> object:
        if isinstance(value, p.SiteKind):
            return value
        if isinstance(value, str):
            return value + EVIL
        if isinstance(value, tuple):
            return tuple(swap(item) for item in value)
        if isinstance(value, dict):
            return {swap(key): swap(item) for key, item in value.items()}
        if isinstance(value, msgspec.Struct):
            return msgspec.structs.replace(value, **{key: swap(getattr(value, key)) for key in value.__struct_fields__})
        return value

    return swap(event)  # type: ignore[return-value]


def test_hostile_names_stay_text() -> None:
    outline = Outline(page := render(wrap([poisoned(event) for event in events(seeds=2)])))
    tags = {tag for tag, _ in outline.elements}
    assert "img" not in tags and sum(tag == "script" for tag, _ in outline.elements) == 1
    names = {name for _, attrs in outline.elements for name in attrs}
    assert not any(name.startswith("on") for name in names)
    assert "\x00" not in page and "\x1b" not in page


def test_nothing_points_outside() -> None:
    page = render(fold(records()))
    assert not re.search(r"https?:|//[a-z]|url\(|@import", page)
    policy = next(a["content"] for t, a in Outline(page).elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None and policy.startswith("default-src 'none'")


def test_missing_and_infinite_values_draw() -> None:
    def broken(event: p.AnyEvent) -> p.AnyEvent:
        values = {
            name: math.nan if index % 2 else math.inf
            for index, name in enumerate(event.__struct_fields__)
            if isinstance(getattr(event, name), float)
        }
        if isinstance(event, p.Telemetry):
            values["gradient_energy"] = (math.nan,) * len(event.sites)
        return msgspec.structs.replace(event, **values)

    Outline(page := render(wrap([broken(event) for event in events(seeds=1)])))
    coordinates = re.findall(r' (?:d|x|y|width|height|viewBox)="([^"]*)"', page)
    assert [text for text in coordinates if "nan" in text or "inf" in text] == []


def test_a_huge_run_stays_under_two_megabytes_and_keeps_every_candidate() -> None:
    sites = tuple(f"model.encoder.layers.{i}.mlp" for i in range(400))
    history = RunHistory()
    stream: list[p.AnyEvent] = []
    for seed in range(6):
        for step in range(0, 30_000, 30):
            stream.append(p.TrainLoss(step=step, seed=seed, loss=1.0 + (step % 7), flops=float(step)))
            stream.append(p.HeldOut(step=step, seed=seed, loss=1.0 + (step % 11), params=100 + step, flops=float(step)))
        for step in range(0, 30_000, 1500):
            energy = tuple(float((i * 7 + step) % 13) for i in range(400))
            stream.append(p.Telemetry(
                step=step, seed=seed, sites=sites, activation_mean=energy, activation_var=energy,
                gradient_energy=energy, grown=tuple((i + step) % 64 for i in range(400)),
            ))  # fmt: skip
        for cohort in range(600):
            stream.append(p.Germinated(
                step=cohort * 50, seed=seed, cohort=cohort, seeds=(cohort,), sites=(sites[cohort % 400],),
                blueprints=("bottleneck",), starts=("copy",), widths=(8,), added_params=9, reason="pressure " * 8,
            ))  # fmt: skip
            stream.append(p.Transitioned(
                step=cohort * 50 + 9, seed=seed, cohort=cohort, seeds=(cohort,), source=Lifecycle.TRAINING,
                target=Lifecycle.CULLED, alpha=0.0, reason="no gain",
            ))  # fmt: skip
    for index, event in enumerate(stream):
        history.apply(p.Record(v=1, seq=index, time=0.0, event=event))
    page = render(history)
    assert len(page.encode()) <= MAX_BYTES
    assert {int(number) for number in re.findall(r'data-cohort="(\d+)"', page)} == set(range(600))


def test_the_same_history_gives_the_same_page() -> None:
    assert render(fold(records(seeds=1))) == render(fold(records(seeds=1)))


def test_write_report_replaces_whole_and_leaves_nothing_behind(tmp_path: Path) -> None:
    with EventLog(tmp_path / "events.jsonl") as log:
        for event in events(seeds=1, finish=False):
            log.append(event)
        first = write_report(tmp_path)  # while the run goes on
    size = (tmp_path / "events.jsonl").stat().st_size
    with (tmp_path / "events.jsonl").open("r+b") as stream:
        stream.truncate(size - 9)  # and after a kill
    assert write_report(tmp_path) == first == tmp_path / "report.html"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["events.jsonl", "report.html"]
    Outline(first.read_text(encoding="utf-8"))


def test_a_failed_write_keeps_the_old_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "report.html").write_text("old")

    def refuse(source: object, target: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("os.replace", refuse)
    with pytest.raises(EsperError, match="writable"):
        write_report(tmp_path, RunHistory())
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    with pytest.raises(EsperError, match=r"events\.jsonl"):
        write_report(tmp_path)


def test_arm_without_held_out_is_placed_by_test_loss() -> None:
    stream = [e for e in events(seeds=2) if not (isinstance(e, p.HeldOut) and e.arm == "static_final")]
    assert "test loss (path: held-out)" in render(wrap(stream))


def test_incidents_are_listed() -> None:
    stream = [event for event in events(seeds=1) if not isinstance(event, p.RunFinished)]
    stream += [
        p.Incident(step=45, cohort=None, action="reported", reason="the loss <b>is</b> not finite"),
        p.Restored(step=60, to_step=29, cohort=2, verified=True, rewound=True, digest="ab", reason="back to step 29"),
    ]
    page = render(wrap(stream))
    assert "Incidents and warnings" in page and "back to step 29" in page
    assert "the training's own, reported: the loss &lt;b&gt;is&lt;/b&gt; not finite" in page.replace("&#x27;", "'")
    assert "Incidents" not in render(wrap(list(events(seeds=1))))
