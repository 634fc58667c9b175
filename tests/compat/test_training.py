"""The isolated fit on data of one's own."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tests.models import assert_same_state, snapshot
from torch import Tensor, nn

from esper.compat import SelfSupervisedTrainer, TrainingResult
from esper.config import Config, FitConfig
from esper.errors import ConfigError, DataError

pytestmark = pytest.mark.component

QUICK = FitConfig(steps=200, batch_rows=64, lr=1e-2, reconstruction_threshold=0.1)


def low_rank_data(rows: int = 200) -> Tensor:
    """Three directions of ten: a bottleneck of three units can reproduce it."""
    source = torch.Generator().manual_seed(4)
    return torch.randn(rows, 3, generator=source) @ torch.randn(3, 10, generator=source)


def bottleneck(width: int, dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(10, width), nn.Dropout(dropout), nn.Linear(width, 10))


def test_what_can_be_reproduced_succeeds_and_what_cannot_fails(unchanged_rng: None) -> None:
    state = torch.get_rng_state()
    wide, narrow, data = bottleneck(4), bottleneck(1), low_rank_data()
    torch.set_rng_state(state)
    trainer = SelfSupervisedTrainer(QUICK)
    assert trainer.train_seed(0, wide, data) is TrainingResult.SUCCESS
    assert trainer.train_seed(1, narrow, data) is TrainingResult.FAILED
    assert trainer.reports[0].explained > 0.97 > 0.9 > trainer.reports[1].explained
    assert trainer.gates[0].passed and "unexplained share must be at most 0.1" in trainer.gates[1].reason
    held = data[150:]
    with torch.no_grad():
        unexplained = float((wide(held) - held).square().sum() / held.square().sum())
    assert trainer.reports[0].explained == pytest.approx(1 - unexplained, abs=1e-5), "measured on the last quarter"


def test_noise_is_not_reproduced_on_rows_that_were_held_back() -> None:
    data = torch.randn(24, 40)
    torch.manual_seed(1)
    blueprint = nn.Sequential(nn.Linear(40, 12), nn.ReLU(), nn.Linear(12, 40))
    trainer = SelfSupervisedTrainer(FitConfig(steps=400, batch_rows=64, lr=1e-2, reconstruction_threshold=0.7))
    assert trainer.train_seed(0, blueprint, data) is TrainingResult.FAILED
    with torch.no_grad():
        seen = float((blueprint(data[:18]) - data[:18]).square().mean() / data[:18].square().mean())
    assert seen < 0.5, "on what it was trained on it would have passed"


def test_it_is_repeatable_and_leaves_flags_and_data_alone() -> None:
    data = low_rank_data()
    before = data.clone()
    results = []
    for seed_id in (3, 3, 4):
        blueprint = bottleneck(4, dropout=0.5)
        blueprint[0].bias.requires_grad_(False)  # type: ignore[index]
        blueprint.train()
        blueprint[1].eval()  # type: ignore[index]
        frozen = blueprint[0].bias.clone()  # type: ignore[index]
        SelfSupervisedTrainer(QUICK).train_seed(seed_id, blueprint, data)
        assert blueprint.training and not blueprint[1].training  # type: ignore[index]
        assert [p.requires_grad for p in blueprint.parameters()] == [True, False, True, True]
        assert all(p.grad is None for p in blueprint.parameters())
        assert torch.equal(frozen, blueprint[0].bias)  # type: ignore[index]
        results.append(snapshot(blueprint))
    assert_same_state(results[0], results[1])
    assert not torch.equal(results[0]["2.weight"], results[2]["2.weight"]), "another seed, other minibatches"
    assert torch.equal(data, before)


def test_it_is_the_fit_of_a_seed() -> None:
    """Adam on mean squared error over drawn minibatches, written out."""
    data, wanted = low_rank_data(8), bottleneck(4)
    SelfSupervisedTrainer(FitConfig(steps=3, batch_rows=4, lr=1e-2), seed=2).train_seed(5, wanted, data)
    own = bottleneck(4)
    optimizer = torch.optim.Adam(own.parameters(), 1e-2)
    generator = torch.Generator().manual_seed((2 << 32) + 5)
    for _ in range(3):
        index = torch.randint(6, (4,), generator=generator)
        optimizer.zero_grad()
        (own(data[index]) - data[index]).square().mean().backward()
        optimizer.step()
    for one, two in zip(own.parameters(), wanted.parameters(), strict=True):
        torch.testing.assert_close(one, two)


def test_images_and_low_precision() -> None:
    torch.manual_seed(0)
    images = torch.randn(16, 3, 6, 6)
    trainer = SelfSupervisedTrainer(FitConfig(steps=150, batch_rows=288, lr=2e-2, reconstruction_threshold=0.3))
    assert trainer.train_seed(0, nn.Conv2d(3, 3, 1), images) is TrainingResult.SUCCESS
    low = bottleneck(4).to(torch.bfloat16)
    trainer.train_seed(1, low, low_rank_data().to(torch.bfloat16))
    assert math.isfinite(trainer.reports[1].explained) and low[0].weight.dtype is torch.bfloat16  # type: ignore[index]


@pytest.mark.parametrize(
    ("blueprint", "data", "error", "message"),
    [
        (nn.Linear(3, 3), torch.randn(1, 3), DataError, r"at least two rows .*got shape \(1, 3\)"),
        (nn.Linear(3, 3), torch.randn(3), DataError, r"got shape \(3,\)"),
        (nn.Linear(3, 3), torch.tensor([[1.0, 2.0, math.nan]] * 4), DataError, "must be finite"),
        (nn.Linear(3, 2), torch.randn(8, 3), ConfigError, r"got output \(2, 2\) for input \(2, 3\)"),
        (nn.ReLU(), torch.randn(8, 3), ConfigError, "must have parameters to learn, ReLU has none"),
        (nn.Linear(3, 3), torch.randn(8, 0), DataError, r"must have features, got shape \(8, 0\)"),
        (nn.Linear(3, 3), torch.randn(8, 3, dtype=torch.complex64), DataError, "must hold real numbers, got torch.c"),
        (nn.Linear(3, 3), [[1.0, 2.0, 3.0]] * 8, DataError, "must be a tensor, got list"),
        (nn.LSTM(3, 3), torch.randn(8, 3), ConfigError, "must return one tensor, LSTM returned a tuple"),
    ],
)
def test_refusals(blueprint: nn.Module, data: Tensor, error: type[Exception], message: str) -> None:
    trainer = SelfSupervisedTrainer()
    before = snapshot(blueprint)
    with pytest.raises(error, match=message):
        trainer.train_seed(0, blueprint, data)
    assert_same_state(snapshot(blueprint), before)
    assert trainer.reports == {}


@pytest.mark.parametrize("seed_id", [-1, 1.5, "a", None, True])
def test_a_seed_id_counts_seeds(seed_id: Any) -> None:
    with pytest.raises(ConfigError, match=f"seed_id must be a whole number of at least 0, got {seed_id!r}"):
        SelfSupervisedTrainer().train_seed(seed_id, nn.Linear(3, 3), torch.randn(8, 3))


def test_what_is_no_module_or_no_setting_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"a blueprint must be an nn.Module, got type"):
        SelfSupervisedTrainer().train_seed(0, nn.Linear, torch.randn(8, 3))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"config must be an esper.FitConfig, got Config"):
        SelfSupervisedTrainer(Config())  # type: ignore[arg-type]
