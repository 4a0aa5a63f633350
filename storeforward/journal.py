"""The journal: streams of messages in one SQLite file, written by group commit.

Callers append on their own thread; what they append gathers in memory. `begin` stages all of it into a transaction,
`commit` makes it durable and may run in another thread, `committed` or `failed` tells everybody who waits.
Only one batch is under way at a time; reading goes through a second connection that sees committed rows only.
Knows no network, no asyncio, no encoding: bodies are opaque bytes with a CRC.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import sqlite3
import struct
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Protocol
from zlib import crc32

from storeforward import schema
from storeforward.age import AgeClock, boot_id
from storeforward.errors import JournalCorrupt, JournalError, JournalFull, JournalNewer
from storeforward.lock import StateLock
from storeforward.schema import SEQ_BITS, SEQ_MASK
from storeforward.streams import COLUMNS, Chunk, Cursor, Row, Stream, StreamLimits, WhenFull

ROWS_A_STATEMENT = 64

DELETE_ROWS_MAX = 4096
DELETE_ROWS_MIN = 256
READ_ROWS_MAX = 1024
LOSS_ROWS_MAX = 200_000
RESERVE_BYTES_MAX = 16 << 20
RESERVE_SHARE = 8
DELETE_ROWS_DISK_FULL = 128
VACUUM_PAGES = 64
PENDING_BYTES_MAX = 8 << 20
SUSPECT = "journal.suspect"

_INSERT_HEAD = "INSERT INTO message (id, time_us, expires_age_us, topic, crc, body) VALUES "
_INSERT_ROW = "(?,?,?,?,?,?)"
# Rows a statement, and the statement: powers of two, so that a rest of any size needs few of them, all prepared.
_INSERTS = tuple(
    (COLUMNS << n, _INSERT_HEAD + ",".join([_INSERT_ROW] * (1 << n)))
    for n in range(ROWS_A_STATEMENT.bit_length() - 1, -1, -1)
)

_WAL_INDEX = struct.Struct("=14xHI")

Encode = Callable[[int, bytes], bytes]


class Waiter(Protocol):
    """Whoever must not answer before the commit. Tokens are the waiter's own, in the order it gave them."""

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

    @property
    def rows(self) -> int:
        return len(self.columns) // COLUMNS

    @property
    def end_seq(self) -> int:
        """One past the last seq."""
        return self.first_seq + len(self.columns) // COLUMNS


@dataclass(slots=True)
class Batch:
    """Everything that one commit will make durable."""

    size_bytes: int = 0
    appended: dict[Stream, Appended] = field(default_factory=dict)
    cursors: dict[Cursor, int] = field(default_factory=dict)
    statements: list[tuple[str, tuple[Any, ...]]] = field(default_factory=list)
    with_rows: list[tuple[str, tuple[Any, ...]]] = field(default_factory=list)
    waiting: dict[Waiter, list[Any]] = field(default_factory=dict)
    touched: dict[Stream, None] = field(default_factory=dict)
    deleted: dict[Stream, None] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.appended or self.cursors or self.statements or self.with_rows or self.waiting or self.touched)


