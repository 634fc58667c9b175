"""A file is the old one or the new one, never half of either."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from esper.files import replace_file, replace_text

pytestmark = pytest.mark.unit


def test_a_file_is_replaced_whole_and_readable_by_all(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    replace_text(target, "one\n")
    replace_text(target, "zwei ä\n")
    assert target.read_bytes() == "zwei ä\n".encode()
    assert target.stat().st_mode & 0o777 == 0o644
    assert os.listdir(tmp_path) == ["a.txt"]


def test_whatever_goes_wrong_the_old_file_stays(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    replace_text(target, "old")

    def half(path: Path) -> None:
        path.write_text("ha", encoding="utf-8")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        replace_file(target, half)
    assert target.read_text(encoding="utf-8") == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        replace_text(tmp_path / "none" / "a.txt", "x")
