"""``esper karn``."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from esper.cli.command import Context, Outcome, UsageError, existing_run, unknown_name
from esper.cli.parsing import JsonPath, Option
from esper.cli.terminal import columns, labelled, table
from esper.errors import EsperError

if TYPE_CHECKING:
    from esper.karn import Database, Design, Snapshot
    from esper.karn.experience import Standing

WORDS = ("list", "show", "export", "import", "breed", "listen")
_SHOWN = 30


@dataclass(frozen=True, kw_only=True)
class Karn:
    """Look into what has grown so far, and carry it from place to place.

    list: designs, the best first. show NAME: one design, where it comes from and what became of it. export FILE: all
    of it as one JSON file. import PATH: a run directory or such a file; import shipped: the experience with small
    fully connected networks that comes with Esper. breed: make new designs and test them.

    listen: file what the runs on a message bus report (esper run --bus URL), from as many machines as there are, until
    Ctrl-C, --seconds or --count: esper karn listen --bus redis://HOST --db runs/karn.db. Each report is stored once,
    whatever dies on the way; those of runs that ended before it listened come too. With ESPER_BUS_KEY set only signed
    reports are taken. What nobody can read is shown by esper bus dead-letters.
    """

    word: Annotated[
        str, Option(is_positional=True, metavar="WORD", help=f"One of {', '.join(WORDS)}.", completes=WORDS)
    ]
    target: Annotated[
        str | None,
        Option(is_positional=True, metavar="TARGET", help="NAME, FILE or PATH, as the word needs.", default=""),
    ] = None
    db: Annotated[
        str, Option(metavar="PATH|URL", help="The database: a file, or postgresql://HOST/DATABASE.", completes="file")
    ] = "runs/karn.db"
    num: Annotated[int, Option(metavar="N", help="New designs (breed).")] = 8
    seed: Annotated[int, Option(metavar="N", help="Of the draws (breed).")] = 0
    bus: Annotated[str, Option(metavar="URL", help="The message bus (listen).")] = "redis://localhost:6379"
    seconds: Annotated[
        float | None, Option(metavar="S", help="End after so long (listen).", default="never")
    ] = None  # fmt: skip
    count: Annotated[
        int | None, Option(metavar="N", help="End after so many reports (listen).", default="never")
    ] = None  # fmt: skip
    json: JsonPath = None

    def execute(self, context: Context) -> Outcome:
        """Do what the word says."""
        if self.word not in WORDS:
            raise unknown_name("word", self.word, WORDS)
        needs = {"show": "NAME", "export": "FILE", "import": "PATH"}.get(self.word)
        if (needs is None) != (self.target is None):
            wanted = f"say: esper karn {self.word} {needs}" if needs else f"say only: esper karn {self.word}"
            raise UsageError(f"{self.word} takes {needs or 'nothing more'}, got {self.target or 'nothing'!r}; {wanted}")
        if self.num < 1 or not 0 <= self.seed < 2**31:
            raise UsageError(f"num must be at least 1 and seed not negative, got {self.num} and {self.seed}")
        if self.count is not None and self.count < 1:
            raise UsageError(f"--count must be at least 1, got {self.count}; leave it out for no end")
        if self.seconds is not None and not 0 < self.seconds < float("inf"):
            raise UsageError(f"--seconds must be above 0, got {self.seconds:g}; leave it out for no end")
        if self.word == "listen":
            from esper.cli.listening import listen

            return listen(self.bus, self.db, self.seconds, self.count)
        from esper.karn import Database

        with Database(self.db, must_exist=self.word != "import") as database:
            return _WORDS[self.word](self, database)


def _list(command: Karn, database: Database) -> Outcome:
    from esper.karn import Snapshot
    from esper.karn.experience import standings

    snapshot = Snapshot.of(database)
    done = standings(snapshot)
    ordered = sorted(snapshot.designs, key=lambda d: (-_merit(done.get(d.name)), d.name))
    kept = sum(report.kept for report in snapshot.reports)
    runs = len({report.run for report in snapshot.reports})
    lines = [labelled("reports", f"{len(snapshot.reports)} of {runs} runs, {kept} cohorts kept")]
    rows = [_row(design, done.get(design.name)) for design in ordered[:_SHOWN]]
    if rows:
        head = ("design", "kind", "blueprint", "start", "size", "used", "kept", "gain/cost", "from")
        lines += table(head, rows, width=columns(sys.stdout), numbers=(4, 5, 6, 7))
    if len(ordered) > _SHOWN:
        lines.append(f"and {len(ordered) - _SHOWN} more; all of them: --json -")
    result = {
        "db": database.name, "reports": len(snapshot.reports), "runs": runs, "kept": kept,
        "designs": [_told(design, done.get(design.name)) for design in ordered],
    }  # fmt: skip
    return Outcome(result=result, lines=lines)


def _merit(standing: Standing | None) -> float:
    return -1.0 if standing is None else standing.efficiency


def _row(design: Design, standing: Standing | None) -> tuple[str, ...]:
    choice = design.choice
    seeds = f" /{choice.seeds}" if choice.seeds > 1 else ""
    used = ("0", "-", "-") if standing is None else (
        str(standing.num), str(standing.kept), f"{standing.efficiency:.3f}"
    )  # fmt: skip
    origin = design.operator if design.status != "failed" else f"{design.operator}, failed"
    return design.name, design.kind, choice.blueprint, choice.start, f"{choice.growth:.2g}x{seeds}", *used, origin


def _told(design: Design, standing: Standing | None) -> dict[str, Any]:
    import dataclasses

    import msgspec

    plain = msgspec.to_builtins(design)
    return {"name": design.name, **plain, "standing": None if standing is None else dataclasses.asdict(standing)}


def _show(command: Karn, database: Database) -> Outcome:
    from esper.karn import Snapshot
    from esper.karn.experience import standings

    snapshot = Snapshot.of(database)
    name = command.target or ""
    matching = [design for design in snapshot.designs if design.name.startswith(name)]
    if len(matching) != 1:
        raise EsperError(
            f"a design is shown by its name or how that begins, got {name!r}, which {len(matching)} designs begin "
            "with; esper karn list tells the names"
        )
    design = matching[0]
    standing = standings(snapshot).get(design.name)
    used = [r for r in snapshot.reports if any(part.design == design.name for part in r.placements)]
    children = database.children(design.name)
    lines = [labelled("design", " ".join(_row(design, standing)))]
    choice = design.choice
    lines.append(labelled("numbers", f"first weights x{choice.scale:g}, learning rate x{choice.lr_scale:g}"))
    lines.append(labelled("lineage", f"{design.operator}, generation {design.generation}{_ancestry(design, snapshot)}"))
    lines += [labelled("failed", design.reason)] if design.reason else []
    lines += [labelled("children", ", ".join(children))] if children else []
    for report in used[:_SHOWN]:
        gain = "never judged" if report.gain is None else f"gain {report.gain:+.4g}"
        cost = "?" if report.added_flops_share is None else f"{report.added_flops_share:.0%}"
        lines.append(labelled(report.state.name.lower()[:10], f"{report.id}: {gain} for {cost} of the FLOPs"))
    result = _told(design, standing) | {"children": children, "reports": [report.id for report in used]}
    return Outcome(result=result, lines=lines)


def _ancestry(design: Design, snapshot: Snapshot) -> str:
    """All ancestors, nearest first."""
    known = {other.name: other for other in snapshot.designs}
    line, todo = list[str](), list(design.parents)
    while todo:
        name = todo.pop(0)
        if name not in line:
            line.append(name)
            todo += known[name].parents if name in known else ()
    return f", from {' < '.join(line)}" if line else ""


def _export(command: Karn, database: Database) -> Outcome:
    from esper.karn import Snapshot

    path = Path(command.target or "")
    if path.exists():
        raise EsperError(f"an export is a new file, got {str(path)!r}, which is there already; choose another")
    snapshot = Snapshot.of(database)
    try:
        snapshot.write(path)
    except OSError as error:
        raise EsperError(f"the export {str(path)!r} cannot be written ({error}); choose another path") from error
    counts = {"reports": len(snapshot.reports), "designs": len(snapshot.designs)}
    told = f"{counts['reports']} reports, {counts['designs']} designs in {path}"
    return Outcome(result={"out": str(path), **counts}, lines=[labelled("exported", told)])


def _import(command: Karn, database: Database) -> Outcome:
    path = Path(command.target or "")
    if command.target == "shipped" and not path.exists():
        from esper.karn.snapshot import SHIPPED

        path = SHIPPED
    if path.is_file() and path.name != "events.jsonl":
        from esper.karn import read_snapshot

        snapshot = read_snapshot(path)
        designs = database.add(snapshot.designs)
        counts = {"reports": len(snapshot.reports), "new": database.file(snapshot.reports), "designs": designs}
    else:
        from esper.runs.advice import file_run

        run_dir = existing_run(path.parent if path.name == "events.jsonl" else path)
        filed = file_run(database, run_dir)
        counts = {"reports": filed.total, "new": filed.new, "designs": 0}
    told = f"{counts['new']} of {counts['reports']} reports are new in {database.name}"
    return Outcome(result={"db": database.name, **counts}, lines=[labelled("imported", told)])


def _breed(command: Karn, database: Database) -> Outcome:
    from esper.runs.advice import breed_into  # imports torch

    made = breed_into(database, command.num, command.seed)
    passed = [design for design in made if design.status == "passed"]
    lines = [labelled(design.status, " ".join(_row(design, None)[:5]) + f" {design.reason}") for design in made]
    lines.append(labelled("bred", f"{len(passed)} of {len(made)} new designs passed their test"))
    return Outcome(result={"db": database.name, "designs": [_told(design, None) for design in made]}, lines=lines)


_WORDS: dict[str, Callable[[Karn, Database], Outcome]] = {
    "list": _list, "show": _show, "export": _export, "import": _import, "breed": _breed,
}  # fmt: skip
