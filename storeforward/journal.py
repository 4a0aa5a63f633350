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
from pathlib import Path
from typing import Any, Protocol, TypeVar
from zlib import crc32

from storeforward import schema
from storeforward.age import AgeClock, boot_id
from storeforward.errors import JournalCorrupt, JournalError, JournalFull, JournalNewer
from storeforward.lock import StateLock
from storeforward.schema import SEQ_BITS, SEQ_MASK
from storeforward.space import Space, spend
from storeforward.streams import COLUMNS, SENDER_BYTES, Chunk, Cursor, Row, Stream, StreamLimits, WhenFull

ROWS_A_STATEMENT = 64

DELETE_ROWS_MAX = 4096
DELETE_ROWS_MIN = 256
READ_ROWS_MAX = 1024
STATEMENTS_DISK_FULL_MAX = 512
LOSS_DETAIL_CHARS_MAX = 200
# With this much free beside what a batch can cost, nobody has to look closer.
ROOM_BYTES_PLENTY = 64 << 20
ROW_BYTES = 64
FIXED_PAGES = 16
PAGES_A_STREAM = 4
BUSY_S = 5
SUSPECT = "journal.suspect"

_INSERT_HEAD = "INSERT INTO message (id, time_us, expires_age_us, topic, crc, body) VALUES "
_INSERT_ROW = "(?,?,?,?,?,?)"
_INSERT_LOSS = "INSERT INTO loss (time_us, stream, seq, reason, size, detail) VALUES (?, ?, ?, ?, ?, ?)"
# Rows a statement, and the statement: powers of two, so that a rest of any size needs few of them, all prepared.
_INSERTS = tuple(
    (COLUMNS << n, _INSERT_HEAD + ",".join([_INSERT_ROW] * (1 << n)))
    for n in range(ROWS_A_STATEMENT.bit_length() - 1, -1, -1)
)

# Of the WAL index' header and checkpoint information, which SQLite documents: page size, last valid frame, pages of
# the database as of that frame, frames already copied into the file.
_WAL_INDEX = struct.Struct("=14xHII72xI")

_K = TypeVar("_K")
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
    forgotten: list[tuple[bytes, int]] = field(default_factory=list)

    @property
    def rows(self) -> int:
        return len(self.columns) // COLUMNS

    @property
    def end_seq(self) -> int:
        """One past the last seq."""
        return self.first_seq + len(self.columns) // COLUMNS


