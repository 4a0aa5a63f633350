"""One AMQP 1.0 connection without I/O: bytes and the time go in, events and bytes come out.

`Engine` wraps proton's protocol engine, client or server side, with our SASL layer in front. The rules that proton
leaves to its user are kept here: messages are bounded by our own count, credit is enforced, large messages are fed in
chunks, and nothing that C has freed is ever touched again. Knows nothing of sockets, TLS, MQTT or the journal.

What a peer does wrong becomes an event (Failed, LinkClosed), never an exception; an exception is our own mistake.
Whoever calls a method that makes output has to see that `data_to_send()` is called soon; `on_output` says so.
"""

from __future__ import annotations

import math
import sys
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Final

import proton

from gateway.amqp import frames, raw
from gateway.amqp.events import (
    CONNECTION_REDIRECT,
    DECODE_ERROR,
    FRAMING_ERROR,
    INVALID_FIELD,
    LINK_REDIRECT,
    MESSAGE_SIZE_EXCEEDED,
    NOT_ALLOWED,
    NOT_IMPLEMENTED,
    RESOURCE_LIMIT_EXCEEDED,
    TRANSFER_LIMIT_EXCEEDED,
    UNAUTHORIZED,
    Authenticated,
    Credit,
    Deliveries,
    Event,
    Failed,
    LinkAttached,
    LinkClosed,
    Opened,
    Outcome,
    OutcomeKind,
    RemoteClosed,
    Role,
    SessionClosed,
    Settled,
    SettleMode,
)
from gateway.amqp.sasl import AMQP_HEADER, HEADER_BYTES, SaslClient, SaslServer
from gateway.amqp.sasl import Outcome as Refusal
from gateway.amqp.termini import Terminus, set_terminus, terminus

MESSAGE_BYTES_MAX: Final = 16 << 20
FRAME_BYTES_MAX: Final = 65536
LINKS_MAX: Final = 256
# Unfinished deliveries of all links of a connection together.
PARTIAL_BYTES_MAX: Final = 32 << 20
SESSIONS_MAX: Final = 64
# A message longer than two chunks is fed to its link a chunk at a time: at once costs a hundredfold (8 MB, measured).
CHUNK_BYTES: Final = 256 << 10
# Above this, a session has enough to send and its senders show no capacity, whatever the credit.
OUTGOING_BYTES_MAX: Final = 2 << 20
OUTPUT_BYTES: Final = 1 << 20
# Taken from proton before a flow is heard, and kept until it is asked for: what proton holds, as a rule.
AHEAD_BYTES_MAX: Final = 4 << 20
INFO_CHARACTERS_MAX: Final = 500
FAILED_TO_OPEN: Final = "amqp:connection-establishment-failed"

# What reading a peer's open or attach may raise inside proton's binding.
_PEER_DATA_ERRORS = (
    proton.ProtonException,
    ValueError,  # among them UnicodeDecodeError
    TypeError,
    LookupError,
    OverflowError,
    RecursionError,
)


_OUTCOME_BY_STATE = {
    raw.ACCEPTED: OutcomeKind.ACCEPTED,
    raw.REJECTED: OutcomeKind.REJECTED,
    raw.RELEASED: OutcomeKind.RELEASED,
    raw.MODIFIED: OutcomeKind.MODIFIED,
    0: OutcomeKind.UNKNOWN,
}


def _condition(name: str | None, description: str | None, info: dict[Any, Any] | None = None) -> Any:
    return proton.Condition(name, description or "", info) if name else None


def _symbols(value: Any) -> tuple[str, ...]:
    """What proton makes of a field that holds symbols, one (it may stand alone: part 1.6) or many."""
    if isinstance(value, str):
        return (value,)
    return tuple(str(item) for item in getattr(value, "elements", value) or ())


def _explained(condition: str | None, description: str | None, endpoint: Any) -> tuple[str | None, str | None]:
    """The peer's reason, with what only the condition's info says: which field is invalid, or where to go instead."""
    if condition not in (CONNECTION_REDIRECT, LINK_REDIRECT, INVALID_FIELD):
        return condition, description
    info = endpoint.remote_condition.info
    told = ""
    if isinstance(info, dict):
        plain = {str(key): int(value) if isinstance(value, int) else value for key, value in info.items()}
        told = ", ".join(f"{key}: {plain[key]}" for key in sorted(plain))
    return condition, f"{description or ''} ({told[:INFO_CHARACTERS_MAX]})".lstrip() if told else description


# ------------------------------------------------------------------------------------------------ sessions and links


class Session:
    """A session of the engine: links live in it, and end with it."""

    __slots__ = ("_engine", "_links", "_session", "alive", "context")

    def __init__(self, engine: Engine, session: Any) -> None:
        self._engine = engine
        self._session = session
        self._links: list[Sender | Receiver] = []
        self.alive = True
        self.context: Any = None

    @property
    def links(self) -> tuple[Sender | Receiver, ...]:
        return tuple(self._links)

    def close(self) -> None:
        """End the session and every link in it. Their unsettled messages have no known fate."""
        if not self.alive:
            return
        self._engine._drop_session(self)
        self._engine._ending += 1
        self._session.close()
        self._session.free()
        self._engine._produced()


