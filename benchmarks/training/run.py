"""Does growing pay on a task? All arms, a learning-rate grid per arm, paired seeds, everything counted.

    python benchmarks/training/run.py mnist1d --data FOLDER --cells FOLDER --code VERSION \\
        --out benchmarks/results/mnist1d.json

Run it again to go on where it was stopped. ``benchmarks/training/protocol`` says what is compared and how.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a script's own folder is not the root of its package

from benchmarks.training.protocol import command

if __name__ == "__main__":
    command(__doc__)
