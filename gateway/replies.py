"""Request and reply across the line: which request a hub's reply answers, and where that reply goes on this side.

A hub's apps know addresses and an MQTT app knows topics. So a request leaves with the address of an inbound stream as
its reply-to and its own message-id as correlation-id, and the journal remembers what the requester had written there,
in the commit that holds the request. Responders answer with the request's correlation-id or, as in JMS, with its
message-id: both name the same request, and correlation data that two apps happen to share mix nothing up.

The other way, a request of a hub's app has its reply-to turned into a topic that names it.

Knows no socket and no session. Times are microseconds on the journal's age clock.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import unquote

from gateway.amqp.message import ANNOTATION_REQUEST, Message, answer_to
from storeforward.errors import JournalFull
from storeforward.journal import Journal
from storeforward.sealed_tables import open_request, seal_request
from storeforward.streams import Stream

log = logging.getLogger("lineside.replies")

OPEN_MAX = 10_000
OPEN_BYTES_MAX = 8 << 20
REQUEST_BYTES = 300  # what remembering one costs beside its texts


@dataclass(frozen=True, slots=True)
class Request:
    """`inbound`: the stream its reply comes in on; `stream`, `seq`: where it stands itself, for the ledger."""

    message_id: str
    inbound: str
    response_topic: str
    correlation: bytes | None
    expires_age_us: int
    answered: bool = False

    @property
    def cost_bytes(self) -> int:
        return REQUEST_BYTES + len(self.response_topic.encode()) + len(self.correlation or b"")


class Requests:
    """What may still be answered. Bounded in number and bytes: what was answered goes first, then the oldest.

    An answered one stays until it expires or its room is needed: a responder may answer in several messages.
    """

    def __init__(self, journal: Journal, open_max: int = OPEN_MAX, bytes_max: int = OPEN_BYTES_MAX) -> None:
        self._journal = journal
        self._open_max = open_max
        self._bytes_max = bytes_max
        self._bytes = 0
        # Each in the order asked.
        self._open: dict[str, Request] = {}
        self._answered: dict[str, Request] = {}
        for message_id, inbound, topic, correlation, expires, answered in journal.query(
            "SELECT message_id, inbound, response_topic, correlation, expires_age_us, answered FROM request ORDER BY n"
        ):
            try:
                topic, correlation = open_request(journal.seal, message_id, topic, correlation)
            except ValueError:
                journal.lose(*_place_of(message_id), "corrupt", 0, "a request that waits for its reply")
                journal.execute("DELETE FROM request WHERE message_id = ?", (message_id,))
                continue
            self._add(Request(message_id, inbound, topic, correlation, expires, bool(answered)))
        self._make_room()

    def __len__(self) -> int:
        return len(self._open) + len(self._answered)

    def _add(self, request: Request) -> None:
        (self._answered if request.answered else self._open)[request.message_id] = request
        self._bytes += request.cost_bytes

    def _drop(self, message_id: str) -> Request | None:
        request = self._open.pop(message_id, None) or self._answered.pop(message_id, None)
        if request is not None:
            self._bytes -= request.cost_bytes
        return request

    def open(self, request: Request) -> None:
        """Remember a request that is staged in the pending batch: both are durable, or neither."""
        topic, correlation = seal_request(
            self._journal.seal, request.message_id, request.response_topic, request.correlation
        )
        self._journal.execute_with_rows(
            "INSERT INTO request (message_id, inbound, response_topic, correlation, expires_age_us) "
            "VALUES (?, ?, ?, ?, ?)",
            (
                request.message_id,
                request.inbound,
                topic,
                correlation,
                request.expires_age_us,
            ),
        )
        self._add(request)
        self._journal.wait(self, request.message_id)
        self._make_room()

    def _make_room(self) -> None:
        while len(self) > self._open_max or self._bytes > self._bytes_max:
            forgotten = self._drop(next(iter(self._answered or self._open)))
            assert forgotten is not None
            # With the rows: it may be the same batch that holds its INSERT.
            self._journal.execute_with_rows("DELETE FROM request WHERE message_id = ?", (forgotten.message_id,))
            if not forgotten.answered:
                log.warning("request forgotten: too many are open", extra={"message_id": forgotten.message_id})
                stream, seq = _place_of(forgotten.message_id)
                self._journal.lose(
                    stream, seq, "request-forgotten", 0, self._journal.in_ledger(forgotten.response_topic)
                )

    def find(self, inbound: str, message: Message, age_us: int) -> Request | None:
        """The request that a message received on this stream answers; None if there is none, or none any more."""
        name = message.correlation_id
        if isinstance(name, bytes):
            name = name.decode("utf-8", "replace")  # a request's name is ASCII or UTF-8; what is not names none
        if not isinstance(name, str):
            return None
        request = self._open.get(name) or self._answered.get(name)
        if request is None or request.inbound != inbound or request.expires_age_us <= age_us:
            return None
        return request

    def answered(self, request: Request) -> None:
        """Its reply is staged in the pending batch."""
        if not request.answered and self._drop(request.message_id) is not None:
            self._add(replace(request, answered=True))
            self._journal.execute_with_rows(
                "UPDATE request SET answered = 1 WHERE message_id = ?", (request.message_id,)
            )

    def expire(self, age_us: int) -> None:
        """Forget what has waited for its time."""
        over = [r for known in (self._open, self._answered) for r in known.values() if r.expires_age_us <= age_us]
        for request in over:
            self._drop(request.message_id)
            if not request.answered:
                log.info("request not answered in time", extra={"message_id": request.message_id})
        if over:
            self._journal.execute("DELETE FROM request WHERE expires_age_us <= ?", (age_us,))

    # ------------------------------------------------------------------ the journal's side (Waiter)

    def committed(self, tokens: list[str]) -> None: ...

    def failed(self, tokens: list[str], error: JournalFull) -> None:
        for message_id in tokens:
            self._drop(message_id)


def _place_of(message_id: str) -> tuple[str, int]:
    """Stream and seq of a message of ours (`gateway.amqp.message.message_id`)."""
    _, stream, seq = message_id.rsplit(":", 2)
    return stream, int(seq, 16)


@dataclass(frozen=True, slots=True)
class ReplyTo:
    """Where the replies to one outbound stream's requests come in."""

    address: str
    inbound: str
    timeout_us: int
    requests: Requests

    def remember(
        self, message_id: str, response_topic: str, correlation: bytes | None, age_us: int, expires_age_us: int | None
    ) -> None:
        """`expires_age_us`: when its requester gives up; None: after the stream's reply_timeout."""
        expires = age_us + self.timeout_us if expires_age_us is None else expires_age_us
        self.requests.open(Request(message_id, self.inbound, response_topic, correlation, expires))