class _Link:
    """What senders and receivers share. `context` is the owner's. All methods are harmless once not `alive`."""

    __slots__ = (
        "_closing",
        "_engine",
        "_link",
        "_opened",
        "_pointer",
        "alive",
        "context",
        "name",
        "refused",
        "session",
        "source",
        "target",
    )

    role: Role

    def __init__(self, engine: Engine, session: Session, link: Any) -> None:
        self._engine = engine
        self.session = session
        self._link = link
        self._pointer = link._impl
        self._opened = False
        self._closing = False
        self.alive = True
        self.refused = False
        self.name: str = link.name
        self.source: Terminus | None = None
        self.target: Terminus | None = None
        self.context: Any = None

    @property
    def _usable(self) -> bool:
        return self.alive and not self._closing and not self._engine.closing

    @property
    def peer_max_message_bytes(self) -> int:
        """The largest message the peer takes on this link, 0 if it has not said so."""
        return int(self._link.remote_max_message_size) if self.alive else 0

    def confirm(
        self, *, source: Terminus | None = None, target: Terminus | None = None, max_message_bytes: int = 0
    ) -> None:
        """Answer a peer's attach with yes: its own source and target, unless others are given here."""
        if not self._usable:
            return
        assert not self._opened
        # Never proton's own copy(): a damaged array in the peer's attach, copied and sent back, crashes the process.
        set_terminus(self._link.source, source or self.source)
        set_terminus(self._link.target, target or self.target)
        self._link.snd_settle_mode = self._link.remote_snd_settle_mode
        # A receiver that settles second hears our settlement after its outcome. As a receiver we settle first.
        second = self.role is Role.SENDER and self._link.remote_rcv_settle_mode == proton.Link.RCV_SECOND
        self._link.rcv_settle_mode = proton.Link.RCV_SECOND if second else proton.Link.RCV_FIRST
        self._set_limit(max_message_bytes)
        self._open()

    def refuse(self, condition: str, description: str = "") -> None:
        """Answer a peer's attach with no: an attach without the terminus asked for, then a detach (part 2.6.3)."""
        if not self._usable:
            return
        assert not self._opened
        set_terminus(self._link.source, self.source if self.role is Role.RECEIVER else None)
        set_terminus(self._link.target, self.target if self.role is Role.SENDER else None)
        self._open()
        self.close(condition, description)

    def close(self, condition: str | None = None, description: str = "", *, detach: bool = False) -> None:
        """Close the link, or only detach from a terminus that stays. LinkClosed comes with the peer's answer."""
        if not self.alive or self._closing:
            return
        self._closing = True
        self._opened = True
        self._link.condition = _condition(condition, description)
        if detach:
            self._link._update_cond()  # proton's close() does this by itself, its detach() does not
            self._link.detach()
        else:
            self._link.close()
        self._engine._produced()

    def _open(self) -> None:
        assert self._engine._opened_here, "a link before the connection's open"
        self._opened = True
        self._link.open()
        self._engine._produced()

    def _set_limit(self, max_message_bytes: int) -> None:
        if max_message_bytes:
            self._link.max_message_size = max_message_bytes

    def _gone(self) -> None:
        """Last moment before proton's objects may go."""
        self.alive = False


