"""Merge what was grown into ordinary wider layers: a plain model without anything of Esper in it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from esper.errors import ExportError
from esper.kasmina.bank import Bank
from esper.kasmina.blueprints import ChunkBlueprint, Parts, with_seeds
from esper.kasmina.discovery import SitePlan
from esper.kasmina.execution import Kasmina
from esper.kasmina.hooks import strip
from esper.kasmina.isolation import undisturbed


@dataclass(frozen=True)
class Difference:
    """Largest difference between grown and exported model: of the loss, relative; and what was allowed."""

    loss: float
    tolerance: float


def merged(model: nn.Module, kasmina: Kasmina) -> nn.Module:
    """A deep copy of the host with every annex merged and every hook of Esper removed.

    Raises
    ------
    ExportError
        While a cohort is in the forward pass but not yet permanent: it is neither part of the model nor absent.
    """
    grafted = {number for site in kasmina.sites.values() for number in site.grafted}
    if grafted:
        raise ExportError(
            f"only permanent growth can be exported, got cohorts {sorted(grafted)} still on trial; let them end "
            "(grower.finish()) or cancel them first"
        )
    plain = copy.deepcopy(model)
    strip(plain)
    for name, plan in kasmina.plans.items():  # upstream spans come first: their tail is the next one's head
        annex = kasmina.sites[name].annex
        if annex is not None:
            _put(plain, plan, annex.plan.merge(_parts(plain, plan), annex.params, annex.buffers, plan.geometry))
    for name, plan in kasmina.plans.items():  # behind the whole layer, however wide it has become
        fossils = kasmina.sites[name].fossils
        if fossils:
            layer = plain.get_submodule(plan.tail_name)
            _set(plain, plan.tail_name, with_seeds(layer, [*map(_stack, fossils)]).train(layer.training))
    return plain


def _stack(bank: Bank) -> tuple[ChunkBlueprint, dict[str, Tensor], Tensor]:
    assert isinstance(bank.plan, ChunkBlueprint)
    return bank.plan, bank.params, torch.arange(bank.width)[None] if bank.columns is None else bank.columns


def _parts(plain: nn.Module, plan: SitePlan) -> Parts:
    norm = plain.get_submodule(plan.norm_name) if plan.norm_name is not None else None
    assert norm is None or isinstance(norm, nn.BatchNorm2d)
    return Parts(plain.get_submodule(plan.head_name), plain.get_submodule(plan.tail_name), norm)


def _put(plain: nn.Module, plan: SitePlan, parts: Parts) -> None:
    _replace(plain, plan.head_name, parts.head)
    _replace(plain, plan.tail_name, parts.tail)
    if plan.norm_name is not None and parts.norm is not None:
        _replace(plain, plan.norm_name, parts.norm)


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    old = model.get_submodule(name)
    module.train(old.training)
    for parameter, before in zip(module.parameters(recurse=False), old.parameters(recurse=False), strict=False):
        parameter.requires_grad_(before.requires_grad)
    _set(model, name, module)


def _set(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def check_equal(
    grown: nn.Module, plain: nn.Module, loss: Callable[[nn.Module, Any], Tensor], batch: Any, *, tolerance: float
) -> Difference:
    """Compare both models on one batch in evaluation mode.

    Raises
    ------
    ExportError
        When the relative difference of the losses exceeds ``tolerance`` or is not finite.
    """
    with undisturbed(grown), undisturbed(plain):
        one, two = float(loss(grown, batch)), float(loss(plain, batch))
    difference = abs(one - two) / max(abs(one), 1e-12)
    if not math.isfinite(difference) or difference > tolerance:
        raise ExportError(
            f"an exported model must equal the grown one, its loss differs by {difference:.3g} (relative), allowed is "
            f"{tolerance:g}; report this, or raise tolerance= if the model computes in low precision"
        )
    return Difference(difference, tolerance)


def structure(plain: nn.Module, kasmina: Kasmina) -> dict[str, dict[str, int]]:
    """The layers that differ from the host's, with their new sizes: enough to rebuild the shape without Esper."""
    changed: dict[str, dict[str, int]] = {}
    for name, plan in kasmina.plans.items():
        if not kasmina.sites[name].permanent:
            continue
        for module_name in (plan.head_name, plan.tail_name, plan.norm_name):
            if module_name is not None:
                changed[module_name] = _sizes(plain.get_submodule(module_name))
    return changed


def _sizes(module: nn.Module) -> dict[str, int]:
    if isinstance(module, nn.Linear):
        return {"in_features": module.in_features, "out_features": module.out_features}
    if isinstance(module, fx.GraphModule):  # a layer with seeds behind it
        sizes = _sizes(module.get_submodule("layer"))
        stacks = [value.shape for name, value in module.named_parameters(recurse=False) if name.startswith("w1_")]
        for number, (seeds, units, width) in enumerate(stacks):
            sizes |= {f"seeds_{number}": seeds, f"units_{number}": units, f"columns_{number}": width}
        return sizes
    if isinstance(module, nn.Conv2d):
        return {"in_channels": module.in_channels, "out_channels": module.out_channels}
    assert isinstance(module, nn.BatchNorm2d)
    return {"num_features": module.num_features}


def default_tolerance(dtypes: set[torch.dtype]) -> float:
    """1e-4 where the sites compute in fp32 or better, 1e-2 where one computes in half precision (autocast too).

    A merged layer sums in another order; in bf16 one rounding is 0.4%.
    """
    return 1e-2 if dtypes & {torch.bfloat16, torch.float16} else 1e-4
