"""Orders, many of them doubled or out of order, to a real training that is killed on the way: one outcome each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="POSIX"),
]

ROOT = Path(__file__).parents[2]
SCRIPT = """
import asyncio, json, sys
from pathlib import Path
from tests.oona.commanded import check, steer
from esper.oona.memory import MemoryBus
folder, count, kills = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
orders, result = asyncio.run(steer(folder, MemoryBus(), count, kills))
print(json.dumps({**check(folder, orders, result), "kills": result.kills, "received": result.received}))
"""


def killed(folder: Path, count: int, kills: int, *, timeout: float) -> dict[str, int]:
    """In a process of its own: a fork of this one would take pytest's threads and files along."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)])}
    command = [sys.executable, "-c", SCRIPT, str(folder), str(count), str(kills)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


def test_three_hundred_orders_and_five_kills(tmp_path: Path) -> None:
    counts = killed(tmp_path, 300, 5, timeout=240)
    assert counts["kills"] == 5 and counts["applied"] > 200 and counts["refused"] > 10 and counts["received"] > 390


@pytest.mark.long
@pytest.mark.timeout(0)
def test_ten_thousand_orders_and_fifty_kills(tmp_path: Path) -> None:
    counts = killed(tmp_path, 10_000, 50, timeout=3600)
    print(counts)
    assert counts["kills"] == 50 and counts["received"] > 13_000
