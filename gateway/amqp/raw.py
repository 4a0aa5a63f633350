"""The few hot calls into proton's C library; no other module touches `cproton_ffi`.

Loops over the binding's raw functions, because proton's Python objects cost ten times as much a message. Takes
proton's own Python objects or raw pointers, gives plain values and raw pointers. Knows nothing of what they mean.

Duties of the caller, as C forgives nothing: a delivery pointer is dead once settled or once its link is freed; a
link or session pointer is dead once freed; nothing here may be called after that. engine.py keeps these rules.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

from cproton_ffi import ffi, lib

Pointer = Any  # an opaque C pointer: may be compared, hashed, and handed back

# An event or a delivery's state as proton numbers them.
EVENT_CONNECTION_REMOTE_OPEN: int = lib.PN_CONNECTION_REMOTE_OPEN
EVENT_CONNECTION_REMOTE_CLOSE: int = lib.PN_CONNECTION_REMOTE_CLOSE
EVENT_SESSION_REMOTE_OPEN: int = lib.PN_SESSION_REMOTE_OPEN
EVENT_SESSION_REMOTE_CLOSE: int = lib.PN_SESSION_REMOTE_CLOSE
EVENT_LINK_REMOTE_OPEN: int = lib.PN_LINK_REMOTE_OPEN
EVENT_LINK_REMOTE_CLOSE: int = lib.PN_LINK_REMOTE_CLOSE
EVENT_LINK_REMOTE_DETACH: int = lib.PN_LINK_REMOTE_DETACH
EVENT_TRANSPORT_ERROR: int = lib.PN_TRANSPORT_ERROR
_DELIVERY: int = lib.PN_DELIVERY
_LINK_FLOW: int = lib.PN_LINK_FLOW

# The rare events, and how to find what they are about.
_CONTEXT_OF: dict[int, Callable[[Pointer], Pointer]] = {
    EVENT_CONNECTION_REMOTE_OPEN: lib.pn_event_connection,
    EVENT_CONNECTION_REMOTE_CLOSE: lib.pn_event_connection,
    EVENT_SESSION_REMOTE_OPEN: lib.pn_event_session,
    EVENT_SESSION_REMOTE_CLOSE: lib.pn_event_session,
    EVENT_LINK_REMOTE_OPEN: lib.pn_event_link,
    EVENT_LINK_REMOTE_CLOSE: lib.pn_event_link,
    EVENT_LINK_REMOTE_DETACH: lib.pn_event_link,
    EVENT_TRANSPORT_ERROR: lib.pn_event_transport,
}

EVENTS_AFTER_OPEN = frozenset(
    (EVENT_SESSION_REMOTE_OPEN, EVENT_SESSION_REMOTE_CLOSE, EVENT_LINK_REMOTE_OPEN, EVENT_LINK_REMOTE_CLOSE)
)

ACCEPTED: int = lib.PN_ACCEPTED
REJECTED: int = lib.PN_REJECTED
RELEASED: int = lib.PN_RELEASED
MODIFIED: int = lib.PN_MODIFIED

_BUFFER_BYTES = 1 << 16

_NULL = ffi.NULL


class _Scratch(threading.local):
    """Buffers that C copies into, one set a thread: zeroing new ones at each call would cost more than the call."""

    def __init__(self) -> None:
        self.buffer = ffi.new("char[]", _BUFFER_BYTES)
        self.view = ffi.buffer(self.buffer)
        self.tag_number = ffi.new("uint64_t *")
        self.tag = ffi.new("pn_bytes_t *")
        self.tag.size = 8
        self.tag.start = ffi.cast("char *", self.tag_number)


_scratch = _Scratch()


def _text(chars: Any) -> str | None:
    return None if chars == _NULL else ffi.string(chars).decode("utf-8", "replace")


# ------------------------------------------------------------------------------------------------ transport


def push(transport: Any, data: bytes) -> int:
    """Hand bytes from the peer to the transport: how many it took (fewer only after an error or the peer's end)."""
    impl = transport._impl
    size = len(data)
    capacity = lib.pn_transport_capacity(impl)
    if capacity >= size:
        taken: int = lib.pn_transport_push(impl, data, size)
        return taken
    whole = ffi.from_buffer(data)
    at = 0
    while at < size and capacity > 0:
        taken = lib.pn_transport_push(impl, whole + at, min(capacity, size - at))
        if taken <= 0:
            break
        at += taken
        capacity = lib.pn_transport_capacity(impl)
    return at


def listening(transport: Any) -> bool:
    """Whether the transport will take more bytes, ever."""
    return bool(lib.pn_transport_capacity(transport._impl) >= 0)


def output(transport: Any, limit_bytes: int) -> list[bytes]:
    """Take bytes for the peer, about limit_bytes at most, in pieces."""
    impl = transport._impl
    pending, peek, pop = lib.pn_transport_pending, lib.pn_transport_peek, lib.pn_transport_pop
    buffer, view = _scratch.buffer, _scratch.view
    pieces: list[bytes] = []
    while limit_bytes > 0:
        size = pending(impl)
        if size <= 0:
            break
        if size > _BUFFER_BYTES:
            size = _BUFFER_BYTES
        size = peek(impl, buffer, size)
        if size <= 0:
            break
        pieces.append(view[:size])
        pop(impl, size)
        limit_bytes -= size
    return pieces


def pending(transport: Any) -> bool:
    """Whether output() would give something."""
    return bool(lib.pn_transport_pending(transport._impl) > 0)


Told = tuple[str | None, str | None]  # condition and description


def _condition(condition: Pointer) -> Told:
    if not lib.pn_condition_is_set(condition):
        return None, None
    return _text(lib.pn_condition_get_name(condition)), _text(lib.pn_condition_get_description(condition))


def transport_condition(transport: Any) -> Told:
    return _condition(lib.pn_transport_condition(transport._impl))


def connection_condition(connection: Any) -> Told:
    return _condition(lib.pn_connection_remote_condition(connection._impl))


def session_condition(session: Pointer) -> Told:
    return _condition(lib.pn_session_remote_condition(session))


def link_condition(link: Pointer) -> Told:
    return _condition(lib.pn_link_remote_condition(link))


def tick(transport: Any, now_ms: int) -> int:
    """Let the transport see the time: the time of its next deadline in ms, 0 if it has none."""
    deadline: int = lib.pn_transport_tick(transport._impl, now_ms)
    return deadline


# ------------------------------------------------------------------------------------------------ events


def next_control(
    collector: Any, touched: dict[Pointer, int], flowed: set[Pointer], counting: bool
) -> tuple[int, Pointer] | None:
    """Take events up to and with the next rare one: (its type, the link or session it is about); None at the end.

    Links with deliveries or credit are only put into `touched`, in this order, once however many events they had;
    `counting`: with how many deliveries had news. Those with credit among them are put into `flowed`, too.
    """
    impl = collector._impl
    peek, pop, event_type = lib.pn_collector_peek, lib.pn_collector_pop, lib.pn_event_type
    event_link = lib.pn_event_link
    while event := peek(impl):
        kind = event_type(event)
        if kind == _DELIVERY:
            link = event_link(event)
            touched[link] = touched.get(link, 0) + 1 if counting else 0
        elif kind == _LINK_FLOW:
            link = event_link(event)
            touched.setdefault(link, 0)
            flowed.add(link)
        elif kind in _CONTEXT_OF:
            about = _CONTEXT_OF[kind](event)
            pop(impl)
            return kind, about
        pop(impl)
    return None


# ------------------------------------------------------------------------------------------------ sending


def credit(link: Pointer) -> int:
    value: int = lib.pn_link_credit(link)
    return value


def draining(link: Pointer) -> bool:
    return bool(lib.pn_link_get_drain(link))


def drained(link: Pointer) -> int:
    """Give a draining peer the rest of its credit back, with a flow that says so: how much. Without any, nothing."""
    value: int = lib.pn_link_drained(link)
    return value


def queued(link: Pointer) -> int:
    """How many messages the transport has not taken yet."""
    value: int = lib.pn_link_queued(link)
    return value


def session_flow(link: Pointer) -> None:
    """Have a flow of the link's session written: proton does so whenever its capacity is set, be it to what it is."""
    session = lib.pn_link_session(link)
    lib.pn_session_set_incoming_capacity(session, lib.pn_session_get_incoming_capacity(session))


def outgoing_bytes(link: Pointer) -> int:
    """Bytes the link's session holds that the transport has not taken yet."""
    value: int = lib.pn_session_outgoing_bytes(lib.pn_link_session(link))
    return value


def send(link: Pointer, batch: Iterable[tuple[int, bytes]], window: deque[tuple[int, Pointer]]) -> None:
    """Start and finish one delivery a message; the pointers go to the end of `window`."""
    make, put, advance = lib.pn_delivery, lib.pn_link_send, lib.pn_link_advance
    append = window.append
    number = _scratch.tag_number
    tag = _scratch.tag[0]
    for seq, body in batch:
        number[0] = seq
        delivery = make(link, tag)
        put(link, body, len(body))
        advance(link)
        append((seq, delivery))


def send_begin(link: Pointer, seq: int) -> Pointer:
    """Start a delivery that send_chunk() fills."""
    _scratch.tag_number[0] = seq
    return lib.pn_delivery(link, _scratch.tag[0])


def send_chunk(link: Pointer, body: bytes, at: int, size: int) -> None:
    lib.pn_link_send(link, ffi.from_buffer(body) + at, size)


def send_end(link: Pointer) -> None:
    lib.pn_link_advance(link)


Settlement = tuple[int, int, int, str | None, str | None, bool, bool]


def settled_heads(window: deque[tuple[int, Pointer]]) -> list[Settlement]:
    """Settle, from the oldest on, every delivery whose fate is known, and take it out of `window`.

    Gives (state, seq, count, condition, description, failed, undeliverable); accepted ones that follow each other
    are one entry with the last seq and their count. State 0: settled without an outcome that AMQP defines.
    """
    state_of, settle, popleft = lib.pn_delivery_remote_state, lib.pn_delivery_settle, window.popleft
    runs: list[Settlement] = []
    count = last = 0
    while window:
        seq, delivery = window[0]
        state = state_of(delivery)
        if state == ACCEPTED:
            popleft()
            settle(delivery)
            last = seq
            count += 1
            continue
        if state not in (REJECTED, RELEASED, MODIFIED):
            if not lib.pn_delivery_settled(delivery):
                break
            state = 0
        if count:
            runs.append((ACCEPTED, last, count, None, None, False, False))
            count = 0
        popleft()
        runs.append(_outcome(state, seq, delivery))
        settle(delivery)
    if count:
        runs.append((ACCEPTED, last, count, None, None, False, False))
    return runs


def settled_others(window: deque[tuple[int, Pointer]]) -> list[Settlement]:
    """The same for every delivery, wherever it stands in `window`: one entry each, in the order sent."""
    state_of, updated = lib.pn_delivery_remote_state, lib.pn_delivery_updated
    known: list[tuple[int, Settlement]] = []
    for at, (seq, delivery) in enumerate(window):
        if not updated(delivery):
            continue
        state = state_of(delivery)
        if state not in (ACCEPTED, REJECTED, RELEASED, MODIFIED):
            if not lib.pn_delivery_settled(delivery):
                continue
            state = 0
        known.append((at, _outcome(state, seq, delivery)))
    for at, _ in reversed(known):
        lib.pn_delivery_settle(window[at][1])
        del window[at]
    return [each for _, each in known]


def _outcome(state: int, seq: int, delivery: Pointer) -> Settlement:
    remote = lib.pn_delivery_remote(delivery)
    condition = description = None
    if state == REJECTED:
        condition, description = _condition(lib.pn_disposition_condition(remote))
    failed = undeliverable = False
    if state == MODIFIED:
        failed = bool(lib.pn_disposition_is_failed(remote))
        undeliverable = bool(lib.pn_disposition_is_undeliverable(remote))
    return state, seq, 1, condition, description, failed, undeliverable


def settled(delivery: Pointer) -> bool:
    return bool(lib.pn_delivery_settled(delivery))


def settle(delivery: Pointer) -> None:
    lib.pn_delivery_settle(delivery)


# ------------------------------------------------------------------------------------------------ receiving


class TooLarge(Exception):
    """A message grew past the limit before its end."""


def pull(link: Pointer, parts: list[bytes], limit_bytes: int) -> list[tuple[Pointer, bytes]]:
    """Every whole message that has arrived, oldest first. `parts` keeps the beginning of the last one meanwhile.

    Raises TooLarge at a message longer than limit_bytes; the whole ones before it are in its argument.
    """
    current, recv, advance = lib.pn_link_current, lib.pn_link_recv, lib.pn_link_advance
    partial, aborted = lib.pn_delivery_partial, lib.pn_delivery_aborted
    buffer, view = _scratch.buffer, _scratch.view
    batch: list[tuple[Pointer, bytes]] = []
    while delivery := current(link):
        size = recv(link, buffer, _BUFFER_BYTES)
        if 0 < size < _BUFFER_BYTES and not parts and not partial(delivery):  # the usual case
            if size > limit_bytes:
                raise TooLarge(batch)
            advance(link)
            batch.append((delivery, view[:size]))
            continue
        total = sum(map(len, parts))
        while size > 0:
            total += size
            if total > limit_bytes:
                parts.clear()
                raise TooLarge(batch)
            parts.append(view[:size])
            size = recv(link, buffer, _BUFFER_BYTES)
        if aborted(delivery):
            parts.clear()
            lib.pn_delivery_settle(delivery)  # this also advances
        elif partial(delivery):
            if len(parts) > 64:
                parts[:] = [b"".join(parts)]
            break
        else:
            advance(link)
            batch.append((delivery, b"".join(parts)))
            parts.clear()
    return batch


def discard(link: Pointer) -> None:
    """Throw away whatever has arrived on a link that we have closed."""
    while delivery := lib.pn_link_current(link):
        lib.pn_delivery_settle(delivery)


def flow(link: Pointer, count: int) -> None:
    lib.pn_link_flow(link, count)


def accept(deliveries: Iterable[Pointer]) -> None:
    """Accept and settle each."""
    update, done = lib.pn_delivery_update, lib.pn_delivery_settle
    for delivery in deliveries:
        update(delivery, ACCEPTED)
        done(delivery)


def refuse(
    delivery: Pointer,
    state: int,
    condition: str | None = None,
    description: str | None = None,
    failed: bool = False,
    undeliverable: bool = False,
) -> None:
    """Settle one delivery as REJECTED, RELEASED or MODIFIED."""
    local = lib.pn_delivery_local(delivery)
    if state == REJECTED and condition:
        told = lib.pn_disposition_condition(local)
        lib.pn_condition_set_name(told, condition.encode())
        if description:
            lib.pn_condition_set_description(told, description.encode())
    if state == MODIFIED:
        lib.pn_disposition_set_failed(local, failed)
        lib.pn_disposition_set_undeliverable(local, undeliverable)
    lib.pn_delivery_update(delivery, state)
    lib.pn_delivery_settle(delivery)
