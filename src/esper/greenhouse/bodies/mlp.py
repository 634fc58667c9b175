"""MLPs: Linear layers with ReLU between them; every hidden layer is a site. Backward is by hand, without autograd."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Generator, Tensor, nn

from esper.greenhouse.bodies.body import Body, Pass, Span
from esper.greenhouse.layout import Part, Weights
from esper.protocol import SiteKind


class MLP(Body):
    """``inputs`` and ``outputs`` of every host, and hidden layers between them."""

    kind = SiteKind.LINEAR_SPAN
    blueprint = "bottleneck"
    starts = ("negative_gradient", "random_zero", "tiny")

    def __init__(self, inputs: int, hidden_layers: int, outputs: int) -> None:
        last = hidden_layers
        self.parts = tuple(
            Part(
                str(2 * layer),
                rows=outputs if layer == last else 0,
                columns=0 if layer else inputs,
                rows_of=None if layer == last else layer,
                columns_of=layer - 1 if layer else None,
            )
            for layer in range(last + 1)
        )
        self.spans = tuple(Span(f"{2 * site}-{2 * site + 2}", head=site, tail=site + 1) for site in range(last))

    def draw(self, widths: Sequence[int], generator: Generator) -> list[tuple[Tensor, Tensor | None]]:
        """As ``nn.Linear`` draws them: uniform within one over the root of inputs."""
        found: list[tuple[Tensor, Tensor | None]] = []
        for part in self.parts:
            rows, columns = part.shape(widths)
            bound = columns**-0.5
            weight = torch.empty(rows, columns).uniform_(-bound, bound, generator=generator)
            found.append((weight, torch.empty(rows).uniform_(-bound, bound, generator=generator)))
        return found

    def module(self, widths: Sequence[int], generator: Generator, dtype: torch.dtype) -> nn.Sequential:
        layers: list[nn.Module] = []
        for weight, bias in self.draw(widths, generator):
            assert bias is not None
            layer = nn.Linear(weight.shape[1], weight.shape[0], dtype=dtype)
            with torch.no_grad():
                layer.weight.copy_(weight)
                layer.bias.copy_(bias)
            layers += [layer, nn.ReLU()]
        return nn.Sequential(*layers[:-1])

    def forward(
        self, weights: Weights, x: Tensor, alphas: Sequence[Tensor] | None = None, *, learns: bool = False
    ) -> Pass:
        read = x
        inputs, before = dict[int, Tensor](), list[Tensor]()
        for layer, (weight, bias) in enumerate(weights):
            inputs[layer] = read
            z = torch.baddbmm(bias.unsqueeze(1), read, weight.transpose(1, 2))
            before.append(z)
            if layer + 1 < len(weights):
                read = z.relu()
                if alphas is not None:
                    read.mul_(alphas[layer].unsqueeze(1))
        return Pass(before[-1], inputs, before)

    def backward(
        self, weights: Weights, gradients: Weights, run: Pass, delta: Tensor, alphas: Sequence[Tensor] | None = None
    ) -> Sequence[Tensor]:
        deltas = [delta]
        for layer in reversed(range(len(weights))):
            weight, bias = gradients[layer]
            weight.copy_(torch.bmm(delta.transpose(1, 2), run.inputs[layer]))
            bias.copy_(delta.sum(1))
            if layer:
                delta = torch.bmm(delta, weights[layer][0])
                delta.mul_(run.kept[layer - 1] > 0)
                if alphas is not None:
                    delta.mul_(alphas[layer - 1].unsqueeze(1))
                deltas.append(delta)
        return deltas[::-1]
