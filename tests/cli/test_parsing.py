from __future__ import annotations

import dataclasses
import importlib
import math
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from esper.cli.command import UsageError
from esper.cli.completion import completion_script
from esper.cli.entry import COMMANDS, SHELLS
from esper.cli.export import Export
from esper.cli.parsing import HelpShown, parse
from esper.cli.run import Run
from esper.cli.sites import Sites
from esper.config import TamiyoConfig
from esper.errors import ConfigError
from esper.runs.options import PRESET_NAMES, RunOptions

pytestmark = pytest.mark.unit


def load(name: str) -> type:
    module, attribute, _ = COMMANDS[name]
    return getattr(importlib.import_module(module), attribute)


def test_every_option_reaches_the_library() -> None:
    words = (
        "vision --seeds 2 --steps 50 --lr 1e-3 3e-3 --no-controls --device cpu --size cpu --data x.npz --run-dir d "
        "--temper balanced --controller heuristic --start random_zero --growth 0.5 --budget-params 900 --seed 3 "
        "--jobs 2 --json - --set graft.lr_boost=1.5 tamiyo.first=20"
    )
    command = parse(Run, "run", words.split())
    assert command.json == "-"
    assert command.options() == RunOptions(
        preset="vision", seeds=2, steps=50, lr=(1e-3, 3e-3), controls=False, device="cpu", size="cpu",
        data=Path("x.npz"), run_dir=Path("d"), temper="balanced", controller="heuristic", start="random_zero",
        growth=0.5, budget_params=900, seed=3, jobs=2, settings=("graft.lr_boost=1.5", "tamiyo.first=20"),
    )  # fmt: skip


def test_without_options_the_librarys_defaults_hold() -> None:
    assert parse(Run, "run", []).options() == RunOptions()
    assert {f.name for f in dataclasses.fields(Run)} == {f.name for f in dataclasses.fields(RunOptions)} | {"json"}


def test_a_list_may_be_said_at_once_or_one_by_one() -> None:
    at_once = parse(Run, "run", ["--set", "a.b=1", "c.d=2", "--lr", "1e-3", "2e-3"])
    assert at_once == parse(Run, "run", ["--set", "a.b=1", "--lr", "1e-3", "--set", "c.d=2", "--lr", "2e-3"])
    assert at_once.settings == ("a.b=1", "c.d=2") and at_once.lr == (1e-3, 2e-3)


def test_patterns_are_read() -> None:
    assert parse(Sites, "sites", ["--match", "a*", "b"]).match == ("a*", "b")


@pytest.mark.parametrize(
    "words",
    ["vision --seed -1 --no-controls", "--seed -1 vision --no-controls", "--no-controls --seed=-1 -- vision"],
)
def test_order_of_the_words_is_free(words: str) -> None:
    command = parse(Run, "run", words.split())
    assert (command.preset, command.seed, command.controls) == ("vision", -1, False)


@pytest.mark.parametrize("words", ["-o out runs/x", "runs/x -o out", "runs/x --out=out", "runs/x -oout"])
def test_short_names_are_read(words: str) -> None:
    assert parse(Export, "export", words.split()) == Export(run_dir=Path("runs/x"), out=Path("out"))


@pytest.mark.parametrize(("words", "rates"), [("-1e-3", (-1e-3,)), ("1e-3 -2", (1e-3, -2.0)), ("-inf", (-math.inf,))])
def test_negative_numbers_are_values_not_options(words: str, rates: tuple[float, ...]) -> None:
    assert parse(Run, "run", ["--lr", *words.split()]).lr == rates


@pytest.mark.parametrize(("option", "known"), [("temper", "tamiyo.temper"), ("device", "device")])
def test_offered_names_are_those_the_library_takes(option: str, known: str) -> None:
    (field,) = (f for f in dataclasses.fields(Run) if f.name == option)
    offered = get_args(get_type_hints(Run, include_extras=True)[field.name])[1].completes
    for name in offered:
        options = RunOptions(**{option: name})
        if option == "temper":
            TamiyoConfig(temper=options.temper or "")
    with pytest.raises(ConfigError, match=f"{known} must be {', '.join(offered[:-1])} or {offered[-1]}"):
        TamiyoConfig(temper="x") if option == "temper" else RunOptions(device="x")


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
        (["--stpes", "3"], "unrecognized options: --stpes; perhaps you meant: --steps N"),
        (["--size", "gpus"], "--size: must be one of auto, cpu, gpu, got 'gpus'; did you mean 'gpu'?"),
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
    script = completion_script(
        {name: (load(name), summary) for name, (_, _, summary) in COMMANDS.items()}, shell, SHELLS
    )
    assert all(name in script for name in (*COMMANDS, *PRESET_NAMES))
    assert "budget-params" in script
