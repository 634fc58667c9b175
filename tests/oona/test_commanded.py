"""Orders, many of them doubled or out of order, to a real training that is killed on the way: one outcome each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.servers import need_redis

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="POSIX"),
]

ROOT = Path(__file__).parents[2]
SCRIPT = """
import asyncio, json, sys
from pathlib import Path
from tests.oona.commanded import check, steer, with_redis
from esper.oona.memory import MemoryBus
folder, count, kills, outages = Path(sys.argv[1]), *map(int, sys.argv[2:5])
if outages:
    orders, result = with_redis(folder, count, kills, outages)
else:
    orders, result = asyncio.run(steer(folder, MemoryBus(), count, kills))
told = {"kills": result.kills, "outages": result.broker_kills, "received": result.received}
print(json.dumps({**check(folder, orders, result), **told}))
"""


def killed(folder: Path, count: int, kills: int, outages: int = 0, *, timeout: float) -> dict[str, int]:
    """In a process of its own: a fork of this one would take pytest's threads and files along."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)])}
    command = [sys.executable, "-c", SCRIPT, str(folder), str(count), str(kills), str(outages)]
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


@pytest.mark.long
@pytest.mark.timeout(0)
@pytest.mark.parametrize(("count", "kills"), [(400, 5), (10_000, 50)])
def test_orders_over_redis_which_is_killed_as_often(count: int, kills: int, tmp_path: Path) -> None:
    need_redis()
    counts = killed(tmp_path, count, kills, kills, timeout=5400)
    print(counts)
    assert counts["kills"] == counts["outages"] == kills and counts["received"] > 1.3 * count * 0.97
