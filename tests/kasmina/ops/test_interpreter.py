"""The kernels run in Triton's interpreter, on the CPU: one process of its own, because Triton reads the switch once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed: pip install 'esper-morph[triton]'")

pytestmark = pytest.mark.component

SUITE = Path(__file__).with_name("interpreted.py")
ROOT = Path(__file__).parents[3]


def test_kernels_equal_their_references_in_the_interpreter() -> None:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("COV", "PYTEST", "ESPER_OPS"))}
    paths = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:cov", str(SUITE)],
        cwd=ROOT,
        env={**clean, "TRITON_INTERPRET": "1", "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
