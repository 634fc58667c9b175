"""Whole jobs: presets with real data, control arms, run directories. Importing this does not import torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from esper.runs.options import PRESET_NAMES, RunOptions

if TYPE_CHECKING:
    from esper.runs.artifacts import load_grown, write_export
    from esper.runs.job import execute
    from esper.runs.presets import preset_sites

__all__ = ["PRESET_NAMES", "RunOptions", "execute", "load_grown", "preset_sites", "write_export"]

_LAZY = {
    "execute": "esper.runs.job",
    "load_grown": "esper.runs.artifacts",
    "write_export": "esper.runs.artifacts",
    "preset_sites": "esper.runs.presets",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_LAZY[name]), name)
