from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path

import pytest

from esper.cli.command import UsageError
from esper.cli.entry import COMMANDS, SHELLS
from esper.cli.parsing import HelpShown, completion_script, parse
from esper.cli.run import Run
from esper.cli.sites import Sites
from esper.runs.options import RunOptions

pytestmark = pytest.mark.unit


def load(name: str) -> type:
    module, attribute, _ = COMMANDS[name]
    return getattr(importlib.import_module(module), attribute)


def test_every_option_reaches_the_library() -> None:
    words = (
        "vision --seeds 2 --steps 50 --lr 1e-3 3e-3 --no-controls --device cpu --size cpu --data x.npz --run-dir d "
        "--temper balanced --controller heuristic --start random_zero --growth 0.5 --budget-params 900 --seed 3 "
        "--jobs 2 --json -"
    )
    command = parse(Run, "run", words.split())
    assert command.json == "-"
    assert command.options() == RunOptions(
        preset="vision", seeds=2, steps=50, lr=(1e-3, 3e-3), controls=False, device="cpu", size="cpu",
        data=Path("x.npz"), run_dir=Path("d"), temper="balanced", controller="heuristic", start="random_zero",
        growth=0.5, budget_params=900, seed=3, jobs=2,
    )  # fmt: skip


def test_without_options_the_librarys_defaults_hold() -> None:
    assert parse(Run, "run", []).options() == RunOptions()
    assert {f.name for f in dataclasses.fields(Run)} == {f.name for f in dataclasses.fields(RunOptions)} | {"json"}


def test_patterns_are_read() -> None:
    assert parse(Sites, "sites", ["--match", "a*", "b"]).match == ("a*", "b")


@pytest.mark.parametrize("name", list(COMMANDS))
def test_every_command_is_frozen_has_json_and_the_listed_summary(name: str) -> None:
    command = load(name)
    assert command.__dataclass_params__.frozen  # type: ignore[attr-defined]
    assert "json" in {field.name for field in dataclasses.fields(command)}
    assert (command.__doc__ or "").splitlines()[0] == COMMANDS[name][2]
    with pytest.raises(HelpShown) as shown:
        parse(command, name, ["--help"])
    text = str(shown.value)
    assert f"usage: esper {name}" in text and COMMANDS[name][2] in text and "--json PATH" in text
    assert text.isascii()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--steps", "many"], "--steps: must be a whole number, got 'many'; for example 600; see esper run --help"),
        (["--lr", "1e-3", "fast"], "--lr: must be numbers, got 'fast'; for example --lr 1e-3 3e-3; see"),
        (["--growth", "x"], "--growth: must be a number, got 'x'; for example 1.5; see"),
        (["--stpes", "3"], "unrecognized options: --stpes, 3; perhaps you meant: --steps N"),
        (["--size", "huge"], "--size"),
        (["--json"], "missing value for argument '--json'"),
        (["digits", "extra"], "unrecognized options: extra"),
    ],
)
def test_wrong_words_are_told_in_one_line(words: list[str], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(Run, "run", words)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert str(caught.value).endswith("; see esper run --help")


@pytest.mark.parametrize("shell", SHELLS)
def test_completion_knows_commands_and_options(shell: str) -> None:
    script = completion_script({name: load(name) for name in COMMANDS}, shell)
    assert all(name in script for name in COMMANDS)
    assert "budget-params" in script
