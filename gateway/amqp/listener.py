"""The AMQP listener: local apps and other gateways attach to addresses here, each the MQTT topic of the same name.

What is sent to an address is journaled, then accepted; a receiver is a cursor on the journal, durable by container and
link name where its source asks for that. Receivers use the same drain as the uplink, senders the same intake.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

from gateway.amqp.driver import AmqpProtocol
from gateway.amqp.engine import (
    Credit,
    Deliveries,
    Durability,
    Engine,
    Event,
    Expiry,
    Failed,
    LinkAttached,
    LinkClosed,
    Opened,
    Receiver,
    Sender,
    Settled,
)
from gateway.amqp.message import Message
from gateway.amqp.sasl import SaslServer
from gateway.broker import Broker
from gateway.mqtt.topics import check_topic, filter_matches
from gateway.uplink.drain import Drain
from gateway.uplink.intake import Intake
from security.identity import CertificateIdentity, certificate_identity
from storeforward.streams import Row, Stream

log = logging.getLogger("lineside.amqp")

INVALID_FIELD = "amqp:invalid-field"
CREDIT = 1000
RETRY_S = 0.25


class AmqpListener:
    """What all connections share. `committed` after every commit."""

    def __init__(
        self,
        broker: Broker,
        kick: Callable[[], None],
        *,
        container: str,
        connections_max: int,
        message_max_bytes: int,
        idle_timeout_s: float,
        window: int,
    ) -> None:
        self.broker = broker
        self.kick = kick
        self.container = container
        self.connections_max = connections_max
        self.message_max_bytes = message_max_bytes
        self.idle_timeout_s = idle_timeout_s
        self.window = window
        self.peers: set[Peer] = set()

    def protocol(self) -> AmqpProtocol:
        peer = Peer(self)
        protocol = AmqpProtocol(peer.engine, peer, peer.ready)
        return protocol

    def committed(self) -> None:
        for peer in self.peers:
            peer.wake()

    def stop(self) -> None:
        for peer in list(self.peers):
            peer.protocol.close("amqp:connection:forced", "lineside is stopping")


class Peer:
    """One connection's links."""

    def __init__(self, listener: AmqpListener) -> None:
        self._listener = listener
        self._broker = listener.broker
        self._loop = asyncio.get_running_loop()
        self._container = ""
        self.identity: CertificateIdentity | None = None  # who the peer's certificate says it is, verified
        self._retry: asyncio.TimerHandle | None = None
        self.protocol: AmqpProtocol
        self._drains: dict[Sender, Drain] = {}
        self._intakes: dict[Receiver, Intake] = {}
        self._volatile: dict[Sender, Stream] = {}

    def engine(self, transport: asyncio.Transport) -> Engine:
        self.identity = certificate_identity(transport.get_extra_info("peercert"))
        return Engine(
            server=True,
            container=self._listener.container,
            sasl=SaslServer(["ANONYMOUS"]),
            idle_timeout_s=self._listener.idle_timeout_s,
        )

    def ready(self, protocol: AmqpProtocol) -> None:
        self.protocol = protocol
        self._listener.peers.add(self)
        if len(self._listener.peers) > self._listener.connections_max:
            log.warning("connection refused: too many", extra={"connections_max": self._listener.connections_max})
            protocol.abort()

    def on_events(self, engine: Engine, events: list[Event]) -> None:
        now = self._loop.time()
        for event in events:
            match event:
                case Deliveries(receiver, batch):
                    self._intakes[receiver].deliveries(batch)
                    self._watch_held()
                case Credit(sender) | Settled(sender):
                    if sender in self._drains:
                        self._drains[sender].wake(now)
                case Opened(container):
                    self._container = container
                    engine.open()
                    log.info("amqp peer connected", extra={"container": container})
                case LinkAttached(link, True):
                    self._attach(link, now)
                case LinkClosed(link):
                    self._detach(link)
                case Failed(condition, description):
                    log.warning(
                        "amqp peer broke the protocol",
                        extra={"container": self._container, "condition": condition, "error": description},
                    )
                case _:
                    pass
        if self._broker.journal.pending:
            self._listener.kick()

    def on_lost(self, error: Exception | None) -> None:
        self._listener.peers.discard(self)
        if self._retry is not None:
            self._retry.cancel()
        for link in tuple(self._drains):
            self._detach(link)
        for receiver in tuple(self._intakes):
            self._detach(receiver)
        if self._broker.journal.pending:
            self._listener.kick()

    def wake(self) -> None:
        now = self._loop.time()
        for drain in self._drains.values():
            drain.wake(now)

    # ------------------------------------------------------------------ links

    def _attach(self, link: Sender | Receiver, now: float) -> None:
        terminus = link.target if isinstance(link, Receiver) else link.source
        address = None if terminus is None else terminus.address
        try:
            check_topic(address or "")
        except ValueError as error:
            link.refuse(INVALID_FIELD, f"address {address!r}: {error}")
            return
        assert address is not None
        assert terminus is not None
        if isinstance(link, Receiver):
            link.confirm(max_message_bytes=self._listener.message_max_bytes)
            self._intakes[link] = Intake(
                self._broker.journal, link, CREDIT, self._place(address), self.protocol.schedule_flush
            )
            return
        durable = terminus.durability is not Durability.NONE or terminus.expiry is Expiry.NEVER
        name = f"amqp:{self._container}:{link.name}" if durable else f"amqp:{self._container}:{link.name}:{id(link)}"
        stream = self._broker.local
        cursor = self._broker.journal.cursor(stream, name, "amqp", volatile=not durable)
        self._broker.router.forget()
        drain = Drain(self._broker.journal, stream, cursor, self._listener.window, _only(address))
        link.confirm()
        self._drains[link] = drain
        if not durable:
            self._volatile[link] = stream
        drain.attached(link, now)
        drain.wake(now)

    def _detach(self, link: Sender | Receiver) -> None:
        if isinstance(link, Receiver):
            self._intakes.pop(link, None)
            return
        drain = self._drains.pop(link, None)
        if drain is not None:
            drain.detached()
            stream = self._volatile.pop(link, None)
            if stream is not None:
                self._broker.journal.drop_cursor(stream, drain.cursor.name)

    def _place(self, address: str) -> Callable[[Message], tuple[Stream, str]]:
        stream = self._broker.local
        return lambda message: (stream, address)

    def _watch_held(self) -> None:
        if self._retry is None and any(i.held for i in self._intakes.values()):
            self._retry = self._loop.call_later(RETRY_S, self._retry_held)

    def _retry_held(self) -> None:
        self._retry = None
        for intake in self._intakes.values():
            intake.retry()
        self._listener.kick()
        self._watch_held()

    def describe(self) -> dict[str, Any]:
        """For `lineside clients`."""
        return {
            "client": self._container,
            "peer": "amqp",
            "version": "AMQP 1.0",
            "links": len(self._drains) + len(self._intakes),
        }


def _only(address: str) -> Callable[[Row], bool]:
    return lambda row: filter_matches(address, row.topic)
