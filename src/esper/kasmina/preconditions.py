"""What must hold of a model and a configuration before anything is attached: checked first, so nothing has changed."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter
from torch.optim import Optimizer

from esper.config import Config
from esper.errors import AttachError, ConfigError
from esper.kasmina.hooks import is_attached
from esper.kasmina.starts import STARTS
from esper.kasmina.strategies import STRATEGIES

_SEVERAL_PROCESSES = ("DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule")


def check_host(model: nn.Module) -> None:
    """Raise :class:`~esper.errors.AttachError` for a model that cannot carry a grower."""
    if not isinstance(model, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]  # callers need not type-check
        raise AttachError(f"the model must be an nn.Module, got {type(model).__name__}; pass the one that is trained")
    _check_modules(model)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        num_processes = torch.distributed.get_world_size()
        if num_processes > 1:
            raise AttachError(
                f"Esper runs in one process so far, got a process group of {num_processes}: each process would grow "
                "another network; train on one device"
            )
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
    lazy = [name for name, parameter in parameters if isinstance(parameter, UninitializedParameter)]
    if lazy:
        raise AttachError(
            f"the model must know its shapes, {len(lazy)} parameters of lazy modules have none yet ({lazy[0]}); "
            "run it once on a batch, then make the optimizer and the Grower"
        )


def _check_modules(model: nn.Module) -> None:
    """Refuse what copies or shards modules, or runs them where no hook reaches."""
    for name, module in model.named_modules():
        where = f"at {name!r}" if name else "as the model"
        families = {family.__name__ for family in type(module).__mro__}
        if isinstance(module, torch.jit.ScriptModule):
            raise AttachError(
                f"the model must consist of Python modules, got {type(module).__name__} {where}, which runs without "
                "them; build the Grower before torch.jit.script or trace, and script what export() returns"
            )
        if isinstance(module, nn.DataParallel):
            raise AttachError(
                f"the model must run as one module, got nn.DataParallel {where}, which copies modules in every "
                "forward; pass the module inside it (model.module) and train on one device: Esper runs in one process "
                "so far"
            )
        if families.intersection(_SEVERAL_PROCESSES):
            raise AttachError(
                f"the model must be trained by one process, got {type(module).__name__} {where}: each process would "
                "grow another network; train on one device"
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
    if not isinstance(config, Config):  # pyright: ignore[reportUnnecessaryIsInstance]  # callers need not type-check
        raise ConfigError(f"config must be an esper.Config, got {type(config).__name__}; say esper.Config(name=value)")
    STRATEGIES[config.graft.strategy]
    if config.fit.start is not None:
        STARTS[config.fit.start]
    size = sum(parameter.numel() for parameter in model.parameters())
    budget = config.budget.params
    if budget is not None and budget < size:
        raise ConfigError(f"budget.params must be at least the host's {size}, got {budget}; raise it or leave it None")


def check_optimizers(optimizers: object) -> list[Optimizer]:
    """The optimizers as a list.

    Raises
    ------
    AttachError
        What was given is not an optimizer or several.
    """
    if isinstance(optimizers, Iterable) and not isinstance(optimizers, str):
        members: list[object] = list(optimizers)  # pyright: ignore[reportUnknownArgumentType]
    else:
        members = [optimizers]
    strangers = [type(member).__name__ for member in members if not isinstance(member, Optimizer)]
    if strangers or not members:
        raise AttachError(
            "optimizer must be a torch.optim.Optimizer or a list of them, got "
            f"{', '.join(sorted(set(strangers))) or '[]'}; pass the one that is stepped, e.g. "
            "torch.optim.AdamW(model.parameters())"
        )
    return [member for member in members if isinstance(member, Optimizer)]
