"""``esper doctor``."""

from __future__ import annotations

import os
import platform
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from esper.cli.command import Context, Outcome
from esper.cli.failure import EXTRAS
from esper.cli.parsing import JsonPath, Option
from esper.cli.terminal import labelled

_MIN_PYTHON = (3, 11)
_MIN_TORCH = (2, 6)
_CORE = ("numpy", "safetensors", "msgspec", "shtab")


@dataclass(frozen=True)
class Finding:
    """One thing looked at. ``broken`` fails the command, ``missing`` is an extra one can do without."""

    name: str
    state: Literal["ok", "missing", "broken"]
    detail: str


@dataclass(frozen=True, kw_only=True)
class Doctor:
    """Check that this installation works.

    Looks at versions, the device, packages in the way, extras, and where runs are written. Sends nothing anywhere.
    """

    run_dir: Annotated[Path, Option(metavar="DIR", help="Where runs will be written.", completes="directory")] = Path(
        "runs"
    )
    json: JsonPath = None

    def execute(self, context: Context) -> Outcome:
        """Look at everything; a broken thing fails the command but hides none of the others."""
        checks: list[Callable[[], Iterator[Finding]]] = [
            check_python, check_torch, check_memory, check_core, check_shadowing, check_extras,
            lambda: check_folder(self.run_dir),
        ]  # fmt: skip
        findings = [finding for check in checks for finding in check()]
        broken = [finding for finding in findings if finding.state == "broken"]
        lines = [labelled(finding.state, f"{finding.name}: {finding.detail}") for finding in findings]
        names = ", ".join(finding.name for finding in broken)
        lines.append(labelled("result", f"{len(broken)} broken: {names}" if broken else "esper can run here"))
        result = {
            "ok": not broken,
            "findings": [{"name": f.name, "state": f.state, "detail": f.detail} for f in findings],
        }
        return Outcome(result=result, lines=lines, ok=not broken)


def check_python() -> Iterator[Finding]:
    """Esper, the interpreter and the machine."""
    from esper import __version__

    is_new = sys.version_info >= _MIN_PYTHON
    fix = "" if is_new else "; Esper needs 3.11 or newer"
    yield Finding("esper", "ok", f"{__version__} in {Path(__file__).parents[1]}")
    yield Finding("python", "ok" if is_new else "broken", f"{platform.python_version()} on {platform.platform()}{fix}")


def check_torch() -> Iterator[Finding]:
    """PyTorch, whether it computes, and where."""
    try:
        import torch
    except (ImportError, OSError) as error:  # a missing package, or a shared library that does not load
        yield Finding("torch", "broken", f"does not import ({error}); say: pip install 'torch>=2.6'")
        return
    version = str(torch.__version__)
    is_new = _release(version) >= _MIN_TORCH
    yield Finding("torch", "ok" if is_new else "broken", version if is_new else f"{version}; pip install 'torch>=2.6'")
    cores = os.cpu_count()
    yield Finding("threads", "ok", f"{torch.get_num_threads()} of {cores} cores (OMP_NUM_THREADS sets it)")
    if not torch.cuda.is_available():
        built = f"PyTorch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "PyTorch's CPU build"
        yield Finding("device", "ok", f"cpu; no GPU seen ({built})")
        return
    try:
        torch.ones(8, device="cuda").sum().item()
    except RuntimeError as error:
        yield Finding("device", "broken", f"the GPU does not compute ({error}); check its driver, or use --device cpu")
        return
    memory = torch.cuda.get_device_properties(0).total_memory / 2**30
    yield Finding("device", "ok", f"cuda: {torch.cuda.get_device_name(0)}, {memory:.0f} GiB")


def check_memory() -> Iterator[Finding]:
    """What is free where a model would train, and what Esper would take of it at most."""
    try:
        import torch

        from esper.config import CaptureConfig
        from esper.kasmina import memory
    except (ImportError, OSError):  # said above
        return
    asked = CaptureConfig().max_bytes
    for device in [torch.device("cpu"), *([torch.device("cuda", 0)] if torch.cuda.is_available() else [])]:
        try:
            free = memory.free_bytes(device)
            budget, shortage = memory.capture_budget(asked, device, 0)
        except (RuntimeError, AssertionError):  # a GPU that does not answer was told of above
            continue
        if free is None:
            yield Finding(f"memory {device}", "ok", "nobody tells what is free; chunks and captures are as asked for")
            continue
        why = f" ({shortage})" if shortage else ""
        if device.type == "cuda":
            why += (
                f", and by default {memory.TRAINING_SHARE:.0%} of what the training takes; branches on Linear spans "
                "keep no hidden units for the backward pass (graft.recompute)"
            )
        yield Finding(
            f"memory {device}", "ok",
            f"{memory.in_mib(free)} free; telemetry takes at most {memory.in_mib(memory.TELEMETRY_SHARE * free)}, "
            f"captures at most {memory.in_mib(budget)}{why}",
        )  # fmt: skip


def check_core() -> Iterator[Finding]:
    """The packages that every installation has."""
    for package in _CORE:
        version = _version(package)
        state = "broken" if version is None else "ok"
        yield Finding(package, state, version or f"not installed; say: pip install {package}")


def check_shadowing() -> Iterator[Finding]:
    """Whether the unrelated `esper` package stands in the way."""
    from esper.shadowing import shadowing_problem

    problem = shadowing_problem()
    yield Finding("import esper", "broken" if problem else "ok", problem or "this package, nothing in its way")


def check_extras() -> Iterator[Finding]:
    """Optional packages: their version, or what brings them."""
    for package, extra in EXTRAS.values():
        version = _version(package)
        install = f"not installed; pip install 'esper-morph[{extra}]' brings it"
        yield Finding(f"[{extra}] {package}", "missing" if version is None else "ok", version or install)


def check_folder(run_dir: Path) -> Iterator[Finding]:
    """Whether a run could be written: into the folder, or into the nearest one above it that exists."""
    place = run_dir.absolute()
    while not place.exists():
        place = place.parent
    try:
        with tempfile.TemporaryFile(dir=place) as probe:
            probe.write(b"esper")
    except OSError as error:
        why = error.strerror or type(error).__name__
        yield Finding(
            "runs", "broken", f"{run_dir} cannot be written ({why}: {place}); use --run-dir or another folder"
        )
        return
    yield Finding("runs", "ok", f"{run_dir} can be written")


def _version(package: str) -> str | None:
    import importlib.metadata  # brings email and socket along, which completion can do without

    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("+")[0].split(".")[:2] if part.isdecimal())
