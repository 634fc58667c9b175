"""First choices by site kind and optimizer, from measured paired gains; no start wins everywhere."""

from __future__ import annotations

from esper.config import CaptureConfig
from esper.protocol import SiteKind

ROWS_FOR_A_FIT = 2_000
"""Captured rows from which an isolated fit is tried by default.

Weakly supported: on the digits preset (2,048 rows) held-out loss was 0.102 with the fit and 0.109 without, five paired
seeds, an interval that includes zero, at 1.5 times the FLOPs (``benchmarks/results/digits_starts.json``). Trying it is
safe: a fit that does not hold on other batches is not used.
"""

ROWS_A_WEIGHT = 2
"""``tiny`` needs so many rows to solve on for each weight of a unit, and of an output of the span's last layer.

It solves for both by least squares: with fewer, its units follow the noise of the rows, or that layer already explains
all of them and nothing is left to follow. It also bounds what solving costs.
"""

MOST_TIMES_ITS_RANK = 3
"""A default start may have directions for a third of the units that were asked for; of less it is not the choice."""


def has_too_few(directions: int, units: int) -> bool:
    """Whether a start with so many directions is no default for so many units."""
    return units > MOST_TIMES_ITS_RANK * directions


def rows_to_solve_on(batch_rows: int, capture: CaptureConfig) -> int:
    """Captured rows of a site less those of the batches that a fit is checked on."""
    kept = min(batch_rows * capture.batches, capture.rows)
    return kept * (capture.batches - max(1, capture.batches // 4)) // capture.batches


def default_blueprint(kind: SiteKind) -> str:
    if kind is SiteKind.LINEAR_SPAN:
        return "bottleneck"
    if kind is SiteKind.LINEAR_GATED_SPAN:
        return "gated"
    if kind is SiteKind.CONV_SPAN:
        return "bottleneck_conv"
    if kind in (SiteKind.NORM_LAYER, SiteKind.CHANNEL_NORM_LAYER):
        return "affine"
    return "low_rank"


def default_start(kind: SiteKind, *, adaptive: bool, batch_rows: int, capture: CaptureConfig, weights: int) -> str:
    """On Linear spans under an adaptive optimizer ``negative_gradient`` with enough rows for a fit, else ``tiny``,
    which is solved for and needs fewer; ``random_zero`` elsewhere.

    ``batch_rows`` are those that a training batch has at the site; ``weights`` are those of a unit or of an output of
    the span's last layer, whichever has more.

    On convolution spans under SGD a random function-preserving start beat every fit that was tried, on a transformer
    under AdamW the fit won.
    """
    if not adaptive or kind not in (SiteKind.LINEAR_SPAN, SiteKind.LINEAR_GATED_SPAN):
        return "random_zero"
    if batch_rows * capture.batches >= ROWS_FOR_A_FIT:
        return "negative_gradient"
    is_solvable = rows_to_solve_on(batch_rows, capture) >= ROWS_A_WEIGHT * weights
    return "tiny" if kind is SiteKind.LINEAR_SPAN and is_solvable else "random_zero"
