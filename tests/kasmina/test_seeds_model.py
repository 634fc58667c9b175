"""The seed table against a slow model of plain dictionaries: nothing illegal is accepted, a refusal leaves no trace."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from tests.seed_tables import alive, contents, problems, slots_of, states

from esper.errors import EsperError
from esper.kasmina.seeds import SeedTable
from esper.protocol import Lifecycle as L

pytestmark = pytest.mark.unit

LEADS_TO = {
    L.GERMINATED: {L.TRAINING, L.CANCELLED, L.ROLLED_BACK},
    L.TRAINING: {L.GRAFTING, L.CULLED, L.CANCELLED, L.ROLLED_BACK},
    L.GRAFTING: {L.STABILIZATION, L.CULLED, L.CANCELLED, L.ROLLED_BACK},
    L.STABILIZATION: {L.EVALUATING, L.CULLED, L.CANCELLED, L.ROLLED_BACK},
    L.EVALUATING: {L.GRAFTING, L.FINE_TUNING, L.CULLED, L.CANCELLED, L.ROLLED_BACK},
    L.FINE_TUNING: {L.FOSSILIZED, L.CULLED, L.CANCELLED, L.ROLLED_BACK},
}
ENDS = (L.FOSSILIZED, L.CULLED, L.CANCELLED, L.ROLLED_BACK)
WAY = (L.TRAINING, L.GRAFTING, L.STABILIZATION, L.EVALUATING, L.FINE_TUNING, L.FOSSILIZED)
BRANCH_IN_SLOT = (L.GRAFTING, L.STABILIZATION, L.EVALUATING, L.FINE_TUNING, L.CULLED, L.CANCELLED)
FREE = {
    "lifecycle": 0, "site": -1, "cohort": -1, "seed_id": -1, "blueprint": -1, "epochs_in_state": 0, "strategy": -1,
    "alpha": 0.0, "born": -1, "entered": -1, "paused": False, "width": 0, "num_chunks": 0,
}  # fmt: skip


class SeedTableMachine(RuleBasedStateMachine):
    """Every rule may be illegal; the model says whether it is, and a refused call must not change a byte."""

    features, chunks = (10, 7, 6), (5, 7, 1)

    @initialize(ages=st.lists(st.integers(0, 6), min_size=3, max_size=6))
    def start(self, ages: list[int]) -> None:
        """Begin with seeds of several ages, for random rules alone seldom keep many alive."""
        self.table = SeedTable(self.features, self.chunks, capacity=1)
        self.seeds: dict[int, dict[str, Any]] = {}
        self.owner: dict[tuple[int, int], int] = {}
        self.embargo: dict[tuple[int, int], int] = {}
        self.generation: dict[tuple[int, int], int] = {}
        self.step = 0
        self.ids = 0
        self.germinate([(1, [chunk]) for chunk in range(len(ages))], 0, 7)
        for slot, age in enumerate(ages):
            for state in WAY[:age]:
                self.transition([slot], state)

    def attempt(self, legal: bool, call: Any) -> Any:
        before = contents(self.table)
        if legal:
            return call()
        with pytest.raises(EsperError) as caught:
            call()
        assert ", got " in str(caught.value) or " leads to " in str(caught.value)
        assert contents(self.table) == before
        return None

    def live(self, slots: list[int]) -> bool:
        return all(slot in self.seeds for slot in slots)

    def some(self, picks: list[int]) -> list[int]:
        """Slots that mostly hold a seed; a pick of 0 may not."""
        held = sorted(self.seeds)
        return [held[p % len(held)] if p and held else p % 3 for p in picks]

    wanted = st.lists(st.tuples(st.integers(-1, 3), st.lists(st.integers(-1, 7), max_size=3)), min_size=1, max_size=3)
    picks = st.lists(st.integers(0, 30), min_size=1, max_size=3)

    def germinate(self, wanted: list[tuple[int, list[int]]], cohort: int, blueprint: int) -> None:
        pairs = [(site, chunk) for site, chunks in wanted for chunk in chunks]
        legal = blueprint <= 32_767 and all(chunks for _, chunks in wanted) and len(set(pairs)) == len(pairs)
        legal = legal and all(
            0 <= s < 3
            and 0 <= c < self.chunks[s]
            and (s, c) not in self.owner
            and self.embargo.get((s, c), 0) <= self.step
            for s, c in pairs
        )
        slots = self.attempt(
            legal,
            lambda: self.table.germinate_many(
                [site for site, _ in wanted],
                np.array([c for _, chunks in wanted for c in chunks], dtype=np.int64),
                [len(chunks) for _, chunks in wanted],
                cohort=cohort, blueprint=blueprint, strategy=2, width=[4] * len(wanted), step=self.step,
            ),
        )  # fmt: skip
        if not legal:
            return
        for slot, (site, chunks) in zip(slots.tolist(), wanted, strict=True):
            assert slot not in self.seeds
            self.seeds[slot] = {
                "lifecycle": L.GERMINATED, "site": site, "cohort": cohort, "seed_id": self.ids, "blueprint": blueprint,
                "epochs_in_state": 0, "strategy": 2, "alpha": 0.0, "born": self.step, "entered": self.step,
                "paused": False, "width": 4, "num_chunks": len(chunks),
            }  # fmt: skip
            self.ids += 1
            self.owner.update({(site, chunk): slot for chunk in chunks})

    @rule(wanted=wanted, cohort=st.integers(0, 3), blueprint=st.sampled_from([0, 7, 40_000]))
    def germinate_anything(self, wanted: list[tuple[int, list[int]]], cohort: int, blueprint: int) -> None:
        self.germinate(wanted, cohort, blueprint)

    @rule(site=st.integers(0, 2), counts=st.lists(st.integers(1, 3), min_size=1, max_size=3), twice=st.booleans())
    def germinate_free_chunks(self, site: int, counts: list[int], twice: bool) -> None:
        free = self.table.free_chunks(site, self.step).tolist()
        wanted = [(site, [free.pop() for _ in range(count) if free]) for count in counts]
        wanted = [(site, chunks) for site, chunks in wanted if chunks]
        self.germinate(wanted * 2 if twice and len(counts) == 3 else wanted, sum(counts) % 4, 7)

    @rule(picks=picks, state=st.sampled_from(L))
    def transition_anything(self, picks: list[int], state: L) -> None:
        self.transition(self.some(picks), state)

    @rule(picks=picks, which=st.integers(0, 3))
    def transition_as_suits_the_first(self, picks: list[int], which: int) -> None:
        slots = self.some(picks)
        successors = sorted(LEADS_TO.get(self.seeds.get(slots[0], FREE)["lifecycle"], {L.GERMINATED}))
        self.transition(slots, successors[which % len(successors)])

    @rule(pick=st.integers(1, 30), states=st.integers(1, 6), alpha=st.sampled_from([None, 0.5]))
    def grow(self, pick: int, states: int, alpha: float | None) -> None:
        """Far along the ordinary way, which single random steps seldom reach."""
        (slot,) = self.some([pick])
        for _ in range(states):
            now = self.seeds.get(slot, FREE)["lifecycle"]
            onward = [state for state in WAY if state in LEADS_TO.get(now, ()) and state > now]
            if onward:
                self.transition([slot], onward[0])
        if alpha is not None:
            self.set_alpha([slot], alpha)

    @rule(pick=st.integers(1, 30), which=st.integers(0, 2), paused=st.booleans(), embargo=st.integers(0, 20))
    def withdraw(self, pick: int, which: int, paused: bool, embargo: int) -> None:
        (slot,) = self.some([pick])
        if paused:
            self.set_paused([slot], True)
        self.transition([slot], ENDS[1 + which])
        self.release_slots([slot], embargo)

    def transition(self, slots: list[int], target: L) -> None:
        legal = self.live(slots) and all(target in LEADS_TO.get(self.seeds[s]["lifecycle"], set()) for s in slots)
        self.attempt(legal, lambda: self.table.transition(slots, target, self.step))
        for slot in slots if legal else []:
            seed = self.seeds[slot]
            seed.update(lifecycle=target, epochs_in_state=0, entered=self.step)
            if target in ENDS:
                seed["paused"] = False
            if target == L.ROLLED_BACK:
                seed["alpha"] = 0.0

    @rule(picks=picks, embargo=st.integers(-1, 20))
    def release(self, picks: list[int], embargo: int) -> None:
        ended = [s for s, seed in self.seeds.items() if seed["lifecycle"] in ENDS]
        self.release_slots(ended[:2] if ended and picks[0] % 2 else self.some(picks), embargo)

    @rule(embargo=st.integers(0, 20))
    def retire(self, embargo: int) -> None:
        ended = [s for s, seed in self.seeds.items() if seed["lifecycle"] in ENDS]
        if ended:
            self.set_alpha([s for s in ended if self.seeds[s]["lifecycle"] != L.FOSSILIZED], 0.0)
            self.release_slots(ended, embargo)

    def release_slots(self, slots: list[int], embargo: int) -> None:
        legal = embargo >= 0 and self.live(slots)
        for slot in slots if legal else []:
            state, alpha = self.seeds[slot]["lifecycle"], self.seeds[slot]["alpha"]
            legal = legal and state in ENDS and (state == L.FOSSILIZED or alpha == 0)
        self.attempt(legal, lambda: self.table.release(slots, self.step, embargo))
        for slot in set(slots) if legal else ():
            seed = self.seeds.pop(slot)
            for place in [place for place, owner in self.owner.items() if owner == slot]:
                del self.owner[place]
                if seed["lifecycle"] == L.FOSSILIZED:
                    self.generation[place] = self.generation.get(place, 0) + 1
                else:
                    self.embargo[place] = self.step + embargo

    @rule(n=st.sampled_from([1, 3, 20_000, 70_000]), picks=st.none() | picks)
    def tick(self, n: int, picks: list[int] | None) -> None:
        slots = None if picks is None else self.some(picks)
        legal = slots is None or self.live(slots)
        self.attempt(legal, lambda: self.table.tick(slots, n))
        for slot in set(self.seeds if slots is None else slots) if legal else ():
            seed = self.seeds[slot]
            if not seed["paused"]:
                seed["epochs_in_state"] = min(seed["epochs_in_state"] + n, 32_767)

    @rule(picks=picks, paused=st.booleans())
    def pause(self, picks: list[int], paused: bool) -> None:
        self.set_paused(self.some(picks), paused)

    def set_paused(self, slots: list[int], paused: bool) -> None:
        legal = self.live(slots) and not any(self.seeds[s]["lifecycle"] in ENDS for s in slots)
        self.attempt(legal, lambda: self.table.set_paused(slots, paused))
        for slot in slots if legal else []:
            self.seeds[slot]["paused"] = paused

    @rule(picks=picks, alpha=st.sampled_from([0.0, 0.0, 0.5, 1.0, float("nan"), float("inf"), 1e300]))
    def alpha(self, picks: list[int], alpha: float) -> None:
        self.set_alpha(self.some(picks), alpha)

    def set_alpha(self, slots: list[int], alpha: float) -> None:
        legal = alpha <= 1 and self.live(slots)
        legal = legal and (alpha == 0 or all(self.seeds[s]["lifecycle"] in BRANCH_IN_SLOT for s in slots))
        self.attempt(legal, lambda: self.table.set_alpha(slots, alpha))
        for slot in slots if legal else []:
            self.seeds[slot]["alpha"] = alpha

    @rule(steps=st.integers(1, 15))
    def advance(self, steps: int) -> None:
        self.step += steps

    @invariant()
    def equals_the_model(self) -> None:
        table = self.table
        assert not problems(table)
        for slot in range(table.capacity):
            expected = self.seeds.get(slot, FREE)
            assert {name: getattr(table, name)[slot].item() for name in FREE} == expected
        active = sorted(s for s, seed in self.seeds.items() if seed["lifecycle"] not in ENDS)
        assert alive(table).tolist() == active
        assert table.occupied().tolist() == sorted(self.seeds)
        for cohort in range(4):
            members = sorted(s for s, seed in self.seeds.items() if seed["cohort"] == cohort)
            assert sorted(slots_of(table, cohort).tolist()) == members
        for site, count in enumerate(self.chunks):
            rows = []
            for place in ((site, chunk) for chunk in range(count)):
                row = table.offsets[site] + place[1]
                assert table.owner[row] == self.owner.get(place, -1)
                assert table.embargo_until[row] == self.embargo.get(place, 0)
                assert table.generation[row] == self.generation.get(place, 0)
                seed = self.seeds.get(self.owner.get(place, -1), FREE)
                rows.append([seed[n] for n in ("lifecycle", "blueprint", "epochs_in_state", "strategy")])
            assert states(table, site).tolist() == rows
            free = [
                c for c in range(count)
                if (site, c) not in self.owner and self.embargo.get((site, c), 0) <= self.step
            ]  # fmt: skip
            assert table.free_chunks(site, self.step).tolist() == free
            assert table.num_free_chunks(self.step)[site] == len(free)


TestSeedTableMachine = SeedTableMachine.TestCase
TestSeedTableMachine.settings = settings(max_examples=200, stateful_step_count=50, deadline=None)


class LongSeedTableMachine(SeedTableMachine):
    """The same, for a night."""


TestSeedTableForLong = pytest.mark.timeout(36_000)(pytest.mark.long(LongSeedTableMachine.TestCase))
TestSeedTableForLong.settings = settings(max_examples=10_000, stateful_step_count=100, deadline=None)
