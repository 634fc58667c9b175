"""First choices by site kind and optimizer, from measured paired gains; no start wins everywhere."""

from __future__ import annotations

from esper.protocol import SiteKind

ROWS_FOR_A_FIT = 2_000
"""Captured rows from which an isolated fit is tried by default.

Weakly supported: on the digits preset (2,048 rows) held-out loss was 0.102 with the fit and 0.109 without, five paired
seeds, an interval that includes zero, at 1.5 times the FLOPs (``benchmarks/results/digits_starts.json``). Trying it is
safe: a fit that does not hold on other batches is not used.
"""


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


def default_start(kind: SiteKind, *, adaptive: bool, expected_rows: int) -> str:
    """``negative_gradient`` on Linear spans (gated or not) under an adaptive optimizer with enough rows; else
    ``random_zero``.

    On convolution spans under SGD a random function-preserving start beat every fit that was tried, on a transformer
    under AdamW the fit won.
    """
    if kind in (SiteKind.LINEAR_SPAN, SiteKind.LINEAR_GATED_SPAN) and adaptive and expected_rows >= ROWS_FOR_A_FIT:
        return "negative_gradient"
    return "random_zero"
