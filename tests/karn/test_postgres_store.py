"""What a server brings along: who may enter, what is secret, and a server that goes away."""

from __future__ import annotations

import json
import socket
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
from tests.cli.recorded import write_run
from tests.karn.made import design, report
from tests.servers import PostgresServer

from esper.cli import main
from esper.errors import ConfigError, StateError
from esper.karn import Database, FieldReport

pytestmark = pytest.mark.component

PASSWORD = PostgresServer.PASSWORD


@pytest.fixture
def url(postgres_server: PostgresServer) -> str:
    return postgres_server.new_database()


def database_of(url: str) -> str:
    return url.rpartition("/")[2]


def assert_hidden(text: str, *more: str) -> None:
    for secret in (PASSWORD, quote(PASSWORD, safe=""), *more):
        assert secret not in text


def told(url: str) -> str:
    """The refusal, with everything that a traceback would show of it."""
    with pytest.raises(StateError) as refused:
        Database(url)
    return "".join(traceback.format_exception(refused.value))


def test_credentials_of_the_environment(
    postgres_server: PostgresServer, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    monkeypatch.setenv("PGUSER", PostgresServer.USER)
    monkeypatch.setenv("PGPASSWORD", PASSWORD)
    monkeypatch.setenv("PGHOST", "127.0.0.1")
    monkeypatch.setenv("PGPORT", str(postgres_server.port))
    monkeypatch.setenv("PGDATABASE", database_of(url))
    monkeypatch.setenv("PGCONNECT_TIMEOUT", "7")
    with Database("postgresql://") as database:
        assert database.file([report()]) == 1 and database.name == "postgresql://"
    with Database(url, must_exist=True) as database:
        assert database.reports() == [report()]


def test_a_wrong_password_is_not_repeated(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = url.replace(quote(PASSWORD, safe=""), "wrong-secret")
    text = told(wrong)
    assert "password authentication failed" in text and "are host, database, user and password the right ones" in text
    assert_hidden(text, "wrong-secret")
    monkeypatch.setenv("PGPASSWORD", "other-secret")
    assert_hidden(told(url.replace(f":{quote(PASSWORD, safe='')}@", "@")), "other-secret")


def test_a_secret_that_the_server_repeats_is_hidden(url: str) -> None:
    """A database called like the password: the server names it, we do not."""
    text = told(f"{url.rpartition('/')[0]}/{quote(PASSWORD, safe='')}")
    assert 'database "***" does not exist' in text
    assert PASSWORD not in text


def test_no_server(url: str) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        port = silent.getsockname()[1]
        text = told(f"postgresql://u:my-secret@127.0.0.1:{port}/d")
    assert "is the server up" in text and "my-secret" not in text


def test_a_server_that_never_answers(url: str) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        text = told(f"postgresql://u:my-secret@127.0.0.1:{silent.getsockname()[1]}/d?connect_timeout=2")
    assert "is the server up" in text and "my-secret" not in text


def test_parameters_that_libpq_does_not_know(url: str) -> None:
    secret = "my-" + "secret"  # not as a whole in a line that a traceback quotes
    with pytest.raises(ConfigError, match=r"NAME=VALUE, got others in 'postgresql://\*\*\*@h/d\?\.\.\.'") as refused:
        Database(f"postgresql://u:{secret}@h/d?pasword={secret}")
    assert secret not in "".join(traceback.format_exception(refused.value))


def test_users_with_few_rights(postgres_server: PostgresServer, url: str) -> None:
    """Who may make no schema can use one that is there; who may read only can read."""
    name = database_of(url)
    for user in ("writer", "reader"):
        postgres_server.ask(f"CREATE ROLE {user}_of_{name} LOGIN PASSWORD 'x'")
    writer, reader = (url.replace(url[13 : url.index("@")], f"{user}_of_{name}:x") for user in ("writer", "reader"))
    assert "give the user the right" in told(writer)
    postgres_server.ask("CREATE SCHEMA karn", name)
    postgres_server.ask(f"GRANT USAGE, CREATE ON SCHEMA karn TO writer_of_{name}", name)
    with Database(writer) as database:
        assert database.file([report()]) == 1
    postgres_server.ask(f"GRANT USAGE ON SCHEMA karn TO reader_of_{name}", name)
    postgres_server.ask(f"GRANT SELECT ON ALL TABLES IN SCHEMA karn TO reader_of_{name}", name)
    with Database(reader, must_exist=True) as database:
        assert database.reports() == [report()]
        with pytest.raises(StateError, match=r"permission denied .*give the user the right"):
            database.file([report(1)])


def test_other_settings_of_the_server_change_nothing(postgres_server: PostgresServer, url: str) -> None:
    """Neither a stricter isolation nor another search path, and what others keep beside it stays theirs."""
    name = database_of(url)
    postgres_server.ask("CREATE TABLE reports (song TEXT)", name)
    postgres_server.ask(f"ALTER DATABASE {name} SET default_transaction_isolation = 'serializable'")
    postgres_server.ask(f"ALTER DATABASE {name} SET search_path = 'public'")

    def slow() -> Iterator[FieldReport]:
        yield report()
        waiting = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
        beside.start()
        while postgres_server.ask(waiting) != [(1,)]:
            time.sleep(0.01)

    with Database(url) as one, Database(url) as two:
        new = list[int]()
        beside = threading.Thread(target=lambda: new.append(two.file([report(), report(1)])))
        assert one.file(slow()) == 1
        beside.join()
        assert new == [1], "what the first one has filed is seen by the second, whose turn comes later"
        assert one.reports() == two.reports() == [report(), report(1)]
    assert postgres_server.ask("SELECT * FROM reports", name) == []


def test_a_connection_that_is_cut(postgres_server: PostgresServer, url: str) -> None:
    with Database(url) as database:
        database.file([report()])
        postgres_server.ask(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'esper karn'"
        )
        with pytest.raises(StateError, match="is the server up"):
            database.file([report(1)])
    with Database(url) as database:
        assert database.reports() == [report()]


def test_what_it_cannot_hold(url: str) -> None:
    with Database(url) as database:
        with pytest.raises(StateError, match=r"cannot be used .*see the server's log"):
            database.file([report(run="a\0b")])
        assert database.reports() == []


def test_from_the_shell(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    recorded_run = write_run(Path("runs/digits-01"))

    def run(*words: str, code: int = 0) -> str:
        assert main(["karn", *words, "--db", url]) == code
        out = capsys.readouterr()
        assert_hidden(out.out + out.err)
        return out.out if code == 0 else out.err

    place = f"postgresql://***@{url.partition('@')[2]}"
    assert f"got none yet at '{place}'; make one with: esper karn import RUN_DIR --db URL" in run("list", code=1)
    assert run("import", str(recorded_run)) == f"imported   1 of 1 reports are new in {place}\n"
    assert run("list").startswith("reports    1 of 1 runs, 1 cohorts kept")
    assert run("export", "out.json") == "exported   1 reports, 1 designs in out.json\n"
    assert json.loads(run("import", "out.json", "--json", "-"))["db"] == place
    with Database(url) as database:
        database.add([design()])
    assert "lineage" in run("show", design().name)
