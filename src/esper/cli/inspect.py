"""``esper inspect``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from esper.cli.command import Context, Outcome
from esper.cli.parsing import JsonPath, Option
from esper.cli.terminal import labelled
from esper.errors import EsperError

if TYPE_CHECKING:
    from esper.safety.inspection import Facts


@dataclass(frozen=True, kw_only=True)
class Inspect:
    """Show what a checkpoint or a run holds and check every file of it.

    PATH is a folder that grower.save has written, or a run directory. Exit status 1 when anything is damaged.
    """

    path: Annotated[
        Path,
        Option(
            is_positional=True, metavar="PATH", help="A folder of checkpoints or a run directory.",
            completes="directory",
        ),
    ]  # fmt: skip
    json: JsonPath = None

    def execute(self, context: Context) -> Outcome:
        """Read everything; one damaged file hides none of the others."""
        from esper.safety.inspection import survey  # imports torch

        if not self.path.is_dir():
            what = "a file" if self.path.exists() else "no such folder"
            raise EsperError(f"a folder of checkpoints or a run directory is needed, got {str(self.path)!r} ({what})")
        folders = list(_folders(self.path))
        found = {str(folder): survey(folder) for folder in folders}
        files = [_check(self.path / name) for name in _FILES if (self.path / name).is_file()]
        if not any(found.values()) and not files:
            raise EsperError(
                f"a folder of checkpoints or a run directory is needed, got {str(self.path)!r} with neither"
            )
        damaged = [f"{folder} {fact.number}" for folder, facts in found.items() for fact in facts if fact.problem]
        damaged += [file["name"] for file in files if file["problem"]]
        lines = [line for folder, facts in found.items() for line in _told(folder, facts)]
        lines += [labelled("file", f"{f['name']}: {f['problem'] or f['detail']}") for f in files]
        lines.append(labelled("result", f"{len(damaged)} damaged: {', '.join(damaged)}" if damaged else "all intact"))
        result = {
            "ok": not damaged,
            "checkpoints": {folder: [fact.fields() for fact in facts] for folder, facts in found.items()},
            "files": files,
        }
        return Outcome(result=result, lines=lines, ok=not damaged)


_FILES = ("events.jsonl", "commands.jsonl", "model.safetensors", "structure.json", "config.json", "summary.json")


def _folders(path: Path) -> Iterator[Path]:
    """Folders of checkpoints: the one named, and those below a run directory."""
    if any(path.glob("checkpoint-*.json")):
        yield path
    for below in (path / "checkpoints", *sorted((path / "progress").glob("*"))):
        if below.is_dir():
            yield below


def _check(path: Path) -> dict[str, Any]:
    """Read one file of a run as whoever needs it would."""
    problem, detail = None, f"{path.stat().st_size:,} bytes"
    try:
        if path.name == "events.jsonl":
            from esper.observe import read_events

            detail += f", {sum(1 for _ in read_events(path)):,} events"
        elif path.name == "commands.jsonl":
            from esper.safety.command_log import read_log

            detail += f", {len(read_log(path)[0]):,} commands"
        elif path.suffix == ".safetensors":
            from esper.safety.tensor_files import decoded

            detail += f", {len(decoded(path.read_bytes(), path.name)):,} tensors"
        else:
            import json

            json.loads(path.read_text(encoding="utf-8"))
    except (EsperError, OSError, ValueError, RecursionError) as error:
        problem = str(error)
    return {"name": path.name, "problem": problem, "detail": detail}


def _told(folder: str, facts: list[Facts]) -> Iterator[str]:
    if not facts:
        yield labelled("folder", f"{folder}: no checkpoint yet")
    for fact in facts:
        about = f"{folder}: checkpoint {fact.number}"
        if fact.step is not None and fact.num_bytes is not None:
            written = ", ".join(f"{name} {version}" for name, version in sorted((fact.written_by or {}).items()))
            about += (
                f" of {fact.kind}, step {fact.step:,}, {fact.num_bytes:,} bytes in {fact.files} files, schema "
                f"{fact.schema}, by {written}"
            )
        if fact.growth is not None:
            alive = ", ".join(f"{number} {state}" for number, state in fact.growth.cohorts.items()) or "none"
            about += (
                f" | {fact.growth.sites} sites, {fact.growth.annexes} grown for good, {fact.growth.seeds} seeds alive, "
                f"cohorts: {alive}"
            )
        yield labelled("damaged" if fact.problem else "intact", about + (f" | {fact.problem}" if fact.problem else ""))
