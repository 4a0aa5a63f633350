"""A TCP line on loopback that can go into a tunnel: bytes vanish without a FIN, later connections are reset.

For the demo and tests. Forwards to one target; opens nothing that is not on this machine.
"""

from __future__ import annotations

import asyncio
from enum import Enum

PIECE_BYTES = 65536


class Line(Enum):
    UP = "up"
    TUNNEL = "tunnel"  # silent: what is sent is swallowed, nobody hears of it
    CLOSED = "closed"  # polite: connections end with a FIN, new ones too


class FaultLink:
    """`await start()`, then `cut` and `restore` as often as wanted; `await stop()` in the end."""

    def __init__(self, target_port: int, target_host: str = "127.0.0.1") -> None:
        self._target = target_host, target_port
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self.line = Line.UP
        self.port = 0
        self.forwarded_bytes = 0
        self.swallowed_bytes = 0
        self.cut_after_bytes: int | None = None

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
        self._abort_all()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def cut(self, line: Line = Line.TUNNEL) -> None:
        self.line = line
        if line is Line.CLOSED:
            for writer in list(self._writers):
                writer.close()

    def restore(self) -> None:
        """The line is back; whoever held on through a tunnel finds its connection reset."""
        if self.line is Line.TUNNEL:
            self._abort_all()
        self.line = Line.UP

    def _abort_all(self) -> None:
        for writer in list(self._writers):
            writer.transport.abort()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.line is Line.CLOSED:
            writer.close()
            return
        try:
            far_reader, far_writer = await asyncio.open_connection(*self._target)
        except OSError:
            writer.transport.abort()
            return
        for near, far in ((reader, far_writer), (far_reader, writer)):
            self._writers.add(far)
            task = asyncio.create_task(self._forward(near, far))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(PIECE_BYTES):
                left = self.cut_after_bytes
                if left is not None and self.line is Line.UP:
                    # Mid-frame: let through what is left of the budget, then the tunnel begins.
                    self.cut_after_bytes = max(0, left - len(data))
                    if len(data) > left:
                        writer.write(data[:left])
                        self.cut_after_bytes = None
                        self.line = Line.TUNNEL
                        continue
                if self.line is not Line.UP:
                    self.swallowed_bytes += len(data)
                    continue
                self.forwarded_bytes += len(data)
                writer.write(data)
                await writer.drain()
        except OSError:
            pass
        finally:
            self._writers.discard(writer)
            if self.line is Line.UP:
                writer.close()
