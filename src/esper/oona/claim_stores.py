"""Where claimed content waits: in memory, in a folder, in Redis, or wherever fsspec leads."""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import secrets
import stat
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from esper.errors import BusError, ConfigError
from esper.oona.address import Address, parse
from esper.oona.aside import aside
from esper.oona.claims import TTL_S, ClaimStore
from esper.oona.patience import patience_for
from esper.safety.disk import Disk, LocalDisk, make_folders

MOST_MEMORY_BYTES = 512 << 20
_OURS = re.compile(r"(?:[0-9a-f]{64}|\.[0-9a-f]{64}\.[0-9a-f]{16}\.part)")
"""Names of content, and of content that is being written."""
_ATOMIC = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "memory"}
"""Stores in which an object appears whole or not at all, and a rename is a copy."""


class MemoryStore:
    """Content in this process, for the bus in this process, from any thread. Beyond ``max_bytes`` the oldest goes.

    One that several use is ``shared``: then :meth:`close`, which each of them calls, takes nothing from the others.
    """

    address = "memory://"

    def __init__(
        self,
        *,
        ttl_s: float = TTL_S,
        max_bytes: int = MOST_MEMORY_BYTES,
        shared: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.ttl_s, self._max_bytes, self._clock = ttl_s, max_bytes, clock
        self._is_shared, self._lock = shared, threading.Lock()
        self._content: OrderedDict[str, tuple[float, bytes]] = OrderedDict()
        self._num_bytes = 0

    async def put(self, name: str, data: bytes) -> None:
        with self._lock:
            self._take(name)
            self._content[name] = (self._clock() + self.ttl_s, data)
            self._num_bytes += len(data)
            while self._num_bytes > self._max_bytes:
                self._take(next(iter(self._content)))

    async def get(self, name: str, limit: int) -> bytes | None:
        with self._lock:
            until, data = self._content.get(name, (None, b""))
        return None if until is None or until <= self._clock() else data[: limit + 1]

    async def sweep(self) -> int:
        with self._lock:
            old = [name for name, (until, _) in self._content.items() if until <= self._clock()]
            for name in old:
                self._take(name)
        return len(old)

    async def close(self) -> None:
        if not self._is_shared:
            with self._lock:
                self._content.clear()
                self._num_bytes = 0

    def _take(self, name: str) -> None:
        _, data = self._content.pop(name, (0.0, b""))
        self._num_bytes -= len(data)


class FolderStore:
    """A folder (0700, files 0600), on a disk that sender and receiver share as one user.

    Parameters
    ----------
    clock:
        Unix time, as the files have it.
    """

    def __init__(
        self, folder: Path, *, ttl_s: float = TTL_S, disk: Disk | None = None, clock: Callable[[], float] = time.time
    ) -> None:
        self.ttl_s, self._folder, self._clock = ttl_s, folder, clock
        self._disk = disk or LocalDisk()

    @property
    def address(self) -> str:
        return f"file://{self._folder}"

    async def put(self, name: str, data: bytes) -> None:
        await _reaching(self.address, lambda: self._put(name, data))

    async def get(self, name: str, limit: int) -> bytes | None:
        return await _reaching(self.address, lambda: self._get(name, limit))

    async def sweep(self) -> int:
        return await _reaching(self.address, self._sweep)

    async def close(self) -> None:
        """Nothing is open."""

    def _put(self, name: str, data: bytes) -> None:
        path = self._folder / name
        with contextlib.suppress(FileNotFoundError):
            if stat.S_ISREG(path.lstat().st_mode) and path.lstat().st_size == len(data):
                os.utime(path, follow_symlinks=False)  # the same content again: its time begins anew
                return
        make_folders(self._disk, self._folder)
        temporary = self._folder / f".{name}.{secrets.token_hex(8)}.part"
        handle = self._disk.create(temporary)
        try:
            try:
                handle.write(data)  # not forced to the disk: after a power cut its hash tells
            finally:
                handle.close()
            self._disk.rename(temporary, path)
        except OSError:
            with contextlib.suppress(OSError):
                self._disk.unlink(temporary)
            raise

    def _get(self, name: str, limit: int) -> bytes | None:
        path = self._folder / name
        try:
            found = path.lstat()
            if not stat.S_ISREG(found.st_mode):
                return None  # a link, whoever has put it there, is not followed
            return bytes(limit + 1) if found.st_size > limit else self._disk.read(path, limit)
        except FileNotFoundError:
            return None

    def _sweep(self) -> int:
        count, before = 0, self._clock() - self.ttl_s
        for name in self._disk.names(self._folder) if self._folder.is_dir() else ():
            path = self._folder / name
            with contextlib.suppress(FileNotFoundError):  # another process sweeps too
                if _OURS.fullmatch(name) and path.lstat().st_mtime < before:
                    self._disk.unlink(path)
                    count += 1
        return count


class RedisCalls(Protocol):
    """What is used of :class:`esper.oona.redis_connection.RedisConnection`."""

    async def call(self, key: str, *command: Any, block_s: float = 0.0) -> Any: ...

    async def close(self) -> None: ...


class RedisStore:
    """Keys in Redis that end by themselves (``SET ... EX``)."""

    def __init__(self, calls: RedisCalls, *, address: str, prefix: str = "", ttl_s: float = TTL_S) -> None:
        self.address, self.ttl_s, self._calls = address, ttl_s, calls
        self._prefix = f"{prefix}esper:claim:"

    async def put(self, name: str, data: bytes) -> None:
        key = self._prefix + name
        await self._calls.call(key, "SET", key, data, "EX", max(1, round(self.ttl_s)))

    async def get(self, name: str, limit: int) -> bytes | None:
        key = self._prefix + name
        # No more than limit + 1 bytes leave the server, whatever lies under the key.
        found: bytes = await self._calls.call(key, "GETRANGE", key, 0, limit, block_s=patience_for(limit))
        return found or None

    async def sweep(self) -> int:
        return 0

    async def close(self) -> None:
        await self._calls.close()


class ObjectStore:
    """Objects under a URL that fsspec knows (``s3://``, ``gs://``, ``sftp://``, ...); needs the extra ``claims``.

    It is reached when it is first used: some kinds connect as soon as they are opened.

    Raises
    ------
    ConfigError
        fsspec, or what it needs for this kind of URL, is missing.
    """

    def __init__(self, url: str, *, ttl_s: float = TTL_S, clock: Callable[[], float] = time.time) -> None:
        self.ttl_s, self._clock, self._url = ttl_s, clock, url
        scheme = url.partition("://")[0]
        self.address = f"{scheme}://..."  # what follows may hold a password
        try:
            self._core = importlib.import_module("fsspec.core")
        except ImportError as error:
            raise ConfigError(
                f"a claim store at {self.address} needs fsspec; install it with: pip install 'esper-morph[claims]'"
            ) from error
        try:
            for kind in scheme.split("::"):
                self._core.get_filesystem_class(kind)
        except (ImportError, ValueError) as error:
            raise ConfigError(f"fsspec must know a claim store's URL, got {self.address} ({error})") from error
        self._is_atomic = scheme in _ATOMIC
        self._opened: tuple[Any, str] | None = None

    async def put(self, name: str, data: bytes) -> None:
        await _reaching(self.address, lambda: self._put(name, data))

    async def get(self, name: str, limit: int) -> bytes | None:
        return await _reaching(self.address, lambda: self._get(name, limit))

    async def sweep(self) -> int:
        return await _reaching(self.address, self._sweep)

    async def close(self) -> None:
        """fsspec closes its connections itself."""

    def _open(self) -> tuple[Any, str]:
        """The file system and the place in it; takes as long as it takes to connect."""
        opened = self._opened
        if opened is None:
            try:
                opened = self._opened = self._core.url_to_fs(self._url)
            except OSError as error:  # its words may hold the URL
                what = f"{type(error).__name__} (error {error.errno})"
                raise BusError(f"the claim store {self.address} must be reachable, got {what}") from None
            except (ImportError, ValueError) as error:
                raise ConfigError(
                    f"fsspec must know a claim store's URL, got {self.address} ({type(error).__name__})"
                ) from None
        return opened

    def _put(self, name: str, data: bytes) -> None:
        files, root = self._open()
        files.makedirs(root, exist_ok=True)
        if self._is_atomic:
            files.pipe_file(f"{root}/{name}", data)
            return
        temporary = f"{root}/.{name}.{secrets.token_hex(8)}.part"
        files.pipe_file(temporary, data)
        files.mv(temporary, f"{root}/{name}")

    def _get(self, name: str, limit: int) -> bytes | None:
        files, root = self._open()
        try:
            return files.cat_file(f"{root}/{name}", start=0, end=limit + 1)
        except FileNotFoundError:
            return None

    def _sweep(self) -> int:
        files, root = self._open()
        count, before = 0, self._clock() - self.ttl_s
        try:
            paths = files.ls(root, detail=False)
        except FileNotFoundError:
            return 0
        for path in paths:
            with contextlib.suppress(FileNotFoundError, NotImplementedError):
                if _OURS.fullmatch(str(path).rpartition("/")[2]) and files.modified(path).timestamp() < before:
                    files.rm_file(path)
                    count += 1
        return count


def make_store(url: str, *, ttl_s: float = TTL_S, environ: Mapping[str, str] | None = None) -> ClaimStore:
    """The store that a setting names: ``memory://``, a folder's path or ``file://`` URL, Redis by the URL of a bus, or
    a URL that fsspec knows. ``environ`` says what the environment would (``address``).

    Raises
    ------
    ConfigError
        It names none, or something that it needs is missing.
    """
    scheme, separator, rest = url.partition("://")
    if not separator and url:
        return FolderStore(Path(url).absolute(), ttl_s=ttl_s)
    if scheme == "file" and rest.startswith("/"):
        return FolderStore(Path(rest), ttl_s=ttl_s)
    if scheme == "memory" and not rest:
        return MemoryStore(ttl_s=ttl_s)
    if scheme.partition("+")[0] in ("redis", "rediss"):
        return _redis_store(parse(url, environ), ttl_s)
    if not url or scheme in ("file", "memory", "kafka"):
        raise ConfigError(
            "a claim store is memory://, a folder (file:///PATH), redis://HOST:PORT or a URL that fsspec knows, got "
            f"{f'{scheme}://...' if separator else 'nothing'}; name one of them"
        )
    return ObjectStore(url, ttl_s=ttl_s)


def _redis_store(address: Address, ttl_s: float) -> RedisStore:
    try:
        connection = importlib.import_module("esper.oona.redis_connection")
    except ImportError as error:
        raise ConfigError("a claim store in Redis needs redis-py; pip install 'esper-morph[redis]'") from error
    return RedisStore(connection.RedisConnection(address), address=str(address), prefix=address.prefix, ttl_s=ttl_s)


async def _reaching(address: str, call: Callable[[], Any]) -> Any:
    """What a blocking call returns; an error of the disk or the network as a ``BusError``."""
    try:
        return await aside(call)
    except OSError as error:
        raise BusError(f"the claim store {address} must be usable, got an error ({error})") from error
