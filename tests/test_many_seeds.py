"""More than a thousand seeds alive at once on one site: one for each chunk, many, all; ranked, grafted, judged."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tests.models import Batch
from tests.rigs import QUICK, Rig, attach
from tests.seed_tables import alive
from torch import Tensor, nn

import esper
from esper.protocol import Cull, Germinate, Germinated, Lifecycle, SeedPlan, Transitioned

pytestmark = pytest.mark.integration

S = Lifecycle
SITE = "fc1-fc2"
OUT = 1200
USEFUL = 600
"""Columns whose targets are beyond the host; the others it can learn by itself."""


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 2), nn.Linear(2, OUT)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


def _batches(num: int, seed: int) -> list[Batch]:
    teacher, source = torch.Generator().manual_seed(9), torch.Generator().manual_seed(seed)
    inner, outer = torch.randn(8, 6, generator=teacher), torch.randn(6, USEFUL, generator=teacher)
    drawn = [torch.randn(64, 8, generator=source) for _ in range(num)]
    return [(x, torch.cat([F.gelu(x @ inner) @ outer, torch.zeros(64, OUT - USEFUL)], dim=1)) for x in drawn]


def _loss(model: nn.Module, batch: Batch) -> Tensor:
    return (model(batch[0]) - batch[1]).square().mean()


class _Rig(Rig):
    def train(self, steps: int = 1) -> None:
        for _ in range(steps):
            loss = _loss(self.model, self.batches[self.turn % len(self.batches)])
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.grower.step(loss)
            self.turn += 1


def _rig(**settings: object) -> _Rig:
    rig = attach(
        Wide(), batches=_batches(10, 1), held_out=_batches(32, 7), loss=_loss, sites=esper.SitesConfig(chunks=OUT),
        **settings,
    )  # fmt: skip
    return _Rig(rig.model, rig.optimizer, rig.grower, rig.batches, rig.events)


def _plan(**fields: object) -> SeedPlan:
    return SeedPlan(**({"site": SITE, "seeds": OUT, "width": 1, "start": "random_zero"} | fields))  # type: ignore[arg-type]


@pytest.mark.e2e
def test_a_thousand_seeds_on_one_site_from_germination_to_the_annex() -> None:
    torch.manual_seed(3)
    rig = _rig(fit=esper.FitConfig(steps=60, batch_rows=256, lr=1e-2))
    rig.train(60)
    kasmina = rig.grower.kasmina
    alone = rig.grower.judge.held_out(4)
    rig.order(Germinate(seeds=(_plan(start="negative_gradient", keep=USEFUL),)))
    (cohort,) = kasmina.cohorts.values()
    assert len(cohort.slots) == OUT == len(alive(kasmina.table))
    assert sorted(kasmina.table.owner.tolist()) == sorted(cohort.slots.tolist()), "one chunk each"
    rig.until(cohort, S.TRAINING)
    before = cohort.added_params
    rig.until(cohort, S.GRAFTING)
    assert len(cohort.slots) == USEFUL == len(alive(kasmina.table))
    assert cohort.added_params == before // 2 == rig.bank(cohort).num_params
    kept = rig.bank(cohort).columns.flatten()
    assert float((kept < USEFUL).float().mean()) > 0.9, "the ranking keeps seeds whose columns have something to gain"
    culled = [e for e in rig.events if isinstance(e, Transitioned) and e.target is S.CULLED]
    assert [len(event.seeds) for event in culled] == [OUT - USEFUL] and "-dL/dalpha" in culled[0].reason
    for _ in range(200):
        rig.train()
        if not kasmina.cohorts:
            break
    (verdict,) = rig.grower.verdicts
    assert verdict.state is S.FOSSILIZED and verdict.gain_low > 0, verdict
    assert rig.grower.judge.held_out(4) < alone
    annex = kasmina.sites[SITE].annex
    assert annex is not None and annex.units == USEFUL and annex.num_slots == 1
    assert (kasmina.table.owner == -1).all() and int(kasmina.table.generation.sum()) == USEFUL
    rig.grower.finish()
    plain = rig.grower.export()
    assert plain.fc1.out_features == 2 + USEFUL  # type: ignore[union-attr]


def test_they_leave_together_and_their_chunks_rest() -> None:
    rig = _rig()
    rig.train(2)
    rig.order(Germinate(seeds=(_plan(),)))
    (cohort,) = rig.grower.kasmina.cohorts.values()
    rig.until(cohort, S.GRAFTING)
    rig.order(Cull(cohort=cohort.number, reason="test"))
    rig.train(6)
    table = rig.grower.kasmina.table
    assert not rig.grower.kasmina.cohorts and not len(table.occupied())
    assert (table.embargo_until > rig.grower.clock.steps).all()


@pytest.mark.parametrize(
    ("seeds", "chunks", "num", "each", "note"),
    [
        (1, (), 1, OUT, ""),
        (1, (7,), 1, 1, ""),
        (3, (5, 6, 7, 8, 9, 10), 3, 2, ""),
        (7, (), 7, 171, "3 of 1200 chunks stay dormant (uneven shares)"),
        (2 * OUT, (), OUT, 1, "1200 chunks make at most 1200 seeds, 2400 were asked for"),
    ],
)
def test_one_chunk_many_or_all(seeds: int, chunks: tuple[int, ...], num: int, each: int, note: str) -> None:
    rig = _rig()
    rig.order(Germinate(seeds=(_plan(seeds=seeds, chunks=chunks),), reason="asked"))
    table = rig.grower.kasmina.table
    slots = alive(table)
    assert len(slots) == num and (table.num_chunks[slots] == each).all()
    (event,) = [e for e in rig.events if isinstance(e, Germinated)]
    assert event.seeds == tuple(range(num)) and event.chunks == (each,) * num
    assert event.reason == ("asked" if not note else f"asked; {SITE}: {note}")


@pytest.mark.parametrize(("fields", "message"), [({"seeds": 0}, "at least 1, got 0"), ({"keep": 0}, "got 1200 and 0")])
def test_counts_below_one_are_refused(fields: dict[str, int], message: str) -> None:
    rig = _rig()
    rig.order(Germinate(seeds=(_plan(**fields),)))
    assert not rig.grower.kasmina.cohorts and message in rig.refused()[-1].reason


def test_a_site_whose_chunks_differ_in_size_says_what_to_do() -> None:
    rig = attach(Wide(), batches=_batches(4, 1), held_out=_batches(16, 7), loss=_loss)  # 1,024 chunks of 1 or 2
    rig.grower.submit(Germinate(seeds=(_plan(seeds=1024),)))
    _Rig(rig.model, rig.optimizer, rig.grower, rig.batches, rig.events).train()
    assert "equally many features, got 1 to 2; choose other chunks, or sites.chunks" in rig.refused()[-1].reason
    assert not len(rig.grower.kasmina.table.occupied())


@pytest.mark.parametrize("start", ["gradmax", "tiny", "copy", "reconstruction"])
def test_other_starts_make_a_thousand_seeds_and_keep_a_few(start: str) -> None:
    rig = _rig(fit=esper.FitConfig(steps=10, batch_rows=32, reconstruction_threshold=100.0))
    rig.train(4)
    rig.order(Germinate(seeds=(_plan(start=start, keep=8),)))
    (cohort,) = rig.grower.kasmina.cohorts.values()
    rig.until(cohort, S.GRAFTING)
    assert len(cohort.slots) == 8 == rig.bank(cohort).num_slots
    columns = rig.bank(cohort).columns.flatten()
    assert int((columns < USEFUL).sum()) >= 7


def test_a_rank_cap_is_enforced_and_said() -> None:
    rig = _rig()
    rig.train(2)
    rig.order(Germinate(seeds=(_plan(seeds=300, width=9, start="gradmax"),), reason="asked"))
    (cohort,) = rig.grower.kasmina.cohorts.values()
    assert rig.bank(cohort).units == 4  # four columns a seed
    (event,) = [e for e in rig.events if isinstance(e, Germinated)]
    assert event.widths == (4,) * 300
    assert event.reason == f"asked; {SITE}: gradmax gives a seed here at most 4 units (its rank), 9 were asked for"


def test_the_heuristic_germinates_and_thins_crowds() -> None:
    torch.manual_seed(0)
    model = Wide()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    config = esper.TamiyoConfig(first=5, growth=600.0, seeds_per_site=OUT, keep_share=0.25)
    events: list[object] = []
    grower = esper.Grower(
        model, optimizer, loss=_loss, evaluate=_batches(16, 7), on_event=events.append,
        config=esper.Config(
            **{**QUICK, "tamiyo": config, "fit": esper.FitConfig(start="random_zero"),
               "sites": esper.SitesConfig(chunks=OUT)}
        ),
    )  # fmt: skip
    running = _Rig(model, optimizer, grower, _batches(10, 1))
    running.train(5)
    (event,) = [e for e in events if isinstance(e, Germinated)]
    assert len(event.seeds) == OUT and event.reason.endswith("+1200 units each in up to 1200 seeds")
    (cohort,) = grower.kasmina.cohorts.values()
    assert len(running.until(cohort, S.GRAFTING).slots) == OUT // 4
