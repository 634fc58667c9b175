from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.runs.test_hosts import LAYERS, SPECS

from esper.errors import DataError, ExportError
from esper.runs import load_grown, write_export
from esper.runs.arms import Cell, Trained, load_preset
from esper.runs.artifacts import write_json, write_model
from esper.runs.hosts import build, widen
from esper.runs.options import RunOptions

pytestmark = pytest.mark.component


def finished(run_dir: Path, kind: str = "mlp", **changes: Any) -> Path:
    """A run directory with a grown network, as ``esper run`` leaves it."""
    run_dir.mkdir(parents=True)
    spec = SPECS[kind][0]
    model = widen(build(spec), LAYERS[kind])
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, run_dir / "model.safetensors")
    structure = {"version": 1, "preset": "x", "host": spec, "layers": LAYERS[kind], "params": 7, "seed": 0}
    write_json(run_dir / "structure.json", structure | changes)
    return run_dir


@pytest.mark.parametrize("kind", SPECS)
def test_grown_network_comes_back(tmp_path: Path, kind: str) -> None:
    run_dir = finished(tmp_path / "run", kind)
    host, grown, structure = load_grown(run_dir)
    stored = load_file(run_dir / "model.safetensors")
    assert all(torch.equal(value, stored[name]) for name, value in grown.state_dict().items())
    assert not grown.training and structure["layers"] == LAYERS[kind]
    small = {name: value.shape for name, value in host.state_dict().items()}
    assert small == {name: value.shape for name, value in build(SPECS[kind][0]).state_dict().items()}
    assert small != {name: value.shape for name, value in stored.items()}


BLOCK_ESPER = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "esper":
            raise ImportError("Esper is not to be had")
sys.meta_path.insert(0, Blocker())
try:
    import esper
except ImportError:
    pass
else:
    raise SystemExit("the blocker does not block")
sys.path.insert(0, sys.argv[1])
import rebuild, torch
x = torch.load(sys.argv[2])
torch.save(rebuild.load()(x), sys.argv[3])
assert not any(name.partition(".")[0] == "esper" for name in sys.modules)
"""


@pytest.mark.integration
@pytest.mark.parametrize("kind", SPECS)
def test_an_export_loads_and_computes_the_same_without_esper(
    tmp_path: Path, kind: str, run_python: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    run_dir, out = finished(tmp_path / "run", kind, loss_difference=1e-7), tmp_path / "deep" / "model"
    result = write_export(run_dir, out)
    assert result == {
        "path": str(out), "tensors": len(load_file(out / "model.safetensors")), "params": 7, "loss_difference": 1e-7,
    }  # fmt: skip
    _, grown, _ = load_grown(run_dir)
    x = SPECS[kind][1]
    x = torch.rand_like(x) if x.is_floating_point() else torch.randint_like(x, 256)
    torch.save(x, tmp_path / "x.pt")
    done = run_python(BLOCK_ESPER, str(out), str(tmp_path / "x.pt"), str(tmp_path / "y.pt"))
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / "y.pt"), grown(x))


@pytest.mark.parametrize("missing", ["structure.json", "model.safetensors"])
def test_a_directory_without_a_finished_run(tmp_path: Path, missing: str) -> None:
    run_dir = finished(tmp_path / "run")
    (run_dir / missing).unlink()
    with pytest.raises(DataError, match=r"a finished run has structure.json and model.safetensors, .*run' has not"):
        load_grown(run_dir)


def test_structure_of_another_version(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"structure\.json must be of version 1, got 2; use the version"):
        load_grown(finished(tmp_path / "run", version=2))


def test_an_export_overwrites_nothing(tmp_path: Path) -> None:
    run_dir = finished(tmp_path / "run")
    (tmp_path / "empty").mkdir()
    write_export(run_dir, tmp_path / "empty")
    for taken in (tmp_path / "empty", run_dir / "structure.json"):
        with pytest.raises(ExportError, match=r"needs a new or empty directory, got .*; choose another -o"):
            write_export(run_dir, taken)


def test_an_export_that_reads_back_otherwise_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lossy(state: dict[str, torch.Tensor], path: Path) -> None:
        save_file({name: value + (1 if name == "0.bias" else 0) for name, value in state.items()}, path)

    monkeypatch.setattr("esper.runs.artifacts.save_file", lossy)
    with pytest.raises(ExportError, match="must read back equal, 1 tensors differ; check the disk"):
        write_export(finished(tmp_path / "run"), tmp_path / "out")


def test_a_model_that_reads_back_otherwise_does_not_replace_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"the one before")

    def torn(state: dict[str, torch.Tensor], path: Path) -> None:
        save_file({name: torch.nextafter(value, value + 1) for name, value in state.items()}, path)

    cell = Cell(arm="grown", seed=0, lr=1e-3, steps=10, widths=(8, 8), options=RunOptions(), device="cpu", size="cpu")
    weights = {"w": torch.tensor([0.0, float("nan")]), "scale": torch.tensor(2.0), "none": torch.zeros(0)}
    trained = Trained(cell, 0.5, 3, 1.0, 1.0, (8, 8), weights=weights)
    preset = load_preset(RunOptions(), "cpu", "cpu")
    with monkeypatch.context() as patch:
        patch.setattr("esper.runs.artifacts.save_file", torn)
        with pytest.raises(ExportError, match="must read back equal, 2 tensors differ"):
            write_model(tmp_path, preset, trained)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    assert (tmp_path / "model.safetensors").read_bytes() == b"the one before"
    write_model(tmp_path, preset, trained)
    assert set(load_file(tmp_path / "model.safetensors")) == set(weights)


def test_json_is_written_whole(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text("old", encoding="utf-8")
    with pytest.raises(TypeError):
        write_json(path, {"value": object()})
    assert path.read_text(encoding="utf-8") == "old"
    write_json(path, {"value": [1]})
    assert json.loads(path.read_text(encoding="utf-8")) == {"value": [1]}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]
