"""From words to a command: tyro reads the dataclass, we word what it says."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, Union

import tyro
from tyro.conf import arg
from tyro.constructors import PrimitiveConstructorSpec

from esper.cli.command import Command, UsageError

C = TypeVar("C", bound=Command)

_RULE = re.compile(r"^\s*-{5,}\s*$")
_NOISE = ("Argument helptext", "For full helptext")


class HelpShown(Exception):
    """The user asked for help; the text is the message."""


def _number(kind: Callable[[str], float], what: str, example: str) -> Callable[[list[str]], Any]:
    def read(words: list[str]) -> Any:
        try:
            return kind(words[0])
        except ValueError:
            raise ValueError(f"must be {what}, got {words[0]!r}; for example {example}") from None

    return read


def _rates(words: list[str]) -> tuple[float, ...]:
    read = _number(float, "numbers", "--lr 1e-3 3e-3")
    return tuple(read([word]) for word in words)


def _spec(read: Callable[[list[str]], Any], metavar: str, nargs: int | str = 1) -> Any:
    return PrimitiveConstructorSpec(
        nargs=nargs,  # pyright: ignore[reportArgumentType]
        metavar=metavar,
        instance_from_str=read,
        is_instance=lambda value: True,
        str_from_instance=lambda value: [str(value)],
    )


if TYPE_CHECKING:
    Count = int
    Rates = tuple[float, ...]
    Patterns = tuple[str, ...]
    OptionalCount = int | None
    OptionalNumber = float | None
    OptionalPath = Path | None
    OptionalText = str | None
else:
    # tyro checks defaults by itself for plain types and typing.Union; for anything else (`int | None`, `tuple[...]`)
    # it imports typeguard and with it asyncio, which takes longer than all the rest of `--help`.
    Count = Annotated[int, _spec(_number(int, "a whole number", "600"), "N")]
    Rates = Annotated[tuple, _spec(_rates, "RATE ...", "*")]
    Patterns = Annotated[tuple, _spec(tuple, "GLOB ...", "*")]
    OptionalCount = Annotated[Union[int, None], _spec(_number(int, "a whole number", "600"), "N")]  # noqa: UP007
    OptionalNumber = Annotated[Union[float, None], _spec(_number(float, "a number", "1.5"), "X")]  # noqa: UP007
    OptionalPath = Union[Path, None]  # noqa: UP007
    OptionalText = Union[str, None]  # noqa: UP007

JsonPath = Annotated[
    OptionalText,
    arg(metavar="PATH", help="Also write the result as JSON; - is standard output.", help_behavior_hint=""),
]


def parse(command: type[C], name: str, words: Sequence[str]) -> C:
    """Read ``words`` as the options of ``command``.

    Raises
    ------
    HelpShown
        For ``--help``.
    UsageError
        When the words do not fit, with what is wrong in one line.
    """
    prog = f"esper {name}"
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            return tyro.cli(command, prog=prog, args=list(words), config=(tyro.conf.DisallowNone,))
    except SystemExit as end:
        if not end.code:
            raise HelpShown("\n".join(line.rstrip() for line in out.getvalue().splitlines()).strip()) from None
        raise UsageError(f"{_one_line(err.getvalue())}; see {prog} --help") from None


def completion_script(commands: dict[str, type[Command]], shell: str) -> str:
    """A script that completes all commands and their options; ``shell`` is bash, zsh or fish."""
    variants = tuple(
        Annotated[kind, tyro.conf.subcommand(name)]  # pyright: ignore[reportInvalidTypeForm]
        for name, kind in commands.items()
    )
    union: Any = variants[0]
    for variant in variants[1:]:
        union = union | variant
    out = io.StringIO()
    words = ["--tyro-print-completion", shell]
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        tyro.cli(union, prog="esper", args=words, config=(tyro.conf.OmitArgPrefixes, tyro.conf.DisallowNone))
    return out.getvalue().rstrip()


def _one_line(box: str) -> str:
    """tyro's boxed message without its title, the repeated help and the line breaks."""
    sections: list[list[str]] = [[]]
    for line in box.splitlines():
        if _RULE.match(line):
            sections.append([])
        elif line.strip():
            sections[-1].append(line.strip())
    told = [_uncapitalised(" ".join(lines)) for lines in sections[1:] if lines and not lines[0].startswith(_NOISE)]
    text = "; ".join(told) or " ".join(box.split())
    return text.removeprefix("error parsing ")


def _uncapitalised(text: str) -> str:
    return text[:1].lower() + text[1:]
