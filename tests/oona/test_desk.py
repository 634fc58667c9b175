"""The desk by itself: what it takes, in which order it hands it out, what it says of it, and what a bad disk does."""

from __future__ import annotations

import base64
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from tests.oona.served import JOB, RUN, an_order, sealed

from esper.errors import EnvelopeError, StateError
from esper.kasmina.gates import Gate
from esper.oona.answers import Answer, Attempt, Intent, answer_entry, intent_entry, read_entry
from esper.oona.desk import Desk
from esper.oona.incoming import anybody, nobody
from esper.oona.outbox import acknowledgement
from esper.oona.topics import COMMANDS, DEAD_LETTERS
from esper.protocol import Acknowledgement, Command, Order, RollBack, SetBudget, Snapshot, Stop
from esper.safety.command_log import CommandLog, Entry, read_log
from esper.safety.simulation.disk import SimulatedDisk
from esper.safety.simulation.faults import FaultyDisk

pytestmark = pytest.mark.component

LOG = Path("/simulated/run/commands.jsonl")
YES = Gate("command", True, "")


def budget(number: int) -> SetBudget:
    return SetBudget(params=number)


class Fixture:
    """A desk on a simulated disk, and a training that does nothing but count."""

    def __init__(self, **settings: Any) -> None:
        self.disk = settings.pop("disk", None) or SimulatedDisk()
        self.now = 1_000_000.0
        settings = {"verify": anybody, "clock": lambda: self.now, **settings}
        self.desk = Desk(LOG, run=RUN, job=JOB, disk=self.disk, **settings)
        self.step = 0
        self.applied: list[str] = []

    def send(self, *ids: str, command: Command | None = None, **fields: Any) -> list[Acknowledgement | None]:
        orders = [an_order(name, command or budget(7), **fields) for name in ids]
        return [self.desk.take(sealed(order)) for order in orders]

    def train(self, gate: Callable[[Order], Gate] = lambda order: YES, *, hold: bool = False) -> list[str]:
        self.step += 1
        seen: list[str] = []
        for order in self.desk.turn(self.step):
            seen.append(order.id)
            self.desk.answer(order, self.step, gate(order), hold=hold)
        self.applied += seen
        self.desk.write()  # as the courier does
        return seen

    def again(self, state: Any = None, **settings: Any) -> Fixture:
        """The next process; this one dies."""
        self.desk._pad.close()
        other = Fixture(disk=self.disk, **settings)
        if state is not None:
            other.desk.restore(state)
        return other


@pytest.fixture
def fix() -> Iterator[Fixture]:
    made = Fixture()
    yield made
    made.desk.close()


# ----------------------------------------------------------------------------------------------------------------------
# Order and repetition


def test_orders_wait_for_the_step_and_come_as_they_were_received(fix: Fixture) -> None:
    assert fix.send("b", "a", "c") == [None, None, None]
    assert fix.desk.is_open("a") and fix.desk.answer_to("a") is None
    assert fix.train() == ["b", "a", "c"]
    told = fix.desk.answer_to("a")
    assert told == Acknowledgement(
        id="a", outcome="applied", issuer="ada", run=RUN, job=JOB, kind="set_budget", gate="command", step=1
    )
    assert not fix.desk.is_open("a") and fix.train() == []


def test_a_repetition_is_answered_and_not_applied(fix: Fixture) -> None:
    fix.send("a")
    assert fix.send("a") == [None], "its answer is still to come"
    assert fix.train(lambda order: Gate("budget", False, "too small")) == ["a"]
    (again,) = fix.send("a", issued="2026-01-01T00:00:00Z", deadline="2000-01-01T00:00:00Z")
    assert again == msgspec.structs.replace(fix.desk.answer_to("a"), first=False)
    assert (again.outcome, again.gate, again.reason) == ("refused", "budget", "too small")
    assert fix.train() == [] and len(read_log(LOG, disk=fix.disk)[0]) == 2


@pytest.mark.parametrize("when", ["waiting", "answered"])
@pytest.mark.parametrize("other", [{"command": budget(8)}, {"issuer": "eve"}])
def test_an_id_stands_for_one_order(when: str, other: dict[str, Any], fix: Fixture) -> None:
    fix.send("a")
    if when == "answered":
        fix.train()
    (told,) = fix.send("a", **other)
    assert (told.outcome, told.gate, told.first) == ("refused", "id", False)
    assert "stands for another order" in told.reason
    fix.train()
    assert fix.applied == ["a"] and fix.desk.answer_to("a").outcome == "applied"


