"""Which cohorts are experimented with: drawn by seed and cohort number alone."""

from __future__ import annotations

import zlib

import numpy as np


def drawn(share: float, seed: int, purpose: str, cohort: int) -> bool:
    """Return True with probability ``share``, the same for the same ``seed``, ``purpose`` and ``cohort`` number.

    No state is kept, so neither the order of calls nor what happened in the run has any influence: that is what makes
    the comparison of drawn with other cohorts unbiased.
    """
    if share <= 0:
        return False
    rng = np.random.default_rng([seed % 2**63, zlib.crc32(purpose.encode()), cohort])
    return bool(rng.random() < share)
