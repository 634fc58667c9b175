"""Presets by name."""

from __future__ import annotations

import difflib
from pathlib import Path

import torch

from esper.config import SitesConfig
from esper.errors import ConfigError, UnknownNameError
from esper.kasmina.discovery import discover
from esper.kasmina.isolation import undisturbed
from esper.protocol import SiteInfo, Skipped
from esper.runs.hosts import build
from esper.runs.options import PRESET_NAMES
from esper.runs.preset import Preset


def check_preset(name: str) -> None:
    """Raise :class:`UnknownNameError`, listing the known presets, unless ``name`` is one."""
    if name not in PRESET_NAMES:
        near = difflib.get_close_matches(name, PRESET_NAMES, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UnknownNameError(f"no preset is called {name!r}; {hint}known: {', '.join(PRESET_NAMES)}")


def make_preset(name: str, device: torch.device, *, size: str = "cpu", data: Path | None = None) -> Preset:
    """Load a preset's data onto ``device``.

    Raises
    ------
    UnknownNameError
        For an unknown preset; the known ones are listed.
    DataError
        When its data is missing or has the wrong shape.
    """
    check_preset(name)
    if data is not None and name != "vision":
        raise ConfigError(f"only the vision preset takes --data, got it for {name!r}; leave it out")
    if name == "digits":
        from esper.runs.presets.digits import Digits

        return Digits(device)
    if name == "code-lm":
        from esper.runs.presets.code_lm import CodeLM

        return CodeLM(device, size=size)
    from esper.runs.presets.vision import Vision

    return Vision(device, size=size, data=data)


def preset_sites(
    name: str, size: str = "cpu", data: Path | None = None, *, layers: bool = False
) -> tuple[tuple[SiteInfo, ...], tuple[Skipped, ...]]:
    """The sites of a preset's host (with ``layers`` its single layers too), and what was skipped."""
    preset = make_preset(name, torch.device("cpu"), size="cpu" if size == "auto" else size, data=data)
    model = build(preset.spec(preset.small_widths))
    batch = preset.held_out()[0]
    with undisturbed(model):
        found = discover(model, lambda: preset.loss(model, batch), SitesConfig(layers=layers))
    return tuple(plan.info for plan in found.sites), found.skipped
