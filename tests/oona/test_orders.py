"""What orders do to a training that grows: pause, stop at once, checkpoints on demand, refusals that help, the log."""

from __future__ import annotations

import dataclasses
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.models import MLP
from tests.oona.served import JOB, RUN, Served, an_order, sealed
from tests.rigs import Idle, attach

from esper.commands import apply
from esper.errors import EnvelopeError, StateError
from esper.oona.desk import Desk
from esper.oona.incoming import anybody, nobody
from esper.orders import Orders
from esper.protocol import (
    ORDER_SCHEMA,
    Acknowledgement,
    Cancel,
    Command,
    Commanded,
    Germinate,
    GrowthPaused,
    Observation,
    Order,
    Pause,
    Refused,
    Resume,
    SeedPlan,
    SetBudget,
    SetStrategy,
    Snapshot,
    Stop,
)

pytestmark = pytest.mark.integration


class Eager(Idle):
    """Wants a seed whenever it is asked."""

    asked = 0

    def decide(self, observation: Observation) -> Any:
        self.asked += 1
        return [Germinate(seeds=(SeedPlan(site="fc1-fc2", chunks=(0,), width=1),))]


# ----------------------------------------------------------------------------------------------------------------------
# New commands


def test_growth_is_paused_as_a_whole_and_goes_on() -> None:
    controller = Eager()
    rig = attach(MLP.build(), controller=controller)
    rig.order(Pause(reason="lunch"))
    rig.order(Pause(reason="coffee"))  # twice is once; the newest reason stands
    rig.order(Germinate(seeds=(SeedPlan(site="fc1-fc2"),)))
    rig.train(10)
    assert controller.asked == 0 and not rig.grower.kasmina.cohorts
    (refusal,) = rig.refused()
    assert refusal.gate == "paused" and "growth is paused: coffee" in refusal.reason
    state = rig.grower.state_dict()
    rig.order(Resume())
    rig.train(5)
    assert controller.asked > 0 and rig.grower.kasmina.cohorts
    told = [(e.paused, e.reason) for e in rig.events if isinstance(e, GrowthPaused)]
    assert told == [(True, "lunch"), (False, "by command")]
    rig.grower.load_state_dict(state)
    assert rig.grower.loop.paused == "coffee", "a pause is part of the state"
    del state["esper"]["loop"]["paused"]
    rig.grower.load_state_dict(state)
    assert rig.grower.loop.paused is None, "older states know no pause"


def test_what_is_alive_goes_on_while_growth_is_paused() -> None:
    rig = attach(MLP.build())
    cohort = rig.germinate("fc1-fc2")
    before = cohort.state
    rig.order(Pause())
    rig.train(8)
    assert cohort.state > before


@pytest.mark.parametrize("stopped_before", [False, True])
def test_an_emergency_stop_removes_everything_at_once(stopped_before: bool) -> None:
    rig = attach(MLP.build())
    rig.germinate("fc1-fc2")
    rig.train(3)
    rig.germinate("fc2-fc3")
    if stopped_before:
        rig.order(Stop(reason="enough"))
        assert rig.grower.kasmina.cohorts
    rig.order(Stop(reason="fire", emergency=True))
    assert not rig.grower.kasmina.cohorts and rig.grower.stopped == ("enough" if stopped_before else "fire")
    reasons = [verdict.reason for verdict in rig.grower.verdicts]
    assert reasons == ["emergency stop: fire"] * 2
    size = sum(p.numel() for p in rig.model.parameters())
    assert len(rig.grower.verdicts) == 2 and rig.grower.kasmina.params == size
    rig.train(3)


def test_older_commands_are_read() -> None:
    for text, command in (
        (b'{"type":"stop","reason":"x"}', Stop(reason="x")),
        (b'{"type":"pause","cohort":3}', Pause(cohort=3)),
        (b'{"type":"resume","cohort":3}', Resume(cohort=3)),
    ):
        assert msgspec.json.decode(text, type=Command) == command
    orders = Orders()
    orders.restore([{"type": "stop", "reason": "x"}])
    taken = orders.take(1)
    assert taken is not None and taken.command == Stop(reason="x") and taken.issuer == "operator" and not taken.id


def test_a_snapshot_needs_a_loop_that_looks(tmp_path: Path) -> None:
    life = Served(tmp_path, checkpoints=False)
    life.send([an_order("s", Snapshot())])
    life.step()
    told = life.desk.answer_to("s")
    assert (told.outcome, told.gate) == ("refused", "snapshot") and "no checkpoints on demand" in told.reason
    life.end()


