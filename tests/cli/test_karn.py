"""``esper karn``: from words to an exit status, over a recorded run and over what it does not take."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.karn.made import choice, design, report

from esper.cli import main
from esper.cli.karn import WORDS, Karn
from esper.karn import Database

pytestmark = pytest.mark.component


@pytest.fixture
def db(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """``runs/karn.db``: two designs in use, one failed, in an empty working directory."""
    monkeypatch.chdir(tmp_path)
    child = design("copy", parents=(design().name,), operator="mutation", generation=1)
    failed = design("gradmax", status="failed", reason="its output is not finite")
    with Database(Path("runs/karn.db")) as database:
        database.add([design(), child, failed])
        database.file([report(0, choice=design().choice), report(1, choice=child.choice, gain=None)])
    return Path("runs/karn.db")


def run(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> str:
    assert main(["karn", *words]) == code
    out = capsys.readouterr()
    return out.out if code == 0 else out.err


def as_json(capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    return json.loads(run(capsys, *words, "--json", "-"))


def test_list_tells_the_best_first(db: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = run(capsys, "list").splitlines()
    assert lines[0] == "reports    2 of 1 runs, 1 cohorts kept"
    assert lines[1].split() == ["design", "kind", "blueprint", "start", "size", "used", "kept", "gain/cost", "from"]
    assert lines[2].split() == [design().name, "linear_span", "bottleneck", "tiny", "2x", "1", "1", "0.100", "mutation"]
    assert lines[-1].endswith("-          -  mutation, failed")
    told = as_json(capsys, "list")
    assert (told["reports"], told["runs"], told["kept"], len(told["designs"])) == (2, 1, 1, 3)
    assert told["designs"][0]["standing"]["num"] == 1 and told["designs"][-1]["standing"] is None


def test_a_long_list_says_what_it_leaves_out(db: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Database(db) as database:
        numbers = [(g, s) for g in (0.125, 0.25, 0.5, 1.0, 4.0, 8.0, 16.0) for s in (1, 2, 4, 8, 16)]
        database.add([design(choice=choice("tiny", growth=g, seeds=s)) for g, s in numbers])
    assert run(capsys, "list").splitlines()[-1] == "and 8 more; all of them: --json -"


def test_show_tells_lineage_and_fate(db: Path, capsys: pytest.CaptureFixture[str]) -> None:
    child = as_json(capsys, "list")["designs"][1]["name"]
    out = run(capsys, "show", child[:6])
    assert f"lineage    mutation, generation 1, from {design().name}" in out
    assert "culled     run/grown/0/1: never judged for 50% of the FLOPs" in out
    parent = as_json(capsys, "show", design().name)
    assert parent["children"] == [child] and parent["reports"] == ["run/grown/0/0"]
    out = run(capsys, "show", design().name)
    assert f"children   {child}" in out and "fossilized run/grown/0/0: gain +0.1 for 50% of the FLOPs" in out
    assert "failed     its output is not finite" in run(capsys, "show", design("gradmax").name)


def test_export_and_import(db: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "export", "out.json") == "exported   2 reports, 3 designs in out.json\n"
    assert "is there already; choose another" in run(capsys, "export", "out.json", code=1)
    assert "cannot be written" in run(capsys, "export", "no/folder/out.json", code=1)
    assert run(capsys, "import", "out.json", "--db", "b.db") == "imported   2 of 2 reports are new in b.db\n"
    assert as_json(capsys, "import", "out.json", "--db", "b.db") == {
        "db": "b.db", "reports": 2, "new": 0, "designs": 0,
    }  # fmt: skip
    with Database(db) as one, Database(Path("b.db")) as two:
        assert one.reports() == two.reports()
        assert {d.name: d.parents for d in one.designs()} == {d.name: d.parents for d in two.designs()}
        assert two.children(design().name) == one.children(design().name)


def test_import_of_a_run(recorded_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "import", str(recorded_run)) == "imported   1 of 1 reports are new in runs/karn.db\n"
    log = str(recorded_run / "events.jsonl")
    assert run(capsys, "import", log) == "imported   0 of 1 reports are new in runs/karn.db\n"
    with Database(Path("runs/karn.db")) as database:
        (told,) = database.reports()
    assert told.run.startswith("digits-01@20") and told.job == "digits" and told.kept
    assert "got 'runs/digits-02'" in run(capsys, "import", "runs/digits-02", code=1)


def test_two_runs_of_one_name_are_two(tmp_path: Path, recorded_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tests.cli.recorded import write_run

    run(capsys, "import", str(recorded_run))
    other = write_run(tmp_path / "elsewhere" / "digits-01")
    assert run(capsys, "import", str(other)) == "imported   1 of 1 reports are new in runs/karn.db\n"


def test_breed_makes_tested_designs(db: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("ribs", reason="the karn extra")
    out = run(capsys, "breed", "--num", "2", "--seed", "1").splitlines()
    assert len(out) == 3 and out[-1].endswith("of 2 new designs passed their test")
    assert len(as_json(capsys, "list")["designs"]) == 5


MISTAKES: dict[str, tuple[list[str], int, str]] = {
    "no word": ([], 2, "missing: WORD"),
    "unknown word": (["lst"], 2, "no word is called 'lst'; did you mean 'list' or 'listen'? known: list, show"),
    "no name": (["show"], 2, "show takes NAME, got 'nothing'; say: esper karn show NAME"),
    "too much": (["list", "x"], 2, "list takes nothing more, got 'x'; say only: esper karn list"),
    "no database": (["list", "--db", "x.db"], 1, "got no file at 'x.db'; make one with: esper karn import RUN_DIR"),
    "no design": (["show", "zz"], 1, "got 'zz', which 0 designs begin with; esper karn list tells the names"),
    "many designs": (["show", ""], 1, "got '', which 3 designs begin with"),
    "num": (["breed", "--num", "0"], 2, "num must be at least 1 and seed not negative, got 0 and 0"),
    "no run": (["import", "x"], 1, "a run directory holds events.jsonl, got 'x' (no such folder)"),
    "no export": (["import", "text"], 1, "must be an export of Karn"),
}


@pytest.mark.parametrize("name", list(MISTAKES))
def test_mistakes(name: str, db: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("text").write_text("{", encoding="utf-8")
    words, code, told = MISTAKES[name]
    err = run(capsys, *words, code=code)
    assert told in err and len(err.strip().splitlines()) == 1
    assert not Path("x.db").exists()


def test_the_help_names_every_word() -> None:
    assert all(f"{word}" in (Karn.__doc__ or "") for word in WORDS)


def test_what_comes_with_the_package_can_be_taken_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    new = tmp_path / "new.db"
    told = run(capsys, "import", "shipped", "--db", str(new))
    assert told == f"imported   1000 of 1000 reports are new in {new}\n"
    with Database(new) as database:
        kept = [report.kept for report in database.reports()]
    assert len(kept) == 1000 and 0.4 < sum(kept) / 1000 < 0.9
