"""The courier's thread: outlives failures, ends in time, keeps nothing alive, and says when it is dead."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from esper.errors import BusError, EsperError
from esper.oona.aside import aside, within
from esper.oona.courier import Courier

pytestmark = pytest.mark.component


def until(what: Callable[[], object], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.002)


def couriers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "esper-courier"]


def test_it_starts_when_it_is_told_and_errands_end_in_order() -> None:
    before = len(couriers())
    told: list[str] = []

    async def errand(stop: asyncio.Event) -> None:
        told.append("began")
        await stop.wait()
        told.append("finished")

    async def farewell() -> None:
        told.append("closed")

    courier = Courier(on_close=farewell)
    courier.add("one", errand)
    assert len(couriers()) == before
    assert courier.trouble() is None
    courier.start()
    courier.start()
    until(lambda: told == ["began"])
    assert courier.counts() == {"one": {"running": 1, "failures": 0, "failure": ""}}
    assert courier.stop()
    assert courier.stop()
    assert told == ["began", "finished", "closed"]
    assert courier.trouble() is None
    assert len(couriers()) == before
    for late in (courier.start, lambda: courier.add("two", errand)):
        with pytest.raises(EsperError, match=r"has ended|until it ends"):
            late()


def test_an_errand_can_be_added_while_it_runs_but_a_name_only_once() -> None:
    courier, began = Courier(), threading.Event()

    async def errand(stop: asyncio.Event) -> None:
        began.set()
        await stop.wait()

    courier.start()
    courier.add("one", errand)
    assert began.wait(5)
    with pytest.raises(EsperError, match="it has one"):
        courier.add("one", errand)
    assert courier.stop()


def test_a_courier_that_never_began_can_be_stopped() -> None:
    courier = Courier()
    assert courier.stop()
    with pytest.raises(EsperError, match="make a new one"):
        courier.start()


def test_an_errand_that_fails_is_run_again_and_the_others_do_not_notice() -> None:
    attempts: list[int] = []
    others: list[int] = []

    async def failing(stop: asyncio.Event) -> None:
        attempts.append(1)
        if len(attempts) < 4:
            raise BusError("away") if len(attempts) % 2 else ValueError("odd")
        await stop.wait()

    async def steady(stop: asyncio.Event) -> None:
        others.append(1)
        await stop.wait()

    courier = Courier()
    courier.add("failing", failing)
    courier.add("steady", steady)
    courier.start()
    until(lambda: len(attempts) == 4)
    assert courier.counts()["failing"] == {"running": 1, "failures": 3, "failure": "BusError: away"}
    assert len(others) == 1
    assert courier.trouble() is None
    assert courier.stop()


def test_an_error_that_nobody_foresaw_is_its_death_and_is_said() -> None:
    finished = threading.Event()

    async def broken(stop: asyncio.Event) -> None:
        raise AssertionError("a bug")

    async def other(stop: asyncio.Event) -> None:
        await stop.wait()
        finished.set()

    courier = Courier()
    courier.add("other", other)
    courier.add("broken", broken)
    courier.start()
    until(lambda: courier.trouble() is not None)
    assert courier.trouble() == "the courier has died (broken: AssertionError: a bug)"
    assert finished.wait(5)
    assert courier.stop()
    assert courier.trouble() is not None


def test_a_loop_that_stands_still_is_noticed_and_left_behind() -> None:
    release = threading.Event()

    async def blocking(stop: asyncio.Event) -> None:
        release.wait(20)

    courier = Courier(standstill_s=0.05)
    courier.add("blocking", blocking)
    courier.start()
    until(lambda: courier.trouble() is not None)
    assert "stood still" in str(courier.trouble())
    began = time.monotonic()
    assert not courier.stop(0.1)
    assert time.monotonic() - began < 3
    release.set()
    until(lambda: courier.stop(0.1))


def test_an_errand_that_does_not_end_is_cut_short() -> None:
    told: list[str] = []

    async def endless(stop: asyncio.Event) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            told.append("cut short")

    async def slow_farewell() -> None:
        await asyncio.sleep(30)

    courier = Courier(on_close=slow_farewell)
    courier.add("endless", endless)
    courier.start()
    began = time.monotonic()
    assert courier.stop(0.5)
    assert told == ["cut short"]
    assert time.monotonic() - began < 3


def _in_a_fork(courier: Courier, told: Path) -> None:
    said = [str(courier.trouble())]
    for call in (courier.start, courier.stop, lambda: courier.add("x", None)):  # type: ignore[arg-type]
        try:
            call()
        except EsperError as error:
            said.append(str(error))
    told.write_text("\n".join(said))


@pytest.mark.skipif(sys.platform == "win32", reason="there is no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_copy_says_what_it_is(tmp_path: Path) -> None:
    async def errand(stop: asyncio.Event) -> None:
        await stop.wait()

    courier = Courier()
    courier.add("one", errand)
    courier.start()
    child = multiprocessing.get_context("fork").Process(target=_in_a_fork, args=(courier, tmp_path / "told"))
    child.start()
    child.join(20)
    said = (tmp_path / "told").read_text().splitlines()
    assert len(said) == 4
    assert all(f"process {os.getpid()}" in line or f"made it ({os.getpid()})" in line for line in said)
    assert courier.trouble() is None
    assert courier.stop()


@pytest.mark.parametrize(
    "errand", ["await asyncio.Event().wait()", "await asyncio.to_thread(time.sleep, 0.1)", "time.sleep(60)"]
)
def test_it_keeps_no_process_alive(errand: str) -> None:
    code = f"""
import asyncio, time
from esper.oona.courier import Courier
async def errand(stop):
    {errand}
courier = Courier()
courier.add("one", errand)
courier.start()
time.sleep(0.1)
print("done")
"""
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert (done.stdout, done.stderr) == ("done\n", "")
    assert time.monotonic() - began < 30


# ----------------------------------------------------------------------------------------------------------------------
# Calls aside


def test_calls_aside_return_and_raise_and_do_not_hold_up_the_loop() -> None:
    async def calls() -> None:
        release = threading.Event()
        hanging = asyncio.create_task(aside(lambda: release.wait(20)))
        assert await aside(lambda: 7) == 7
        with pytest.raises(OSError, match="no"):
            await aside(_refuse)
        hanging.cancel()
        release.set()
        await asyncio.sleep(0.05)

    asyncio.run(calls())


def _refuse() -> None:
    raise OSError("no")


def test_what_takes_too_long_is_given_up_and_not_waited_for() -> None:
    ended: list[str] = []

    async def stubborn() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            await asyncio.sleep(0.1)  # an orderly retreat that takes its time
            ended.append("stubborn")
            raise

    async def fails_late() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("late")
            raise OSError("late")

    async def patience() -> None:
        for call in (stubborn, fails_late):
            with pytest.raises(BusError, match=r"the bus must answer within 0\.01 s"):
                await within(0.01, call(), "the bus")
            assert ended == []
        while len(ended) < 2:
            await asyncio.sleep(0.01)

    asyncio.run(patience())
