"""The migration plan's public names, each a thin form of a part of Esper. Nothing in Esper depends on them.

``docs/compat.md`` says which part each name is.
"""

from esper.compat.chunks import ChunkManager
from esper.compat.grafting import BaseGraftingStrategy, GraftingConfig, GraftingContext, GraftingStrategyRegistry
from esper.compat.layer import ChunkedKasminaLayer, connect, unwrap
from esper.compat.lifecycle import ExtendedLifecycle, LifecycleManager
from esper.compat.states import StateManager
from esper.compat.training import SelfSupervisedTrainer, TrainingResult

__all__ = [
    "BaseGraftingStrategy",
    "ChunkManager",
    "ChunkedKasminaLayer",
    "ExtendedLifecycle",
    "GraftingConfig",
    "GraftingContext",
    "GraftingStrategyRegistry",
    "LifecycleManager",
    "SelfSupervisedTrainer",
    "StateManager",
    "TrainingResult",
    "connect",
    "unwrap",
]
