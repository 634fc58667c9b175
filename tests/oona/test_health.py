"""Health reports: one message for all chunks and seeds, from what a decision has already read."""

from __future__ import annotations

import dataclasses
import struct
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load, save
from tests.models import Pair
from tests.rigs import Rig, attach

from esper.errors import EnvelopeError
from esper.kasmina import reading
from esper.oona import arrays, health
from esper.oona.health import HealthHead, HealthReport, Snapshot
from esper.protocol import Lifecycle

pytestmark = pytest.mark.component


@pytest.fixture(scope="module")
def rig() -> Rig:
    return attach(Pair())


def there_and_back(snapshot: Snapshot) -> HealthReport:
    return health.decode(snapshot.pack({"dropped": 3}))


def test_before_the_first_decision_nothing_is_known() -> None:
    report = there_and_back(health.collect(attach(Pair()).grower.kasmina, 0))
    assert np.isnan(report.mean).all()
    assert report.seeds["seed_id"].size == 0


def test_a_report_says_what_sensors_and_seeds_say(rig: Rig) -> None:
    cohort = rig.germinate()
    rig.train(20)
    kasmina = rig.grower.kasmina
    report = there_and_back(health.collect(kasmina, 20))
    assert report.head == HealthHead(step=20, sites=tuple(kasmina.sites), publisher={"dropped": 3})
    for row, site in enumerate(kasmina.sites.values()):
        chunks = slice(report.offsets[row], report.offsets[row + 1])
        assert site.telemetry is not None
        assert site.telemetry.latest is not None
        assert np.array_equal(report.mean[chunks], site.telemetry.latest[0], equal_nan=True)
        assert np.array_equal(report.variance[chunks], site.telemetry.latest[1], equal_nan=True)
    assert np.isfinite(report.mean).any()
    assert report.seeds["seed_id"].tolist() == sorted(cohort.seed_ids)
    assert set(report.seeds["lifecycle"].tolist()) == {int(cohort.state)}
    assert cohort.state is not Lifecycle.DORMANT
    assert report.seeds["num_chunks"].sum() == (kasmina.table.owner >= 0).sum()
    assert np.array_equal(report.seeds["alpha"], kasmina.table.alpha[cohort.slots])


def test_a_report_is_of_its_moment_although_it_is_packed_later(rig: Rig) -> None:
    snapshot = health.collect(rig.grower.kasmina, 1)
    before = snapshot.pack()
    rig.train(10)
    assert snapshot.pack() == before


def test_collecting_reads_nothing_from_the_device(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("read from the device")

    rig.train(5)
    monkeypatch.setattr(reading, "Transfer", refuse)
    first = rig.grower.kasmina.sites[next(iter(rig.grower.kasmina.sites))].telemetry
    assert first is not None
    snapshot = health.collect(rig.grower.kasmina, 1)
    assert snapshot.sensed[0] is first.latest  # shared, not copied


def test_nobody_writes_into_what_was_read(rig: Rig) -> None:
    rig.train(5)
    sites = rig.grower.kasmina.sites.values()
    arrays_then = [site.telemetry.latest for site in sites if site.telemetry is not None]
    copies = [None if array is None else array.copy() for array in arrays_then]
    rig.train(10)
    for array, copy in zip(arrays_then, copies, strict=True):
        assert array is not None
        assert copy is not None
        assert np.array_equal(array, copy, equal_nan=True)


def a_snapshot(num_chunks: int = 8, num_seeds: int = 2, num_sites: int = 2) -> Snapshot:
    return Snapshot(
        step=5, sites=tuple(f"s{n}" for n in range(num_sites)),
        offsets=np.linspace(0, num_chunks, num_sites + 1).astype(np.int64),
        sensed=tuple(np.ones((3, num_chunks // num_sites), np.float32) for _ in range(num_sites)),
        seeds={name: np.zeros(num_seeds, kind) for name, kind in health._SEED_FIELDS.items()},
    )  # fmt: skip


def test_a_hundred_thousand_chunks_are_one_message_without_a_claim() -> None:
    snapshot = a_snapshot(100_000, 100, 10)
    data = snapshot.pack()
    assert len(data) < 1 << 20 and not snapshot.is_large
    assert a_snapshot(140_000, 100, 10).is_large
    assert health.decode(data).mean.shape == (100_000,)


@pytest.mark.parametrize("is_sensed", [True, False])
def test_a_report_counts_for_what_it_keeps_in_memory(is_sensed: bool) -> None:
    snapshot = a_snapshot(100_000, 100, 10)
    if not is_sensed:
        snapshot = dataclasses.replace(snapshot, sensed=(None,) * 10)
    kept = [array for array in snapshot.sensed if array is not None]
    held = sum(array.nbytes for array in (*kept, snapshot.offsets, *snapshot.seeds.values()))
    assert max(held, len(snapshot.pack())) <= snapshot.num_bytes <= max(held, len(snapshot.pack())) + 4096


@pytest.mark.parametrize(
    ("name", "array", "says"),
    [
        ("offsets", np.array([0, 9, 8]), "offsets must rise"), ("offsets", np.array([1, 4, 8]), "offsets must rise"),
        ("offsets", np.array([0, 4, 1 << 40]), "offsets must rise"), ("offsets", np.array([0, 8]), "'offsets'"),
        ("mean", np.zeros(9, np.float32), "'mean'"), ("variance", np.zeros(8), "'variance'"),
        ("site", np.array([0, 2], np.int32), "one of 2 sites"), ("alpha", np.zeros(3, np.float32), "'alpha'"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused(name: str, array: Any, says: str) -> None:
    parts = load(a_snapshot().pack())
    with pytest.raises(EnvelopeError, match=says):
        health.decode(save({**parts, name: array}))


@pytest.mark.parametrize(
    "header",
    [
        b'{"head":{"dtype":"U8","shape":[9223372036854775807,9223372036854775807],"data_offsets":[0,1]}}',
        b'{"head":{"dtype":"U8","shape":[1],"data_offsets":[0,18446744073709551615]}}',
        b'{"head":{"dtype":"U8","shape":[4],"data_offsets":[2,1]}}',
        b'{"head":{"dtype":"F1","shape":[1],"data_offsets":[0,1]}}',
        b'{"head":{"dtype":"BF16","shape":[2],"data_offsets":[0,4]}}',
        b'{"head":1}', b"[]", b"{" * 300, b'{"a":' + b"[" * 5000, b"\xff\xfe", b"",
    ],
)  # fmt: skip
def test_hostile_headers_are_refused(header: bytes) -> None:
    with pytest.raises(EnvelopeError):
        health.decode(struct.pack("<Q", len(header)) + header + bytes(8))


def test_a_head_with_too_much_in_it_is_refused() -> None:
    with pytest.raises(EnvelopeError, match="200000 values"):
        health.decode(arrays.pack({"step": 1, "sites": [""] * 200_001}, {}))
