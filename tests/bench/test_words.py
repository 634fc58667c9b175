"""What a person reads of the measurements, and the arithmetic behind some of them."""

from __future__ import annotations

import pytest
import torch

from esper.bench import busy, growth, words
from esper.cli import main

pytestmark = pytest.mark.unit


def test_verdicts_are_in_words() -> None:
    step = {"host": "mlp", "sites": 2, "phase": "default", "added_share": 0.02, "added_cpu_share": 0.01, "bar": 0.03}
    layer = {"what": "layer", "seeds": 64, "added_gpu_us": 64.0, "added_wall_us": 120.0, "met": False}
    row = {"what": "forward", "rows": 8192, "seeds": 64, "gpu_us": 12.0, "bar_us": 15.0, "met": True}
    memory = {"host": "gpt2", "phase": "memory_default_pool", "added_memory_share": 0.044, "state": "GRAFTING"}
    memory |= {"step": 16, "place": "training", "met": True}
    files = {
        "step_cpu": {"rows": [step | {"met": True}, memory]},
        "layer": {"rows": [layer]},
        "ops_graft": {"rows": [row]},
    }
    assert words.summary(files) == [
        "mlp, 2 sites, default: +2.0% of a step (+1.0% by CPU time) - met",
        "gpt2, peak memory default pool: +4.4%, reached in GRAFTING at step 16 (training) - met",
        "layer: layer with 64 seeds: 64.0 us of the GPU, 120.0 us by the wall - NOT met",
        "ops_graft: forward, 8192 rows, 64 seeds: 12.0 us, bar 15.0 - met",
    ]


def test_success_has_an_interval_and_none_without_cohorts() -> None:
    lives = growth.Lives(cohorts={1: "FOSSILIZED", 2: "CULLED", 3: "FOSSILIZED", 4: "FOSSILIZED"})
    line = growth.success(lives)
    assert (line["kept"], line["cohorts"], line["rate"]) == (3, 4, 0.75)
    assert line["interval"] == pytest.approx([0.3006, 0.9544], abs=1e-3)  # Wilson, by hand
    assert growth.success(growth.Lives())["rate"] is None


def test_lifetimes_are_medians_by_end() -> None:
    lives = growth.Lives(born={9: (1, 0.0)}, ended=[("CULLED", 10, 1.0), ("CULLED", 30, 3.0), ("FOSSILIZED", 7, 0.5)])
    line = growth.durations(lives)
    assert line["ends"]["CULLED"] == {"seeds": 2, "steps": 20.0, "seconds": 2.0}
    assert line["still_alive"] == 1


def test_matrix_kernels_are_told_from_others() -> None:
    found = busy.shares([("sm90_xmma_gemm_bf16", 60.0), ("vectorized_elementwise_kernel", 20.0)], 100.0)
    assert found == {"matrix_share": 0.6, "kernel_share": 0.8}


@pytest.mark.parametrize(("text", "wanted"), [("87\n", 87.0), ("", None), ("[N/A]\n", None)])
def test_the_counter_may_have_nothing_to_say(text: str, wanted: float | None) -> None:
    assert busy.percent(text) == wanted


def test_utilisation_is_read_while_something_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(busy, "reader", lambda device: ((lambda: 50.0), "test"))
    monkeypatch.setattr(busy, "_EVERY_S", 0.001)
    with busy.Sampler(torch.device("cpu")) as sampler:
        while not sampler.readings:
            pass
    assert sampler.median == 50.0
    assert busy.reader(torch.device("cpu"))[1] == "test"


def test_the_counter_of_a_machine_without_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pynvml", None)
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert busy.reader(torch.device("cuda")) == (None, "neither nvidia-ml-py nor nvidia-smi")


def test_the_command_checks_one_operation(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "ops", "--parity-only", "--only", "slot_adam"]) == 0
    assert "24 parity checks passed (reference)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["bench", "opps"], "no part is called 'opps'; did you mean 'ops'?"),
        (["bench", "ops", "--only", "grafts"], "no operation is called 'grafts'; did you mean 'graft'?"),
        (["bench", "step", "--parity-only"], "--parity-only goes with ops"),
        (["bench", "--device", "tpu"], "no device is called 'tpu'"),
    ],
)
def test_mistakes_are_told(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert message in capsys.readouterr().err
