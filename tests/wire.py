"""A TCP proxy between a client and a server of the loopback, which can do to bytes what networks do."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from typing import Literal

Way = Literal["requests", "answers"]


class Wire:
    """Forwards ``port`` to ``target``. All faults but ``cut`` last until :meth:`mend`. With ``tls`` it is what ends TLS
    before a server that has none."""

    def __init__(self, target: int, tls: ssl.SSLContext | None = None) -> None:
        self.target, self._tls = target, tls
        self.port = 0
        self.delay_s = 0.0
        self.is_refusing = False
        self.swallowed: set[Way] = set()
        """Bytes that way arrive nowhere; the connection stays."""
        self.halved: set[Way] = set()
        """Of the next bytes that way half arrive, then the connection ends."""
        self.is_duplicating = False
        """Requests go to the server twice, over two connections; the second one's answers arrive nowhere."""
        self.num_faults = 0
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()

    async def __aenter__(self) -> Wire:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self._tls)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        self.cut()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def cut(self) -> None:
        """Every connection ends at once, whatever is under way on it."""
        self.num_faults += bool(self._writers)
        for writer in list(self._writers):
            writer.transport.abort()

    def mend(self) -> None:
        self.delay_s, self.is_refusing, self.is_duplicating = 0.0, False, False
        self.swallowed.clear()
        self.halved.clear()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        upstream: list[asyncio.StreamWriter] = []
        self._writers.add(writer)
        try:
            if self.is_refusing:
                return
            server, to_server = await asyncio.open_connection("127.0.0.1", self.target)
            upstream.append(to_server)
            self._writers.add(to_server)
            flows = [self._flow("requests", reader, upstream), self._flow("answers", server, [writer])]
            if self.is_duplicating:
                deaf, twin = await asyncio.open_connection("127.0.0.1", self.target)
                upstream.append(twin)
                self._writers.add(twin)
                self.num_faults += 1
                flows.append(self._flow("answers", deaf, []))
            running = [asyncio.ensure_future(flow) for flow in flows]
            try:
                await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for flow in running:
                    flow.cancel()
                await asyncio.gather(*running, return_exceptions=True)
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            for end in (writer, *upstream):
                end.transport.abort()
                self._writers.discard(end)
            self._tasks.discard(task)

    async def _flow(self, way: Way, source: asyncio.StreamReader, sinks: list[asyncio.StreamWriter]) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(65536):
                if self.delay_s:
                    await asyncio.sleep(self.delay_s)
                if way in self.swallowed:
                    self.num_faults += 1
                    continue
                is_last = way in self.halved
                if is_last:
                    self.num_faults += 1
                    self.halved.discard(way)
                    data = data[: len(data) // 2]
                for sink in sinks:
                    sink.write(data)
                for sink in sinks:
                    await sink.drain()
                if is_last:
                    await asyncio.sleep(0.02)
                    return
