"""The AMQP listener: local apps and other gateways attach here as to any AMQP 1.0 broker.

What is sent to an address is journaled, then accepted; a receiver reads a queue's shared place or one of its own,
durable by container and link name where its source asks for that. `addresses` says what an address means, `directory`
what stands behind it; who may do what is asked of the `Access` given.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from gateway.amqp.addresses import REPLY_PREFIX, Address, AddressError, Kind, Rule, kind_of, parse
from gateway.amqp.directory import NAME_BYTES_MAX, Directory, Source, TooMany
from gateway.amqp.driver import AmqpProtocol
from gateway.amqp.engine import (
    INVALID_FIELD,
    LINK_STOLEN,
    NOT_FOUND,
    RESOURCE_LIMIT_EXCEEDED,
    UNAUTHORIZED,
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
    Terminus,
)
from gateway.amqp.incoming import Incoming, Refused
from gateway.amqp.message import Stamp
from gateway.amqp.outgoing import Outgoing
from gateway.amqp.sasl import SaslServer
from gateway.broker import Broker
from gateway.groups import Group
from gateway.routing import Route
from storeforward.errors import JournalFull
from storeforward.journal import PENDING_BYTES_MAX, Batch
from storeforward.streams import Stream

log = logging.getLogger("lineside.amqp")

CREDIT = 1000
RETRY_S = 0.25
# From the connection to the peer's open; who only connects must not hold a place.
HANDSHAKE_S_MAX = 10.0
ROUTES_A_PEER_MAX = 1000
DESCRIBED_LINKS_MAX = 100
# JMS needs to hear of the first one to send through the anonymous terminus.
CAPABILITIES = ("ANONYMOUS-RELAY",)


def common_name(certificate: dict[str, Any]) -> str | None:
    """The subject's common name (RFC 5280 §4.1.2.6), None without one."""
    for part in certificate.get("subject", ()):
        for name, value in part:
            if name == "commonName":
                return str(value)
    return None


@dataclass(frozen=True, slots=True)
class Access:
    """Who may do what, asked and never remembered longer than a link or a reload. The defaults permit everything.

    authenticate: whether a password is right; None where no app has one, and PLAIN is not offered. identify: the name
    in a verified certificate, as `ssl.SSLSocket.getpeercert()` gives it, for EXTERNAL. An identity of None is an
    anonymous app.
    """

    authenticate: Callable[[str, str], bool] | None = None
    anonymous: bool = True
    identify: Callable[[dict[str, Any]], str | None] = common_name
    may_publish: Callable[[str | None, str], bool] = lambda identity, topic: True
    may_subscribe: Callable[[str | None, str], bool] = lambda identity, filter_: True


def mechanisms(*, private: bool, certificate: bool, access: Access) -> list[str]:
    """What SASL may offer, best first. private: TLS, loopback or a Unix socket, so that a password is safe there."""
    offered = ["EXTERNAL"] if certificate else []
    if access.authenticate is not None and private:
        offered.append("PLAIN")
    if access.anonymous:
        offered.append("ANONYMOUS")
    return offered