class Sender(_Link):
    """Our sending end. Messages are known by their seq; outcomes come in the order they were sent, unless told else."""

    __slots__ = (
        "_any_order",
        "_big_at",
        "_drain_asked",
        "_handed",
        "_handle",
        "_outcomes",
        "_queue",
        "_window",
        "presettled",
    )

    role = Role.SENDER

    def __init__(self, engine: Engine, session: Session, link: Any) -> None:
        super().__init__(engine, session, link)
        self._window: deque[tuple[int, raw.Pointer]] = deque()
        self._queue: deque[tuple[int, bytes]] = deque()  # behind, and with, a large message being fed
        self._big_at = 0
        self._handle: int | None = None
        self._handed = 0  # to proton, or given back as credit: the delivery-count, once proton has sent it all
        self._drain_asked = False  # by a flow that is not answered yet
        self._outcomes: list[Outcome] = []
        self.presettled = False
        self._any_order = False

    def any_order(self) -> None:
        """From now on outcomes come as the peer gives them, and one that lacks keeps no other back."""
        self._any_order = True
        self._engine._counting = True

    @property
    def credit(self) -> int:
        """How many messages the peer is ready to take."""
        if not self._usable:
            return 0
        return max(0, raw.credit(self._pointer) - len(self._queue) + (1 if self._big_at else 0))

    @property
    def capacity(self) -> int:
        """How many messages may be sent now: the credit, or 0 while the session has enough to send already."""
        if self._queue or not self._usable:
            return 0
        if raw.outgoing_bytes(self._pointer) >= OUTGOING_BYTES_MAX:
            return 0
        return max(0, raw.credit(self._pointer))

    @property
    def draining(self) -> bool:
        """The peer wants its credit used or given back: send what there is, then call drained(), once for each ask."""
        return self._drain_asked and self._usable

    @property
    def unsettled(self) -> int:
        """How many messages were sent whose outcome is not known yet."""
        return len(self._window) + len(self._queue) - (1 if self._big_at else 0)

    @property
    def oldest_unsettled(self) -> int | None:
        """The seq of the first message without an outcome."""
        if self._window:
            return self._window[0][0]
        return self._queue[0][0] if self._queue else None

    @property
    def feeding(self) -> bool:
        """Whether a message of send_part() is not all with proton yet: feed() goes on with it."""
        return bool(self._queue)

    def send_part(self, seq: int, body: bytes, bytes_max: int) -> int:
        """Send the beginning of a large message; feed() sends the rest, when and how much the caller likes."""
        if not self._usable:
            return 0
        assert self.capacity > 0, "sending beyond credit"
        self._queue.append((seq, body))
        return self.feed(bytes_max)

    def feed(self, bytes_max: int) -> int:
        """Go on with the message of send_part(), by at most bytes_max: by how much it was."""
        queue, pointer = self._queue, self._pointer
        if not self._usable or not queue:
            self._give_up()
            return 0
        if raw.outgoing_bytes(pointer) >= OUTGOING_BYTES_MAX:  # the peer's session takes no more
            return 0
        size = self._hand_part(bytes_max)
        self._engine._produced()
        return size

    def _hand_part(self, bytes_max: int) -> int:
        """Give proton the next piece of the large message at the head of the queue: how long it was."""
        pointer = self._pointer
        seq, body = self._queue[0]
        if not self._big_at:
            self._window.append((seq, raw.send_begin(pointer, seq)))
        size = min(bytes_max, len(body) - self._big_at)
        raw.send_chunk(pointer, body, self._big_at, size)
        self._big_at += size
        if self._big_at == len(body):
            raw.send_end(pointer)
            self._handed += 1
            self._big_at = 0
            self._queue.popleft()
            self._sent()
        return size

    def send(self, batch: Sequence[tuple[int, bytes]]) -> None:
        """Send (seq, message) pairs in this order, at most `capacity` of them.

        seq: 0 .. 2**64-1. None may be larger than peer_max_message_bytes, if that is set.
        """
        if not batch or not self._usable:
            return
        assert len(batch) <= self.credit, "sending beyond credit"
        if self._queue or max(len(body) for _, body in batch) > 2 * CHUNK_BYTES:
            self._queue.extend(batch)
            self._engine._feeding[self] = None
            self._feed()
        else:
            raw.send(self._pointer, batch, self._window)
            self._handed += len(batch)
            self._sent()
        self._engine._produced()

    def _feed(self) -> None:
        """Give proton as much of the queue as it can hold cheaply; a large message a chunk at a time."""
        queue, pointer = self._queue, self._pointer
        if not self._usable:
            self._give_up()
        while queue:
            seq, body = queue[0]
            held = raw.outgoing_bytes(pointer)
            if len(body) <= 2 * CHUNK_BYTES:
                if held >= OUTGOING_BYTES_MAX:
                    return
                raw.send(pointer, ((seq, body),), self._window)
                self._handed += 1
                queue.popleft()
                self._sent()
                continue
            if held >= CHUNK_BYTES:
                return
            self._hand_part(CHUNK_BYTES)

    def _give_up(self) -> None:
        """Nothing more can be sent: what was not all sent never will be."""
        self._queue.clear()
        self._big_at = 0

    def _sent(self) -> None:
        if not self.presettled:
            return
        window = self._window
        if window:
            for _, delivery in window:
                raw.settle(delivery)
            self._outcomes.append(Outcome(OutcomeKind.ACCEPTED, window[-1][0], len(window)))
            window.clear()
            self._engine._outcomes_ready(self)

    def drained(self) -> int:
        """Nothing more to send now: give the rest of the credit back, if any. Returns how much that was."""
        if not self.draining or self._queue:
            return 0
        # Below 0 where a flow crossed messages: pn_link_drained() would take that for a great many, and count back.
        given_back = raw.drained(self._pointer) if raw.credit(self._pointer) > 0 else 0
        self._handed += given_back
        self._drain_asked = not given_back and not self._tell_drained()
        self._engine._produced()
        return given_back

    def _tell_drained(self) -> bool:
        """Write the flow that proton does not: without credit left the peer waits for it all the same (part 2.6.7).

        It goes right behind a flow of the session that proton has just written, and says of the session what that says.
        Not possible while messages are held back by the session's window: then their end calls for another try.
        """
        engine = self._engine
        engine._take_ahead()
        if self._handle is None or raw.queued(self._pointer):
            return False
        raw.session_flow(self._pointer)
        for channel, code, fields in frames.links(engine._take_ahead()):
            if code == frames.FLOW and len(fields) == 4:
                link = [self._handle, self._handed & 0xFFFFFFFF, 0]
                engine._ahead.append(frames.drained(channel, [*fields, *link]))
                return True
        return False

    def _open(self) -> None:
        self._engine._take_ahead()
        super()._open()
        self._engine._unnamed = self
        self._engine._sends = True

    def take_outcomes(self) -> list[Outcome]:
        """What became known since the last call, in the order sent; a gap is never skipped, except after any_order().

        Then, what is one outcome for several messages is always about the oldest.
        """
        outcomes, self._outcomes = self._outcomes, []
        return outcomes

    def _collect(self, news: int | None = None) -> bool:
        """Walk what is settled of the window, `news` of it if that is known: whether there is anything new."""
        if not self._window:
            return False
        before = len(self._window)
        settled = raw.settled_heads(self._window)
        if self._any_order and (news is None or news > before - len(self._window)):
            settled += raw.settled_others(self._window)
        for state, seq, count, condition, description, failed, undeliverable in settled:
            kind = _OUTCOME_BY_STATE[state]
            self._outcomes.append(Outcome(kind, seq, count, condition, description, failed, undeliverable))
        if self._big_at and (not self._window or self._window[-1][0] != self._queue[0][0]):
            # A large message was settled before its end, rejected most likely: settling it also ended it.
            self._big_at = 0
            self._queue.popleft()
            self._handed += 1
        return bool(settled)

    def _gone(self) -> None:
        super()._gone()
        self._window.clear()
        self._give_up()


