"""Follow a layer's output through the probe's record to the layer that ends its span, or say what stands in the way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from esper.kasmina.geometry import Activation, activation_arguments, is_activation
from esper.kasmina.layers import BatchNorm, conv_geometry, features, is_conv
from esper.kasmina.tracing import Operation, Trace


@dataclass
class SpanPath:
    """What lies between the ends of a span.

    ``up`` is the second factor of a gated span where it is a layer of its own; in a fused one the activation takes the
    first or the second half of the head's output, as ``gate_first`` says.
    """

    tail: nn.Module
    activation: Activation
    dropout: float
    norm: BatchNorm | None
    up: nn.Module | None
    gate_first: bool | None

    @property
    def is_gated(self) -> bool:
        return self.up is not None or self.gate_first is not None


class _Refusal(Exception):
    """Why no span starts at a layer."""


def follow(
    probe: Trace, start: Operation, head: nn.Module, usable: Mapping[int, nn.Module], norms: Mapping[int, BatchNorm]
) -> SpanPath | str:
    """The span that starts with ``start``, the call of ``head``; or the reason why there is none.

    Parameters
    ----------
    usable:
        Layers that can grow, by id of their weight.
    norms:
        Batch norms with running statistics, by id of their running mean.
    """
    try:
        return _Walk(probe, start, head, usable, norms).run()
    except _Refusal as refusal:
        return str(refusal)


class _Walk:
    def __init__(
        self,
        probe: Trace,
        start: Operation,
        head: nn.Module,
        usable: Mapping[int, nn.Module],
        norms: Mapping[int, BatchNorm],
    ) -> None:
        self.probe, self.start, self.head, self.usable, self.norms = probe, start, head, usable, norms
        self.activation: Activation | None = None
        self.dropout = 0.0
        self.norm: BatchNorm | None = None
        self.up: nn.Module | None = None
        self.gate_first: bool | None = None

    def run(self) -> SpanPath:
        value = self.start.outputs[0]
        while True:
            step = self._reader(value)
            if step.weight is not None:
                return self._end(step, value)
            value = self._pass(step, value)

    def _reader(self, value: int) -> Operation:
        step = self.probe.sole_consumer(value)
        if step is None:
            readers = len(self.probe.consumers.get(value, []))
            raise _Refusal(f"its output is read {readers} times, so no span starts here")
        return step

    def _end(self, step: Operation, value: int) -> SpanPath:
        tail = self.usable.get(step.weight) if step.weight is not None else None
        if tail is None or not _of_one_family(self.head, tail):
            raise _Refusal("leads to a layer that cannot end a span")
        if step.inputs[0] != value:
            raise _Refusal("its output is used as a weight")
        if self.activation is None:
            raise _Refusal("leads to the next layer without an activation between them")
        return SpanPath(tail, self.activation, self.dropout, self.norm, self.up, self.gate_first)

    def _pass(self, step: Operation, value: int) -> int:
        """Take in one operation and return the value to go on with."""
        gated = self.up is not None or self.gate_first is not None
        if is_activation(step.name) and self.activation is None:
            self._activate(step)
        elif step.name == "dropout" and self.activation is not None:
            share = float(step.arguments.get("p", step.arguments.get("_1", 0.5)))
            self.dropout = 1 - (1 - self.dropout) * (1 - share)
        elif step.name == "batch_norm" and self.activation is None and self.norm is None and self._is_own_norm(step):
            assert step.statistics is not None
            self.norm = self.norms[step.statistics]
        elif step.name == "mul" and len(step.inputs) == 2 and self.activation is not None and not gated:
            self._multiply(step, value)
        elif step.name in ("chunk", "glu") and self.activation is None and self._cuts_in_two(step):
            return self._halve(step)
        else:
            raise _unrepeatable(step)
        return step.outputs[0]

    def _activate(self, step: Operation) -> None:
        kept = activation_arguments(step.name, step.arguments)
        if kept is None:
            raise _Refusal(f"passes unnamed arguments to {step.name}")
        self.activation = Activation(step.name, kept)

    def _is_own_norm(self, step: Operation) -> bool:
        return is_conv(self.head) and step.statistics in self.norms

    # ---------------------------------------------------------------------------------------------- gates

    def _multiply(self, step: Operation, value: int) -> None:
        """``act(gate(x)) * up(x)``: the other factor must be a layer's output on the same input, of the same width."""
        other = step.inputs[1] if step.inputs[0] == value else step.inputs[0]
        source = self.probe.producer(other)
        if source is None or source.weight is None or source.inputs[0] != self.start.inputs[0]:
            raise _Refusal("is multiplied by something other than a layer's output on the same input")
        up = self.usable.get(source.weight)
        if up is None:
            raise _Refusal("is multiplied by the output of a layer that cannot grow")
        if is_conv(self.head) or is_conv(up):
            raise _Refusal("is multiplied by another layer's output, which only Linear layers can repeat")
        if features(up)[1] != features(self.head)[1]:
            raise _Refusal("is multiplied by a layer's output of another width")
        if self.probe.sole_consumer(other) is not step:
            raise _Refusal("is multiplied by a layer's output that is read elsewhere too")
        self.up = up

    def _cuts_in_two(self, step: Operation) -> bool:
        """Whether the layer's features are halved (and not its rows), by a rule that still holds when it is wider."""
        width = features(self.head)[1]
        if is_conv(self.head) or width % 2 or step.shape != (*self.start.shape[:-1], width // 2):
            return False
        return step.name == "glu" or len(step.outputs) == 2

    def _halve(self, step: Operation) -> int:
        if step.name == "glu":  # first half times sigmoid of the second
            self.activation, self.gate_first = Activation("sigmoid"), False
            return step.outputs[0]
        readers = [self._reader(half) for half in step.outputs]
        activated = [is_activation(reader.name) for reader in readers]
        if sum(activated) != 1:
            raise _Refusal("is cut in two halves of which not exactly one passes through an activation")
        self.gate_first = activated[0]
        gate, other = (0, 1) if self.gate_first else (1, 0)
        self._activate(readers[gate])
        product = self._reader(readers[gate].outputs[0])
        factors = {readers[gate].outputs[0], step.outputs[other]}
        if product.name != "mul" or set(product.inputs) != factors:
            raise _Refusal("is cut in two halves that are not multiplied with each other")
        return product.outputs[0]


def _of_one_family(head: nn.Module, tail: nn.Module) -> bool:
    """Both convolutions of one dimension, or both matrices."""
    one, two = conv_geometry(head), conv_geometry(tail)
    if one is None or two is None:
        return one is two
    return len(one.kernel) == len(two.kernel)


def _unrepeatable(step: Operation) -> _Refusal:
    return _Refusal(f"its output passes through {step.name!r}, which a branch cannot repeat on its own")
