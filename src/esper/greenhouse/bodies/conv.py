"""Convolutional networks: every hidden layer but the last is a site. The hosts of a stack are the groups of one
convolution; backward is by hand.

Shapes: N hosts, B images a batch, C channels of a host, S pixels a side.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from esper.greenhouse.bodies.body import Body, Pass, Span
from esper.greenhouse.bodies.modules import KERNEL, LAST_CHANNELS, conv_net, first_weights, with_first_weights
from esper.greenhouse.layout import ROUND_TO, Part, Weights
from esper.protocol import SiteKind

_STRIDE = 2
"""Of the first convolution."""
_PADDING = KERNEL // 2


class ConvNet(Body):
    """As :func:`esper.greenhouse.bodies.modules.conv_net`: ``channels`` and ``side`` of an image, ``sites`` hidden
    layers that grow. What a part reads lies as ``(B, N * C, S, S)``."""

    kind = SiteKind.CONV_SPAN
    blueprint = "bottleneck_conv"

    def __init__(self, channels: int, side: int, sites: int, outputs: int) -> None:
        self.channels, self.outputs = channels, outputs
        taps, positions = KERNEL**2, (-(-side // _STRIDE)) ** 2
        convolutions = [
            Part(
                str(2 * layer),
                rows=LAST_CHANNELS if layer == sites else 0,
                columns=0 if layer else channels,
                rows_of=None if layer == sites else layer,
                columns_of=layer - 1 if layer else None,
                taps=taps,
                uses=positions,
            )
            for layer in range(sites + 1)
        ]
        self.parts = (*convolutions, Part(str(2 * sites + 4), rows=outputs, columns=LAST_CHANNELS))
        self.spans = tuple(
            Span(f"{2 * s}-{2 * s + 2}", head=s, tail=s + 1, head_taps=taps, tail_taps=taps, positions=positions)
            for s in range(sites)
        )

    def draw(self, widths: Sequence[int], generator: Generator) -> list[tuple[Tensor, Tensor | None]]:
        shapes: dict[str, tuple[int, ...]] = {}
        for part in self.parts:
            rows, columns = part.shape(widths)
            kernel = (KERNEL, KERNEL) if part.taps > 1 else ()
            shapes |= {f"{part.name}.weight": (rows, columns, *kernel), f"{part.name}.bias": (rows,)}
        drawn = first_weights(shapes, generator)
        names = [part.name for part in self.parts]
        weights = [drawn[f"{name}.weight"] for name in names]
        flat = [weight.flatten(2) if weight.dim() == 4 else weight for weight in weights]
        return [(weight, drawn[f"{name}.bias"]) for name, weight in zip(names, flat, strict=True)]

    def module(self, widths: Sequence[int], generator: Generator, dtype: torch.dtype) -> nn.Module:
        return with_first_weights(conv_net(self.channels, widths, self.outputs), generator, dtype)

    def forward(
        self, weights: Weights, x: Tensor, alphas: Sequence[Tensor] | None = None, *, learns: bool = False
    ) -> Pass:
        num, rows = x.shape[:2]
        read = x.transpose(0, 1).flatten(1, 2).contiguous()
        inputs, active, last = dict[int, Tensor](), list[Tensor](), len(self.spans)
        for layer, (weight, bias) in enumerate(weights[:-1]):
            inputs[layer] = read
            stride = 1 if layer else _STRIDE
            room = -bias.shape[1] % ROUND_TO
            z = F.conv2d(read, _kernels(weight, room), F.pad(bias, (0, room)).flatten(), stride, _PADDING, groups=num)
            read = z.relu_()
            active.append(read)
            if alphas is not None and layer < last:
                read = read * alphas[layer].view(1, -1, 1, 1)
        pooled = read.mean((2, 3)).view(rows, num, -1)[:, :, :LAST_CHANNELS].transpose(0, 1)
        inputs[last + 1] = pooled
        weight, bias = weights[-1]
        return Pass(torch.baddbmm(bias.unsqueeze(1), pooled, weight.transpose(1, 2)), inputs, active)

    def backward(
        self, weights: Weights, gradients: Weights, run: Pass, delta: Tensor, alphas: Sequence[Tensor] | None = None
    ) -> Sequence[Tensor]:
        num, rows = delta.shape[:2]
        last = len(self.spans)
        weight, bias = gradients[-1]
        weight.copy_(torch.bmm(delta.transpose(1, 2), run.inputs[last + 1]))
        bias.copy_(delta.sum(1))
        active = run.kept[last]
        pooled = torch.bmm(delta, weights[-1][0]).div_(active[0, 0].numel())
        pooled = F.pad(pooled, (0, -LAST_CHANNELS % ROUND_TO))
        back = pooled.transpose(0, 1).reshape(rows, -1, 1, 1).expand_as(active)
        for layer in reversed(range(last + 1)):
            if alphas is not None and layer < last:
                back = back * alphas[layer].view(1, -1, 1, 1)
            back = back * (run.kept[layer] > 0)
            stride, (own, own_bias) = 1 if layer else _STRIDE, gradients[layer]
            kernels = _kernels(weights[layer][0], -own.shape[1] % ROUND_TO)
            back, weight, bias = torch.ops.aten.convolution_backward(
                back, run.inputs[layer], kernels, [kernels.shape[0]], [stride] * 2, [_PADDING] * 2, [1, 1], False,
                [0, 0], num, [layer > 0, True, True],
            )  # fmt: skip
            own.copy_(weight.view(num, -1, *own.shape[2:])[:, : own.shape[1]])
            own_bias.copy_(bias.view(num, -1)[:, : own.shape[1]])
        return []

    def tail_rows(self, run: Pass, site: int, host: int, places: Tensor | slice) -> Tensor:
        images = run.inputs[self.spans[site].tail].unflatten(1, (run.output.shape[0], -1))[:, host, places]
        return F.unfold(images, KERNEL, padding=_PADDING).transpose(1, 2).flatten(0, 1)


def _kernels(weight: Tensor, room: int) -> Tensor:
    """``(N, O, C, taps)`` as the kernels of one convolution in N groups, with ``room`` more outputs a host.

    Outputs in multiples of :data:`ROUND_TO` are computed several times as fast as twelve.
    """
    return F.pad(weight, (0, 0, 0, 0, 0, room)).flatten(0, 1).unflatten(2, (KERNEL, KERNEL))
