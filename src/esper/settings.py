"""Settings by dotted name, as they are typed on a command line."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Mapping
from typing import Any

import msgspec

from esper.config import Config
from esper.errors import ConfigError


def with_settings(config: Config, settings: Mapping[str, str]) -> Config:
    """``config`` with settings changed by dotted name, as they are typed: ``{"graft.lr_boost": "1.5"}``.

    A tuple takes its members separated by commas, ``none`` stands for ``None``.

    Raises
    ------
    ConfigError
        For a name that is no setting (near ones are told), or a value that does not fit; ``config`` is unchanged.
    """
    for name, text in settings.items():
        part, _, leaf = name.rpartition(".")
        kinds = _settings(config)
        if name not in kinds:
            near = ", ".join(difflib.get_close_matches(name, list(kinds), n=3, cutoff=0.5)) or "none"
            raise ConfigError(f"no setting is called {name!r}; near names: {near}; docs/configuration.md lists all")
        value = _read(name, text, kinds[name])
        owner = dataclasses.replace(getattr(config, part) if part else config, **{leaf: value})
        config = dataclasses.replace(config, **{part: owner}) if part else owner
    return config


def _settings(config: Config) -> dict[str, Any]:
    """Every setting's dotted name and type."""
    found: dict[str, Any] = {}
    for top in dataclasses.fields(config):
        value = getattr(config, top.name)
        if dataclasses.is_dataclass(value):
            hints = typing.get_type_hints(type(value))
            found |= {f"{top.name}.{inner.name}": hints[inner.name] for inner in dataclasses.fields(value)}
        else:
            found[top.name] = typing.get_type_hints(type(config))[top.name]
    return found


def _read(name: str, text: str, kind: Any) -> Any:
    is_list = typing.get_origin(kind) is tuple
    plain: Any = None if text.lower() == "none" else text.split(",") if is_list else text
    try:
        return msgspec.convert(plain, kind, strict=False)
    except msgspec.ValidationError as error:
        raise ConfigError(
            f"setting {name} must fit its type, got {text!r}: {error}; see docs/configuration.md"
        ) from None
