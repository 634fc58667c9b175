"""The soak: its slope, its controller, its counts, and that it goes on where it stopped."""

from __future__ import annotations

import math
import os
import tempfile
import threading
from collections import Counter
from pathlib import Path

import msgspec
import pytest
import torch
from tests.runs.soak.samples import sample

from esper.errors import ConfigError, DataError
from esper.protocol import Cancel, Cull, Germinate, RollBack
from esper.runs.soak import SoakOptions, job
from esper.runs.soak.fates import Restless
from esper.runs.soak.life import FAMILIES, Counts, Life, rollbacks, usable_faults
from esper.runs.soak.resources import Resources
from esper.runs.soak.slope import Slope
from esper.runs.soak.summary import summarise

pytestmark = pytest.mark.component

# ----------------------------------------------------------------------------------------------------------------------
# Slope


def series(mb_per_hour: float, *, noise: float = 0.0, warm_up: float = 0.0) -> tuple[list[float], list[float]]:
    """Two hours, a sample a minute."""
    generator = torch.Generator().manual_seed(0)
    hours = [number / 60 for number in range(120)]
    jitter = (noise * torch.randn(120, generator=generator)).tolist()
    return hours, [100 + mb_per_hour * t + j - warm_up * math.exp(-8 * t) for t, j in zip(hours, jitter, strict=True)]


def test_a_straight_line_is_found_exactly() -> None:
    slope = Slope.of(*series(3.0))
    assert (slope.mb_per_hour, slope.low, slope.high) == pytest.approx((3.0, 3.0, 3.0))
    assert slope.long_mb == pytest.approx(216.0)
    assert slope.hours == pytest.approx(1.5, abs=0.05)


def test_noise_widens_the_interval_and_the_truth_lies_in_it() -> None:
    flat, leaking = Slope.of(*series(0.0, noise=1.0)), Slope.of(*series(2.0, noise=1.0))
    assert flat.low < 0 < flat.high < 1.0
    assert 1.0 < leaking.low < 2.0 < leaking.high


def test_what_fills_up_at_the_start_is_no_leak() -> None:
    assert Slope.of(*series(0.0, warm_up=50.0)).high < 1.5
    assert math.isnan(Slope.of([0.0, 1.0], [5.0, 5.0]).mb_per_hour)
    assert math.isnan(Slope.of([], []).high)


def drifting(hours: float, generator: torch.Generator) -> tuple[list[float], list[float]]:
    """Memory without a slope that depends on which of three hosts are alive, a sample every five seconds."""
    num = round(720 * hours)
    levels = torch.zeros(num)
    for _ in range(3):
        at = 0
        while at < num:
            lasts = max(1, int(torch.empty(1).exponential_(1 / 36, generator=generator)))
            levels[at : at + lasts] += torch.empty(1).exponential_(1.0, generator=generator)
            at += lasts
    return [number / 720 for number in range(num)], levels.tolist()


@pytest.mark.parametrize("hours", [0.5, 2.0])
def test_an_interval_allows_for_hosts_that_live_for_minutes(hours: float) -> None:
    """Taken for independent, the same means exclude the truth in half of these series."""
    generator = torch.Generator().manual_seed(0)
    slopes = [Slope.of(*drifting(hours, generator)) for _ in range(60)]
    covered = sum(slope.low <= 0 <= slope.high for slope in slopes)
    assert covered >= 53, f"{covered} of 60 intervals of 95% hold the true slope"
    assert hours < 1 or sorted(slope.high - slope.low for slope in slopes)[30] < 10, "it was to be of some use"


def test_a_few_minutes_have_no_slope() -> None:
    times = [number / 720 for number in range(100)]
    assert math.isnan(Slope.of(times, [100.0] * 100).high)


# ----------------------------------------------------------------------------------------------------------------------
# What a process holds


