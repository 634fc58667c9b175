"""Transformers: the feed-forward layer of every block is a site. Backward is by hand, without autograd.

Shapes: N hosts, B sequences a batch, T tokens a sequence, R = B * T, D features, H heads, V tokens there are, U units.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Generator, Tensor, nn

from esper.greenhouse.bodies.body import Body, Pass, Span
from esper.greenhouse.bodies.modules import FEATURES, HEADS, first_weights, with_first_weights
from esper.greenhouse.bodies.modules import Transformer as TransformerModule
from esper.greenhouse.layout import Part, Weights
from esper.greenhouse.tasks import LENGTH
from esper.protocol import SiteKind

_EPS = 1e-5
"""Of every norm."""
_EMBEDDING, _POSITION, _FIRST = 0, 1, 2
"""Numbers of parts: the two embeddings, and the first one of the first block."""
_IN_BLOCK = 6
"""Parts of a block: norm, attention's two layers, norm, up, down."""
_SCALE = (FEATURES // HEADS) ** -0.5


class Transformer(Body):
    """As :class:`esper.greenhouse.bodies.modules.Transformer`, with one block a site."""

    kind = SiteKind.LINEAR_SPAN
    blueprint = "bottleneck"

    def __init__(self, tokens: int, sites: int, outputs: int) -> None:
        self.tokens, self.outputs = tokens, outputs
        parts = [
            Part("embedding", rows=tokens, columns=FEATURES, bias=False, uses=0),
            Part("position", rows=LENGTH, columns=FEATURES, bias=False, uses=0),
        ]
        for site in range(sites):
            name = f"blocks.{site}"
            parts += [
                Part(f"{name}.before_attention", rows=FEATURES, columns=1, uses=0),
                Part(f"{name}.attention.into", rows=3 * FEATURES, columns=FEATURES, uses=LENGTH),
                Part(f"{name}.attention.out", rows=FEATURES, columns=FEATURES, uses=LENGTH),
                Part(f"{name}.before_up", rows=FEATURES, columns=1, uses=0),
                Part(f"{name}.up", rows_of=site, columns=FEATURES, uses=LENGTH),
                Part(f"{name}.down", rows=FEATURES, columns_of=site, uses=LENGTH),
            ]
        parts.append(Part("norm", rows=FEATURES, columns=1, uses=0))
        parts.append(Part("read_out", rows=outputs, columns=FEATURES, uses=LENGTH))
        self.parts = tuple(parts)
        ups = [_FIRST + _IN_BLOCK * site + 4 for site in range(sites)]
        self.spans = tuple(
            Span(f"blocks.{site}.up-down", head=up, tail=up + 1, positions=LENGTH) for site, up in enumerate(ups)
        )

    def draw(self, widths: Sequence[int], generator: Generator) -> list[tuple[Tensor, Tensor | None]]:
        shapes: dict[str, tuple[int, ...]] = {}
        for part in self.parts:
            rows, columns = part.shape(widths)
            shapes[f"{part.name}.weight"] = (rows,) if _is_norm(part) else (rows, columns)
            if part.bias:
                shapes[f"{part.name}.bias"] = (rows,)
        drawn = first_weights(shapes, generator)
        return [
            (drawn[f"{part.name}.weight"].reshape(part.shape(widths)), drawn.get(f"{part.name}.bias"))
            for part in self.parts
        ]

    def module(self, widths: Sequence[int], generator: Generator, dtype: torch.dtype) -> nn.Module:
        return with_first_weights(TransformerModule(self.tokens, widths, self.outputs), generator, dtype)

    def host_flops(self, widths: Sequence[int]) -> float:
        """Attention's two products are no part's."""
        return super().host_flops(widths) + 4.0 * LENGTH**2 * FEATURES * self.num_sites

    def forward(
        self, weights: Weights, x: Tensor, alphas: Sequence[Tensor] | None = None, *, learns: bool = False
    ) -> Pass:
        num, rows = x.shape[:2]
        index = (x.flatten(1) + self.tokens * torch.arange(num)[:, None]).flatten()
        found = weights[_EMBEDDING][0].flatten(0, 1)[index].view(num, rows, LENGTH, FEATURES)
        h = (found + weights[_POSITION][0].unsqueeze(1)).flatten(1, 2)
        inputs, kept = dict[int, Tensor](), [index]
        for site, span in enumerate(self.spans):
            first = span.head - 4
            added, held = _attend(weights[first : first + 3], h, rows)
            h = h + added
            folded, normed = _normed(weights[span.head - 1], weights[span.head], h)
            units = torch.baddbmm(*folded).relu_()
            kept += [*held, *normed, units] if learns else []
            if alphas is not None:
                units = units * alphas[site].unsqueeze(1)
            inputs[span.tail] = units
            h = h + _product(weights[span.tail], units)
        folded, held = _normed(weights[-2], weights[-1], h)
        output = torch.baddbmm(*folded).view(num, rows, LENGTH, -1)
        return Pass(output, inputs, [*kept, *held] if learns else [])

    def backward(
        self, weights: Weights, gradients: Weights, run: Pass, delta: Tensor, alphas: Sequence[Tensor] | None = None
    ) -> Sequence[Tensor]:
        num, rows = delta.shape[:2]
        kept = list(run.kept)
        back = _normed_back(weights[-2:], gradients[-2:], delta.flatten(1, 2), *_last(kept, 2))
        for site, span in reversed(list(enumerate(self.spans))):
            up = slice(span.head - 1, span.head + 1)
            normed, deviation, units = _last(kept, 3)
            inner = _product_back(weights[span.tail], gradients[span.tail], back, run.inputs[span.tail])
            if alphas is not None:
                inner.mul_(alphas[site].unsqueeze(1))
            inner.mul_(units > 0)
            back = back + _normed_back(weights[up], gradients[up], inner, normed, deviation)
            first = slice(span.head - 4, span.head - 1)
            back = back + _attend_back(weights[first], gradients[first], back, _last(kept, 5), rows)
        embedded = gradients[_EMBEDDING][0]
        sums = embedded.new_zeros(num * self.tokens, FEATURES).index_add_(0, kept[0], back.flatten(0, 1))
        embedded.copy_(sums.view_as(embedded))
        gradients[_POSITION][0].copy_(back.unflatten(1, (rows, LENGTH)).sum(1))
        return []


def _is_norm(part: Part) -> bool:
    return part.columns == 1 and not part.uses


def _last(kept: list[Tensor], num: int) -> list[Tensor]:
    """Take the last so many off."""
    found = kept[-num:]
    del kept[-num:]
    return found


Layer = tuple[Tensor, Tensor]
"""Weight and bias of a part."""


def _product(layer: Layer, x: Tensor) -> Tensor:
    weight, bias = layer
    return torch.baddbmm(bias.unsqueeze(1), x, weight.transpose(1, 2))


def _product_back(layer: Layer, gradient: Layer, delta: Tensor, x: Tensor) -> Tensor:
    """Write a layer's gradients; returns that of what it has read."""
    gradient[0].copy_(torch.bmm(delta.transpose(1, 2), x))
    gradient[1].copy_(delta.sum(1))
    return torch.bmm(delta, layer[0])


def _normed(norm: Layer, layer: Layer, h: Tensor) -> tuple[tuple[Tensor, Tensor, Tensor], list[Tensor]]:
    """Arguments of the product of ``layer (norm h)``, whose weights take the norm's scale and shift in; and what
    :func:`_normed_back` needs: normalised features ``(N, R, D)`` and one over their deviation ``(N, R, 1)``."""
    centred = h - h.mean(-1, keepdim=True)
    deviation = centred.square().mean(-1, keepdim=True).add_(_EPS).rsqrt_()
    normed = centred.mul_(deviation)
    (scale, shift), (weight, bias) = norm, layer
    offset = bias + torch.bmm(weight, shift.unsqueeze(2)).squeeze(2)
    return (offset.unsqueeze(1), normed, (weight * scale.transpose(1, 2)).transpose(1, 2)), [normed, deviation]


def _normed_back(layers: Weights, gradients: Weights, delta: Tensor, normed: Tensor, deviation: Tensor) -> Tensor:
    """Write gradients of a norm and of the layer behind it; returns that of the features that were normed."""
    (scale, shift), (weight, _) = layers
    (scales, shifts), (weights, biases) = gradients
    product, total = torch.bmm(delta.transpose(1, 2), normed), delta.sum(1)
    weights.copy_(product * scale.transpose(1, 2) + total.unsqueeze(2) * shift.unsqueeze(1))
    biases.copy_(total)
    scales.copy_((product * weight).sum(1).unsqueeze(2))
    shifts.copy_(torch.bmm(total.unsqueeze(1), weight).squeeze(1))
    back = torch.bmm(delta, weight * scale.transpose(1, 2))
    share = (back * normed).mean(-1, keepdim=True)
    return (back - back.mean(-1, keepdim=True)).sub_(normed * share).mul_(deviation)


def _attend(layers: Weights, h: Tensor, rows: int) -> tuple[Tensor, list[Tensor]]:
    """What a block's attention adds ``(N, R, D)``, and what :func:`_attend_back` needs."""
    folded, held = _normed(layers[0], layers[1], h)
    num, heads = h.shape[0], (rows, LENGTH, 3, HEADS, FEATURES // HEADS)
    made = torch.baddbmm(*folded).unflatten(2, heads[2:]).unflatten(1, heads[:2])
    three = made.permute(3, 0, 1, 4, 2, 5).reshape(3, num * rows * HEADS, LENGTH, -1)
    queries, keys, values = three.unbind()
    scores = torch.baddbmm(_mask(h.dtype), queries, keys.transpose(1, 2), alpha=_SCALE)
    # written out: over so short a last axis it is several times as fast as softmax
    chances = (scores - scores.amax(-1, keepdim=True)).exp_()
    chances.div_(chances.sum(-1, keepdim=True))
    mixed = _joined(torch.bmm(chances, values)[None], num)
    return _product(layers[2], mixed), [*held, three, chances, mixed]


def _mask(dtype: torch.dtype) -> Tensor:
    return torch.full((1, LENGTH, LENGTH), -torch.inf, dtype=dtype).triu_(1)


def _joined(parts: Tensor, num: int) -> Tensor:
    """``(K, N * B * H, T, D / H)`` as features of rows ``(N, R, K * D)``."""
    split = parts.unflatten(1, (num, -1, HEADS))
    return split.permute(1, 2, 4, 0, 3, 5).reshape(num, -1, parts.shape[0] * FEATURES)


def _attend_back(layers: Weights, gradients: Weights, delta: Tensor, kept: list[Tensor], rows: int) -> Tensor:
    normed, deviation, three, chances, mixed = kept
    queries, keys, values = three.unbind()
    back = _product_back(layers[2], gradients[2], delta, mixed)
    heads = back.unflatten(2, (HEADS, -1)).unflatten(1, (rows, LENGTH))
    back = heads.transpose(2, 3).reshape(chances.shape[0], LENGTH, -1)
    inner = torch.bmm(back, values.transpose(1, 2))
    inner.sub_((inner * chances).sum(-1, keepdim=True)).mul_(chances).mul_(_SCALE)
    of_three = torch.empty_like(three)
    torch.bmm(inner, keys, out=of_three[0])
    torch.bmm(inner.transpose(1, 2), queries, out=of_three[1])
    torch.bmm(chances.transpose(1, 2), back, out=of_three[2])
    return _normed_back(layers[:2], gradients[:2], _joined(of_three, delta.shape[0]), normed, deviation)
