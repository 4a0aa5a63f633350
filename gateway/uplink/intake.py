"""What arrives on one AMQP receiver link: seen before? append, commit, then settle.

The peer's messages are settled in the order they came, each only after the commit that holds it (promise P1), or that
holds the one it repeats (promise P3). A full stream leaves deliveries unsettled and grants no credit: the peer keeps
its messages. What would not fit into an empty stream, or cannot be read, is rejected, with a ledger row. The larger
messages are, the less credit there is; where so much came all the same that it is too much to hold, it is `overfull`,
and the owner gives all of it back by ending the link. Knows no socket and reads no clock.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from operator import itemgetter

from gateway.amqp.engine import Receiver
from gateway.amqp.events import DECODE_ERROR, MESSAGE_SIZE_EXCEEDED
from gateway.amqp.message import ANNOTATION_RETAIN, Message, annotate, decode, identity
from gateway.errors import PeerError
from gateway.replies import Inlet
from storeforward.errors import JournalFull
from storeforward.journal import Journal
from storeforward.streams import Stream

log = logging.getLogger("lineside.intake")


HELD_BYTES_MAX = 16 << 20  # on its way, or held until there is room
FADING = 6

Place = Callable[[Message], tuple[Stream, str]]


class _TooLarge(PeerError):
    """The message does not fit into its stream even where that is empty."""


Retain = Callable[[Stream, int, str, bytes, int | None], None]


def _as_it_came(seq: int, body: bytes) -> bytes:
    return body


class Intake:
    """`place(message)` says which stream and topic; raises PeerError to have the message rejected.

    `flush()` has what was settled sent; `accepted()` hears of every time that something was accepted; `retain` of each
    message that asks to be retained, with its stream, seq, topic, bytes and expiry. `inlet` knows replies and requests:
    a reply to a request from this side goes where that asked for it, and not to its place. `largest_bytes`: of messages
    lately, as an earlier link may know.
    """

    def __init__(
        self,
        journal: Journal,
        link: Receiver,
        credit: int,
        place: Place,
        flush: Callable[[], None],
        accepted: Callable[[], None] = lambda: None,
        retain: Retain | None = None,
        inlet: Inlet | None = None,
        largest_bytes: int = 0,
    ) -> None:
        self.journal = journal
        self.link = link
        self.credit = credit
        self._place = place
        self._flush = flush
        self._accepted = accepted
        self._retain = retain
        self._inlet = inlet
        self._held: deque[tuple[int, bytes]] = deque()
        self._held_bytes = 0
        self._staged = 0  # waiting for a commit
        self.largest_bytes = largest_bytes
        self.received = self.repeated = 0
        link.topup(self._credit_now())

    @property
    def held(self) -> int:
        return len(self._held)

    @property
    def overfull(self) -> bool:
        return self._held_bytes > HELD_BYTES_MAX

    @property
    def staged(self) -> bool:
        """Whether messages wait for a commit, and the peer for its answer to them."""
        return self._staged > 0

    def deliveries(self, batch: list[tuple[int, bytes]]) -> None:
        for _, body in batch:
            size = len(body)
            self._held_bytes += size
            # Half of a large one's weight is gone after some forty others.
            self.largest_bytes = max(size, self.largest_bytes - (self.largest_bytes >> FADING))
        self._held.extend(batch)
        self.retry()

    def _credit_now(self) -> int:
        return max(1, min(self.credit, HELD_BYTES_MAX // max(1, self.largest_bytes)))

    def retry(self) -> None:
        """Append what is held, as far as there is room."""
        self.journal.intake()
        held = self._held
        refused = False
        while held:
            handle, body = delivery = held[0]
            try:
                self._append(delivery)
            except JournalFull as error:
                log.debug("inbound held back", extra={"stream": error.stream, "reason": error.reason})
                break
            except _TooLarge as error:
                self._reject(handle, body, MESSAGE_SIZE_EXCEEDED, "too-large", str(error))
                refused = True
            except PeerError as error:
                self._reject(handle, body, DECODE_ERROR, "malformed", str(error))
                refused = True
            held.popleft()
            self._held_bytes -= len(body)
        if refused:
            self._refill()

    def _reject(self, handle: int, body: bytes, condition: str, reason: str, description: str) -> None:
        self.link.reject(handle, condition, description)
        self.journal.lose("-", 0, reason, len(body), description)

    def _append(self, delivery: tuple[int, bytes]) -> None:
        body = delivery[1]
        message = decode(body)
        who = identity(body)
        arrival = None
        if self._inlet is not None and not (message.correlation_id is None and message.reply_to is None):
            arrival = self._inlet.look(message, self.journal.age_us())
        if self._inlet is not None and arrival is not None and arrival.topic is not None:
            stream, topic = self._inlet.stream, arrival.topic
        else:
            stream, topic = self._place(message)
        if arrival is not None:
            body = annotate(body, arrival.annotations)
        if who is not None and who in stream.seen:
            self.repeated += 1
            self._staged += 1
            self.journal.wait_for(self, delivery, stream, who)
        elif len(body) > stream.limits.bytes_max:
            raise _TooLarge(f"{len(body)} bytes; stream {stream.name} has max_bytes {stream.limits.bytes_max}")
        else:
            expires = None if message.ttl_ms is None else self.journal.age_us() + message.ttl_ms * 1000
            seq = self.journal.append(stream, topic, _as_it_came, body, expires, who)
            if self._inlet is not None and arrival is not None:
                self._inlet.taken(arrival)
            if self._retain is not None and message.annotations.get(ANNOTATION_RETAIN) is True:
                self._retain(stream, seq, topic, body, expires)
            self.received += 1
            self._staged += 1
            self.journal.wait(self, delivery)

    def committed(self, tokens: list[tuple[int, bytes]]) -> None:
        self._staged -= len(tokens)
        self.link.accept([handle for handle, _ in tokens])
        self._accepted()
        self._refill()

    def failed(self, tokens: list[tuple[int, bytes]], error: JournalFull) -> None:
        """Not on disk: they stay unsettled, and are appended again before anything newer.

        Released they would come back behind what the peer has sent meanwhile (promise P2).
        """
        # A repeat that waited for the same commit may stand before what came before it.
        self._staged -= len(tokens)
        self._held.extendleft(sorted(tokens, key=itemgetter(0), reverse=True))
        self._held_bytes += sum(len(body) for _, body in tokens)

    def _refill(self) -> None:
        self.link.topup(self._credit_now())
        self._flush()
