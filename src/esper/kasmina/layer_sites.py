"""Find norms, embeddings, attention and recurrent layers that can be sites, and say of the others why they cannot."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

from torch import nn

from esper.kasmina.geometry import Geometry, has_bias
from esper.kasmina.layer_kinds import PACKED, LayerKind, is_quantised, kind_of, sequence_axis, weight_name, weight_of
from esper.kasmina.tracing import Trace
from esper.protocol import SiteKind, Skipped


@dataclass(frozen=True)
class FoundLayer:
    """A module that can be a layer site."""

    module: nn.Module
    name: str
    geometry: Geometry


def other_layers(
    model: nn.Module, probe: Trace, only: Container[int] | None = None
) -> tuple[list[FoundLayer], list[Skipped]]:
    """Layer sites besides Linear and Conv, in the order of the model's modules; and the others with a reason.

    ``only`` holds the ids of the modules that are wanted; ``None`` wants all.
    """
    found: list[FoundLayer] = []
    skipped: list[Skipped] = []
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    for name, module in model.named_modules():
        row = kind_of(module)
        if row is None or is_quantised(module) or (only is not None and id(module) not in only):
            continue
        reason = _unusable(module, name, row, owners, probe)
        if reason is None:
            found.append(FoundLayer(module, name, _geometry(module, row, model, probe)))
        else:
            skipped.append(Skipped(name=name, reason=reason))
    return found, skipped


def _unusable(module: nn.Module, name: str, row: LayerKind, owners: dict[int, list[str]], probe: Trace) -> str | None:
    if type(module) not in row.types:
        return f"a {type(module).__name__}, whose inner workings are not known"
    reason = row.refusal(module)
    if reason is not None:
        return reason
    weight = weight_of(module)
    if id(weight) not in owners:
        return "parametrised (its weight is computed from other tensors)"
    if weight.is_meta:
        return "on the meta device (no storage); materialise the model first"
    own = f"{name}.{weight_name(module)}".lstrip(".")
    if len(owners[id(weight)]) > 1:
        return f"tied to {', '.join(other for other in owners[id(weight)] if other != own)}"
    if not weight.requires_grad:
        return "frozen (requires_grad is False)"
    return _unusable_run(module, row, probe)


def _unusable_run(module: nn.Module, row: LayerKind, probe: Trace) -> str | None:
    """What the probe forward says against a module."""
    calls, readers = probe.calls.get(id(module), 0), probe.num_readers(weight_of(module))
    if calls == 0:
        return "its weight is used without calling the module" if readers else "did not run in the probe forward"
    if calls > 1:
        return f"runs {calls} times a forward"
    if readers > 1:
        return f"its weight is read {readers} times a forward (tied by use)"
    call = probe.results[id(module)]
    if not call.y_shape:
        return PACKED
    if row.kind is SiteKind.RECURRENT_LAYER:
        read = [number for number in call.outputs if probe.consumers.get(number)]
        if read and call.outputs[0] not in read:
            return "only its last state is read, not its output sequence"
    return None


def _geometry(module: nn.Module, row: LayerKind, model: nn.Module, probe: Trace) -> Geometry:
    in_features, out_features = row.features(module)
    call = probe.results[id(module)]
    return Geometry(
        kind=row.kind,
        in_features=in_features,
        out_features=out_features,
        hidden_features=0,
        head_bias=has_bias(module),
        x_shape=call.x_shape,
        y_shape=call.y_shape,
        sequence_axis=None if row.kind.channels_first else sequence_axis(module, model, probe),
        holds_shift=not isinstance(module, nn.RMSNorm)
        and not (isinstance(module, nn.MultiheadAttention) and not has_bias(module.out_proj)),
    )