def test_what_does_not_fit_is_refused_for_ever(fix: Fixture) -> None:
    small = Fixture(room=3)
    small.send(*"abcd")
    assert small.desk.is_open("d") and small.desk.answer_to("d") is None, "nobody is told before it is on the disk"
    stop = Stop(reason="fire", emergency=True)
    assert small.send("s", command=stop) == [None] and small.desk.is_open("s"), "there is room for an emergency"
    assert small.train() == ["a", "b", "c", "s"]
    told = small.desk.answer_to("d")
    assert (told.outcome, told.gate) == ("refused", "room") and "at most 3" in told.reason
    assert not small.desk.is_open("d")
    (again,) = small.send("d")
    assert again.gate == "room" and not again.first and small.train() == []
    small = small.again()
    assert small.desk.answer_to("d") == told


def syncs(fix: Fixture) -> int:
    return sum("sync" in what and LOG.name in what for what in fix.disk.log)


def test_refusals_go_to_the_disk_together_and_in_order() -> None:
    fix = Fixture(room=2, disk=FaultyDisk(SimulatedDisk()))
    before = syncs(fix)
    names = [f"n{number}" for number in range(100)]
    assert fix.send(*names) == [None] * 100 and fix.send("n50") == [None] and syncs(fix) == before
    fix.desk.write()
    assert syncs(fix) - before == 1
    fix.train()
    assert 1 <= syncs(fix) - before <= 3, "what is to be applied, what is refused and what was applied"
    answered = [name for entry in read_log(LOG, disk=fix.disk)[0] if isinstance(name := read_entry(entry), Answer)]
    assert [answer.acknowledgement.id for answer in answered] == [*names[2:], *names[:2]]
    before = syncs(fix)
    fix.send(*(f"m{number}" for number in range(1000)))
    assert 1 <= syncs(fix) - before <= 5, "what waits is bounded where no step comes"


@pytest.mark.parametrize("end", [lambda desk: desk.close(), lambda desk: desk.end("over"), lambda desk: desk.write()])
def test_refusals_need_no_further_step(end: Callable[[Desk], None]) -> None:
    fix = Fixture(room=1)
    fix.send("a", "b")
    end(fix.desk)
    assert fix.desk.answer_to("b").gate == "room" and not fix.desk.is_open("b")
    assert fix.again().desk.answer_to("b").gate == "room"


def test_going_back_to_a_checkpoint_forgets_no_refusal() -> None:
    fix = Fixture(room=1)
    state = fix.desk.state()
    fix.send("a", "b")
    fix.desk.restore(state)
    assert fix.desk.answer_to("b").gate == "room" and fix.desk.is_open("a")


def test_one_step_takes_only_so_many(fix: Fixture) -> None:
    fix.send(*(f"n{number}" for number in range(300)))
    assert len(fix.train()) == 256 and len(fix.train()) == 44


# ----------------------------------------------------------------------------------------------------------------------
# Time


def test_a_deadline_is_judged_when_it_would_be_applied(fix: Fixture) -> None:
    fix.send("late", deadline="1970-01-12T13:46:41Z")  # a second from now
    fix.send("timely", deadline="1970-01-12T13:46:50+00:00")
    order = an_order("both", budget(1), deadline="1970-01-12T13:50:00Z")
    fix.desk.take(sealed(order, esperexpires="1970-01-12T13:46:42Z"))  # the earlier one counts
    fix.now += 5
    assert fix.train() == ["timely"]
    told = fix.desk.answer_to("late")
    assert (told.outcome, told.gate, told.step) == ("expired", "deadline", 1)
    assert fix.desk.answer_to("both").outcome == "expired"
    fix.now -= 100
    assert fix.send("late")[0].outcome == "expired" and fix.train() == []


class Flaw(SimpleNamespace):
    def __str__(self) -> str:
        return f"it is {self.flaw}"


def doubting(flaw: str, *, authentic: bool = True) -> Callable[[Any], Any]:
    return lambda envelope: Flaw(flaw=flaw, is_authentic=authentic)


