"""What all tests share: one thread, fixed seeds, no network, the layers of the test pyramid, a browser when needed."""

from __future__ import annotations

import os

# Before torch is imported: two worker processes share two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# cuBLAS is deterministic only with a workspace of this kind.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import random
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from tests.servers import durable_redis, mock_kafka, postgres_server, redis_server, redis_trio, tansu  # noqa: F401  fixtures for all

LAYERS = ("unit", "component", "integration", "e2e")
PLANNED_SHARES = {"unit": 50, "component": 30, "integration": 15, "e2e": 5}

torch.set_num_threads(1)

# Deadlines measure the machine, not the code; derandomised, a failure comes back on the next run.
settings.register_profile("ci", deadline=None, derandomize=True, database=None, print_blob=True)
settings.register_profile("search", deadline=None, max_examples=1000)
settings.load_profile(os.environ.get("ESPER_HYPOTHESIS", "ci"))


# ----------------------------------------------------------------------------------------------------------------------
# Every test belongs to one layer of the pyramid


def _layer(item: pytest.Item) -> str | None:
    """The closest of the four layer markers, or None."""
    return next((mark.name for mark in item.iter_markers() if mark.name in LAYERS), None)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Generator[None, Any, pytest.CollectReport]:
    report: pytest.CollectReport = yield
    items = [node for node in report.result or [] if isinstance(node, pytest.Item)]
    homeless = [item.name for item in items if _layer(item) is None]
    if homeless:
        report.outcome = "failed"
        report.longrepr = (
            f"every test carries one marker of {', '.join(LAYERS)}; without one in {collector.nodeid}: "
            f"{', '.join(homeless)}; set `pytestmark = pytest.mark.unit` (or another) in the module"
        )
        report.result = []
    for item in items:
        item.user_properties.append(("layer", _layer(item)))
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    counts = dict.fromkeys(LAYERS, 0)
    seconds = dict.fromkeys(LAYERS, 0.0)
    reports = [r for group in terminalreporter.stats.values() for r in group if isinstance(r, pytest.TestReport)]
    finished: set[str] = set()
    for report in reports:
        layer = dict(report.user_properties).get("layer")
        if layer not in counts:
            continue
        seconds[str(layer)] += report.duration
        if report.nodeid not in finished:
            finished.add(report.nodeid)
            counts[str(layer)] += 1
    total = sum(counts.values())
    if total == 0:
        return
    terminalreporter.section("test pyramid")
    terminalreporter.write_line(f"{'layer':<12} {'tests':>6} {'share':>6} {'plan':>6} {'seconds':>9}")
    for layer in LAYERS:
        share = f"{100 * counts[layer] / total:.0f}%"
        terminalreporter.write_line(
            f"{layer:<12} {counts[layer]:>6} {share:>6} {PLANNED_SHARES[layer]:>5}% {seconds[layer]:>9.1f}"
        )


# ----------------------------------------------------------------------------------------------------------------------
# The same start for every test


@pytest.fixture(autouse=True)
def _fixed_seeds() -> None:
    """The same random streams for every test, whatever ran before it in the same process."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _no_network() -> Iterator[None]:
    """Refuse connections that leave this machine: no test needs the network."""
    connect = socket.socket.connect

    def connect_locally(self: socket.socket, address: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise OSError(f"tests may not use the network, tried {address!r}; bring the data with the test")
        connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", connect_locally)
        yield


@pytest.fixture
def unchanged_rng() -> Iterator[None]:
    """Fail if the test moved a global random stream (torch, NumPy, random)."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    yield
    assert random.getstate() == before[0], "the global stream of `random` was moved"
    now = np.random.get_state()
    assert now[0] == before[1][0] and np.array_equal(now[1], before[1][1]), "NumPy's global stream was moved"
    assert torch.equal(torch.get_rng_state(), before[2]), "torch's global stream was moved"


@pytest.fixture
def deterministic() -> Iterator[None]:
    """Deterministic algorithms; fresh memory is filled with NaN, so an element that is never written shows."""
    was = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(was[0])
    torch.utils.deterministic.fill_uninitialized_memory = was[1]


@pytest.fixture
def own_registries(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the test registers is gone after it."""
    from esper.kasmina.blueprints import BLUEPRINTS
    from esper.kasmina.starts import STARTS
    from esper.kasmina.strategies import STRATEGIES
    from esper.tamiyo import registry as controllers

    for registry in (STRATEGIES, STARTS, BLUEPRINTS):
        monkeypatch.setattr(registry, "_items", dict(registry._items))
    monkeypatch.setattr(controllers, "_FACTORIES", dict(controllers._FACTORIES))


# ----------------------------------------------------------------------------------------------------------------------
# Other processes


@pytest.fixture
def run_python(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run ``python -c CODE ARG...`` in an empty folder, without coverage or other traces of this process."""

    def run(code: str, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("COV", "PYTEST", "PYTHON"))}
        clean["PYTHONPATH"] = str(Path(__file__).parents[1] / "src")
        return subprocess.run(
            [sys.executable, "-c", code, *args],
            cwd=tmp_path,
            env={**clean, **env},
            capture_output=True,
            text=True,
            timeout=120,
        )

    return run


@pytest.fixture(scope="session")
def chromium() -> str:
    """Path of a Chromium; skips without one, or fails where ESPER_REQUIRE_BROWSER=1 says that there must be one."""
    named = os.environ.get("ESPER_CHROMIUM")
    found = named or next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found and Path(found).exists():
        return found
    reason = "no Chromium found; install it (Debian: apt-get install chromium) or set ESPER_CHROMIUM to its path"
    if os.environ.get("ESPER_REQUIRE_BROWSER") == "1":
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture
def page(chromium: str) -> Iterator[Any]:
    """A blank Playwright page; the test fails on any script error or any request that leaves the disk."""
    from playwright.sync_api import sync_playwright

    faults: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        fresh = browser.new_page()
        fresh.on("pageerror", lambda error: faults.append(f"script error: {error}"))
        fresh.on(
            "request",
            lambda request: (
                None if request.url.startswith(("file:", "data:", "about:", "blob:")) else faults.append(request.url)
            ),
        )
        yield fresh
        browser.close()
    assert not faults, faults
