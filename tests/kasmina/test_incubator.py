"""The isolated fit finds a planted function, and its check knows chance when it sees it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.example_sites import EXAMPLES, make_bank

from esper.kasmina.capture import Rows
from esper.kasmina.incubator import check, clustered_t, fit
from esper.protocol import SiteKind

pytestmark = pytest.mark.component

LINEAR, CONV = EXAMPLES[SiteKind.LINEAR_SPAN][0], EXAMPLES[SiteKind.CONV_SPAN][0]
LAYER = EXAMPLES[SiteKind.LINEAR_LAYER][0]


def _rows(num: int, *, seed: int = 0, conv: bool = False) -> Rows:
    x = torch.randn((num, 3, 6, 6) if conv else (num, 5), generator=torch.Generator().manual_seed(seed))
    y = torch.zeros((num, 6, 6, 6) if conv else (num, 6))
    index = torch.arange(num)
    return Rows(x, y, y, index // 2, index % 4)


@pytest.mark.parametrize(("example", "blueprint"), [(LINEAR, "bottleneck"), (CONV, "bottleneck_conv")])
@pytest.mark.parametrize("slots", [1, 3])
def test_explains_a_planted_function_on_rows_it_never_saw(example: object, blueprint: str, slots: int) -> None:
    from tests.example_sites import Example

    assert isinstance(example, Example)
    conv = example.geometry.kind.is_conv
    teacher = make_bank(blueprint, example, units=3, seed=9)
    rows, held = _rows(96 if conv else 400, conv=conv), _rows(48 if conv else 200, seed=1, conv=conv)
    target, unseen = (
        teacher.branch(r.x, alpha=torch.ones(1), training=True, generator=None).detach() for r in (rows, held)
    )
    bank = make_bank(blueprint, example, slots=slots, units=8)
    before = check(bank, held, unseen, batch_rows=64)
    flops = fit(bank, rows, target, steps=200, batch_rows=512, lr=1e-2, generator=torch.Generator().manual_seed(0))
    after = check(bank, held, unseen, batch_rows=64)
    assert before.explained < 0.3 and after.explained > 0.7
    assert after.t_statistic > 5
    batch = 14 if conv else 400  # 512 positions of 36 an image; all rows there are
    positions = 36 if conv else 1
    assert flops == 3.0 * 200 * batch * positions * bank.flops_per_row
    assert after.flops == held.positions * bank.flops_per_row
    assert not any(value.requires_grad for value in bank.params.values())


def test_seeds_that_read_their_own_columns_learn_from_rows_of_the_output() -> None:
    """Whatever the site's input holds."""
    teacher = make_bank("chunk_mlp", LAYER, slots=3, units=3, seed=9)
    rows, held = (Rows(r.x * math.nan, r.x, r.x, r.cluster, r.batch) for r in (_wide(400), _wide(200, seed=1)))
    columns = teacher.columns
    assert columns is not None
    targets = [torch.zeros_like(r.y) for r in (rows, held)]
    for target, r in zip(targets, (rows, held), strict=True):
        target[:, columns.flatten()] = teacher.branch(
            r.y[:, columns.flatten()], alpha=torch.ones(3), training=True, generator=None
        ).detach()
    bank = make_bank("chunk_mlp", LAYER, slots=3, units=8)
    before = check(bank, held, targets[1], batch_rows=64)
    fit(bank, rows, targets[0], steps=200, batch_rows=512, lr=1e-2, generator=torch.Generator().manual_seed(0))
    after = check(bank, held, targets[1], batch_rows=64)
    assert before.explained < 0.3 and after.explained > 0.8
    assert not any(value.requires_grad for value in bank.params.values())


def _wide(num: int, *, seed: int = 0) -> Rows:
    """Rows whose input is as wide as their output."""
    x = torch.randn((num, 6), generator=torch.Generator().manual_seed(seed))
    index = torch.arange(num)
    return Rows(x, x, x, index // 2, index % 4)


def test_the_fit_leaves_the_random_streams_and_grad_mode_alone(unchanged_rng: None) -> None:
    bank, rows = make_bank("bottleneck", LINEAR), _rows(40)
    with torch.no_grad():
        fit(bank, rows, torch.randn(40, 6, generator=torch.Generator()), steps=3, batch_rows=8, lr=0.1,
            generator=torch.Generator())  # fmt: skip
        assert not torch.is_grad_enabled()


def test_checking_in_pieces_is_checking_at_once() -> None:
    bank, rows = make_bank("bottleneck", LINEAR, slots=3), _rows(50)
    target = torch.randn(50, 6)
    one, many = (check(bank, rows, target, batch_rows=size) for size in (50, 7))
    assert many.explained == pytest.approx(one.explained, rel=1e-5)
    assert many.t_statistic == pytest.approx(one.t_statistic, rel=1e-5)


def test_nothing_to_explain_is_unknown_not_perfect() -> None:
    bank, rows = make_bank("bottleneck", LINEAR), _rows(20)
    report = check(bank, rows, torch.zeros(20, 6), batch_rows=8)
    assert math.isnan(report.explained) and math.isnan(report.t_statistic)


def test_clustered_t_known_answer() -> None:
    # Sums 3, 3, 9: mean 5, standard deviation sqrt(12), standard error 2; t = 2.5.
    values, clusters = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]), torch.tensor([7, 7, 3, 9, 9])
    assert clustered_t(values, clusters) == pytest.approx(2.5)


def test_rows_of_one_cluster_count_once() -> None:
    values = torch.randn(10)
    alone = clustered_t(values, torch.arange(10))
    repeated = clustered_t(values.repeat_interleave(50), torch.arange(10).repeat_interleave(50))
    assert repeated == pytest.approx(alone, rel=1e-5)


def test_without_two_clusters_or_spread_t_is_unknown() -> None:
    assert math.isnan(clustered_t(torch.randn(5), torch.zeros(5, dtype=torch.long)))
    assert math.isnan(clustered_t(torch.ones(4), torch.arange(4)))


@given(st.lists(st.tuples(st.floats(-100, 100, width=32), st.integers(0, 4)), min_size=2, max_size=30))
def test_agrees_with_the_sums_by_hand(pairs: list[tuple[float, int]]) -> None:
    values, clusters = [v for v, _ in pairs], [c for _, c in pairs]
    sums = np.bincount(np.unique(clusters, return_inverse=True)[1], weights=values)
    spread = sums.std(ddof=1) / math.sqrt(sums.size) if sums.size > 1 else 0.0
    if spread == 0 or abs(sums.mean() / spread) > 1e6:
        return
    ours, theirs = clustered_t(torch.tensor(values), torch.tensor(clusters)), sums.mean() / spread
    assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-9)


def test_all_draws_at_once_are_the_draws_one_by_one() -> None:
    """A fit of an earlier version is repeated bit for bit."""
    at_once, one_by_one = (torch.Generator().manual_seed(5) for _ in range(2))
    together = torch.randint(1797, (9, 33), generator=at_once)
    assert torch.equal(together, torch.stack([torch.randint(1797, (33,), generator=one_by_one) for _ in range(9)]))
    assert torch.equal(at_once.get_state(), one_by_one.get_state())
