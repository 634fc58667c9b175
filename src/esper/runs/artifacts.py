"""What a run leaves on disk besides its events: weights, structure, and an export that needs no Esper."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from esper.errors import DataError, ExportError
from esper.files import replace_file, replace_text
from esper.runs import hosts
from esper.runs.arms import Trained
from esper.runs.preset import Preset

STRUCTURE_VERSION = 1
_REBUILD = '''"""Rebuild the exported model. Needs torch and safetensors, nothing else."""

import json
from pathlib import Path

import torch
from host import build, widen
from safetensors.torch import load_file


def load(folder=Path(__file__).parent):
    structure = json.loads((Path(folder) / "structure.json").read_text(encoding="utf-8"))
    model = widen(build(structure["host"]), structure["layers"])
    model.load_state_dict(load_file(Path(folder) / "model.safetensors"), strict=True)
    return model.eval()


if __name__ == "__main__":
    model = load()
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    print(model)
'''


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON so that a reader never sees half of it."""
    replace_text(path, json.dumps(value, indent=2) + "\n")


def write_model(run_dir: Path, preset: Preset, trained: Trained) -> None:
    """The grown model of the first seed as plain weights, and the structure that they fit."""
    replace_file(run_dir / "model.safetensors", lambda temporary: _save(trained.weights, temporary))
    structure = {
        "version": STRUCTURE_VERSION,
        "preset": preset.name,
        "host": preset.spec(trained.cell.widths),
        "layers": trained.layers,
        "params": trained.params,
        "seed": trained.cell.seed,
        **trained.difference,
    }
    write_json(run_dir / "structure.json", structure)


def _save(weights: dict[str, torch.Tensor], path: Path) -> None:
    """Write tensors, read them back and compare, bit for bit."""
    state = {name: value.contiguous() for name, value in weights.items()}
    save_file(state, path)
    again = load_file(path)
    differing = [name for name, value in state.items() if name not in again or _bits(again[name]) != _bits(value)]
    if differing:
        raise ExportError(f"what was written must read back equal, {len(differing)} tensors differ; check the disk")


def _bits(value: torch.Tensor) -> tuple[torch.dtype, torch.Size, bytes]:
    return value.dtype, value.shape, value.reshape(-1).view(torch.uint8).numpy().tobytes()


def load_grown(run_dir: Path) -> tuple[nn.Module, nn.Module, dict[str, Any]]:
    """``(host, grown, structure)`` of a finished run: the undersized host (fresh weights) and the grown plain model.

    Raises
    ------
    DataError
        When the directory holds no finished run.
    """
    path = run_dir / "structure.json"
    if not path.is_file() or not (run_dir / "model.safetensors").is_file():
        raise DataError(
            f"a finished run has structure.json and model.safetensors, {str(run_dir)!r} has not; "
            "pass a directory that 'esper run' has written and finished"
        )
    structure = json.loads(path.read_text(encoding="utf-8"))
    if structure.get("version") != STRUCTURE_VERSION:
        raise DataError(
            f"structure.json must be of version {STRUCTURE_VERSION}, got {structure.get('version')!r}; "
            "use the version of Esper that wrote it"
        )
    grown = hosts.widen(hosts.build(structure["host"]), structure["layers"])
    grown.load_state_dict(load_file(run_dir / "model.safetensors"), strict=True)
    return hosts.build(structure["host"]), grown.eval(), structure


def write_export(run_dir: Path, out: Path) -> dict[str, Any]:
    """Write weights, structure, the host's source and a loader into ``out``; read them back and compare.

    Raises
    ------
    ExportError
        When ``out`` is in use, or what was written does not read back equal.
    """
    _, grown, structure = load_grown(run_dir)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ExportError(f"an export needs a new or empty directory, got {str(out)!r}; choose another -o")
    out.mkdir(parents=True, exist_ok=True)
    state = grown.state_dict()
    _save(state, out / "model.safetensors")
    write_json(out / "structure.json", structure)
    (out / "host.py").write_text(inspect.getsource(hosts), encoding="utf-8")
    (out / "rebuild.py").write_text(_REBUILD, encoding="utf-8")
    facts = {"path": str(out), "tensors": len(state), "params": structure["params"]}
    return facts | {name: structure[name] for name in ("loss_difference", "output_difference") if name in structure}
