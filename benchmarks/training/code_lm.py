"""Does growing pay on a language model? The ``code-lm`` preset, all arms, an LR grid per arm, paired seeds.

    python benchmarks/training/code_lm.py --size gpu --seeds 5 --workers 8 --out benchmarks/results/code_lm.json

A deadline keeps what is finished, one JSON file a training in the folder of cells (``--cells``, also ``--cache``); the
next call goes on from there. ``benchmarks/training/protocol`` says what is compared and how.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a script's own folder is not the root of its package

from benchmarks.training.protocol import command

if __name__ == "__main__":
    command(__doc__, task="code_lm")
