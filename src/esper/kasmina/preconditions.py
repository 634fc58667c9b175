"""What must hold of a model and a configuration before anything is attached: checked first, so nothing has changed."""

from __future__ import annotations

from torch import nn

from esper.config import Config
from esper.errors import AttachError, ConfigError
from esper.kasmina.hooks import is_attached
from esper.kasmina.starts import STARTS
from esper.kasmina.strategies import STRATEGIES


def check_host(model: nn.Module) -> None:
    """Raise :class:`~esper.errors.AttachError` for a model that cannot carry a grower."""
    if is_attached(model):
        raise AttachError("a model can have one Grower, this one has one already; call its detach() first")
    parameters = list(model.named_parameters())
    if not parameters:
        raise AttachError("the model must have parameters, got none; pass the nn.Module that is trained")
    meta = [name for name, parameter in parameters if parameter.is_meta]
    if meta:
        raise AttachError(
            f"the model must be materialised, {len(meta)} parameters are on the meta device ({meta[0]}); "
            "call model.to_empty(device=...) and initialise it first"
        )
    if isinstance(model, nn.DataParallel):
        raise AttachError(
            "the model must run as one module, got nn.DataParallel, which copies modules in every forward; "
            "pass the module inside it (model.module) and train on one device: Esper runs in one process so far"
        )


def check_choices(model: nn.Module, config: Config) -> None:
    """Names and ceilings that ``config`` cannot check by itself.

    Raises
    ------
    UnknownNameError
        No such start or strategy; the message lists the known ones.
    ConfigError
        The parameter budget is below the host's own size.
    """
    STRATEGIES[config.graft.strategy]
    if config.fit.start is not None:
        STARTS[config.fit.start]
    size = sum(parameter.numel() for parameter in model.parameters())
    budget = config.budget.params
    if budget is not None and budget < size:
        raise ConfigError(f"budget.params must be at least the host's {size}, got {budget}; raise it or leave it None")
