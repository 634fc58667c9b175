"""A task: data, host, optimizer and score (a preset), by name. One file in ``benchmarks/training/tasks`` each."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from esper.errors import ConfigError
from esper.runs.preset import Preset

TASKS: dict[str, Task] = {}


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a preset's data comes from: the folder with the data sets, and for tasks that have several, which one."""

    device: str = "cpu"
    size: str = "cpu"
    data: Path | None = None
    seed: int = 0

    def file(self, name: str) -> Path:
        """A file of the data folder.

        Raises
        ------
        ConfigError
            When there is no data folder, or no such file in it.
        """
        if self.data is None or not (self.data / name).is_file():
            raise ConfigError(f"this task needs {name} in the folder of data sets, got {self.data}; pass --data FOLDER")
        return self.data / name


@dataclass(frozen=True, kw_only=True)
class Task:
    """``make`` must be a function of a module: worker processes import it by name."""

    name: str
    title: str
    make: Callable[[Source], Preset]
    per_seed: bool = False
    """The data differ by seed (20 published splits, say), not only their order."""
    arms: tuple[str, ...] = ()
    """Arms to train, by name; all that apply to the preset if empty."""

    def preset(self, source: Source) -> Preset:
        """The preset of a seed; the data are loaded once a process."""
        seed = source.seed if self.per_seed else 0
        return _loaded(self.make, Source(device=source.device, size=source.size, data=source.data, seed=seed))


@functools.lru_cache(maxsize=32)
def _loaded(make: Callable[[Source], Preset], source: Source) -> Preset:
    return make(source)


def register_task(task: Task) -> Task:
    """Make a task known by its name.

    Raises
    ------
    ConfigError
        When the name is taken or cannot stand in a file name.
    """
    if not task.name.replace("_", "").isalnum() or not task.name.islower():
        raise ConfigError(f"a task's name must be of a-z, 0-9 and _, got {task.name!r}; rename it")
    if task.name in TASKS and TASKS[task.name].make is not task.make:
        raise ConfigError(f"task names must differ, got {task.name!r} twice; rename one")
    TASKS[task.name] = task
    return task


def load_all() -> None:
    """Import every task and every peer, each of which registers itself."""
    for package_name in ("benchmarks.training.tasks", "benchmarks.training.peers"):
        package = importlib.import_module(package_name)
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{package_name}.{module.name}")


def device_of(size: str) -> str:
    """``cuda`` for the GPU size of a task.

    Raises
    ------
    ConfigError
        When there is no GPU that PyTorch can see.
    """
    if size == "gpu" and not torch.cuda.is_available():
        raise ConfigError("size 'gpu' needs a GPU that PyTorch can see, got none; use --size cpu")
    return "cuda" if size == "gpu" else "cpu"
