"""The top of the command line: choose a command, run it, turn how it ended into a line and an exit status.

Only the chosen command's module is imported, so that help and completion are quick; torch is imported by those
commands that compute.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

from esper.cli.command import Command, Context, UsageError, unknown_name
from esper.cli.failure import EXIT_FAILED, EXIT_OK, EXIT_USAGE, Failure, describe
from esper.cli.terminal import write_lines

COMMANDS = {
    "run": ("esper.cli.run", "Run", "Train a preset, let it grow, and compare it with controls."),
    "report": ("esper.cli.report", "Report", "Write a run's report again and print its summary."),
    "export": ("esper.cli.export", "Export", "Write a grown model as an ordinary PyTorch model."),
    "inspect": ("esper.cli.inspect", "Inspect", "Show what a checkpoint or a run holds and check every file of it."),
    "sites": ("esper.cli.sites", "Sites", "List where a model can grow, and why not elsewhere."),
    "trials": ("esper.cli.trials", "Trials", "Grow many small hosts and count what growth does to them."),
    "soak": ("esper.cli.soak", "Soak", "Train and grow small hosts without a rest and watch for what leaks."),
    "bus": (
        "esper.cli.bus",
        "Bus",
        "Look at a message bus, command a training, read the dead letters.",
    ),
    "karn": ("esper.cli.karn", "Karn", "Look into what has grown so far, and carry it from place to place."),
    "bench": ("esper.cli.bench", "Bench", "Measure what Esper costs on this machine."),
    "controller": (
        "esper.cli.controller",
        "Controller",
        "Serve, train and compare what decides where to grow.",
    ),
    "doctor": ("esper.cli.doctor", "Doctor", "Check that this installation works."),
}
SHELLS = ("bash", "zsh", "tcsh", "fish")


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``esper`` with ``argv`` (default: the process's own) and return the exit status.

    0 done, 1 failed, 2 wrong usage, 130 interrupted.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        try:
            return _dispatch(words)
        except KeyboardInterrupt as error:  # while a command's modules were still loading
            return _fail(words, describe(error, Context()))
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # The reader has gone (`esper sites | head -1`). Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED


def _dispatch(words: list[str]) -> int:
    if not words:
        write_lines(_help(), sys.stderr, indent=2)
        return EXIT_USAGE
    first, rest = words[0], words[1:]
    try:
        if first in ("-h", "--help", "help"):
            write_lines(_help(), sys.stdout, indent=2)
            return EXIT_OK
        if first == "--version":
            from esper import __version__

            write_lines([f"esper {__version__}"], sys.stdout)
            return EXIT_OK
        if first == "--print-completion":
            sys.stdout.write(_completion(rest) + "\n")
            return EXIT_OK
        if first not in COMMANDS:
            raise unknown_name("option" if first.startswith("-") else "command", first, _top_level_words(first))
    except UsageError as error:
        return _fail(words, Failure(f"{error}; see esper --help", EXIT_USAGE))
    return _run_command(first, rest)


def _top_level_words(first: str) -> list[str]:
    return ["--help", "--version", "--print-completion"] if first.startswith("-") else list(COMMANDS)


def _run_command(name: str, words: list[str]) -> int:
    """Parse, execute and show one command."""
    from esper.cli import json_output
    from esper.cli.parsing import HelpShown, parse

    context = Context()
    target: str | None = None
    try:
        command = parse(_load(name), name, words)
        if command.json is not None:
            json_output.check_destination(command.json)
            target = command.json
        outcome = command.execute(context)
        if target == json_output.STANDARD_OUTPUT:
            sys.stdout.write(json_output.encode(outcome.result) + "\n")
        else:
            if target is not None:
                json_output.write_file(outcome.result, target)
            write_lines(outcome.lines, sys.stdout)
        return EXIT_OK if outcome.ok else EXIT_FAILED
    except HelpShown as shown:
        write_lines(str(shown).splitlines(), sys.stdout, indent=0)
        return EXIT_OK
    except BrokenPipeError:
        raise
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001  the last line of defence: no traceback for people
        failure = describe(error, context)
        if target is not None:
            _write_failure(failure, target)
        return _fail([name], failure)


def _write_failure(failure: Failure, target: str) -> None:
    """A program that reads the JSON must not find the result of an earlier run."""
    from esper.cli import json_output

    result = {"error": failure.message, "exit_status": failure.status}
    if target == json_output.STANDARD_OUTPUT:
        sys.stdout.write(json_output.encode(result) + "\n")
        return
    try:
        json_output.write_file(result, target)
    except OSError as error:
        write_lines([f"--json {target} could not be written: {error}"], sys.stderr)


def _load(name: str) -> type[Command]:
    module, attribute, _ = COMMANDS[name]
    return getattr(importlib.import_module(module), attribute)


def _completion(words: list[str]) -> str:
    if len(words) != 1 or words[0] not in SHELLS:
        raise UsageError(f"--print-completion takes one shell of {', '.join(SHELLS)}, got {' '.join(words)!r}")
    from esper.cli.completion import completion_script

    commands = {name: (_load(name), summary) for name, (_, _, summary) in COMMANDS.items()}
    return completion_script(commands, words[0], SHELLS)


def _fail(words: Sequence[str], failure: Failure) -> int:
    name = f"esper {words[0]}" if words and words[0] in COMMANDS else "esper"
    write_lines([f"{name}: {failure.message}", *failure.more], sys.stderr)
    return failure.status


def _help() -> list[str]:
    return [
        "usage: esper COMMAND [OPTIONS]",
        "",
        "Grows a PyTorch model while it trains.",
        "",
        "commands:",
        *(f"  {name:<10} {summary}" for name, (_, _, summary) in COMMANDS.items()),
        "",
        "options:",
        "  -h, --help                 show this help and exit",
        "  --version                  show the version and exit",
        f"  --print-completion SHELL   print a script for {', '.join(SHELLS)}",
        "",
        "Start with: esper run        All options: esper COMMAND --help",
        "Exit status: 0 done, 1 failed, 2 wrong usage, 130 interrupted.",
    ]
