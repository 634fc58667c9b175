from __future__ import annotations

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest

from esper.cli.command import UsageError
from esper.cli.json_output import check_destination, encode, write_file

pytestmark = pytest.mark.unit


def test_numbers_that_json_has_not_become_null() -> None:
    value = {"a": math.nan, "b": [math.inf, 1.5], "c": np.float32(2.0), "d": np.int64(3), "e": Path("x") / "y"}
    assert json.loads(encode(value)) == {"a": None, "b": [None, 1.5], "c": 2.0, "d": 3, "e": str(Path("x/y"))}


def test_what_has_no_json_form_is_refused() -> None:
    with pytest.raises(TypeError, match="a object has no JSON form"):
        encode({"a": object()})


def test_file_replaces_the_old_one_and_leaves_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "result.json"
    target.write_text("old", encoding="utf-8")
    write_file({"a": 1}, str(target))
    assert json.loads(target.read_text(encoding="utf-8")) == {"a": 1}
    assert target.stat().st_mode & 0o777 == 0o644
    with pytest.raises(TypeError):
        write_file({"a": object()}, str(target))
    assert json.loads(target.read_text(encoding="utf-8")) == {"a": 1}
    assert list(tmp_path.iterdir()) == [target]


def test_failed_rename_removes_the_temporary_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="disk full"):
        write_file({"a": 1}, str(tmp_path / "result.json"))
    assert list(tmp_path.iterdir()) == []


def test_a_device_is_written_to_not_replaced(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_file({"a": 1}, str(pipe))
    assert json.loads(os.read(reader, 100)) == {"a": 1}
    os.close(reader)
    assert pipe.is_fifo()


def test_bad_destinations_are_refused_with_a_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_destination("-")
    check_destination(str(tmp_path / "new.json"))
    with pytest.raises(UsageError, match=r"got the folder .*; give it a file name: .*result\.json"):
        check_destination(str(tmp_path))
    with pytest.raises(UsageError, match=r"in a folder that exists, got .*; say: mkdir -p "):
        check_destination(str(tmp_path / "no" / "x.json"))
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(UsageError, match=r"that can be written, got .*; choose another"):
        check_destination(str(tmp_path / "x.json"))
