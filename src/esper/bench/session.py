"""One sitting: what was asked for, in order; what fails is told and does not keep the rest from being measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from esper.bench import growth, layer, ops, step
from esper.bench.ahead import LAYER, compile_ahead
from esper.bench.clock import Clock
from esper.bench.record import Record
from esper.errors import EsperError
from esper.kasmina.ops import dispatch


@dataclass
class Session:
    """Measures into ``record``.

    Parameters
    ----------
    operations:
        Of part ``ops``, in this order, or ``"layer"``, the plan's own measure; none named: all of them.
    parity_only:
        Time nothing.
    tiny:
        Sizes at which everything only runs, to rehearse.

    Attributes
    ----------
    failures:
        What went wrong, by measurement.
    notes:
        What was left out, and why.
    """

    record: Record
    operations: tuple[str, ...] = ()
    parity_only: bool = False
    tiny: bool = False
    failures: dict[str, str] = field(default_factory=dict[str, str])
    notes: list[str] = field(default_factory=list[str])
    _clock: Clock | None = None

    def measure(self, parts: tuple[str, ...]) -> None:
        """Everything that ``parts`` name."""
        torch.set_float32_matmul_precision("high")
        if self.record.device.type == "cpu":
            torch.set_num_threads(1)
        for name, call in self._calls(parts):
            self.record.tell(f"== {name}")
            try:
                call()
            except (RuntimeError, EsperError) as error:
                self.failures[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:600]}"
                self.record.tell(f"FAILED {name}: {self.failures[name]}")

    def _calls(self, parts: tuple[str, ...]) -> Iterator[tuple[str, Callable[[], None]]]:
        if "ops" in parts:
            yield from self._of_operations()
        if "step" in parts:
            name = step.begin(self.record)
            for part, lines in step.parts(self.record.device, tiny=self.tiny):
                yield f"step of {part}", lambda lines=lines: step.measure(self.record, name, lines())
        if "growth" in parts:
            yield "growth", lambda: growth.measure(self.record, tiny=self.tiny)

    def _of_operations(self) -> Iterator[tuple[str, Callable[[], None]]]:
        """Parity and times of one after the other, so that a sitting that is cut short has some of them whole."""
        names = self.operations or (*dispatch.OPERATIONS, LAYER)
        on_gpu = self.record.device.type == "cuda"
        is_timed = not self.parity_only and (on_gpu or self.tiny)
        if on_gpu and not self.tiny:
            yield "kernels", lambda: compile_ahead(self.record, names, timed=is_timed)
        for name in names:
            if name != LAYER:
                yield f"parity of {name}", lambda name=name: ops.check_operation(self.record, name)
            if is_timed and f"parity of {name}" not in self.failures:
                yield f"times of {name}", lambda name=name: self._time(name)
        if not (self.parity_only or is_timed):
            self.notes.append(ops.TIMED_ON_GPU)

    def _time(self, name: str) -> None:
        if self._clock is None:
            self._clock = Clock(self.record.device, repeats=2 if self.tiny else 50)
        if name != LAYER:
            ops.time_operation(self.record, name, self._clock, tiny=self.tiny)
            return
        self.record.begin(LAYER)
        for line in layer.time_rows(self._clock, tiny=self.tiny):
            self.record.add(LAYER, line)