class AmqpListener:
    """What all connections share. `committed` after every commit, `housekeeping` every few seconds."""

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
        access: Access | None = None,
    ) -> None:
        self.broker = broker
        self.kick = kick
        self.container = container
        self.connections_max = connections_max
        self.message_max_bytes = message_max_bytes
        self.idle_timeout_s = idle_timeout_s
        self.window = window
        self.access = access or Access()
        self.peers: set[Peer] = set()
        self.received = 0
        self.directory = Directory(broker.journal, broker.streams_for, lambda: broker.router.forget())
        broker.queue_for = self.directory.expects
        self.directory.configure(_rules(broker))
        # Who holds a source that only one link may read: where a second one comes, the first has to go.
        self.holders: dict[Source, Outgoing] = {}
        self._loop = asyncio.get_running_loop()
        self._readers: dict[Stream, dict[Outgoing, Peer]] = {}
        self._lagging: dict[Outgoing, Peer] = {}
        self._to_wake: dict[Outgoing, Peer] = {}
        self._outgoing: dict[Outgoing, Peer] = {}
        self._stamps: dict[tuple[str, str | None], Stamp] = {}

    def protocol(self) -> AmqpProtocol:
        peer = Peer(self)
        return AmqpProtocol(peer.engine, peer, peer.ready)

    # ------------------------------------------------------------------ who reads what

    def add(self, outgoing: Outgoing, peer: Peer) -> None:
        self._outgoing[outgoing] = peer
        for stream in outgoing.source.groups:
            self._readers.setdefault(stream, {})[outgoing] = peer

    def remove(self, outgoing: Outgoing) -> None:
        for known in (self._outgoing, self._lagging, self._to_wake, *self._readers.values()):
            known.pop(outgoing, None)

    def drop(self, outgoing: Outgoing) -> None:
        """A receiver's link is over, whoever ended it; may be called twice."""
        self.remove(outgoing)
        if self.holders.get(outgoing.source) is outgoing:
            del self.holders[outgoing.source]
        outgoing.end()

    def note(self, outgoing: Outgoing, peer: Peer) -> None:
        """After a wake: see that it is woken again when there is cause."""
        if outgoing.lagging:
            self._lagging[outgoing] = peer
        if outgoing.again:
            self.wake_soon(outgoing, peer)

    def wake_soon(self, outgoing: Outgoing, peer: Peer) -> None:
        if not self._to_wake:
            self._loop.call_soon(self._wake)
        self._to_wake[outgoing] = peer

    def given_back(self, group: Group) -> None:
        """A queue's row is free again: any of its receivers may have room for it."""
        for member in group.names():
            if isinstance(member, Outgoing) and member in self._outgoing:
                self.wake_soon(member, self._outgoing[member])

    def _wake(self) -> None:
        woken, self._to_wake = self._to_wake, {}
        for outgoing, peer in woken.items():
            peer.protocol.guarded(peer.wake, outgoing)
        self.kick_if_pending()

    def committed(self, batch: Batch) -> None:
        woken, self._lagging = self._lagging, {}
        for stream in batch.appended:
            woken.update(self._readers.get(stream, {}))
        for outgoing, peer in woken.items():
            peer.protocol.guarded(peer.wake, outgoing)
        self.kick_if_pending()

    def kick_if_pending(self) -> None:
        if self.broker.journal.pending:
            self.kick()

    def stamp(self, route: Route) -> Stamp:
        key = route.stream.name, route.duplicate_property
        stamp = self._stamps.get(key)
        if stamp is None:
            gateway, epoch = self.broker.router.identity
            stamp = self._stamps[key] = Stamp(gateway, epoch, key[0], duplicate_property=key[1])
        return stamp

    # ------------------------------------------------------------------ from outside

    def reload(self) -> None:
        """The broker has new routes and streams."""
        self.directory.configure(_rules(self.broker))
        self._readers.clear()
        for peer in self.peers:
            peer.forget_routes()
        for outgoing, peer in list(self._outgoing.items()):
            self.add(outgoing, peer)
            self.wake_soon(outgoing, peer)

    def housekeeping(self) -> None:
        now = self._loop.time()
        self.directory.housekeeping(now)
        for outgoing, peer in list(self._outgoing.items()):
            if outgoing.stuck(now):
                peer.protocol.guarded(peer.throw_out, outgoing)
        self.kick_if_pending()

    def away(self) -> list[dict[str, Any]]:
        """Durable subscriptions that nobody is attached to, for `lineside clients`."""
        by_container: dict[str, list[str]] = {}
        for each in self.directory.subscriptions.values():
            if each.source not in self.holders:
                by_container.setdefault(each.container, []).append(each.source.filter)
        return [
            {"client": container, "version": "AMQP 1.0", "durable": True, "subscriptions": sorted(filters)}
            for container, filters in by_container.items()
        ]

    def stop(self) -> None:
        for peer in list(self.peers):
            peer.protocol.close("amqp:connection:forced", "lineside is stopping")


def _rules(broker: Broker) -> tuple[Rule, ...]:
    return tuple(Rule(each.name, Kind(each.kind)) for each in broker.config.addresses)


