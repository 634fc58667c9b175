"""``esper export``."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from esper.cli.command import Context, Outcome, existing_run
from esper.cli.parsing import JsonPath, Option
from esper.cli.terminal import labelled


@dataclass(frozen=True, kw_only=True)
class Export:
    """Write a grown model as an ordinary PyTorch model.

    The folder holds model.safetensors, structure.json, host.py and rebuild.py; it loads without Esper.
    """

    run_dir: Annotated[
        Path,
        Option(
            is_positional=True, metavar="RUN_DIR", help="A directory that `esper run` wrote.", completes="directory"
        ),
    ]
    out: Annotated[Path, Option(short="-o", metavar="OUT", help="A new or empty folder.", completes="directory")]
    json: JsonPath = None

    def execute(self, context: Context) -> Outcome:
        """Write the folder; what was written is read back and compared."""
        run_dir = existing_run(self.run_dir)
        from esper.runs import write_export  # imports torch

        facts = write_export(run_dir, self.out)
        told = " | ".join(f"{key.replace('_', ' ')} {_shown(value)}" for key, value in facts.items() if key != "path")
        lines = [
            labelled("exported", str(self.out)),
            labelled("checked", f"read back | {told}" if told else "read back"),
            labelled("next", f"python {shlex.quote(str(self.out / 'rebuild.py'))}"),
        ]
        return Outcome(result={"run_dir": str(run_dir), "out": str(self.out), **facts}, lines=lines)


def _shown(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
