"""The driver of one hub's link: dials, watches deadlines, attaches a link a stream, and moves what the cores decide.

Reads the loop's clock and owns the sockets of its hub. What to dial when is `state`'s decision, what to send when is
`drain`'s, what to settle when is `intake`'s.
"""

from __future__ import annotations

import asyncio
import logging
import random
import ssl
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gateway.amqp.driver import AmqpProtocol
from gateway.amqp.engine import (
    Authenticated,
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
    RemoteClosed,
    Sender,
    Settled,
    Terminus,
)
from gateway.amqp.message import Message
from gateway.amqp.sasl import SaslClient
from gateway.config import Hub, HubUrl, Inbound, Outbound
from gateway.errors import PeerError
from gateway.mqtt.topics import check_topic
from gateway.replies import Inlet, Requests
from gateway.uplink.drain import Drain
from gateway.uplink.intake import Intake, Retain
from gateway.uplink.quirks import advice
from gateway.uplink.state import ATTEMPTS_MAX, Failure, LinkState, State
from gateway.uplink.tcp import silent_ms
from storeforward.journal import Journal
from storeforward.streams import Stream

log = logging.getLogger("lineside.uplink")

WATCH_S = 0.25
SILENT_MS_MAX = 3000
REATTACH_S_MIN, REATTACH_S_MAX = 1.0, 60.0


@dataclass(eq=False, slots=True)
class _Way:
    """One configured link: what it forwards or fetches, and whether it stands."""

    config: Outbound | Inbound
    stream: Stream
    drain: Drain | None
    link: Sender | Receiver | None = None
    intake: Intake | None = None
    attach_by: float | None = None
    reattach_at: float | None = None
    reattach_s: float = REATTACH_S_MIN
    error: str | None = field(default=None)
    advice: str | None = None

    def note(self, gateway: str) -> str | None:
        """What the operator should know though nothing is broken."""
        drain = self.drain
        if drain is None or not drain.given_back:
            return self.advice
        return (
            f"{self.config.address_for(gateway)}: the hub has given message {drain.given_back_seq} back "
            f"{drain.given_back} times: nobody there takes it (no queue, no consumer, or no room); it is sent again"
        )


