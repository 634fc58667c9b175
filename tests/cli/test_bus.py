"""``esper bus`` and ``esper controller serve`` on a real server."""

from __future__ import annotations

import asyncio
import json
import threading
from pathlib import Path
from typing import Any

import pytest
from tests.oona.served import Served
from tests.servers import RedisServer, redis_server

from esper.cli import main
from esper.oona.address import open_bus
from esper.oona.bus import Message
from esper.oona.link import Link
from esper.oona.topics import COMMANDS, HEARTBEATS, LIFECYCLE, Topic

pytestmark = pytest.mark.integration

KEY = "k" * 40
__all__ = ["redis_server"]


@pytest.fixture
def url(redis_server: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("ESPER_BUS_KEY", KEY)
    return f"{redis_server.url}?prefix={tmp_path.name[-60:]}"


def put(url: str, topic: Topic, *values: bytes, key: str = "run/job") -> None:
    async def work() -> None:
        bus = open_bus(url)
        try:
            await bus.publish(topic, [Message(key, value) for value in values])
        finally:
            await bus.close()

    asyncio.run(work())


class Trained(threading.Thread):
    """A training that goes on while the command is sent."""

    def __init__(self, url: str, folder: Path) -> None:
        super().__init__()
        self.life = Served(folder, desk=False)
        self._link = Link(url, run="run", job="job", folder=folder / "bus")
        self._over = threading.Event()

    def run(self) -> None:
        with self._link.serving(self.life.grower, self.life.folder / "commands.jsonl"):
            while not self._over.wait(0.005):
                self.life.step()
        self.life.grower.detach()

    def __enter__(self) -> Trained:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self.join()


def test_send_applies_and_tells(url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    to = ["--bus", url, "--run", "run", "--job", "job"]
    with Trained(url, tmp_path) as training:
        assert main(["bus", "send", "set-budget", *to, "--params", "5000", "--issuer", "ada"]) == 0
        assert capsys.readouterr().out.startswith("applied    set_budget in run job at step ")
        assert main(["bus", "send", "cull", *to, "--cohort", "3", "--reason", "?", "--json", "-"]) == 1
        told = json.loads(capsys.readouterr().out)
        assert told["outcome"] == "refused" and "no active cohort" in told["reason"] and told["issuer"] == "operator"
        germinate = ["bus", "send", "germinate", *to, "--site", "fc1-fc2", "--width", "2", "--reason", "by hand"]
        assert main(germinate) == 0
        assert main(["bus", "send", "stop", *to, "--reason", "enough", "--emergency"]) == 0
    assert training.life.grower.accounts.budget.params == 5000
    assert training.life.grower.stopped == "enough" and not training.life.grower.kasmina.cohorts


def test_zero_is_not_nothing(url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A ceiling of 0 is refused, not removed; cohort 0 is a cohort, not growth as a whole."""
    to = ["--bus", url, "--run", "run", "--job", "job"]
    with Trained(url, tmp_path) as training:
        assert main(["bus", "send", "set-budget", *to, "--params", "0"]) == 1
        assert "must be at least" in capsys.readouterr().out
        assert main(["bus", "send", "pause", *to, "--cohort", "0"]) == 1
        assert "no active cohort has the number 0" in capsys.readouterr().out
        assert main(["bus", "send", "set-budget", *to, "--unlimited"]) == 0
    assert training.life.grower.loop.paused is None


def test_send_to_nobody_says_so(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["bus", "send", "stop", "--bus", url, "--run", "a", "--job", "b", "--reason", "x", "--wait", "0.2"]) == 1
    )
    assert "no answer in 0.2 s; is a b running" in capsys.readouterr().out


def test_tail_shows_what_passes(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    put(url, LIFECYCLE, b"rubbish", b"more")
    put(url, HEARTBEATS, b"third", key="other/job")
    words = ["bus", "tail", "--bus", url, "--from", "oldest"]
    assert main([*words, "--count", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["kasmina.lifecycle"] * 2 + ["oona.heartbeats"]
    assert json.loads(lines[0].partition(" ")[2])["bytes"] == 7
    assert main([*words, "--count", "1", "--run", "oth*"]) == 0
    assert capsys.readouterr().out.startswith("oona.heartbeats")
    assert main([*words, "--count", "1", "--topic", "kasmina.*", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-2].strip().rstrip(",").join("{}"))["shown"] == 1


def test_dead_letters_are_read_and_sent_again(url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(url, COMMANDS, b"rubbish")
    words = ["bus", "dead-letters", "--bus", url]
    with Trained(url, tmp_path):
        for _ in range(100):
            assert main([*words, "--json", "-"]) == 0
            letters: list[dict[str, Any]] = json.loads(capsys.readouterr().out)["letters"]
            if letters:
                break
    (letter,) = letters
    assert letter["topic"] == "kasmina.control.commands" and "newline" in letter["reason"] and letter["state"] == "dead"
    assert main([*words, "--resend"]) == 0
    assert "sent again" in capsys.readouterr().out
    assert main(["bus", "tail", "--bus", url, "--from", "oldest", "--topic", COMMANDS.name, "--count", "1"]) == 0


def test_a_group_is_forgotten(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bus", "forget", "training run/job", "--bus", url]) == 0
    assert "group 'training run/job'" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["bus", "tial"], "no action is called 'tial'; did you mean 'tail'?"),
        (["bus", "send"], "send needs to know what"),
        (["bus", "send", "stop"], "send needs --run and --job"),
        (["bus", "send", "stpo", "--run", "a", "--job", "b"], "did you mean 'stop'"),
        (["bus", "send", "stop", "--run", "a", "--job", "b"], "a stop must have its fields"),
        (["bus", "send", "pause", "--run", "a", "--job", "b", "--params", "3"], "pause has the fields cohort, reason"),
        (["bus", "send", "germinate", "--run", "a", "--job", "b"], "germinate needs a site"),
        (["bus", "send", "set-budget", "--run", "a", "--job", "b"], "--params N or --flops X, or --unlimited"),
        (["bus", "tail", "--topic", "kasmina.helth"], "no topic is called 'kasmina.helth'"),
        (["bus", "tail", "x"], "takes no further word"),
        (["bus", "tail", "--count", "0"], "--count must be at least 1"),
        (["bus", "send", "stop", "--run", "a", "--job", "b", "--wait", "0"], "--wait must be above 0"),
        (["bus", "tail", "--bus", "http://x"], "a bus begins with one of"),
        (["controller", "serve", "--seconds", "0"], "--seconds must be above 0"),
        (["controller", "serve", "--controller", "heuristik"], "did you mean 'heuristic'"),
    ],
)
def test_each_mistake_is_named(words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) in (1, 2)
    assert says in capsys.readouterr().err


def test_nobody_commands_in_the_name_of_somebody_else(
    url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ESPER_BUS_KEY", "ada:" + "a" * 32)
    to = ["--bus", url, "--run", "run", "--job", "job"]
    assert main(["bus", "send", "pause", *to, "--issuer", "bob"]) == 2
    assert "an order's issuer must be 'ada', whose key 'ada' signs it, got 'bob'" in capsys.readouterr().err


def test_without_a_key_nobody_serves(url: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.delenv("ESPER_BUS_KEY")
    assert main(["controller", "serve", "--bus", url]) == 2
    assert "set ESPER_BUS_KEY here" in capsys.readouterr().err


def test_a_server_serves_and_sums_up(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["controller", "serve", "--bus", url, "--seconds", "0.3", "--json", "-"]) == 0
    told = capsys.readouterr()
    assert json.loads(told.out)["trainings"] == 0 and "steering by heuristic over redis://" in told.err
    assert KEY not in told.out + told.err
