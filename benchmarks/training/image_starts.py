"""Which start pays on convolutions, and why the fitted ones do not: starts, sample counts, lengths and sizes of fits.

    python benchmarks/training/image_starts.py cifar10 --size gpu --data FOLDER --out OUT.json
    python benchmarks/training/image_starts.py cifar10_adamw --size gpu --data FOLDER --out OUT.json

Every cohort is kept, so that all variants grow alike and only the first weights of the new units differ. Held-out loss,
each variant at its own best learning rate, paired by seed; the test split is not touched. GradMax and TINY refuse spans
with a norm inside, such as this net's.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a script's own folder is not the root of its package

from benchmarks.training.variants import Settings, compare

from esper.config import Config

KEPT = "evidence.accept=always"
UNLIMITED = "fit.max_share=none"
GRADIENT = (KEPT, "fit.start=negative_gradient")
USED = (*GRADIENT, UNLIMITED, "fit.min_t=-1e9")
"""Fits of their full length, grafted whether or not they hold on other batches."""
LARGE = "capture.max_bytes=8589934592"


def variants(shipped: Config) -> dict[str, Settings]:
    """What is changed in each variant; the first is the start that conv spans have by default."""
    rows, steps, size = shipped.capture.rows, shipped.fit.steps, shipped.fit.base_scale
    more_rows, longer = (f"capture.rows={8 * rows}", LARGE), f"fit.steps={4 * steps}"
    rebuilt = (KEPT, "fit.start=reconstruction", UNLIMITED)
    return {
        "random, zero output": (KEPT, "fit.start=random_zero"),
        "negative gradient": USED,
        "negative gradient, if it is affordable and holds": GRADIENT,
        "negative gradient, its features with zero output": (*GRADIENT, UNLIMITED, "fit.min_t=1e9"),
        "reconstruction": rebuilt,
        "negative gradient, 8 times the rows": (*USED, *more_rows),
        "negative gradient, an eighth of the rows": (*USED, f"capture.rows={rows // 8}"),
        "negative gradient, 4 times the steps": (*USED, longer),
        "negative gradient, a fifth of the steps": (*USED, f"fit.steps={max(1, steps // 5)}"),
        "negative gradient, 8 times the rows, 4 times the steps": (*USED, *more_rows, longer),
        "negative gradient, a fifth of the size": (*USED, f"fit.base_scale={size / 5:g}"),
        "negative gradient, 3 times the size": (*USED, f"fit.base_scale={size * 3:g}"),
        "copies of host units": (KEPT, "fit.start=copy"),
    }


if __name__ == "__main__":
    compare(None, __doc__, variants, {}, "image_starts")
