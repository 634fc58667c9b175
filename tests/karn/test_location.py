"""What names a Karn database, and what of it may be shown."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.errors import ConfigError
from esper.karn import Database
from esper.karn.location import is_url, shown

pytestmark = pytest.mark.unit

SHOWN = {
    "postgresql://host/db": "postgresql://host/db",
    "postgres://alice:secret@host:5433/db?sslmode=require": "postgres://***@host:5433/db?...",
    "postgresql://alice@[::1]:5433,other/db": "postgresql://***@[::1]:5433,other/db",
    "postgresql:///db?host=/run/postgresql": "postgresql:///db?...",
    "postgresql://": "postgresql://",
    "postgresql://u:p%40ss%2Fword#!@host": "postgresql://***@host",
}


@pytest.mark.parametrize("url", list(SHOWN))
def test_urls_are_shown_without_what_is_secret(url: str) -> None:
    assert is_url(url) and shown(url) == SHOWN[url]


@pytest.mark.parametrize("path", ["runs/karn.db", "/a/b.db", "C:/a.db", "C:\\a.db", "a:b.db", "karn.db?x=1", "u@h/db"])
def test_everything_else_is_a_file(path: str) -> None:
    assert not is_url(path) and shown(Path(path)) == str(Path(path))


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://u:se/cret@host/db", "postgresql://u:se@cret@host/db", "postgresql://u:se?cret@host/db",
        "postgresql://host:secret/db", "postgresql://u:secret", "postgresql://h/db?password=se@cret", "mysql://secret/db",
        "postgressql://secret@host/db", "postgresql:/secret/db", "sqlite:///secret.db",
    ],
)  # fmt: skip
def test_what_is_not_understood_is_refused_unseen(url: str) -> None:
    with pytest.raises(ConfigError, match=r"a file or postgresql://.*%40 %2F %3F") as refused:
        Database(url)
    assert "cret" not in str(refused.value)


def test_a_path_cannot_be_a_url() -> None:
    with pytest.raises(ConfigError, match=r"a URL is passed as str, got a Path that begins with") as refused:
        Database(Path("postgresql://u:secret@host/db"))
    assert "secret" not in str(refused.value)


@given(st.text("xyz@/?#:%&,=[] \\", max_size=8), st.sampled_from(["postgresql", "postgres", "mysql"]))
def test_no_password_is_ever_shown(middle: str, scheme: str) -> None:
    """Quoted or not, whatever signs it holds."""
    password = f"S3{middle}S3"
    for url in (f"{scheme}://u:{password}@h/d", f"{scheme}://h/d?password={password}"):
        try:
            told = shown(url)
        except ConfigError as error:
            told = str(error)
        assert "S3" not in told


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    monkeypatch.delitem(sys.modules, "esper.karn.postgres_store", raising=False)
    told = r"'postgresql://\*\*\*@h/d' needs psycopg, .*pip install 'esper-morph\[postgres\]'"
    with pytest.raises(ConfigError, match=told):
        Database("postgresql://u:secret@h/d")


def test_files_need_no_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    Database(tmp_path / "karn.db").close()
