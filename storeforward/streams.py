"""What a stream and a cursor are in memory: places, limits and counters. Knows no SQL."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any, NamedTuple

from storeforward.schema import SEQ_BITS

if TYPE_CHECKING:
    from storeforward.unwritten import Unwritten

COLUMNS = 6  # of a message row
SENDER_BYTES = 6  # of an identity: who sent it
SEEN_TOTAL = 200_000  # identities of all senders of a stream together, while each keeps its least
SEEN_LEAST = 1_500
TAIL_ROWS_MAX = 4096
TAIL_BYTES_MAX = 1 << 20


class WhenFull(Enum):
    REFUSE = "refuse"
    DROP_OLDEST = "drop-oldest"


class Row(NamedTuple):
    """One message as it is read: expiry on the age clock in microseconds, body as AMQP sections."""

    seq: int
    topic: str
    expires_age_us: int | None
    body: bytes


@dataclass(frozen=True, slots=True)
class Chunk:
    """What one commit added to a stream: the rows' values one after another, as the journal staged them."""

    first_seq: int
    columns: list[Any]
    size_bytes: int

    @property
    def end_seq(self) -> int:
        """One past the last seq."""
        return self.first_seq + len(self.columns) // COLUMNS


@dataclass(eq=False, slots=True)
class Cursor:
    """One consumer's place. `position` is the first seq not finished with; `durable` is what the disk knows."""

    id: int
    name: str
    kind: str
    position: int
    durable: int
    volatile: bool = False


@dataclass(frozen=True, slots=True)
class StreamLimits:
    """`seen_max`: identities of received messages that are remembered of each sender.

    `urgent`: messages are taken from the last of the disk's room, which other streams leave to these.

    `linger_s`: how long a message may wait for the hub's answer before it is written; None: all are written first.
    """

    bytes_max: int = 64 << 20
    messages_max: int = 10_000_000
    when_full: WhenFull = WhenFull.REFUSE
    seen_max: int = 10_000
    linger_s: float | None = None
    urgent: bool = False


@dataclass(eq=False, slots=True)
class Stream:
    """A log. `committed` is one past the last seq that may be read; `next_seq` also counts what is staged.

    `reserved`: the file says that seqs before this one are taken, though they may not be yet; `reserving`: it will.
    `old_end`: rows before this seq were there when the journal was opened. `written`: one past the last row in the
    file.
    """

    id: int
    name: str
    direction: str
    next_seq: int
    first_seq: int
    rows: int
    size_bytes: int
    committed: int
    limits: StreamLimits = field(default_factory=StreamLimits)
    cursors: dict[str, Cursor] = field(default_factory=dict)
    seen: dict[bytes, int] = field(default_factory=dict)
    senders: dict[bytes, deque[bytes]] = field(default_factory=dict)
    tail: deque[Chunk] = field(default_factory=deque)
    tail_bytes: int = 0
    tail_rows: int = 0
    unwritten: Unwritten | None = None
    reserved: int = 0
    reserving: int = 0
    old_end: int = 0
    written: int = 0

    @property
    def base(self) -> int:
        return self.id << SEQ_BITS

    def low(self) -> int:
        """First seq that somebody still needs. With no cursor at all everything is held for the first reader.

        But not what local apps say to one another: who was not there when it was said is not meant.
        """
        nobody = self.committed if self.direction == "local" else self.first_seq
        return min((c.position for c in self.cursors.values()), default=nobody)

    @property
    def waiting(self) -> int:
        """How many messages somebody still needs; rows that all are done with may be there a little longer."""
        unwritten = self.unwritten
        if unwritten is None or not unwritten.rows:
            return max(0, self.rows - (self.low() - self.first_seq))
        written = self.rows - unwritten.rows
        return unwritten.rows + max(0, written - max(0, min(self.low(), unwritten.start) - self.first_seq))

    def remember_sender(self, identity: bytes) -> None:
        """File an identity under who sent it, the newest last; of the senders, too, the latest is the last."""
        sender = identity[:SENDER_BYTES]
        known = self.senders.pop(sender, None)
        if known is None:
            known = deque()
        known.append(identity)
        self.senders[sender] = known

    def forget_oldest(self, senders: Iterable[bytes]) -> list[tuple[bytes, int]]:
        """Forget what these senders have beyond their share; return it with the ids it was stored under.

        A share is `seen_max`, less where many senders share SEEN_TOTAL, but never less than SEEN_LEAST: forty gateways
        that come back at once must not make the hub forget the window of the last of them. Where even that is too
        much, those who have been silent longest are forgotten.
        """
        share = min(self.limits.seen_max, max(SEEN_LEAST, SEEN_TOTAL // max(1, len(self.senders))))
        over: list[tuple[bytes, int]] = []
        for sender in senders:
            known = self.senders[sender]
            while len(known) > share:
                self._forget(known.popleft(), over)
        while len(self.seen) > max(SEEN_TOTAL, self.limits.seen_max) and len(self.senders) > 1:
            silent = next(iter(self.senders))
            for identity in self.senders.pop(silent):
                self._forget(identity, over)
        return over

    def _forget(self, identity: bytes, over: list[tuple[bytes, int]]) -> None:
        at = self.seen.pop(identity, None)
        if at is not None:
            over.append((identity, at))

    def take_back(self, added: list[tuple[bytes, int]], forgotten: list[tuple[bytes, int]]) -> None:
        """A commit failed: its identities, which `seen` has lost already, and what it forgot, are as they were."""
        for identity, _ in reversed(added):
            known = self.senders.get(identity[:SENDER_BYTES])
            if known and known[-1] == identity:
                known.pop()
        for identity, at in reversed(forgotten):
            self.seen[identity] = at
            self.senders.setdefault(identity[:SENDER_BYTES], deque()).appendleft(identity)

    def remember(self, chunk: Chunk) -> None:
        """Keep the newest commits in memory, within bounds, so that live readers do not go to the disk."""
        tail = self.tail
        tail.append(chunk)
        self.tail_bytes += chunk.size_bytes
        self.tail_rows += len(chunk.columns) // COLUMNS
        while tail and (self.tail_rows > TAIL_ROWS_MAX or self.tail_bytes > TAIL_BYTES_MAX):
            self._drop_chunk()

    def forget(self, seq: int) -> None:
        """Nobody needs anything before `seq` any more."""
        while self.tail and self.tail[0].end_seq <= seq:
            self._drop_chunk()

    def _drop_chunk(self) -> None:
        chunk = self.tail.popleft()
        self.tail_bytes -= chunk.size_bytes
        self.tail_rows -= len(chunk.columns) // COLUMNS
