"""Every promise of the desk holds in all simulated worlds, and every planted bug is found in one of them."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable
from typing import Any

import msgspec
import pytest
from tests.oona import world
from tests.oona.world import simulate

from esper.errors import StateError
from esper.oona import desk as desks
from esper.oona.answers import content_of
from esper.oona.desk import Desk
from esper.oona.pad import Pad
from esper.oona.register import Register
from esper.oona.replay import Replay
from esper.orders import Keeping, Orders
from esper.protocol import Order
from esper.safety.command_log import CommandLog, Entry

pytestmark = pytest.mark.component

CI_SEEDS, LONG_SEEDS, CANARY_SEEDS = 60, 20_000, 500


def run_all(seeds: Iterable[int]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for seed in seeds:
        outcome = simulate(seed)
        assert not outcome.violations, f"seed {seed}: {outcome.violations}\n" + "\n".join(outcome.trace)
        counts.update(outcome.counts)
    return counts


def test_no_promise_is_broken_in_any_world() -> None:
    counts = run_all(range(CI_SEEDS))
    tried = ("told again", "refused journal", "expired deadline", "refused snapshot", "replayed turns", "saves")
    for what in (*tried, "refused stale", "expired expired"):
        assert counts[what] > 10, f"the worlds hardly try {what}: {counts}"
    assert counts["replays overtaken"] > 2, counts


@pytest.mark.long
@pytest.mark.timeout(0)
def test_no_promise_is_broken_in_any_of_very_many_worlds() -> None:
    print(dict(run_all(range(LONG_SEEDS))))


def test_a_seed_says_everything() -> None:
    for seed in range(3):
        assert simulate(seed).trace == simulate(seed).trace


# ----------------------------------------------------------------------------------------------------------------------
# Planted bugs

Patch = pytest.MonkeyPatch


def acknowledge_on_receipt(patch: Patch) -> None:
    put = Desk._put

    def hasty(self: Desk, order: Any) -> Any:
        is_known = self._content(order.id) is not None
        told = put(self, order)
        if is_known or order.id not in self._waiting:
            return told
        return desks.acknowledge(order, "applied", "command", "", self._step)

    patch.setattr(Desk, "_put", hasty)


def acknowledge_before_the_log(patch: Patch) -> None:
    extend = CommandLog.extend

    def later(self: CommandLog, entries: list[Entry]) -> int:
        try:
            return extend(self, entries)
        except StateError:
            for entry in entries:
                self._entries.setdefault(entry.id, entry)
            return len(entries)

    patch.setattr(CommandLog, "extend", later)


def apply_before_the_log(patch: Patch) -> None:
    """What the disk refuses is applied all the same."""
    write_down = Desk._write_down

    def eager(self: Desk, step: int) -> None:
        orders = list(self._waiting.values())
        write_down(self, step)
        for order in orders:
            if order not in self._ready:
                self._ready.append(order)

    patch.setattr(Desk, "_write_down", eager)


def forget_the_ids(patch: Patch) -> None:
    patch.setattr(Desk, "_content", lambda self, order_id: None)


def forget_the_first_answers(patch: Patch) -> None:
    restore = Desk.restore

    def forgetful(self: Desk, state: Any) -> None:
        restore(self, state)
        self._register.answers.clear()

    patch.setattr(Desk, "restore", forgetful)


def forget_the_answers_of_the_checkpoint(patch: Patch) -> None:
    restore = Desk.restore

    def forgetful(self: Desk, state: Any) -> None:
        if state is not None:
            kept = msgspec.msgpack.decode(bytes(state["kept"]), type=desks.Kept)
            kept.answers = []
            state = {**state, "kept": msgspec.msgpack.encode(kept)}
        restore(self, state)

    patch.setattr(Desk, "restore", forgetful)


def replay_twice(patch: Patch) -> None:
    restore = Desk.restore

    def twice(self: Desk, state: Any) -> None:
        restore(self, state)
        self._replay.intents = deque(intent for intent in self._replay.intents for _ in range(2))

    patch.setattr(Desk, "restore", twice)


def replay_nothing(patch: Patch) -> None:
    restore = Desk.restore

    def never(self: Desk, state: Any) -> None:
        restore(self, state)
        self._replay.intents.clear()

    patch.setattr(Desk, "restore", never)


def replay_everything(patch: Patch) -> None:
    patch.setattr(Pad, "after", lambda self, position: list(self._log._entries.values()))


def replay_by_step(patch: Patch) -> None:
    """In the first step that is late enough, which a training that was taken back passes twice."""

    def take(self: Desk) -> None:
        self._ready.extend(self._replay.due(self._step + 1))

    patch.setattr(Desk, "_take_from_log", take)


def take_new_orders_while_replaying(patch: Patch) -> None:
    def both(self: Desk) -> None:
        self._ready.extend(self._replay.due(self._turn))
        if not self._ready and self._replay:
            replay, self._replay = self._replay, Replay([], [], [])
            self._write_down(self._step)
            self._replay = replay

    patch.setattr(Desk, "_take_from_log", both)


def save_while_replaying(patch: Patch) -> None:
    patch.setattr(Desk, "is_replaying", property(lambda self: False))


def lose_what_is_still_to_be_replayed(patch: Patch) -> None:
    save_while_replaying(patch)
    state = Desk.state

    def short(self: Desk) -> Any:
        intents, self._replay.intents = self._replay.intents, deque()
        try:
            return state(self)
        finally:
            self._replay.intents = intents

    patch.setattr(Desk, "state", short)


def tell_before_the_checkpoint(patch: Patch) -> None:
    patch.setattr(Keeping, "holds", property(lambda self: False))


def tell_nobody_of_what_was_held(patch: Patch) -> None:
    patch.setattr(Desk, "kept", lambda self, refusal=None: None)


def forget_what_was_taken_back(patch: Patch) -> None:
    undone = Orders.undone

    def lossy(self: Orders, step: int) -> None:
        undone(self, step)
        self._waiting.clear()

    patch.setattr(Orders, "undone", lossy)


def carry_nothing_over(patch: Patch) -> None:
    turn = Desk.turn

    def short(self: Desk, step: int) -> Any:
        self._ready.clear()
        return turn(self, step)

    patch.setattr(Desk, "turn", short)


def newest_first(patch: Patch) -> None:
    write_down = Desk._write_down

    def reversed_(self: Desk, step: int) -> None:
        write_down(self, step)
        self._ready = deque(reversed(self._ready))

    patch.setattr(Desk, "_write_down", reversed_)


def never_late(patch: Patch) -> None:
    """A deadline that is judged again when an order is replayed."""
    take = Desk._take_from_log

    def judging(self: Desk) -> None:
        take(self)
        self._ready = deque(order for order in self._ready if self._lateness(order) is None)

    patch.setattr(Desk, "_take_from_log", judging)


def acknowledge_the_delivery_at_once(patch: Patch) -> None:
    """Nothing comes again from the bus, and the issuer believes that it has arrived."""
    receive = world.World._receive

    def hasty(self: Any) -> None:
        receive(self)
        for order_id in self.training.desk._waiting:
            self.unanswered.pop(order_id, None)
        self.hub.done(world.GROUP, self.in_hand)
        self.in_hand.clear()

    def finish(self: Any) -> None:
        real(self)
        if any(order_id not in self.told for _, order_id, _ in self.under_way) or len(self.told) < len(self.sent):
            self._violate("orders were never answered")

    real = world.World.finish
    patch.setattr(world.World, "_receive", hasty)
    patch.setattr(world.World, "finish", finish)


def refuse_what_is_in_doubt(patch: Patch) -> None:
    """The disk did not take it, so it is refused; but it may be there."""
    patch.setattr(Pad, "doubtful", property(lambda self: set(), lambda self, value: None), raising=False)


def wait_for_the_replay(patch: Patch) -> None:
    """Emergency stops too."""
    patch.setattr(desks, "is_emergency", lambda order: False)


def an_order_of_the_log_that_counts(patch: Patch) -> None:
    """What has overtaken others is replayed where it stands in the log, not in its turn."""
    patch.setattr("esper.oona.replay.sorted", lambda intents, key: list(intents), raising=False)


def refusals_told_before_the_log(patch: Patch) -> None:
    def hasty(self: Register, order: Any, told: Any) -> None:
        turn_away(self, order, told)
        self.answers[order.id] = self._turned_away[-1]
        self.open.pop(order.id, None)

    turn_away = Register.turn_away
    patch.setattr(Register, "turn_away", hasty)


def other_orders_under_an_id(patch: Patch) -> None:
    patch.setattr(desks, "content_of", lambda order: content_of(msgspec.structs.replace(order, issuer=f"{id(order)}")))


def late_once_is_late_for_ever(patch: Patch) -> None:
    """What is told of a copy that comes too late is not remembered: a copy with another time is taken after all."""
    turn_away = Desk._turn_away

    def forgetful(self: Desk, order: Any, outcome: Any, gate: str, reason: str) -> None:
        if gate in ("stale", "expired"):
            self._unlogged.append(desks.acknowledge(order, outcome, gate, reason, self._step))
        else:
            turn_away(self, order, outcome, gate, reason)

    patch.setattr(Desk, "_turn_away", forgetful)


def late_copies_of_what_is_known(patch: Patch) -> None:
    """Refused although their order waits, or has its answer."""
    take = Desk.take

    def hasty(self: Desk, envelope: Any) -> Any:
        told = take(self, envelope)
        doubt = self._verify(envelope)
        if doubt is not None and doubt.flaw == "stale":
            order = msgspec.json.decode(envelope.data, type=Order)
            return desks.acknowledge(order, "refused", "stale", str(doubt), self._step)
        return told

    patch.setattr(Desk, "take", hasty)


BUGS: dict[str, Callable[[Patch], object]] = {
    "acknowledged on receipt": acknowledge_on_receipt,
    "acknowledged before the log": acknowledge_before_the_log,
    "applied before the log": apply_before_the_log,
    "dropped dedupe": forget_the_ids,
    "first answers forgotten on load": forget_the_first_answers,
    "the checkpoint's answers forgotten on load": forget_the_answers_of_the_checkpoint,
    "replayed twice": replay_twice,
    "nothing is replayed": replay_nothing,
    "everything is replayed": replay_everything,
    "replayed by step": replay_by_step,
    "new orders before the old ones": take_new_orders_while_replaying,
    "a checkpoint forgets what is still to be replayed": lose_what_is_still_to_be_replayed,
    "told before the checkpoint that it needs": tell_before_the_checkpoint,
    "held for ever": tell_nobody_of_what_was_held,
    "what was taken back is forgotten": forget_what_was_taken_back,
    "nothing is carried over": carry_nothing_over,
    "newest first": newest_first,
    "deadlines are judged again": never_late,
    "deliveries acknowledged at once": acknowledge_the_delivery_at_once,
    "what is in doubt is refused": refuse_what_is_in_doubt,
    "emergency stops wait for the replay": wait_for_the_replay,
    "replayed as it stands in the log": an_order_of_the_log_that_counts,
    "refusals are told before the log": refusals_told_before_the_log,
    "an id stands for its bytes": other_orders_under_an_id,
    "late once is late for ever": late_once_is_late_for_ever,
    "late copies of what is known are refused": late_copies_of_what_is_known,
}


def seeds_until_found(bug: str, most: int) -> int | None:
    """How many worlds it takes to find a planted bug."""
    with pytest.MonkeyPatch.context() as patch:
        BUGS[bug](patch)
        for seed in range(most):
            try:
                if simulate(seed).violations:
                    return seed + 1
            except (AssertionError, KeyError, IndexError, RuntimeError, RuntimeWarning, ValueError):
                return seed + 1  # the world fell apart
    return None


SLOW = ("what is in doubt is refused", "held for ever", "replayed as it stands in the log")


@pytest.mark.parametrize("bug", [bug for bug in BUGS if bug not in SLOW])
def test_a_planted_bug_is_found(bug: str) -> None:
    assert seeds_until_found(bug, CANARY_SEEDS) is not None


@pytest.mark.long
def test_every_planted_bug_is_found_within_500_worlds() -> None:
    found = {bug: seeds_until_found(bug, CANARY_SEEDS) for bug in BUGS}
    print(found)
    assert None not in found.values()