@pytest.mark.parametrize(("flaw", "outcome"), [("stale", "refused"), ("expired", "expired")])
def test_what_comes_too_late_is_refused_for_ever(flaw: str, outcome: str) -> None:
    fix = Fixture(verify=doubting(flaw))
    assert fix.send("a") == [None] and fix.desk.is_open("a"), "it is told when it is in the log"
    assert fix.train() == [] and not fix.desk.is_open("a")
    told = fix.desk.answer_to("a")
    assert told is not None and (told.outcome, told.gate, told.reason) == (outcome, flaw, f"it is {flaw}")
    for life in (fix, fix.again()):
        life.desk._verify = anybody  # a copy with another time
        (again,) = life.send("a")
        assert again == msgspec.structs.replace(told, first=False) and life.train() == []


def test_what_comes_too_late_again_gets_its_first_answer(fix: Fixture) -> None:
    fix.send("a")
    fix.train()
    fix.desk._verify = doubting("stale")
    (told,) = fix.send("a")
    assert told.outcome == "applied" and not told.first
    fix.desk._verify = doubting("crowded")
    assert fix.send("b") == [None] and fix.desk.is_open("b")
    assert fix.train() == [] and fix.desk.answer_to("b").gate == "crowded"


@pytest.mark.parametrize("verify", [nobody, doubting("forged", authentic=False)])
def test_whom_nobody_vouches_for_is_not_heard(verify: Any) -> None:
    fix = Fixture(verify=verify)
    with pytest.raises(EnvelopeError, match="sender must be known"):
        fix.send("a")
    assert not fix.desk.is_open("a") and fix.train() == [] and read_log(LOG, disk=fix.disk) == ([], 0)


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints on demand


def test_a_snapshot_is_answered_when_it_is_written(fix: Fixture) -> None:
    fix.send("s", command=Snapshot())
    assert fix.train(hold=True) == ["s"] and fix.desk.is_open("s")
    fix.send("b")
    fix.train()
    assert fix.desk.is_open("b"), "what follows waits behind it"
    fix.desk.kept()
    assert [fix.desk.answer_to(name).outcome for name in "sb"] == ["applied", "applied"]


def test_a_snapshot_that_the_disk_refuses_is_refused_and_what_else_is_held_stays_so(fix: Fixture) -> None:
    fix.send("r", command=RollBack(cohort=1, reason="", exact=True))
    fix.send("s", command=Snapshot())
    fix.train(hold=True)
    fix.desk.kept("the disk is full")
    told = fix.desk.answer_to("s")
    assert (told.outcome, told.gate, told.reason) == ("refused", "snapshot", "the disk is full")
    assert fix.desk.is_open("r")
    fix.desk.kept()
    assert fix.desk.answer_to("r").outcome == "applied"


# ----------------------------------------------------------------------------------------------------------------------
# The end


def test_at_the_end_what_waits_is_refused(fix: Fixture) -> None:
    fix.send("a")
    fix.desk.end("training has ended")
    fix.send("b")
    for name in "ab":
        told = fix.desk.answer_to(name)
        assert (told.outcome, told.gate, told.reason) == ("refused", "ended", "training has ended")


def test_a_closed_desk_leaves_the_log_to_the_next_life(fix: Fixture) -> None:
    fix.send("a")
    fix.train()
    size = fix.desk.num_bytes
    fix.desk.close()
    fix.send("late")
    fix.desk.end("over")
    assert fix.train() == [] and fix.desk.answer_to("late") is None, "what is not on the disk is not told"
    after = Fixture(disk=fix.disk)
    assert size > 0 and fix.desk.num_bytes == size
    fix.now += 2
    assert fix.train() == []
    after.send("b")
    assert after.train() == ["a"] and after.train() == ["b"]
    after.desk.close()


def test_who_follows_the_log_is_told_when_it_grows() -> None:
    calls: list[int] = []
    fix = Fixture(on_written=lambda: calls.append(1))
    fix.send("a", "b")
    assert not calls
    fix.train()
    assert len(calls) == 1, "one write for all answers of a step"
    said = [read_entry(entry) for entry in read_log(LOG, disk=fix.disk)[0]]
    assert [type(one) for one in said] == [Intent, Intent, Answer, Answer]


# ----------------------------------------------------------------------------------------------------------------------
# A log that refuses


class Moody(FaultyDisk):
    """Fails from now on, or works again."""

    fault: str | None = None

    def operate(self, kind: str, path: Path, action: Any, handle: Any = None) -> Any:
        if self.fault == "sync only":
            if kind in ("sync", "truncate") or (kind == "create"):
                self.faults[self.num_operations] = "EIO"
        elif self.fault is not None and kind in ("write", "sync"):
            self.faults[self.num_operations] = self.fault
        return super().operate(kind, path, action, handle)


