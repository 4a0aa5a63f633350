"""Messages of one stream that its hub may settle before they were ever written.

While the link is up and has sent all that came before, what is appended is held here, offered to the uplink, and its
sender is answered once the hub has settled it. What the hub does not settle within `linger_s` is written after all, as
is everything when the link goes, or when more is held than the bounds allow. Written or not, it is all or nothing from
the oldest unsettled message on: a later message never reaches the disk before an earlier one that is only held, so that
after a crash no stream lacks a message in its middle.

The journal owns it and does the writing. Knows no SQL, no link and no clock: `now` is any clock that does not jump.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from storeforward.streams import COLUMNS, Chunk

if TYPE_CHECKING:
    from storeforward.batch import Appended, Waiter

ROWS_MAX = 4096
BYTES_MAX = 4 << 20
# Seqs that the file says are taken, before they are: after a crash none that the hub may have seen is given out again.
# The file is asked for more when half of them are used, so that a reservation costs a page in tens of thousands of
# messages.
SEQS_RESERVED = 1 << 16
# After a linger in vain messages are written at once for a while: a hub that is slower than the linger would only make
# every acknowledgement late.
REST_S_MIN, REST_S_MAX = 1.0, 60.0


@dataclass(frozen=True, slots=True)
class Offered:
    """Messages that the hub may have seen, on their way to the disk: enough to hold them again if that fails.

    `columns`: the rows' values, as the journal stages them. `since`: when the oldest of them came. `tokens`: who waits
    for them, each until everything before a seq is settled.
    """

    first_seq: int
    columns: list[Any]
    since: float
    tokens: list[tuple[int, Waiter, Any]]

    @property
    def end_seq(self) -> int:
        """One past the last seq."""
        return self.first_seq + len(self.columns) // COLUMNS


class Unwritten:
    """What is held of one stream: `chunks` are offered to the uplink, `fresh` is not yet.

    `start`: the first seq of this stay; everything before it was written. `first`: the first seq that is not settled.
    `rows`, `size_bytes`: what is held, `fresh` included. `spared`: how many were settled without having been written.
    """

    def __init__(self, linger_s: float, rows_max: int = ROWS_MAX, bytes_max: int = BYTES_MAX) -> None:
        self.linger_s = linger_s
        self._rows_max, self._bytes_max = rows_max, bytes_max
        self.flows = False
        self.start = self.first = 0
        self.spared = 0
        self.chunks: deque[Chunk] = deque()
        self.fresh: Appended | None = None
        self._offered_rows = self._offered_bytes = 0
        self._since: deque[float] = deque()
        self._fresh_since: float | None = None
        self._tokens: deque[tuple[int, Waiter, Any]] = deque()
        self.owing: dict[Waiter, int] = {}
        # Settled by the hub's refusal, or expired: not answered before the ledger has it.
        self._in_ledger: set[int] = set()
        self._rest_s = REST_S_MIN
        self._rest_until = 0.0

    @property
    def rows(self) -> int:
        return self._offered_rows + (0 if self.fresh is None else self.fresh.rows)

    @property
    def size_bytes(self) -> int:
        return self._offered_bytes + (0 if self.fresh is None else self.fresh.size_bytes)

    @property
    def full(self) -> bool:
        return self.rows >= self._rows_max or self.size_bytes >= self._bytes_max

    def allow(self, flows: bool, now: float) -> None:
        """Whether the link takes messages and has sent all that was written."""
        self.flows = flows and now >= self._rest_until

    def begin(self, seq: int) -> None:
        """Nothing is held; the message `seq` is the first to be."""
        assert not self.rows
        self.start = self.first = seq

    # ------------------------------------------------------------------ offering

    def offer(self, now: float, *, blocked: bool) -> int | None:
        """Make `fresh` readable; return one past its last seq, None where nothing became readable.

        `blocked`: messages before it are still being written.
        """
        fresh = self.fresh
        if fresh is None:
            return None
        if self._fresh_since is None:
            self._fresh_since = now
        if blocked:
            return None
        self.chunks.append(Chunk(fresh.first_seq, fresh.columns, fresh.size_bytes))
        self._since.append(self._fresh_since)
        self._offered_rows += fresh.rows
        self._offered_bytes += fresh.size_bytes
        self.fresh = self._fresh_since = None
        return fresh.end_seq

    def due(self) -> float | None:
        """When the oldest message has been held long enough."""
        since = self._since[0] if self._since else self._fresh_since
        return None if since is None else since + self.linger_s

    def lingered(self, now: float) -> bool:
        """Whether the hub has let the oldest message wait too long; then nothing is held for a while."""
        due = self.due()
        if due is None or now < due:
            return False
        self.flows = False
        self._rest_until = now + self._rest_s
        self._rest_s = min(REST_S_MAX, 2 * self._rest_s)
        return True

    # ------------------------------------------------------------------ answers

    def wait(self, end_seq: int, waiter: Waiter, token: Any) -> None:
        """Have `waiter` answered once everything before `end_seq` is settled."""
        self._tokens.append((end_seq, waiter, token))
        self.owing[waiter] = self.owing.get(waiter, 0) + 1

    def ledger(self, seq: int) -> None:
        """This message's fate is in the ledger or among the dead letters, with the next commit."""
        if self.rows and self.first <= seq:
            self._in_ledger.add(seq)

    def settle(self, position: int) -> tuple[int, int]:
        """Everything before `position` is settled: forget it. Returns how many messages, and their bytes."""
        rows = size = 0
        while self.chunks and self.first < position:
            chunk = self.chunks[0]
            end = chunk.end_seq
            upto = min(position, end)
            if self.first == chunk.first_seq and upto == end:
                size += chunk.size_bytes
            else:
                at = (self.first - chunk.first_seq) * COLUMNS + 5
                size += sum(len(body) for body in chunk.columns[at : (upto - chunk.first_seq) * COLUMNS : COLUMNS])
            rows += upto - self.first
            self.first = upto
            if upto == end:
                self.chunks.popleft()
                self._since.popleft()
        self._offered_rows -= rows
        self._offered_bytes -= size
        self.spared += rows
        if rows:
            self._rest_s = REST_S_MIN
        return rows, size

    def answers(self) -> list[tuple[Waiter, Any, bool]]:
        """Who is to be answered now, in order; True: not before the next commit, which holds what became of it."""
        out: list[tuple[Waiter, Any, bool]] = []
        tokens = self._tokens
        told = {seq for seq in self._in_ledger if seq < self.first}
        self._in_ledger -= told
        while tokens and tokens[0][0] <= self.first:
            _, waiter, token = tokens.popleft()
            self._owes_less(waiter)
            out.append((waiter, token, bool(told)))
        return out

    def _owes_less(self, waiter: Waiter) -> None:
        self.owing[waiter] -= 1
        if not self.owing[waiter]:
            del self.owing[waiter]

    # ------------------------------------------------------------------ writing after all

    def take(self) -> tuple[int, list[Any], int, list[tuple[Waiter, Any]], Offered | None]:
        """Give up everything that is not settled: first seq, the rows' columns, their bytes, who waits for it.

        And, of that, what was offered.
        """
        first, size = self.first, self.size_bytes
        columns: list[Any] = []
        for chunk in self.chunks:
            columns += chunk.columns[max(0, first - chunk.first_seq) * COLUMNS :]
        offered = None
        if self.chunks:
            end = self.chunks[-1].end_seq
            offered = Offered(first, columns.copy(), self._since[0], [each for each in self._tokens if each[0] <= end])
        if self.fresh is not None:
            columns += self.fresh.columns
        tokens = [(waiter, token) for _, waiter, token in self._tokens]
        self.chunks.clear()
        self.fresh = self._fresh_since = None
        self._since.clear()
        self._tokens.clear()
        self.owing.clear()
        self._in_ledger.clear()
        self._offered_rows = self._offered_bytes = 0
        return first, columns, size, tokens, offered

    def put_back(self, offered: Offered) -> None:
        """Hold again what `take` gave up and the disk did not take; nothing else is held now."""
        self.begin(offered.first_seq)
        size = sum(len(body) for body in offered.columns[COLUMNS - 1 :: COLUMNS])
        self.chunks.append(Chunk(offered.first_seq, offered.columns, size))
        self._since.append(offered.since)
        self._offered_rows, self._offered_bytes = len(offered.columns) // COLUMNS, size
        for end_seq, waiter, token in offered.tokens:
            self.wait(end_seq, waiter, token)
        self.flows = False
