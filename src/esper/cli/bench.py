"""``esper bench``."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from esper.bench import PARTS
from esper.cli.command import Context, Outcome, UsageError, unknown_name
from esper.cli.parsing import JsonPath, Option
from esper.cli.terminal import labelled, write_lines

_ALL = "all"


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Measure what Esper costs on this machine.

    ops: every kernel against float64, then (on a GPU) against the read floor, PyTorch and the plan's loop. step: whole
    training steps with and without Esper, memory and utilisation. growth: the plan's five metrics on a small run that
    grows. Nothing is timed that computes wrongly. With --out each line is on file as soon as it is measured.
    """

    part: Annotated[
        str,
        Option(
            is_positional=True, metavar="PART", help=f"One of {', '.join(PARTS)}, {_ALL}.", completes=(*PARTS, _ALL)
        ),
    ] = _ALL  # fmt: skip
    out: Annotated[
        Path | None,
        Option(metavar="DIR", help="Write a JSON file a measurement, line by line.", default="", completes="directory"),
    ] = None
    only: Annotated[
        tuple[str, ...],
        Option(metavar="NAME", help="Operations of part ops, or layer: measured in this order.", default="all of them"),
    ] = ()
    parity_only: Annotated[bool, Option(help="Compare with float64 and time nothing.", default="no")] = False
    rehearse: Annotated[bool, Option(help="Tiny sizes: does it all run? The times mean nothing.", default="no")] = False
    device: Annotated[
        str, Option(metavar="{auto,cpu,cuda}", help="Where to measure.", completes=("auto", "cpu", "cuda"))
    ] = "auto"
    json: JsonPath = None

    def execute(self, context: Context) -> Outcome:
        """Measure, telling each line on standard error as it comes."""
        if self.part not in (*PARTS, _ALL):
            raise unknown_name("part", self.part, (*PARTS, _ALL))
        if self.device not in ("auto", "cpu", "cuda"):
            raise unknown_name("device", self.device, ("auto", "cpu", "cuda"))
        if self.parity_only and self.part != "ops":
            raise UsageError(f"--parity-only goes with ops, got {self.part!r}; say: esper bench ops --parity-only")
        import torch

        from esper.bench.ahead import LAYER
        from esper.bench.record import Record
        from esper.bench.session import Session
        from esper.kasmina.ops import dispatch

        for name in self.only:
            if name not in (*dispatch.OPERATIONS, LAYER):
                raise unknown_name("operation", name, (*dispatch.OPERATIONS, LAYER))
        if self.device == "cuda" and not torch.cuda.is_available():
            raise UsageError("--device cuda needs a GPU, PyTorch sees none; leave it auto")
        kind = "cuda" if self.device != "cpu" and torch.cuda.is_available() else "cpu"
        record = Record(self._command(), torch.device(kind), lambda text: write_lines([text], sys.stderr), self.out)
        session = Session(record, self.only, parity_only=self.parity_only, tiny=self.rehearse)
        session.measure(PARTS if self.part == _ALL else (self.part,))
        return self._outcome(record.files, session.failures, session.notes)

    def _command(self) -> str:
        words = ["esper bench", self.part]
        words += [f"--only {' '.join(self.only)}"] if self.only else []
        words += ["--out DIR"] if self.out is not None else []
        return " ".join([*words, *(["--rehearse"] if self.rehearse else [])])

    def _outcome(self, files: dict[str, dict[str, object]], failures: dict[str, str], notes: list[str]) -> Outcome:
        from esper.bench.words import summary

        lines = [labelled("measured", text) for text in summary(files)]
        lines += [labelled("left out", text) for text in notes]
        lines += [labelled("failed", f"{name}: {reason}") for name, reason in failures.items()]
        if self.out is not None:
            lines.append(labelled("written", f"{', '.join(sorted(files))} in {self.out}"))
        return Outcome(result={"files": files, "failures": failures, "left_out": notes}, lines=lines, ok=not failures)