class HubLink:
    """`start`, then `committed` after every commit, `network_changed` when the kernel says so, `stop` in the end."""

    def __init__(
        self,
        hub: Hub,
        gateway: str,
        outbound: Sequence[Outbound],
        inbound: Sequence[Inbound],
        journal: Journal,
        kick: Callable[[], None],
        retain: Retain | None = None,
        requests: Requests | None = None,
    ) -> None:
        self._retain = retain
        self._requests = requests
        self.hub = hub
        self.gateway = gateway
        self.journal = journal
        self._kick = kick
        self._answers = next((o.answers for o in outbound if o.answers is not None), None)
        self._loop = asyncio.get_running_loop()
        self.state = LinkState(
            [str(u) for u in hub.urls], random.Random(), self._loop.time(), hub.retry_min_s, hub.retry_max_s
        )
        self._urls = {str(u): u for u in hub.urls}
        self._ways = [
            _Way(c, s := journal.streams[c.stream], Drain(journal, s, s.cursors["uplink"], hub.window))
            for c in outbound
        ] + [_Way(c, journal.streams[c.stream], None) for c in inbound]
        self._attempts: dict[_Attempt, None] = {}
        self._active: _Attempt | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._watch_timer: asyncio.TimerHandle | None = None
        self._failing_back = False
        self._tasks: set[asyncio.Task[None]] = set()
        self.settled = 0

    # ------------------------------------------------------------------ the owner's side

    def start(self) -> None:
        self._schedule()
        self._watch()

    def stop(self) -> None:
        self.state.stop(self._loop.time())
        for timer in (self._timer, self._watch_timer):
            if timer is not None:
                timer.cancel()
        for attempt in list(self._attempts):
            attempt.abort()
        for task in self._tasks:
            task.cancel()
        if self._active is not None and self._active.protocol is not None:
            self._active.protocol.close()

    def committed(self) -> None:
        """The journal has more, or knows more of what was settled."""
        if self._active is None:
            return
        now = self._loop.time()
        for way in self._ways:
            self._wake(way, now)

    def network_changed(self) -> None:
        self.state.network_changed(self._loop.time())
        self._schedule()

    def describe(self) -> dict[str, Any]:
        now = self._loop.time()
        status = self.state.status()
        errors = [w.error for w in self._ways if w.error]
        return {
            "name": self.hub.name,
            "state": status.state.value,
            "url": status.url,
            "since_s": round(now - status.since, 3),
            "error": status.error or (errors[0] if errors else None),
            "notes": [note for w in self._ways if (note := w.note(self.gateway)) is not None],
            "retry_in_s": None if status.retry_at is None else round(max(0.0, status.retry_at - now), 3),
        }

    def in_flight(self) -> dict[str, int]:
        return {w.stream.name: w.drain.in_flight for w in self._ways if w.drain is not None}

    # ------------------------------------------------------------------ dialling

    def _schedule(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        due = self.state.due()
        if due is not None:
            self._timer = self._loop.call_at(max(due, self._loop.time()), self._due)

    def _due(self) -> None:
        now = self._loop.time()
        if self.state.state is State.UP:
            self.state.failed_back_later(now)
            self._spawn(self._probe_first())
        elif self.state.state is not State.STOPPED:
            self._make_way_for_another()
            url = self.state.dial(now)
            attempt = _Attempt(self, self._urls[url])
            self._attempts[attempt] = None
            self._spawn(attempt.run())
        self._schedule()

    def _make_way_for_another(self) -> None:
        """Of too many attempts the oldest without an answer goes; one that is connected gets more patience."""
        unconnected = [a for a in self._attempts if a.protocol is None]
        if len(unconnected) >= ATTEMPTS_MAX:
            oldest = unconnected[0]
        elif len(self._attempts) >= 2 * ATTEMPTS_MAX:
            oldest = next(iter(self._attempts))
        else:
            return
        del self._attempts[oldest]
        self.state.attempt_replaced()
        oldest.abort()

    def _spawn(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _probe_first(self) -> None:
        """Is the preferred address back? If so: let the window empty, then go there."""
        url = self.hub.urls[0]
        try:
            async with asyncio.timeout(self.hub.connect_timeout_s):
                _, writer = await asyncio.open_connection(
                    url.host, url.port, ssl=self.context(url), server_hostname=url.host if url.tls else None
                )
        except (OSError, ValueError, TimeoutError) as error:
            log.debug("first address still away", extra={"hub": self.hub.name, "url": str(url), "error": str(error)})
            return
        writer.transport.abort()
        self._failing_back = True
        for way in self._ways:
            if way.drain is not None:
                way.drain.paused = True

    def context(self, url: HubUrl) -> ssl.SSLContext | None:
        """Made anew for every attempt, so that renewed files are used without a restart."""
        if not url.tls:
            return None
        from security.tls import client_context  # OpenSSL is memory that a link on loopback need not spend

        return client_context(self.hub.ca, self.hub.cert, self.hub.key, self.hub.crl)

    def engine(self, url: HubUrl) -> Engine:
        hub = self.hub
        password = _password(hub.password_file)
        offered = {
            "external": ["EXTERNAL"],
            "plain": ["PLAIN"],
            "anonymous": ["ANONYMOUS"],
            "auto": ["EXTERNAL"] * bool(hub.cert and url.tls)
            + ["PLAIN"] * bool(hub.user and password is not None)
            + ["ANONYMOUS"] * (hub.user is None),
        }[hub.sasl]
        return Engine(
            server=False,
            container=self.gateway,
            hostname=url.host,
            sasl=SaslClient(offered, hub.user, password, url.host),
            idle_timeout_s=hub.idle_timeout_s,
        )

    # ------------------------------------------------------------------ what attempts report

    def attempt_failed(self, attempt: _Attempt, failure: Failure, error: str) -> None:
        self._attempts.pop(attempt, None)
        if self.state.state is not State.CONNECTING:
            return
        if error != self.state.error:
            log.warning("hub not reached", extra={"hub": self.hub.name, "url": str(attempt.url), "error": error})
        self.state.attempt_failed(self._loop.time(), failure, error)
        self._schedule()

    def opened(self, attempt: _Attempt) -> bool:
        """The first attempt that is open wins; the others go."""
        self._attempts.pop(attempt, None)
        if self.state.state is not State.CONNECTING:
            return False
        now = self._loop.time()
        self._active = attempt
        self.state.opened(now, str(attempt.url))
        for other in list(self._attempts):
            other.abort()
        self._attempts.clear()
        log.info("hub link up", extra={"hub": self.hub.name, "url": str(attempt.url)})
        for way in self._ways:
            way.reattach_s = REATTACH_S_MIN
            self._attach(way, now)
        self._schedule()
        return True

    def lost(self, attempt: _Attempt, error: str, failure: Failure) -> None:
        if attempt is not self._active:
            return
        self._active = None
        self._failing_back = False
        for way in self._ways:
            self._unlink(way)
            way.reattach_at = None
        if self.state.state is State.UP:
            log.warning("hub link lost", extra={"hub": self.hub.name, "url": str(attempt.url), "error": error})
            self.state.lost(self._loop.time(), error, failure)
            self._schedule()

    def _unlink(self, way: _Way) -> None:
        way.link = None
        way.intake = None
        way.attach_by = None
        if way.drain is not None:
            way.drain.detached()
            way.drain.paused = False

    # ------------------------------------------------------------------ links

    def _attach(self, way: _Way, now: float) -> None:
        attempt = self._active
        assert attempt is not None
        assert attempt.protocol is not None
        engine = attempt.protocol.engine
        if engine.closing:
            return
        config, kind = way.config, self.hub.kind
        address: str | None = config.address_for(self.gateway)
        durable = kind in ("rabbitmq", "lineside")
        queue: tuple[str, ...] = ("queue",) if kind == "artemis" else ()
        if isinstance(config, Outbound) and config.answers is not None:
            address, durable, queue = None, False, ()  # the anonymous terminus: each message says where to
        terminus = Terminus(
            address=address,
            durability=Durability.UNSETTLED_STATE if durable else Durability.NONE,
            expiry=Expiry.NEVER if durable else Expiry.SESSION_END,
            capabilities=queue,
        )
        name = f"lineside:{self.gateway}:{config.stream}"
        # Each link has a session of its own: some hubs end the whole session for one attach they do not like.
        session = engine.session()
        if isinstance(config, Outbound):
            way.advice = None if address is None else advice(attempt.peer, address)
            if way.advice is not None:
                log.warning("the hub may lose messages", extra={"hub": self.hub.name, "note": way.advice})
            way.link = engine.sender(session, name, terminus)
        else:
            way.link = engine.receiver(session, name, terminus)
        way.link.context = way
        way.attach_by = now + self.hub.attach_timeout_s
        way.reattach_at = None

    def on_events(self, events: list[Event]) -> None:
        now = self._loop.time()
        for event in events:
            match event:
                case Deliveries(receiver, batch):
                    way = receiver.context
                    if way.intake is not None:
                        way.intake.deliveries(batch)
                        self._kick()
                case Credit(sender) | Settled(sender):
                    self._wake(sender.context, now)
                case LinkAttached(link):
                    self._attached(link, now)
                case LinkClosed(link, condition, description):
                    self._link_closed(link, condition, description, now)
                case _:
                    pass

    def _wake(self, way: _Way, now: float) -> None:
        drain = way.drain
        if drain is None:
            return
        before, given_back = drain.settled, drain.given_back
        if drain.wake(now):
            self.state.settled()
            self.settled += drain.settled - before
        if drain.given_back and not given_back:
            log.warning(
                "the hub gives messages back",
                extra={"hub": self.hub.name, "address": way.config.address_for(self.gateway)},
            )
        if self.journal.pending:
            self._kick()

    def _attached(self, link: Sender | Receiver, now: float) -> None:
        way: _Way = link.context
        way.attach_by = None
        way.error = None
        way.reattach_s = REATTACH_S_MIN
        if isinstance(link, Sender):
            assert way.drain is not None
            way.drain.attached(link, now)
            self._wake(way, now)
        else:
            assert isinstance(way.config, Inbound)
            place = self._place(way.config, way.stream)
            link.whole_windows = self.hub.kind == "rabbitmq"
            inlet = None
            if self._requests is not None:
                inlet = Inlet(self._requests, self.gateway, way.stream, self._answers)
            way.intake = Intake(
                self.journal, link, way.config.credit, place, self._flush, self.state.settled, self._retain, inlet
            )

    def _place(self, config: Inbound, stream: Stream) -> Callable[[Message], tuple[Stream, str]]:
        gateway = self.gateway

        def place(message: Message) -> tuple[Stream, str]:
            topic = config.topic.replace("{gateway}", gateway)
            if "{subject}" in topic:
                topic = topic.replace("{subject}", message.subject or "")
            try:
                check_topic(topic)
            except ValueError as error:
                raise PeerError(f"the message's subject makes no topic ({topic!r}): {error}") from None
            return stream, topic

        return place

    def _flush(self) -> None:
        if self._active is not None and self._active.protocol is not None:
            self._active.protocol.schedule_flush()

    def _link_closed(self, link: Sender | Receiver, condition: str | None, description: str | None, now: float) -> None:
        way = link.context
        if way is None or way.link is not link:
            return
        self._unlink(way)
        address = way.config.address_for(self.gateway)
        way.error = f"{address}: {condition or 'link closed'}{': ' + description if description else ''}"
        way.reattach_at = now + way.reattach_s
        way.reattach_s = min(REATTACH_S_MAX, way.reattach_s * 2)
        log.error(
            "the hub closed a link",
            extra={"hub": self.hub.name, "address": address, "stream": way.config.stream, "error": way.error},
        )

    # ------------------------------------------------------------------ watching

    def _watch(self) -> None:
        self._watch_timer = self._loop.call_later(WATCH_S, self._watch)
        attempt = self._active
        if attempt is None or attempt.protocol is None:
            return
        now = self._loop.time()
        fault = self._fault(attempt, now)
        if fault is not None:
            attempt.fail(fault, Failure.UNREACHABLE if "silent" in fault else Failure.HANDSHAKE)
            return
        for way in self._ways:
            if way.reattach_at is not None and now >= way.reattach_at:
                self._attach(way, now)
            if way.drain is not None and way.drain.resend_at() is not None:
                self._wake(way, now)
            if way.intake is not None and way.intake.held:
                way.intake.retry()
                self._kick()
        if self._failing_back and not any(w.drain.in_flight for w in self._ways if w.drain is not None):
            self._fail_back(attempt, now)

    def _fail_back(self, attempt: _Attempt, now: float) -> None:
        log.info("going back to the first address", extra={"hub": self.hub.name, "url": str(self.hub.urls[0])})
        self._active = None
        self._failing_back = False
        for way in self._ways:
            self._unlink(way)
        attempt.leave()
        self.state.fail_back(now)
        self._schedule()

    def _fault(self, attempt: _Attempt, now: float) -> str | None:
        """Whether the connection is dead though nobody said so."""
        for way in self._ways:
            if way.attach_by is not None and now > way.attach_by:
                return f"no answer to the attach of {way.config.address_for(self.gateway)}"
            since = None if way.drain is None else way.drain.stalled_since()
            if since is not None and now - since > self.hub.settle_timeout_s:
                return f"nothing settled for {self.hub.settle_timeout_s:g} s on {way.config.address_for(self.gateway)}"
        silent = attempt.silent_ms()
        if silent > SILENT_MS_MAX:
            return f"the line is silent: nothing acknowledged for {silent} ms"
        return None


class _Attempt:
    """One connection, from dialling on. Reports to its HubLink once how it ended."""

    def __init__(self, owner: HubLink, url: HubUrl) -> None:
        self.owner = owner
        self.url = url
        self.protocol: AmqpProtocol | None = None
        self._open = False
        self.peer: Mapping[str, object] = {}
        self._over = False
        self._reason: tuple[str, Failure] | None = None
        self._deadline: asyncio.TimerHandle | None = None
        self._loop = asyncio.get_running_loop()
        self._task: asyncio.Task[Any] | None = None
        self._outstanding_since: float | None = None

    async def run(self) -> None:
        hub, url = self.owner.hub, self.url
        self._task = asyncio.current_task()
        try:
            context = self.owner.context(url)
            engine = self.owner.engine(url)
        except (OSError, ValueError) as error:
            self._end(str(error), Failure.AUTHENTICATION)
            return
        try:
            async with asyncio.timeout(hub.connect_timeout_s):
                await self._loop.create_connection(
                    lambda: AmqpProtocol(lambda transport: engine, self, self._ready),
                    url.host,
                    url.port,
                    ssl=context,
                    server_hostname=url.host if url.tls else None,
                    ssl_handshake_timeout=hub.connect_timeout_s if url.tls else None,
                )
        except ssl.SSLCertVerificationError as error:
            self._end(f"the hub's certificate: {error.verify_message}", Failure.AUTHENTICATION)
        except (ssl.SSLEOFError, ssl.SSLZeroReturnError) as error:
            self._end(f"TLS: the connection ended in the handshake: {error.reason or error}", Failure.UNREACHABLE)
        except ssl.SSLError as error:
            self._end(f"TLS: {error.reason or error}", Failure.HANDSHAKE)
        except TimeoutError:
            self._end(f"no connection within {hub.connect_timeout_s:g} s", Failure.UNREACHABLE)
        except OSError as error:
            self._end(f"no connection: {error.strerror or error}", Failure.UNREACHABLE)

    def _ready(self, protocol: AmqpProtocol) -> None:
        self.protocol = protocol
        if self._over:
            protocol.abort()
            return
        protocol.engine.open()
        self._stage("SASL", self.owner.hub.sasl_timeout_s)

    def _stage(self, what: str, timeout_s: float) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        self._deadline = self._loop.call_later(
            timeout_s, self.fail, f"no answer within {timeout_s:g} s ({what})", Failure.HANDSHAKE
        )

    def on_events(self, engine: Engine, events: list[Event]) -> None:
        for event in events:
            match event:
                case Authenticated():
                    self._stage("open", self.owner.hub.open_timeout_s)
                case Opened(properties=properties) if not self._open:
                    self.peer = properties
                    if self._deadline is not None:
                        self._deadline.cancel()
                    self._open = True
                    if not self.owner.opened(self):
                        self._over = True
                        self.abort()
                        return
                case Failed(condition, description, auth):
                    failure = Failure.AUTHENTICATION if auth else Failure.HANDSHAKE
                    self._reason = (f"{condition}: {description}", failure)
                case RemoteClosed(condition, description):
                    text = f"the hub closed: {condition or 'no condition'} {description or ''}".rstrip()
                    refused = condition == "amqp:unauthorized-access"
                    self._reason = (text, Failure.AUTHENTICATION if refused else Failure.HANDSHAKE)
                case _:
                    pass
        if self._open and not self._over:
            self.owner.on_events(events)

    def on_lost(self, error: Exception | None) -> None:
        # Closed before it said a word, that was not the hub but something on the way to it (a proxy, a carrier's NAT).
        heard = self.protocol is not None and self.protocol.heard
        text, failure = self._reason or (
            f"the connection ended: {error}" if error else "the hub ended the connection",
            Failure.HANDSHAKE if heard else Failure.UNREACHABLE,
        )
        self._end(text, failure)

    def fail(self, error: str, failure: Failure) -> None:
        """We give this connection up, without waiting for anybody."""
        self._reason = error, failure
        self._end(error, failure)
        self.abort()

    def leave(self) -> None:
        """Say goodbye; what comes after is nobody's concern."""
        self._over = True
        if self.protocol is not None:
            self.protocol.close()

    def abort(self) -> None:
        self._over = True
        if self._deadline is not None:
            self._deadline.cancel()
        if self.protocol is not None:
            self.protocol.abort()
        elif self._task is not None:
            self._task.cancel()

    def silent_ms(self) -> int:
        """How long something was outstanding and nothing was acknowledged: a pause with nothing to send is none."""
        ms = silent_ms(self.protocol.socket) if self.protocol is not None and self.protocol.socket else 0
        now = self._loop.time()
        if not ms:
            self._outstanding_since = None
            return 0
        if self._outstanding_since is None:
            self._outstanding_since = now
        return min(ms, int((now - self._outstanding_since) * 1000))

    def _end(self, error: str, failure: Failure) -> None:
        if self._over:
            return
        self._over = True
        if self._deadline is not None:
            self._deadline.cancel()
        if self._open:
            self.owner.lost(self, error, failure)
        else:
            self.owner.attempt_failed(self, failure, error)


def _password(path: Path | None) -> str | None:
    return None if path is None else path.read_text(encoding="utf-8").rstrip("\r\n")
