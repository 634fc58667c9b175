"""Field reports on their way out: each is sent once and in order, through outages, deaths and a damaged cursor."""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec
import pytest
from tests.karn.made import report
from tests.oona.buses import Broker, Clock

from esper.errors import EnvelopeError, StateError
from esper.oona.bus import Delivery
from esper.oona.dead_letters import read_letter
from esper.oona.outbox import Outbox
from esper.oona.report_log import ReportLog, field_report
from esper.oona.schemas import decode_payload
from esper.oona.sender import Sender
from esper.oona.topics import DEAD_LETTERS, FIELD_REPORTS

pytestmark = pytest.mark.component

SENDER = Sender(source="esper/kasmina", run="digits-01-3f9ac210")


class Rig:
    """A log and what sends it; ``again`` is the next life."""

    def __init__(self, folder: Path, broker: Broker | None = None) -> None:
        self.folder, self.broker, self.clock = folder, broker or Broker(), Clock()
        self.log = ReportLog(folder)
        self.outbox = Outbox(self.broker, SENDER, self.log.follower(), field_report, clock=self.clock)

    def turns(self, num: int = 5) -> None:
        async def work() -> None:
            for _ in range(num):
                self.clock.now += 100.0
                await self.outbox.turn()

        asyncio.run(work())

    def again(self) -> Rig:
        return Rig(self.folder, self.broker)

    def sent(self) -> list[int]:
        return [decode_payload(envelope).cohort for envelope in self.broker.envelopes(FIELD_REPORTS)]


def test_what_was_written_is_sent_once_and_in_order(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    assert rig.log.write([]) == 0 and not rig.log.path.exists()
    assert rig.log.write([report(1), report(2, gain=None)]) == 2
    assert rig.log.write([report(1), report(2, gain=None), report(3)]) == 1, "all that are known, as a run tells them"
    rig.turns()
    rig.log.write([report(cohort) for cohort in range(6)])
    rig.turns()
    assert rig.sent() == [1, 2, 3, 0, 4, 5]
    first = rig.broker.envelopes(FIELD_REPORTS)[0]
    assert decode_payload(first) == report(1)
    assert (first.dataschema, first.subject, first.esperrun) == ("esper:field-report:1", "grown-seed0", SENDER.run)


def test_one_that_is_told_otherwise_stays_as_it_was_sent(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    rig.log.write([report(1)])
    assert rig.log.write([msgspec.structs.replace(report(1), reason="told otherwise"), report(2)]) == 1
    rig.turns()
    assert [decode_payload(e).reason for e in rig.broker.envelopes(FIELD_REPORTS)] == ["because"] * 2


def test_an_outage_and_a_death_lose_nothing(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    rig.broker.is_away = True
    rig.log.write([report(1), report(2)])
    rig.turns()
    assert rig.sent() == [] and rig.outbox.behind()[0] > 0
    rig = rig.again()  # which has nothing to add
    rig.broker.is_away = False
    rig.log.write([report(3)])
    rig.turns()
    assert rig.sent() == [1, 2, 3] and rig.outbox.behind()[0] == 0
    rig = rig.again()
    rig.log.write([report(cohort) for cohort in (1, 2, 3)])
    rig.turns()
    assert rig.sent() == [1, 2, 3], "the cursor knows"
    (tmp_path / "reports.cursor").unlink()
    rig.again().turns()
    assert rig.sent() == [1, 2, 3] * 2 and len(rig.broker.ids(FIELD_REPORTS)) == 3, "the same ids again"


def test_a_broker_that_fails_in_the_middle_gets_all_in_order(tmp_path: Path) -> None:
    for seed in range(8):
        rig = Rig(tmp_path / str(seed), Broker(seed=seed))
        rig.broker.failing = 0.7
        for cohort in range(5):
            rig.log.write([report(cohort)])
            rig.turns(2)
        rig.broker.failing = 0.0
        rig.turns()
        assert list(dict.fromkeys(rig.sent())) == [0, 1, 2, 3, 4]
        assert len(rig.broker.ids(FIELD_REPORTS)) == 5


def test_an_unfinished_line_is_written_again(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    rig.log.write([report(1)])
    rig.log.write([report(2)])
    rig.log.path.write_bytes(rig.log.path.read_bytes()[:-20])
    rig.turns()
    assert rig.sent() == [1]
    rig = rig.again()
    assert rig.log.write([report(1), report(2)]) == 1
    rig.turns()
    assert rig.sent() == [1, 2]


def test_a_damaged_log_is_refused_with_the_reason(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    rig.log.write([report(1)])
    rig.log.path.write_bytes(b'{"seal":"x"}\n' + rig.log.path.read_bytes())
    with pytest.raises(StateError, match=r"written down before they are sent, got an error .*line 1"):
        rig.log.write([report(2)])


def test_a_report_of_a_newer_esper_says_so(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    rig.log.write([report(1, v=7)])
    rig.turns()
    (envelope,) = rig.broker.envelopes(FIELD_REPORTS)
    assert envelope.dataschema == "esper:field-report:7"
    with pytest.raises(EnvelopeError, match="version of 'field-report', got 7"):
        decode_payload(envelope)


def test_a_line_that_holds_no_report_is_buried(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    rig.log.path.write_bytes(b'{"command":{"payload":{}}}\n{"command":[3]}\n{}\n')
    rig.turns()
    taken = [message for name, message in rig.broker.taken if name == DEAD_LETTERS.name]
    letters = [read_letter(Delivery(topic="", key="", value=m.value, position="")) for m in taken]
    assert [letter.topic for letter in letters] == ["reports.jsonl"] * 3
    assert all("must hold field reports" in letter.reason for letter in letters)
