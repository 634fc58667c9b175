"""Which start pays on convolutions, and why the fitted ones do not: starts, sample counts, lengths and sizes of fits.

    python benchmarks/training/image_starts.py cifar10 --size gpu --data FOLDER --out OUT.json
    python benchmarks/training/image_starts.py cifar10_adamw --size gpu --data FOLDER --out OUT.json

Every cohort is kept, so that all variants grow alike and only the first weights of the new units differ. Held-out loss,
each variant at its own best learning rate, paired by seed; the test split is not touched.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a script's own folder is not the root of its package

from benchmarks.training.variants import Settings, compare

from esper.config import Config

KEPT = "evidence.accept=always"
GRADIENT = (KEPT, "fit.start=negative_gradient")
LARGE = "capture.max_bytes=8589934592"


def variants(shipped: Config) -> dict[str, Settings]:
    """What is changed in each variant; the first is the start that conv spans have by default."""
    rows, steps, size = shipped.capture.rows, shipped.fit.steps, shipped.fit.base_scale
    unlimited = "fit.max_share=none"
    return {
        "random, zero output": (KEPT, "fit.start=random_zero"),
        "reconstruction": (KEPT, "fit.start=reconstruction"),
        "negative gradient": GRADIENT,
        "negative gradient, its features with zero output": (*GRADIENT, "fit.min_t=1e9"),
        "negative gradient, an eighth of the rows": (*GRADIENT, f"capture.rows={rows // 8}"),
        "negative gradient, 8 times the rows": (*GRADIENT, f"capture.rows={8 * rows}", LARGE),
        "negative gradient, a fifth of the steps": (*GRADIENT, f"fit.steps={max(1, steps // 5)}"),
        "negative gradient, 4 times the steps": (*GRADIENT, f"fit.steps={4 * steps}", unlimited),
        "negative gradient, 8 times the rows, 4 times the steps": (
            *GRADIENT, f"capture.rows={8 * rows}", LARGE, f"fit.steps={4 * steps}", unlimited,
        ),
        "negative gradient, a fifth of the size": (*GRADIENT, f"fit.base_scale={size / 5:g}"),
        "negative gradient, 3 times the size": (*GRADIENT, f"fit.base_scale={size * 3:g}"),
        "copies of host units": (KEPT, "fit.start=copy"),
        "gradmax": (KEPT, "fit.start=gradmax"),
        "tiny": (KEPT, "fit.start=tiny"),
        "reconstruction, 8 times the rows": (KEPT, "fit.start=reconstruction", f"capture.rows={8 * rows}", LARGE),
    }  # fmt: skip


if __name__ == "__main__":
    compare(None, __doc__, variants, {}, "image_starts")
