"""What is committed, as it is read again: from memory where it is new, else from the file, each row checked.

Reads through a connection of its own that sees committed rows only. Knows nothing of what is staged, nor of who reads.
"""

from __future__ import annotations

import sqlite3
from collections import deque
from collections.abc import Callable
from zlib import crc32

from storeforward.errors import JournalError, corrupt
from storeforward.schema import SEQ_MASK
from storeforward.sealing import CRC_MASK, FOLLOWS, PLAIN, SPREAD, about_row, intact
from storeforward.streams import COLUMNS, Chunk, Row, Stream

READ_ROWS_MAX = 1024
_FOLLOWS, _PLAIN = FOLLOWS >> 32, (PLAIN | FOLLOWS) >> 32


class Reading:
    """The rows of one journal.

    `opened`: topic and body of a sealed row, ValueError if they do not open. `lose`: enters stream, seq, reason, size
    and detail of what does not read in the ledger. `damaged`: what an error means, to be raised. `night_us`: by how
    much rows from before the boot are older than the age clock knew when it was resumed.
    """

    def __init__(
        self,
        reader: sqlite3.Connection,
        opened: Callable[[bytes, str | bytes, bytes], tuple[str, bytes]],
        lose: Callable[[str, int, str, int, str], None],
        damaged: Callable[[sqlite3.Error | UnicodeDecodeError], JournalError],
    ) -> None:
        self._r = reader
        self._opened = opened
        self._lose = lose
        self._damaged = damaged
        self._bad_rows: set[int] = set()
        self.night_us = 0

    def rows(self, stream: Stream, seq: int, rows_max: int, bytes_max: int) -> list[Row]:
        """Committed rows from `seq` on, in order, at most `rows_max` and about `bytes_max`.

        Those whose checksum does not fit are lost and left out. Raises JournalError, JournalCorrupt.
        """
        tail = stream.tail
        if tail and seq >= tail[0].first_seq:
            return from_tail(tail, max(seq, stream.first_seq), rows_max, bytes_max)
        out: list[Row] = []
        size = 0
        base = stream.base
        limit = min(rows_max, READ_ROWS_MAX)
        try:
            cursor = self._r.execute(
                "SELECT id, topic, expires_age_us, crc, body FROM message WHERE id >= ? AND id < ? ORDER BY id",
                (base | seq, base | stream.committed),
            )
            at_least = base | seq
            spread = stream.id * SPREAD
            known, begin = None, 0
            new = tuple.__new__  # what Row() calls, by a function in Python
            for id_, topic, expires, crc, body in cursor:
                if id_ != at_least:
                    _check_gap(stream, at_least, id_, crc)
                at_least = id_ + 1
                # HOT: as `intact`, which costs a backlog's drain a call a row
                if crc >> 32 | _FOLLOWS == _PLAIN and expires is None and type(topic) is str:
                    if topic != known:
                        known, begin = topic, crc32(topic.encode()) ^ spread
                    whole = crc32(body, (begin ^ id_) & CRC_MASK) == crc & CRC_MASK
                else:
                    whole = intact(id_, topic, crc, body, expires)
                    if whole and type(topic) is bytes:
                        try:
                            topic, body = self._opened(about_row(id_), topic, body)
                        except ValueError:
                            whole = False
                if not whole:
                    if id_ not in self._bad_rows:  # every reader comes by here, and again after each reconnect
                        self._bad_rows.add(id_)
                        self._lose(stream.name, id_ & SEQ_MASK, "corrupt", len(body), "CRC of the row does not fit")
                    continue
                out.append(new(Row, (id_ & SEQ_MASK, topic, expires, body)))
                size += len(body)
                if size >= bytes_max or len(out) >= limit:
                    break
            cursor.close()
            if not out and seq < stream.committed:
                self._verify_gap(base | at_least & SEQ_MASK, base | stream.committed)
                if max(at_least & SEQ_MASK, stream.first_seq) < min(stream.written, stream.committed):
                    raise _missing(base | stream.written - 1)
        except (TypeError, sqlite3.OperationalError) as error:
            # A flipped bit can make a column another type, or its text no UTF-8: that row is lost, not the daemon.
            if isinstance(error, sqlite3.OperationalError) and "decode" not in str(error):
                raise self._damaged(error) from error
            return self._carefully(stream, seq, limit, bytes_max)
        except sqlite3.DatabaseError as error:
            raise self._damaged(error) from error
        return self._aged(stream, out) if self.night_us else out

    def _verify_gap(self, start: int, end: int) -> None:
        """Nothing was found between these ids: true only if nothing is found from the other end, either.

        A damaged id in the middle can look like the end, and the cursor would be moved over everything behind it.
        """
        row = self._r.execute("SELECT id FROM message WHERE id < ? ORDER BY id DESC LIMIT 1", (end,)).fetchone()
        if row is not None and row[0] >= start:
            raise _out_of_order(row[0])

    def _carefully(self, stream: Stream, seq: int, rows_max: int, bytes_max: int) -> list[Row]:
        out: list[Row] = []
        base = stream.base
        self._r.text_factory = bytes
        try:
            rows = self._r.execute(
                "SELECT id, topic, expires_age_us, crc, body, typeof(topic) FROM message "
                "WHERE id >= ? AND id < ? ORDER BY id LIMIT ?",
                (base | seq, base | stream.committed, rows_max),
            ).fetchall()
        except sqlite3.DatabaseError as error:
            raise self._damaged(error) from error
        finally:
            self._r.text_factory = str
        at_least = base | seq
        for id_, topic, expires, crc, body, kind in rows:
            try:
                _check_gap(stream, at_least, id_, crc if type(crc) is int else FOLLOWS)
            except sqlite3.DatabaseError as error:
                raise self._damaged(error) from error
            at_least = id_ + 1
            text = plain = None
            try:
                text = topic if kind == b"blob" else topic.decode()
                whole = intact(id_, text, crc, body, expires)
                if whole:
                    text, plain = self._opened(about_row(id_), text, body)
            except (AttributeError, TypeError, ValueError):
                whole = False
            if whole and text is not None and plain is not None:
                out.append(Row(id_ & SEQ_MASK, text, expires, plain))
            elif id_ not in self._bad_rows:
                self._bad_rows.add(id_)
                size = len(body) if isinstance(body, bytes) else 0
                self._lose(stream.name, id_ & SEQ_MASK, "corrupt", size, "the row's columns make no sense")
        if rows and not out:
            return self.rows(stream, (rows[-1][0] & SEQ_MASK) + 1, rows_max, bytes_max)
        return self._aged(stream, _within(out, bytes_max))

    def _aged(self, stream: Stream, rows: list[Row]) -> list[Row]:
        """These rows, those from before a boot older by the time off that was only found out later."""
        if not rows or rows[0].seq >= stream.old_end:
            return rows
        return [
            row
            if row.expires_age_us is None or row.seq >= stream.old_end
            else Row(row.seq, row.topic, row.expires_age_us - self.night_us, row.body)
            for row in rows
        ]


