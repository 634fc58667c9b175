"""Where a Karn database is.

::

    runs/karn.db                                        a file: SQLite
    postgresql://USER:PASSWORD@HOST:PORT/DATABASE       a PostgreSQL server; ?NAME=VALUE as libpq knows them

What a URL leaves out comes from ``PGHOST``, ``PGPORT``, ``PGDATABASE``, ``PGUSER``, ``PGPASSWORD``, ``~/.pgpass`` and
the other usual places. A URL stands in process lists, so a password is better kept there.
"""

from __future__ import annotations

import re
from pathlib import Path

from esper.errors import ConfigError

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
"""Two letters or more: one is a drive. One slash, since paths have lost the second."""
_HOST = r"(\[[^\]/?@]*\]|[^:/?@,\[\]]*)(:\d*)?"
_URL = re.compile(
    r"(?P<scheme>postgres(ql)?)://(?P<user>[^@/?]*@)?(?P<place>" + f"{_HOST}(,{_HOST})*" + r"(/[^@/?]*)?)"
    r"(?P<query>\?[^@]*)?"
)


def is_url(place: str | Path) -> bool:
    """Whether a server is meant and not a file.

    Raises
    ------
    ConfigError
        A URL, but none of the form above. The message holds nothing of it but the scheme: what is not understood may
        be a password.
    """
    text = str(place)
    if _SCHEME.match(text) is None:
        return False
    if isinstance(place, Path):
        raise ConfigError(f"a URL is passed as str, got a Path that begins with {text.partition('/')[0]!r}; pass a str")
    if _URL.fullmatch(text) is None:
        raise ConfigError(
            "a Karn database is a file or postgresql://USER:PASSWORD@HOST:PORT/DATABASE, got another "
            f"{text.partition(':')[0]}:// URL; write the signs @ / ? of a user, password or parameter as %40 %2F %3F"
        )
    return True


def shown(place: str | Path) -> str:
    """``place`` for people and logs: of a URL neither user, password nor parameters."""
    if not is_url(place):
        return str(place)
    found = _URL.fullmatch(str(place))
    assert found is not None
    return f"{found['scheme']}://{'***@' if found['user'] else ''}{found['place']}{'?...' if found['query'] else ''}"
