"""Writing for people: encodings, widths, tables. Nothing here knows of any command."""

from __future__ import annotations

import os
import shutil
import textwrap
from collections.abc import Sequence
from typing import TextIO

INDENT = 11
"""Columns of the first word of a result line (``done       ``)."""

_READABLE = 24
"""Columns a name may be shortened to before whole columns are left out instead."""


def printable(text: str, stream: TextIO) -> str:
    """``text`` without control characters, and within what the stream and the locale can show.

    Names come from users: an escape sequence in one must not reach the terminal. Line ends stay.
    """
    return "".join(char if _can_show(char, is_ascii(stream)) else _escaped(char) for char in text)


def is_ascii(stream: TextIO) -> bool:
    """Whether only ASCII is safe. Python turns UTF-8 on by itself in the C locale; the terminal may not follow."""
    encoding = (getattr(stream, "encoding", None) or "ascii").lower().replace("_", "-")
    locale = os.environ.get("LC_ALL") or os.environ.get("LC_CTYPE") or os.environ.get("LANG") or ""
    return not encoding.startswith("utf") or locale in ("C", "POSIX")


def columns(stream: TextIO) -> int | None:
    """Width to fit into; ``None`` where lines may be as long as they are (a file, a pipe)."""
    return max(shutil.get_terminal_size().columns, 20) if stream.isatty() else None


def write_lines(lines: Sequence[str], stream: TextIO, *, indent: int = INDENT) -> None:
    """Write lines; on a terminal, lines that are too wide go on ``indent`` columns from the left."""
    width = columns(stream)
    for line in lines:
        text = printable(line, stream)
        if width is not None and len(text) > width:
            text = "\n".join(
                textwrap.wrap(
                    text, width - 1, subsequent_indent=" " * min(indent, width // 3), break_on_hyphens=False,
                    replace_whitespace=False,
                )
            )  # fmt: skip
        stream.write(f"{text}\n")
    stream.flush()


def labelled(label: str, text: str) -> str:
    """``done       text``."""
    return f"{label:<{INDENT}}{text}"


def table(
    head: Sequence[str], rows: Sequence[Sequence[str]], *, width: int | None, numbers: Sequence[int]
) -> list[str]:
    """Aligned columns, two blanks apart; the columns in ``numbers`` are flush right.

    Too wide for ``width``, the widest columns of text are shortened in the middle (names differ at both ends), then
    columns are left out from the right.
    """
    sizes = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    texts = [i for i in range(len(head)) if i not in numbers]
    while width is not None and _total(sizes) > width:
        widest = max(texts, key=lambda i: sizes[i])
        if sizes[widest] > _READABLE:
            sizes[widest] -= 1
        elif len(sizes) > 1 and len(sizes) - 1 not in texts:
            sizes.pop()
        else:
            break
    return [
        "  ".join(_cell(row[i], size, i in numbers) for i, size in enumerate(sizes)).rstrip() for row in (head, *rows)
    ]


def _total(sizes: Sequence[int]) -> int:
    return sum(sizes) + 2 * (len(sizes) - 1)


def _cell(text: str, size: int, flush_right: bool) -> str:
    if len(text) > size:
        tail = (size - 2) // 2
        text = f"{text[: size - 2 - tail]}..{text[len(text) - tail :]}"
    return text.rjust(size) if flush_right else text.ljust(size)


def _can_show(char: str, ascii_only: bool) -> bool:
    return char == "\n" or (" " <= char <= "~" if ascii_only else char.isprintable())


def _escaped(char: str) -> str:
    return char.encode("unicode_escape", "surrogatepass").decode("ascii")
