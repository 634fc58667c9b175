"""Parts of an environment as Ray actors, one CPU each, spread over the machines of a cluster.

An actor is never started anew behind the training's back: what its episodes had come to would be lost, and the training
would no longer follow from its seed. When one dies, the training ends with an error that names it, and goes on from its
last checkpoint when it is started again.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

import numpy as np
import ray
from ray import exceptions

from esper.errors import ConfigError, WorkerError
from esper.learning.environment import EnvironmentFactory
from esper.learning.shards import Part

START_S = 120.0
"""How long a cluster may take to start all actors."""
_REACH_S = 5.0
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_REASON = 600
"""Most characters of Ray's own words in an error."""
_STORE_BYTES = 128 << 20
"""Of shared memory, for a cluster on this machine: what travels is small."""


def versions() -> dict[str, str]:
    """Of what decides the numbers."""
    own = str(__import__("esper").__version__)
    return {"esper": own, "numpy": np.__version__, "torch": importlib.metadata.version("torch")}


class Actor:
    """What runs there."""

    def __init__(self) -> None:
        self._part: Part | None = None

    def start(self, factory: EnvironmentFactory, num: int) -> tuple[str, int, dict[str, str]]:
        """Build the environment; returns the machine, the process and its versions."""
        self._part = Part(factory(num))
        return socket.gethostname(), os.getpid(), versions()

    def ask(self, call: str, *given: Any) -> Any:
        """What the part answers."""
        torch: Any = sys.modules.get("torch")
        if torch is not None:
            torch.set_num_threads(1)  # as the training itself does: sums depend on it
        return getattr(self._part, call)(*given)


class RayWorker:
    """A :class:`~esper.learning.shards.Worker` that is an actor."""

    def __init__(self, name: str, handle: Any) -> None:
        self.name, self.handle = name, handle
        self.pid = 0
        self._answer: Any = None

    def start(self, factory: EnvironmentFactory, num: int) -> Any:
        """A reference to when it has built its part."""
        self._answer = self.handle.start.remote(factory, num)
        return self._answer

    def started(self) -> None:
        """Learn who it is.

        Raises
        ------
        ConfigError
            It runs another version of what decides the numbers.
        """
        host, self.pid, there = self.answer()
        self.name = f"{self.name} (process {self.pid} on {host})"
        here = versions()
        if there != here:
            told = ", ".join(f"{name} {there[name]}" for name in here if there[name] != here[name])
            wanted = ", ".join(f"{name} {here[name]}" for name in here if there[name] != here[name])
            raise ConfigError(
                f"all machines must have {wanted}, got {told} in {self.name}; install the same everywhere"
            )

    def ask(self, call: str, *given: Any) -> None:
        """Send it."""
        self._answer = self.handle.ask.remote(call, *given)

    def answer(self) -> Any:
        """Wait for it.

        Raises
        ------
        WorkerError
            The actor is gone.
        """
        try:
            return ray.get(self._answer)
        except exceptions.RayTaskError as error:
            if isinstance(error.cause, Exception):
                raise error.cause from error  # as it would have been raised here
            raise
        except exceptions.RayError as error:
            lines = _COLOURS.sub("", str(error)).strip().splitlines()
            reason = " ... ".join(dict.fromkeys(lines[:1] + lines[-1:]))[:_REASON]
            raise WorkerError(
                f"{self.name} must answer, got {type(error).__name__} ({reason}); the training cannot go on without "
                "it: start it again with the same command, and it goes on from its last checkpoint"
            ) from error


@contextmanager
def ray_workers(address: str, factory: EnvironmentFactory, sizes: Sequence[int]) -> Generator[list[RayWorker]]:
    """An actor for each part, ended with the context.

    Parameters
    ----------
    address:
        ``HOST:PORT`` or ``auto`` (``RAY_ADDRESS``, or a cluster of this machine); ``local`` starts one for as long as
        the context lasts. Where ``ray.init`` has been called already, that cluster is used.
    sizes:
        Episodes of each part.
    """
    with _cluster(address, len(sizes)):
        kind: Any = ray.remote(num_cpus=1, max_restarts=0, max_task_retries=0, scheduling_strategy="SPREAD")(Actor)
        workers = [RayWorker(f"Ray worker {number + 1} of {len(sizes)}", kind.remote()) for number in range(len(sizes))]
        try:
            references = [worker.start(factory, size) for worker, size in zip(workers, sizes, strict=True)]
            ready, missing = ray.wait(references, num_returns=len(references), timeout=START_S)
            if missing:
                raise WorkerError(
                    f"all {len(sizes)} workers must start within {START_S:g} s, got {len(ready)}; they need one CPU "
                    f"each and {ray.available_resources().get('CPU', 0.0):g} are free; use fewer, or a larger cluster"
                )
            for worker in workers:
                worker.started()
            yield workers
        finally:
            for worker in workers:
                ray.kill(worker.handle)


@contextmanager
def _cluster(address: str, num_cpus: int) -> Generator[None]:
    if ray.is_initialized():
        yield
        return
    with tempfile.TemporaryDirectory(prefix="esper-ray-", ignore_cleanup_errors=True) as folder:
        settings: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
        if address == "local":
            # Ray tells its makers of each cluster that it starts, unless told not to.
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            settings |= {
                "num_cpus": num_cpus, "include_dashboard": False, "object_store_memory": _STORE_BYTES,
                "_node_ip_address": "127.0.0.1", "_temp_dir": folder,
            }  # fmt: skip
        before = signal.getsignal(signal.SIGTERM)
        try:
            _connect(address, settings)
            # Ray's own ends the process with a dump, or leaves the cluster's processes behind.
            _obey(_leave if before == signal.SIG_DFL else before)
            yield
        finally:
            ray.shutdown()
            _obey(before)


def _connect(address: str, settings: dict[str, Any]) -> None:
    try:
        _reach(address)
        ray.init(address=address, **settings)
    except (OSError, RuntimeError, ValueError) as error:
        raise WorkerError(
            f"a Ray cluster must answer at {address!r}, got {type(error).__name__} ({' '.join(str(error).split())}); "
            "start one with: ray start --head, or say --ray local"
        ) from error


def _leave(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def _obey(handler: Any) -> None:
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)


def _reach(address: str) -> None:
    """Try the port first: Ray itself would wait for minutes."""
    found = re.fullmatch(r"\[?([^/\]]+)\]?:(\d{1,5})", address)
    if found:
        socket.create_connection((found[1], int(found[2])), _REACH_S).close()
