"""Numbers as people read them, in ASCII."""

from __future__ import annotations

import math
from collections.abc import Sequence

_PREFIXES = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def magnitude(value: float) -> str:
    """``21400`` -> ``21.4k``; ``?`` for an unknown value."""
    if not math.isfinite(value):
        return "?"
    for scale, prefix in _PREFIXES:
        if abs(value) >= scale * 0.9995:
            scaled = value / scale
            if abs(scaled) >= 9999.5:
                return f"{value:.2e}"
            return f"{trim(f'{scaled:.1f}') if abs(scaled) < 100 else f'{scaled:.0f}'}{prefix}"
    return trim(f"{value:.0f}" if value == int(value) else f"{value:.3g}")


def decimal(value: float, digits: int = 3) -> str:
    """A loss or score: fixed digits where they say something, scientific where they would be zeros."""
    if not math.isfinite(value):
        return "?"
    if value != 0 and (abs(value) < 10 ** (-digits) or abs(value) >= 1e5):
        return f"{value:.{max(digits - 1, 1)}e}"
    return f"{value:.{digits}f}"


def signed(value: float, digits: int = 3) -> str:
    text = decimal(value, digits)
    return text if text.startswith("-") or text == "?" else f"+{text}"


def percent(share: float, *, sign: bool = False) -> str:
    """``0.0612`` -> ``6%``, one digit below 10% where it matters."""
    if not math.isfinite(share):
        return "?"
    value = share * 100
    digits = 0 if abs(value) >= 10 or abs(value - round(value)) < 0.05 else 1
    return f"{value:{'+' if sign else ''}.{digits}f}%"


def duration(seconds: float) -> str:
    """``75`` -> ``1 min 15 s``."""
    if not math.isfinite(seconds) or seconds < 0:
        return "?"
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{trim(f'{seconds:.1f}')} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if minutes else f"{hours} h"


def trim(text: str) -> str:
    return text.rstrip("0").rstrip(".") if "." in text else text


def site_list(sites: Sequence[str], limit: int = 2) -> str:
    """A few names, then how many more; repeated names once."""
    names = list(dict.fromkeys(sites))
    shown = ", ".join(names[:limit]) if names else "no site"
    return shown if len(names) <= limit else f"{shown} +{len(names) - limit}"
