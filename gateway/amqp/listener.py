"""The AMQP listener: local apps and other gateways attach here as to any AMQP 1.0 broker.

What is sent to an address is journaled, then accepted; a receiver reads a queue's shared place or one of its own,
durable by container and link name where its source asks for that. `addresses` says what an address means, `directory`
what stands behind it; who is let in and may do what is asked of `gateway.access`.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from gateway.access import LOGGED_MAX, Access, Admission, Login, Permit, identity_of
from gateway.amqp.addresses import REPLY_PREFIX, Address, AddressError, Kind, Rule, asked_for, kind_of, parse
from gateway.amqp.directory import NAME_BYTES_MAX, Directory, Reply, Source, TooMany
from gateway.amqp.driver import AmqpProtocol
from gateway.amqp.engine import Engine, Receiver, Sender
from gateway.amqp.events import (
    CONTAINER_ID,
    INVALID_FIELD,
    LINK_STOLEN,
    NOT_FOUND,
    NOT_IMPLEMENTED,
    RESOURCE_LIMIT_EXCEEDED,
    UNAUTHORIZED,
    Credit,
    Deliveries,
    Event,
    Failed,
    LinkAttached,
    LinkClosed,
    Opened,
    RemoteClosed,
    Settled,
)
from gateway.amqp.incoming import Incoming, Refused
from gateway.amqp.message import Stamp
from gateway.amqp.outgoing import Outgoing
from gateway.amqp.sasl import Outcome as SaslOutcome
from gateway.amqp.sasl import SaslServer
from gateway.amqp.termini import Durability, Expiry, Terminus
from gateway.broker import Broker
from gateway.groups import Group
from gateway.routing import Route
from gateway.throttle import Throttle
from gateway.turns import Account, Turns
from security.rules import Action, Identity
from storeforward.batch import Batch
from storeforward.streams import COLUMNS

log = logging.getLogger("lineside.amqp")

CREDIT = 1000
RETRY_S = 0.25
# From the connection to the peer's open; who only connects must not hold a place.
HANDSHAKE_S_MAX = 10.0
ROUTES_A_PEER_MAX = 1000
# Those who want nothing of it are moved on after so many rows, lest a full stream takes them for being behind.
CATCH_UP_ROWS = 4096
DESCRIBED_LINKS_MAX = 100
SYS_PREFIX = "$SYS/"
# JMS needs to hear of this to send through the anonymous terminus.
ANONYMOUS_RELAY = "ANONYMOUS-RELAY"
# And those that have a client id ask that nobody else has it meanwhile ("Enforcing Connection Uniqueness", 2.2).
SOLE_CONNECTION = "sole-connection-for-container"
CAPABILITIES = (ANONYMOUS_RELAY, SOLE_CONNECTION)


def mechanisms(claim: Identity, *, tls: bool, access: Access | None) -> list[str]:
    """What SASL may offer, best first. A password is asked for only where nobody else can read it on its way."""
    if access is None:
        return ["ANONYMOUS"]
    offered = ["EXTERNAL"] if claim.names or claim.cn is not None else []
    if tls or claim.local:
        offered.append("PLAIN")
    admission = access.admit(claim, None)
    if admission is not None and admission.ok:
        offered.append("ANONYMOUS")
    return offered


def owner_of(identity: Identity) -> str | None:
    """Whose a durable subscription is: what vouches for the app, None if nothing does."""
    if identity.user is not None:
        return f"user:{identity.user}"
    if identity.cn is not None or identity.names:
        return f"cn:{identity.cn if identity.cn is not None else identity.names[0]}"
    return None if identity.uid is None else f"uid:{identity.uid}"


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
        turns: Turns | None = None,
    ) -> None:
        self._turns = turns
        self.broker = broker
        self.kick = kick
        self.container = container
        self.connections_max = connections_max
        self.message_max_bytes = message_max_bytes
        self.idle_timeout_s = idle_timeout_s
        self.window = window
        self.access = access  # None: everybody may do everything
        self.peers: dict[Peer, None] = {}
        # Who is open, by owner and container id, and whether it wants to be the only one.
        self._claims: dict[tuple[str | None, str], dict[Peer, bool]] = {}
        self.received = 0
        self.directory = Directory(broker.journal, broker.streams_for, lambda: broker.router.forget())
        broker.queue_for = self.directory.expects
        self.directory.configure(_rules(broker))
        # Who holds a source that only one link may read: where a second one comes, the first has to go.
        self.holders: dict[Source, Outgoing] = {}
        self._loop = asyncio.get_running_loop()
        self._rows_since = 0
        self._lagging: dict[Outgoing, Peer] = {}
        self._to_wake: dict[Outgoing, Peer] = {}
        self._outgoing: dict[Outgoing, Peer] = {}
        self._stamps: dict[tuple[str, str | None], Stamp] = {}

    def protocol(self) -> AmqpProtocol:
        peer = Peer(self)
        return AmqpProtocol(peer.engine, peer, peer.ready, self._turns)

    def claim(self, peer: Peer, *, sole: bool) -> bool:
        """Whether a connection may open with its container id, beside those of the same owner that have it already."""
        same = [its for other, its in self._claims.get(peer.claim, {}).items() if not other.protocol.gone]
        if same and (sole or any(same)):
            return False
        self._claims.setdefault(peer.claim, {})[peer] = sole
        return True

    def unclaim(self, peer: Peer) -> None:
        """It is gone, or never had it."""
        same = self._claims.get(peer.claim, {})
        same.pop(peer, None)
        if not same:
            self._claims.pop(peer.claim, None)

    # ------------------------------------------------------------------ who reads what

    def add(self, outgoing: Outgoing, peer: Peer) -> None:
        self._outgoing[outgoing] = peer

    def remove(self, outgoing: Outgoing) -> None:
        for known in (self._outgoing, self._lagging, self._to_wake):
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
        for outgoing, peer in self._members(group):
            self.wake_soon(outgoing, peer)

    def _members(self, group: Group) -> list[tuple[Outgoing, Peer]]:
        return [(m, self._outgoing[m]) for m in group.names() if isinstance(m, Outgoing) and m in self._outgoing]

    def _wake(self) -> None:
        woken, self._to_wake = self._to_wake, {}
        for outgoing, peer in woken.items():
            peer.protocol.guarded(peer.wake, outgoing)
        self.kick_if_pending()

    def committed(self, batch: Batch) -> None:
        woken, self._lagging = self._lagging, {}
        for stream, appended in batch.appended.items():
            for group in self.directory.committed(stream, dict.fromkeys(appended.columns[3::COLUMNS])):
                woken.update(self._members(group))
            self._rows_since += appended.rows
        if self._rows_since >= CATCH_UP_ROWS:
            self._rows_since = 0
            self.directory.caught_up()
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
        """There are new routes, streams and access rules."""
        self.directory.configure(_rules(self.broker))
        for peer in list(self.peers):
            peer.protocol.guarded(peer.rules_changed)
        for outgoing, peer in list(self._outgoing.items()):
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
        self.claim: tuple[str | None, str] = (None, "")  # its container id, which is unique only for an owner
        self._identity = Identity("amqp")
        self._admission: Admission | None = None
        self._permit: Permit | None = None
        self._login: asyncio.Task[None] | None = None
        self._refusals_logged = 0
        self._retry: asyncio.TimerHandle | None = None
        self._resend: asyncio.TimerHandle | None = None
        self._handshake: asyncio.TimerHandle | None = None
        self._outgoing: dict[Sender, Outgoing] = {}
        self._incoming: dict[Receiver, Incoming] = {}
        self._replies: dict[Sender | Receiver, str] = {}
        self._routes: dict[str, tuple[Route, Stamp]] = {}
        self.address = "?"
        self.protocol: AmqpProtocol
        self._throttle: Throttle

    # ------------------------------------------------------------------ the connection

    def engine(self, transport: asyncio.Transport) -> Engine:
        access = self._listener.access
        peer = transport.get_extra_info("peername")
        self.address = f"{peer[0]}:{peer[1]}" if isinstance(peer, tuple) else "unix"
        claim = self._identity = identity_of(transport, "amqp")
        tls = transport.get_extra_info("ssl_object") is not None
        external = claim.cn or (claim.names[0] if claim.names else None)
        return Engine(
            server=True,
            container=self._listener.container,
            sasl=SaslServer(mechanisms(claim, tls=tls, access=access), self._verify, external),
            idle_timeout_s=self._listener.idle_timeout_s,
            offered_capabilities=CAPABILITIES,
        )

    def ready(self, protocol: AmqpProtocol) -> None:
        self.protocol = protocol
        self._throttle = Throttle(self._journal, protocol)
        protocol.on_resumed = self._resumed
        self._listener.peers[self] = None
        if len(self._listener.peers) > self._listener.connections_max:
            log.warning("connection refused: too many", extra=self._who(connections_max=self._listener.connections_max))
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
                    self._opened(engine, container, sole=SOLE_CONNECTION in event.desired)
                case LinkAttached(link, True) if not engine.closing:
                    self._attach(link)
                case LinkClosed(link):
                    self._closed(link, event.detached)
                case Failed(condition, description):
                    extra = self._who(condition=condition, error=description)
                    log.warning("amqp peer broke the protocol", extra=extra)
                    self._listener.unclaim(self)
                case RemoteClosed():
                    self._listener.unclaim(self)
                case _:
                    pass
        self._listener.kick_if_pending()

    def _opened(self, engine: Engine, container: str, *, sole: bool) -> None:
        if self._handshake is not None:
            self._handshake.cancel()
            self._handshake = None
        self._container = container
        if self._identity.local:
            self.protocol.account = Account()  # apps of this machine are not one another's
        admitted = self._identity if self._admission is None else self._admission.identity
        self._identity = replace(admitted, client=container)
        self._permit = None if self._listener.access is None else self._listener.access.permit(self._identity)
        self.claim = owner_of(self._identity), container
        if not self._listener.claim(self, sole=sole):
            log.warning("amqp peer refused: its container id is another connection's", extra=self._who())
            text = f"the container id {container[:200]!r} is in use by another connection"
            engine.refuse(INVALID_FIELD, text, {"invalid-field": CONTAINER_ID})
            return
        engine.open()
        log.info("amqp peer connected", extra=self._who())

    def _verify(self, user: str, password: str) -> bool | None:
        """SASL's question whether a password is right; None while it is being found out."""
        access = self._listener.access
        if access is None:
            return False
        claim = replace(self._identity, user=user)
        self._admission = access.admit(claim, password.encode())
        if self._admission is not None:
            return self._admission.ok
        self._login = self._loop.create_task(self._log_in(access, claim, password.encode()))
        return None

    async def _log_in(self, access: Access, claim: Identity, password: bytes) -> None:
        self._admission = await access.authenticate(claim, password)
        self._login = None
        busy = self._admission.login is Login.BUSY
        self.protocol.authenticated(self._admission.ok, SaslOutcome.SYS_TEMP if busy else SaslOutcome.AUTH)

    def on_lost(self, error: Exception | None) -> None:
        self._listener.peers.pop(self, None)
        self._listener.unclaim(self)
        if self._login is not None:
            self._login.cancel()
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
        self._watch_resends()  # for a loop may call a nanosecond early
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
        self._throttle.look()

    def _resolve(self, topic: str) -> tuple[Route, Stamp]:
        """Where a message for this topic goes; asked once a topic and connection."""
        found = self._routes.get(topic)
        if found is not None:
            return found
        if topic.startswith(REPLY_PREFIX):
            if self._directory.reply(topic) is None:
                raise Refused(NOT_FOUND, "nobody waits for this reply any more")
        elif self._permit is not None and not self._permit.publish(topic):
            self._log_forbidden(Action.PUBLISH, topic)
            raise Refused(UNAUTHORIZED, f"not allowed to send to {topic!r}")
        elif topic.startswith(SYS_PREFIX):
            raise Refused(UNAUTHORIZED, f"{SYS_PREFIX} topics are the gateway's own")
        else:
            self._directory.expects(topic)
        route = self._broker.router.route(topic, 1)
        stamp = self._listener.stamp(route)
        if not topic.startswith(REPLY_PREFIX):
            if len(self._routes) >= ROUTES_A_PEER_MAX:
                self._routes.clear()
            self._routes[topic] = route, stamp
        return route, stamp

    def rules_changed(self) -> None:
        """Judge the links anew: what is not allowed any more ends."""
        self._routes.clear()
        access = self._listener.access
        self._permit = permit = None if access is None else access.permit(self._identity)
        if permit is None:
            return
        for receiver, incoming in list(self._incoming.items()):
            topic = incoming.topic
            if topic is not None and not topic.startswith(REPLY_PREFIX) and not permit.publish(topic):
                receiver.close(UNAUTHORIZED, "not allowed any more")
        for sender, outgoing in list(self._outgoing.items()):
            place = outgoing.source
            if not place.filter.startswith(REPLY_PREFIX) and not permit.subscribe(place.filter):
                sender.close(UNAUTHORIZED, "not allowed any more")
                self._listener.drop(outgoing)

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
            topic = self._open_reply(link, target).topic
            confirmed = replace(target, address=topic)
        elif target.address:
            address = parse(target.address)
            topic = address.topic
            self._resolve(topic)
            if not address.is_reply and kind_of(address, target.capabilities, self._directory.rules) is Kind.QUEUE:
                self._directory.queue(topic)
        link.confirm(target=confirmed, max_message_bytes=self._listener.message_max_bytes)
        self._incoming[link] = Incoming(
            self._journal,
            link,
            CREDIT,
            topic,
            self._resolve,
            self.protocol.schedule_flush,
            self._broker.retain_received,
            self._watch_held,
        )

    def _attach_outgoing(self, link: Sender) -> None:
        """The app is to receive: from a queue, a durable subscription, or a place for this link only."""
        source = link.source
        if source is not None and source.filters:
            # Part 3.5.3 would have us leave them out of the answer; but those who ask for a selector hardly look there,
            # and would be given, and take from a queue, what they did not ask for.
            raise Refused(NOT_IMPLEMENTED, f"no selectors and no filters: {', '.join(source.filters)}")
        if source is None:
            source, place = self._resumed_subscription(link)
        elif source.dynamic:
            reply = self._open_reply(link, source)
            place = self._reply_place(link, reply.topic)
            source = replace(source, address=reply.topic)
        else:
            place = self._place(link, source)
        if place.exclusive and place in self._listener.holders:
            if self.protocol.gone:  # and had to wait for its turn: its app may be back, and attached already
                raise Refused(LINK_STOLEN, "its connection is gone, and another has attached")
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
            return self._reply_place(link, address.topic)
        self._check_receive(address.topic)
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
        return directory.subscribe(self._container, link.name, owner_of(self._identity), address.topic).source

    def _check_receive(self, filter_: str) -> None:
        if self._permit is not None and not self._permit.subscribe(filter_):
            self._log_forbidden(Action.SUBSCRIBE, filter_)
            raise Refused(UNAUTHORIZED, f"not allowed to receive from {filter_!r}")

    def _check_owner(self, link: Sender) -> None:
        found = self._directory.subscription(self._container, link.name)
        if found is not None and found.owner != owner_of(self._identity):
            raise Refused(UNAUTHORIZED, "the durable subscription of this name is somebody else's")

    def _resumed_subscription(self, link: Sender) -> tuple[Terminus, Source]:
        """An attach without a source asks for the subscription of that name, to end it most likely."""
        found = self._directory.subscription(self._container, link.name)
        if found is None:
            raise Refused(NOT_FOUND, f"there is no durable subscription {link.name!r}")
        self._check_owner(link)
        self._check_receive(found.source.filter)
        return Terminus(found.source.filter, Durability.UNSETTLED_STATE, Expiry.NEVER), found.source

    def _open_reply(self, link: Sender | Receiver, asked: Terminus) -> Reply:
        kind = asked_for(Address(""), asked.capabilities) or Kind.QUEUE
        reply = self._directory.open_reply(self, secrets.token_hex(16), kind)
        self._replies[link] = reply.topic
        return reply

    def _reply_place(self, link: Sender, topic: str) -> Source:
        found = self._directory.reply(topic)
        if found is None:
            raise Refused(NOT_FOUND, "there is no such dynamic address, or not any more")
        if found.owner is not self:
            raise Refused(UNAUTHORIZED, "only the connection that made a dynamic address receives from it")
        return found.source or self._directory.volatile(topic, self._container, link.name)

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
            incoming = self._incoming.pop(link, None)
            if incoming is not None:
                incoming.end()
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

    def _log_forbidden(self, action: Action, name: str) -> None:
        self._refusals_logged += 1
        if self._permit is not None and self._refusals_logged <= LOGGED_MAX:
            log.warning("not allowed", extra=self._who(address=name[:200], why=self._permit.why(action, name).text))

    def _who(self, **fields: Any) -> dict[str, Any]:
        return {"container": self._container[:200], "peer": self.address, "user": owner_of(self._identity)} | fields

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
            "user": owner_of(self._identity),
            "links": lines.total(),
            "addresses": _counted(lines.items()),
            "held": sum(i.held for i in self._incoming.values()),
        }


def _counted(lines: Iterable[tuple[str, int]]) -> list[str]:
    shown = [text if count == 1 else f"{text} ({count} links)" for text, count in sorted(lines)]
    if len(shown) > DESCRIBED_LINKS_MAX:
        shown = [*shown[:DESCRIBED_LINKS_MAX], f"and {len(shown) - DESCRIBED_LINKS_MAX} more"]
    return shown
