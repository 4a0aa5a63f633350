"""The driver of one hub's link: keeps dialling, watches, attaches a link a stream, and moves what the cores decide.

Reads the loop's clock. One connection from dialling on is `attempt`'s, what to dial when is `state`'s decision, what to
send when is `drain`'s, what to settle when is `intake`'s.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from gateway.amqp.engine import Engine, Receiver, Sender, Session
from gateway.amqp.events import Credit, Deliveries, Event, LinkAttached, LinkClosed, Settled
from gateway.amqp.message import Message
from gateway.amqp.termini import Durability, Expiry, Terminus
from gateway.beats import call_at_next
from gateway.config import Hub, Inbound, Outbound
from gateway.errors import PeerError
from gateway.mqtt.topics import check_topic
from gateway.replies import Inlet, Requests
from gateway.routing import DUPLICATE_PROPERTY
from gateway.throttle import Throttle
from gateway.uplink.attempt import Attempt, HubTls
from gateway.uplink.drain import Drain
from gateway.uplink.fair import Class, Fair, Queue
from gateway.uplink.intake import Intake, Retain
from gateway.uplink.pace import LOOK_S_MIN, Bucket, Gauge, chunk_bytes
from gateway.uplink.quirks import advice
from gateway.uplink.state import ATTEMPTS_MAX, STAGGER_S, Failure, LinkState, State
from storeforward.journal import Journal
from storeforward.streams import Stream

log = logging.getLogger("lineside.uplink")

WATCH_S = 0.25
SILENT_MS_MAX = 3000
# Of attempts that are connected: as many as begin within the deadline of the first at the shortest distance.
CONNECTED_MAX = 16
# A slow line may need longer than that for what the kernel sends in one go.
SILENT_BYTES = 6000
HANDSHAKE_BYTES = 4000  # of ours, with TLS and certificates
# Of one connection: what may be without an answer before streams that are not urgent wait.
WINDOW_BYTES_MAX = 32 << 20
QUANTUM_BYTES = 64 << 10
_URGENCY = [each.value for each in Class]
REATTACH_S_MIN, REATTACH_S_MAX = 1.0, 60.0
ROOM_PARTS = 8  # of a full stream: when one of them is free, messages that were handed back are asked for again
# A connection that ends so soon behind one of its links most likely ended because of it.
CONSEQUENCE_S = 1.0


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
    attached_at: float = 0.0
    closed_at: float = 0.0  # by the hub
    took: bool = False  # whether the hub has settled anything since
    error: str | None = field(default=None)
    advice: str | None = None
    queue: Queue | None = None
    progress_at: float = 0.0  # when bytes of what it has in flight were last carried
    handed_back: bool = False  # its stream was full: the hub keeps its messages until there is room
    largest_bytes: int = 0  # of inbound messages lately

    @property
    def has_room(self) -> bool:
        """Whether it is worth while to attach again after messages were handed back."""
        stream, limits = self.stream, self.stream.limits
        wanted = min(limits.bytes_max, max(self.largest_bytes, limits.bytes_max // ROOM_PARTS))
        rows_wanted = -(-limits.messages_max // ROOM_PARTS)
        return stream.size_bytes + wanted <= limits.bytes_max and stream.rows + rows_wanted <= limits.messages_max

    def note(self, gateway: str) -> str | None:
        """What the operator should know though nothing is broken."""
        drain = self.drain
        if self.handed_back:
            address = self.config.address_for(gateway)
            return f"{address}: no room for stream {self.stream.name}: the hub keeps what it has for it"
        if drain is not None and drain.held_back:
            return f"{self.config.address_for(gateway)}: the hub gives no credit: no room there, or it holds senders up"
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
        clock_doubt: Callable[[], str | None] = lambda: None,
    ) -> None:
        self._retain = retain
        self._requests = requests
        self.clock_doubt = clock_doubt
        self.hub = hub
        self._tls = HubTls(hub)
        self.gateway = gateway
        self.journal = journal
        self._kick = kick
        self._answers = next((o.answers for o in outbound if o.answers is not None), None)
        self._loop = asyncio.get_running_loop()
        # On a slow line a handshake takes its time, and attempts that overlap would only delay one another.
        stagger_s = STAGGER_S if hub.rate is None else max(STAGGER_S, HANDSHAKE_BYTES / hub.rate)
        self.state = LinkState(
            [str(u) for u in hub.urls],
            random.Random(),
            self._loop.time(),
            hub.retry_min_s,
            hub.retry_max_s,
            stagger_s,
        )
        self._urls = {str(u): u for u in hub.urls}
        self._ways = [
            _Way(c, s := journal.streams[c.stream], self._drain(s))
            for c in sorted(outbound, key=lambda each: _URGENCY.index(each.class_))
        ] + [_Way(c, journal.streams[c.stream], None) for c in inbound]
        self._fair = Fair(hub.shares)
        for way in self._ways:
            if isinstance(way.config, Outbound):
                way.queue = self._fair.add(Class(way.config.class_), way)
        self._bucket = None if hub.rate is None else Bucket(hub.rate, self._loop.time())
        self._gauge = Gauge(rate_max=hub.rate or math.inf)
        self._pump_timer: asyncio.TimerHandle | None = None
        self._attempts: dict[Attempt, None] = {}
        self._active: Attempt | None = None
        self._throttle: Throttle | None = None  # of the active one
        self._timer: asyncio.TimerHandle | None = None
        self._watch_timer: asyncio.TimerHandle | None = None
        self._failing_back = False
        self._tasks: set[asyncio.Task[None]] = set()
        self.settled = 0

    def _drain(self, stream: Stream) -> Drain:
        gently = self.hub.kind in DUPLICATE_PROPERTY
        return Drain(self.journal, stream, stream.cursors["uplink"], self.hub.window, shared=True, gently=gently)

    # ------------------------------------------------------------------ the owner's side

    def start(self) -> None:
        self._schedule()

    def stop(self) -> None:
        self.state.stop(self._loop.time())
        for timer in (self._timer, self._watch_timer, self._pump_timer):
            if timer is not None:
                timer.cancel()
        for attempt in list(self._attempts):
            attempt.abort()
        for task in self._tasks:
            task.cancel()
        if self._active is not None and self._active.protocol is not None:
            self._active.protocol.close()
        for way in self._ways:
            if way.drain is not None:
                way.drain.paused = True  # answers to what was sent still count, but nothing is held for this link
                self.journal.hold(way.stream, False, self._loop.time())

    def committed(self) -> None:
        """The journal has more, or knows more of what was settled."""
        if self._active is None:
            return
        now = self._loop.time()
        for way in self._ways:
            self._wake(way, now)
            if way.intake is not None and way.intake.overfull:
                self._hand_back(way, way.intake)
        self._pump(now)

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
            "dialled": self.state.dialled,
            "connected": self.state.connected,
            "error": status.error or (errors[0] if errors else None),
            "notes": [note for w in self._ways if (note := w.note(self.gateway)) is not None],
            "rate_limit_bytes_s": None if self.hub.rate is None else round(self.hub.rate),
            "rate_bytes_s": None if self._gauge.rate is None else round(self._gauge.rate),
            "line_bytes_max": self._gauge.limit,
            "retry_in_s": None if status.retry_at is None else round(max(0.0, status.retry_at - now), 3),
        }

    def streams(self) -> dict[str, dict[str, Any]]:
        """Of each outbound stream: its class and share, and what it has in flight."""
        return {
            way.stream.name: {
                "class": way.queue.class_.value,
                "share": self.hub.shares.of(way.queue.class_.value),
                "in_flight": way.drain.in_flight,
                "in_flight_bytes": way.drain.in_flight_bytes,
                "sent_bytes": way.queue.sent_bytes,
            }
            for way in self._ways
            if way.drain is not None and way.queue is not None
        }

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
            self._spawn(self._probe_first(self._active))
        elif self.state.state is not State.STOPPED:
            self._make_way_for_another()
            url = self.state.dial(now)
            attempt = Attempt(self, self.hub, self._tls, self._urls[url], self.gateway)
            self._attempts[attempt] = None
            self._spawn(attempt.run())
        self._schedule()

    def _make_way_for_another(self) -> None:
        """Of too many attempts the oldest that is not connected goes; one that is has its deadlines.

        A hub that is slow to answer must not be hung up on again and again before it does.
        """
        unanswered = [a for a in self._attempts if not a.reached]
        if len(unanswered) >= ATTEMPTS_MAX:
            oldest = unanswered[0]
        elif len(self._attempts) >= CONNECTED_MAX:
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

    async def _probe_first(self, attempt: Attempt | None) -> None:
        """Is the preferred address back? If so: let the window of this connection empty, then go there."""
        url = self.hub.urls[0]
        try:
            async with asyncio.timeout(self.hub.connect_timeout_s):
                _, writer = await asyncio.open_connection(
                    url.host, url.port, ssl=self._tls.context(url), server_hostname=url.host if url.tls else None
                )
        except (OSError, ValueError, TimeoutError) as error:
            log.debug("first address still away", extra={"hub": self.hub.name, "url": str(url), "error": str(error)})
            return
        writer.transport.abort()
        if self._active is not attempt:  # lost meanwhile, and the next one may be to that address already
            return
        self._failing_back = True
        for way in self._ways:
            if way.drain is not None:
                way.drain.paused = True

    # ------------------------------------------------------------------ what attempts report

    def attempt_failed(self, attempt: Attempt, failure: Failure, error: str, waited_s: float) -> None:
        self._attempts.pop(attempt, None)
        if self.state.state is not State.CONNECTING:
            return
        if error != self.state.error:
            log.warning("hub not reached", extra={"hub": self.hub.name, "url": str(attempt.url), "error": error})
        self.state.attempt_failed(self._loop.time(), failure, error, waited_s)
        self._schedule()

    def opened(self, attempt: Attempt) -> bool:
        """The first attempt that is open wins; the others go."""
        self._attempts.pop(attempt, None)
        if self.state.state is not State.CONNECTING:
            return False
        now = self._loop.time()
        self._active = attempt
        assert attempt.protocol is not None
        self._throttle = Throttle(self.journal, attempt.protocol)
        # The same line, most likely: a narrow one is not flooded first.
        self._gauge = Gauge(self._gauge.limit, self.hub.rate or math.inf)
        self.state.opened(now, str(attempt.url))
        for other in list(self._attempts):
            other.abort()
        self._attempts.clear()
        log.info("hub link up", extra={"hub": self.hub.name, "url": str(attempt.url)})
        for way in self._ways:
            if (way.reattach_at is None or now >= way.reattach_at) and (not way.handed_back or self._may_attach(way)):
                self._attach(way, now)
        self._schedule()
        if self._watch_timer is None:
            self._watch_timer = call_at_next(self._loop, WATCH_S, self._watch)
        return True

    def lost(self, attempt: Attempt, error: str, failure: Failure) -> None:
        if attempt is not self._active:
            return
        self._active = None
        self._failing_back = False
        now = self._loop.time()
        for way in self._ways:
            self._unlink(way)
            # Some hubs end the connection for what is still on its way to a link that they closed: a queue that is
            # full would have it end at once, again and again, under the other streams. Its link waits its time out.
            if now - way.closed_at > CONSEQUENCE_S:
                way.reattach_at = None
                way.reattach_s = REATTACH_S_MIN
        if self.state.state is State.UP:
            log.warning("hub link lost", extra={"hub": self.hub.name, "url": str(attempt.url), "error": error})
            self.state.lost(now, error, failure)
            self._schedule()

    def _unlink(self, way: _Way) -> None:
        way.link = None
        way.intake = None
        way.attach_by = None
        if way.drain is not None:
            way.drain.detached()
            way.drain.paused = False
            self.journal.hold(way.stream, False, self._loop.time())
        if way.queue is not None:
            way.queue.cut()
            self._fair.rest(way.queue)

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
        session = self._session(engine)
        if session is None:
            way.reattach_at = now + REATTACH_S_MIN
            return
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
        way.handed_back = False

    def _session(self, engine: Engine) -> Session | None:
        """One for a link: its own, as some hubs end the whole session for one attach they do not like.

        Where the hub takes fewer sessions than there are links, the one that holds the fewest. None: none stands.
        """
        if engine.sessions_left > 0:
            return engine.session()
        standing = {link.session: None for way in self._ways if (link := way.link) is not None and link.session.alive}
        return min(standing, key=lambda session: len(session.links), default=None)

    def on_events(self, events: list[Event]) -> None:
        now = self._loop.time()
        for event in events:
            match event:
                case Deliveries(receiver, batch):
                    way = receiver.context
                    if way.intake is not None:
                        way.intake.deliveries(batch)
                        way.largest_bytes = way.intake.largest_bytes
                        if way.intake.overfull:
                            self._hand_back(way, way.intake)
                        if self._throttle is not None:
                            self._throttle.look()
                        self._kick()
                case Credit(sender) | Settled(sender):
                    self._wake(sender.context, now)
                case LinkAttached(link):
                    self._attached(link, now)
                case LinkClosed(link, condition, description):
                    self._link_closed(link, condition, description, now)
                case _:
                    pass
        self._pump(now)

    def _wake(self, way: _Way, now: float) -> None:
        drain = way.drain
        if drain is None:
            return
        before, given_back = drain.settled, drain.given_back
        if drain.wake(now):
            self._took(way)
            drain.window = min(self.hub.window, 2 * drain.window)
            self.settled += drain.settled - before
        if way.queue is not None and drain.has_more:
            way.queue.filled(now)
            self._fair.wake(way.queue)
        if drain.given_back and not given_back:
            log.warning(
                "the hub gives messages back",
                extra={"hub": self.hub.name, "address": way.config.address_for(self.gateway)},
            )
        if self.journal.pending:
            self._kick()

    def _took(self, way: _Way) -> None:
        """Something was settled on it, whichever way: the link works, and the hub."""
        way.reattach_s = REATTACH_S_MIN
        way.took = True
        self.state.settled()

    # ------------------------------------------------------------------ whose turn it is

    def _pump(self, now: float) -> None:
        self._take_turns(now)
        for way in self._ways:
            if way.drain is not None:
                # Only now is it known whether all that was written has been sent.
                self.journal.hold(way.stream, way.drain.flows, now)
        if self.journal.pending:
            self._kick()

    def _take_turns(self, now: float) -> None:
        """Hand to the line what it takes now, by turns."""
        fair, attempt = self._fair, self._active
        if not fair.waiting or attempt is None or attempt.protocol is None:
            return
        gauge, bucket, protocol = self._gauge, self._bucket, attempt.protocol
        attempt.observe(gauge, bucket, now)
        # `least`: less room than this is not worth a part of a message.
        limit, least = gauge.limit, chunk_bytes(gauge.limit)
        if bucket is not None:
            limit, least = min(limit, bucket.burst), min(least, bucket.burst * 9 // 10)
        fair.quantum = max(least, min(QUANTUM_BYTES, limit))
        in_flight = sum([way.drain.in_flight_bytes for way in self._ways if way.drain is not None])
        while fair.waiting:
            room = gauge.room() if bucket is None else min(gauge.room(), bucket.level(now) - protocol.handed_bytes)
            if room < least:
                room = min(0, room)
            turn = fair.next(now, room, limit, urgent_only=in_flight >= WINDOW_BYTES_MAX)
            if turn is None:
                self._look_again(now, least)
                return
            way: _Way = turn.queue.owner
            drain = way.drain
            assert drain is not None
            size = drain.send(now, turn.size_bytes, attempt.handed_bytes)
            if drain.caught_up:
                turn.queue.emptied()
            attempt.handed_bytes += size
            protocol.handed_bytes += size
            in_flight += size
            gauge.handed(size)
            fair.sent(turn.queue, size, now)
            if not size and drain.feeding:
                self._look_again(now, least)

    def _look_again(self, now: float, least: int) -> None:
        """The line is full and somebody waits: nobody tells when there is room again."""
        gauge, bucket = self._gauge, self._bucket
        at = now + LOOK_S_MIN
        if gauge.room() < least:
            gauge.held_up(now)
            at = gauge.look_at(now)
        if bucket is not None:
            at = max(at, bucket.ready_at(now, least))
        if self._pump_timer is not None:
            self._pump_timer.cancel()
        self._pump_timer = self._loop.call_at(at, self._pump_again)

    def _pump_again(self) -> None:
        self._pump_timer = None
        attempt = self._active
        if attempt is None or attempt.protocol is None:
            return
        for way in self._ways:
            if way.queue is not None and way.drain is not None and way.drain.feeding:
                self._fair.wake(way.queue)
        attempt.protocol.guarded(self._pump, self._loop.time())

    def _attached(self, link: Sender | Receiver, now: float) -> None:
        way: _Way = link.context
        way.attach_by = None
        way.error = None
        way.attached_at, way.took = now, False
        if isinstance(link, Sender):
            assert way.drain is not None
            way.drain.attached(link, now)
            if way.queue is not None and way.drain.caught_up:
                way.queue.emptied()
            self._wake(way, now)
        else:
            assert isinstance(way.config, Inbound)
            place = self._place(way.config, way.stream)
            link.whole_windows = self.hub.kind == "rabbitmq"
            inlet = None
            if self._requests is not None:
                inlet = Inlet(self._requests, self.gateway, way.stream, self._answers)
            way.intake = Intake(
                self.journal,
                link,
                way.config.credit,
                place,
                self._flush,
                partial(self._took, way),
                self._retain,
                inlet,
                way.largest_bytes,
            )

    def _hand_back(self, way: _Way, intake: Intake) -> None:
        """The stream is full, and more came than can be held: all of it goes back to the hub, in its order.

        With the session, as RabbitMQ keeps what is unsettled when only a link ends. Not while answers are due, lest
        what they are for comes twice.
        """
        assert self._throttle is not None
        if intake.staged:
            self._throttle.pause()
            return
        log.warning(
            "no room for a stream; its messages stay at the hub until there is",
            extra={"hub": self.hub.name, "address": way.config.address_for(self.gateway), "stream": way.stream.name},
        )
        session, now = intake.link.session, self._loop.time()
        session.close()
        for each in self._ways:
            if each.link is not None and each.link.session is session:
                self._unlink(each)
                each.reattach_at = now  # it was not its stream that is full
        way.handed_back, way.reattach_at = True, None

    def _may_attach(self, way: _Way) -> bool:
        return way.has_room and not self.journal.disk_full

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
        if all(each is link for each in link.session.links):
            link.session.close()  # the next attach begins one of its own, and there are not many
        address = way.config.address_for(self.gateway)
        before = way.error
        way.error = f"{address}: {condition or 'the hub ended the link'}{': ' + description if description else ''}"
        if way.closed_at < way.attached_at < now - way.reattach_s:
            way.reattach_s = REATTACH_S_MIN  # it stood for long enough
        if way.drain is not None and way.closed_at < way.attached_at and not way.took:
            # It took nothing of all that was sent, as a queue may that has room for some of it: less at a time, then.
            waiting = way.stream.committed - way.drain.cursor.position
            way.drain.narrow(max(1, min(waiting, way.drain.window) // 8))
        way.closed_at = now
        way.reattach_at = now + way.reattach_s
        way.reattach_s = min(REATTACH_S_MAX, way.reattach_s * 2)
        if way.error != before:  # else it is refused again, and again, for the same reason
            log.error(
                "the hub closed a link",
                extra={"hub": self.hub.name, "address": address, "stream": way.config.stream, "error": way.error},
            )

    # ------------------------------------------------------------------ watching

    def _watch(self) -> None:
        attempt = self._active
        if attempt is None or attempt.protocol is None:
            self._watch_timer = None
            return
        self._watch_timer = call_at_next(self._loop, WATCH_S, self._watch)
        now = self._loop.time()
        fault = self._fault(attempt, now)
        if fault is not None:
            attempt.fail(*fault)
            return
        for way in self._ways:
            due = way.reattach_at is not None and now >= way.reattach_at
            if due or (way.handed_back and self._may_attach(way)):
                self._attach(way, now)
            if way.drain is not None and way.drain.resend_at() is not None:
                self._wake(way, now)
                self._pump(now)
            if way.intake is not None and way.intake.held:
                way.intake.retry()
                self._kick()
        if self._failing_back and not any(w.drain.in_flight for w in self._ways if w.drain is not None):
            self._fail_back(attempt, now)

    def _fail_back(self, attempt: Attempt, now: float) -> None:
        log.info("going back to the first address", extra={"hub": self.hub.name, "url": str(self.hub.urls[0])})
        self._active = None
        self._failing_back = False
        for way in self._ways:
            self._unlink(way)
        attempt.leave()
        self.state.fail_back(now)
        self._schedule()

    def _fault(self, attempt: Attempt, now: float) -> tuple[str, Failure] | None:
        """Whether the connection is dead though nobody said so, and what that means for the next attempt."""
        carried, moving = attempt.carried()
        for way in self._ways:
            if way.attach_by is not None and now > way.attach_by:
                return f"no answer to the attach of {way.config.address_for(self.gateway)}", Failure.HANDSHAKE
            since = None if way.drain is None else way.drain.stalled_since()
            if since is not None and way.drain is not None:
                # The peer cannot answer for what the line still carries, however slowly, as long as it does.
                end = way.drain.oldest_end
                if moving and (way.drain.feeding or (end is not None and end > carried)):
                    way.progress_at = now
                since = max(since, way.progress_at)
            if since is not None and now - since > self.hub.settle_timeout_s:
                text = f"nothing settled for {self.hub.settle_timeout_s:g} s on {way.config.address_for(self.gateway)}"
                return text, Failure.HANDSHAKE
        silent = attempt.silent_ms()
        if silent > max(SILENT_MS_MAX, 0 if self.hub.rate is None else SILENT_BYTES * 1000 / self.hub.rate):
            return f"the line is silent: nothing acknowledged for {silent} ms", Failure.UNREACHABLE
        return None
