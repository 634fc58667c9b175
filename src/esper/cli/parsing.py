"""From words to a command: a parser of the standard library is built from a frozen dataclass, its errors are ours.

An option is a field annotated with its type and an :class:`Option`. Types are ``int``, ``float``, ``str``, ``Path``,
``bool`` (``--name`` and ``--no-name``), ``Literal`` of words, a tuple of one of them (one or more values), and any of
them ``| None``.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import inspect
import re
import shutil
import textwrap
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

from esper.cli.command import Command, UsageError

C = TypeVar("C", bound=Command)

_HELP = ("-h", "--help")
_REQUIRED = "the following arguments are required: "
# 1e-3, inf and nan after a minus are values too, so that whoever checks the value can say what is wrong with it.
_NEGATIVE_NUMBER = re.compile(r"-(\d+\.?\d*|\.\d+)(e[-+]?\d+)?$|-(inf|nan)$", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Option:
    """How a field looks on the command line."""

    help: str
    metavar: str = ""
    """What stands for the value; the members of a ``Literal`` stand for themselves."""
    short: str | None = None
    """A second name such as ``-o``."""
    name: str | None = None
    """The long name such as ``--set``, where it is not the field's own."""
    is_positional: bool = False
    default: str | None = None
    """The default in words; ``None`` shows the field's own, an empty text nothing."""
    completes: tuple[str, ...] | Literal["file", "directory"] = ()
    """What the shell may offer as a value. Not a check: names are checked where they are used, with near ones told."""


JsonPath = Annotated[
    str | None,
    Option(metavar="PATH", help="Also write the result as JSON; - is standard output.", default="", completes="file"),
]


class HelpShown(Exception):
    """The user asked for help; the text is the message."""


