"""Find by itself where a model can grow, and say of every other weight why it cannot."""

from __future__ import annotations

import difflib
import fnmatch
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import msgspec
import torch
from torch import nn

from esper.config import SitesConfig
from esper.errors import SiteError
from esper.kasmina import memory
from esper.kasmina.chunked import chunked_layers
from esper.kasmina.chunks import chunk_bounds, default_num_chunks
from esper.kasmina.geometry import GateGeometry, Geometry, NormGeometry, has_bias
from esper.kasmina.layer_kinds import QUANTISED, is_quantised, sequence_axis, weight_of
from esper.kasmina.layer_sites import other_layers
from esper.kasmina.layers import conv_geometry, features, is_batch_norm, is_conv, is_growable, is_known
from esper.kasmina.spans import SpanPath, follow
from esper.kasmina.tracing import Operation, Trace, trace
from esper.protocol import SiteInfo, SiteKind, Skipped


@dataclass(frozen=True)
class SitePlan:
    """A site that was found: its modules by reference, its shape as data.

    ``head`` and ``tail`` are the same module for a layer site; ``up`` is a gated span's second factor where that is a
    layer of its own. ``parent`` is the innermost module whose call contains
    them all; ``upstream`` names the span whose tail is this span's head, if any.
    """

    info: SiteInfo
    geometry: Geometry
    head: nn.Module
    head_name: str
    tail: nn.Module
    tail_name: str
    norm_name: str | None
    parent: nn.Module
    upstream: str | None = None
    up: nn.Module | None = None
    up_name: str | None = None

    @property
    def module_names(self) -> tuple[str, ...]:
        """Host modules that change their size when the site grows for good."""
        names = (self.head_name, self.tail_name, self.norm_name, self.up_name)
        return tuple(dict.fromkeys(name for name in names if name is not None))

    @property
    def weight(self) -> nn.Parameter:
        """The parameter that stands for the site: its optimizer group, device and gradients."""
        return weight_of(self.tail)


@dataclass(frozen=True)
class Discovery:
    sites: tuple[SitePlan, ...]
    skipped: tuple[Skipped, ...]
    notes: tuple[str, ...] = ()
    """What was chosen otherwise than asked, and why."""

    @property
    def covered_params(self) -> int:
        """Parameters of the layers that sites lie on; a layer that two spans share counts once."""
        modules = {id(m): m for plan in self.sites for m in (plan.head, plan.up, plan.tail) if m is not None}
        return sum(parameter.numel() for module in modules.values() for parameter in module.parameters())


def discover(model: nn.Module, run: Callable[[], object], config: SitesConfig) -> Discovery:
    """Probe ``model`` once and list the sites that ``config`` asks for.

    Parameters
    ----------
    run:
        Runs the model once on a held-out batch; called without gradients, in whatever mode the caller has set.

    Raises
    ------
    SiteError
        When a pattern matches nothing, chunks exceed a site's features, or nothing can grow.
    """
    names = {id(module): name for name, module in model.named_modules()}
    probe = trace(model, run)
    usable, skipped = _usable_layers(model, probe)
    spans, refusals = _spans(model, probe, usable, names)
    plans, chunked = list(spans), chunked_layers(model)
    ends = {id(plan.tail) for plan in spans}
    alone = None if config.layers else {module for module in chunked if module not in ends}
    plans += [_layer(model, m, names[id(m)], probe) for m in usable.values() if alone is None or id(m) in alone]
    others, unusable = other_layers(model, probe, alone)
    plans += [_plan_layer(found.module, found.name, found.geometry) for found in others]
    skipped += unusable
    in_span = {name for plan in plans for name in plan.module_names}
    for module in usable.values():
        name = names[id(module)]
        if name not in in_span:
            skipped.append(Skipped(name=name, reason=refusals.get(name, "opens no span; sites.layers=True offers it")))
    found, plans = len(plans), _select(plans, config)
    if not plans:
        if found:
            raise SiteError(
                f"sites.exclude must leave at least one of the {found} sites, got {config.exclude}; leave a pattern out"
            )
        why = "; ".join(f"{s.name}: {s.reason}" for s in skipped[:5]) or "it has no Linear or convolution layers"
        raise SiteError(
            f"the model must have at least one place that can grow, got none ({why}); "
            "pass a model with Linear-activation-Linear or conv-activation-conv, or SitesConfig(layers=True)"
        )
    demanded = [plan.info.name for plan in plans if id(plan.tail) in chunked]
    plans, notes = memory.fit_chunks(_with_chunks(plans, config.chunks, chunked), demanded)
    return Discovery(tuple(plans), tuple(skipped), notes)