class Journal:
    """Use `Journal.open`. All methods but `commit` belong to one thread."""

    def __init__(
        self,
        state_dir: Path,
        writer: sqlite3.Connection,
        reader: sqlite3.Connection,
        lock: StateLock,
        clock: Callable[[], float],
        wall: Callable[[], float],
    ) -> None:
        self.state_dir = state_dir
        self._w = writer
        self._r = reader
        self._lock = lock
        self._clock = clock
        self._wall = wall
        self.streams: dict[str, Stream] = {}
        self._by_id: dict[int, Stream] = {}
        self.pending = Batch()
        self.under_way: Batch | None = None
        self._lazy: dict[Cursor, Stream] = {}
        self.epoch = 0
        self.epoch_token = ""
        self._age = AgeClock(0, 0, "")
        self._age_saved_us = 0
        self.disk_full = False
        self._index_fd = -1
        self.wal_bytes_max = 0
        self._reserve_bytes = 0
        self.salvaged: str | None = None
        self.dead_count = 0
        self.loss_count = 0
        self.wall_us = int(wall() * 1e6)

    # ------------------------------------------------------------------ opening and closing

    @classmethod
    def open(
        cls,
        state_dir: Path,
        *,
        synchronous: str = "FULL",
        clock: Callable[[], float] = lambda: time.clock_gettime(time.CLOCK_BOOTTIME),
        wall: Callable[[], float] = time.time,
    ) -> Journal:
        """Lock `state_dir`, open or create its journal, start a new epoch.

        A damaged file is set aside whole and what reads of it is salvaged into a fresh one: `salvaged` then says what
        happened. Raises JournalLocked, JournalNewer or JournalError, each saying what to do.
        """
        from storeforward.salvage import salvage  # only a damaged file needs it

        lock = StateLock(state_dir)
        try:
            path = state_dir / "journal.db"
            report = None
            if (state_dir / SUSPECT).exists():
                report = salvage(state_dir, clock)
            try:
                journal = cls._open(state_dir, path, lock, synchronous, clock, wall)
            except (JournalCorrupt, sqlite3.DatabaseError) as error:
                if isinstance(error, sqlite3.OperationalError) and "malformed" not in str(error):
                    raise _explain(path, error) from error
                report = salvage(state_dir, clock)
                journal = cls._open(state_dir, path, lock, synchronous, clock, wall)
            journal.salvaged = report
            return journal
        except BaseException:
            lock.release()
            raise

    @classmethod
    def _open(
        cls,
        state_dir: Path,
        path: Path,
        lock: StateLock,
        synchronous: str,
        clock: Callable[[], float],
        wall: Callable[[], float],
    ) -> Journal:
        new = not path.exists()
        writer = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=5)
        reader: sqlite3.Connection | None = None
        try:
            if new:
                os.chmod(path, 0o600)
                writer.execute(f"PRAGMA page_size = {schema.PAGE_SIZE_BYTES:d}")
                # A file system that was full gets its space back as the backlog drains.
                writer.execute("PRAGMA auto_vacuum = INCREMENTAL")
            writer.execute("PRAGMA journal_mode = WAL")
            (found,) = writer.execute("PRAGMA user_version").fetchone()
            if found > schema.VERSION:
                raise JournalNewer(
                    f"{path}: written by a newer lineside (schema {found}, this one knows {schema.VERSION}); "
                    "install that version again, or move the state directory away"
                )
            writer.execute(f"PRAGMA synchronous = {synchronous}")
            writer.execute("PRAGMA wal_autocheckpoint = 0")
            writer.execute("PRAGMA cache_size = -2048")
            writer.execute("PRAGMA foreign_keys = ON")
            schema.migrate(writer)
            if new:
                _sync_directory(state_dir)
            reader = sqlite3.connect(path, isolation_level=None, timeout=5)
            reader.execute("PRAGMA query_only = ON")
            reader.execute("PRAGMA cache_size = -1024")
            journal = cls(state_dir, writer, reader, lock, clock, wall)
            journal._load()
            journal._measure_reserve()
            # Held until after SQLite has closed the file: closing any descriptor of it would drop SQLite's own locks
            # on it, and another process could then take the WAL for abandoned.
            journal._index_fd = os.open(state_dir / "journal.db-shm", os.O_RDONLY | os.O_CLOEXEC)
        except BaseException:
            # Both, and before anybody moves the file: the last connection to close unlinks a WAL, and does it by name.
            if reader is not None:
                reader.close()
            writer.close()
            raise
        return journal

    def _load(self) -> None:
        w = self._w
        meta = dict(w.execute("SELECT key, value FROM meta"))
        boottime_us = int(self._clock() * 1e6)
        self._age = AgeClock.resume(meta.get("age"), boot_id(), boottime_us)
        self.epoch = int(meta.get("epoch", "0")) + 1
        # The random part keeps identities apart even when an old copy of the journal is restored.
        self.epoch_token = f"{self.epoch:x}.{secrets.token_hex(3)}"
        for id_, name, direction, next_seq, rows, size in w.execute(
            "SELECT id, name, direction, next_seq, rows, bytes FROM stream"
        ).fetchall():
            base = id_ << schema.SEQ_BITS
            first, last = w.execute(
                "SELECT (SELECT min(id) FROM message WHERE id BETWEEN ?1 AND ?2), "
                "(SELECT max(id) FROM message WHERE id BETWEEN ?1 AND ?2)",
                (base, base | SEQ_MASK),
            ).fetchone()
            if last is not None:
                next_seq = max(next_seq, (last & SEQ_MASK) + 1)
            first_seq = next_seq if first is None else first & SEQ_MASK
            stream = Stream(id_, name, direction, next_seq, first_seq, rows, size, next_seq)
            for identity, at in w.execute(
                "SELECT identity, id FROM seen WHERE id BETWEEN ? AND ? ORDER BY id", (base, base | SEQ_MASK)
            ):
                stream.seen[identity] = at
            self._adopt(stream)
        for id_, stream_id, name, kind, position in w.execute("SELECT id, stream, name, kind, position FROM cursor"):
            self._by_id[stream_id].cursors[name] = Cursor(id_, name, kind, position, position)
        (self.dead_count,) = w.execute("SELECT count(*) FROM dead").fetchone()
        (self.loss_count,) = w.execute("SELECT coalesce(sum(messages), 0) FROM loss_total").fetchone()
        w.execute("BEGIN IMMEDIATE")
        w.execute("INSERT OR REPLACE INTO meta VALUES ('epoch', ?)", (str(self.epoch),))
        w.execute("INSERT OR REPLACE INTO meta VALUES ('age', ?)", (self._age.save(boottime_us),))
        w.execute("COMMIT")

    def _adopt(self, stream: Stream) -> None:
        self.streams[stream.name] = stream
        self._by_id[stream.id] = stream

    def close(self) -> None:
        """Commit what is pending, then close. Safe to call once only."""
        self.write_cursors()
        if self.pending:
            self.commit_now()
        self._r.close()
        try:
            self._w.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        finally:
            self._w.close()
            os.close(self._index_fd)
            self._lock.release()

    # ------------------------------------------------------------------ streams and cursors

    def stream(self, name: str, direction: str, limits: StreamLimits | None = None) -> Stream:
        """The stream of this name, made if it is new. Its limits are this process's, not the file's."""
        stream = self.streams.get(name)
        if stream is None:
            id_ = max(self._by_id, default=0) + 1
            if id_ >= schema.STREAMS_MAX:
                raise JournalError(f"more than {schema.STREAMS_MAX} streams")
            self._w.execute("INSERT INTO stream (id, name, direction) VALUES (?, ?, ?)", (id_, name, direction))
            # A second copy of the name, in another page, for the day that the first does not read (salvage).
            self._w.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (f"stream {id_}", f"{direction} {name}"))
            stream = Stream(id_, name, direction, 1, 1, 0, 0, 1)
            self._adopt(stream)
        elif stream.direction != direction:
            raise JournalError(
                f"stream {name} is {stream.direction} in this journal; give the {direction} one another name"
            )
        if limits is not None:
            stream.limits = limits
        return stream

    def cursor(self, stream: Stream, name: str, kind: str, *, volatile: bool = False) -> Cursor:
        """This consumer's cursor; a new one starts at what the stream holds for its first reader, else at its end."""
        cursor = stream.cursors.get(name)
        if cursor is not None:
            return cursor
        start = stream.next_seq if stream.cursors else stream.first_seq
        cursor = Cursor(0, name, kind, start, start, volatile)
        stream.cursors[name] = cursor
        if not volatile:
            self.pending.statements.append(
                (
                    "INSERT OR REPLACE INTO cursor (stream, name, kind, position) VALUES (?, ?, ?, ?)",
                    (stream.id, name, kind, start),
                )
            )
        return cursor

    def drop_cursor(self, stream: Stream, name: str) -> None:
        """Forget a consumer; what only it needed may go."""
        cursor = stream.cursors.pop(name, None)
        if cursor is not None:
            self.pending.cursors.pop(cursor, None)
            self._lazy.pop(cursor, None)
            if not cursor.volatile:
                self.execute("DELETE FROM cursor WHERE stream = ? AND name = ?", (stream.id, name))
            self.pending.touched[stream] = None

    def advance(self, stream: Stream, cursor: Cursor, position: int, *, lazily: bool = False) -> None:
        """Move a cursor forward; durable with the next commit. A cursor never moves back by this call.

        `lazily`: with the first commit after `write_cursors`, for consumers whose every step is not worth a sync.
        """
        if position > cursor.position:
            cursor.position = position
            if cursor.volatile:
                cursor.durable = position
            if lazily:
                self._lazy[cursor] = stream
                return
            self.pending.touched[stream] = None
            if not cursor.volatile:
                self.pending.cursors[cursor] = stream.id

    def write_cursors(self) -> None:
        """Have cursors that moved lazily written with the next commit."""
        for cursor, stream in self._lazy.items():
            self.pending.touched[stream] = None
            if not cursor.volatile and stream.cursors.get(cursor.name) is cursor:
                self.pending.cursors[cursor] = stream.id
        self._lazy.clear()

    # ------------------------------------------------------------------ appending

    def append(
        self,
        stream: Stream,
        topic: str,
        encode: Encode,
        payload: bytes,
        expires_age_us: int | None = None,
        identity: bytes | None = None,
    ) -> int:
        """Stage one message and return its seq. Durable only after the commit of `pending`.

        `encode(seq, payload)` makes the body. Raises JournalFull when the stream's limits say refuse; then nothing
        was staged and the seq is free.
        """
        if self.disk_full:
            raise JournalFull(stream.name, "the disk is full")
        seq = stream.next_seq
        body = encode(seq, payload)
        size = len(body)
        limits = stream.limits
        if stream.size_bytes + size > limits.bytes_max or stream.rows >= limits.messages_max:
            self._make_room(stream, size)
        id_ = stream.id << SEQ_BITS | seq
        appended = self._gains(stream, seq)
        appended.columns += (id_, self.wall_us, expires_age_us, topic, crc32(body), body)
        appended.size_bytes += size
        self.pending.size_bytes += size
        if identity is not None:
            stream.seen[identity] = id_
            appended.identities.append((identity, id_))
        stream.next_seq = seq + 1
        stream.rows += 1
        stream.size_bytes += size
        return seq

    def append_run(self, stream: Stream, topic: str, encode: Encode, payloads: list[bytes]) -> int:
        """Stage messages of one topic that never expire, as `append` would, each; return how many were staged.

        Fewer than all only where the stream or the disk is full, which `append` of the next one then explains.
        """
        limits = stream.limits
        rows_left = limits.messages_max - stream.rows
        if self.disk_full or rows_left <= 0:
            return 0
        bytes_left = limits.bytes_max - stream.size_bytes
        first = seq = stream.next_seq
        base = stream.id << SEQ_BITS
        wall_us = self.wall_us
        size = 0
        columns: list[Any] = []
        for payload in payloads[:rows_left] if rows_left < len(payloads) else payloads:
            body = encode(seq, payload)  # HOT: tests/bench measures it as intake
            size += len(body)
            if size > bytes_left:
                size -= len(body)
                break
            columns += (base | seq, wall_us, None, topic, crc32(body), body)
            seq += 1
        if seq == first:
            return 0
        appended = self._gains(stream, first)
        appended.columns += columns
        appended.size_bytes += size
        self.pending.size_bytes += size
        stream.next_seq = seq
        stream.rows += seq - first
        stream.size_bytes += size
        return seq - first

    def _gains(self, stream: Stream, seq: int) -> Appended:
        appended = self.pending.appended.get(stream)
        if appended is None:
            appended = self.pending.appended[stream] = Appended(seq)
        return appended

    def wait(self, waiter: Waiter, token: Any) -> None:
        """Have `waiter` told about the fate of everything staged so far."""
        waiting = self.pending.waiting
        tokens = waiting.get(waiter)
        if tokens is None:
            waiting[waiter] = [token]
        else:
            tokens.append(token)

    def wait_for(self, waiter: Waiter, token: Any, stream: Stream, identity: bytes) -> None:
        """As `wait`, about the message seen under this identity before: the commit that holds it may be under way."""
        batch = self.pending
        if self.under_way is not None and (appended := self.under_way.appended.get(stream)) is not None:
            seq = stream.seen[identity] & SEQ_MASK
            if appended.first_seq <= seq < appended.end_seq:
                batch = self.under_way
        batch.waiting.setdefault(waiter, []).append(token)

    def execute(self, statement: str, parameters: tuple[Any, ...] = ()) -> None:
        """Have a statement run inside the next commit (sessions, subscriptions)."""
        self.pending.statements.append((statement, parameters))

    def execute_with_rows(self, statement: str, parameters: tuple[Any, ...] = ()) -> None:
        """As `execute`, for what is true only if the messages of this batch are stored: it fails with them for good."""
        self.pending.with_rows.append((statement, parameters))

    def _make_room(self, stream: Stream, size: int) -> None:
        limits = stream.limits
        if size > limits.bytes_max:
            raise JournalFull(stream.name, f"a message of {size} bytes is larger than max_bytes {limits.bytes_max}")
        self._overrun_laggards(stream)
        if stream.size_bytes + size <= limits.bytes_max and stream.rows < limits.messages_max:
            return
        if limits.when_full is WhenFull.REFUSE:
            raise JournalFull(
                stream.name, f"full: {stream.rows} messages, {stream.size_bytes} of {limits.bytes_max} bytes"
            )
        # Room is made a sixteenth at a time, so that a full stream does not pay for a deletion every message.
        target_bytes = max(0, limits.bytes_max - limits.bytes_max // 16 - size)
        target_rows = max(0, limits.messages_max - max(1, limits.messages_max // 16))
        keep_from = self._drop_point(stream, target_bytes, target_rows)
        self.drop_before(stream, keep_from, "drop-oldest")
        if stream.size_bytes + size > limits.bytes_max or stream.rows >= limits.messages_max:
            raise JournalFull(stream.name, "full of messages that are being written this moment")

    def _overrun_laggards(self, stream: Stream) -> None:
        """A full stream is not held by readers that are far behind the foremost one: they lose, and the ledger says so.

        The uplink is never overrun: what the hub has not settled stays.
        """
        readers = [c for c in stream.cursors.values() if c.kind != "uplink"]
        if not readers:
            return
        others = [c.position for c in stream.cursors.values() if c.kind == "uplink"]
        foremost = min(others) if others else max(c.position for c in readers)
        for cursor in readers:
            if cursor.position < foremost:
                for seq, _, _, body in self.read_range(stream, cursor.position, foremost):
                    self.lose(stream.name, seq, "subscriber-behind", len(body), cursor.name)
                self.advance(stream, cursor, foremost)
        self._delete(stream, self.pending, all_of_it=True)

    def _drop_point(self, stream: Stream, bytes_left: int, rows_left: int) -> int:
        rows, size, seq = stream.rows, stream.size_bytes, stream.first_seq
        for row in self.read_range(stream, stream.first_seq, stream.committed):
            if size <= bytes_left and rows <= rows_left:
                break
            rows -= 1
            size -= len(row.body)
            seq = row.seq + 1
        return seq

    def drop_before(self, stream: Stream, seq: int, reason: str) -> None:
        """Give up everything before `seq`: a ledger row each, cursors moved past it."""
        for row in self.read_range(stream, stream.first_seq, seq):
            self.lose(stream.name, row.seq, reason, len(row.body))
        for cursor in stream.cursors.values():
            self.advance(stream, cursor, seq)
        self._delete(stream, self.pending, all_of_it=True, before=seq)

    # ------------------------------------------------------------------ losses and dead letters

    def lose(self, stream: str, seq: int, reason: str, size: int, detail: str = "") -> None:
        """Enter one message in the loss ledger, with the next commit."""
        self.loss_count += 1
        self.execute(
            "INSERT INTO loss (time_us, stream, seq, reason, size, detail) VALUES (?, ?, ?, ?, ?, ?)",
            (self.wall_us, stream, seq, reason, size, detail),
        )
        self.execute(
            "INSERT INTO loss_total VALUES (?1, ?2, 1, ?3) ON CONFLICT DO UPDATE SET "
            "messages = messages + 1, bytes = bytes + ?3",
            (stream, reason, size),
        )
        if self.loss_count % 1000 == 0:
            self.execute("DELETE FROM loss WHERE id <= (SELECT max(id) FROM loss) - ?", (LOSS_ROWS_MAX,))

    def bury(self, stream: Stream, row: Row, condition: str, description: str) -> None:
        """Keep a message that can't be delivered where people can see it and send it again."""
        self.dead_count += 1
        self.execute(
            "INSERT INTO dead (time_us, stream, seq, condition, description, topic, crc, body) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (
                self.wall_us,
                stream.name,
                row.seq,
                condition,
                description,
                row.topic,
                crc32(row.body),
                row.body,
            ),
        )
        self.lose(stream.name, row.seq, "dead-letter", len(row.body), condition)

    # ------------------------------------------------------------------ reading

    def read(self, stream: Stream, seq: int, rows_max: int, bytes_max: int = 1 << 20) -> list[Row]:
        """Committed rows from `seq` on, in order, at most `rows_max` and about `bytes_max`.

        Rows whose CRC does not fit are entered in the ledger and left out.
        """
        tail = stream.tail
        if tail and seq >= tail[0].first_seq:
            return _from_tail(tail, seq, rows_max, bytes_max)
        out: list[Row] = []
        size = 0
        base = stream.base
        limit = min(rows_max, READ_ROWS_MAX)
        try:
            cursor = self._r.execute(
                "SELECT id, topic, expires_age_us, crc, body FROM message WHERE id >= ? AND id < ? ORDER BY id",
                (base | seq, base | stream.committed),
            )
            for id_, topic, expires, crc, body in cursor:
                if crc32(body) != crc:
                    self.lose(stream.name, id_ & SEQ_MASK, "corrupt", len(body), "CRC of the row does not fit")
                    continue
                out.append(Row(id_ & SEQ_MASK, topic, expires, body))
                size += len(body)
                if size >= bytes_max or len(out) >= limit:
                    break
            cursor.close()
        except sqlite3.DatabaseError as error:
            raise self._damaged(error) from error
        return out

    def read_range(self, stream: Stream, start: int, end: int) -> Iterable[Row]:
        """Committed rows with start <= seq < end, read in bounded pieces."""
        while start < end:
            rows = self.read(stream, start, READ_ROWS_MAX)
            if not rows:
                return
            for row in rows:
                if row.seq >= end:
                    return
                yield row
            start = rows[-1].seq + 1

    def age_us(self) -> int:
        """Now, on the age clock, in microseconds."""
        return self._age.now_us(int(self._clock() * 1e6))

    def query(self, statement: str, parameters: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
        """Read committed rows of the small tables (sessions, dead letters)."""
        return self._r.execute(statement, parameters).fetchall()

    # ------------------------------------------------------------------ group commit

    def begin(self) -> None:
        """Stage the pending batch into a transaction, on the caller's thread.

        Raises JournalFull when the disk does not take it; then everybody waiting has been told already.
        """
        assert self.under_way is None, "one batch at a time"
        batch, self.pending = self.pending, Batch()
        self.under_way = batch
        self.wall_us = int(self._wall() * 1e6)
        ex = self._w.execute
        try:
            ex("BEGIN IMMEDIATE")
            for appended in batch.appended.values():
                columns = appended.columns
                at, end = 0, len(columns)
                for step, statement in _INSERTS:
                    while end - at >= step:
                        ex(statement, columns[at : at + step])
                        at += step
            for cursor, stream_id in batch.cursors.items():
                ex(
                    "UPDATE cursor SET position = ? WHERE stream = ? AND name = ?",
                    (cursor.position, stream_id, cursor.name),
                )
                batch.cursors[cursor] = cursor.position
            for statement, parameters in batch.statements:
                ex(statement, parameters)
            for statement, parameters in batch.with_rows:
                ex(statement, parameters)
            for stream, appended in batch.appended.items():
                batch.touched[stream] = None
                if appended.identities:
                    self._remember(stream, appended)
            for stream in batch.touched:
                deleted = self._delete(stream, None)
                if deleted or stream in batch.appended or stream in batch.deleted:
                    ex(
                        "UPDATE stream SET next_seq = ?, rows = ?, bytes = ? WHERE id = ?",
                        (stream.next_seq, stream.rows, stream.size_bytes, stream.id),
                    )
            self._save_age()
        except sqlite3.Error as error:
            raise self._failed(error) from error

    def commit(self) -> None:
        """Make the batch durable: the one call that waits for the disk. Any thread. Raises sqlite3.Error."""
        self._w.execute("COMMIT")

    def committed(self) -> Batch:
        """The commit came back: move what readers may see, then answer everybody who waits (promise P1)."""
        batch, self.under_way = self.under_way, None
        assert batch is not None
        for cursor, position in batch.cursors.items():
            cursor.durable = max(cursor.durable, position)
        for stream, appended in batch.appended.items():
            stream.committed = appended.end_seq
            stream.remember(Chunk(appended.first_seq, appended.columns, appended.size_bytes))
        for waiter, tokens in batch.waiting.items():
            waiter.committed(tokens)
        return batch

    def failed(self, error: sqlite3.Error) -> JournalFull | JournalError:
        """The commit did not come through: take everything back, tell everybody who waits, return what it was."""
        return self._failed(error)

    def commit_now(self) -> None:
        """begin, commit and committed in one go, for callers without a loop."""
        self.begin()
        try:
            self.commit()
        except sqlite3.Error as error:
            raise self._failed(error) from error
        self.committed()

    def checkpoint(self) -> None:
        """Copy committed pages from the WAL into the file where no reader is in the way. Between commits only."""
        try:
            self._w.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
        except sqlite3.DatabaseError as error:
            if _no_space(error):
                self._release_reserve()
                return
            raise self._damaged(error) from error

    def recover(self) -> None:
        """With the disk full: give back what the drained backlog freed, and take messages again once there is room.

        There is room when the reserve can be laid by again. Between commits only.
        """
        try:
            self._w.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
            self._w.execute(f"PRAGMA incremental_vacuum({VACUUM_PAGES})").fetchall()
            self._w.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        except sqlite3.DatabaseError as error:
            if not _no_space(error):
                raise self._damaged(error) from error
        if self._lay_by_reserve():
            # As much again has to be free, or the next batch would meet the same end.
            space = os.statvfs(self.state_dir)
            self.disk_full = space.f_bavail * space.f_frsize < self._reserve_bytes
            if self.disk_full:
                self._release_reserve()

    def reclaim(self) -> None:
        """Have rows that nobody needs deleted with the next commit, few as they may be."""
        for stream in self.streams.values():
            if stream.rows and stream.low() > stream.first_seq:
                self.pending.touched[stream] = None

    # A reserve is kept in a file of its own. Without it a full disk would be a trap: the rows that drain could not be
    # deleted, because a deletion, too, has to be written first.

    def _measure_reserve(self) -> None:
        space = os.statvfs(self.state_dir)
        self._reserve_bytes = min(RESERVE_BYTES_MAX, space.f_blocks * space.f_frsize // RESERVE_SHARE)
        self.wal_bytes_max = self._reserve_bytes // 2
        self.disk_full = not self._lay_by_reserve()

    def _lay_by_reserve(self) -> bool:
        path = self.state_dir / "reserve"
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(fd, 0, self._reserve_bytes)
        except OSError:
            os.ftruncate(fd, 0)
            return False
        finally:
            os.close(fd)
        return True

    def _release_reserve(self) -> None:
        self.disk_full = True
        with contextlib.suppress(FileNotFoundError):
            os.truncate(self.state_dir / "reserve", 0)

    def wal_bytes(self) -> int:
        """How much of the WAL is in use. Its file never shrinks, so the file's size would say "too large" for good.

        Read from the WAL index, whose header SQLite documents: page size and last valid frame.
        """
        try:
            page_bytes, frames = _WAL_INDEX.unpack(os.pread(self._index_fd, _WAL_INDEX.size, 0))
        except struct.error:
            return 0
        return int((page_bytes or 1 << 16) * frames)

    def _remember(self, stream: Stream, appended: Appended) -> None:
        ex = self._w.executemany
        ex(
            "INSERT INTO seen (id, identity) VALUES (?, ?)",
            [(at, identity) for identity, at in appended.identities],
        )
        over = len(stream.seen) - stream.limits.seen_max
        if over > 0:
            oldest = list(islice(stream.seen.items(), over))
            for identity, _ in oldest:
                del stream.seen[identity]
            self._w.execute("DELETE FROM seen WHERE id BETWEEN ? AND ?", (oldest[0][1], oldest[-1][1]))

    def _delete(
        self, stream: Stream, into: Batch | None, *, all_of_it: bool = False, before: int | None = None
    ) -> bool:
        """Remove rows that nobody needs any more, a bounded number a commit; whether there were any.

        With `into`, the deletion becomes part of that batch; without, it joins the transaction that is open.
        """
        low = min(stream.low() if before is None else before, stream.committed)
        if low - stream.first_seq < (1 if all_of_it or low >= stream.next_seq else DELETE_ROWS_MIN):
            return False
        if not all_of_it:
            low = min(low, stream.first_seq + (DELETE_ROWS_DISK_FULL if self.disk_full else DELETE_ROWS_MAX))
        span = (stream.base | stream.first_seq, stream.base | low)
        connection = self._w if into is None else self._r
        rows, size = connection.execute(
            "SELECT count(*), coalesce(sum(length(body)), 0) FROM message WHERE id >= ? AND id < ?", span
        ).fetchone()
        if into is None:
            self._w.execute("DELETE FROM message WHERE id >= ? AND id < ?", span)
        else:
            into.statements.append(("DELETE FROM message WHERE id >= ? AND id < ?", span))
            into.touched[stream] = into.deleted[stream] = None
        stream.rows -= rows
        stream.size_bytes -= size
        stream.first_seq = low
        stream.forget(low)
        return True

    def _save_age(self) -> None:
        boottime_us = int(self._clock() * 1e6)
        if boottime_us - self._age_saved_us > 1_000_000:
            self._age_saved_us = boottime_us
            self._w.execute("INSERT OR REPLACE INTO meta VALUES ('age', ?)", (self._age.save(boottime_us),))

    def _failed(self, error: sqlite3.Error) -> JournalFull | JournalError:
        if self._w.in_transaction:
            try:
                self._w.execute("ROLLBACK")
            except sqlite3.Error as second:
                error.add_note(f"and the rollback: {second}")
        batch, self.under_way = self.under_way, None
        assert batch is not None
        for stream, appended in batch.appended.items():
            for identity, _ in appended.identities:
                stream.seen.pop(identity, None)
        # What the file says now is the truth about rows and bytes; what is staged since comes on top.
        for stream in batch.touched | dict.fromkeys(batch.appended):
            self._recount(stream)
        for cursor, _ in batch.cursors.items():
            self.pending.cursors.setdefault(cursor, self._stream_of(cursor).id)
        self.pending.statements[:0] = [s for s in batch.statements if not s[0].startswith("DELETE FROM message")]
        self.pending.touched.update(batch.touched)
        code = getattr(error, "sqlite_errorname", "")
        if code in {"SQLITE_CORRUPT", "SQLITE_NOTADB"}:
            return self._damaged(error)
        if _no_space(error):
            self._release_reserve()
        full = JournalFull("*", f"the disk does not take it: {error}")
        for waiter, tokens in batch.waiting.items():
            waiter.failed(tokens, full)
        return full

    def _recount(self, stream: Stream) -> None:
        base = stream.base
        (rows, size, _), first = (
            self._w.execute("SELECT rows, bytes, next_seq FROM stream WHERE id = ?", (stream.id,)).fetchone(),
            self._w.execute("SELECT min(id) FROM message WHERE id BETWEEN ? AND ?", (base, base | SEQ_MASK)).fetchone()[
                0
            ],
        )
        staged = self.pending.appended.get(stream)
        stream.rows = rows + (staged.rows if staged else 0)
        stream.size_bytes = size + (staged.size_bytes if staged else 0)
        stream.first_seq = stream.committed if first is None else first & SEQ_MASK

    def _stream_of(self, cursor: Cursor) -> Stream:
        return next(s for s in self.streams.values() if s.cursors.get(cursor.name) is cursor)

    def _damaged(self, error: sqlite3.Error) -> JournalError:
        if getattr(error, "sqlite_errorname", "") not in {"SQLITE_CORRUPT", "SQLITE_NOTADB"}:
            return _explain(self.state_dir / "journal.db", error)
        (self.state_dir / SUSPECT).write_text(f"{error}\n")
        _sync_directory(self.state_dir)
        return JournalCorrupt(
            f"{self.state_dir / 'journal.db'}: {error}; the next start sets the file aside and salvages what reads"
        )


def _no_space(error: sqlite3.Error) -> bool:
    """SQLITE_FULL; some file systems let a write fail in other ways when they are full."""
    return getattr(error, "sqlite_errorname", "") in {"SQLITE_FULL", "SQLITE_IOERR_WRITE"}


def _from_tail(tail: deque[Chunk], seq: int, rows_max: int, bytes_max: int) -> list[Row]:
    """Rows from `seq` on out of the newest batches; at least one if there is any."""
    out: list[Row] = []
    size = 0
    at = len(tail) - 1
    while at and tail[at].first_seq > seq:
        at -= 1
    for chunk in (tail[i] for i in range(at, len(tail))):  # from the right: a deque's middle is slow to reach
        columns = chunk.columns
        start = max(0, seq - chunk.first_seq)
        for i in range(start * COLUMNS, len(columns), COLUMNS):
            body = columns[i + 5]
            out.append(Row(columns[i] & SEQ_MASK, columns[i + 3], columns[i + 2], body))
            size += len(body)
            if len(out) >= rows_max or size >= bytes_max:
                return out
    return out


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _explain(path: Path, error: sqlite3.Error) -> JournalError:
    name = getattr(error, "sqlite_errorname", "")
    advice = {
        "SQLITE_READONLY": "the file or its directory is read-only; make both writable by this user",
        "SQLITE_READONLY_DIRECTORY": "the directory is read-only; make it writable by this user",
        "SQLITE_CANTOPEN": "can't be opened; check that the directory exists and is writable by this user",
        "SQLITE_BUSY": "locked by another program; close it (a database browser, a backup) and start again",
        "SQLITE_LOCKED": "locked by another program; close it (a database browser, a backup) and start again",
        "SQLITE_FULL": "no space left; free some on this file system",
        "SQLITE_PERM": "no permission; make the file readable and writable by this user",
    }.get(name, "check the disk, then start again")
    return JournalError(f"{path}: {error} ({name or 'SQLite'}): {advice}")
