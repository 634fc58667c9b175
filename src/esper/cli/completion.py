"""A script that completes the command line in a shell; shtab writes it from the parsers."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence

import shtab

from esper.cli.command import Command
from esper.cli.parsing import add_options

_PLACES = {"file": shtab.FILE, "directory": shtab.DIRECTORY}


def completion_script(commands: Mapping[str, tuple[type[Command], str]], shell: str, shells: Sequence[str]) -> str:
    """A script for ``shell`` that completes all commands, their options and the values these offer.

    Parameters
    ----------
    commands:
        Name to the command and its summary.
    shell:
        One of ``shells``.
    shells:
        What ``--print-completion`` itself takes.
    """
    top = argparse.ArgumentParser("esper", description="Grows a PyTorch model while it trains.")
    top.add_argument("--version", action="version", version="", help="show the version and exit")
    top.add_argument("--print-completion", metavar="SHELL", choices=shells, help="print a script for a shell")
    subparsers = top.add_subparsers(metavar="COMMAND")
    for name, (command, summary) in commands.items():
        parser = subparsers.add_parser(name, help=summary, description=summary)
        for action, completes in add_options(parser, command):
            if isinstance(completes, str):
                action.complete = _PLACES[completes]  # pyright: ignore[reportAttributeAccessIssue]
            elif completes:
                action.choices = completes
    return shtab.complete(top, shell)
