"""Merge what was grown into ordinary wider layers: a plain model without anything of Esper in it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from esper.errors import ExportError
from esper.export.beside import layer_with_branches
from esper.kasmina.blueprints import Parts, Port
from esper.kasmina.discovery import SitePlan
from esper.kasmina.execution import Kasmina
from esper.kasmina.hooks import strip
from esper.kasmina.isolation import undisturbed
from esper.kasmina.layer_kinds import first_output
from esper.kasmina.layers import features, is_batch_norm, is_growable, sizes
from esper.kasmina.tracing import tensors_in


@dataclass(frozen=True)
class Difference:
    """Largest difference between grown and exported model: of the loss, relative; and what was allowed.

    ``output`` is that of the tensors which the model returns, as a share of the largest output (NaN where the loss does
    not call the model itself). ``layers`` holds, by name, the largest difference in the output of each layer that
    growth was merged into, as a share of its largest output: what rounding of the merged weights (and of all before
    them) comes to.
    """

    loss: float
    tolerance: float
    layers: dict[str, float] = field(default_factory=dict[str, float])
    output: float = math.nan


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
    grown = grown_sites(kasmina)
    spans = [plan for plan in grown if plan.info.kind.is_span]
    folding, beside = _by_form([plan for plan in grown if not plan.info.kind.is_span], kasmina)
    for span in spans:  # upstream spans come first: their tail is the next one's head
        for name in (span.head_name, span.up_name):
            # before its outputs are more than what branches on the layer know; a tail's are not, and what scales them
            # scales what the span adds as well
            if name in folding:
                _fold(plain, folding.pop(name), kasmina)
        _widen(plain, span, kasmina)
    for plan in folding.values():
        _fold(plain, plan, kasmina)
    for plan in beside:
        layer, banks = plain.get_submodule(plan.head_name), kasmina.sites[plan.info.name].permanent
        own = own_columns(plan, spans, features(layer)[1]) if is_growable(layer) else None
        _replace(plain, plan.head_name, layer_with_branches(layer, banks, plan.geometry, own))
    return plain


def _by_form(plans: list[SitePlan], kasmina: Kasmina) -> tuple[dict[str | None, SitePlan], list[SitePlan]]:
    """Layer sites of which every branch folds into the layer's own weights, by the layer's name; and the others."""
    folding: dict[str | None, SitePlan] = {}
    beside: list[SitePlan] = []
    for plan in plans:
        if all(bank.plan.folds(plan.geometry) for bank in kasmina.sites[plan.info.name].permanent):
            folding[plan.head_name] = plan
        else:
            beside.append(plan)
    return folding, beside


def _fold(plain: nn.Module, plan: SitePlan, kasmina: Kasmina) -> None:
    """Put a layer's growth into its own weights."""
    layer = plain.get_submodule(plan.head_name)
    # those that read the layer's output come first: it is the host's own that they have read
    for bank in sorted(kasmina.sites[plan.info.name].permanent, key=lambda bank: bank.plan.port is Port.INPUT):
        layer = bank.plan.merge(Parts(layer, layer, None), bank.params, bank.buffers, plan.geometry).head
    _replace(plain, plan.head_name, layer)


def _widen(plain: nn.Module, plan: SitePlan, kasmina: Kasmina) -> None:
    """Put a span's annex into wider layers."""
    annex = kasmina.sites[plan.info.name].permanent[0]
    norm = plain.get_submodule(plan.norm_name) if plan.norm_name is not None else None
    assert norm is None or is_batch_norm(norm)
    up = plain.get_submodule(plan.up_name) if plan.up_name is not None else None
    parts = Parts(plain.get_submodule(plan.head_name), plain.get_submodule(plan.tail_name), norm, up)
    wider = annex.plan.merge(parts, annex.params, annex.buffers, plan.geometry)
    _replace(plain, plan.head_name, wider.head)
    _replace(plain, plan.tail_name, wider.tail)
    for inner_name, inner in ((plan.norm_name, wider.norm), (plan.up_name, wider.up)):
        if inner_name is not None and inner is not None:
            _replace(plain, inner_name, inner)