class Parser(argparse.ArgumentParser):
    """The words of one command. Errors are :class:`UsageError` in one line; a name must be written in full."""

    def __init__(self, prog: str, description: str, usage: str) -> None:
        super().__init__(
            prog=prog, usage=usage, description=description, formatter_class=_formatter, allow_abbrev=False,
            add_help=False,
        )  # fmt: skip
        self.color = False  # Python 3.14 would colour the help
        self._negative_number_matcher = _NEGATIVE_NUMBER
        self.add_argument(*_HELP, action="store_true", help="show this help and exit")

    def read(self, words: Sequence[str]) -> dict[str, Any]:
        """Values of the options that ``words`` name.

        Raises
        ------
        HelpShown
            For ``--help``.
        UsageError
            When the words do not fit, with what is wrong in one line.
        """
        options = words[: words.index("--")] if "--" in words else words
        if set(_HELP) & set(options):
            raise HelpShown(self.format_help().strip())
        unknown = [word for word in options if self._is_unknown_option(word)]
        if unknown:
            self.error(f"unrecognized options: {', '.join(unknown)}{self._near(unknown[0])}")
        values, rest = self.parse_known_args(list(words))
        if rest:
            self.error(f"unrecognized options: {', '.join(rest)}")
        return {
            key: tuple(value) if isinstance(value, list) else value
            for key, value in vars(values).items()
            if key != "help"
        }

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing and leaving."""
        message = message.removeprefix("argument ")
        argument, _, problem = message.partition(": ")
        if message.startswith(_REQUIRED):
            missing = [self._shown(name.split("/")[0]) for name in message.removeprefix(_REQUIRED).split(", ")]
            message = f"missing: {', '.join(missing)}"
        elif problem.startswith("expected "):
            message = f"missing value for argument {argument!r}; say: {self._shown(argument.split('/')[0])}"
        raise UsageError(f"{message}; see {self.prog} --help")

    def _is_unknown_option(self, word: str) -> bool:
        if not word.startswith("-") or word == "-" or _NEGATIVE_NUMBER.match(word):
            return False
        known = self._option_string_actions
        return not (word.partition("=")[0] in known or (not word.startswith("--") and word[:2] in known))

    def _near(self, word: str) -> str:
        name = word.partition("=")[0].replace("_", "-")
        near = difflib.get_close_matches(name, list(self._option_string_actions), n=3, cutoff=0.7)
        return f"; perhaps you meant: {', '.join(map(self._shown, near))}" if near else ""

    def _shown(self, name: str) -> str:
        """An option as it is typed: ``--steps N``."""
        action = self._option_string_actions.get(name)
        return f"{name} {action.metavar}" if action is not None and action.metavar else name


def add_options(
    parser: argparse.ArgumentParser, command: type[Command]
) -> list[tuple[argparse.Action, tuple[str, ...] | Literal["file", "directory"]]]:
    """Add every field of ``command``; returns the actions and what the shell may offer as their values."""
    added: list[tuple[argparse.Action, tuple[str, ...] | Literal["file", "directory"]]] = []
    for field in _fields(command):
        names = field.names
        # Defaults are left to the dataclass: what the user did not say is not in the result.
        settings: dict[str, Any] = {"default": argparse.SUPPRESS, "help": _help_text(field)}
        if field.kind is bool:
            action = parser.add_argument(*names, action=argparse.BooleanOptionalAction, **settings)
            action.help = settings["help"]  # Python 3.11 and 3.12 add the default in their own words
        else:
            if field.option.is_positional:
                settings["nargs"] = None if field.is_required else "?"
            else:
                settings.update(required=field.is_required, dest=field.name)
                if field.is_list:  # --set A B and --set A --set B say the same
                    settings.update(nargs="+", action="extend")
            action = parser.add_argument(*names, type=_reader(field), metavar=field.metavar, **settings)
        added.append((action, field.option.completes or field.words))
    return added


def build_parser(command: type[Command], name: str) -> Parser:
    """The parser of ``esper NAME``; the docstring of ``command`` is its description."""
    fields = _fields(command)
    words = [f.metavar if f.is_required else f"[{f.metavar}]" for f in fields if f.option.is_positional]
    words += [f"{f.names[0]} {f.metavar}" for f in fields if f.is_required and not f.option.is_positional]
    usage = " ".join([f"esper {name}", *words, "[OPTIONS]"])
    parser = Parser(f"esper {name}", _wrapped(inspect.getdoc(command) or ""), usage)
    add_options(parser, command)
    return parser


def parse(command: type[C], name: str, words: Sequence[str]) -> C:
    """Read ``words`` as the options of ``command``.

    Raises
    ------
    HelpShown
        For ``--help``.
    UsageError
        When the words do not fit, with what is wrong in one line.
    """
    return command(**build_parser(command, name).read(words))


@dataclass(frozen=True, kw_only=True)
class _Field:
    """A field of a command, its type taken apart."""

    name: str
    kind: Any
    default: Any
    option: Option
    is_list: bool
    words: tuple[str, ...]
    """Members of a ``Literal``."""

    @property
    def is_required(self) -> bool:
        return self.default is dataclasses.MISSING

    @property
    def names(self) -> list[str]:
        if self.option.is_positional:
            return [self.name]
        long = self.option.name or f"--{self.name.replace('_', '-')}"
        return [long] if self.option.short is None else [self.option.short, long]

    @property
    def metavar(self) -> str:
        return self.option.metavar or f"{{{','.join(self.words)}}}"


def _fields(command: type[Command]) -> list[_Field]:
    hints = get_type_hints(command, include_extras=True)
    found: list[_Field] = []
    for field in dataclasses.fields(command):  # pyright: ignore[reportArgumentType]
        kind, option = get_args(hints[field.name])
        if get_origin(kind) in (Union, types.UnionType):
            (kind,) = (part for part in get_args(kind) if part is not type(None))
        is_list = get_origin(kind) is tuple
        kind = get_args(kind)[0] if is_list else kind
        words = get_args(kind) if get_origin(kind) is Literal else ()
        found.append(
            _Field(name=field.name, kind=kind, default=field.default, option=option, is_list=is_list, words=words)
        )
    return found


def _help_text(field: _Field) -> str:
    said = field.option.default
    if said is None:
        said = "required" if field.is_required else f"default: {field.default}"
    elif said:
        said = f"default: {said}"
    return (f"{field.option.help} ({said})" if said else field.option.help).replace("%", "%%")


def _reader(field: _Field) -> Callable[[str], Any]:
    """What turns one word into a value of the field's type."""
    if field.words:
        return _one_of(field.words)
    if field.kind is int:
        return _number(int, "a whole number", "600")
    if field.kind is float:
        return (
            _number(float, "numbers", f"{field.names[0]} 1e-3 3e-3")
            if field.is_list
            else _number(float, "a number", "1.5")
        )
    return field.kind


def _one_of(known: Sequence[str]) -> Callable[[str], str]:
    def read(word: str) -> str:
        if word in known:
            return word
        near = difflib.get_close_matches(word, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise argparse.ArgumentTypeError(f"must be one of {', '.join(known)}, got {word!r}{hint}")

    return read


def _number(kind: Callable[[str], Any], what: str, example: str) -> Callable[[str], Any]:
    def read(word: str) -> Any:
        try:
            return kind(word)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be {what}, got {word!r}; for example {example}") from None

    return read


def _columns() -> int:
    return max(min(shutil.get_terminal_size().columns, 100), 40) - 2


def _wrapped(text: str) -> str:
    paragraphs = (" ".join(paragraph.split()) for paragraph in text.split("\n\n"))
    return "\n\n".join(textwrap.fill(paragraph, _columns(), break_on_hyphens=False) for paragraph in paragraphs)


def _formatter(prog: str) -> argparse.HelpFormatter:
    return argparse.RawDescriptionHelpFormatter(prog, max_help_position=22, width=_columns())