def test_handles_threads_and_temporary_files_are_seen(tmp_path: Path) -> None:
    before = Resources.now(tmp_path)
    done = threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()
    with (tmp_path / "left").open("w"):
        during = Resources.now(tmp_path)
    done.set()
    thread.join()
    assert during.temporary_files == before.temporary_files + 1 == 1
    assert during.threads == before.threads + 1
    if before.handles is not None and during.handles is not None:
        assert during.handles == before.handles + 1
    assert during.memory_mb is None or during.memory_mb > 10
    assert during.memory_mb is None or during.in_use_mb is None or 1 < during.in_use_mb < during.memory_mb


def test_what_is_handed_out_is_told_apart_from_what_the_system_has_given(tmp_path: Path) -> None:
    before = Resources.now(tmp_path).in_use_mb
    if before is None:
        pytest.skip("only glibc tells what it has handed out")
    taken = torch.ones(5_000_000, dtype=torch.float32)
    during = Resources.now(tmp_path).in_use_mb
    assert during is not None and 19 < during - before < 22, len(taken)


# ----------------------------------------------------------------------------------------------------------------------
# Lives


def test_a_life_is_busy_and_follows_from_its_number() -> None:
    counts = [Counts(), Counts()]
    for each in counts:
        life = Life(0, "mlp", each, torch.device("cpu"), faults=())
        life.train(400)
        life.close()
    assert counts[0] == counts[1]
    busy = counts[0]
    assert busy.germinations >= 4 and busy.longest_wait <= 100
    assert rollbacks(busy) > 0 and busy.seed_transitions >= sum(busy.transitions.values())
    assert busy.non_finite == 0 and not busy.lost
    assert not any(module._forward_hooks for module in life.model.modules()), "the grower was to leave the model"


def test_every_fate_comes_up() -> None:
    """Of 60 cohorts some are kept, some taken out in each way there is."""
    counts = Counts()
    for number in range(0, 6, 2):
        life = Life(number, "mlp", counts, torch.device("cpu"), faults=())
        while life.train(50) and counts.germinations < 20 * (1 + number // 2):
            pass
        life.close()
    ends = Counter[str]()
    for kind, num in counts.transitions.items():
        ends[kind.split(" > ")[1]] += num
    assert all(ends[name] for name in ("FOSSILIZED", "CULLED", "CANCELLED", "ROLLED_BACK")), ends


def test_the_controller_goes_on_from_its_state() -> None:
    one, two = Restless(seed=1), Restless(seed=2)
    two.load(one.state())
    draws = [controller._random.random() for controller in (one, two)]
    assert draws[0] == draws[1]
    with pytest.raises(ConfigError, match="other keys"):
        two.load({"random": []})
    assert {Cancel, Cull, Germinate, RollBack}  # what it may ask for


def test_a_weight_that_is_not_finite_ends_a_life_and_is_counted() -> None:
    counts = Counts()
    life = Life(1, "mlp", counts, torch.device("cpu"), faults=())
    assert life.train(10)
    with torch.no_grad():
        next(iter(life.model.parameters())).fill_(math.nan)
    assert not life.train(1)
    assert counts.lost == {"no fault": 1} and counts.non_finite == 1
    life.close()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_faults_strike_and_are_counted_by_name() -> None:
    counts = Counts()
    life = Life(1, "mlp", counts, torch.device("cpu"), faults=("two_growers", "nan_batch", "clock_jumps"))
    while life.train(50) and sum(counts.steps.values()) < 1400:
        pass
    life.close()
    assert set(counts.faults) == {"two_growers", "nan_batch", "clock_jumps"}
    assert not counts.lost and counts.non_finite == 0, "the guard was to restore it, and to be given time for that"
    assert "host_nan" not in usable_faults() and "nan_batch" in usable_faults()


# ----------------------------------------------------------------------------------------------------------------------
# Sittings


@pytest.fixture
def frequent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "SAMPLE_S", 0.0)


def soak(folder: Path, steps: int) -> dict[str, object]:
    return job.execute(SoakOptions(steps=steps, run_dir=folder, faults=False, device="cpu"), lambda sample: None)


