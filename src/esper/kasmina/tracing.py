"""One probe forward, recorded as a dataflow of the operations that matter for finding sites."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from esper.kasmina.layers import is_transposed


@dataclass
class Operation:
    """A recorded call: its name, first tensor argument, weight (if any) and further plain arguments.

    ``shape`` is that of the first output.
    """

    name: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    weight: int | None = None
    statistics: int | None = None
    arguments: dict[str, Any] = field(default_factory=dict[str, Any])
    shape: tuple[int, ...] = ()


@dataclass
class ModuleCall:
    """Shapes of a module's first input and output (empty: not a tensor), and the numbers of all its outputs."""

    x_shape: tuple[int, ...]
    y_shape: tuple[int, ...]
    outputs: tuple[int, ...]


@dataclass
class Trace:
    """Values are numbered; an in-place operation gives its tensor a new number."""

    operations: list[Operation] = field(default_factory=list[Operation])
    consumers: dict[int, list[int]] = field(default_factory=lambda: defaultdict(list))
    producers: dict[int, int] = field(default_factory=dict[int, int])
    calls: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    """How often each module ran, by ``id``."""
    values: dict[int, int] = field(default_factory=dict[int, int])
    """First number of each tensor that was read, by ``id``: how often a parameter is read is ``num_readers``."""
    results: dict[int, ModuleCall] = field(default_factory=dict[int, ModuleCall])
    """The last call of each module, by ``id``."""

    def num_readers(self, tensor: Tensor) -> int:
        """How many operations read a tensor that no operation made (a parameter)."""
        return len(self.consumers.get(self.values.get(id(tensor), -1), []))

    def sole_consumer(self, value: int) -> Operation | None:
        readers = self.consumers.get(value, [])
        return self.operations[readers[0]] if len(readers) == 1 else None

    def producer(self, value: int) -> Operation | None:
        made = self.producers.get(value)
        return None if made is None else self.operations[made]

    def append(self, operation: Operation) -> None:
        index = len(self.operations)
        self.operations.append(operation)
        for value in set(operation.inputs):
            self.consumers[value].append(index)
        for value in operation.outputs:
            self.producers[value] = index


_WEIGHTED = {"linear", "conv1d", "conv2d", "conv3d"}


def tensors_in(value: Any) -> list[Tensor]:
    """Every tensor in nested lists, tuples and dictionaries, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (list, tuple)):
        return [tensor for item in value for tensor in tensors_in(item)]  # type: ignore[reportUnknownVariableType]
    if isinstance(value, dict):
        return [tensor for item in value.values() for tensor in tensors_in(item)]  # type: ignore[reportUnknownVariableType]
    return []


class _Recorder(TorchFunctionMode):
    """Sees every torch function the host calls at Python level, functional or through modules."""

    def __init__(self) -> None:
        super().__init__()
        self.trace = Trace()
        self._numbers: dict[int, int] = {}
        self._alive: list[Tensor] = []  # ids stay unique while the objects live
        self._next = 0
        self._inside = 0  # calls of modules that are recorded as one operation

    def _number(self, tensor: Tensor, *, fresh: bool = False) -> int:
        key = id(tensor)
        if fresh or key not in self._numbers:
            self._numbers[key] = self._next
            self._next += 1
            self._alive.append(tensor)
            self.trace.values.setdefault(key, self._numbers[key])
        return self._numbers[key]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._inside:
            return func(*args, **kwargs)
        inputs = tuple(self._number(t) for t in tensors_in(args) + tensors_in(kwargs))
        result = func(*args, **kwargs)
        outputs = tensors_in(result)
        name = getattr(func, "__name__", str(func)).rstrip("_") or str(func)
        if not outputs or (name.strip("_") in ("get", "set") and not isinstance(result, Tensor)):
            return result
        numbers = tuple(self._number(t, fresh=True) for t in outputs)
        operation = Operation(name, inputs, numbers, shape=tuple(outputs[0].shape))
        self._describe(operation, func, args, kwargs)
        self.trace.append(operation)
        return result

    def note_call(self, module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
        """A forward hook: count the call and note what went in and came out."""
        self.trace.calls[id(module)] += 1
        inputs, outputs = [*args, *kwargs.values()], tensors_in(result)
        first = result[0] if isinstance(result, tuple) and result else result
        shapes = [tuple(v.shape) if isinstance(v, Tensor) else () for v in (inputs[0] if inputs else None, first)]
        self.trace.results[id(module)] = ModuleCall(shapes[0], shapes[1], tuple(self._number(t) for t in outputs))

    def as_one(self, module: nn.Module, name: str) -> list[RemovableHandle]:
        """Record a call of ``module`` as one operation on its only input, whatever it does inside."""

        def enter(_module: nn.Module, _args: Any, _kwargs: Any) -> None:
            self._inside += 1

        def leave(_module: nn.Module, args: Any, kwargs: Any, y: Tensor) -> None:
            self._inside -= 1
            inputs = tuple(self._number(t) for t in tensors_in(args) + tensors_in(kwargs))
            outputs = (self._number(y, fresh=True),)
            self.trace.append(Operation(name, inputs, outputs, id(module.weight), shape=tuple(y.shape)))

        return [
            module.register_forward_pre_hook(enter, with_kwargs=True),
            module.register_forward_hook(leave, with_kwargs=True),
        ]

    @staticmethod
    def _describe(operation: Operation, func: Any, args: Any, kwargs: Any) -> None:
        if operation.name in _WEIGHTED:
            weight = args[1] if len(args) > 1 else kwargs.get("weight")
            operation.weight = id(weight)
        elif operation.name == "batch_norm":
            mean = args[1] if len(args) > 1 else kwargs.get("running_mean")
            operation.statistics = id(mean)
        plain: dict[str, Any] = {}
        try:
            bound = inspect.signature(func).bind(*args, **kwargs)
            plain = dict(bound.arguments)
        except (TypeError, ValueError):  # a builtin has no signature: its keyword arguments are all there is
            plain = dict(kwargs)
            plain.update({f"_{i}": value for i, value in enumerate(args[1:], 1)})
        operation.arguments = {k: v for k, v in plain.items() if isinstance(v, (bool, int, float, str))}


def trace(model: nn.Module, run: Callable[[], object]) -> Trace:
    """Record one call of ``run``, which runs ``model`` once without gradients."""
    recorder = _Recorder()
    with ExitStack() as hooks:
        # first, so that every later hook on such a module sees its result numbered
        for module in model.modules():
            for handle in recorder.as_one(module, "linear") if is_transposed(module) else []:
                hooks.callback(handle.remove)
        for module in model.modules():
            hooks.callback(module.register_forward_hook(recorder.note_call, with_kwargs=True).remove)
        with torch.no_grad(), recorder:
            run()
    return recorder.trace