def own_columns(plan: SitePlan, spans: Iterable[SitePlan], width: int) -> Tensor:
    """Where a layer's own features lie in an output that a span has made ``width`` wide, int64.

    New ones come behind its own, or behind each half of a layer that makes gate and up at once.
    """
    size = plan.info.out_features
    own = torch.arange(size)
    gates = [span.geometry.gate for span in spans if span.head_name == plan.tail_name]
    if any(gate is not None and gate.fused for gate in gates):
        own[size // 2 :] += (width - size) // 2
    return own


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    old = model.get_submodule(name)
    module.train(old.training)
    for parameter, before in zip(module.parameters(recurse=False), old.parameters(recurse=False), strict=False):
        parameter.requires_grad_(before.requires_grad)
    setattr(model.get_submodule(parent), leaf, module)


_LOSS_OVER_OUTPUT = 30.0


def check_equal(
    grown: nn.Module,
    plain: nn.Module,
    loss: Callable[[nn.Module, Any], Tensor],
    batch: Any,
    *,
    tolerance: float,
    plans: Iterable[SitePlan] = (),
) -> Difference:
    """Compare both models on one batch in evaluation mode; ``plans`` are the sites whose outputs are compared too.

    Raises
    ------
    ExportError
        When the relative difference of the losses is not finite, or exceeds ``tolerance`` while that of the model's
        outputs exceeds a thirtieth of it, or the model reads something of a layer that is now a layer with branches
        beside it.
    """
    plans = list(plans)
    with undisturbed(grown), undisturbed(plain):
        one, before, outputs = _run(grown, loss, batch, plans)
        try:
            two, after, same = _run(plain, loss, batch, plans)
        except AttributeError as error:
            raise ExportError(
                f"a layer with branches beside it must be used by calling it, but the model reads more ({error}); "
                "leave that layer out (SitesConfig(exclude=...)), or grow 'affine' or 'low_rank' there, which fold in"
            ) from error
    if not math.isfinite(one):
        raise ExportError(
            "an exported model is compared with the grown one on a held-out batch, whose loss must be finite, got "
            f"{one}: training has diverged, or the batch holds such values; go back to weights that were sound"
        )
    difference = abs(one - two) / max(abs(one), 1e-12)
    pairs = [pair for pair in zip(outputs, same, strict=False) if pair[0].is_floating_point()]
    output = max((_relative(*pair) for pair in pairs), default=math.nan)
    # A small loss is what is left of large logits, and has their rounding: then the outputs tell.
    is_rounding = output <= tolerance / _LOSS_OVER_OUTPUT
    if not math.isfinite(difference) or (difference > tolerance and not is_rounding):
        raise ExportError(
            f"an exported model must equal the grown one, its loss differs by {difference:.3g} (relative), allowed is "
            f"{tolerance:g}; report this, or raise tolerance= if the model computes in low precision"
        )
    layers = {name: _relative(before[name], after[name]) for name in before if name in after}
    return Difference(difference, tolerance, layers, output)


def _run(
    model: nn.Module, loss: Callable[[nn.Module, Any], Tensor], batch: Any, plans: list[SitePlan]
) -> tuple[float, dict[str, Tensor], list[Tensor]]:
    """The loss of one batch, outputs of some layers by name (the features the host's layer had), the model's own."""
    outputs: dict[str, Tensor] = {}
    returned: list[Tensor] = []

    def keep(plan: SitePlan) -> Callable[[nn.Module, object, Any], None]:
        def hook(_module: nn.Module, _args: object, y: Any) -> None:
            first, axis = first_output(y).detach(), plan.geometry.feature_axis
            own = own_columns(plan, (p for p in plans if p.info.kind.is_span), first.shape[axis])
            outputs[plan.tail_name] = first.index_select(axis, own.to(first.device))

        return hook

    def keep_returned(_module: nn.Module, _args: object, y: Any) -> None:
        returned[:] = [tensor.detach() for tensor in tensors_in(y)]

    handles = [model.get_submodule(plan.tail_name).register_forward_hook(keep(plan)) for plan in plans]
    handles.append(model.register_forward_hook(keep_returned))
    try:
        return float(loss(model, batch)), outputs, returned
    finally:
        for handle in handles:
            handle.remove()


def _relative(one: Tensor, two: Tensor) -> float:
    size = float(one.abs().max()) if one.numel() else 0.0
    return float((one.double() - two.double()).abs().max()) / max(size, 1e-12) if one.numel() else 0.0


def grown_sites(kasmina: Kasmina) -> list[SitePlan]:
    """Sites that have something permanent."""
    return [plan for name, plan in kasmina.plans.items() if kasmina.sites[name].permanent]


def structure(plain: nn.Module, kasmina: Kasmina) -> dict[str, dict[str, int]]:
    """The layers that differ from the host's, with their new sizes: enough to rebuild the shape without Esper."""
    changed: dict[str, dict[str, int]] = {}
    for plan in grown_sites(kasmina):
        for module_name in plan.module_names:
            changed[module_name] = _sizes(plain.get_submodule(module_name))
    return changed


def _sizes(module: nn.Module) -> dict[str, int]:
    """A layer's sizes; of a layer with branches beside it only how many (it is rebuilt from a file of the whole)."""
    if isinstance(module, fx.GraphModule):
        return {"branches": len(list(module.get_submodule("branches").children()))}
    if is_growable(module) or is_batch_norm(module):
        return sizes(module)
    names = ("num_channels", "num_embeddings", "embedding_dim", "embed_dim")
    return {name: int(getattr(module, name)) for name in names if hasattr(module, name)}


def default_tolerance(dtypes: set[torch.dtype]) -> float:
    """1e-4 where the sites compute in fp32 or better, 1e-2 where one computes in half precision (autocast too).

    A merged layer sums in another order; in bf16 one rounding is 0.4%.
    """
    return 1e-2 if dtypes & {torch.bfloat16, torch.float16} else 1e-4
