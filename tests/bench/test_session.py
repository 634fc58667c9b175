"""A whole sitting at tiny sizes on the CPU: everything runs, each line is on file, and nothing wrong gets a time."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from esper.bench import PARTS, ops, step
from esper.bench.ahead import compile_ahead
from esper.bench.ops import telemetry
from esper.bench.record import Record
from esper.bench.session import Session
from esper.kasmina.ops import dispatch
from esper.kasmina.ops import telemetry as telemetry_op

pytestmark = pytest.mark.integration
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def sitting(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What ``esper bench --rehearse --out`` leaves behind."""
    folder = tmp_path_factory.mktemp("bench")
    precision = torch.get_float32_matmul_precision()
    session = Session(Record("test", CPU, lambda text: None, folder), tiny=True)
    compiler = torch._dynamo.config.skip_nnmodule_hook_guards
    session.measure(PARTS)
    torch.set_float32_matmul_precision(precision)
    assert torch._dynamo.config.skip_nnmodule_hook_guards == compiler, "the compiler is as it was"
    assert session.failures == {}
    return {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}


def test_every_measurement_leaves_a_file_that_names_its_machine(sitting: dict[str, Any]) -> None:
    assert set(sitting) == {*(f"ops_{name}" for name in dispatch.OPERATIONS), "layer", "step_cpu", "growth_cpu"}
    for content in sitting.values():
        assert content["rows"] and content["torch"] == torch.__version__ and content["device"]


def test_times_of_operations_stand_beside_bytes_flops_and_floor(sitting: dict[str, Any]) -> None:
    for name in dispatch.OPERATIONS:
        content = sitting[f"ops_{name}"]
        assert content["implementation"] == "reference" and all(line["equal"] for line in content["parity"])
        assert content["copy_tb_per_s"] > 0
        for row in content["rows"]:
            assert row["gpu_us"] > 0 and row["bytes"] > 0 and row["flops"] > 0 and row["floor_us"] > 0
            assert ("met" in row) == ("bar_us" in row)


def test_seeds_too_wide_for_the_kernels_take_dense_products(sitting: dict[str, Any]) -> None:
    paths = {row["columns"]: row["path"] for row in sitting["ops_graft"]["rows"] if row["what"] == "width"}
    assert paths == {16: "kernel", 256: "dense products"}


def test_the_layer_is_compared_with_itself_alone_and_with_the_plans_loop(sitting: dict[str, Any]) -> None:
    first, dormant = sitting["layer"]["rows"]
    assert first["seeds"] == 2 and dormant["seeds"] == 0
    for kind in ("gpu", "wall"):
        assert first[f"added_{kind}_us"] == pytest.approx(first[f"esper_{kind}_us"] - first[f"bare_{kind}_us"], rel=0.1)
    assert first["over_loop"] > 0 and "over_loop" not in dormant


def test_every_row_of_whole_steps_is_measured(sitting: dict[str, Any]) -> None:
    rows = sitting["step_cpu"]["rows"]
    found = {(row["host"], row["phase"]) for row in rows}
    wanted = {
        ("gpt2", "every_step"), ("gpt2", "default"), ("gpt2", "grafted_and_training"), ("gpt2", "utilisation"),
        ("gpt2", "memory_dormant"), ("gpt2", "memory_default_pool"), ("gpt2", "memory_lifecycle"),
        ("digits", "default"), ("mlp", "default"), ("resnet", "default"), ("chain", "default"),
        ("digits", "unwatched"), ("mlp", "unwatched"), ("resnet", "unwatched"),
    }  # fmt: skip
    assert wanted <= found
    assert {row["sites"] for row in rows if row["host"] == "chain"} == {1, 3}
    for row in rows:
        assert ("bar" in row) == ((row["host"], row["phase"]) in step.BARS)


def test_memory_is_followed_through_a_whole_lifecycle(sitting: dict[str, Any]) -> None:
    row = next(row for row in sitting["step_cpu"]["rows"] if row["phase"] == "memory_lifecycle")
    path = ["GERMINATED", "TRAINING", "GRAFTING", "STABILIZATION", "EVALUATING", "FINE_TUNING", "FOSSILIZED"]
    assert [state for state in row["states"] if state in path] == path


def test_the_plans_five_metrics_come_together(sitting: dict[str, Any]) -> None:
    metrics = [row["metric"] for row in sitting["growth_cpu"]["rows"]]
    assert metrics == ["forward_latency", "memory", "gpu_utilisation", "adaptation_success", "lifecycle_duration"]


def test_what_computes_wrongly_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = telemetry_op.chunk_statistics
    monkeypatch.setattr(telemetry_op, "chunk_statistics", lambda *args: right(*args) * 1.001)
    monkeypatch.setattr(telemetry, "time_rows", lambda *args, **named: pytest.fail("it was timed"))
    session = Session(Record("test", CPU, lambda text: None), ("telemetry",), tiny=True)
    session.measure(("ops",))
    assert list(session.failures) == ["parity of telemetry"]
    assert "checks differ" in session.failures["parity of telemetry"] and session.record.files == {}


def test_one_failure_does_not_keep_the_rest_from_being_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(clock: object, *, tiny: bool = False) -> Any:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(telemetry, "time_rows", fails)
    session = Session(Record("test", CPU, lambda text: None), ("telemetry", "slot_adam"), tiny=True)
    session.measure(("ops",))
    assert session.failures == {"times of telemetry": "OutOfMemoryError: no room"}
    assert session.record.files["ops_slot_adam"]["rows"]


def test_what_is_named_is_measured_in_the_order_in_which_it_is_named() -> None:
    told: list[str] = []
    session = Session(Record("test", CPU, told.append), ("slot_adam", "layer", "telemetry"), tiny=True)
    session.measure(("ops",))
    assert [line for line in told if line.startswith("== ")] == [
        "== parity of slot_adam", "== times of slot_adam", "== times of layer", "== parity of telemetry",
        "== times of telemetry",
    ]  # fmt: skip
    assert session.failures == {} and set(session.record.files) == {"ops_slot_adam", "layer", "ops_telemetry"}


def test_other_processes_run_what_will_be_measured_and_their_failures_are_only_counted() -> None:
    told: list[str] = []
    compile_ahead(Record("test", CPU, told.append), ("slot_adam", "nothing"), timed=True, processes=2)
    (line,) = told
    assert line.startswith("kernels compiled by 2 processes") and line.endswith("4 of 8 jobs failed")


def test_without_a_gpu_operations_are_checked_and_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    session = Session(Record("test", CPU, lambda text: None), ("slot_adam",))
    session.measure(("ops",))
    assert session.notes == [ops.TIMED_ON_GPU]
    assert session.record.files["ops_slot_adam"]["rows"] == []