def _check_gap(stream: Stream, at_least: int, id_: int, crc: int) -> None:
    """Raises sqlite3.DatabaseError where the row that is read next, and stands in the file, is not `at_least`'s next.

    Seqs that a failed commit took with it, or that were never written, are no loss: the row behind them follows none.
    """
    if id_ < at_least:
        raise _out_of_order(id_)
    if id_ > at_least and crc & FOLLOWS and id_ & SEQ_MASK > stream.first_seq:
        raise _missing(id_ - 1)


def _missing(id_: int) -> sqlite3.DatabaseError:
    return corrupt(f"row {id_} has vanished")


def _out_of_order(id_: int) -> sqlite3.DatabaseError:
    """A page of another place, whole in itself: SQLite does not notice, and reading on after it would go round."""
    return corrupt(f"row {id_} is in the wrong place")


def _within(rows: list[Row], bytes_max: int) -> list[Row]:
    size = 0
    for n, row in enumerate(rows):
        size += len(row.body)
        if size >= bytes_max:
            return rows[: n + 1]
    return rows


def from_tail(tail: deque[Chunk], seq: int, rows_max: int, bytes_max: int) -> list[Row]:
    """Rows from `seq` on out of the newest batches; at least one if there is any."""
    out: list[Row] = []
    size = 0
    new = tuple.__new__
    at = len(tail) - 1
    while at and tail[at].first_seq > seq:
        at -= 1
    for chunk in (tail[i] for i in range(at, len(tail))):  # from the right: a deque's middle is slow to reach
        columns = chunk.columns
        start = max(0, seq - chunk.first_seq)
        for i in range(start * COLUMNS, len(columns), COLUMNS):
            body = columns[i + 5]
            out.append(new(Row, (columns[i] & SEQ_MASK, columns[i + 3], columns[i + 2], body)))  # HOT: drain, fan-out
            size += len(body)
            if len(out) >= rows_max or size >= bytes_max:
                return out
    return out