@dataclass(frozen=True, slots=True)
class Arrival:
    """A received message that is more than an ordinary one: what it is annotated with, and, of a reply, its topic."""

    annotations: Mapping[str, Any]
    topic: str | None = None
    request: Request | None = None


class Inlet:
    """One inbound stream, as far as replies and requests come in on it.

    `answers`: the prefix of the topics whose messages go back to the reply-to of what came from this hub.
    """

    def __init__(self, requests: Requests, gateway: str, stream: Stream, answers: str | None = None) -> None:
        self.stream = stream
        self._requests = requests
        self._gateway = gateway
        self._answers = answers

    def look(self, message: Message, age_us: int) -> Arrival | None:
        """None: an ordinary message."""
        request = self._requests.find(self.stream.name, message, age_us)
        if request is not None:
            topic = message.reply_to
            if topic is not None and self._answers is not None:
                topic = answer_topic(self._answers, topic)
            notes = {ANNOTATION_REQUEST: annotation(self._gateway, topic, request.correlation)}
            return Arrival(notes, request.response_topic, request)
        if message.reply_to is None or self._answers is None:
            return None
        topic = answer_topic(self._answers, message.reply_to)
        return Arrival({ANNOTATION_REQUEST: annotation(self._gateway, topic, answer_to(message, can_be_answered=True))})

    def taken(self, arrival: Arrival) -> None:
        """It is staged."""
        if arrival.request is not None:
            self._requests.answered(arrival.request)


def annotation(gateway: str, response_topic: str | None, correlation: bytes | None) -> list[Any]:
    """The value of ANNOTATION_REQUEST."""
    return [gateway, response_topic, correlation]


# ------------------------------------------------------------------ requests of the hub's apps, answered on this side
#
# The response topic is the reply address itself behind a prefix, and correlation data carry the type of the id they
# stand for (gateway.amqp.message.correlation_data): nothing has to be remembered between request and answer.


def answer_topic(prefix: str, address: str) -> str:
    """The response topic that stands for a hub's reply address."""
    for char in "%+#":
        address = address.replace(char, f"%{ord(char):02X}")
    return prefix + address


def answer_address(prefix: str, topic: str) -> str | None:
    """The reverse; None of a topic that names no address."""
    return unquote(topic.removeprefix(prefix)) if topic.startswith(prefix) and topic != prefix else None
