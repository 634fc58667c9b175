"""Where a bus is, as a URL, and what opens it, from the environment.

::

    memory://NAME                           inside this process
    redis://HOST:PORT/DATABASE              one Redis server; rediss:// with TLS
    redis+cluster://HOST:PORT,HOST:PORT     a Redis Cluster, any of its nodes; rediss+cluster:// with TLS
    kafka://HOST:PORT,HOST:PORT             Kafka, any of its brokers; kafka+tls:// with TLS

    ?prefix=TEXT     before every topic and group: several users of one broker
    ?timeout=5       seconds that the broker has to answer
    ?sasl=MECHANISM  Kafka: PLAIN, SCRAM-SHA-256 or SCRAM-SHA-512 (the default)

    ESPER_BUS_USERNAME, ESPER_BUS_PASSWORD  who we are
    ESPER_BUS_CA                            file with the authorities to trust instead of the system's
    ESPER_BUS_CERT, ESPER_BUS_KEYFILE       files with our own certificate and its key

A URL stands in process lists, logs and run folders, so a password in one is refused.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import parse_qsl, quote

from esper.errors import ConfigError
from esper.oona.bus import Bus
from esper.oona.memory import MemoryBus

_REMOTE = {
    "redis": ("redis", 6379, False, False),
    "rediss": ("redis", 6379, True, False),
    "redis+cluster": ("redis", 6379, False, True),
    "rediss+cluster": ("redis", 6379, True, True),
    "kafka": ("kafka", 9092, False, False),
    "kafka+tls": ("kafka", 9092, True, False),
}
"""Scheme -> broker, its usual port, whether with TLS, whether a Redis Cluster."""
_SCHEMES = ", ".join(f"{name}://" for name in ("memory", *_REMOTE))
_PARAMETERS = ("prefix", "timeout", "sasl")
_SASL = ("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512")
_PREFIX = re.compile(r"[A-Za-z0-9._-]{0,64}")
_HOST = re.compile(r"(?P<host>\[[0-9A-Fa-f:.%]+\]|[A-Za-z0-9._-]+)(:(?P<port>\d{1,5}))?")
_USER_INFO = re.compile(r"((?<=://)|^(?!.*://)).*@", re.DOTALL)
"""Greedy up to the last '@': a password may hold any sign, '/' and '@' too."""


@dataclass(frozen=True)
class Credentials:
    """Who we are and whom we trust. Neither ``repr`` nor an error shows what is secret in it."""

    username: str = ""
    password: str = field(default="", repr=False)
    ca: str = ""
    cert: str = ""
    keyfile: str = ""

    @classmethod
    def of(cls, environ: Mapping[str, str]) -> Credentials:
        """From the environment.

        Raises
        ------
        ConfigError
            A file does not exist, or half of a pair is missing.
        """
        names = ("USERNAME", "PASSWORD", "CA", "CERT", "KEYFILE")
        username, password, ca, cert, keyfile = (environ.get(f"ESPER_BUS_{name}", "") for name in names)
        for name, path in (("CA", ca), ("CERT", cert), ("KEYFILE", keyfile)):
            if path and not os.path.isfile(path):
                raise ConfigError(f"ESPER_BUS_{name} must name a file, got {path!r}; correct it or unset it")
        if bool(cert) != bool(keyfile):
            raise ConfigError("ESPER_BUS_CERT and ESPER_BUS_KEYFILE belong together, got one of them; set both")
        if username and not password:
            raise ConfigError(f"ESPER_BUS_USERNAME={username!r} needs a password; set ESPER_BUS_PASSWORD")
        return cls(username, password, ca, cert, keyfile)

    def hide(self, text: str) -> str:
        """``text`` without the password, however it is quoted there."""
        for form in {self.password, quote(self.password, safe=""), repr(self.password)[1:-1]} - {""}:
            text = text.replace(form, "***")
        return text


@dataclass(frozen=True)
class Address:
    """A parsed URL. As a string it is a URL again, without what is secret."""

    scheme: str
    hosts: tuple[tuple[str, int], ...] = ()
    name: str = ""
    """The hub's name of ``memory://``."""
    database: int = 0
    prefix: str = ""
    timeout_s: float = 5.0
    sasl: str = "SCRAM-SHA-512"
    credentials: Credentials = field(default_factory=Credentials, repr=False)

    @property
    def broker(self) -> str:
        """``memory``, ``redis`` or ``kafka``."""
        return _REMOTE[self.scheme][0] if self.scheme in _REMOTE else self.scheme

    @property
    def has_tls(self) -> bool:
        return self.scheme in _REMOTE and _REMOTE[self.scheme][2]

    @property
    def is_cluster(self) -> bool:
        return self.scheme in _REMOTE and _REMOTE[self.scheme][3]

    def __str__(self) -> str:
        hosts = ",".join(f"{host}:{port}" for host, port in self.hosts)
        database = f"/{self.database}" if self.database else ""
        prefix = f"?prefix={self.prefix}" if self.prefix else ""
        return f"{self.scheme}://{self.name}{hosts}{database}{prefix}"


