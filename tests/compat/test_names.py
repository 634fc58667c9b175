"""The plan's names are all there, explained, and in the page that maps them."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest

import esper
import esper.compat

pytestmark = pytest.mark.unit

PLAN = {
    "BaseGraftingStrategy", "ChunkManager", "ChunkedKasminaLayer", "ExtendedLifecycle", "GraftingConfig",
    "GraftingContext", "GraftingStrategyRegistry", "LifecycleManager", "SelfSupervisedTrainer", "StateManager",
    "TrainingResult",
}  # fmt: skip


def test_every_name_of_the_plan_is_here_and_on_its_page() -> None:
    assert set(esper.compat.__all__) == PLAN | {"connect", "unwrap"}
    page = (Path(__file__).parents[2] / "docs" / "compat.md").read_text(encoding="utf-8")
    for name in esper.compat.__all__:
        assert inspect.getdoc(getattr(esper.compat, name)), name
        assert name in page, name


def test_what_needs_no_second_form_is_the_same_object() -> None:
    assert esper.compat.ExtendedLifecycle is esper.Lifecycle
    assert esper.compat.GraftingConfig is esper.GraftConfig


def test_signatures_are_those_of_the_plan() -> None:
    layer = inspect.signature(esper.compat.ChunkedKasminaLayer).parameters
    assert list(layer) == ["base_layer", "chunks_per_layer"] and layer["chunks_per_layer"].default == 1000
    assert list(inspect.signature(esper.compat.ChunkManager).parameters)[:2] == ["layer_dim", "num_chunks"]
    assert list(inspect.signature(esper.compat.StateManager).parameters) == ["num_seeds"]
    update = inspect.signature(esper.compat.StateManager.batch_update).parameters
    assert list(update)[:3] == ["self", "seed_indices", "updates"]
    train = inspect.signature(esper.compat.SelfSupervisedTrainer.train_seed).parameters
    assert list(train) == ["self", "seed_id", "blueprint", "data"]
    request = inspect.signature(esper.compat.ChunkedKasminaLayer.request_germination).parameters
    assert list(request) == ["self", "seed_id", "blueprint_id", "grafting_strategy"]
    assert list(inspect.signature(esper.compat.LifecycleManager().validate_negative_eval).parameters) == ["metrics"]
