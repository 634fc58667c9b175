"""The seed table by hand: refusals leave no trace, damage is found, a million chunks are ordinary."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
from tests.seed_tables import chunks_of, columns, contents, germinate, problems, states

from esper.errors import ConfigError, SiteError, TransitionError
from esper.kasmina.chunks import chunk_bounds
from esper.kasmina.seeds import MAX_EPOCHS, SeedTable
from esper.protocol import Lifecycle as L

pytestmark = pytest.mark.unit

WAY = (L.TRAINING, L.GRAFTING, L.STABILIZATION, L.EVALUATING, L.FINE_TUNING, L.FOSSILIZED)
CODES = {"cohort": 1, "blueprint": 2, "strategy": 3, "width": 8}


def _move(table: SeedTable, slots: Any, last: L, step: int = 1) -> None:
    """Take germinated seeds along the ordinary way up to a state."""
    for state in WAY[: WAY.index(last) + 1]:
        table.transition(slots, state, step)


def _table() -> SeedTable:
    return SeedTable([10, 7], [5, 7], capacity=2)


def test_a_whole_life_ends_in_the_next_generation() -> None:
    table = _table()
    slot = germinate(table, 1, [2, 4], **CODES, step=5)
    assert chunks_of(table, slot).tolist() == [2, 4]
    assert columns(table, slot).tolist() == [2, 4]
    _move(table, [slot], L.FINE_TUNING, step=9)
    table.set_alpha([slot], 1.0)
    table.tick(n=3)
    assert states(table, 1)[2].tolist() == [L.FINE_TUNING, 2, 3, 3]
    table.transition([slot], L.FOSSILIZED, 12)
    table.release([slot], 12, embargo=100)
    assert table.generation[table.offsets[1] :].tolist() == [0, 0, 1, 0, 1, 0, 0]
    assert table.free_chunks(1, 12).tolist() == list(range(7))  # a fossil's chunks do not rest
    assert germinate(table, 1, [2], **CODES, step=12) == slot  # the slot is used again ...
    assert table.seed_id[slot] == 1  # ... the id is not


def test_columns_of_a_chunk_of_several_features() -> None:
    table = _table()
    assert columns(table, germinate(table, 0, [0, 3], **CODES, step=0)).tolist() == [0, 1, 6, 7]


def test_a_culled_seed_must_fade_before_its_release_and_its_chunks_rest() -> None:
    table = _table()
    slot = germinate(table, 0, [1], **CODES, step=0)
    _move(table, [slot], L.GRAFTING)
    table.set_alpha([slot], 0.5)
    table.set_paused([slot], True)
    table.transition([slot], L.CULLED, 3)
    assert not table.paused[slot]
    with pytest.raises(TransitionError, match=r"alpha must be 0 .* \(alpha 0.5\); ramp it down first"):
        table.release([slot], 3, embargo=10)
    table.set_alpha([slot], 0.0)
    table.release([slot], 4, embargo=10)
    assert table.free_chunks(0, 13).tolist() == [0, 2, 3, 4]
    assert table.free_chunks(0, 14).tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(SiteError, match="must not rest under an embargo, got chunk 1 of site 0"):
        germinate(table, 0, [1], **CODES, step=13)


def test_a_rollback_takes_effect_at_once() -> None:
    table = _table()
    slot = germinate(table, 0, [1], **CODES, step=0)
    _move(table, [slot], L.EVALUATING)
    table.set_alpha([slot], 1.0)
    table.transition([slot], L.ROLLED_BACK, 3)
    assert table.alpha[slot] == 0
    table.release([slot], 3, embargo=0)
    assert table.occupied().size == 0


@pytest.mark.parametrize("illegal", [0, 1, 2])
def test_one_illegal_seed_refuses_all(illegal: int) -> None:
    table = _table()
    slots = table.germinate_many([0, 0, 1], [0, 1, 0], [1, 1, 1], **CODES, step=0)
    table.transition(slots[[illegal]], L.TRAINING, 1)
    before = contents(table)
    with pytest.raises(TransitionError, match="TRAINING -> TRAINING"):
        table.transition(slots, L.TRAINING, 2)
    assert contents(table) == before


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda t: germinate(t, 0, [0], **CODES, step=0), SiteError, "no live seed, got chunk 0 of site 0"),
        (lambda t: germinate(t, 0, [1, 1], **CODES, step=0), SiteError, "can be named once, got chunk 1"),
        (lambda t: germinate(t, 0, [5], **CODES, step=0), SiteError, r"must exist at its site, got chunk 5"),
        (lambda t: germinate(t, 2, [0], **CODES, step=0), SiteError, "a site must be between 0 and 1, got 2"),
        (lambda t: germinate(t, 0, [], **CODES, step=0), SiteError, "at least one chunk"),
        (
            lambda t: germinate(t, 0, [1], **{**CODES, "strategy": 128}, step=0),
            ConfigError,
            "between 0 and 127, got 128",
        ),
        (lambda t: germinate(t, 0, [1], **{**CODES, "width": -1}, step=0), ConfigError, "width must be between 0"),
        (lambda t: germinate(t, 0, [1], **{**CODES, "cohort": [1, 2]}, step=0), ConfigError, "one value or 1, got 2"),
        (lambda t: germinate(t, 0, [1], **CODES, step=-1), ConfigError, "step must be between 0"),
        (lambda t: germinate(t, 0, [1.5], **CODES, step=0), ConfigError, "chunks must be integers"),
        (lambda t: t.transition([1], L.TRAINING, 0), TransitionError, "a slot must hold a seed, got 1"),
        (lambda t: t.transition([-1], L.TRAINING, 0), TransitionError, "a slot must hold a seed, got -1"),
        (lambda t: t.transition([99], L.TRAINING, 0), TransitionError, "a slot must hold a seed, got 99"),
        (lambda t: t.transition([True], L.TRAINING, 0), ConfigError, "slots must be integers, got bool"),
        (lambda t: t.release([0], 0, 0), TransitionError, "only a seed at an end state .* slot 0 in GERMINATED"),
        (lambda t: t.set_alpha([0], 0.5), TransitionError, "slot 0 in GERMINATED"),
        (lambda t: t.set_alpha([0], float("nan")), ConfigError, "alpha must be finite, got nan"),
        (lambda t: t.tick(n=-1), ConfigError, "n must be between 0"),
        (lambda t: t.free_chunks(-1, 0), SiteError, "a site must be between 0 and 1, got -1"),
    ],
)
def test_a_refusal_names_rule_and_value_and_changes_nothing(change: Any, error: type[Exception], words: str) -> None:
    table = _table()
    germinate(table, 0, [0], **CODES, step=0)
    before = contents(table)
    with pytest.raises(error, match=words):
        change(table)
    assert contents(table) == before


def test_a_seed_at_its_end_cannot_be_paused() -> None:
    table = _table()
    slot = germinate(table, 0, [0], **CODES, step=0)
    table.transition([slot], L.CANCELLED, 1)
    with pytest.raises(TransitionError, match="only an active seed can be paused, got slot 0 in CANCELLED"):
        table.set_paused([slot], True)


def test_no_slots_is_no_change() -> None:
    table = _table()
    before = contents(table)
    table.transition([], L.TRAINING, 0)
    table.release([], 0, 5)
    table.tick([])
    assert contents(table) == before


def test_steps_in_the_state_saturate() -> None:
    table = _table()
    slot = germinate(table, 0, [0], **CODES, step=0)
    for _ in range(3):
        table.tick(n=20_000)
    assert table.epochs_in_state[slot] == MAX_EPOCHS
    table.tick(n=10**12)
    assert table.epochs_in_state[slot] == MAX_EPOCHS


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (([8], [9]), SiteError, "pass chunks=8 for one chunk a feature"),
        (([8], [4, 4]), SiteError, "one chunk count a site"),
        (([], []), SiteError, "at least one site"),
        (([8], [4], 0), ConfigError, "capacity must be at least 1"),
    ],
)
def test_a_table_that_cannot_be(arguments: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        SeedTable(*arguments)


# --------------------------------------------------------------------------------------------------------------------
# The reader that other tests rely on finds contradictions


def _poke(name: str, index: int, value: Any) -> Any:
    def change(table: SeedTable) -> None:
        getattr(table, name)[index] = value

    return change


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_poke("owner", 0, 77), "owner is not a slot"),
        (_poke("lifecycle", 0, 11), "not a code of the table"),
        (_poke("site", 0, 9), "sits at no site"),
        (_poke("site", 0, 1), "seed of another site"),
        (_poke("owner", 1, 1), "belongs to a free slot"),
        (_poke("owner", 0, -1), "not as many as it took"),
        (_poke("num_chunks", 0, 0), "a seed has no chunk"),
        (_poke("lifecycle", 0, 0), "a seed is dormant"),
        (_poke("width", 1, 3), "a free slot is not clean"),
        (lambda table: setattr(table, "next_seed_id", 0), "unique and below"),
        (_poke("alpha", 0, float("nan")), "alpha is not finite"),
        (_poke("alpha", 0, 0.5), "alpha is not 0 outside"),
        (_poke("epochs_in_state", 0, -3), "negative"),
        (_poke("entered", 0, 3), "before it was born"),
    ],
)
def test_arrays_that_contradict_each_other_are_found(damage: Any, words: str) -> None:
    table = _table()
    germinate(table, 0, [0], **CODES, step=7)
    assert not problems(table)
    damage(table)
    assert any(words in problem for problem in problems(table))


def test_a_paused_end_is_found() -> None:
    table = _table()
    slot = germinate(table, 0, [0], **CODES, step=0)
    table.transition([slot], L.CANCELLED, 1)
    table.paused[slot] = True
    assert problems(table) == ["a seed at an end is paused"]


# --------------------------------------------------------------------------------------------------------------------
# Size


def test_thousands_of_seeds_and_a_million_chunks_are_ordinary() -> None:
    """A loop over seeds or chunks in Python would take many times these bounds."""
    sites, chunks = 128, 8192
    table = SeedTable([chunks] * sites, [chunks] * sites)
    started = time.process_time()
    slots = table.germinate_many(np.full(chunks, 5), np.arange(chunks), np.ones(chunks, dtype=int), **CODES, step=0)
    for state in WAY:
        table.transition(slots, state, 1)
    table.release(slots, 2, 10)
    assert table.generation.sum() == chunks
    assert time.process_time() - started < 0.5

    everywhere = np.repeat(np.arange(sites), chunks), np.tile(np.arange(chunks), sites)
    table.germinate_many(*everywhere, np.ones(sites * chunks, dtype=int), **CODES, step=0)
    started = time.process_time()
    table.tick()
    elapsed = time.process_time() - started
    assert (table.epochs_in_state == 1).sum() == sites * chunks == 1_048_576
    assert elapsed < 0.1
    started = time.process_time()
    assert all((states(table, site)[:, 2] == 1).all() for site in range(sites))
    assert time.process_time() - started < 1.0
    assert not problems(table)


def test_bounds_are_those_of_the_chunks_module() -> None:
    table = _table()
    assert np.array_equal(table.bounds[0], chunk_bounds(10, 5))
    assert table.num_sites == 2 and table.capacity == 2