def test_a_full_disk_refuses_the_order_and_nothing_else() -> None:
    disk = Moody(SimulatedDisk())
    fix = Fixture(disk=disk)
    fix.send("a")
    fix.train()
    disk.fault = "ENOSPC"
    fix.send("b")
    assert fix.train() == [] and fix.desk.is_open("b") and fix.desk.unlogged() == [], "it may be on the disk"
    fix.send("c")
    assert fix.train() == []
    (told,) = fix.desk.unlogged()
    assert (told.id, told.outcome, told.gate) == ("c", "refused", "journal") and "No space" in told.reason
    assert fix.send("c")[0] == msgspec.structs.replace(told, first=False) and fix.desk.unlogged() == []
    fix.now += 2
    assert fix.train() == [] and fix.desk.is_open("b"), "still full"
    disk.fault, fix.now = None, fix.now + 2
    fix.send("d")
    assert fix.train() == ["d"] and fix.desk.answer_to("d").outcome == "applied"
    told = fix.desk.answer_to("b")
    assert (told.outcome, told.gate) == ("refused", "journal") and not fix.desk.is_open("b")
    fix = fix.again()
    assert [fix.desk.answer_to(name).outcome for name in "abcd"] == ["applied", "refused", "refused", "applied"]
    assert fix.train() == ["a"]


def test_an_order_that_reached_a_disk_which_failed_is_left_to_the_next_process() -> None:
    """It belongs to a step that has passed without it, so this process takes nothing more; none is told of it."""
    disk = Moody(SimulatedDisk())
    fix = Fixture(disk=disk)
    fix.send("a")
    disk.fault = "sync only"
    assert fix.train() == [] and fix.desk.is_open("a")
    disk.fault, fix.now = None, fix.now + 2
    fix.send("b")
    assert fix.train() == [] and fix.desk.is_open("a") and fix.desk.unlogged()[0].id == "b"
    state = fix.desk.state()
    fix = fix.again(state)
    assert state["turn"] == 2 and fix.train() == ["a"] and fix.desk.answer_to("a").outcome == "applied"


def test_an_answer_that_the_disk_does_not_take_is_not_told() -> None:
    disk = Moody(SimulatedDisk())
    fix = Fixture(disk=disk)
    fix.send("a")
    fix.step += 1
    for order in fix.desk.turn(1):
        disk.fault = "EIO"
        fix.desk.answer(order, 1, YES, hold=False)
    assert fix.desk.is_open("a") and fix.desk.unlogged() == []
    fix.train()
    assert fix.desk.is_open("a")
    disk.fault, fix.now = None, fix.now + 2
    fix.train()
    assert fix.desk.answer_to("a").outcome == "applied"


def test_a_log_that_cannot_be_read_again_says_nothing_of_what_it_may_hold() -> None:
    disk = Moody(SimulatedDisk())
    fix = Fixture(disk=disk)
    fix.send("a", "b")
    disk.fault = "EIO"
    lock, disk.lock = disk.lock, lambda path: (_ for _ in ()).throw(OSError("gone"))  # type: ignore[method-assign]
    assert fix.train() == []
    for _ in range(3):
        fix.now += 2
        fix.send(f"c{fix.step}")
        assert fix.train() == [] and fix.desk.is_open("a") and fix.desk.is_open("b")
    assert [told.id for told in fix.desk.unlogged()] == ["c1", "c2", "c3"]
    assert fix.desk.state()["position"]["count"] == 0
    disk.lock, disk.fault, fix.now = lock, None, fix.now + 2  # type: ignore[method-assign]
    fix.send("d")
    assert fix.train() == ["d"] and fix.desk.answer_to("a").outcome == "refused"


# ----------------------------------------------------------------------------------------------------------------------
# The log