def _usable_layers(model: nn.Module, probe: Trace) -> tuple[dict[int, nn.Module], list[Skipped]]:
    """Layers whose single weight runs once a forward, by id of the weight; and the others with a reason."""
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    uses: dict[int, list[Operation]] = {}
    for operation in probe.operations:
        if operation.weight is not None:
            uses.setdefault(operation.weight, []).append(operation)
    usable: dict[int, nn.Module] = {}
    skipped: list[Skipped] = []
    for name, module in model.named_modules():
        if not is_growable(module):
            if is_quantised(module):
                skipped.append(Skipped(name=name, reason=QUANTISED))
            continue
        reason = _unusable(module, name, owners, uses, probe)
        if reason is None:
            usable[id(module.weight)] = module
        else:
            skipped.append(Skipped(name=name, reason=reason))
    return usable, skipped


def _unusable(
    module: nn.Module, name: str, owners: dict[int, list[str]], uses: dict[int, list[Operation]], probe: Trace
) -> str | None:
    weight = module.weight
    if not isinstance(weight, nn.Parameter) or "weight" not in dict(module.named_parameters(recurse=False)):
        return "parametrised (its weight is computed from other tensors)"
    if weight.is_complex():
        return "complex (branches compute with real numbers)"
    if not weight.is_floating_point():
        return QUANTISED
    if not is_known(module):
        return f"a {type(module).__name__}, whose inner workings are not known"
    if weight.is_meta:
        return "on the meta device (no storage); materialise the model first"
    if len(owners[id(weight)]) > 1:
        others = [other for other in owners[id(weight)] if other != f"{name}.weight"]
        return f"tied to {', '.join(others)}"
    if not weight.requires_grad:
        return "frozen (requires_grad is False)"
    if is_conv(module) and (module.groups != 1 or module.padding_mode != "zeros"):
        return f"a convolution with groups={module.groups}, padding_mode={module.padding_mode!r}"
    if is_conv(module) and isinstance(module.padding, str):
        return f"a convolution with padding={module.padding!r}; give it as numbers"
    calls, called = uses.get(id(weight), []), probe.calls.get(id(module), 0)
    used = len(calls)
    if called == 0:
        return "its weight is used without calling the module" if used else "did not run in the probe forward"
    if used != 1 or called != 1:
        return f"runs {max(used, called)} times a forward"
    if calls[0].outputs != probe.results[id(module)].outputs:
        return "a forward hook (or forward) of yours changes its output, which a wider layer would not repeat"
    if is_conv(module) and len(calls[0].shape) != weight.dim():
        return "a convolution that is called on an input without a batch axis"
    return None


def _spans(
    model: nn.Module, probe: Trace, usable: dict[int, nn.Module], names: dict[int, str]
) -> tuple[list[SitePlan], dict[str, str]]:
    norms = {id(m.running_mean): m for m in model.modules() if is_batch_norm(m) and m.running_mean is not None}
    found: list[SitePlan] = []
    refusals: dict[str, str] = {}
    for operation in probe.operations:
        head = usable.get(operation.weight) if operation.weight is not None else None
        if head is None:
            continue
        result = follow(probe, operation, head, usable, norms)
        name = names[id(head)]
        if isinstance(result, str):
            refusals[name] = result
            continue
        ends = [head, result.tail] if result.up is None else [head, result.up, result.tail]
        parent = _common_parent(model, [names[id(end)] for end in ends], probe)
        if parent is None:
            refusals[name] = "no module's call contains both ends of the span"
            continue
        found.append(_span_plan(head, result, parent, names))
    tails = {plan.tail_name: plan.info.name for plan in found}
    return [replace(plan, upstream=tails.get(plan.head_name)) for plan in found], refusals


def _common_parent(model: nn.Module, ends: Sequence[str], probe: Trace) -> nn.Module | None:
    """Innermost module whose call encloses them all; containers that are never called do not count."""
    shared = 0
    for parts in zip(*(name.split(".") for name in ends), strict=False):
        if len(set(parts)) > 1:
            break
        shared += 1
    path = ends[0].split(".")[:shared]
    for depth in range(len(path), -1, -1):
        module = model.get_submodule(".".join(path[:depth]))
        if probe.calls.get(id(module), 0) > 0:
            return module
    return None


def _std(weight: torch.Tensor) -> float:
    value = float(weight.detach().float().std()) if weight.numel() > 1 else 0.0
    return value if 0 < value < math.inf else 0.02


def present_geometry(plan: SitePlan) -> Geometry:
    """The site's geometry with its weights' scale as it is now: weights grow, and new ones start on the same scale."""
    gate = plan.geometry.gate
    if gate is not None:
        gate = replace(gate, std=_std(weight_of(plan.head if plan.up is None else plan.up)))
    stds = _std(weight_of(plan.head)), _std(weight_of(plan.tail))
    return replace(plan.geometry, gate=gate, head_std=stds[0], tail_std=stds[1])


def _span_name(head: str, tail: str) -> str:
    """``blocks.0.mlp.fc1`` and ``blocks.0.mlp.fc2`` become ``blocks.0.mlp.fc1-fc2``."""
    beside = head.rsplit(".", 1)[:-1] == tail.rsplit(".", 1)[:-1]
    return f"{head}-{tail.rsplit('.', 1)[-1] if beside else tail}"


