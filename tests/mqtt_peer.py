"""An MQTT client that says exactly what it is told to, and knows packets only by their bytes."""

from __future__ import annotations

import asyncio

from gateway.mqtt import codec
from gateway.mqtt.packets import Packet

WAIT_S = 40.0


class MqttPeer:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, version: int) -> None:
        self.reader, self.writer, self.version = reader, writer, version

    def say(self, packet: Packet) -> None:
        self.writer.write(codec.encode(packet, self.version))

    async def hear(self) -> Packet | None:
        """The next packet, None at the end of the connection."""
        async with asyncio.timeout(WAIT_S):
            try:
                head = await self.reader.readexactly(2)
                while head[-1] & 0x80:
                    head += await self.reader.readexactly(1)
                length = sum((byte & 0x7F) << 7 * n for n, byte in enumerate(head[1:]))
                return codec.decode(head + await self.reader.readexactly(length), self.version)
            except (asyncio.IncompleteReadError, ConnectionError):
                return None