def shown(url: str) -> str:
    """``url`` for people: without user, password and parameters, whether or not it is a proper one."""
    place, mark, _ = _USER_INFO.sub("***@", url).partition("?")
    return place[:200] + (mark and "?...")


def parse(url: str, environ: Mapping[str, str] | None = None) -> Address:
    """What ``url`` says, with the credentials of the environment.

    Raises
    ------
    ConfigError
        It is none of the forms above. The message does not hold what is secret.
    """
    scheme, separator, rest = url.partition("://")
    if not separator or (scheme != "memory" and scheme not in _REMOTE):
        raise ConfigError(
            f"a bus begins with one of {_SCHEMES}, got {shown(url)!r}; say memory:// for none but this one"
        )
    if "@" in rest:
        raise ConfigError(
            f"a bus must hold no user or password, since URLs are seen in process lists and logs, got {shown(url)!r}; "
            "set ESPER_BUS_USERNAME and ESPER_BUS_PASSWORD instead"
        )
    place, _, query = rest.partition("?")
    authority, _, path = place.partition("/")
    prefix, timeout_s, sasl = _parameters(url, query)
    if scheme == "memory":
        if path or not _PREFIX.fullmatch(authority):
            raise ConfigError(f"memory:// is followed by a name of letters, digits and ._-, at most 64, got {url!r}")
        return Address(scheme, name=authority, prefix=prefix, timeout_s=timeout_s)
    return Address(
        scheme,
        hosts=_hosts(url, scheme, authority),
        database=_database(url, scheme, path),
        prefix=prefix,
        timeout_s=timeout_s,
        sasl=sasl,
        credentials=Credentials.of(os.environ if environ is None else environ),
    )


def open_bus(url: str, environ: Mapping[str, str] | None = None) -> Bus:
    """The bus at ``url``. It connects on first use.

    Raises
    ------
    ConfigError
        The URL is not understood, or the package that the broker needs is not installed.
    """
    address = parse(url, environ)
    if address.broker == "memory":
        # Of one name and two prefixes are made two hubs: nothing of one is seen in the other.
        return MemoryBus(address.name + (f"?prefix={address.prefix}" if address.prefix else ""))
    try:
        if address.broker == "redis":
            from esper.oona.redis_streams import RedisBus

            return RedisBus(address)
        from esper.oona.kafka import KafkaBus

        return KafkaBus(address)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("redis", "confluent_kafka"):
            raise
        raise ConfigError(
            f"{address} needs {error.name}, which is not installed; pip install 'esper-morph[{address.broker}]'"
        ) from error


def _parameters(url: str, query: str) -> tuple[str, float, str]:
    given = dict(parse_qsl(query, keep_blank_values=True))
    unknown = sorted(set(given) - set(_PARAMETERS))
    if unknown:
        # The value is not shown: it may be a password under a name of another library.
        raise ConfigError(f"a bus has the parameters {', '.join(_PARAMETERS)}, got {', '.join(unknown)[:80]!r}")
    prefix = given.get("prefix", "")
    if not _PREFIX.fullmatch(prefix):
        raise ConfigError(f"prefix has letters, digits and ._-, at most 64, got {prefix[:80]!r}")
    try:
        timeout_s = float(given.get("timeout", "5"))
    except ValueError:
        timeout_s = 0.0
    if not 0.05 <= timeout_s <= 300:
        raise ConfigError(f"timeout is between 0.05 and 300 seconds, got {given['timeout'][:40]!r}")
    sasl = given.get("sasl", Address.sasl).upper()
    if sasl not in _SASL:
        raise ConfigError(f"sasl is one of {', '.join(_SASL)}, got {sasl[:40]!r}")
    if sasl == "PLAIN" and not url.startswith("kafka+tls:"):
        raise ConfigError("sasl=PLAIN sends the password as it is and needs kafka+tls://, got kafka://; take SCRAM")
    return prefix, timeout_s, sasl


def _hosts(url: str, scheme: str, authority: str) -> tuple[tuple[str, int], ...]:
    broker, usual_port, _, is_cluster = _REMOTE[scheme]
    hosts: list[tuple[str, int]] = []
    for part in authority.split(","):
        match = _HOST.fullmatch(part)
        port = int(match["port"] or usual_port) if match else 0
        if not match or not 0 < port < 65536:
            raise ConfigError(f"{scheme}:// is followed by HOST:PORT, got {part[:80]!r} in {url!r}")
        hosts.append((match["host"], port))
    if len(hosts) > 1 and broker == "redis" and not is_cluster:
        raise ConfigError(f"{scheme}:// is one server, got {len(hosts)} in {url!r}; {scheme}+cluster:// takes several")
    return tuple(hosts)


def _database(url: str, scheme: str, path: str) -> int:
    if not path:
        return 0
    if scheme not in ("redis", "rediss") or not re.fullmatch(r"\d{1,4}", path):
        raise ConfigError(
            f"after the host may stand a database's number with redis:// only, got /{path[:40]} in {url!r}"
        )
    return int(path)
