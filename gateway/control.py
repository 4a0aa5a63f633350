"""The control socket: one JSON object a line each way, for the commands that ask the running daemon.

Only this user (and root) may connect: the socket's mode says so. Knows the framing, not what the commands do.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

log = logging.getLogger("lineside.control")

REQUEST_MAX_BYTES = 1 << 20
IDLE_S_MAX = 30.0
CONNECTIONS_MAX = 16

Answer = dict[str, Any]
Commands = dict[str, Callable[[dict[str, Any]], Answer | Awaitable[Answer]]]


class ControlServer:
    """Answers each known `do` with what its function returns; a function that raises answers with the error."""

    def __init__(self, state_dir: Path, commands: Commands) -> None:
        self._path = state_dir / "control.sock"
        self._commands = commands
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.StreamWriter] = set()

    async def start(self) -> None:
        self._path.unlink(missing_ok=True)
        old = os.umask(0o177)
        # The path may be longer than a socket address; the directory's descriptor is not.
        directory = os.open(self._path.parent, os.O_PATH | os.O_DIRECTORY)
        try:
            self._server = await asyncio.start_unix_server(
                self._serve, f"/proc/self/fd/{directory}/{self._path.name}", limit=REQUEST_MAX_BYTES
            )
        finally:
            os.close(directory)
            os.umask(old)

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
        for writer in list(self._connections):
            writer.close()
        self._path.unlink(missing_ok=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._connections) >= CONNECTIONS_MAX:
            writer.close()
            return
        self._connections.add(writer)
        try:
            async with asyncio.timeout(IDLE_S_MAX):
                while line := await reader.readline():
                    writer.write(json.dumps(await self.answer(line)).encode() + b"\n")
                    await writer.drain()
        except (TimeoutError, ValueError, OSError) as error:
            log.debug("control connection ended", extra={"error": str(error)})
        finally:
            self._connections.discard(writer)
            writer.close()

    async def answer(self, line: bytes) -> Answer:
        """The reply to one request line."""
        try:
            request = json.loads(line)
        except ValueError as error:
            return {"ok": False, "error": f"not JSON: {error}"}
        do = request.get("do") if isinstance(request, dict) else None
        command = self._commands.get(do) if isinstance(do, str) else None
        if command is None:
            return {"ok": False, "error": f"unknown command {do!r}; known: {', '.join(sorted(self._commands))}"}
        try:
            answer = command(request)
            return {"ok": True} | (await answer if isinstance(answer, Awaitable) else answer)
        except Exception as error:  # one bad request must not end the daemon
            log.exception("control command failed", extra={"do": do})
            return {"ok": False, "error": str(error)}
