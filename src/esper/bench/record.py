"""Where measurements go: a folder of JSON files, written anew after every line, so that a killed run keeps them."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from esper.files import replace_text

Line = dict[str, Any]


def environment(device: torch.device) -> Line:
    """The device and the versions that a figure belongs to."""
    found: Line = {"device": platform.processor() or platform.machine(), "python": platform.python_version()}
    if device.type == "cuda":
        found["device"] = torch.cuda.get_device_name(device)
        found["capability"] = ".".join(map(str, torch.cuda.get_device_capability(device)))
    else:
        found["threads"] = torch.get_num_threads()
    found |= {"torch": str(torch.__version__), "cuda": torch.version.cuda, "triton": _triton_version()}
    return found


def _triton_version() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return str(triton.__version__)


@dataclass
class Record:
    """Collects lines by file name.

    Parameters
    ----------
    tell:
        Called with each line in words.
    folder:
        Where files are written; ``None`` keeps everything in memory.
    """

    command: str
    device: torch.device
    tell: Callable[[str], None]
    folder: Path | None = None
    files: dict[str, Line] = field(default_factory=dict[str, Line])

    def begin(self, name: str, **facts: Any) -> None:
        """Start a file."""
        self.files[name] = {"command": self.command, **environment(self.device), **facts, "rows": []}
        self._write(name)

    def add(self, name: str, line: Line) -> Line:
        """Note a line of a file, and write the file."""
        rounded = _rounded(line)
        self.files[name]["rows"].append(rounded)
        self._write(name)
        self.tell(json.dumps(rounded))
        return rounded

    def _write(self, name: str) -> None:
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            replace_text(self.folder / f"{name}.json", json.dumps(self.files[name], indent=1) + "\n")


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}  # pyright: ignore[reportUnknownVariableType]
    if isinstance(value, float):
        return float(f"{value:.5g}")
    return value