@pytest.mark.parametrize(
    "entry",
    [
        Entry(id="x", step=1, payload={}),
        Entry(id="order/a", step=1, payload=[]),
        Entry(id="order/a", step=1, payload={"order": {"command": {"type": "rm"}}, "turn": 1}),
        Entry(id="answer/a", step=1, payload={"acknowledgement": {}}),
        Entry(id="order/b", step=1, payload=intent_entry(Intent(an_order("a", budget(1)), 1), 1).payload),
        Entry(
            id="answer/b",
            step=1,
            payload=answer_entry(Answer(Acknowledgement(id="a", outcome="applied"), "")).payload,
        ),
    ],
)
def test_a_log_of_something_else_is_refused(entry: Entry) -> None:
    disk = SimulatedDisk()
    with CommandLog(LOG, disk=disk) as log:
        log.append(entry.id, step=entry.step, payload=entry.payload)
    with pytest.raises(StateError, match="a log of orders holds orders and answers"):
        Fixture(disk=disk)
    CommandLog(LOG, disk=disk).close()  # it was let go of


# ----------------------------------------------------------------------------------------------------------------------
# Threads


def test_orders_of_eight_threads_while_steps_are_taken(tmp_path: Path) -> None:
    each, issuers = 60, 8
    desk = Desk(tmp_path / "commands.jsonl", run=RUN, job=JOB, verify=anybody)
    ready = threading.Barrier(issuers + 1)

    def talk(name: str) -> None:
        ready.wait()
        for number in range(each):
            desk.take(sealed(an_order(f"{name}-{number}", budget(number), issuer=name)))
            if number % 3 == 0:
                desk.take(sealed(an_order(f"{name}-{number}", budget(number), issuer=name)))

    threads = [threading.Thread(target=talk, args=(f"i{number}",)) for number in range(issuers)]
    for thread in threads:
        thread.start()
    ready.wait()
    applied: list[str] = []
    step, end = 0, time.monotonic() + 60
    while len(applied) < each * issuers and time.monotonic() < end:
        step += 1
        for order in desk.turn(step):
            applied.append(order.id)
            desk.answer(order, step, YES, hold=False)
    for thread in threads:
        thread.join(timeout=30)
    assert sorted(applied) == sorted(f"i{i}-{n}" for i in range(issuers) for n in range(each))
    for i in range(issuers):
        mine = [name for name in applied if name.startswith(f"i{i}-")]
        assert mine == [f"i{i}-{n}" for n in range(each)], "each issuer's orders keep their order"
    desk.close()


# ----------------------------------------------------------------------------------------------------------------------
# A step and the disk


class Slow(FaultyDisk):
    """Each sync waits until it is let go, in whatever thread it is."""

    def __init__(self) -> None:
        super().__init__(SimulatedDisk())
        self.is_slow, self.syncing, self.go = False, threading.Event(), threading.Event()

    def operate(self, kind: str, path: Path, action: Any, handle: Any = None) -> Any:
        if self.is_slow and kind == "sync":
            self.syncing.set()
            assert self.go.wait(20)
        return super().operate(kind, path, action, handle)


def test_no_step_waits_for_the_disk_because_of_a_refusal() -> None:
    disk = Slow()
    fix = Fixture(disk=disk, room=1)
    fix.send("a", "refused")
    assert fix.train() == ["a"]
    fix.send("waits", "refused-too")
    disk.is_slow = True
    writer = threading.Thread(target=fix.desk.write)
    writer.start()
    assert disk.syncing.wait(20)
    turns = [list(fix.desk.turn(2)), list(fix.desk.turn(3))]  # would wait for ever
    assert turns == [[], []] and fix.desk.is_open("waits") and fix.desk.is_open("refused-too")
    assert fix.desk.submit(an_order("more", budget(1))) is None, "nor does who gives an order"
    fix.desk.kept()
    disk.is_slow = False
    disk.go.set()
    writer.join(20)
    assert fix.desk.answer_to("refused-too").gate == "room", "told when it is on the disk"
    assert fix.desk.is_open("more")
    fix.desk.write()
    assert fix.desk.is_open("more"), "the step that waits goes first"
    assert fix.train() == ["waits"]
    assert fix.desk.answer_to("more").gate == "room"
    assert [e.id for e in read_log(LOG, disk=fix.disk)[0]][-4:] == [
        "answer/refused-too", "order/waits", "answer/waits", "answer/more"
    ]  # fmt: skip


def test_a_step_writes_no_refusals_itself() -> None:
    fix = Fixture(room=1, disk=FaultyDisk(SimulatedDisk()))
    fix.send("late", "b", deadline="1970-01-01T00:00:00Z")
    before = syncs(fix)
    assert list(fix.desk.turn(1)) == list(fix.desk.turn(2)) == [] and syncs(fix) == before
    assert fix.desk.is_open("late") and fix.desk.is_open("b")
    fix.desk.write()
    assert fix.desk.answer_to("late").outcome == "expired" and fix.desk.answer_to("b").gate == "room"


