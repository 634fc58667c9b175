"""A training that dies anywhere is, after its log, the training that nobody has killed; what was told stays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.oona.served import JOB, RUN, Served, an_order, turns

from esper import commands
from esper.errors import StateError
from esper.oona.desk import Desk
from esper.oona.incoming import anybody
from esper.protocol import (
    Acknowledgement,
    Commanded,
    Germinate,
    Order,
    Pause,
    Restored,
    Resume,
    RollBack,
    SeedPlan,
    SetBudget,
    Stop,
)

pytestmark = pytest.mark.integration


def script() -> dict[int, list[Order]]:
    """A life of one cohort with an exact rollback that undoes two orders, and others before and after it."""
    plan = SeedPlan(site="fc1-fc2", width=3, start="negative_gradient")
    unknown = SeedPlan(site="fc1")
    return {
        4: [an_order("a", Germinate(seeds=(plan,), reason="by hand")), an_order("b", SetBudget(params=100_000))],
        9: [an_order("c", Pause(reason="lunch"))],
        15: [an_order("d", SetBudget(params=200_000)), an_order("e", Resume(cohort=99))],
        16: [an_order("f", Resume())],
        20: [
            an_order("g", SetBudget(flops=3.0)),
            an_order("h", RollBack(cohort=1, reason="no good", exact=True)),
            an_order("i", SetBudget(params=300_000)),
        ],
        45: [an_order("j", Germinate(seeds=(plan,), reason="again")), an_order("k", Germinate(seeds=(unknown,)))],
        52: [an_order("l", Stop(reason="enough"))],
    }  # fmt: skip


IDS = "abcdefghijkl"
UNTIL = 56


def answers(life: Served) -> dict[str, Acknowledgement]:
    return {order_id: told for order_id in IDS if (told := life.desk.answer_to(order_id)) is not None}


@pytest.fixture(scope="module")
def untouched(tmp_path_factory: pytest.TempPathFactory) -> Any:
    life = Served(tmp_path_factory.mktemp("untouched"))
    turns(life, script(), UNTIL)
    outcomes = {key: (told.outcome, told.gate) for key, told in answers(life).items()}
    assert outcomes["a"] == ("applied", "germination") and outcomes["h"] == ("applied", "command")
    assert outcomes["e"] == ("refused", "validation") and outcomes["k"][0] == "refused" and len(outcomes) == len(IDS)
    assert any(isinstance(event, Restored) for event in life.events)
    again = [event.id for event in life.events if isinstance(event, Commanded) and event.again]
    assert again == ["c", "d", "e", "f", "g"], "what was undone is given again"
    return life.hash(), life.told(), answers(life)


def after(killed: int) -> dict[int, list[Order]]:
    return {turn: orders for turn, orders in script().items() if turn > killed}


def go_on(folder: Path, killed: int) -> Served:
    """The next life; orders that were written down are not sent again."""
    life = Served(folder).resume()
    turns(life, after(killed), UNTIL)
    return life


@pytest.mark.parametrize(("saved", "killed"), [(None, 20), (7, 22), (8, 19), (8, 20), (5, 53)])
def test_what_the_log_holds_makes_the_same_run(saved: int | None, killed: int, tmp_path: Path, untouched: Any) -> None:
    life = Served(tmp_path)
    turns(life, script(), killed, lambda turn: life.save() if turn == saved else None)
    told = answers(life)
    life.end()
    life = Served(tmp_path).resume()
    assert told == answers(life), "what was told is known before anything is applied"
    turns(life, after(killed), UNTIL)
    assert (life.hash(), answers(life)) == (untouched[0], untouched[2])
    assert life.told()[-40:] == untouched[1][-40:]
    life.end()


class Death(BaseException):
    """Nothing catches it."""


def die(*args: Any, **fields: Any) -> None:
    raise Death


@pytest.mark.parametrize("before", ["it is applied", "the answer is on the disk"])
@pytest.mark.parametrize(("killed", "saved"), [(4, None), (20, 8)])
def test_a_death_between_log_and_acknowledgement(
    before: str, killed: int, saved: int | None, tmp_path: Path, untouched: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    life = Served(tmp_path)
    turns(life, script(), killed - 1, lambda turn: life.save() if turn == saved else None)
    life.send(script()[killed])
    if before == "it is applied":
        monkeypatch.setattr("esper.commands.apply", die)
    else:
        life.desk._register.enter = die
    with pytest.raises(Death):
        life.step()
    monkeypatch.undo()
    assert all(life.desk.is_open(order.id) for order in script()[killed]), "nobody was told"
    assert all(life.desk.answer_to(order.id) is None for order in script()[killed])
    life.end()
    life = go_on(tmp_path, killed)
    assert (life.hash(), answers(life)) == (untouched[0], untouched[2])
    life.end()


def test_going_back_before_the_newest_checkpoint_is_told_only_after_the_next_one(tmp_path: Path) -> None:
    """Snapshots outlive the process only within a bound, so what was built on one must be on the disk first."""
    life = Served(tmp_path, checkpoints=False)
    turns(life, script(), 20, lambda turn: life.save() if turn == 12 else None)
    assert life.desk.answer_to("h") is None and life.desk.is_open("h")
    life.send([an_order("late", SetBudget(params=400_000))])
    life.train(2)  # the first one has what was written down before the training was taken back
    assert life.desk.is_open("late") and life.desk.answer_to("g"), "all that follows waits as well"
    life.end()
    life = Served(tmp_path, checkpoints=False).resume()
    turns(life, {}, 23)
    assert life.desk.answer_to("h") is None, "taken back again, by the snapshot that the checkpoint holds"
    life.save()
    assert life.desk.answer_to("h").outcome == "applied"
    assert life.desk.answer_to("late").outcome == "applied"
    life.end()


def test_a_checkpoint_makes_it_certain(tmp_path: Path) -> None:
    life = Served(tmp_path, checkpoints=False)
    turns(life, script(), 20, lambda turn: life.save() if turn == 12 else None)
    state = life.grower.state_dict()
    life.save()
    assert life.desk.answer_to("h").outcome == "applied" and not life.desk.is_open("h")
    life.end()
    life = Served(tmp_path).resume()
    assert life.desk.answer_to("h").outcome == "applied"
    life.end()
    assert state["esper"]["desk"]["turn"] == 20


def test_a_death_between_the_checkpoint_and_what_it_makes_certain(tmp_path: Path) -> None:
    life = Served(tmp_path, checkpoints=False)
    turns(life, script(), 20, lambda turn: life.save() if turn == 12 else None)
    life.desk.kept = die
    with pytest.raises(Death):
        life.save()
    life.end()
    life = Served(tmp_path).resume()
    assert life.desk.answer_to("h").outcome == "applied"
    turns(life, {}, 22)
    life.end()


def test_a_loop_that_looks_writes_the_checkpoint_at_once(tmp_path: Path) -> None:
    life = Served(tmp_path)
    turns(life, script(), 20, lambda turn: life.save() if turn == 12 else None)
    assert life.desk.answer_to("h").outcome == "applied" and life.grower.checkpoint_due is None
    assert len(list((tmp_path / "checkpoints").glob("checkpoint-*.json"))) == 2
    life.end()


def test_an_emergency_stop_does_not_wait_for_the_replay(tmp_path: Path) -> None:
    life = Served(tmp_path)
    turns(life, script(), 30)
    life.end()
    life = Served(tmp_path)
    turns(life, {}, 10)
    life.send([an_order("fire", Stop(reason="fire", emergency=True))])
    life.step()
    assert life.desk.answer_to("fire").outcome == "applied" and life.desk.answer_to("fire").step == 11
    assert life.grower.is_replaying and life.grower.stopped == "fire"
    assert not [c for c in life.grower.kasmina.cohorts.values() if c.state.name not in ("CULLED", "EMBARGOED", "RESET")]
    with pytest.warns(RuntimeWarning, match="the training took another course"):
        turns(life, {}, 25)
    state = life.hash()
    life.end()
    life = Served(tmp_path)
    with pytest.warns(RuntimeWarning, match="the training took another course"):
        turns(life, {}, 25)
    assert life.hash() == state, "it has its place in the log as all others have"
    life.end()


def test_an_order_whose_application_kills_is_given_up_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    apply = commands.apply

    def deadly(run: Any, command: Any, step: int, *, issuer: str) -> Any:
        return die() if command == SetBudget(params=100_000) else apply(run, command, step, issuer=issuer)

    monkeypatch.setattr("esper.commands.apply", deadly)
    orders = {turn: sent for turn, sent in script().items() if turn in (4, 9)}
    life = Served(tmp_path)
    for _ in range(3):
        with pytest.raises(Death):
            turns(life, orders, 10)
        life.end()
        life, orders = Served(tmp_path), {9: script()[9]}
    with pytest.warns(RuntimeWarning, match="order b .* is refused: .* given up"):
        turns(life, orders, 10)
    assert [life.desk.answer_to(name).gate for name in "abc"] == ["germination", "poison", "command"]
    life.save()
    life.end()
    life = Served(tmp_path).resume()
    life.train(2)
    assert life.desk.answer_to("b").gate == "poison"
    life.end()


# ----------------------------------------------------------------------------------------------------------------------
# Logs that do not belong


def test_a_log_that_is_shorter_than_the_checkpoint_is_refused(tmp_path: Path) -> None:
    life = Served(tmp_path)
    turns(life, script(), 6)
    life.save()
    life.end()
    log = tmp_path / "commands.jsonl"
    log.write_bytes(b"".join(log.read_bytes().splitlines(keepends=True)[:-1]))
    life = Served(tmp_path)
    before = life.hash()
    with pytest.raises(StateError, match="must go on from the checkpoint's position 4, got 2 commands"):
        life.resume()
    assert life.hash() == before, "nothing was changed"
    life.end()


@pytest.mark.parametrize(("run", "job"), [("another", JOB), (RUN, "random_growth-seed0")])
def test_a_log_of_another_training_is_refused(run: str, job: str, tmp_path: Path) -> None:
    life = Served(tmp_path)
    turns(life, script(), 4)
    life.end()
    with pytest.raises(StateError, match="belongs to one training, got one of 'run-1', 'grown-seed0'"):
        Desk(tmp_path / "commands.jsonl", run=run, job=job, verify=anybody)
    Desk(tmp_path / "commands.jsonl", run=RUN, job=JOB, verify=anybody).close()


def test_a_run_that_took_orders_is_not_loaded_without_their_log(tmp_path: Path) -> None:
    life = Served(tmp_path)
    turns(life, script(), 4)
    life.save()
    life.end()
    with pytest.raises(StateError, match="goes on with their log, got none; call serve"):
        Served(tmp_path, desk=False).resume()


def test_a_run_that_took_none_may_take_some_later(tmp_path: Path) -> None:
    life = Served(tmp_path, desk=False)
    life.train(3)
    life.save()
    life.grower.detach()
    life = Served(tmp_path).resume()
    life.send(script()[4])
    life.step()
    assert answers(life)["a"].step == 4 and life.desk.state()["turn"] == 4, "turns go on from the run's steps"
    state = life.hash()
    life.end()
    life = Served(tmp_path).resume()
    turns(life, {}, 4)
    assert life.hash() == state, "its log alone brings it back, from a checkpoint that knew no desk"
    life.end()


def test_a_training_that_takes_another_course_says_so(tmp_path: Path) -> None:
    life = Served(tmp_path)
    turns(life, script(), 4)
    life.end()
    life = Served(tmp_path)
    life.grower.submit(Stop(reason="this was not there before"))
    with pytest.warns(RuntimeWarning, match="order a was applied in step 4 and is refused in step 4 now"):
        turns(life, {}, 5)
    assert life.desk.answer_to("a").outcome == "applied", "the first answer stands"
    life.end()
    life = Served(tmp_path)
    with pytest.warns(RuntimeWarning, match="2 logged commands were not reached"):
        life.desk.end("over")
    life.end()