class Receiver(_Link):
    """Our receiving end. A message is known by its handle until it is settled, or the link is gone.

    whole_windows: grant credit only when all of it was used. RabbitMQ 3.10 takes a credit to begin at the last
    message it sent, whatever delivery-count comes with it, and so would send more than was granted.
    """

    __slots__ = (
        "_granted",
        "_next_handle",
        "_partial_bytes",
        "_parts",
        "_pending",
        "_presettled",
        "_received",
        "max_message_bytes",
        "whole_windows",
    )

    role = Role.RECEIVER

    def __init__(self, engine: Engine, session: Session, link: Any) -> None:
        super().__init__(engine, session, link)
        self._pending: dict[int, raw.Pointer] = {}
        self._parts: list[bytes] = []
        self._partial_bytes = 0
        self._next_handle = 0
        self._granted = 0
        self._received = 0
        self._presettled = frozenset[int]()  # of what was pending when the link went
        self.whole_windows = False
        self.max_message_bytes = MESSAGE_BYTES_MAX

    @property
    def unsettled(self) -> int:
        """How many messages were handed out and not settled yet."""
        return len(self._pending)

    @property
    def credit(self) -> int:
        """How many messages the peer may still send."""
        return self._granted - self._received if self.alive else 0

    def topup(self, count: int) -> None:
        """Let at most `count` messages be on their way or unsettled. Small steps are saved up to a quarter of it."""
        if not self._usable:
            return
        credit = self._granted - self._received
        missing = count - credit - len(self._pending)
        if self.whole_windows and credit:
            return
        if missing > 0 and (missing * 4 >= count or (credit == 0 and not self.whole_windows)):
            self._granted += missing
            raw.flow(self._pointer, missing)
            self._engine._produced()

    def accept(self, handles: Iterable[int]) -> None:
        """Accept and settle: only once the messages are safe."""
        take = self._pending.pop
        raw.accept([delivery for handle in handles if (delivery := take(handle, None)) is not None])
        self._engine._produced()

    def was_presettled(self, handle: int) -> bool:
        """Whether the peer has settled this message itself: then it hears no answer, and keeps nothing."""
        delivery = self._pending.get(handle)
        return raw.settled(delivery) if delivery is not None else handle in self._presettled

    def reject(self, handle: int, condition: str, description: str = "") -> None:
        """This message is wrong, do not send it again."""
        self._refuse(handle, raw.REJECTED, condition, description)

    def release(self, handle: int) -> None:
        """Not now, or not here: as if it had never been sent."""
        self._refuse(handle, raw.RELEASED)

    def modify(self, handle: int, *, delivery_failed: bool = True, undeliverable_here: bool = False) -> None:
        """Back to the peer, with a count of failures or a note not to send it here again."""
        self._refuse(handle, raw.MODIFIED, None, None, delivery_failed, undeliverable_here)

    def _refuse(
        self,
        handle: int,
        state: int,
        condition: str | None = None,
        description: str | None = None,
        failed: bool = False,
        undeliverable: bool = False,
    ) -> None:
        delivery = self._pending.pop(handle, None)
        if delivery is not None:
            raw.refuse(delivery, state, condition, description, failed, undeliverable)
            self._engine._produced()

    def _pull(self, events: list[Event]) -> None:
        if self._closing:
            raw.discard(self._pointer)
            return
        broken: tuple[str, str] | None = None
        try:
            pulled = raw.pull(self._pointer, self._parts, self.max_message_bytes)
        except raw.TooLarge as large:
            pulled = large.args[0]
            broken = MESSAGE_SIZE_EXCEEDED, f"a message is longer than {self.max_message_bytes} bytes"
        if self._parts or self._partial_bytes:
            self._engine._count_partial(self)
        if pulled:
            first = self._next_handle
            self._received += len(pulled)
            self._next_handle = after = first + len(pulled)
            if self._received > self._granted:
                broken = TRANSFER_LIMIT_EXCEEDED, "more messages than credit"
            else:
                self._pending.update(zip(range(first, after), [p for p, _ in pulled], strict=True))
                events.append(Deliveries(self, list(zip(range(first, after), [b for _, b in pulled], strict=True))))
        if broken is not None:
            self.close(*broken)
            raw.discard(self._pointer)
            events.append(LinkClosed(self, *broken))
            self._engine._reported.add(self)

    def _set_limit(self, max_message_bytes: int) -> None:
        self.max_message_bytes = max_message_bytes or MESSAGE_BYTES_MAX
        super()._set_limit(self.max_message_bytes)

    def _gone(self) -> None:
        super()._gone()
        self._presettled = frozenset(handle for handle, delivery in self._pending.items() if raw.settled(delivery))
        self._pending.clear()
        self._parts.clear()
        self._engine._count_partial(self)


# ------------------------------------------------------------------------------------------------ the connection


