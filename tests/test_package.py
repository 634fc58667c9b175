"""The package as a user meets it: what importing costs, what installing brings, what a built wheel holds."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import re
import resource
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import esper
from esper import shadowing

ROOT = Path(__file__).parents[1]
RunPython = Callable[..., "subprocess.CompletedProcess[str]"]

MOST_PACKAGES_BEYOND_TORCH = 4
MOST_MEGABYTES_BEYOND_TORCH = 70
"""What the core install may add to torch and what torch needs: what is in the wheels, without the byte code that pip
makes of it (decision 0009)."""


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


# ----------------------------------------------------------------------------------------------------------------------
# Public names


@pytest.mark.unit
@pytest.mark.parametrize("name", esper.__all__)
def test_every_public_name_loads(name: str) -> None:
    vars(esper).pop(name, None) if name != "__version__" else None
    value = getattr(esper, name)
    assert getattr(esper, name) is value
    assert name in dir(esper)


@pytest.mark.unit
def test_every_public_config_and_error_is_exported() -> None:
    for module in ("esper.config", "esper.errors"):
        defined = {
            name
            for name, value in vars(importlib.import_module(module)).items()
            if isinstance(value, type) and value.__module__ == module and not name.startswith("_")
        }
        assert defined <= set(esper.__all__)


@pytest.mark.unit
def test_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(AttributeError, match=r"no attribute 'Growr'; it has .*Grower"):
        _ = esper.Growr


@pytest.mark.unit
def test_version_is_a_release_number_and_in_the_changelog() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", esper.__version__)
    assert f"## [{esper.__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


# ----------------------------------------------------------------------------------------------------------------------
# What importing costs


def child_cpu_seconds(run: Callable[[], subprocess.CompletedProcess[str]], tries: int = 3) -> float:
    """Least CPU time of a child process: unlike wall time it does not grow with what else the machine does."""
    best = float("inf")
    for _ in range(tries):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        finished = run()
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert finished.returncode == 0, finished.stderr
        best = min(best, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return best


HELP = "import sys; from esper.cli import main; sys.argv = ['esper', '--help']; sys.exit(main())"


@pytest.mark.integration
def test_import_is_silent_opens_no_socket_and_leaves_torch_alone(run_python: RunPython) -> None:
    done = run_python(
        "import sys\n"
        "seen = []\n"
        "sys.addaudithook(lambda name, _: seen.append(name) if name.startswith('socket.') else None)\n"
        "import esper\n"
        "assert 'torch' not in sys.modules\n"
        "esper.Grower, esper.Config\n"
        "assert not seen, seen\n"
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.integration
def test_import_costs_little_over_torch(run_python: RunPython) -> None:
    code = (
        # One collection walks all that torch has loaded (90 ms); into whose import it falls is chance.
        "import gc, json, time\n"
        "gc.disable()\n"
        "a = time.process_time()\n"
        "import torch\n"
        "b = time.process_time()\n"
        "import esper; esper.Grower\n"
        "print(json.dumps([b - a, time.process_time() - b]))\n"
    )
    runs = []
    for _ in range(3):
        done = run_python(code)
        assert done.returncode == 0, done.stderr
        runs.append(json.loads(done.stdout))
    torch_seconds, own_seconds = (min(column) for column in zip(*runs, strict=True))
    assert own_seconds <= 0.3
    assert own_seconds <= 0.2 * torch_seconds


@pytest.mark.e2e
def test_help_is_quick_and_does_not_import_torch(run_python: RunPython) -> None:
    done = run_python(
        "import atexit, sys; atexit.register(lambda: sys.stderr.write(repr('torch' in sys.modules)));" + HELP
    )
    assert done.returncode == 0, done.stderr
    assert "run" in done.stdout
    assert done.stderr == "False"
    assert child_cpu_seconds(lambda: run_python(HELP)) <= 0.3


# ----------------------------------------------------------------------------------------------------------------------
# What installing brings


def closure(requirements: list[str]) -> set[str]:
    """Names of all installed distributions that these requirements need here, extras left out."""
    found: set[str] = set()
    waiting = [Requirement(text) for text in requirements]
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if name in found or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        found.add(name)
        waiting += [Requirement(text) for text in importlib.metadata.requires(name) or []]
    return found


@pytest.mark.integration
def test_core_install_adds_little_to_torch() -> None:
    added = closure(project()["project"]["dependencies"]) - closure(["torch"])
    size = sum(
        os.path.getsize(path)
        for name in added
        for file in importlib.metadata.files(name) or []
        if (path := str(file.locate())) and os.path.exists(path) and not path.endswith(".pyc")
    )
    assert len(added) <= MOST_PACKAGES_BEYOND_TORCH, sorted(added)
    assert size <= MOST_MEGABYTES_BEYOND_TORCH * 1e6, f"{size / 1e6:.0f} MB: {sorted(added)}"


@pytest.mark.unit
def test_constraints_pin_everything_exactly() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"==[\w.]+", str(pin.specifier)) for pin in pins)
    pinned = {canonicalize_name(pin.name) for pin in pins}
    settings = project()["project"]
    extras = [text for group in settings["optional-dependencies"].values() for text in group]
    direct = {canonicalize_name(Requirement(text).name) for text in [*settings["dependencies"], *extras]}
    assert direct - pinned == {"esper-morph"}


@pytest.mark.integration
def test_wheel_holds_the_package_and_nothing_else(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
    (wheel,) = tmp_path.glob("esper_morph-*-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        info = f"esper_morph-{esper.__version__}.dist-info"
        scripts = archive.read(f"{info}/entry_points.txt").decode()
    assert "esper = esper.cli:main" in scripts
    assert {"esper/__init__.py", "esper/py.typed", f"{info}/licenses/LICENSE"} <= set(names)
    assert {name.split("/")[0] for name in names} == {"esper", info}
    sources = {str(path.relative_to(ROOT / "src")) for path in (ROOT / "src").rglob("*.py")}
    assert sources <= set(names)


# ----------------------------------------------------------------------------------------------------------------------
# Shadowing by the unrelated package


@pytest.mark.unit
def test_nothing_in_the_way_here() -> None:
    assert shadowing.shadowing_problem() is None


@pytest.mark.unit
def test_other_library_installed_beside_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metadata = tmp_path / "esper-3.4.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: esper\nVersion: 3.4\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    problem = shadowing.shadowing_problem()
    assert problem is not None and "'esper' 3.4 is installed beside" in problem and "pip uninstall" in problem


@pytest.mark.unit
@pytest.mark.parametrize("mark", ["World", "Processor"])
def test_other_library_in_our_place_is_reported(mark: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(esper, mark, object(), raising=False)
    problem = shadowing.shadowing_problem()
    assert problem is not None and "entity-component library" in problem and "pip uninstall" in problem


@pytest.mark.unit
@pytest.mark.parametrize("location", ["/elsewhere/esper/__init__.py", None])
def test_another_folder_in_the_way_is_reported(location: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(esper, "__file__", location)
    problem = shadowing.shadowing_problem()
    assert problem is not None and str(location) in problem and "rename or remove" in problem