@pytest.mark.usefixtures("frequent")
def test_the_same_command_goes_on(tmp_path: Path) -> None:
    first = soak(tmp_path, 300)
    samples = job.read_samples(tmp_path / "samples.jsonl")
    assert sum(samples[-1].steps.values()) == first["steps"] >= 300
    assert set(samples[-1].steps) == set(FAMILIES)
    with (tmp_path / "samples.jsonl").open("ab") as stream:
        stream.write(b'{"sitting":1,')  # a killed writer's
    second = soak(tmp_path, 600)
    assert second["sittings"] == 2 and second["steps"] >= 600
    assert second["lives"] > first["lives"]  # type: ignore[operator]
    again = job.read_samples(tmp_path / "samples.jsonl")
    assert again[: len(samples)] == samples
    totals = [sum(sample.steps.values()) for sample in again]
    assert totals == sorted(totals)
    assert soak(tmp_path, 600)["steps"] == second["steps"], "its end was reached before"
    assert [path.name for path in tmp_path.iterdir()] == ["samples.jsonl"], "temporary files were left"
    assert tempfile.tempdir is None or not tempfile.tempdir.startswith(str(tmp_path))


def test_a_summary_judges_the_longest_sitting() -> None:
    enough = {"GRAFTING > ROLLED_BACK": 2000, "DORMANT > GERMINATED": 100_000}
    short = [sample(1, hours / 10, memory_mb=1000.0 * hours, handles=hours) for hours in range(9)]
    long = [sample(2, hours / 10, transitions=enough) for hours in range(40)]
    good = summarise([*short, *long], "cpu")
    assert good["met"] and good["rollbacks"] == 2000 and good["leaked"] == dict.fromkeys(good["leaked"], 0)
    assert good["hours"] == pytest.approx(0.8 + 3.9)
    leaking = summarise([msgspec.structs.replace(s, memory_mb=100 + 2 * s.hours) for s in long], "cpu")
    assert not leaking["met"] and leaking["memory"]["mb_per_hour"] == pytest.approx(2.0)
    spread = [msgspec.structs.replace(s, memory_mb=100 + 2 * s.hours, in_use_mb=60.0) for s in long]
    fragmented = summarise(spread, "cpu")
    assert fragmented["in_use"]["high"] == 0 and not fragmented["met"] and leaking["in_use"] is None
    open_ones = summarise([msgspec.structs.replace(s, handles=round(7 + 10 * s.hours)) for s in long], "cpu")
    assert not open_ones["met"] and open_ones["leaked"]["handles"] > 0
    few = summarise(short, "cpu")
    assert not few["met"] and few["transitions"] == 1


def test_options_need_an_end() -> None:
    with pytest.raises(ConfigError, match="say --hours 1 or --steps 100000"):
        SoakOptions()
    for wrong in ({"hours": 0.0}, {"hours": math.nan}, {"steps": 0}, {"steps": 5, "device": "tpu"}):
        with pytest.raises(ConfigError):
            SoakOptions(**wrong)  # type: ignore[arg-type]


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "samples.jsonl").write_text("{}\n")
    with pytest.raises(DataError, match="--fresh"):
        soak(tmp_path, 10)
    os.remove(tmp_path / "samples.jsonl")
    (tmp_path / "taken").write_text("")
    with pytest.raises(ConfigError, match="cannot be made"):
        soak(tmp_path / "taken", 10)


@pytest.mark.usefixtures("frequent")
def test_one_host_stays_while_others_come_and_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = list[tuple[str, int]]()

    class Short(Life):
        def __init__(self, *parts: object, longest: int | None, **named: object) -> None:
            super().__init__(*parts, longest=50 if longest else None, **named)  # type: ignore[arg-type]

        def close(self) -> None:
            super().close()
            ended.append((self.family, self._taken))
            assert self.longest or self.config.evidence.accept == "evidence", "it would soon have grown too large"

    monkeypatch.setattr(job, "Life", Short)
    soak(tmp_path, 400)
    assert ended == [(family, 50) for family in FAMILIES] * 2 + [("mlp", 100)]