class Engine:
    """One connection. `on_output` is called whenever there may be something to send; a driver sets it."""

    def __init__(
        self,
        *,
        server: bool,
        container: str,
        hostname: str | None = None,
        sasl: SaslClient | SaslServer | None = None,
        idle_timeout_s: float = 0.0,
        max_frame_bytes: int = FRAME_BYTES_MAX,
        sessions_max: int = SESSIONS_MAX,
        links_max: int = LINKS_MAX,
        partial_bytes_max: int = PARTIAL_BYTES_MAX,
        properties: Mapping[str, Any] | None = None,
        offered_capabilities: Sequence[str] = (),
    ) -> None:
        self.server = server
        self.on_output: Callable[[], None] = lambda: None
        self.identity: str | None = None
        self.context: Any = None
        self.deadline = math.inf
        self._sasl = sasl
        self._layer_up = sasl is None
        self._header = bytearray()  # the peer's AMQP header until it is whole
        self._header_seen = False
        self._last_words = b""
        self._links_max = links_max
        self._sessions_max = sessions_max
        self._ending = 0  # sessions whose end is not written yet: until then they have their channel
        self._partial_bytes = 0
        self._partial_bytes_max = partial_bytes_max
        self._transport: Any = proton.Transport(proton.Transport.SERVER if server else proton.Transport.CLIENT)
        self._transport.max_frame_size = max_frame_bytes
        self._transport.channel_max = sessions_max - 1
        if idle_timeout_s:
            self._transport.idle_timeout = idle_timeout_s
        self._connection: Any = proton.Connection()
        self._connection.container = container
        if hostname:
            self._connection.hostname = hostname
        if properties:
            self._connection.properties = dict(properties)
        if offered_capabilities:
            self._connection.offered_capabilities = list(offered_capabilities)
        self._collector: Any = proton.Collector()
        self._connection.collect(self._collector)
        self._transport.bind(self._connection)
        self._links: dict[raw.Pointer, Sender | Receiver] = {}
        self._sessions: dict[raw.Pointer, Session] = {}
        self._reported: set[Sender | Receiver] = set()  # closed by us for cause, and said so already
        self._touched: dict[raw.Pointer, int] = {}
        self._flowed: set[raw.Pointer] = set()
        self._counting = False  # a sender takes outcomes in any order
        self._ahead: list[bytes] = []
        self._unnamed: Sender | None = None  # whose attach is not written yet
        self._sends = False  # one of the links is a sender, or was
        self._hearing = False  # what proton tells comes from the peer, not from what we send
        self._feeding: dict[Sender, None] = {}  # with a large message on its way
        self._events: list[Event] = []
        self._failed = False
        self._lost = False
        self._opened_here = False
        # proton forgets, silently, what is opened on a connection before the connection itself.
        self._when_open: list[Callable[[], None]] = []
        self._opened_there = False
        self._closed_here = False
        self._closed_there = False

    # -------- state

    @property
    def finished(self) -> bool:
        """Nothing more will come or go: the socket may be closed."""
        return self._lost or ((self._failed or (self._closed_here and self._closed_there)) and not self._waiting())

    @property
    def failed(self) -> bool:
        """The connection broke, by the peer's mistake or its silence; what it sends means nothing any more."""
        return self._failed

    @property
    def closing(self) -> bool:
        """Close was sent, or the connection broke: only the peer's close is still to come."""
        return self._lost or self._failed or self._closed_here

    @property
    def links(self) -> tuple[Sender | Receiver, ...]:
        return tuple(self._links.values())

    @property
    def sessions_left(self) -> int:
        """How many more sessions there are channels for, on both sides; known once the peer has opened."""
        channels = min(self._sessions_max, int(self._transport.remote_channel_max) + 1)
        return channels - len(self._sessions) - self._ending

    def _waiting(self) -> bool:
        if self._last_words or self._ahead or (self._sasl is not None and self._sasl.outbox):
            return True
        return self._layer_up and not self._lost and raw.pending(self._transport)

    # -------- connection

    def open(self) -> None:
        """Send our open: a client at once (it waits for SASL by itself), a server on the peer's Opened."""
        if self._opened_here or self.closing:
            return
        self._opened_here = True
        self._connection.open()
        waiting, self._when_open = self._when_open, []
        for act in waiting:
            act()
        self._produced()

    def close(self, condition: str | None = None, description: str = "") -> None:
        """Send our close; `finished` becomes true once the peer has sent its own."""
        if self.closing:
            return
        if not self._layer_up:
            self._failed = True  # there is nobody yet to say goodbye to
            self._produced()
            return
        self._closed_here = True
        self._connection.condition = _condition(condition, description)
        self._connection.close()
        self._produced()

    def refuse(self, condition: str, description: str, info: Mapping[str, str]) -> None:
        """Answer the peer's open with one that says that a close follows (JMS clients look for it). `info`: symbols."""
        if self._opened_here or self.closing:
            return
        self._connection.properties = {proton.symbol(FAILED_TO_OPEN): True}
        self.open()
        self._closed_here = True
        symbols = {proton.symbol(key): proton.symbol(value) for key, value in info.items()}
        self._connection.condition = _condition(condition, description, symbols)
        self._connection.close()
        self._produced()

    def session(self) -> Session:
        """Begin a session, after open(). A bad attach may end its whole session: important links get their own."""
        assert self._opened_here
        assert not self._lost
        session = self._connection.session()
        session.open()
        ours = self._sessions[session._impl] = Session(self, session)
        self._produced()
        return ours

    def sender(
        self,
        session: Session,
        name: str,
        target: Terminus,
        source: Terminus | None = None,
        *,
        settle_mode: SettleMode = SettleMode.UNSETTLED,
        max_message_bytes: int = 0,
        properties: Mapping[str, Any] | None = None,
    ) -> Sender:
        """Attach a sending link. LinkAttached or LinkClosed(refused) follows; messages may go once there is credit."""
        assert session.alive
        sender = Sender(self, session, session._session.sender(name))
        sender._link.snd_settle_mode = settle_mode.value
        sender.presettled = settle_mode is SettleMode.SETTLED
        self._attach(sender, source or Terminus(address=name), target, max_message_bytes, properties)
        return sender

    def receiver(
        self,
        session: Session,
        name: str,
        source: Terminus,
        target: Terminus | None = None,
        *,
        credit: int = 0,
        settle_mode: SettleMode = SettleMode.MIXED,
        max_message_bytes: int = MESSAGE_BYTES_MAX,
        properties: Mapping[str, Any] | None = None,
    ) -> Receiver:
        """Attach a receiving link with this credit at once. LinkAttached or LinkClosed(refused) follows."""
        assert session.alive
        receiver = Receiver(self, session, session._session.receiver(name))
        receiver._link.snd_settle_mode = settle_mode.value
        self._attach(receiver, source, target or Terminus(address=name), max_message_bytes, properties)
        receiver.topup(credit)
        return receiver

    def _attach(
        self,
        link: Sender | Receiver,
        source: Terminus,
        target: Terminus,
        max_message_bytes: int,
        properties: Mapping[str, Any] | None,
    ) -> None:
        set_terminus(link._link.source, source)
        set_terminus(link._link.target, target)
        link._link.rcv_settle_mode = proton.Link.RCV_FIRST
        if properties:
            link._link.properties = dict(properties)
        link._set_limit(max_message_bytes)
        self._add_link(link)
        link._open()

    def _add_link(self, link: Sender | Receiver) -> None:
        self._links[link._pointer] = link
        link.session._links.append(link)

    # -------- bytes and time

    def receive(self, data: bytes, now: float) -> list[Event]:
        """Take bytes from the peer at the time `now` (seconds, any monotonic clock): what they meant."""
        if self._failed or self._lost:
            return self.take_events()
        if not self._layer_up:
            data = self._recv_sasl(data)
        if data and self._layer_up and not self._header_seen:
            data = self._recv_header(data)
        if data and not self._failed:
            if self._unnamed is not None:
                self._take_ahead()
            if self.server and self._sends and not self._ahead and frames.FLOW_MARK in data:
                self._run_ahead()
            self._drain(None)
            self._hearing = True
            raw.push(self._transport, data)
            self._drain(now)
            self._hearing = False
            if not self._failed and not self._closed_there and not raw.listening(self._transport):
                # At a frame whose performative it cannot read, proton stops listening and tells nobody.
                self._fail(FRAMING_ERROR, "malformed frame")
        return self.take_events()

    def authenticated(self, granted: bool, now: float, refusal: Refusal = Refusal.AUTH) -> list[Event]:
        """What has become of a password that could not be judged at once (see SaslServer): what follows from it."""
        assert isinstance(self._sasl, SaslServer)
        if self._failed or self._lost or not self._sasl.waiting:
            return []
        self._sasl.answer(granted, refusal)
        return self.receive(b"", now)

    def take_events(self) -> list[Event]:
        """What happened outside receive(): in tick(), or while sending."""
        events, self._events = self._events, []
        return events

    def data_to_send(self, limit_bytes: int = OUTPUT_BYTES) -> bytes:
        """Bytes for the peer, about limit_bytes at most; b"" when there are none. Call until then, or paused."""
        pieces: list[bytes] = []
        if self._sasl is not None:
            pieces.append(self._sasl.take_output())
        if self._last_words:
            pieces.append(self._last_words)
            self._last_words = b""
        if self._layer_up and not self._lost:
            for sender in tuple(self._feeding):
                sender._feed()
                if not sender._queue:
                    self._feeding.pop(sender, None)
            if self._unnamed is not None:
                self._take_ahead()
            pieces += self._ahead
            limit_bytes -= sum(map(len, self._ahead))
            self._ahead = []
            pieces += raw.output(self._transport, limit_bytes)
            self._drain(None)
            self._ending = 0
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def tick(self, now: float) -> float:
        """Let idle-timeouts act: when to call this again, on the same clock; infinity if never. See take_events().

        receive() calls this too, once the peer's idle-timeout is known: look at `deadline` after it.
        """
        self.deadline = math.inf
        if not self._lost and not self._failed and self._layer_up:
            # +1: proton takes the time 0 for no time at all.
            deadline_ms = raw.tick(self._transport, int(now * 1000) + 1)
            self._drain(None)
            if deadline_ms and not self._failed:
                self.deadline = (deadline_ms - 1) / 1000
        return self.deadline

    def lost(self) -> None:
        """The line is gone. All links and handles are dead; later calls do nothing."""
        if self._lost:
            return
        self._lost = True
        for link in self._links.values():
            link._gone()
        for session in self._sessions.values():
            session.alive = False
            session._links.clear()
        self._when_open.clear()
        self._links.clear()
        self._sessions.clear()
        self._touched.clear()
        self._feeding.clear()
        self._reported.clear()
        self._ahead.clear()
        self.on_output = lambda: None
        # In this order nothing of proton's keeps anything else of it alive.
        self._transport.unbind()
        self._collector.release()

    # -------- within

    def _take_ahead(self) -> bytes:
        """All that proton has to send, to which frames may be added then: it ends where a frame does.

        The handle of a link of ours, which proton does not tell, is in the attach that goes out.
        """
        if not self._layer_up or self._lost:
            return b""
        taken = b"".join(raw.output(self._transport, sys.maxsize))
        self._ahead.append(taken)
        if self._unnamed is not None:
            for _, code, fields in frames.links(taken):
                if code == frames.ATTACH and (fields[0], bool(fields[2])) == (self._unnamed.name, False):
                    self._unnamed._handle = int(fields[1])
            self._unnamed = None
        return taken

    def _run_ahead(self) -> None:
        """Before a flow is heard: one that takes credit back would hold in proton what was sent within it.

        Not at a hub, which has no reason to take credit back: there a large message must not run ahead of an alarm.
        """
        self._ahead = raw.output(self._transport, AHEAD_BYTES_MAX)
        held = sum(map(len, self._ahead))
        for sender in self._feeding:
            while sender.feeding and held < AHEAD_BYTES_MAX:
                sender._feed()
                taken = raw.output(self._transport, AHEAD_BYTES_MAX)
                if not taken:
                    break
                held += sum(map(len, taken))
                self._ahead += taken

    def _produced(self) -> None:
        self.on_output()

    def _outcomes_ready(self, sender: Sender) -> None:
        event = Settled(sender)
        if not self._events or self._events[-1] != event:
            self._events.append(event)

    @property
    def partial_bytes(self) -> int:
        """Of messages that have not ended yet."""
        return self._partial_bytes

    def _count_partial(self, receiver: Receiver) -> None:
        """A peer may begin a large message on every link and finish none: together they are bounded, too."""
        held = sum(map(len, receiver._parts))
        self._partial_bytes += held - receiver._partial_bytes
        receiver._partial_bytes = held
        if self._partial_bytes > self._partial_bytes_max:
            self._fail(RESOURCE_LIMIT_EXCEEDED, f"more than {self._partial_bytes_max} bytes of messages without an end")

    def _fail(self, condition: str, description: str, *, auth: bool = False) -> None:
        if self._failed:
            return
        self._failed = True
        self._events.append(Failed(condition, description, auth))
        if self._layer_up and not self._closed_here:
            self._closed_here = True
            self._connection.condition = _condition(condition, description)
            self._connection.close()
        self._produced()

    def _recv_sasl(self, data: bytes) -> bytes:
        sasl = self._sasl
        assert sasl is not None
        sasl.feed(data)
        if sasl.error is not None:
            self._fail(UNAUTHORIZED if sasl.error.auth else FRAMING_ERROR, str(sasl.error), auth=sasl.error.auth)
            return b""
        if not sasl.done:
            self._produced()
            return b""
        self._layer_up = True
        self.identity = sasl.identity
        self._events.append(Authenticated(sasl.identity, sasl.mechanism))
        self._produced()
        return sasl.rest

    def _recv_header(self, data: bytes) -> bytes:
        """Only plain AMQP may follow (part 2.2); proton alone would begin a SASL layer of its own here."""
        self._header += data
        head = bytes(self._header[:HEADER_BYTES])
        if not AMQP_HEADER.startswith(head):
            if self.server:
                # Part 2.2: answer with the header we do speak, then close. proton would say nothing.
                self._layer_up = False
                self._last_words = AMQP_HEADER
            self._fail(FRAMING_ERROR, f"the peer sent {head!r} where the AMQP header belongs")
            return b""
        if len(head) < HEADER_BYTES:
            return b""
        self._header_seen = True
        whole, self._header = bytes(self._header), bytearray()
        return whole

    def _drain(self, now: float | None) -> None:
        """Turn proton's events into ours."""
        while not self._lost:
            control = raw.next_control(self._collector, self._touched, self._flowed, self._counting)
            if self._touched:
                self._resolve()
            if control is None:
                return
            try:
                self._control(*control, now)
            except _PEER_DATA_ERRORS as bad:
                self._fail(DECODE_ERROR, f"the peer sent what cannot be read: {bad}")

    def _resolve(self) -> None:
        touched, self._touched = self._touched, {}
        flowed, self._flowed = self._flowed, set()
        for pointer, news in touched.items():
            link = self._links.get(pointer)
            if link is None:
                continue
            if type(link) is Receiver:
                link._pull(self._events)
            elif type(link) is Sender:
                if self._hearing and pointer in flowed:
                    link._drain_asked = raw.draining(pointer)
                if link._collect(news):
                    self._outcomes_ready(link)
                if link.capacity > 0 or link.draining or link.feeding:
                    self._events.append(Credit(link))

    def _control(self, kind: int, about: raw.Pointer, now: float | None) -> None:
        if not self._opened_there and kind in raw.EVENTS_AFTER_OPEN:
            self._fail(NOT_ALLOWED, "the peer went on without an open")  # part 2.4.1; proton lets it
            return
        if kind == raw.EVENT_CONNECTION_REMOTE_OPEN:
            self._remote_open(now)
        elif kind == raw.EVENT_CONNECTION_REMOTE_CLOSE:
            self._remote_close()
        elif kind == raw.EVENT_TRANSPORT_ERROR:
            condition, description = raw.transport_condition(self._transport)
            self._closed_here = True  # proton writes that close by itself
            self._fail(condition or FRAMING_ERROR, description or "transport error")
        elif kind == raw.EVENT_SESSION_REMOTE_OPEN:
            self._remote_begin(about)
        elif kind == raw.EVENT_SESSION_REMOTE_CLOSE:
            self._remote_end(about)
        elif kind == raw.EVENT_LINK_REMOTE_OPEN:
            self._remote_attach(about)
        else:
            self._remote_detach(about, detached=kind == raw.EVENT_LINK_REMOTE_DETACH)

    def _remote_open(self, now: float | None) -> None:
        self._opened_there = True
        connection = self._connection
        properties = connection.remote_properties
        self._events.append(
            Opened(
                container=connection.remote_container or "",
                hostname=connection.remote_hostname,
                max_frame_bytes=self._transport.remote_max_frame_size,
                idle_timeout_s=self._transport.remote_idle_timeout,
                capabilities=_symbols(connection.remote_offered_capabilities),
                desired=_symbols(connection.remote_desired_capabilities),
                properties={str(k): v for k, v in properties.items()} if isinstance(properties, dict) else {},
            )
        )
        if now is not None:
            self.tick(now)  # only now the peer's idle-timeout is known

    def _remote_close(self) -> None:
        self._closed_there = True
        told = raw.connection_condition(self._connection)
        self._events.append(RemoteClosed(*_explained(*told, self._connection)))
        if not self._closed_here:
            self._closed_here = True
            self._connection.close()
            self._produced()

    def _remote_begin(self, pointer: raw.Pointer) -> None:
        if pointer in self._sessions:
            return
        if len(self._sessions) + self._ending >= self._sessions_max:
            # With no channel left for its answer proton gives up all output, and tells nobody.
            self._fail(RESOURCE_LIMIT_EXCEEDED, f"more than {self._sessions_max} sessions, with those not yet answered")
            return
        wrap: Any = proton.Session.wrap
        session = wrap(pointer)
        self._sessions[pointer] = Session(self, session)
        self._once_open(session.open)

    def _once_open(self, act: Callable[[], None]) -> None:
        if self.closing:
            return
        if self._opened_here:
            act()
            self._produced()
        else:
            self._when_open.append(act)

    def _remote_end(self, pointer: raw.Pointer) -> None:
        session = self._sessions.get(pointer)
        if session is None:
            return
        condition, description = raw.session_condition(pointer)
        for link in tuple(session._links):
            # The termini outlive their session where their expiry policy says so.
            self._drop_link(link, condition, description, detached=True)
        self._drop_session(session)
        self._ending += 1
        session._session.close()
        session._session.free()
        self._events.append(SessionClosed(session, condition, description))
        self._produced()

    def _drop_session(self, session: Session) -> None:
        for link in tuple(session._links):
            self._drop_link(link, None, None, detached=False, silent=True)
        session.alive = False
        self._sessions.pop(session._session._impl, None)

    def _remote_attach(self, pointer: raw.Pointer) -> None:
        link = self._links.get(pointer)
        by_peer = link is None
        if link is None:
            link = self._remote_link(pointer)
            if link is None:
                return
        link.source = terminus(link._link.remote_source)
        link.target = terminus(link._link.remote_target)
        own_end = link.source if link.role is Role.RECEIVER else link.target
        if by_peer:
            if link.target is not None and link.target.coordinator:
                self._reported.add(link)
                self._once_open(partial(link.refuse, NOT_IMPLEMENTED, "no transactions"))
                return
        elif own_end is None:
            link.refused = True  # part 2.6.3: the detach with the reason follows
            return
        if isinstance(link, Sender):
            link.presettled = link._link.remote_snd_settle_mode == proton.Link.SND_SETTLED or (
                not by_peer and link.presettled
            )
        self._events.append(LinkAttached(link, by_peer, link.name, link.role, link.source, link.target))

    def _remote_link(self, pointer: raw.Pointer) -> Sender | Receiver | None:
        wrap: Any = proton.Link.wrap
        theirs = wrap(pointer)
        session = self._sessions.get(theirs.session._impl)
        if session is None:
            return None
        if len(self._links) >= self._links_max:
            self._fail(RESOURCE_LIMIT_EXCEEDED, f"more than {self._links_max} links")
            return None
        link = Sender(self, session, theirs) if theirs.is_sender else Receiver(self, session, theirs)
        self._add_link(link)
        return link

    def _remote_detach(self, pointer: raw.Pointer, detached: bool) -> None:
        link = self._links.get(pointer)
        if link is None:
            return
        condition, description = _explained(*raw.link_condition(pointer), link._link)
        if not link._closing:
            link._closing = True
            if detached:
                link._link.detach()
            else:
                link._link.condition = None
                link._link.close()
            self._produced()
        self._drop_link(link, condition, description, detached=detached)

    def _drop_link(
        self,
        link: Sender | Receiver,
        condition: str | None,
        description: str | None,
        *,
        detached: bool,
        silent: bool = False,
    ) -> None:
        """Take the last outcomes, forget every C pointer of the link, then let proton free it."""
        if isinstance(link, Sender) and link._collect() and not silent:
            self._outcomes_ready(link)
        link._gone()
        self._links.pop(link._pointer, None)
        if link in link.session._links:
            link.session._links.remove(link)
        if link in self._reported:
            self._reported.discard(link)
        elif not silent:
            self._events.append(LinkClosed(link, condition, description, detached, link.refused))
        link._link.free()
