"""A link on which an app sends to us: route, journal, commit, and only then `accepted` (promise P1).

Messages are journaled in the order they came. What cannot be taken is answered one by one with the standard's
condition; a full stream leaves deliveries unsettled, within a bound, and grants no credit. Knows no socket and reads no
clock; what may be published is for `resolve` to say.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from operator import itemgetter

from gateway.amqp.addresses import AddressError, parse
from gateway.amqp.engine import Receiver
from gateway.amqp.events import DECODE_ERROR, NOT_FOUND, RESOURCE_LIMIT_EXCEEDED
from gateway.amqp.message import ANNOTATION_RETAIN, Message, MessageError, Stamp, decode, given_id, lineside_identity
from gateway.errors import PeerError
from gateway.routing import Route
from storeforward.errors import JournalFull
from storeforward.journal import Journal
from storeforward.streams import Stream

log = logging.getLogger("lineside.amqp")

# Messages that a full stream leaves waiting here, a link; what comes beyond goes back to the app.
HELD_BYTES_MAX = 4 << 20


class Refused(PeerError):
    """One message is not taken, and why."""

    def __init__(self, condition: str, description: str) -> None:
        super().__init__(description)
        self.condition = condition


Retain = Callable[[Stream, int, str, bytes, int | None], None]
# The route of a topic and what stamps its messages. Raises Refused.
Resolve = Callable[[str], tuple[Route, Stamp]]


class Incoming:
    """`topic`: where the link's messages go, None where each message's `to` says. `flush()` sends what was settled.

    `retain` hears of each message that asks to be retained, with its stream, seq, topic, bytes and expiry. `waits()`:
    something is held that was not before, and `retry` has to be called.
    """

    def __init__(
        self,
        journal: Journal,
        link: Receiver,
        credit: int,
        topic: str | None,
        resolve: Resolve,
        flush: Callable[[], None],
        retain: Retain = lambda stream, seq, topic, body, expires: None,
        waits: Callable[[], None] = lambda: None,
    ) -> None:
        self.journal = journal
        self.link = link
        self.topic = topic
        self._credit = credit
        self._resolve = resolve
        self._flush = flush
        self._retain = retain
        self._waits = waits
        self._held: deque[tuple[int, bytes]] = deque()
        self._held_bytes = 0
        self._overflowed = False
        self._ended = False
        self.received = self.repeated = self.refused = 0
        link.topup(credit)

    @property
    def held(self) -> int:
        return len(self._held)

    def deliveries(self, batch: list[tuple[int, bytes]]) -> None:
        if not self._held:
            taken = self._take(batch)
            batch = batch[taken:]
        for handle, body in batch:
            # Once one had to go back, so have all behind it, or the app's order would be lost (promise P2).
            if self._overflowed or self._held_bytes + len(body) > HELD_BYTES_MAX:
                self._overflowed = True
                self._give_back(handle, len(body), "held-messages")
            else:
                self._held.append((handle, body))
                self._held_bytes += len(body)

    def retry(self) -> None:
        """Append what is held, as far as there is room."""
        for _ in range(self._take(self._held)):
            _, body = self._held.popleft()
            self._held_bytes -= len(body)
        if not self._held:
            self._overflowed = False
            self._refill()

    def end(self) -> None:
        """The link is gone. The app still has what it waits to have settled, and the ledger tells of the rest."""
        self._ended = True
        while self._held:
            handle, body = self._held.popleft()
            if self.link.was_presettled(handle):
                self.journal.lose("-", 0, "refused-presettled", len(body), "its link ended before there was room")
        self._held_bytes = 0

    def _take(self, batch: list[tuple[int, bytes]] | deque[tuple[int, bytes]]) -> int:
        """Deal with messages from the first on; return how many, which is fewer only where a stream is full."""
        self.journal.intake()
        count = 0
        for delivery in batch:
            handle, body = delivery
            try:
                self._append(delivery)
            except JournalFull as error:
                log.debug("local intake held back", extra={"stream": error.stream, "reason": error.reason})
                break
            except Refused as error:
                self._reject(handle, len(body), error.condition, str(error))
            except MessageError as error:
                self._reject(handle, len(body), DECODE_ERROR, str(error))
            count += 1
        return count

    def _append(self, delivery: tuple[int, bytes]) -> None:
        body = delivery[1]
        message = decode(body)
        topic = self.topic
        if topic is None:
            topic = self._named(message)
        route, stamp = self._resolve(topic)
        stream, journal = route.stream, self.journal
        if len(body) > stream.limits.bytes_max:
            raise Refused(RESOURCE_LIMIT_EXCEEDED, f"stream {stream.name} takes {stream.limits.bytes_max} bytes in all")
        ttl_us = route.ttl_us
        if message.ttl_ms is not None:
            ttl_us = message.ttl_ms * 1000 if ttl_us is None else min(ttl_us, message.ttl_ms * 1000)
        expires = None if ttl_us is None else journal.age_us() + ttl_us
        who = lineside_identity(message)
        if who is None:
            seq = journal.append(stream, topic, stamp.encode, body, expires)
        elif who in stream.seen:
            self.repeated += 1
            journal.wait_for(self, delivery, stream, who)
            return
        else:
            given = given_id(message)
            assert given is not None
            body = stamp.carry(given, body)
            seq = journal.append(stream, topic, _as_it_is, body, expires, who)
        if message.annotations.get(ANNOTATION_RETAIN) is True:
            self._retain(stream, seq, topic, body if who is not None else stamp.encode(seq, body), expires)
        self.received += 1
        journal.wait(self, delivery)

    @staticmethod
    def _named(message: Message) -> str:
        if message.to is None:
            raise Refused(NOT_FOUND, "the link has no address, and neither has the message (`to`)")
        try:
            return parse(message.to).topic
        except AddressError as error:
            raise Refused(NOT_FOUND, f"`to`: {error}") from error

    def _reject(self, handle: int, size: int, condition: str, description: str) -> None:
        self.refused += 1
        if self.link.was_presettled(handle):
            self.journal.lose("-", 0, "refused-presettled", size, condition)
        self.link.reject(handle, condition, description)
        self._refill()

    def _give_back(self, handle: int, size: int, why: str) -> None:
        if self.link.was_presettled(handle):
            self.journal.lose("-", 0, "refused-presettled", size, why)
        self.link.release(handle)

    # ------------------------------------------------------------------ the journal's side (Waiter)

    def committed(self, tokens: list[tuple[int, bytes]]) -> None:
        self.link.accept([handle for handle, _ in tokens])
        self._refill()

    def failed(self, tokens: list[tuple[int, bytes]], error: JournalFull) -> None:
        """Not on disk: they stay unsettled, and are appended again before anything newer.

        Released they would come back behind what the app has sent meanwhile (promise P2).
        """
        # A repeat that waited for the same commit may stand before what came before it.
        self._held.extendleft(sorted(tokens, key=itemgetter(0), reverse=True))
        self._held_bytes += sum(len(body) for _, body in tokens)
        if self._ended:
            self.end()
        else:
            self._waits()

    def _refill(self) -> None:
        if not self._held:
            self.link.topup(self._credit)
        self._flush()


def _as_it_is(seq: int, body: bytes) -> bytes:
    return body
