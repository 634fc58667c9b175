"""Where memory is short, fewer chunks and smaller captures are chosen, and every place that reports says so."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.models import Pair, rows
from tests.rigs import attach

import esper
from esper.cli import main
from esper.kasmina import memory
from esper.observe.history import RunHistory
from esper.observe.report.summary import notes as page_notes
from esper.protocol import Attached, Germinated, Record

pytestmark = pytest.mark.component
CPU = torch.device("cpu")


def leave(free: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda device: free)


def test_this_machine_tells_what_is_free() -> None:
    free = memory.free_bytes(CPU)
    assert free is None or 1 << 20 < free < 1 << 50
    assert memory.free_bytes(torch.device("meta")) is None


def test_what_is_free_is_read_from_the_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "meminfo"
    monkeypatch.setattr(memory, "_MEMINFO", file)
    assert memory.free_bytes(CPU) is None
    file.write_text("MemTotal:  9 kB\n")
    assert memory.free_bytes(CPU) is None
    file.write_text("MemTotal:  9 kB\nMemAvailable:   3 kB\n")
    assert memory.free_bytes(CPU) == 3072


def test_on_a_gpu_the_allocators_reserve_counts_up_to_its_largest_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 9000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 5000)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 4200)
    assert memory.free_bytes(torch.device("cuda")) == 1800


@pytest.mark.parametrize("free", [None, 1 << 40])
def test_with_enough_memory_nothing_changes(free: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    leave(free, monkeypatch)
    rig = attach(Pair(), sites=esper.SitesConfig(chunks=4))
    assert {info.num_chunks for info in rig.grower.sites()} == {4}
    assert rig.grower.discovery.notes == () and "free memory" not in repr(rig.grower)
    rig.train(2)
    cohort = rig.germinate(start="negative_gradient")
    assert cohort.notes == ()


def test_fewer_chunks_are_chosen_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    leave(None, monkeypatch)
    needed = sum(map(memory.telemetry_bytes, attach(Pair()).grower.discovery.sites))
    leave(100 * (needed - 40), monkeypatch)  # telemetry may take a hundredth
    rig = attach(Pair(), sites=esper.SitesConfig(chunks=4))
    assert all(1 <= info.num_chunks < 4 for info in rig.grower.sites())
    (note,) = rig.grower.discovery.notes
    assert "chunks instead of" in note and "are free on cpu" in note and "1%" in note
    attached = next(event for event in rig.events if isinstance(event, Attached))
    assert attached.notes == (note,)
    assert f"chosen by free memory: {note}" in repr(rig.grower)
    assert note in str(rig.grower.report())
    rig.train(2)
    rig.germinate()


@given(free=st.integers(0, 1 << 22), chunks=st.integers(1, 4))
@settings(max_examples=30, deadline=None)
def test_chunks_stay_within_their_room_wherever_one_each_does(free: int, chunks: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        leave(None, patch)
        plans = attach(Pair(), sites=esper.SitesConfig(chunks=chunks)).grower.discovery.sites
        leave(free, patch)
        found, notes = memory.fit_chunks(plans, ())
    counts = [plan.info.num_chunks for plan in found]
    assert all(1 <= count <= chunks for count in counts)
    assert bool(notes) == (sum(counts) < chunks * len(counts))
    if any(count > 1 for count in counts) and sum(counts) < chunks * len(counts):
        assert sum(map(memory.telemetry_bytes, found)) <= memory.TELEMETRY_SHARE * free + memory.BYTES_A_CHUNK * len(
            found
        )


def test_chunks_that_a_layer_demands_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    leave(None, monkeypatch)
    plans = attach(Pair(), sites=esper.SitesConfig(chunks=4)).grower.discovery.sites
    leave(100, monkeypatch)
    found, notes = memory.fit_chunks(plans, [plan.info.name for plan in plans])
    assert found == list(plans) and notes == ()


def test_captures_keep_fewer_rows_and_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = []
    for free in (None, 40_000):
        leave(None, monkeypatch)
        rig = attach(Pair(), batches=rows(10, size=64))
        rig.train(3)
        leave(free, monkeypatch)
        cohort = rig.germinate(start="negative_gradient")
        kept.append(max(site.capture.rows_per_batch for site in rig.grower.kasmina.sites.values() if site.capture))
    assert 1 <= kept[1] < kept[0]
    (note,) = cohort.notes
    assert "captures take at most" in note and "25%" in note
    told = [event.reason for event in rig.events if isinstance(event, Germinated)]
    assert note in told[-1]


def test_the_doctor_says_what_would_be_taken(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    leave(1 << 30, monkeypatch)
    main(["doctor"])
    out = capsys.readouterr().out
    assert "memory cpu: 1.0 GiB free; telemetry takes at most 10.2 MiB, captures at most 256.0 MiB (captures" in out
    leave(None, monkeypatch)
    main(["doctor"])
    assert "memory cpu: nobody tells what is free" in capsys.readouterr().out


def test_the_page_of_a_run_says_so() -> None:
    history = RunHistory()
    attached = Attached(
        step=0, sites=(), skipped=(), host_params=5, covered_params=5, total_steps=None, notes=("8 chunks for 9",)
    )
    history.apply(Record(v=1, seq=0, time=0.0, event=attached))
    assert "8 chunks for 9" in page_notes(history)
