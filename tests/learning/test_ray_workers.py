"""Parts of an environment in a real Ray cluster of this machine, with two actors."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.servers import need

from esper.errors import ConfigError, WorkerError
from esper.learning.job import train
from esper.learning.options import TrainOptions
from esper.learning.planted import Planted
from esper.learning.shards import Here, Part, Shards, spread
from esper.safety.tree import digest

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """One for all tests of this module, as ``--ray local`` starts it."""
    need("ray")
    from esper.learning.ray_workers import _cluster

    with pytest.MonkeyPatch.context() as patch:
        # Else Ray writes one to the user's home.
        patch.setenv("RAY_AUTH_TOKEN", "0123456789abcdef" * 4)
        before = signal.signal(signal.SIGTERM, _ignore)
        try:
            with _cluster("local", 2):
                assert signal.getsignal(signal.SIGTERM) is _ignore, "what the program has chosen stays"
                yield
            assert signal.getsignal(signal.SIGTERM) is _ignore
        finally:
            signal.signal(signal.SIGTERM, before)


def _ignore(number: int, frame: object) -> None:
    return None


def options(folder: Path, **changes: Any) -> TrainOptions:
    tiny = {"episodes": 4, "steps": 6, "updates": 4, "checkpoint_every": 2, "test_episodes": 8, "workers": 2}
    return TrainOptions(**{**tiny, "run_dir": folder, **changes})


def test_an_address_where_nobody_answers() -> None:
    need("ray")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nobody = f"127.0.0.1:{free.getsockname()[1]}"
        for address in (nobody, "nonsense"):
            told = rf"a Ray cluster must answer at '{address}', got .*; start one with: ray start --head, or say "
            with pytest.raises(WorkerError, match=told), spread(Planted, 4, 2, address):
                pass


def test_the_same_as_in_one_process(cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    here = Shards([Here(Part(Planted(2))), Here(Part(Planted(1)))])
    with spread(Planted, 3, 2, "local") as there:
        assert (there.num, there.scope, there.families, there.best) == (3, here.scope, here.families, here.best)
        for environment in (here, there):
            environment.reset(5)
        for _ in range(8):
            actions = np.array([[1, 1, 2, 0, 1]] * 3)
            one, other = here.step(actions), there.step(actions)
            assert np.array_equal(one.rewards, other.rewards) and np.array_equal(one.terminated, other.terminated)
            assert digest([s.features.sites for s in here.look()]) == digest([s.features.sites for s in there.look()])
        there.load(here.state())
        assert digest(there.state()) == digest(here.state())
        assert [o.step for o in there.observations()] == [o.step for o in here.observations()]
        with pytest.raises(KeyError, match="episodes"):
            there.load({"parts": [{}, {}]})  # what an environment raises is raised here as it is
    monkeypatch.setattr("esper.learning.ray_workers.START_S", 0.01)
    told = r"all 3 workers must start within 0.01 s, got \d; they need one CPU each and \d are free"
    with pytest.raises(WorkerError, match=told), spread(Planted, 4, 3, "local"):
        pass


def test_a_dead_actor_ends_the_training_which_goes_on_from_its_checkpoint(
    cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    from esper.learning.ray_workers import RayWorker

    wanted = train(options(tmp_path / "here"), lambda line: None)
    started, workers = RayWorker.started, list[RayWorker]()

    def note(self: RayWorker) -> None:
        started(self)
        workers.append(self)

    monkeypatch.setattr(RayWorker, "started", note)

    def kill(line: dict[str, Any]) -> None:
        if line["update"] == 3:
            os.kill(workers[1].pid, signal.SIGKILL)

    told = (
        rf"Ray worker 2 of 2 \(process \d+ on {socket.gethostname()}\) must answer, got ActorDiedError .*"
        "start it again with the same command"
    )
    with pytest.raises(WorkerError, match=told):
        train(options(tmp_path / "there", ray="local"), kill)
    assert len(workers) == 2, "nobody was started in its place"
    seen: list[int] = []
    found = train(options(tmp_path / "there"), lambda line: seen.append(line["update"]))
    assert seen == [3, 4], "the parts may go on elsewhere, as here"
    assert found["sha256"] == wanted["sha256"] and found["scores"] == wanted["scores"]


def test_another_version_over_there(monkeypatch: pytest.MonkeyPatch) -> None:
    need("ray")
    from esper.learning.ray_workers import RayWorker, versions

    there = versions() | {"esper": "99.0"}
    worker = RayWorker("Ray worker 1 of 2", None)
    monkeypatch.setattr(worker, "answer", lambda: ("elsewhere", 7, there))
    told = (
        r"all machines must have esper \d.*, got esper 99\.0 in Ray worker 1 of 2 \(process 7 on elsewhere\); install "
    )
    with pytest.raises(ConfigError, match=told):
        worker.started()


def test_what_runs_over_there() -> None:
    need("ray")
    from esper.learning.ray_workers import Actor, versions

    actor = Actor()
    assert actor.start(Planted, 3) == (socket.gethostname(), os.getpid(), versions())
    assert actor.ask("about").num == 3
