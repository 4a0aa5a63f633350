"""What one commit will make durable, as it gathers in memory, and who is told about it.

Knows how the rows of messages are written, and nothing of transactions, readers or room on the disk.
"""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from storeforward.errors import JournalFull
from storeforward.sealing import FOLLOWS, Seal, about_row, checksum
from storeforward.streams import COLUMNS, Cursor, Row, Stream

if TYPE_CHECKING:
    from storeforward.unwritten import Offered

ROWS_A_STATEMENT = 64
COPIED_BYTES_MAX = 2048  # of a body, on the average of a batch

_INSERT = "INSERT INTO message (id, time_us, expires_age_us, topic, crc, body) VALUES "
# Values a statement, the statement, and the one for rows that never expire: powers of two rows, so that a rest of any
# size needs few of them, all prepared.
_INSERTS = tuple(
    (
        COLUMNS << n,
        _INSERT + ",".join(["(?,?,?,?,?,?)"] * (1 << n)),
        _INSERT + ",".join(["(?,?,NULL,?,?,?)"] * (1 << n)),
    )
    for n in range(ROWS_A_STATEMENT.bit_length() - 1, -1, -1)
)

_K = TypeVar("_K")


class Waiter(Protocol):
    """Whoever must not answer before the commit. Tokens are the waiter's own, in the order it gave them.

    On a stream with a linger, `committed` may also mean that the hub has settled what was never written.
    """

    def committed(self, tokens: list[Any]) -> None: ...
    def failed(self, tokens: list[Any], error: JournalFull) -> None: ...


@dataclass(slots=True)
class Appended:
    """What one stream gained in a batch, seqs without a gap; enough to take it back when the commit fails.

    `columns`: the rows' values one after another, COLUMNS a row, as the statements take them.
    """

    first_seq: int
    columns: list[Any] = field(default_factory=list)
    size_bytes: int = 0
    identities: list[tuple[bytes, int]] = field(default_factory=list)
    forgotten: list[tuple[bytes, int]] = field(default_factory=list)

    @property
    def rows(self) -> int:
        return len(self.columns) // COLUMNS

    @property
    def end_seq(self) -> int:
        """One past the last seq."""
        return self.first_seq + len(self.columns) // COLUMNS

    def row(self, seq: int) -> Row | None:
        """One of the messages, as it will be read; None if it is not among them."""
        if not self.first_seq <= seq < self.end_seq:
            return None
        at = (seq - self.first_seq) * COLUMNS
        _, _, expires, topic, _, body = self.columns[at : at + COLUMNS]
        return Row(seq, topic, expires, body)

    def insert(self, writer: sqlite3.Connection, seal: Seal | None, written: int) -> None:
        """Write the rows, sealed if there is a `seal`, into the transaction that is open. Raises sqlite3.Error.

        `written`: one past the last row in the file.
        """
        if written != self.first_seq:
            self.columns[4] &= ~FOLLOWS
        columns = self.columns if seal is None else _sealed(seal, self.columns)
        ex = writer.execute
        at, end = 0, len(columns)
        # sqlite3 looks for an adapter of every bytes and every None, which costs more than to copy a small body.
        small = self.size_bytes <= self.rows * COPIED_BYTES_MAX
        for step, statement, lasting in _INSERTS:
            while end - at >= step:  # HOT: tests/bench measures it as intake
                values = columns[at : at + step]
                at += step
                if small:
                    values[5::COLUMNS] = map(bytearray, values[5::COLUMNS])
                if values[2::COLUMNS].count(None) * COLUMNS < step:
                    ex(statement, values)
                else:
                    del values[2::COLUMNS]
                    ex(lasting, values)


@dataclass(slots=True)
class Batch:
    """Everything that one commit will make durable.

    `deleted`: rows before this seq go, though cursors may not say so. `revived`, `dropped`: dead letters that go,
    the former together with the rows they come back as. `totals`, `unnumbered`: losses, summed until they are written.
    `statements`: in the order they were asked for; True: only if the messages of this batch are stored. `reserved`:
    seqs before this one are to be taken for given out after a crash. `offered`: the first of what is appended, where
    the hub may have seen it already. `due`: of those in `waiting`, whose messages the hub has settled, in the same
    order; True: what became of them is in this batch.
    """

    size_bytes: int = 0
    appended: dict[Stream, Appended] = field(default_factory=dict)
    cursors: dict[Cursor, int] = field(default_factory=dict)
    statements: list[tuple[str, tuple[Any, ...], bool]] = field(default_factory=list)
    waiting: dict[Waiter, list[Any]] = field(default_factory=dict)
    touched: dict[Stream, None] = field(default_factory=dict)
    deleted: dict[Stream, int] = field(default_factory=dict)
    revived: dict[int, None] = field(default_factory=dict)
    dropped: dict[int, None] = field(default_factory=dict)
    totals: dict[tuple[str, str], list[int]] = field(default_factory=dict)
    unnumbered: dict[tuple[str, str, str], list[int]] = field(default_factory=dict)
    reserved: dict[Stream, int] = field(default_factory=dict)
    offered: dict[Stream, Offered] = field(default_factory=dict)
    due: dict[Waiter, list[tuple[Any, bool]]] = field(default_factory=dict)

    @property
    def messages(self) -> int:
        return sum(appended.rows for appended in self.appended.values())

    def __bool__(self) -> bool:
        return bool(
            self.appended
            or self.cursors
            or self.statements
            or self.waiting
            or self.touched
            or self.deleted
            or self.dropped
            or self.totals
            or self.reserved
        )

    def absorb(self, later: Batch) -> None:
        """Take over what was staged after this batch, to be undone with it: of messages only what that needs."""
        for stream, appended in later.appended.items():
            mine = self.appended.setdefault(stream, Appended(appended.first_seq))
            mine.identities += appended.identities
        self.cursors.update(later.cursors)
        self.statements += later.statements
        for waiter, tokens in later.waiting.items():
            self.waiting.setdefault(waiter, []).extend(tokens)
        self.touched.update(later.touched)
        self.offered.update(later.offered)
        for waiter, owed in later.due.items():
            self.due.setdefault(waiter, []).extend(owed)
        for stream, before in later.deleted.items():
            self.deleted[stream] = max(before, self.deleted.get(stream, 0))
        self.revived.update(later.revived)
        self.dropped.update(later.dropped)
        self.add_losses(later)

    def add_losses(self, other: Batch) -> None:
        """The sums of what another batch lost on top of this one's."""
        for key, sums in other.totals.items():
            _add(self.totals, key, sums)
        for which, sums in other.unnumbered.items():
            _add(self.unnumbered, which, sums)


def _sealed(seal: Seal, columns: list[Any]) -> list[Any]:
    """Rows as they are written; in memory they stay as they are, for whoever reads them soon."""
    seal_row = seal.seal_row
    out = columns.copy()
    for at in range(0, len(out), COLUMNS):
        id_ = out[at]
        topic, body = seal_row(about_row(id_), out[at + 3], out[at + 5])
        crc = checksum(id_, topic, body, out[at + 2]) | out[at + 4] & FOLLOWS
        out[at + 3 : at + COLUMNS] = topic, crc, body
    return out


def _add(sums: dict[_K, list[int]], key: _K, more: list[int]) -> None:
    sum_ = sums.setdefault(key, [0, 0])
    sum_[0] += more[0]
    sum_[1] += more[1]
