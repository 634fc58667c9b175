"""The tables of docs/results.md on variants of growing: parts of the recipe, and starts on images. Read by
``generate_results.py``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ONE_LOOK = "one look at each cohort"
"""A variant that there is since cohorts may be looked at three times."""

RECIPE = """Each row changes one thing against what is shipped, with a learning rate of its own; the loss is the
held-out one (nothing is chosen by it but learning rates), paired by seed: **bold** where the interval excludes zero.
Positive is worse. A branch on a single layer, another blueprint or another host may order them differently."""

BEFORE_LOOKS = """Measured with the code that the command names, in which a cohort was judged once: that it may be
judged three times ([0015](decisions/0015-looks.md)) came later."""

STARTS = """The same for the first weights of new convolutions: every cohort is kept, so that all variants grow alike
and differ in these weights alone, or in how they were fitted. *Explained* is what share of its target a fit explains on
batches it was not made on, in the mean; *sure* counts the fits whose gain on those batches has a t statistic of 2 or
more. Unless a row says otherwise fits are as long as they are set to be and are used whether or not they hold there."""


def sections(folder: Path) -> list[tuple[str, str]]:
    """Headings and what stands under them."""
    recipes, starts = _all(folder, "recipe_*.json"), _all(folder, "image_starts_*.json")
    found = [("Which parts of the recipe pay", "\n\n".join([RECIPE, *map(_recipe, recipes)]))]
    if starts:
        found.append(("First weights on images", "\n\n".join([STARTS, *map(_starts, starts)])))
    return found


def _all(folder: Path, pattern: str) -> list[dict[str, Any]]:
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob(pattern))]
    return [result for result in found if _base(result) in result["variants"]]


def _recipe(result: dict[str, Any]) -> str:
    said = [] if ONE_LOOK in result["variants"] else [BEFORE_LOOKS, ""]
    lines = ["| variant | loss minus shipped, 95% interval | FLOPs | kept of germinated |", "|---|---|---|---|"]
    for name, variant in _others(result):
        kept = f"{variant['accepted']} of {variant['germinated']}"
        lines.append(f"| {name} | {_difference(variant)} | {variant['flops_ratio']:.2f}x | {kept} |")
    return "\n".join([*_heading(result, "shipped"), *said, *lines])


def _starts(result: dict[str, Any]) -> str:
    base = result["base"]
    lines = [
        f"| start | loss minus that of *{base}*, 95% interval | FLOPs | explained | sure | rate |",
        "|---|---|---|---|---|---|",
    ]
    for name, variant in _others(result):
        fits = variant["fits"]
        explained = "" if fits["explained"] is None else f"{fits['explained']:.1%}"
        sure = f"{fits['sure']} of {fits['num']}" if fits["num"] else ""
        cells = [name, _difference(variant), f"{variant['flops_ratio']:.2f}x", explained, sure, f"{variant['lr']:g}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*_heading(result, base), *lines])


def _heading(result: dict[str, Any], base: str) -> list[str]:
    losses = [loss for loss in result["variants"][_base(result)]["held_out"] if loss is not None]
    level = f"{base}: held-out loss {sum(losses) / len(losses):.3f}" if losses else f"{base}: diverged"
    return [f"**{result['title']}** ({result['seeds']} paired seeds, {level}). `{result['command']}`", ""]


def _base(result: dict[str, Any]) -> str:
    return result.get("base", "as shipped")


def _others(result: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return [(name, variant) for name, variant in result["variants"].items() if name != _base(result)]


def _difference(variant: dict[str, Any]) -> str:
    mean, (low, high) = variant["minus_shipped"], variant["minus_shipped_interval"]
    if mean is None:
        return "diverged"
    if low is None or high is None:
        return f"{mean:+.3f}"
    text = f"{mean:+.3f} ({low:+.3f} to {high:+.3f})"
    return f"**{text}**" if low > 0 or high < 0 else text
