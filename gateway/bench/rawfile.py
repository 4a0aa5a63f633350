"""A raw file as a peer: `python -m gateway.bench.rawfile PORT FILE [patient]`.

What the disk allows behind the same wire: takes MQTT 3.1.1 QoS 1 publishes, appends topic and payload to FILE, and
acknowledges each batch after one fdatasync of it. While one syncs, the next gathers; `patient`: and goes on gathering
as ours does after a slow commit. Keeps no order, place or checksum, could not find a message again, and believes all
that it is sent.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor

from gateway.committer import GATHER_S_MAX, GATHER_SHARE

CONNECT, PUBLISH_QOS_1 = 0x10, 0x32
CONNACK, PUBACK = b"\x20\x02\x00\x00", b"\x40\x02"


class File:
    """Group commit into a file, in one other thread."""

    def __init__(self, path: str, patient: bool) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._executor = ThreadPoolExecutor(max_workers=1)
        self._busy = False
        self._patient = patient
        self._worth = 0
        self._until = 0.0
        self._gathering: asyncio.TimerHandle | None = None
        self.parts: list[bytes] = []
        self.owed: dict[Publisher, list[bytes]] = {}

    def kick(self) -> None:
        if not self._busy:
            self._busy = True
            self._gather()
        elif self._gathering is not None and len(self.parts) >= self._worth:
            self._gathering.cancel()
            self._gather()

    def _gather(self) -> None:
        loop = asyncio.get_running_loop()
        if not self._patient or len(self.parts) >= self._worth or loop.time() >= self._until:
            self._gathering = None
            loop.call_soon(self._submit)
        else:
            self._gathering = loop.call_at(self._until, self._submit)

    def _submit(self) -> None:
        self._gathering = None
        parts, self.parts = self.parts, []
        owed, self.owed = self.owed, {}
        loop = asyncio.get_running_loop()
        future = self._executor.submit(self._write, b"".join(parts))
        future.add_done_callback(lambda done: loop.call_soon_threadsafe(self._written, done.result(), owed))

    def _write(self, data: bytes) -> float:
        began = time.perf_counter()
        view = memoryview(data)
        while view:
            view = view[os.write(self._descriptor, view) :]
        os.fdatasync(self._descriptor)
        return time.perf_counter() - began

    def _written(self, took_s: float, owed: dict[Publisher, list[bytes]]) -> None:
        self._worth = len(self.parts) + sum(map(len, owed.values()))
        self._until = asyncio.get_running_loop().time() + min(GATHER_S_MAX, took_s * GATHER_SHARE)
        for publisher, ids in owed.items():
            publisher.transport.write(PUBACK + PUBACK.join(ids))
        if self.parts:
            self._gather()
        else:
            self._busy = False


class Publisher(asyncio.Protocol):
    def __init__(self, file: File) -> None:
        self._file = file
        self._rest = b""
        self.transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        data = self._rest + data
        at, size = 0, len(data)
        add, ids = self._file.parts.append, []
        while at + 2 <= size:
            length, body, shift = data[at + 1] & 127, at + 2, 7
            while data[body - 1] > 127 and body < size:
                length |= (data[body] & 127) << shift
                shift += 7
                body += 1
            end = body + length
            if data[body - 1] > 127 or end > size:
                break
            if data[at] == PUBLISH_QOS_1:
                id_at = body + 2 + (data[body] << 8 | data[body + 1])
                ids.append(data[id_at : id_at + 2])
                add(data[body:end])
            elif data[at] == CONNECT:
                self.transport.write(CONNACK)
            at = end
        self._rest = data[at:]
        if ids:
            self._file.owed.setdefault(self, []).extend(ids)
            self._file.kick()


async def serve(port: int, path: str, patient: bool) -> None:
    file = File(path, patient)
    server = await asyncio.get_running_loop().create_server(lambda: Publisher(file), "127.0.0.1", port)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(serve(int(sys.argv[1]), sys.argv[2], sys.argv[3:] == ["patient"]))
