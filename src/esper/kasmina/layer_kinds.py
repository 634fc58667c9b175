"""Which single modules can be layer sites besides Linear and Conv, and how each of them is read.

One row a kind: recognised by exact type (a subclass may compute something else), with its sizes, its weight, and what
would make it unusable.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from esper.kasmina.tracing import Trace
from esper.protocol import SiteKind

PACKED = "it is given packed sequences, whose rows a branch cannot tell apart (pad them instead, or exclude it)"
QUANTISED = "quantised (its weight is not trained as floating point)"


@dataclass(frozen=True)
class LayerKind:
    """How modules of some types become layer sites; each callable takes the module."""

    kind: SiteKind
    types: tuple[type[nn.Module], ...]
    features: Callable[[Any], tuple[int, int]]
    """Features read and features written."""
    refusal: Callable[[Any], str | None]
    """Why this one cannot be a site, or ``None``."""


def weight_of(module: nn.Module) -> nn.Parameter:
    """The parameter that stands for a layer: its optimizer group, device and gradients are the site's."""
    return cast(nn.Parameter, _weight(module))


def _weight(module: nn.Module) -> object:
    if isinstance(module, nn.MultiheadAttention):
        return module.out_proj.weight
    return module.weight_ih_l0 if isinstance(module, nn.RNNBase) else module.weight


def weight_name(module: nn.Module) -> str:
    """Name of :func:`weight_of` inside the module."""
    return next(name for name, parameter in module.named_parameters() if parameter is weight_of(module))


def first_input(args: Any, kwargs: Any) -> Any:
    """What a layer reads: its first argument, by position or by name."""
    return args[0] if args else next(iter(kwargs.values()))


def with_first_input(args: Any, kwargs: Any, new: Any) -> tuple[Any, Any]:
    """A layer's arguments with what it reads replaced."""
    return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, next(iter(kwargs)): new})


def first_output(y: Any) -> Any:
    """What a layer's branches add to: its output, or the first of several."""
    return y[0] if isinstance(y, tuple) and not isinstance(y, PackedSequence) else y


def with_first_output(y: Any, new: Tensor) -> Any:
    """``y`` with its first output replaced."""
    return (new, *y[1:]) if isinstance(y, tuple) else new


def sequence_axis(module: nn.Module, model: nn.Module, probe: Trace) -> int | None:
    """Axis of a three-dimensional output along which positions follow each other, ``None`` for any other output.

    Attention and recurrent layers say it themselves (``batch_first``). Of the other layers nothing is known: they go
    by the model's own sequence layers, and batch first where it has none.
    """
    call = probe.results.get(id(module))
    if call is None or len(call.y_shape) != 3:
        return None
    family = (nn.MultiheadAttention, nn.RNNBase)
    own = [module] if isinstance(module, family) else [m for m in model.modules() if isinstance(m, family)]
    ran = [m for m in own if probe.calls.get(id(m), 0) > 0]
    return 1 if all(bool(m.batch_first) for m in ran) else 0


def kind_of(module: nn.Module) -> LayerKind | None:
    """The row for a module's exact type, or for the family that it derives from."""
    exact = next((row for row in LAYER_KINDS if type(module) in row.types), None)
    return exact or next((row for row in LAYER_KINDS if isinstance(module, row.types)), None)


def _norm_refusal(norm: nn.LayerNorm | nn.RMSNorm) -> str | None:
    if len(norm.normalized_shape) != 1:
        return f"normalises over {len(norm.normalized_shape)} axes, normalized_shape={tuple(norm.normalized_shape)}"
    return None if norm.elementwise_affine else "has no weights of its own (elementwise_affine=False)"


def _affine_refusal(norm: Any) -> str | None:
    return None if norm.affine else "has no weights of its own (affine=False)"


def _embedding_refusal(embedding: nn.Embedding) -> str | None:
    return None if embedding.max_norm is None else f"rescales its own rows (max_norm={embedding.max_norm})"


def _recurrent_features(layer: nn.RNNBase) -> tuple[int, int]:
    return layer.input_size, (layer.proj_size or layer.hidden_size) * (2 if layer.bidirectional else 1)


def _batch_norm_features(norm: nn.BatchNorm1d) -> tuple[int, int]:
    return norm.num_features, norm.num_features


def _no_refusal(_: nn.Module) -> None:
    return None


_NORM_TYPES: tuple[type[nn.Module], ...] = (nn.LayerNorm, nn.RMSNorm)

LAYER_KINDS = (
    LayerKind(SiteKind.NORM_LAYER, _NORM_TYPES, lambda m: (m.normalized_shape[0],) * 2, _norm_refusal),
    LayerKind(
        SiteKind.CHANNEL_NORM_LAYER,
        (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d),
        _batch_norm_features,
        _affine_refusal,
    ),
    LayerKind(
        SiteKind.CHANNEL_NORM_LAYER, (nn.GroupNorm,), lambda m: (m.num_channels, m.num_channels), _affine_refusal
    ),
    LayerKind(
        SiteKind.EMBEDDING_LAYER,
        (nn.Embedding,),
        lambda m: (m.num_embeddings, m.embedding_dim),
        _embedding_refusal,
    ),
    LayerKind(SiteKind.ATTENTION_LAYER, (nn.MultiheadAttention,), lambda m: (m.embed_dim, m.embed_dim), _no_refusal),
    LayerKind(SiteKind.RECURRENT_LAYER, (nn.LSTM, nn.GRU, nn.RNN), _recurrent_features, _no_refusal),
)


def is_quantised(module: nn.Module) -> bool:
    """Whether a module is a layer of one of torch's quantised packages: its weight is packed, or a method."""
    packages = type(module).__module__.split(".")
    return "quantized" in packages and (hasattr(module, "weight") or hasattr(module, "_packed_params"))