class Peer:
    """One connection's links."""

    def __init__(self, listener: AmqpListener) -> None:
        self._listener = listener
        self._broker = listener.broker
        self._journal = listener.broker.journal
        self._directory = listener.directory
        self._loop = asyncio.get_running_loop()
        self._container = ""
        self._identity: str | None = None
        self._retry: asyncio.TimerHandle | None = None
        self._resend: asyncio.TimerHandle | None = None
        self._handshake: asyncio.TimerHandle | None = None
        self._paused = False
        self._outgoing: dict[Sender, Outgoing] = {}
        self._incoming: dict[Receiver, Incoming] = {}
        self._replies: dict[Sender | Receiver, str] = {}
        self._routes: dict[str, tuple[Route, Stamp]] = {}
        self.address = "?"
        self.protocol: AmqpProtocol

    # ------------------------------------------------------------------ the connection

    def engine(self, transport: asyncio.Transport) -> Engine:
        access = self._listener.access
        peer = transport.get_extra_info("peername")
        self.address = f"{peer[0]}:{peer[1]}" if isinstance(peer, tuple) else "unix"
        tls = transport.get_extra_info("ssl_object")
        certificate = tls.getpeercert() if tls is not None else None
        external = access.identify(certificate) if certificate else None
        private = tls is not None or not isinstance(peer, tuple) or _is_loopback(peer[0])
        offered = mechanisms(private=private, certificate=external is not None, access=access)
        return Engine(
            server=True,
            container=self._listener.container,
            sasl=SaslServer(offered, access.authenticate, external),
            idle_timeout_s=self._listener.idle_timeout_s,
            offered_capabilities=CAPABILITIES,
        )

    def ready(self, protocol: AmqpProtocol) -> None:
        self.protocol = protocol
        protocol.on_resumed = self._resumed
        self._listener.peers.add(self)
        if len(self._listener.peers) > self._listener.connections_max:
            log.warning("connection refused: too many", extra={"connections_max": self._listener.connections_max})
            protocol.abort()
            return
        self._handshake = self._loop.call_later(HANDSHAKE_S_MAX, self._too_slow)

    def _too_slow(self) -> None:
        self._handshake = None
        log.warning("amqp peer did not open its connection in time", extra=self._who())
        self.protocol.abort()

    def on_events(self, engine: Engine, events: list[Event]) -> None:
        for event in events:
            match event:
                case Deliveries(receiver, batch):
                    self._received(receiver, batch)
                case Credit(sender) | Settled(sender):
                    if sender in self._outgoing:
                        self.wake(self._outgoing[sender])
                case Opened(container):
                    self._opened(engine, container)
                case LinkAttached(link, True):
                    self._attach(link)
                case LinkClosed(link):
                    self._closed(link, event.detached)
                case Failed(condition, description):
                    extra = self._who(condition=condition, error=description)
                    log.warning("amqp peer broke the protocol", extra=extra)
                case _:
                    pass
        self._listener.kick_if_pending()

    def _opened(self, engine: Engine, container: str) -> None:
        if self._handshake is not None:
            self._handshake.cancel()
            self._handshake = None
        self._container = container
        self._identity = engine.identity
        engine.open()
        log.info("amqp peer connected", extra=self._who())

    def on_lost(self, error: Exception | None) -> None:
        self._listener.peers.discard(self)
        for timer in (self._retry, self._resend, self._handshake):
            if timer is not None:
                timer.cancel()
        for sender in tuple(self._outgoing):
            self._closed(sender, True)
        for receiver in tuple(self._incoming):
            self._closed(receiver, True)
        self._listener.kick_if_pending()

    def wake(self, outgoing: Outgoing) -> None:
        outgoing.wake(self._loop.time())
        self._listener.note(outgoing, self)
        if outgoing.resend_at is not None:
            self._watch_resends()

    def _resumed(self) -> None:
        """The socket takes more."""
        for outgoing in self._outgoing.values():
            self.wake(outgoing)

    def _watch_resends(self) -> None:
        due = min((o.resend_at for o in self._outgoing.values() if o.resend_at is not None), default=None)
        if self._resend is not None:
            self._resend.cancel()
            self._resend = None
        if due is not None:
            self._resend = self._loop.call_at(max(due, self._loop.time() + 0.001), self._resend_now)

    def _resend_now(self) -> None:
        self._resend = None
        now = self._loop.time()
        for outgoing in tuple(self._outgoing.values()):
            if outgoing.resend_at is not None and outgoing.resend_at <= now:
                self.protocol.guarded(self.wake, outgoing)
        self._listener.kick_if_pending()

    # ------------------------------------------------------------------ what the app sends

    def _received(self, receiver: Receiver, batch: list[tuple[int, bytes]]) -> None:
        incoming = self._incoming.get(receiver)
        if incoming is None:
            return
        before = incoming.received
        incoming.deliveries(batch)
        self._listener.received += incoming.received - before
        self._watch_held()
        if self._journal.pending.size_bytes > PENDING_BYTES_MAX and not self._paused:
            # The disk is slower than this app: read no more until what there is has been written.
            self._paused = True
            self.protocol.pause_reading()
            self._journal.wait(self, None)

    def committed(self, tokens: list[None]) -> None:
        """The journal's side (Waiter) of the pause."""
        self._paused = False
        self.protocol.resume_reading()

    def failed(self, tokens: list[None], error: JournalFull) -> None:
        self.committed(tokens)

    def _resolve(self, topic: str) -> tuple[Route, Stamp]:
        """Where a message for this topic goes; asked once a topic and connection."""
        found = self._routes.get(topic)
        if found is not None:
            return found
        if topic.startswith(REPLY_PREFIX):
            if self._directory.reply(topic) is None:
                raise Refused(NOT_FOUND, "nobody waits for this reply any more")
        elif not self._listener.access.may_publish(self._identity, topic):
            raise Refused(UNAUTHORIZED, f"{self._name()} may not send to {topic!r}")
        else:
            self._directory.expects(topic)
        route = self._broker.router.route(topic, 1)
        stamp = self._listener.stamp(route)
        if not topic.startswith(REPLY_PREFIX):
            if len(self._routes) >= ROUTES_A_PEER_MAX:
                self._routes.clear()
            self._routes[topic] = route, stamp
        return route, stamp

    def forget_routes(self) -> None:
        self._routes.clear()

    def _watch_held(self) -> None:
        if self._retry is None and any(i.held for i in self._incoming.values()):
            self._retry = self._loop.call_later(RETRY_S, self._retry_held)

    def _retry_held(self) -> None:
        self._retry = None
        for incoming in tuple(self._incoming.values()):
            if incoming.held:
                self.protocol.guarded(incoming.retry)
        self._listener.kick_if_pending()
        self._watch_held()

    # ------------------------------------------------------------------ links

    def _attach(self, link: Sender | Receiver) -> None:
        try:
            if isinstance(link, Receiver):
                self._attach_incoming(link)
            else:
                self._attach_outgoing(link)
        except Refused as error:
            self._refuse(link, error.condition, str(error))
        except AddressError as error:
            self._refuse(link, INVALID_FIELD, str(error))
        except TooMany as error:
            self._refuse(link, RESOURCE_LIMIT_EXCEEDED, str(error))

    def _refuse(self, link: Sender | Receiver, condition: str, description: str) -> None:
        log.warning("link refused", extra=self._who(link=link.name, condition=condition, error=description))
        link.refuse(condition, description)

    def _attach_incoming(self, link: Receiver) -> None:
        """The app is to send: an address, or none where each message says its own."""
        target = link.target
        if target is None:
            raise Refused(INVALID_FIELD, "no target")
        topic: str | None = None
        confirmed = target
        if target.dynamic:
            topic = self._open_reply(link).filter
            confirmed = replace(target, address=topic)
        elif target.address:
            address = parse(target.address)
            topic = address.topic
            self._resolve(topic)
            if not address.is_reply and kind_of(address, target.capabilities, self._directory.rules) is Kind.QUEUE:
                self._directory.queue(topic)
        link.confirm(target=confirmed, max_message_bytes=self._listener.message_max_bytes)
        self._incoming[link] = Incoming(self._journal, link, CREDIT, topic, self._resolve, self.protocol.schedule_flush)

    def _attach_outgoing(self, link: Sender) -> None:
        """The app is to receive: from a queue, a durable subscription, or a place for this link only."""
        source = link.source
        if source is None:
            source, place = self._resumed_subscription(link)
        elif source.dynamic:
            place = self._open_reply(link)
            source = replace(source, address=place.filter)
        else:
            place = self._place(link, source)
        if place.exclusive and place in self._listener.holders:
            self._steal(place)
        link.confirm(source=source)
        outgoing = Outgoing(
            self._journal,
            link,
            place,
            self._listener.window,
            self._loop.time(),
            self._listener.given_back,
            lambda: not self.protocol.write_paused,
        )
        if place.exclusive:
            self._listener.holders[place] = outgoing
        self._outgoing[link] = outgoing
        self._listener.add(outgoing, self)
        self.wake(outgoing)

    def _place(self, link: Sender, source: Terminus) -> Source:
        address = parse(source.address, receiver=True)
        if address.is_reply:
            return self._reply_place(address)
        if not self._listener.access.may_subscribe(self._identity, address.topic):
            raise Refused(UNAUTHORIZED, f"{self._name()} may not receive from {address.topic!r}")
        directory = self._directory
        if kind_of(address, source.capabilities, directory.rules) is Kind.QUEUE:
            queue = directory.queue(address.topic)
            if source.copy:  # a browser looks, and takes nothing away (part 3.5.3, distribution-mode)
                return directory.volatile(address.topic, self._container, link.name, browse=queue)
            return queue
        if source.durability is Durability.NONE and source.expiry is not Expiry.NEVER:
            return directory.volatile(address.topic, self._container, link.name)
        if len(self._container.encode()) + len(link.name.encode()) > NAME_BYTES_MAX:
            raise Refused(INVALID_FIELD, f"container and link name are longer than {NAME_BYTES_MAX} bytes")
        self._check_owner(link)
        return directory.subscribe(self._container, link.name, self._identity, address.topic).source

    def _check_owner(self, link: Sender) -> None:
        found = self._directory.subscription(self._container, link.name)
        if found is not None and found.owner != self._identity:
            raise Refused(UNAUTHORIZED, "the durable subscription of this name is somebody else's")

    def _resumed_subscription(self, link: Sender) -> tuple[Terminus, Source]:
        """An attach without a source asks for the subscription of that name, to end it most likely."""
        found = self._directory.subscription(self._container, link.name)
        if found is None:
            raise Refused(NOT_FOUND, f"there is no durable subscription {link.name!r}")
        self._check_owner(link)
        if not self._listener.access.may_subscribe(self._identity, found.source.filter):
            raise Refused(UNAUTHORIZED, f"{self._name()} may not receive from {found.source.filter!r}")
        return Terminus(found.source.filter, Durability.UNSETTLED_STATE, Expiry.NEVER), found.source

    def _open_reply(self, link: Sender | Receiver) -> Source:
        place = self._directory.open_reply(self, secrets.token_hex(16))
        self._replies[link] = place.filter
        return place

    def _reply_place(self, address: Address) -> Source:
        found = self._directory.reply(address.topic)
        if found is None:
            raise Refused(NOT_FOUND, "there is no such dynamic address, or not any more")
        owner, place = found
        if owner is not self:
            raise Refused(UNAUTHORIZED, "only the connection that made a dynamic address receives from it")
        return place

    def _steal(self, place: Source) -> None:
        """A subscription's app is back while its old link still seems alive (part 2.6.1): the new one gets it."""
        old = self._listener.holders[place]
        old.link.close(LINK_STOLEN, "attached again by the same container and link name", detach=True)
        self._listener.drop(old)

    def throw_out(self, outgoing: Outgoing) -> None:
        """A receiver that settles nothing must not hold up the others of its queue."""
        log.warning("receiver thrown out: it holds up its queue", extra=self._who(link=outgoing.link.name))
        outgoing.link.close(RESOURCE_LIMIT_EXCEEDED, "settled nothing while the others of this queue waited")
        self._listener.drop(outgoing)

    def _closed(self, link: Sender | Receiver, detached: bool) -> None:
        reply = self._replies.pop(link, None)
        if isinstance(link, Receiver):
            self._incoming.pop(link, None)
        else:
            outgoing = self._outgoing.pop(link, None)
            if outgoing is not None:
                # A link that was stolen, or that we closed, ends no subscription: only the app's own close does.
                kept = detached or outgoing.ended
                self._listener.drop(outgoing)
                self._ended(link, outgoing.source, kept)
        if reply is not None:
            self._directory.close_reply(reply)

    def _ended(self, link: Sender, place: Source, kept: bool) -> None:
        if not place.exclusive:
            return
        if not place.durable:
            self._directory.forget(place)
        elif not kept:
            found = self._directory.subscription(self._container, link.name)
            if found is not None and found.source is place:
                log.info("durable subscription ended", extra=self._who(link=link.name))
                self._directory.unsubscribe(found)

    # ------------------------------------------------------------------ small things

    def _name(self) -> str:
        return f"user {self._identity}" if self._identity is not None else "an anonymous app"

    def _who(self, **fields: Any) -> dict[str, Any]:
        return {"container": self._container[:200], "peer": self.address, "user": self._identity} | fields

    def describe(self) -> dict[str, Any]:
        """For `lineside clients`."""
        lines: Counter[str] = Counter()
        for incoming in self._incoming.values():
            lines[f"sends to {incoming.topic or 'any address'}"] += 1
        for outgoing in self._outgoing.values():
            place = outgoing.source
            what = "queue" if place.kind is Kind.QUEUE else "durable topic" if place.durable else "topic"
            lines[f"receives from {what} {place.filter}"] += 1
        return {
            "client": self._container,
            "peer": self.address,
            "version": "AMQP 1.0",
            "user": self._identity,
            "links": _counted(lines.items()),
            "held": sum(i.held for i in self._incoming.values()),
        }


def _counted(lines: Iterable[tuple[str, int]]) -> list[str]:
    shown = [text if count == 1 else f"{text} ({count} links)" for text, count in sorted(lines)]
    if len(shown) > DESCRIBED_LINKS_MAX:
        shown = [*shown[:DESCRIBED_LINKS_MAX], f"and {len(shown) - DESCRIBED_LINKS_MAX} more"]
    return shown


def _is_loopback(host: str) -> bool:
    return host.startswith("127.") or host in ("::1", "::ffff:127.0.0.1")
