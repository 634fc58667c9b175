"""``esper sites``."""

from __future__ import annotations

import difflib
import fnmatch
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from esper.cli.command import Context, Outcome, UsageError, unknown_name
from esper.cli.parsing import JsonPath, Option
from esper.cli.terminal import columns, table
from esper.runs.options import PRESET_NAMES

if TYPE_CHECKING:
    from esper.protocol import SiteInfo, Skipped

_HEAD = ("site", "kind", "in", "hidden", "out", "chunks", "weights")


@dataclass(frozen=True, kw_only=True)
class Sites:
    """List where a model can grow, and why not elsewhere."""

    preset: Annotated[
        str,
        Option(is_positional=True, metavar="PRESET", help=f"One of {', '.join(PRESET_NAMES)}.", completes=PRESET_NAMES),
    ] = "digits"
    size: Annotated[Literal["cpu", "gpu"], Option(help="Size of the preset's model.")] = "cpu"
    data: Annotated[
        Path | None,
        Option(
            metavar="PATH", help="An .npz with x_train, y_train, x_test, y_test (vision).", default="",
            completes="file",
        ),
    ] = None  # fmt: skip
    layers: Annotated[bool, Option(help="List single layers too (SitesConfig(layers=True)).", default="no")] = False
    match: Annotated[
        tuple[str, ...], Option(metavar="GLOB", help="Only names that match one of these patterns.", default="")
    ] = ()
    json: JsonPath = None

    def execute(self, context: Context) -> Outcome:
        """Probe the preset's model and list what was found."""
        if self.preset not in PRESET_NAMES:
            raise unknown_name("preset", self.preset, PRESET_NAMES)
        from esper.runs import preset_sites  # imports torch

        sites, skipped = preset_sites(self.preset, self.size, self.data, layers=self.layers)
        sites, skipped = select(sites, skipped, self.match)
        result = {
            "preset": self.preset,
            "sites": [_fields(site) for site in sites],
            "skipped": [{"name": item.name, "reason": item.reason} for item in skipped],
        }
        return Outcome(result=result, lines=_lines(sites, skipped, columns(sys.stdout)))


def select(
    sites: Sequence[SiteInfo], skipped: Sequence[Skipped], patterns: Sequence[str]
) -> tuple[tuple[SiteInfo, ...], tuple[Skipped, ...]]:
    """Those whose name matches any of ``patterns``; all without patterns.

    Raises
    ------
    UsageError
        A pattern matches no name at all; near names are listed.
    """
    if not patterns:
        return tuple(sites), tuple(skipped)
    names = [item.name for item in (*sites, *skipped)]
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise UsageError(
                f"every pattern must match a name, {pattern!r} matches none of {len(names)}; "
                f"near: {', '.join(near_patterns(pattern, names))}; list all with: esper sites"
            )

    def is_wanted(name: str) -> bool:
        return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)

    return tuple(s for s in sites if is_wanted(s.name)), tuple(s for s in skipped if is_wanted(s.name))


def near_patterns(pattern: str, names: Sequence[str]) -> list[str]:
    """Patterns like ``pattern`` that do match, with how many: ``blocks.*.mpl`` gives ``'blocks.*.mlp*' (12)``."""
    candidates: list[str] = []
    for name in names:
        parts = ["*" if part.isdecimal() else part for part in name.split(".")]
        candidates += [f"{'.'.join(parts[:depth])}*" for depth in range(1, len(parts) + 1) if parts[depth - 1] != "*"]
    likely = list(dict.fromkeys([*names, *candidates]))
    near = difflib.get_close_matches(pattern, likely, n=3, cutoff=0.3) or likely[:3]
    return [f"{candidate!r} ({len(fnmatch.filter(names, candidate))})" for candidate in near]


def _lines(sites: Sequence[SiteInfo], skipped: Sequence[Skipped], width: int | None) -> list[str]:
    from esper.observe.quantities import magnitude

    rows = [
        (
            site.name, site.kind.replace("_", " "), str(site.in_features), str(site.hidden_features or "-"),
            str(site.out_features), str(site.num_chunks), magnitude(site.weights),
        )
        for site in sites
    ]  # fmt: skip
    lines = table(_HEAD, rows, width=width, numbers=range(2, len(_HEAD))) if rows else []
    plural = "" if len(sites) == 1 else "s"
    lines.append(f"{len(sites)} site{plural} | skipped {len(skipped)}")
    lines += [f"  {item.name}: {item.reason}" for item in skipped]
    return lines


def _fields(site: SiteInfo) -> dict[str, object]:
    return {name: getattr(site, name) for name in site.__struct_fields__}
