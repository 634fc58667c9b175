"""Every kernel under NVIDIA's compute-sanitizer: memcheck and racecheck, or the tools named by ``--tools``.

Run from the repository root, on a machine with a GPU and compute-sanitizer (minutes: everything runs far slower)::

    PYTHONPATH=src python benchmarks/ops/sanitize.py --out benchmarks/results/ops_sanitizer.json

It runs ``esper bench ops --parity-only`` for each operation under each tool and exits with 1 if one reports an error.
Results are on file after each of them.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

OPERATIONS = ("telemetry", "graft", "slot_adam")
TOOLS = ("memcheck", "racecheck")


def sanitize(tool: str, operation: str) -> dict[str, object]:
    """One tool on one operation; its summary line and exit status."""
    command = [
        "compute-sanitizer", f"--tool={tool}", "--error-exitcode=9", sys.executable, "-m", "esper", "bench", "ops",
        "--parity-only", "--only", operation,
    ]  # fmt: skip
    # the caching allocator would hide reads past the end of a tensor
    done = subprocess.run(
        command, env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, capture_output=True, text=True
    )
    lines = (done.stdout + done.stderr).splitlines()
    summary = next((line for line in reversed(lines) if "SUMMARY" in line), "no summary")
    if done.returncode != 0:
        print("\n".join(lines[-40:]), file=sys.stderr)
    return {"tool": tool, "operation": operation, "status": done.returncode, "summary": summary.strip("= ")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the results here, as JSON")
    parser.add_argument("--tools", nargs="+", default=TOOLS, help="tools of compute-sanitizer to run")
    parser.add_argument("--operations", nargs="+", default=OPERATIONS, choices=OPERATIONS)
    options = parser.parse_args()
    if shutil.which("compute-sanitizer") is None:
        sys.exit("compute-sanitizer was not found; it comes with the CUDA toolkit")
    results: list[dict[str, object]] = []
    for tool in options.tools:
        for operation in options.operations:
            results.append(sanitize(tool, operation))
            print(json.dumps(results[-1]), flush=True)
            if options.out is not None:
                options.out.parent.mkdir(parents=True, exist_ok=True)
                options.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    if any(line["status"] != 0 for line in results):
        sys.exit(1)


if __name__ == "__main__":
    main()