@dataclass(slots=True)
class Batch:
    """Everything that one commit will make durable.

    `deleted`: rows before this seq go, though cursors may not say so. `revived`, `dropped`: dead letters that go,
    the former together with the rows they come back as. `totals`, `unnumbered`: losses, summed until they are written.
    `statements`: in the order they were asked for; True: only if the messages of this batch are stored.
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
        )


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
        self.space: Space
        self.disk_full = False
        self._index_fd = -1
        self._checkpoint_at_bytes = 0
        self._delete_bytes_left = 0
        self._losses_untrimmed = 0
        self._ledger_rows_full: int | None = None
        self._bad_rows: set[int] = set()
        self._wal_held = False
        self._few_as_they_may_be: set[Stream] = set()
        self.salvaged: str | None = None
        self.dead_count = 0
        self.loss_count = 0
        self.wall_us = self._wall_us()

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
                try:
                    journal = cls._open(state_dir, path, lock, synchronous, clock, wall)
                except sqlite3.OperationalError as error:
                    # Opening writes, too: epoch, WAL index. A full disk must not keep the backlog from draining.
                    if not (_no_space(error) and spend(state_dir)):
                        raise
                    journal = cls._open(state_dir, path, lock, synchronous, clock, wall)
            # UnicodeDecodeError: sqlite3 quotes what is damaged in its message, and it need not be text.
            except (JournalCorrupt, sqlite3.DatabaseError, UnicodeDecodeError) as error:
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
        new = not path.exists() or not path.stat().st_size
        writer = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=BUSY_S)
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
            # Debian's SQLite zeroes what it deletes: every deletion would cost its size in WAL again.
            writer.execute("PRAGMA secure_delete = OFF")
            schema.migrate(writer)
            if new:
                _sync_directory(state_dir)
            reader = sqlite3.connect(path, isolation_level=None, timeout=BUSY_S)
            reader.execute("PRAGMA query_only = ON")
            reader.execute("PRAGMA cache_size = -1024")
            journal = cls(state_dir, writer, reader, lock, clock, wall)
            try:
                journal._load()
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                raise JournalCorrupt(f"{path}: a value that makes no sense: {error!r}") from error
            journal.space = space = Space(state_dir)
            journal.disk_full = not space.laid_by or space.free_bytes() < space.delete_bytes
            journal._checkpoint_at_bytes = space.wal_bytes
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
            if last is not None and last & SEQ_MASK >= next_seq:
                raise ValueError(f"stream {name}: row {last & SEQ_MASK} is beyond its end")
            first_seq = next_seq if first is None else first & SEQ_MASK
            stream = Stream(id_, name, direction, next_seq, first_seq, rows, size, next_seq)
            for identity, at in w.execute(
                "SELECT identity, id FROM seen WHERE id BETWEEN ? AND ? ORDER BY id", (base, base | SEQ_MASK)
            ):
                stream.seen[identity] = at
                stream.remember_sender(identity)
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
        """Commit what is pending, then close. Safe to call once only.

        Raises JournalFull when the disk does not take even that; closed it is all the same.
        """
        self.write_cursors()
        try:
            if self.pending:
                self._commit_at_last()
        finally:
            self._r.close()
            try:
                # What does not fit into the file stays in the WAL, which the next start reads.
                with contextlib.suppress(sqlite3.OperationalError):
                    self._w.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            finally:
                self._w.close()
                os.close(self._index_fd)
                self._lock.release()

    def _commit_at_last(self) -> None:
        try:
            self.commit_now()
        except JournalFull:
            # Rows were taken back and their senders told; cursors and the ledger have the reserve.
            while self.pending:
                self.recover()
                self.commit_now()

    # ------------------------------------------------------------------ streams and cursors

    def stream(self, name: str, direction: str, limits: StreamLimits | None = None) -> Stream:
        """The stream of this name, made if it is new. Its limits are this process's, not the file's."""
        stream = self.streams.get(name)
        if stream is None:
            id_ = max(self._by_id, default=0) + 1
            if id_ >= schema.STREAMS_MAX:
                raise JournalError(f"more than {schema.STREAMS_MAX} streams")
            # With the next commit: a transaction may be under way, and the disk may be full.
            self.execute("INSERT INTO stream (id, name, direction) VALUES (?, ?, ?)", (id_, name, direction))
            # A second copy of the name, in another page, for the day that the first does not read (salvage).
            self.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (f"stream {id_}", f"{direction} {name}"))
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
        start = self.cursor_start(stream)
        cursor = Cursor(0, name, kind, start, start, volatile)
        stream.cursors[name] = cursor
        if not volatile:
            self.execute(
                "INSERT OR REPLACE INTO cursor (stream, name, kind, position) VALUES (?, ?, ?, ?)",
                (stream.id, name, kind, start),
            )
        return cursor

    def cursor_start(self, stream: Stream) -> int:
        """Where a new cursor begins. Of what local apps said to one another nothing is held for who was not there."""
        return stream.next_seq if stream.cursors or stream.direction == "local" else stream.first_seq

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
        self.pending.statements.append((statement, parameters, False))

    def execute_with_rows(self, statement: str, parameters: tuple[Any, ...] = ()) -> None:
        """As `execute`, for what is true only if the messages of this batch are stored: it fails with them for good."""
        self.pending.statements.append((statement, parameters, True))

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
        # Room is made a sixteenth at a time, so that a full stream does not pay for a deletion every message; and no
        # more than one commit may delete.
        target_bytes = max(0, limits.bytes_max - min(limits.bytes_max // 16, self.space.delete_bytes) - size)
        target_rows = max(0, limits.messages_max - max(1, min(limits.messages_max // 16, DELETE_ROWS_MAX)))
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
        """Enter one message in the loss ledger, with the next commit.

        Messages that never had a seq (0) share a row a commit: on a full disk they are many, and the ledger is bounded.
        """
        self.loss_count += 1
        detail = detail[:LOSS_DETAIL_CHARS_MAX]
        total = self.pending.totals.setdefault((stream, reason), [0, 0])
        total[0] += 1
        total[1] += size
        if not seq:
            sum_ = self.pending.unnumbered.setdefault((stream, reason, detail), [0, 0])
            sum_[0] += 1
            sum_[1] += size
            return
        self.execute(_INSERT_LOSS, (self.wall_us, stream, seq, reason, size, detail))
        self._losses_untrimmed += 1
        if self._losses_untrimmed >= self.space.ledger_rows_trim:
            self._trim_ledger()

    def _trim_ledger(self) -> None:
        """Bound the ledger's rows, oldest first; the totals stay. While the disk is full it grows by a little only."""
        self._losses_untrimmed = 0
        rows_max = self.space.ledger_rows
        if not self.disk_full:
            self._ledger_rows_full = None
        else:
            if self._ledger_rows_full is None:
                ((rows,),) = self.query("SELECT coalesce(max(id) - min(id) + 1, 0) FROM loss")
                self._ledger_rows_full = rows + self.space.ledger_rows_trim
            rows_max = min(rows_max, self._ledger_rows_full)
        self.execute("DELETE FROM loss WHERE id <= (SELECT max(id) FROM loss) - ?", (rows_max,))

    def _stage_losses(self, batch: Batch) -> None:
        ex = self._w.execute
        for (stream, reason), (messages, size) in batch.totals.items():
            ex(
                "INSERT INTO loss_total VALUES (?1, ?2, ?3, ?4) ON CONFLICT DO UPDATE SET "
                "messages = messages + ?3, bytes = bytes + ?4",
                (stream, reason, messages, size),
            )
        for (stream, reason, detail), (messages, size) in batch.unnumbered.items():
            text = detail if messages == 1 else f"{detail} ({messages} messages)".strip()
            ex(_INSERT_LOSS, (self.wall_us, stream, 0, reason, size, text))
        self._losses_untrimmed += len(batch.unnumbered)
        if self._losses_untrimmed >= self.space.ledger_rows_trim:
            self._trim_ledger()

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

    def revive(self, dead_id: int, stream: Stream, topic: str, body: bytes) -> bool:
        """Append a dead letter again and delete it, both or neither; False when it is on its way already.

        Raises JournalFull as `append` does.
        """
        if self._dead_is_going(dead_id):
            return False
        self.append(stream, topic, lambda seq, payload: payload, body)
        self.pending.revived[dead_id] = None
        self.dead_count -= 1
        return True

    def drop_dead(self, dead_id: int, stream: str, seq: int, size: int) -> bool:
        """Give a dead letter up, with a ledger row; False when it is on its way already."""
        if self._dead_is_going(dead_id):
            return False
        self.pending.dropped[dead_id] = None
        self.dead_count -= 1
        self.lose(stream, seq, "dropped-by-operator", size)
        return True

    def _dead_is_going(self, dead_id: int) -> bool:
        return any(b and (dead_id in b.revived or dead_id in b.dropped) for b in (self.pending, self.under_way))

    # ------------------------------------------------------------------ reading

    def read(self, stream: Stream, seq: int, rows_max: int, bytes_max: int = 1 << 20) -> list[Row]:
        """Committed rows from `seq` on, in order, at most `rows_max` and about `bytes_max`.

        Rows whose CRC does not fit are entered in the ledger and left out.
        """
        tail = stream.tail
        if tail and seq >= tail[0].first_seq:
            return _from_tail(tail, max(seq, stream.first_seq), rows_max, bytes_max)
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
            for id_, topic, expires, crc, body in cursor:
                if id_ < at_least:
                    raise _out_of_order(id_)
                at_least = id_ + 1
                if crc32(body) != crc:
                    if id_ not in self._bad_rows:  # every reader comes by here, and again after each reconnect
                        self._bad_rows.add(id_)
                        self.lose(stream.name, id_ & SEQ_MASK, "corrupt", len(body), "CRC of the row does not fit")
                    continue
                out.append(Row(id_ & SEQ_MASK, topic, expires, body))
                size += len(body)
                if size >= bytes_max or len(out) >= limit:
                    break
            cursor.close()
            if not out and seq < stream.committed:
                self._verify_gap(base | at_least & SEQ_MASK, base | stream.committed)
        except (TypeError, sqlite3.OperationalError) as error:
            # A flipped bit can make a column another type, or its text no UTF-8: that row is lost, not the daemon.
            if isinstance(error, sqlite3.OperationalError) and "decode" not in str(error):
                raise self._damaged(error) from error
            return self._read_carefully(stream, seq, limit, bytes_max)
        except sqlite3.DatabaseError as error:
            raise self._damaged(error) from error
        return out

    def _verify_gap(self, start: int, end: int) -> None:
        """Nothing was found between these ids: true only if nothing is found from the other end, either.

        A damaged id in the middle can look like the end, and the cursor would be moved over everything behind it.
        """
        row = self._r.execute("SELECT id FROM message WHERE id < ? ORDER BY id DESC LIMIT 1", (end,)).fetchone()
        if row is not None and row[0] >= start:
            raise _out_of_order(row[0])

    def _read_carefully(self, stream: Stream, seq: int, rows_max: int, bytes_max: int) -> list[Row]:
        out: list[Row] = []
        base = stream.base
        self._r.text_factory = bytes
        try:
            rows = self._r.execute(
                "SELECT id, topic, expires_age_us, crc, body FROM message WHERE id >= ? AND id < ? ORDER BY id LIMIT ?",
                (base | seq, base | stream.committed, rows_max),
            ).fetchall()
        except sqlite3.DatabaseError as error:
            raise self._damaged(error) from error
        finally:
            self._r.text_factory = str
        at_least = base | seq
        for id_, topic, expires, crc, body in rows:
            if id_ < at_least:
                raise self._damaged(_out_of_order(id_))
            at_least = id_ + 1
            try:
                text = topic.decode()
                whole = crc32(body) == crc and (expires is None or type(expires) is int)
            except (AttributeError, TypeError, UnicodeDecodeError):
                whole = False
            if whole:
                out.append(Row(id_ & SEQ_MASK, text, expires, body))
            elif id_ not in self._bad_rows:
                self._bad_rows.add(id_)
                size = len(body) if isinstance(body, bytes) else 0
                self.lose(stream.name, id_ & SEQ_MASK, "corrupt", size, "the row's columns make no sense")
        if rows and not out:
            return self.read(stream, (rows[-1][0] & SEQ_MASK) + 1, rows_max, bytes_max)
        return _within(out, bytes_max)

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

    def _wall_us(self) -> int:
        """For people only; held within what SQLite stores, whatever the clock believes."""
        return max(-(1 << 63), min(int(self._wall() * 1e6), (1 << 63) - 1))

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
        if batch.appended:
            self._admit(batch)
        elif self.disk_full:
            batch = self._first_part(batch)
            self._afford(batch)
        self.under_way = batch
        self.wall_us = self._wall_us()
        self._delete_bytes_left = self.space.delete_bytes_full if self.disk_full else self.space.delete_bytes
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
            for statement, parameters, _ in batch.statements:
                ex(statement, parameters)
            for cursor, stream_id in batch.cursors.items():  # after the statements: one may have made the cursor
                ex(
                    "UPDATE cursor SET position = ? WHERE stream = ? AND name = ?",
                    (cursor.position, stream_id, cursor.name),
                )
                batch.cursors[cursor] = cursor.position
            if batch.totals:
                self._stage_losses(batch)
            for dead_id in batch.revived | batch.dropped:
                ex("DELETE FROM dead WHERE id = ?", (dead_id,))
            for stream, before in batch.deleted.items():
                batch.touched[stream] = None
                ex("DELETE FROM message WHERE id >= ? AND id < ?", (stream.base, stream.base | before))
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

    def checkpoint_due(self) -> bool:
        """Whether the WAL has grown enough to be copied into the file."""
        return self.wal_bytes() > self._checkpoint_at_bytes

    def checkpoint(self) -> None:
        """Copy committed pages from the WAL into the file where no reader is in the way. Between commits only."""
        try:
            self._checkpoint("PASSIVE")
        except sqlite3.DatabaseError as error:
            if not _no_space(error):
                raise self._damaged(error) from error
            self.disk_full = True
            self.space.spend()

    def _checkpoint(self, mode: str) -> bool:
        """Whether everything was copied, so that the next commit starts the WAL from its beginning."""
        busy, frames, copied = self._w.execute(f"PRAGMA wal_checkpoint({mode})").fetchone()
        done = not busy and frames == copied
        # A reader that stays (a backup, a shell) holds it up; asking again at every commit would only cost syncs.
        self._checkpoint_at_bytes = self.space.wal_bytes + (0 if done else self.wal_bytes())
        return done

    # ------------------------------------------------------------------ a full disk

    # Two lines of defence. A batch with messages is let in only if the disk holds it twice, in the WAL and in the file,
    # so that our own messages never use up the room that a checkpoint needs. Where others fill the disk and a write
    # fails all the same, the reserve is spent on what must go on: cursors, the ledger, deletions, giving space back.

    def _admit(self, batch: Batch) -> None:
        size = batch.size_bytes + ROW_BYTES * sum(a.rows for a in batch.appended.values())
        pages = FIXED_PAGES + PAGES_A_STREAM * len(batch.appended)
        cost = size + size // 2 + pages * schema.PAGE_SIZE_BYTES
        free = self.space.free_bytes()
        if free > 2 * cost + ROOM_BYTES_PLENTY:
            return
        if self._room_bytes() >= 2 * cost:
            return
        self.disk_full = True
        self.space.ask(2 * cost)
        raise self._take_back(batch, f"the disk is full: {free} bytes free")

    def _afford(self, batch: Batch) -> None:
        """With the disk full, what is written must leave room, the reserve counted, to copy the WAL into the file.

        A reader that holds a snapshot keeps the WAL from being copied: cursors and the ledger can still be written for
        a while, deletions wait (they would only fill the WAL), and then all of it waits until the reader is gone.
        """
        size = sum(len(p) for _, parameters, _ in batch.statements for p in parameters if isinstance(p, (str, bytes)))
        cost = 2 * size + FIXED_PAGES * schema.PAGE_SIZE_BYTES
        if batch.touched and not self._wal_held:
            cost += 2 * self.space.delete_bytes_full
        reserve = self.space.reserve_bytes if self.space.laid_by else 0
        if self._room_bytes() + reserve < cost:
            raise self._take_back(batch, "the disk is full, and the reserve spent", keep_waiting=True)

    def _first_part(self, batch: Batch) -> Batch:
        """With the disk full, no more statements at a time than surely fit the reserve; the rest waits, in order.

        Cursors and deletions wait for the last of them: a cursor must not be past what the ledger does not have yet.
        """
        size = count = 0
        for _, parameters, _ in batch.statements[:STATEMENTS_DISK_FULL_MAX]:
            size += sum(len(p) for p in parameters if isinstance(p, (str, bytes)))
            if count and size > self.space.statement_bytes_full:
                break
            count += 1
        if count == len(batch.statements):
            return batch
        first = Batch(statements=batch.statements[:count])
        del batch.statements[:count]
        self.pending = batch
        return first

    def recover(self) -> bool:
        """With the disk full: give back what the drained backlog freed, and take messages again once there is room.

        Whether there is more to give back. Any thread, between commits only.
        """
        space = self.space
        more = False
        try:
            # Not to wait for a reader: nothing else could be committed meanwhile.
            self._w.execute("PRAGMA busy_timeout = 0")
            try:
                self._wal_held = bool(self.wal_bytes()) and not self._checkpoint("TRUNCATE")
                if not self._wal_held:
                    more = self._vacuum()
            finally:
                self._w.execute(f"PRAGMA busy_timeout = {BUSY_S * 1000}")
        except sqlite3.DatabaseError as error:
            if getattr(error, "sqlite_errorname", "").startswith("SQLITE_BUSY"):
                return False
            if not _no_space(error):
                raise self._damaged(error) from error
            return space.spend()
        if not space.laid_by and space.room_for_reserve():
            space.lay_by()
        if space.laid_by and self._room_bytes() >= space.intake_bytes:
            self.disk_full = False
        return more

    def _vacuum(self) -> bool:
        """Give a bounded number of free pages back to the file system; whether there are more."""
        (free,) = self._w.execute("PRAGMA freelist_count").fetchone()
        if not free:
            return False
        # By executescript, which steps to the end; execute() stops after the first page.
        self._w.executescript(f"PRAGMA incremental_vacuum({self.space.vacuum_pages})")
        self._checkpoint("TRUNCATE")
        return bool(free > self.space.vacuum_pages)

    def reclaim(self) -> None:
        """Have rows that nobody needs deleted with the next commit, few as they may be."""
        if self.disk_full and self._wal_held:
            return
        for stream in self.streams.values():
            if stream.rows and stream.low() > stream.first_seq:
                self._delete_with_next(stream)

    def _delete_with_next(self, stream: Stream) -> None:
        self.pending.touched[stream] = None
        self._few_as_they_may_be.add(stream)

    def _room_bytes(self) -> int:
        """What is free, less what the file still grows by when the WAL is copied into it.

        What can be written to the WAL without making its file longer counts as free.
        """
        page_bytes, frames, pages, copied = self._wal_index()
        growth = max(0, pages * page_bytes - (self.state_dir / "journal.db").stat().st_size)
        used = 0 if frames == copied else frames * page_bytes
        slack = max(0, (self.state_dir / "journal.db-wal").stat().st_size - used)
        return self.space.free_bytes() + slack - growth

    def _wal_index(self) -> tuple[int, int, int, int]:
        try:
            page_bytes, frames, pages, copied = _WAL_INDEX.unpack(os.pread(self._index_fd, _WAL_INDEX.size, 0))
        except struct.error:
            return 0, 0, 0, 0
        return page_bytes or 1 << 16, frames, pages, copied

    def wal_bytes(self) -> int:
        """How much of the WAL is in use. Its file never shrinks, so the file's size would say "too large" for good."""
        page_bytes, frames, _, _ = self._wal_index()
        return page_bytes * frames

    def _remember(self, stream: Stream, appended: Appended) -> None:
        ex = self._w.executemany
        ex(
            "INSERT INTO seen (id, identity) VALUES (?, ?)",
            [(at, identity) for identity, at in appended.identities],
        )
        for identity, _ in appended.identities:
            stream.remember_sender(identity)
        appended.forgotten = stream.forget_oldest({identity[:SENDER_BYTES] for identity, _ in appended.identities})
        if appended.forgotten:
            ex("DELETE FROM seen WHERE id = ?", [(at,) for _, at in appended.forgotten])

    def _delete(
        self, stream: Stream, into: Batch | None, *, all_of_it: bool = False, before: int | None = None
    ) -> bool:
        """Remove rows that nobody needs any more, a bounded number a commit; whether there were any.

        With `into`, the deletion becomes part of that batch; without, it joins the transaction that is open.
        """
        if self.disk_full and self._wal_held and not all_of_it:
            return False
        low = min(stream.low() if before is None else before, stream.committed)
        # A few are left for later, unless they are the last or room is short: each commit that deletes costs pages.
        # The last is not next_seq - 1: a batch that was taken back leaves a gap.
        staged = stream in self.pending.appended or (self.under_way is not None and stream in self.under_way.appended)
        last = low >= stream.committed and not staged
        few = all_of_it or last or stream in self._few_as_they_may_be
        if low - stream.first_seq < (1 if few else DELETE_ROWS_MIN):
            return False
        self._few_as_they_may_be.discard(stream)
        end = low
        if not all_of_it:
            low = min(low, stream.first_seq + DELETE_ROWS_MAX)
        connection = self._w if into is None else self._r
        while True:
            span = (stream.base | stream.first_seq, stream.base | low)
            rows, size = connection.execute(
                "SELECT count(*), coalesce(sum(length(body)), 0) FROM message WHERE id >= ? AND id < ?", span
            ).fetchone()
            left = self._delete_bytes_left
            if all_of_it or size <= left or low - stream.first_seq == 1:
                break
            if left <= 0:
                self._delete_with_next(stream)
                return False
            low = stream.first_seq + max(1, min((low - stream.first_seq) * left // size, (low - stream.first_seq) // 2))
        if low < end:
            self._delete_with_next(stream)
        if into is None:
            self._delete_bytes_left -= size
            self._w.execute("DELETE FROM message WHERE id >= ? AND id < ?", span)
        else:
            into.deleted[stream] = max(low, into.deleted.get(stream, 0))
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
        code = getattr(error, "sqlite_errorname", "")
        if code in {"SQLITE_CORRUPT", "SQLITE_NOTADB"}:
            return self._damaged(error)
        no_space = _no_space(error)
        if no_space:
            self.disk_full = True
            self.space.spend()
        try:
            return self._take_back(batch, f"the disk does not take it: {error}", keep_waiting=no_space)
        except JournalError as second:
            return second

    def _take_back(self, batch: Batch, reason: str, *, keep_waiting: bool = False) -> JournalFull:
        """Undo in memory what `batch` did, tell everybody who waits, and stage again what is not about new messages.

        With `keep_waiting`, who waits for a batch without messages is not told: all of it is tried again.
        """
        pending = self.pending
        for stream, appended in batch.appended.items():
            for identity, _ in appended.identities:
                stream.seen.pop(identity, None)
            stream.take_back(appended.identities, appended.forgotten)
        self.dead_count += len(batch.revived)
        for dead_id in batch.dropped:
            pending.dropped.setdefault(dead_id)
        for key, sums in batch.totals.items():
            _add(pending.totals, key, sums)
        for which, sums in batch.unnumbered.items():
            _add(pending.unnumbered, which, sums)
        again = keep_waiting and not batch.appended
        pending.statements[:0] = [each for each in batch.statements if again or not each[2]]
        # The seqs are spent: a new cursor or subscription may count from behind them. After a restart they must not
        # be given to messages that it would then take for old ones.
        for stream in batch.appended:
            spent = "UPDATE stream SET next_seq = max(next_seq, ?) WHERE id = ?"
            pending.statements.insert(0, (spent, (stream.next_seq, stream.id), False))
        for cursor in batch.cursors:
            owner = next((s for s in self.streams.values() if s.cursors.get(cursor.name) is cursor), None)
            if owner is not None:  # else dropped meanwhile
                pending.cursors.setdefault(cursor, owner.id)
        pending.touched.update(batch.touched)
        for stream in batch.touched | batch.appended | batch.deleted:
            before = max(batch.deleted.get(stream, 0), pending.deleted.pop(stream, 0))
            self._recount(stream)
            if before:
                self._delete(stream, pending, all_of_it=True, before=before)
        full = JournalFull("*", reason)
        if again:
            later, pending.waiting = pending.waiting, batch.waiting
            for waiter, tokens in later.items():
                pending.waiting.setdefault(waiter, []).extend(tokens)
        else:
            for waiter, tokens in batch.waiting.items():
                waiter.failed(tokens, full)
        return full

    def _recount(self, stream: Stream) -> None:
        """What the file says is the truth about rows and bytes; what is staged since comes on top."""
        span = (stream.base, stream.base | SEQ_MASK)
        try:
            row = self._w.execute("SELECT rows, bytes FROM stream WHERE id = ?", (stream.id,)).fetchone()
            (first,) = self._w.execute("SELECT min(id) FROM message WHERE id BETWEEN ? AND ?", span).fetchone()
        except sqlite3.DatabaseError as error:
            raise self._damaged(error) from error
        rows, size = row or (0, 0)  # none: the stream itself waits to be written
        staged = self.pending.appended.get(stream)
        stream.rows = rows + (staged.rows if staged else 0)
        stream.size_bytes = size + (staged.size_bytes if staged else 0)
        stream.first_seq = stream.committed if first is None else first & SEQ_MASK

    def _damaged(self, error: sqlite3.Error) -> JournalError:
        if getattr(error, "sqlite_errorname", "") not in {"SQLITE_CORRUPT", "SQLITE_NOTADB"}:
            return _explain(self.state_dir / "journal.db", error)
        (self.state_dir / SUSPECT).write_text(f"{error}\n")
        _sync_directory(self.state_dir)
        return JournalCorrupt(
            f"{self.state_dir / 'journal.db'}: {error}; the next start sets the file aside and salvages what reads"
        )


def _no_space(error: sqlite3.Error) -> bool:
    """SQLITE_FULL; a quota, and some file systems when they are full, let a write or the WAL index fail otherwise."""
    return getattr(error, "sqlite_errorname", "") in {"SQLITE_FULL", "SQLITE_IOERR_WRITE", "SQLITE_IOERR_SHMSIZE"}


def _add(sums: dict[_K, list[int]], key: _K, more: list[int]) -> None:
    sum_ = sums.setdefault(key, [0, 0])
    sum_[0] += more[0]
    sum_[1] += more[1]


def _out_of_order(id_: int) -> sqlite3.DatabaseError:
    """A page of another place, whole in itself: SQLite does not notice, and reading on after it would go round."""
    error = sqlite3.DatabaseError(f"row {id_} is in the wrong place")
    error.sqlite_errorname = "SQLITE_CORRUPT"
    return error


def _within(rows: list[Row], bytes_max: int) -> list[Row]:
    size = 0
    for n, row in enumerate(rows):
        size += len(row.body)
        if size >= bytes_max:
            return rows[: n + 1]
    return rows


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
        "SQLITE_IOERR_SHMSIZE": "no space left; free some on this file system",
        "SQLITE_PERM": "no permission; make the file readable and writable by this user",
    }.get(name, "check the disk, then start again")
    return JournalError(f"{path}: {error} ({name or 'SQLite'}): {advice}")
