"""The shape of a site as plain data: enough to build, run and merge a branch without touching host modules."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esper.protocol import SiteKind

_ACTIVATIONS: dict[str, Callable[..., Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "leaky_relu": F.leaky_relu,
    "elu": F.elu,
    "selu": F.selu,
    "celu": F.celu,
    "mish": F.mish,
    "hardswish": F.hardswish,
    "relu6": F.relu6,
    "softplus": F.softplus,
    "hardtanh": F.hardtanh,
    "softsign": F.softsign,
}


def is_activation(name: str) -> bool:
    """Whether a traced function name is an elementwise activation a branch can repeat."""
    return name in _ACTIVATIONS


_POSITIONAL = {"softplus": ("beta", "threshold")}
"""Names of arguments behind the tensor, for functions without a signature that modules call by position."""


def activation_arguments(name: str, traced: dict[str, Any]) -> tuple[tuple[str, Any], ...] | None:
    """Plain arguments of a traced activation by name; ``None`` if one of them has no known name."""
    names = {f"_{number}": key for number, key in enumerate(_POSITIONAL.get(name, ()), 1)}
    kept = {names.get(key, key): value for key, value in traced.items() if key not in ("inplace", "input")}
    return None if any(key.startswith("_") for key in kept) else tuple(sorted(kept.items()))


def has_bias(layer: nn.Module) -> bool:
    """Whether a layer adds a bias (torch annotates ``Linear.bias`` as always there)."""
    return getattr(layer, "bias", None) is not None


@dataclass(frozen=True)
class Activation:
    """An elementwise function by name, so that it can be pickled, written to a manifest and rebuilt."""

    name: str
    arguments: tuple[tuple[str, Any], ...] = ()

    def __call__(self, x: Tensor) -> Tensor:
        return _ACTIVATIONS[self.name](x, **dict(self.arguments))


@dataclass(frozen=True)
class ConvGeometry:
    """A convolution with ``groups=1`` and zero padding: one number for each of its one to three spatial dimensions."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]

    @property
    def taps(self) -> int:
        """Positions of the kernel."""
        return math.prod(self.kernel)

    @property
    def shrinkage(self) -> int:
        """Input positions for one output position, as the stride has it."""
        return math.prod(self.stride)


def pointwise(conv: ConvGeometry) -> ConvGeometry:
    """A convolution of as many dimensions that sees one position."""
    ones = (1,) * len(conv.kernel)
    return ConvGeometry(ones, ones, (0,) * len(ones), ones)


_CONVOLUTIONS: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, conv: ConvGeometry, groups: int = 1) -> Tensor:
    """``x (N, I, *spatial)`` convolved with ``weight (O, I / groups, *kernel)``."""
    function = _CONVOLUTIONS[len(conv.kernel)]
    return function(x, weight, bias, conv.stride, conv.padding, conv.dilation, groups)


@dataclass(frozen=True)
class NormGeometry:
    """A batch norm between the two ends of a span; channels are independent, so a branch keeps its own."""

    eps: float
    momentum: float | None
    affine: bool


@dataclass(frozen=True)
class GateGeometry:
    """The second factor of a gated span, ``down(act(gate(x)) * up(x))``; the first one is the span's head.

    ``std`` is the standard deviation of ``up``'s weights. ``fused``: head and ``up`` are one layer, whose output is cut
    into two halves; the activation takes the first half if ``gate_first``.
    """

    bias: bool
    std: float = 0.02
    fused: bool = False
    gate_first: bool = True


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """What a blueprint needs to know of a site.

    ``head_std`` and ``tail_std`` are standard deviations of the host's own weights when the branch is made: new
    weights start on the same scale. ``read_features`` counts the input features a branch reads: the host's own input
    and, behind it, what an upstream annex has grown (see ``Site.read``).
    """

    kind: SiteKind
    in_features: int
    out_features: int
    hidden_features: int
    head_bias: bool
    activation: Activation | None = None
    dropout: float = 0.0
    norm: NormGeometry | None = None
    gate: GateGeometry | None = None
    head_conv: ConvGeometry | None = None
    tail_conv: ConvGeometry | None = None
    head_std: float = 0.02
    tail_std: float = 0.02
    x_shape: tuple[int, ...] = ()
    """Shape of a layer site's input and, below, of its output in the probe forward."""
    y_shape: tuple[int, ...] = ()
    sequence_axis: int | None = None
    """Axis of ``y`` along which a layer site's positions follow each other; ``None`` where it has none."""
    holds_shift: bool = True
    """Whether the host's layer could hold a bias (an RMSNorm cannot)."""

    @property
    def feature_axis(self) -> int:
        """Axis of ``y`` that holds features: 1 for convolutions and channel norms, the last one otherwise."""
        return 1 if self.kind.channels_first else -1

    @property
    def sample_axis(self) -> int:
        """Axis of ``y`` that tells samples apart: the second one of sequence-first batches."""
        return 1 if self.sequence_axis == 0 and len(self.y_shape) > 2 else 0

    @property
    def captured_features(self) -> int:
        """Numbers that a captured input row holds: an embedding's is one token id."""
        return 1 if self.kind is SiteKind.EMBEDDING_LAYER else self.in_features
