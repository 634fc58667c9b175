"""How ``esper controller serve`` and ``esper karn listen`` end, and by what settings the former decides."""

from __future__ import annotations

import asyncio
import os
import re
import signal
from typing import Any

import pytest

from esper.cli.attending import attend
from esper.cli.command import UsageError
from esper.cli.serving import controller_config
from esper.config import TamiyoConfig
from esper.errors import BusError, ConfigError
from esper.oona.claim_stores import MemoryStore
from esper.oona.claims import Claims
from esper.oona.memory import Hub, MemoryBus

pytestmark = pytest.mark.component


class Store(MemoryStore):
    closed = 0

    async def close(self) -> None:
        self.closed += 1
        raise BusError("gone")


class Steering:
    """Either does as it is told, or is busy with something that never ends."""

    def __init__(self, *, stuck: bool) -> None:
        self.stuck, self.was_told = stuck, False

    async def serve(self, until: asyncio.Event) -> None:
        await until.wait()
        self.was_told = True
        if self.stuck:
            await asyncio.Event().wait()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_is_not_made_to_wait(number: signal.Signals) -> None:
    steering: Any = Steering(stuck=True)

    async def work() -> None:
        ended = asyncio.create_task(attend(steering, MemoryBus(hub=Hub()), None, None, str))
        await asyncio.sleep(0.05)
        os.kill(os.getpid(), number)
        await asyncio.sleep(0.05)
        assert steering.was_told and not ended.done(), "what is under way is waited for"
        os.kill(os.getpid(), number)
        await asyncio.wait_for(ended, 2)

    asyncio.run(work())


def test_the_claim_store_is_closed_and_failing_at_it_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    store, steering = Store(), Steering(stuck=False)
    told: Any = steering
    asyncio.run(attend(told, MemoryBus(hub=Hub()), Claims(store), 0.05, str))
    assert store.closed == 1 and "the claim store could not be closed (gone)" in capsys.readouterr().err


def test_what_ends_the_server_is_not_hidden() -> None:
    class Broken(Steering):
        async def serve(self, until: asyncio.Event) -> None:
            raise AssertionError("broken")

    broken: Any = Broken(stuck=False)
    with pytest.raises(AssertionError, match="broken"):
        asyncio.run(attend(broken, MemoryBus(hub=Hub()), None, 0.5, str))


def test_settings_of_the_controller_are_those_that_were_typed() -> None:
    config = controller_config("conservative", ("tamiyo.last_share=0.6", " tamiyo.first = 7"))
    assert (config.temper, config.last_share, config.first) == ("conservative", 0.6, 7)
    assert controller_config(None, ()) == TamiyoConfig()


@pytest.mark.parametrize(
    ("item", "error", "said"),
    [
        ("graft.lr_boost=2", UsageError, "esper run --set"),
        ("tamiyo.last_share", UsageError, "tamiyo.NAME=VALUE"),
        ("tamiyo.last_shares=0.5", ConfigError, "near names: tamiyo.last_share"),
        ("tamiyo.last_share=7", ConfigError, "last_share"),
    ],
)
def test_what_is_no_setting_of_the_controller_is_refused(item: str, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=re.escape(said)):
        controller_config(None, (item,))