def _gate(head: nn.Module, path: SpanPath) -> GateGeometry | None:
    if not path.is_gated:
        return None
    up = head if path.up is None else path.up
    return GateGeometry(has_bias(up), _std(weight_of(up)), path.up is None, path.gate_first is not False)


def _span_kind(head: nn.Module, gate: GateGeometry | None) -> SiteKind:
    if is_conv(head):
        return SiteKind.CONV_SPAN
    return SiteKind.LINEAR_SPAN if gate is None else SiteKind.LINEAR_GATED_SPAN


def _span_plan(head: nn.Module, path: SpanPath, parent: nn.Module, names: dict[int, str]) -> SitePlan:
    in_features, (hidden, out_features) = features(head)[0], features(path.tail)
    head_name, tail_name = names[id(head)], names[id(path.tail)]
    gate, norm, up = _gate(head, path), path.norm, path.up
    kind = _span_kind(head, gate)
    geometry = Geometry(
        kind=kind,
        in_features=in_features,
        out_features=out_features,
        hidden_features=hidden,
        head_bias=has_bias(head),
        activation=path.activation,
        dropout=path.dropout,
        norm=None if norm is None else NormGeometry(norm.eps, norm.momentum, norm.affine),
        gate=gate,
        head_conv=conv_geometry(head),
        tail_conv=conv_geometry(path.tail),
        head_std=_std(weight_of(head)),
        tail_std=_std(weight_of(path.tail)),
    )
    info = SiteInfo(
        name=_span_name(head_name, tail_name),
        kind=kind,
        in_features=in_features,
        out_features=out_features,
        hidden_features=hidden,
        num_chunks=default_num_chunks(out_features),
        weights=sum(p.numel() for m in (head, up, path.tail) if m is not None for p in m.parameters()),
    )
    norm_name, up_name = (None if m is None else names[id(m)] for m in (norm, up))
    return SitePlan(info, geometry, head, head_name, path.tail, tail_name, norm_name, parent, up=up, up_name=up_name)


def _layer(model: nn.Module, module: nn.Module, name: str, probe: Trace) -> SitePlan:
    in_features, out_features = features(module)
    conv = conv_geometry(module)
    std, call = _std(weight_of(module)), probe.results[id(module)]
    geometry = Geometry(
        kind=SiteKind.CONV_LAYER if conv else SiteKind.LINEAR_LAYER,
        in_features=in_features,
        out_features=out_features,
        hidden_features=0,
        head_bias=has_bias(module),
        head_conv=conv,
        tail_conv=conv,
        head_std=std,
        tail_std=std,
        x_shape=call.x_shape,
        y_shape=call.y_shape,
        sequence_axis=None if conv else sequence_axis(module, model, probe),
    )
    return _plan_layer(module, name, geometry)


def _plan_layer(module: nn.Module, name: str, geometry: Geometry) -> SitePlan:
    info = SiteInfo(
        name=name,
        kind=geometry.kind,
        in_features=geometry.in_features,
        out_features=geometry.out_features,
        hidden_features=0,
        num_chunks=default_num_chunks(geometry.out_features),
        weights=sum(p.numel() for p in module.parameters()),
    )
    return SitePlan(info, geometry, module, name, module, name, None, module)


def _select(plans: Sequence[SitePlan], config: SitesConfig) -> list[SitePlan]:
    names = [plan.info.name for plan in plans]
    chosen: set[str] = set()
    for pattern in config.include:
        matched = fnmatch.filter(names, pattern)
        if not matched and names and pattern != "*":
            _raise_unmatched(pattern, names)
        chosen |= set(matched)
    for pattern in config.exclude:
        matched = fnmatch.filter(names, pattern)
        if not matched:
            _raise_unmatched(pattern, names)
        chosen -= set(matched)
    return [plan for plan in plans if plan.info.name in chosen]


def _raise_unmatched(pattern: str, names: list[str]) -> None:
    near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.4)
    globs = {f"{name.split('.')[0]}.*" for name in names if "." in name}
    near += difflib.get_close_matches(pattern, sorted(globs), n=1, cutoff=0.3)
    counted = ", ".join(f"{item!r} ({len(fnmatch.filter(names, item))})" for item in near) or "none"
    raise SiteError(
        f"every site pattern must match something, {pattern!r} matches none of {len(names)} sites; near: {counted}; "
        "list all with grower.sites() or 'esper sites'"
    )


def _with_chunks(
    plans: list[SitePlan], chunks: int | Literal["feature"] | None, chunked: Mapping[int, int]
) -> list[SitePlan]:
    """As many chunks as a layer asks for by itself, else as the configuration says, else the default."""
    result: list[SitePlan] = []
    for plan in plans:
        width = plan.info.out_features
        wanted = chunked.get(id(plan.tail), width if chunks == "feature" else chunks)
        if wanted is not None:
            chunk_bounds(width, wanted)  # raises with rule, value and remedy
            plan = replace(plan, info=msgspec.structs.replace(plan.info, num_chunks=wanted))
        result.append(plan)
    return result
