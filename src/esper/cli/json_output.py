"""``--json``: a command's result for programs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from esper.cli.command import UsageError
from esper.files import replace_text

STANDARD_OUTPUT = "-"


def check_destination(target: str) -> None:
    """Refuse a place that cannot be written *before* a long job, not after it.

    Raises
    ------
    UsageError
        The folder is missing or not writable, or the path is a folder.
    """
    if target == STANDARD_OUTPUT:
        return
    path = Path(target)
    if path.is_dir():
        raise UsageError(f"--json names a file, got the folder {target!r}; give it a file name: {path / 'result.json'}")
    if not path.parent.is_dir():
        raise UsageError(f"--json names a file in a folder that exists, got {target!r}; say: mkdir -p {path.parent}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UsageError(f"--json names a place that can be written, got {target!r}; choose another or change its mode")


def encode(result: dict[str, Any]) -> str:
    """Indented JSON. A number that is not finite becomes ``null``."""
    import msgspec

    return msgspec.json.format(msgspec.json.encode(result, enc_hook=_plain), indent=2).decode()


def write_file(result: dict[str, Any], target: str) -> None:
    """Write the result so that a reader never sees half of it."""
    path = Path(target)
    text = encode(result) + "\n"
    if path.exists() and not path.is_file():  # a device or a pipe must not be replaced by a file
        path.write_text(text, encoding="utf-8")
        return
    replace_text(path, text)


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "item"):  # a NumPy scalar
        return value.item()
    raise TypeError(f"a {type(value).__name__} has no JSON form")