def test_an_answer_that_a_step_could_not_write_is_written_with_the_refusals() -> None:
    disk = Slow()
    fix = Fixture(disk=disk, room=1)
    fix.send("a", "refused")
    turn = fix.desk.turn(1)
    order = next(turn)
    disk.is_slow = True
    writer = threading.Thread(target=fix.desk.write)
    writer.start()
    assert disk.syncing.wait(20)
    fix.desk.answer(order, 1, YES, hold=False)
    assert list(turn) == [] and fix.desk.is_open("a")
    disk.is_slow = False
    disk.go.set()
    writer.join(20)
    assert fix.desk.is_open("a")
    fix.desk.write()
    assert fix.desk.answer_to("a").outcome == "applied"


def test_going_back_keeps_a_refusal_that_the_disk_would_not_take() -> None:
    disk = Moody(SimulatedDisk())
    fix = Fixture(disk=disk, room=1)
    state = fix.desk.state()
    fix.send("a", "b")
    disk.fault = "ENOSPC"
    fix.desk.write()
    fix.desk.restore(state)
    assert fix.desk.is_open("b") and fix.desk.answer_to("b") is None
    disk.fault, fix.now = None, fix.now + 2
    fix.desk.write()
    assert fix.desk.answer_to("b").gate == "room"


# ----------------------------------------------------------------------------------------------------------------------
# Emergency stops


def test_an_emergency_stop_overtakes_what_waits(fix: Fixture) -> None:
    fix.send(*(f"n{number}" for number in range(400)))
    fix.send("fire", command=Stop(reason="fire", emergency=True))
    fix.send("stop", command=Stop(reason="enough"))
    assert fix.train()[-1] == "fire" and fix.train()[-1] == "stop"


def test_an_emergency_stop_overtakes_the_replay_and_keeps_its_place() -> None:
    fix = Fixture()
    for number in range(1, 7):
        fix.send(f"n{number}")
        fix.train()
    fix = fix.again()
    assert fix.train() == ["n1"]
    fix.send("ordinary")
    fix.send("fire", command=Stop(reason="fire", emergency=True))
    assert fix.train() == ["n2", "fire"] and fix.desk.is_replaying
    assert fix.desk.answer_to("fire").step == 2, "told at once, too"
    fix.train()
    fix = fix.again()
    lives = [fix.train() for _ in range(6)]
    assert lives == [["n1"], ["n2", "fire"], ["n3"], ["n4"], ["n5"], ["n6"]], "the same again"
    assert not fix.desk.is_replaying


# ----------------------------------------------------------------------------------------------------------------------
# Orders that end the process


class Dies(BaseException):
    """Nothing catches it."""


def dying(*names: str) -> Callable[[Order], Gate]:
    def gate(order: Order) -> Gate:
        if order.id in names:
            raise Dies
        return YES

    return gate


def test_an_order_that_ends_the_process_is_given_up() -> None:
    fix = Fixture()
    fix.send("a", "poison", "c")
    for _ in range(3):
        with pytest.raises(Dies):
            fix.train(dying("poison"))
        fix = fix.again()
        assert fix.desk.is_open("poison")
    assert fix.desk.answer_to("a").outcome == "applied", "what was lived through is told, and has not to be tried again"
    with pytest.warns(RuntimeWarning, match=r"order poison \(set_budget\) is refused: the process ended each time"):
        assert fix.train(dying("poison")) == ["a", "c"]
    told = fix.desk.answer_to("poison")
    assert (told.outcome, told.gate) == ("refused", "poison") and "it is given up" in told.reason
    fix = fix.again()
    assert fix.train(dying("poison")) == ["a", "c"] and fix.desk.answer_to("poison") == told
    assert fix.send("poison")[0].gate == "poison"
    letters = [draft for line in fix.disk.read(LOG, 1 << 20).splitlines() for draft in acknowledgement(line)]
    (letter,) = [msgspec.json.decode(draft.data) for draft in letters if draft.topic is DEAD_LETTERS]
    assert letter["topic"] == COMMANDS.name and "it is given up" in letter["reason"]
    assert b'"poison"' in base64.b64decode(letter["original"])