def test_a_snapshot_is_written_and_then_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    life = Served(tmp_path)
    life.send([an_order("s", Snapshot(reason="before the night"))])
    life.step()
    assert life.desk.answer_to("s").outcome == "applied" and life.grower.checkpoint_due is None
    assert len(list((tmp_path / "checkpoints").glob("checkpoint-*.json"))) == 1

    def refuse(*args: Any, **fields: Any) -> Any:
        raise StateError("no space")

    monkeypatch.setattr(life.grower._shelf, "save", refuse)
    life.send([an_order("t", Snapshot())])
    with pytest.raises(StateError, match="no space"):
        life.step()
    told = life.desk.answer_to("t")
    assert (told.outcome, told.gate, told.reason) == ("refused", "snapshot", "no space")
    assert life.grower.checkpoint_due is None
    life.end()


# ----------------------------------------------------------------------------------------------------------------------
# Who did what


def test_the_log_of_the_run_says_who_wanted_what(tmp_path: Path) -> None:
    life = Served(tmp_path)
    plan = SeedPlan(site="fc1-fc3")
    life.send([
        an_order("a", SetBudget(params=100_000)),
        an_order("b", Germinate(seeds=(plan,)), issuer="bob"),
        an_order("c", Cancel(cohort=7, reason="")),
        an_order("d", SetStrategy(cohort=7, strategy="fixed_ram")),
    ])  # fmt: skip
    life.step()
    said = {e.id: (e.issuer, e.kind, e.outcome, e.gate) for e in life.events if isinstance(e, Commanded)}
    assert said["a"] == ("ada", "set_budget", "applied", "command")
    assert said["b"] == ("bob", "germinate", "refused", "validation")
    refusals = {e.command: e for e in life.events if isinstance(e, Refused)}
    assert refusals["germinate by bob"].issuer == "bob"
    assert "did you mean 'fc2-fc3' or 'fc1-fc2'" in life.desk.answer_to("b").reason
    assert life.desk.answer_to("c").reason == "no active cohort has the number 7; active: none"
    assert "did you mean 'fixed_ramp'" in life.desk.answer_to("d").reason
    life.end()


# ----------------------------------------------------------------------------------------------------------------------
# Nothing hostile changes anything


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> Any:
    life = Served(tmp_path_factory.mktemp("grown"))
    life.send([an_order("first", Germinate(seeds=(SeedPlan(site="fc1-fc2", width=2),)))])
    life.train(6)
    yield life
    life.end()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=12,
)
KINDS = st.sampled_from([*(kind.__struct_config__.tag for kind in Command.__args__), "rm", ""])
FIELDS = st.sampled_from(["cohort", "seeds", "reason", "params", "flops", "strategy", "exact", "emergency", "site"])
COMMANDS = st.builds(lambda kind, rest: {**rest, "type": kind}, KINDS, st.dictionaries(FIELDS, JSON, max_size=4))
ENVELOPES = st.fixed_dictionaries(
    {},
    optional={
        "dataschema": st.sampled_from(["esper:order:2", "esper:command:1", "x", ORDER_SCHEMA]),
        "datacontenttype": st.sampled_from(["text/plain", "application/json"]),
        "esperexpires": st.sampled_from(["soon", "2001-01-01T00:00:00Z", "2001-01-01"]),
        "subject": st.sampled_from([JOB, "other"]),
        "esperrun": st.sampled_from([RUN, "other"]),
        "id": st.sampled_from(["first", "x", "", "a b"]),
    },
)


@settings(max_examples=50)
@given(command=COMMANDS, changes=ENVELOPES, data=st.none() | st.binary(max_size=60))
def test_an_unsigned_command_never_changes_anything(command: Any, changes: Any, data: Any, grown: Any) -> None:
    """Whatever it is, whoever says that it is from them."""
    grown.desk._verify = nobody
    before = grown.hash()
    plain = {"command": command, "id": changes.get("id", "x"), "issuer": "ada", "run": RUN, "job": JOB}
    body = msgspec.json.encode(plain) if data is None else data
    try:
        told = grown.desk.take(sealed(an_order("x", SetBudget(params=1)), data=body, **changes))
    except EnvelopeError as error:
        assert str(error)
    else:
        assert told is None
    assert not grown.desk.is_open("x") and grown.hash() == before


@settings(max_examples=50)
@given(command=COMMANDS, changes=ENVELOPES, data=st.none() | st.binary(max_size=60))
def test_a_malformed_command_never_changes_anything(command: Any, changes: Any, data: Any, grown: Any) -> None:
    """It is for the dead letters, or it is an order that is well formed, which then has an outcome."""
    grown.desk._verify = anybody
    before = grown.hash()
    plain = {"command": command, "id": changes.get("id", "x"), "issuer": "ada", "run": RUN, "job": JOB}
    body = msgspec.json.encode(plain) if data is None else data
    try:
        grown.desk.take(sealed(an_order("x", SetBudget(params=1)), data=body, **changes))
    except EnvelopeError as error:
        assert str(error)
    else:
        grown.desk._waiting.clear()  # it was an order after all
    assert grown.hash() == before


