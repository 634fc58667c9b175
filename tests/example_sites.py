"""One small example of every kind of site: its geometry, inputs that fit, and real layers of that shape."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from tests.span_hosts import Conv1D
from torch import Tensor, nn

from esper.config import Config, FitConfig, SitesConfig
from esper.kasmina.bank import Bank
from esper.kasmina.blueprints import Parts
from esper.kasmina.discovery import discover
from esper.kasmina.execution import Kasmina
from esper.kasmina.geometry import Activation, ConvGeometry, GateGeometry, Geometry, NormGeometry
from esper.protocol import SiteKind

_SAME = ConvGeometry((3, 3), (1, 1), (1, 1), (1, 1))
_STRIDED = ConvGeometry((3, 3), (2, 2), (1, 1), (1, 1))
_DILATED = ConvGeometry((3, 3), (1, 1), (2, 2), (2, 2))
_POINT = ConvGeometry((1, 1), (1, 1), (0, 0), (1, 1))
_SAME_1D = ConvGeometry((3,), (1,), (1,), (1,))
_STRIDED_1D = ConvGeometry((3,), (2,), (1,), (1,))
_SAME_3D = ConvGeometry((3, 1, 3), (1, 1, 1), (1, 0, 1), (1, 1, 1))
_STRIDED_3D = ConvGeometry((1, 3, 3), (1, 2, 2), (0, 1, 1), (1, 1, 1))
_CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


@dataclass(frozen=True)
class Example:
    """A geometry and the shape of an input (batch first)."""

    name: str
    geometry: Geometry
    x_shape: tuple[int, ...]
    transposed: bool = False
    """Whether the host's layers store their weights as (in, out)."""

    @property
    def y_shape(self) -> tuple[int, ...]:
        if self.geometry.y_shape and not self.geometry.kind.is_conv:
            return self.geometry.y_shape
        if not self.geometry.kind.is_conv:
            return (*self.x_shape[:-1], self.geometry.out_features)
        sides = list(self.x_shape[2:])
        for conv in self.convs:
            sides = [-(-side // stride) for side, stride in zip(sides, conv.stride, strict=True)]
        return (self.x_shape[0], self.geometry.out_features, *sides)

    @property
    def convs(self) -> list[ConvGeometry]:
        head, tail = self.geometry.head_conv, self.geometry.tail_conv
        assert head is not None and tail is not None
        return [head, tail] if self.geometry.kind.is_span else [head]

    @property
    def positions(self) -> int:
        """Output rows of one call."""
        shape = self.y_shape
        return torch.Size(shape).numel() // self.geometry.out_features

    def x(self, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
        source = torch.Generator().manual_seed(seed)
        if self.geometry.kind is SiteKind.EMBEDDING_LAYER:  # token ids, one feature a row, as a site hands them on
            return torch.randint(self.geometry.in_features, (*self.x_shape, 1), generator=source)
        return torch.randn(self.x_shape, generator=source).to(dtype)

    def rows(self, num: int, generator: torch.Generator) -> Tensor:
        """``num`` captured inputs: images, rows of features, or token ids."""
        if self.geometry.kind is SiteKind.EMBEDDING_LAYER:
            return torch.randint(self.geometry.in_features, (num, 1), generator=generator)
        inside = self.x_shape[1:] if self.geometry.kind.is_conv else self.x_shape[-1:]
        return torch.randn((num, *inside), generator=generator)

    def y(self, *, seed: int = 5, dtype: torch.dtype = torch.float32) -> Tensor:
        """Some output of the host's layer."""
        return torch.randn(self.y_shape, generator=torch.Generator().manual_seed(seed)).to(dtype)

    def call(self, layer: nn.Module, x: Tensor) -> Tensor:
        """The first output of a layer (site or exported) on ``x``."""
        if self.geometry.kind is SiteKind.EMBEDDING_LAYER:
            return layer(x[..., 0])
        if self.geometry.kind is SiteKind.ATTENTION_LAYER:
            return layer(x, x, x, need_weights=False)[0]
        out = layer(x)
        return out[0] if isinstance(out, tuple) else out

    def layers(self) -> nn.Module:
        """The host's own layers; see :func:`parts_of` for what they are to the site."""
        g = self.geometry
        linear = _transposed if self.transposed else nn.Linear
        if g.kind is SiteKind.LINEAR_LAYER:
            return nn.Sequential(linear(g.in_features, g.out_features, g.head_bias))
        if g.kind is SiteKind.LINEAR_SPAN:
            head = linear(g.in_features, g.hidden_features, g.head_bias)
            return nn.Sequential(head, _Act(g), linear(g.hidden_features, g.out_features))
        if g.kind is SiteKind.LINEAR_GATED_SPAN:
            return _Gated(g)
        if g.kind in _OTHER:
            return nn.Sequential(_OTHER[g.kind](g))
        if g.kind is SiteKind.CONV_LAYER:
            assert g.head_conv is not None
            return nn.Sequential(_conv(g.in_features, g.out_features, g.head_conv, g.head_bias))
        assert g.head_conv is not None and g.tail_conv is not None
        parts: list[nn.Module] = [_conv(g.in_features, g.hidden_features, g.head_conv, g.head_bias)]
        if g.norm is not None:
            norm = _NORMS[len(g.head_conv.kernel)]
            parts.append(norm(g.hidden_features, g.norm.eps, g.norm.momentum, g.norm.affine))
        parts += [_Act(g), _conv(g.hidden_features, g.out_features, g.tail_conv, True)]
        return nn.Sequential(*parts)


def _norm(g: Geometry) -> nn.Module:
    return nn.LayerNorm(g.in_features) if g.holds_shift else nn.RMSNorm(g.in_features)


def _channel_norm(g: Geometry) -> nn.Module:
    return nn.BatchNorm1d(g.in_features) if len(g.y_shape) == 2 else nn.GroupNorm(2, g.in_features)


_OTHER: dict[SiteKind, Callable[[Geometry], nn.Module]] = {
    SiteKind.NORM_LAYER: _norm,
    SiteKind.CHANNEL_NORM_LAYER: _channel_norm,
    SiteKind.EMBEDDING_LAYER: lambda g: nn.Embedding(g.in_features, g.out_features),
    SiteKind.ATTENTION_LAYER: lambda g: nn.MultiheadAttention(
        g.in_features, 2, bias=g.head_bias, batch_first=g.sequence_axis == 1
    ),
    SiteKind.RECURRENT_LAYER: lambda g: nn.GRU(
        g.in_features, g.out_features // 2, batch_first=g.sequence_axis == 1, bidirectional=True
    ),
}


def parts_of(host: nn.Module) -> Parts:
    """What the layers of an example are to its site."""
    if isinstance(host, _Gated):
        return Parts(host.gate, host.down, None, host.up)
    assert isinstance(host, nn.Sequential)
    return Parts(host[0], host[-1], next((m for m in host if isinstance(m, tuple(_NORMS.values()))), None))


def with_parts(host: nn.Module, parts: Parts) -> nn.Module:
    """The same host around other layers."""
    if isinstance(host, _Gated):
        plain = _Gated(host.geometry)
        plain.gate, plain.up, plain.down = parts.head, parts.up, parts.tail
        return plain
    assert isinstance(host, nn.Sequential)
    layers = list(host)
    layers[0], layers[-1] = parts.head, parts.tail
    if parts.norm is not None:
        layers[1] = parts.norm
    return nn.Sequential(*layers)


class _Gated(nn.Module):
    """A gated span; without ``up`` its first layer makes both factors."""

    def __init__(self, geometry: Geometry) -> None:
        super().__init__()
        g, gate = geometry, geometry.gate
        assert gate is not None
        self.geometry = g
        self.gate = nn.Linear(g.in_features, g.hidden_features * (2 if gate.fused else 1), g.head_bias)
        self.up = None if gate.fused else nn.Linear(g.in_features, g.hidden_features, gate.bias)
        self.down = nn.Linear(g.hidden_features, g.out_features)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.geometry.gate
        assert gate is not None and self.geometry.activation is not None
        if self.up is not None:
            activated, other = self.gate(x), self.up(x)
        else:
            first, second = self.gate(x).chunk(2, -1)
            activated, other = (first, second) if gate.gate_first else (second, first)
        return self.down(self.geometry.activation(activated) * other)


class _Act(nn.Module):
    def __init__(self, geometry: Geometry) -> None:
        super().__init__()
        assert geometry.activation is not None
        self.activation = geometry.activation

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(x)


def _transposed(inputs: int, outputs: int, bias: bool = True) -> nn.Module:
    assert bias
    return Conv1D(outputs, inputs)


def _conv(inputs: int, outputs: int, conv: ConvGeometry, bias: bool) -> nn.Module:
    return _CONVS[len(conv.kernel)](inputs, outputs, conv.kernel, conv.stride, conv.padding, conv.dilation, bias=bias)


def _conv_span(norm: NormGeometry | None, head: ConvGeometry, tail: ConvGeometry, *, bias: bool) -> Geometry:
    return Geometry(
        kind=SiteKind.CONV_SPAN, in_features=3, out_features=6, hidden_features=4, head_bias=bias,
        activation=Activation("relu"), norm=norm, head_conv=head, tail_conv=tail, head_std=0.3, tail_std=0.2,
    )  # fmt: skip


def _linear_span(activation: Activation, *, bias: bool) -> Geometry:
    return Geometry(
        kind=SiteKind.LINEAR_SPAN, in_features=5, out_features=6, hidden_features=7, head_bias=bias,
        activation=activation, head_std=0.4, tail_std=0.3,
    )  # fmt: skip


def _layer(
    name: str, kind: SiteKind, reads: int, out: int, x_shape: tuple[int, ...], y_shape: tuple[int, ...], *,
    axis: int | None = None, bias: bool = True, shift: bool = True, transposed: bool = False,
) -> Example:  # fmt: skip
    geometry = Geometry(
        kind=kind, in_features=reads, out_features=out, hidden_features=0, head_bias=bias, head_std=0.4, tail_std=0.4,
        x_shape=x_shape, y_shape=y_shape, sequence_axis=axis, holds_shift=shift,
    )  # fmt: skip
    return Example(name, geometry, x_shape, transposed)


def _gated_span(activation: str, *, bias: bool, gate: GateGeometry) -> Geometry:
    return Geometry(
        kind=SiteKind.LINEAR_GATED_SPAN, in_features=5, out_features=6, hidden_features=7, head_bias=bias,
        activation=Activation(activation), gate=gate, head_std=0.4, tail_std=0.3,
    )  # fmt: skip


def _conv_layer(name: str, conv: ConvGeometry, x_shape: tuple[int, ...], y_shape: tuple[int, ...]) -> Example:
    geometry = Geometry(
        kind=SiteKind.CONV_LAYER, in_features=3, out_features=6, hidden_features=0, head_bias=True,
        head_conv=conv, tail_conv=conv, head_std=0.3, tail_std=0.3, x_shape=x_shape, y_shape=y_shape,
    )  # fmt: skip
    return Example(name, geometry, x_shape)


EXAMPLES: dict[SiteKind, Sequence[Example]] = {
    SiteKind.LINEAR_SPAN: (
        Example("relu", _linear_span(Activation("relu"), bias=True), (12, 5)),
        Example(
            "gelu-tanh-3d", _linear_span(Activation("gelu", (("approximate", "tanh"),)), bias=False), (3, 4, 5)
        ),
        Example("transposed", _linear_span(Activation("tanh"), bias=True), (3, 4, 5), transposed=True),
    ),
    SiteKind.LINEAR_GATED_SPAN: (
        Example("swiglu", _gated_span("silu", bias=False, gate=GateGeometry(False, 0.4)), (12, 5)),
        Example("up-biased", _gated_span("gelu", bias=False, gate=GateGeometry(True, 0.4)), (3, 4, 5)),
        Example("fused", _gated_span("silu", bias=True, gate=GateGeometry(True, 0.4, True)), (3, 4, 5)),
        Example("fused-second", _gated_span("gelu", bias=False, gate=GateGeometry(False, 0.4, True, False)), (12, 5)),
    ),
    SiteKind.CONV_SPAN: (
        Example("norm", _conv_span(NormGeometry(1e-5, 0.1, True), _SAME, _SAME, bias=False), (4, 3, 6, 6)),
        Example("norm-not-affine", _conv_span(NormGeometry(1e-3, None, False), _SAME, _POINT, bias=True), (4, 3, 5, 5)),
        Example("strided-head", _conv_span(NormGeometry(1e-5, 0.1, True), _STRIDED, _SAME, bias=False), (4, 3, 6, 6)),
        Example("strided-tail", _conv_span(None, _SAME, _STRIDED, bias=True), (4, 3, 6, 6)),
        Example("dilated", _conv_span(None, _DILATED, _POINT, bias=True), (2, 3, 7, 7)),
        Example("1d", _conv_span(NormGeometry(1e-5, 0.1, True), _SAME_1D, _STRIDED_1D, bias=False), (4, 3, 8)),
        Example("3d", _conv_span(NormGeometry(1e-5, 0.1, True), _STRIDED_3D, _SAME_3D, bias=True), (2, 3, 4, 6, 4)),
    ),
    SiteKind.LINEAR_LAYER: (
        _layer("linear", SiteKind.LINEAR_LAYER, 5, 6, (12, 5), (12, 6)),
        _layer("linear-3d", SiteKind.LINEAR_LAYER, 5, 6, (3, 4, 5), (3, 4, 6), axis=1, bias=False),
        _layer("transposed", SiteKind.LINEAR_LAYER, 5, 6, (3, 4, 5), (3, 4, 6), axis=1, transposed=True),
    ),
    SiteKind.NORM_LAYER: (
        _layer("layer-norm", SiteKind.NORM_LAYER, 6, 6, (3, 4, 6), (3, 4, 6), axis=1),
        _layer("rms-norm", SiteKind.NORM_LAYER, 6, 6, (4, 3, 6), (4, 3, 6), axis=0, shift=False),
    ),
    SiteKind.CHANNEL_NORM_LAYER: (
        _layer("batch-norm-1d", SiteKind.CHANNEL_NORM_LAYER, 6, 6, (12, 6), (12, 6)),
        _layer("group-norm", SiteKind.CHANNEL_NORM_LAYER, 6, 6, (3, 6, 5, 5), (3, 6, 5, 5)),
    ),
    SiteKind.EMBEDDING_LAYER: (
        _layer("embedding", SiteKind.EMBEDDING_LAYER, 9, 6, (5, 7), (5, 7, 6), axis=1),
    ),
    SiteKind.ATTENTION_LAYER: (
        _layer("batch-first", SiteKind.ATTENTION_LAYER, 6, 6, (3, 4, 6), (3, 4, 6), axis=1),
        _layer("sequence-first", SiteKind.ATTENTION_LAYER, 6, 6, (4, 3, 6), (4, 3, 6), axis=0, bias=False, shift=False),
    ),
    SiteKind.RECURRENT_LAYER: (
        _layer("batch-first", SiteKind.RECURRENT_LAYER, 5, 6, (3, 4, 5), (3, 4, 6), axis=1),
        _layer("sequence-first", SiteKind.RECURRENT_LAYER, 5, 6, (4, 3, 5), (4, 3, 6), axis=0),
    ),
    SiteKind.CONV_LAYER: (
        _conv_layer("conv-strided", _STRIDED, (4, 3, 6, 6), (4, 6, 3, 3)),
        _conv_layer("1d", _STRIDED_1D, (4, 3, 8), (4, 6, 4)),
        _conv_layer("3d", _SAME_3D, (2, 3, 4, 3, 4), (2, 6, 4, 3, 4)),
    ),
}  # fmt: skip


def make_bank(
    blueprint: str, example: Example, *, slots: int = 1, units: int = 4, seed: int = 0, whole: bool | None = None
) -> Bank:
    """A bank at its random start; ``slots`` > 1 gives each slot two columns of its own."""
    whole = slots == 1 if whole is None else whole
    out = example.geometry.out_features
    columns = None if whole else torch.arange(out).flip(0)[: 2 * slots].reshape(slots, 2)
    return Bank(
        blueprint, example.geometry, units=units, reads=example.geometry.in_features, columns=columns,
        generator=torch.Generator().manual_seed(seed), device=torch.device("cpu"),
    )  # fmt: skip


def attached(model: nn.Module, x: Tensor, *, layers: bool = False, fit: FitConfig | None = None) -> Kasmina:
    """Kasmina on ``model``, found by a probe forward in evaluation mode."""
    was = model.training
    model.eval()
    found = discover(model, lambda: model(x), SitesConfig(layers=layers))
    model.train(was)
    return Kasmina(model, found, Config(fit=fit or FitConfig()), adaptive=True)


def plant(
    kasmina: Kasmina,
    site: str,
    blueprint: str,
    *,
    units: int = 4,
    cohort: int = 1,
    columns: Tensor | None = None,
    alpha: float = 1.0,
) -> Bank:
    """Put a random branch into the forward pass of a site, past all gates."""
    here = kasmina.sites[site]
    bank = Bank(
        blueprint, here.geometry, units=units, reads=here.reads, columns=columns, generator=kasmina.generator,
        device=kasmina.device,
    )  # fmt: skip
    bank.alpha.fill_(alpha)
    here.banks[cohort] = bank
    here.grafted.add(cohort)
    kasmina.refresh()
    return bank


def settle(kasmina: Kasmina, site: str, *, cohort: int = 1, betas: tuple[float, float] = (0.9, 0.999)) -> Bank:
    """Make a planted branch permanent, as ``Kasmina.fossilise`` does with a cohort of the table."""
    from esper.kasmina.annex import fossilise

    here = kasmina.sites[site]
    before = here.grown_units
    annex = fossilise(here, cohort, list(range(here.banks[cohort].num_slots)), betas=betas)
    here.grafted.discard(cohort)
    del here.banks[cohort]
    for other in kasmina.sites.values():
        if other.upstream is here:
            for bank in [*other.banks.values(), *([other.annex] if other.annex is not None else [])]:
                bank.widen_reads(here.grown_units - before)
    kasmina.refresh()
    return annex