def test_each_attempt_is_on_the_disk_before_the_order_is_applied_again() -> None:
    fix = Fixture()
    fix.send("a")
    with pytest.raises(Dies):
        fix.train(dying("a"))
    fix = fix.again()

    def gate(order: Order) -> Gate:
        assert read_entry(read_log(LOG, disk=fix.disk)[0][-1]) == Attempt("a", 1)
        return YES

    assert fix.train(gate) == ["a"] and fix.desk.answer_to("a").outcome == "applied"


def test_deaths_that_are_not_an_orders_doing_do_not_count_against_it() -> None:
    """Its answer has to wait for a checkpoint, and the process is killed again and again before there is one."""
    fix = Fixture()
    fix.send("a", command=Snapshot())
    for _ in range(6):
        assert fix.train(hold=True) == ["a"] and fix.desk.is_open("a")
        fix = fix.again()
    assert fix.train(hold=True) == ["a"]
    fix.desk.kept()
    assert fix.desk.answer_to("a").outcome == "applied"


def test_an_order_that_waits_in_a_checkpoint_is_given_up_too() -> None:
    fix = Fixture()
    fix.send("back", "poison")
    turn = fix.desk.turn(1)
    fix.desk.answer(next(turn), 1, YES, hold=True)
    turn.close()  # taken back
    state = fix.desk.state()
    fix.desk.kept()
    for _ in range(3):
        with pytest.raises(Dies):
            fix.train(dying("poison"))
        fix = fix.again(state)
    with pytest.warns(RuntimeWarning, match="it is given up"):
        assert fix.train(dying("poison")) == []
    assert fix.desk.answer_to("poison").gate == "poison"


# ----------------------------------------------------------------------------------------------------------------------
# A checkpoint that knows no desk


def after_step(steps: int, fix: Fixture) -> Fixture:
    """The next life, from a checkpoint after so many steps in which there was no desk."""
    other = fix.again()
    other.step = steps
    return other


def test_orders_from_before_a_checkpoint_that_knows_no_desk_are_not_applied() -> None:
    fix = Fixture()
    for number in range(1, 5):
        fix.send(f"n{number}")
        fix.train()
    fix.send("open")
    with pytest.raises(Dies):
        fix.train(dying("open"))  # in step 5
    told = fix.desk.answer_to("n2")
    fix = after_step(100, fix)
    assert fix.desk.state()["turn"] == -1 and fix.desk.is_open("open")
    assert fix.train() == [] and not fix.desk.is_replaying
    assert fix.desk.answer_to("n2") == told, "what was told stays"
    answer = fix.desk.answer_to("open")
    assert (answer.outcome, answer.gate, answer.step) == ("expired", "checkpoint", 101)
    assert fix.send("open")[0].outcome == "expired" and fix.train() == []


def test_orders_from_after_it_are_applied_in_their_step_unless_they_are_too_late() -> None:
    fix = Fixture()
    fix.step = 100  # begun on such a checkpoint
    for number in range(101, 104):
        fix.send(f"n{number}")
        fix.train()
    fix.send("late", deadline="1970-01-12T13:46:50Z")  # ten seconds from now
    with pytest.raises(Dies):
        fix.train(dying("late"))
    again = after_step(100, fix)
    assert [again.train() for _ in range(4)] == [["n101"], ["n102"], ["n103"], ["late"]]
    again.desk._pad.close()
    fix = after_step(50, again)
    assert [name for _ in range(50) for name in fix.train()] == [], "an older checkpoint: each in its step all the same"
    assert fix.train() == ["n101"]


def test_what_is_too_late_after_such_a_checkpoint_is_expired() -> None:
    fix = Fixture()
    fix.step = 100
    fix.send("told", "late", deadline="1970-01-12T13:46:50Z")
    with pytest.raises(Dies):
        fix.train(dying("late"))
    fix = after_step(100, fix)
    fix.now += 60
    assert fix.train() == []
    assert [fix.desk.answer_to(name).gate for name in ("told", "late")] == ["deadline"] * 2
    fix = after_step(100, fix)
    assert fix.train() == [], "whatever the clock says"


def test_a_desk_that_has_seen_no_step_says_so_in_its_checkpoint() -> None:
    fix = Fixture()
    fix.send("a")
    fix.train()
    fix = fix.again()
    state = fix.desk.state()
    fix = fix.again(state)
    fix.step = 10
    assert fix.train() == [] and fix.desk.state()["turn"] == 11