@settings(max_examples=60)
@given(command=COMMANDS)
def test_a_refused_command_changes_only_what_is_remembered_of_it(command: Any, grown: Any) -> None:
    """Values of any kind and size reach the training: it answers, and a refusal leaves it as it was."""
    grown.desk._verify = anybody
    try:
        known = msgspec.convert(command, Command)
    except (msgspec.ValidationError, ValueError):
        return
    if isinstance(known, Stop | Snapshot):
        return
    name = f"n{next(COUNT)}"
    try:
        grown.desk.take(sealed(an_order(name, known)))
    except EnvelopeError:
        return
    step = grown.steps
    state = grown.grower.state_dict()
    before = msgspec.json.encode(state["esper"]["loop"]["paused"]), list(grown.grower.kasmina.cohorts)
    budget = grown.grower.accounts.budget
    for order in grown.desk.turn(step):
        gate = apply(grown.grower, order.command, step, issuer=order.issuer)
        grown.desk.answer(order, step, gate, hold=False)
    told = grown.desk.answer_to(name)
    assert isinstance(told, Acknowledgement)
    if told.outcome == "refused":
        after = msgspec.json.encode(grown.grower.loop.paused), list(grown.grower.kasmina.cohorts)
        assert after == before and grown.grower.accounts.budget == budget and told.reason


COUNT = iter(range(10**9))


@pytest.mark.parametrize(
    "data",
    [
        b"[" * 100_000,
        b'{"command":' * 10_000,
        b'{"a":"' + b"x" * 130_000 + b'"}',
        b"[" + b"0," * 60_000 + b"0]",
        b'{"command":{"type":"set_budget","params":' + b"9" * 100_000 + b"}}",
        b'{"command":{"type":"set_budget","flops":1e999}}',
        b'{"command":{"type":"stop","reason":"\\ud800"}}',
        b'{"command":{"type":"germinate","seeds":[' + b'{"site":""},' * 10_000 + b'{"site":""}]}}',
    ],
)
def test_bombs_are_for_the_dead_letters(data: bytes, grown: Any) -> None:
    grown.desk._verify = anybody
    before = grown.hash()
    with pytest.raises(EnvelopeError):
        grown.desk.take(sealed(an_order("x", SetBudget(params=1)), data=data))
    assert grown.hash() == before


# ----------------------------------------------------------------------------------------------------------------------
# Trainings of `esper run`


def test_a_training_of_a_job_takes_orders_and_goes_on_with_them(tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="the digits preset needs scikit-learn")
    from esper.runs import RunOptions
    from esper.runs.arms import Cell, load_preset, train
    from esper.runs.cell_store import CellStore

    options = RunOptions(preset="digits", device="cpu", steps=40, seeds=1, lr=(1e-2,), controls=False)
    preset = load_preset(options, "cpu", "cpu")
    cell = Cell(
        arm="grown", seed=0, lr=1e-2, steps=40, widths=tuple(preset.small_widths), options=options, device="cpu",
        size="cpu",
    )  # fmt: skip

    class Killed(Exception):
        pass

    def run(folder: Path, send: dict[int, list[Order]], killed: int | None = None) -> Any:
        store = CellStore(folder, cell, 1e9)
        answers: dict[str, Any] = {}

        @contextmanager
        def serve(cell: Any, grower: Any, store: Any) -> Any:
            desk = Desk(store.commands_path, run=RUN, job=JOB, verify=anybody)
            grower.serve(desk, checkpoints=True)
            turn = desk.turn

            def counted(step: int) -> Any:
                if desk._turn + 1 == killed:
                    raise Killed
                for order in send.get(desk._turn + 1, ()):
                    desk.take(sealed(order))
                return turn(step)

            desk.turn = counted  # type: ignore[method-assign]
            try:
                yield
            finally:
                answers.update(desk._register.answers)
                desk.close()

        try:
            trained = train(cell, preset, lambda event: None, store, serve)
        except Killed:
            trained = None
        finally:
            store.close()
        return trained, answers

    send = {
        5: [an_order("p", Pause(reason="wait"))],
        9: [an_order("s", Snapshot())],
        12: [an_order("b", SetBudget(params=100_000)), an_order("r", Resume())],
        30: [an_order("x", Stop(reason="enough"))],
    }
    whole, answers = run(tmp_path / "whole", send)
    assert {name: answer.acknowledgement.outcome for name, answer in answers.items()} == dict.fromkeys(
        "psbrx", "applied"
    )
    assert whole.stopped == "enough"
    dead, _ = run(tmp_path / "killed", send, killed=25)
    assert dead is None and (tmp_path / "killed" / "checkpoint-00000001.json").exists(), "the snapshot"
    again, later = run(tmp_path / "killed", {turn: orders for turn, orders in send.items() if turn >= 25})
    assert later == answers
    kept = [dataclasses.asdict(trained)["events"] for trained in (whole, again)]
    told = [[msgspec.json.encode(e) for e in events if not hasattr(e, "milliseconds")] for events in kept]
    assert told[0] == told[1]
    assert all((whole.weights[name] == again.weights[name]).all() for name in whole.weights)
