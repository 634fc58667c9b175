from __future__ import annotations

import io
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.cli import terminal

pytestmark = pytest.mark.unit


class Screen(io.StringIO):
    """A terminal of a given width and encoding."""

    def __init__(self, encoding: str = "utf-8") -> None:
        super().__init__()
        self._encoding = encoding

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._encoding

    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _utf8_locale(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LC_ALL", "LC_CTYPE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LANG", "C.UTF-8")


@given(text=st.text())
def test_no_control_character_reaches_a_terminal(text: str) -> None:
    shown = terminal.printable(text, Screen())
    assert all(char == "\n" or char.isprintable() for char in shown)
    assert terminal.printable(text, Screen("ascii")).isascii()


def test_printable_text_stays_and_escapes_show() -> None:
    assert terminal.printable("größe", Screen()) == "größe"
    assert terminal.printable("größe", Screen("ascii")) == "gr\\xf6\\xdfe"
    assert terminal.printable("a\x1b[31mb", Screen()) == "a\\x1b[31mb"


@pytest.mark.parametrize("variable", ["LC_ALL", "LC_CTYPE", "LANG"])
def test_the_c_locale_is_ascii_although_python_turns_utf8_on(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not terminal.is_ascii(Screen())
    monkeypatch.setenv(variable, "C")
    assert terminal.is_ascii(Screen())


def test_lines_are_wrapped_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    line = "done       " + "word " * 20
    screen, file = Screen(), io.StringIO()
    terminal.write_lines([line, "short"], screen)
    terminal.write_lines([line], file)
    shown = screen.getvalue().splitlines()
    assert max(map(len, shown)) < 40 and shown[1].startswith(" " * 11 + "word") and shown[-1] == "short"
    assert file.getvalue() == line + "\n"


def test_table_aligns_text_left_and_numbers_right() -> None:
    lines = terminal.table(["site", "in"], [["a", "64"], ["long.name", "8"]], width=None, numbers=[1])
    assert lines == ["site       in", "a          64", "long.name   8"]


def test_narrow_table_shortens_names_then_leaves_out_columns() -> None:
    name = "blocks.0." + "x" * 40 + ".fc1-fc2"
    head, rows = ["site", "in", "weights"], [[name, "64", "12345678"]]
    shortened = terminal.table(head, rows, width=50, numbers=[1, 2])
    assert len(shortened[1]) == 50 and shortened[1].startswith("blocks.0.x") and "fc1-fc2  64" in shortened[1]
    dropped = terminal.table(head, rows, width=32, numbers=[1, 2])
    assert "weights" not in dropped[0] and dropped[1].endswith("64") and len(dropped[1]) <= 32


words = st.text(string.ascii_letters, min_size=1, max_size=60)


@given(rows=st.lists(st.tuples(words, words, words), min_size=1, max_size=4), width=st.integers(60, 120))
def test_table_keeps_to_the_width_and_to_one_line_a_row(rows: list[tuple[str, str, str]], width: int) -> None:
    lines = terminal.table(["a", "b", "c"], rows, width=width, numbers=[2])
    assert len(lines) == len(rows) + 1
    assert all(len(line) <= width for line in lines)
    assert terminal.table(["a", "b", "c"], rows, width=None, numbers=[2])[1].split() == list(rows[0])
