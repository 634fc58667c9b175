"""Esper grows a PyTorch model while it trains.

The public names, nothing else. They load on first use (PEP 562), so that ``import esper`` and ``esper --help`` cost
next to nothing and do not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from esper.config import (
        BudgetConfig,
        CaptureConfig,
        Config,
        EvidenceConfig,
        FitConfig,
        GraftConfig,
        SafetyConfig,
        SitesConfig,
        TamiyoConfig,
        TelemetryConfig,
    )
    from esper.errors import (
        AbsorbError,
        AttachError,
        BusError,
        ConfigError,
        DataError,
        DivergenceError,
        EnvelopeError,
        EsperError,
        EvidenceError,
        ExportError,
        SilentSiteError,
        SiteError,
        StateError,
        TransitionError,
        UnknownNameError,
        WorkerError,
    )
    from esper.grower import Grower
    from esper.plugins import (
        register_blueprint,
        register_controller,
        register_module,
        register_start,
        register_strategy,
    )
    from esper.protocol import Lifecycle
    from esper.safety.batches import Batches

__version__ = "0.1.0"

__all__ = [
    "AbsorbError",
    "AttachError",
    "Batches",
    "BudgetConfig",
    "BusError",
    "CaptureConfig",
    "Config",
    "ConfigError",
    "DataError",
    "DivergenceError",
    "EnvelopeError",
    "EsperError",
    "EvidenceConfig",
    "EvidenceError",
    "ExportError",
    "FitConfig",
    "GraftConfig",
    "Grower",
    "Lifecycle",
    "SafetyConfig",
    "SilentSiteError",
    "SiteError",
    "SitesConfig",
    "StateError",
    "TamiyoConfig",
    "TelemetryConfig",
    "TransitionError",
    "UnknownNameError",
    "WorkerError",
    "__version__",
    "register_blueprint",
    "register_controller",
    "register_module",
    "register_start",
    "register_strategy",
]


def _home(name: str) -> str:
    """The module that defines a public name."""
    if name == "Grower":
        return "esper.grower"
    if name == "Lifecycle":
        return "esper.protocol"
    if name == "Batches":
        return "esper.safety.batches"
    if name.startswith("register_"):
        return "esper.plugins"
    return "esper.config" if name.endswith("Config") else "esper.errors"


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'esper' has no attribute {name!r}; it has {', '.join(__all__)}")
    value: object = getattr(importlib.import_module(_home(name)), name)
    globals()[name] = value  # the next look-up does not come here
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
