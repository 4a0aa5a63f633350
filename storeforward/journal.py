"""The journal: streams of messages in one SQLite file, written by group commit.

Callers append on their own thread; what they append gathers in memory. `begin` stages all of it into a transaction,
`commit` makes it durable and may run in another thread, `committed` or `failed` tells everybody who waits.
Only one batch is under way at a time (`batch`); reading goes through a second connection that sees committed rows only
(`reading`), and what the file itself needs is `opening`'s business.
Knows no network, no asyncio, no encoding: bodies are opaque bytes with a CRC.
"""

from __future__ import annotations

import os
import secrets
import sqlite3
import time
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from zlib import crc32

from storeforward import schema
from storeforward.age import AgeClock, boot_id, clock_synchronised
from storeforward.batch import Appended, Batch, Waiter
from storeforward.errors import JournalCorrupt, JournalError, JournalFull
from storeforward.lock import StateLock
from storeforward.opening import abandon, close_file, damaged, is_damage, open_file, open_or_salvage
from storeforward.reading import READ_ROWS_MAX, Reading, from_tail
from storeforward.room import Room, takes_nothing
from storeforward.schema import MOVED, SEQ_BITS, SEQ_MASK
from storeforward.sealing import (
    CRC_MASK,
    EXPIRY,
    FOLLOWS,
    HIDDEN,
    META,
    PLAIN,
    SPREAD,
    Seal,
    about_dead,
    checksum,
    key_id,
)
from storeforward.space import Space
from storeforward.streams import SENDER_BYTES, Chunk, Cursor, Row, Stream, StreamLimits, WhenFull
from storeforward.unwritten import BYTES_MAX, SEQS_RESERVED, Offered, Unwritten

DELETE_ROWS_MAX = 4096
DELETE_ROWS_MIN = 256
LEFT_BYTES_MAX = 256 << 10
HOLES_MAX = 16  # remembered of a stream: seqs that were reserved when a run ended without giving them back
LOSS_DETAIL_CHARS_MAX = 200
AGE_SAVED_US = 10_000_000  # a power cut takes that much of messages' age back at most: they live so much longer

_INSERT_LOSS = "INSERT INTO loss (time_us, stream, seq, reason, size, detail) VALUES (?, ?, ?, ?, ?, ?)"
# Of a row as it is staged; whether the first of a batch follows is seen when it is written.
_ROW = PLAIN | FOLLOWS

Encode = Callable[[int, bytes], bytes]


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
        synchronised: Callable[[], bool],
        seal: Seal | None = None,
    ) -> None:
        self.state_dir = state_dir
        self.seal = seal
        self._w = writer
        self._r = reader
        self._reading = Reading(reader, self.opened, self.lose, self._damaged)
        self._lock = lock
        self._clock = clock
        self._wall = wall
        self._synchronised = synchronised
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
        self._room: Room
        self._index_fd = -1
        self._delete_bytes_left = 0
        self._losses_untrimmed = 0
        self._ledger_rows_full: int | None = None
        self._few_as_they_may_be: set[Stream] = set()
        # Streams whose messages may be held unwritten; and of whoever appends just now: to which of them, and whether
        # something of it has to be written.
        self._holding: list[Stream] = []
        self._held_for: Stream | None = None
        self._staged = False
        self._answers: deque[tuple[Waiter, Any, bool]] = deque()
        self.holds = True
        # Called when `turn` has something to do; the owner sets it.
        self.on_stir: Callable[[], None] = lambda: None
        # Called when reading met damage, whoever read: the file is not to be used on. The owner sets it.
        self.on_damage: Callable[[JournalError], None] = lambda error: None
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
        synchronised: Callable[[], bool] = clock_synchronised,
        seal: Seal | None = None,
    ) -> Journal:
        """Lock `state_dir`, open or create its journal, start a new epoch.

        `clock`: seconds since the boot, suspend included; `synchronised`: whether `wall` is right. `seal`: encrypts
        what is written from now on, and opens what was encrypted; without the keys that this takes nothing is touched.

        A damaged file is set aside whole and what reads of it is salvaged into a fresh one: `salvaged` then says what
        happened. Raises JournalLocked, JournalNewer or JournalError, each saying what to do.
        """
        lock = StateLock(state_dir)
        try:
            journal, report = open_or_salvage(
                state_dir, lambda: cls._open(state_dir, lock, synchronous, clock, wall, synchronised, seal)
            )
        except BaseException:
            lock.release()
            raise
        journal.salvaged = report
        return journal

    @classmethod
    def _open(
        cls,
        state_dir: Path,
        lock: StateLock,
        synchronous: str,
        clock: Callable[[], float],
        wall: Callable[[], float],
        synchronised: Callable[[], bool],
        seal: Seal | None,
    ) -> Journal:
        writer, reader = open_file(state_dir, synchronous)
        try:
            journal = cls(state_dir, writer, reader, lock, clock, wall, synchronised, seal)
            try:
                journal._load()
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                path = state_dir / "journal.db"
                raise JournalCorrupt(f"{path}: a value that makes no sense: {error!r}") from error
            journal.space = Space(state_dir)
            # Held until after SQLite has closed the file: closing any descriptor of it would drop SQLite's own locks
            # on it, and another process could then take the WAL for abandoned.
            journal._index_fd = os.open(state_dir / "journal.db-shm", os.O_RDONLY | os.O_CLOEXEC)
            journal._room = Room(state_dir, writer, journal._index_fd, journal.space)
        except BaseException:
            abandon(writer, reader)
            raise
        return journal

    def _load(self) -> None:
        w = self._w
        meta = dict(w.execute("SELECT key, value FROM meta"))
        if MOVED in meta:
            raise JournalError(
                f"{self.state_dir}: this journal was handed over as {meta[MOVED].partition(' ')[2]}, and what waits "
                "in it is sent from there; `lineside restore` takes a backup in its place, or move the directory away"
            )
        self._check_keys({key.removeprefix(META) for key in meta if key.startswith(META)})
        boottime_us = int(self._clock() * 1e6)
        self._age = AgeClock.resume(meta.get("age"), boot_id(), boottime_us, self._right_wall_us())
        self.epoch = int(meta.get("epoch", "0")) + 1
        holes: dict[str, str] = {}
        # The random part keeps identities apart even when an old copy of the journal is restored.
        self.epoch_token = f"{self.epoch:x}.{secrets.token_hex(3)}"
        for id_, name, direction, next_seq, rows, size, begin, written in w.execute(
            "SELECT id, name, direction, next_seq, rows, bytes, first_seq, written FROM stream"
        ).fetchall():
            base = id_ << schema.SEQ_BITS
            first, last = w.execute(
                "SELECT (SELECT min(id) FROM message WHERE id BETWEEN ?1 AND ?2), "
                "(SELECT max(id) FROM message WHERE id BETWEEN ?1 AND ?2)",
                (base, base | SEQ_MASK),
            ).fetchone()
            if last is not None and last & SEQ_MASK >= next_seq:
                raise ValueError(f"stream {name}: row {last & SEQ_MASK} is beyond its end")
            if written is not None:
                self._miss_none(name, first, last, rows, begin, written)
            first_seq = next_seq if first is None else first & SEQ_MASK
            if meta.pop(f"reserved {id_}", None) is not None:
                # The last run did not give back what it had reserved: salvage must not take these seqs for lost rows.
                never = f"{1 if last is None else (last & SEQ_MASK) + 1}-{next_seq}"
                kept = meta.get(f"holes {id_}", "").split()[1 - HOLES_MAX :]
                holes[f"holes {id_}"] = " ".join([*kept, never])
            stream = Stream(id_, name, direction, next_seq, first_seq, rows, size, next_seq, old_end=next_seq)
            stream.written = written or (0 if last is None else (last & SEQ_MASK) + 1)
            for identity, at in w.execute(
                "SELECT identity, id FROM seen WHERE id BETWEEN ? AND ? ORDER BY id", (base, base | SEQ_MASK)
            ):
                stream.seen[identity] = at
                stream.remember_sender(identity)
            self._adopt(stream)
        for id_, stream_id, name, kind, position in w.execute("SELECT id, stream, name, kind, position FROM cursor"):
            stream = self._by_id[stream_id]
            if position > stream.next_seq:
                raise ValueError(f"stream {stream.name}: cursor {name} is at {position}, beyond its end")
            # Over messages that were never written a cursor moves in memory only. Before the first row is nothing.
            position = max(position, stream.first_seq)
            stream.cursors[name] = Cursor(id_, name, kind, position, position)
        (self.dead_count,) = w.execute("SELECT count(*) FROM dead").fetchone()
        (self.loss_count,) = w.execute("SELECT coalesce(sum(messages), 0) FROM loss_total").fetchone()
        w.execute("BEGIN IMMEDIATE")
        w.execute("INSERT OR REPLACE INTO meta VALUES ('epoch', ?)", (str(self.epoch),))
        w.execute("INSERT OR REPLACE INTO meta VALUES ('age', ?)", (self._saved_age(boottime_us),))
        if self.seal is not None:
            # Before anything is sealed under it: a start without the key must know that it is needed.
            w.execute("INSERT OR REPLACE INTO meta VALUES (?, '')", (META + self.seal.ids[0],))
        if holes:
            w.executemany("INSERT OR REPLACE INTO meta VALUES (?, ?)", list(holes.items()))
            w.executemany("DELETE FROM meta WHERE key = ?", [(key.replace("holes", "reserved"),) for key in holes])
        w.execute("COMMIT")

    def _miss_none(self, name: str, first: int | None, last: int | None, rows: int, begin: int, written: int) -> None:
        """Raises ValueError where rows have vanished from either end of a stream, as a flipped bit in a page can do."""
        if first is None or last is None or not rows:
            if first is not None or rows:
                raise ValueError(f"stream {name}: {rows} rows, of which {'none' if first is None else 'one'} is there")
            return
        if (last & SEQ_MASK) + 1 != written:
            raise ValueError(f"stream {name}: its last row should be {written - 1}, and is {last & SEQ_MASK}")
        if first & SEQ_MASK != begin:
            (crc,) = self._w.execute("SELECT crc FROM message WHERE id = ?", (first,)).fetchone()
            if first & SEQ_MASK < begin or crc & FOLLOWS:
                raise ValueError(f"stream {name}: its first row should be {begin}, and is {first & SEQ_MASK}")

    def _check_keys(self, needed: set[str]) -> None:
        missing = sorted(needed - set(() if self.seal is None else self.seal.ids))
        if missing:
            raise JournalError(
                f"{self.state_dir / 'journal.db'}: encrypted under key {', '.join(missing)}, which is not among "
                "encryption_keys of [gateway]; name its file there (after the new one, if it was replaced). Nothing "
                "was changed. Without that key its messages are lost: then move the state directory away"
            )

    def _adopt(self, stream: Stream) -> None:
        self.streams[stream.name] = stream
        self._by_id[stream.id] = stream

    def close(self) -> None:
        """Commit what is pending, then close. Safe to call once only.

        Raises JournalFull when the disk does not take even that; closed it is all the same.
        """
        self.stop_holding()
        self.write_cursors()
        self.reclaim()
        for stream in self.streams.values():
            if stream.reserving:
                stream.reserving = 0
                self.execute("UPDATE stream SET next_seq = ? WHERE id = ?", (stream.next_seq, stream.id))
                self.execute("DELETE FROM meta WHERE key = ?", (f"reserved {stream.id}",))
        try:
            if self.pending:
                self._commit_at_last()
        finally:
            try:
                close_file(self._w, self._r)
            finally:
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
            self._room.has_urgent = any(each.limits.urgent for each in self.streams.values())
            self._hold_or_not(stream, limits.linger_s)
        return stream

    def cursor(self, stream: Stream, name: str, kind: str, *, volatile: bool = False) -> Cursor:
        """This consumer's cursor; a new one starts at what the stream holds for its first reader, else at its end."""
        cursor = stream.cursors.get(name)
        if cursor is not None:
            return cursor
        start = self.cursor_start(stream)
        self.write_held(stream)  # only the uplink reads what is not written
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
            if stream.unwritten is not None and stream.unwritten.rows and self._settled(stream, cursor, position):
                return
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
        *,
        written: bool = False,
    ) -> int:
        """Stage one message and return its seq. Durable only after the commit of `pending`.

        `encode(seq, payload)` makes the body. Raises JournalFull when the stream's limits say refuse; then nothing
        was staged and the seq is free. `written`: with `pending`, also where the stream's messages may be held.
        """
        if self._room.low and self.refuses(stream):
            raise JournalFull(stream.name, "the disk is full")
        seq = stream.next_seq
        body = encode(seq, payload)
        size = len(body)
        limits = stream.limits
        if stream.size_bytes + size > limits.bytes_max or stream.rows >= limits.messages_max:
            self._make_room(stream, size)
        id_ = stream.id << SEQ_BITS | seq
        appended = self._gains(stream, seq, 1, written or identity is not None)
        begin = crc32(topic.encode()) ^ stream.id * SPREAD ^ seq
        crc = crc32(body if expires_age_us is None else EXPIRY.pack(expires_age_us) + body, begin & CRC_MASK) | _ROW
        appended.columns += (id_, self.wall_us, expires_age_us, topic, crc, body)
        appended.size_bytes += size
        if self._held_for is not stream:
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
        if rows_left <= 0 or (self._room.low and self.refuses(stream)):
            return 0
        bytes_left = limits.bytes_max - stream.size_bytes
        first = seq = stream.next_seq
        base = stream.id << SEQ_BITS
        wall_us = self.wall_us
        begin = crc32(topic.encode()) ^ stream.id * SPREAD & CRC_MASK
        size = 0
        columns: list[Any] = []
        for payload in payloads[:rows_left] if rows_left < len(payloads) else payloads:
            body = encode(seq, payload)  # HOT: tests/bench measures it as intake
            size += len(body)
            if size > bytes_left:
                size -= len(body)
                break
            columns += (base | seq, wall_us, None, topic, crc32(body, begin ^ seq) | _ROW, body)
            seq += 1
        if seq == first:
            return 0
        appended = self._gains(stream, first, seq - first)
        appended.columns += columns
        appended.size_bytes += size
        if self._held_for is not stream:
            self.pending.size_bytes += size
        stream.next_seq = seq
        stream.rows += seq - first
        stream.size_bytes += size
        return seq - first

    def _gains(self, stream: Stream, seq: int, count: int, written: bool = False) -> Appended:
        if stream.unwritten is not None and self._may_hold(stream, stream.unwritten, seq, count, written):
            return self._hold(stream, stream.unwritten, seq)
        self._staged = True
        if self._held_for is stream:
            self._held_for = None
        appended = self.pending.appended.get(stream)
        if appended is None:
            appended = self.pending.appended[stream] = Appended(seq)
        return appended

    def wait(self, waiter: Waiter, token: Any) -> None:
        """Have `waiter` told about the fate of everything staged so far."""
        if self._holding and self._wait_for_hub(waiter, token):
            return
        waiting = self.pending.waiting
        tokens = waiting.get(waiter)
        if tokens is None:
            waiting[waiter] = [token]
        else:
            tokens.append(token)

    def tell(self, waiter: Waiter, token: Any) -> None:
        """Have `waiter` told behind what it waits for already, or at once: the token speaks of nothing that is staged.

        A refusal must be heard while the disk takes nothing, and no commit comes back.
        """
        owed = waiter in self.pending.waiting or (self.under_way is not None and waiter in self.under_way.waiting)
        owed = owed or any(who is waiter for who, _, _ in self._answers)
        if owed or any(s.unwritten is not None and waiter in s.unwritten.owing for s in self._holding):
            self.wait(waiter, token)
        else:
            waiter.committed([token])

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
        self._staged = True
        self.pending.statements.append((statement, parameters, False))

    def execute_with_rows(self, statement: str, parameters: tuple[Any, ...] = ()) -> None:
        """As `execute`, for what is true only if the messages of this batch are stored: it fails with them for good."""
        self._staged = True
        self.pending.statements.append((statement, parameters, True))

    def _make_room(self, stream: Stream, size: int) -> None:
        limits = stream.limits
        if size > limits.bytes_max:
            raise JournalFull(stream.name, f"a message of {size} bytes is larger than max_bytes {limits.bytes_max}")
        self.write_held(stream)
        self._delete(stream, self.pending, all_of_it=True)  # what nobody needs, and was left for later
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

    # ------------------------------------------------------------------ messages that the hub may settle unwritten

    # Who waits for such a message is answered from `turn`, when the uplink's cursor is past it. What has companions in
    # the file (a packet id of QoS 2, an identity, a request, something retained, a message to another stream in the
    # same breath) is written with them, and so is all that is held of its stream before it.

    def _hold_or_not(self, stream: Stream, linger_s: float | None) -> None:
        if linger_s is None:
            if stream.unwritten is not None:
                self.write_held(stream)
                stream.unwritten = None
                self._holding.remove(stream)
        elif stream.unwritten is None:
            # What is held may have to be written in one commit: no more of it than may be staged.
            stream.unwritten = Unwritten(linger_s, bytes_max=min(BYTES_MAX, self.space.pending_bytes))
            self._holding.append(stream)
        else:
            stream.unwritten.linger_s = linger_s

    def intake(self) -> None:
        """Who appends next is somebody else, and what was staged until now is no concern of its messages'."""
        self._held_for, self._staged = None, False

    def hold(self, stream: Stream, flows: bool, now: float) -> None:
        """The link tells whether it takes this stream's messages, and has sent all that was written of them."""
        held = stream.unwritten
        if held is not None:
            held.allow(flows, now)
            if not held.flows:
                self.write_held(stream)

    def stop_holding(self) -> None:
        """From now on everything is written, what is held first."""
        self.holds = False
        for stream in self._holding:
            self.write_held(stream)

    def _may_hold(self, stream: Stream, held: Unwritten, seq: int, count: int, written: bool) -> bool:
        flows = held.flows and self.holds and not written
        if held.rows:
            if flows and not held.full and seq + count <= stream.reserved:
                return True
            self.write_held(stream)  # first: what comes later must not be written before it
            return False
        # Messages that are staged already must stay before this one; those of a batch under way do.
        if not flows or stream in self.pending.appended or len(stream.cursors) != 1:
            return False
        if seq + count > stream.reserved:
            self._reserve(stream)
            return False
        held.begin(seq)
        return True

    def _hold(self, stream: Stream, held: Unwritten, seq: int) -> Appended:
        if self._held_for is not stream:
            if self._held_for is not None:  # one breath for two streams: whoever waits must not wait for both
                self.write_held(self._held_for)
                self._staged = True
            self._held_for = stream
        if held.fresh is None:
            held.fresh = Appended(seq)
            self.on_stir()
        return held.fresh

    def _reserve(self, stream: Stream) -> None:
        if self.under_way is None or stream not in self.under_way.reserved:
            self.pending.reserved.setdefault(stream, stream.next_seq + SEQS_RESERVED)

    def _wait_for_hub(self, waiter: Waiter, token: Any) -> bool:
        """Whether the token waits for messages that are held; if not, it is for the next commit."""
        stream, staged = self._held_for, self._staged
        self.intake()
        owed = next((s for s in self._holding if s.unwritten is not None and waiter in s.unwritten.owing), None)
        if stream is None or stream.unwritten is None or not stream.unwritten.rows:
            stream = owed
        if stream is None or staged or owed not in (None, stream):
            for each in (owed, stream):
                if each is not None:
                    self.write_held(each)
            self._answer_with_commit(waiter)
            return False
        assert stream.unwritten is not None
        stream.unwritten.wait(stream.next_seq, waiter, token)
        return True

    def _answer_with_commit(self, waiter: Waiter) -> None:
        """Answers that are due but not given yet come before what the next commit answers."""
        mine = [(token, with_commit) for who, token, with_commit in self._answers if who is waiter]
        if mine:
            self._answers = deque(each for each in self._answers if each[0] is not waiter)
            self._owe(self.pending, waiter, mine)

    @staticmethod
    def _owe(batch: Batch, waiter: Waiter, due: list[tuple[Any, bool]]) -> None:
        """Answer with this batch, in its turn, what the hub has settled."""
        batch.waiting.setdefault(waiter, []).extend(token for token, _ in due)
        batch.due.setdefault(waiter, []).extend(due)

    def _settled(self, stream: Stream, cursor: Cursor, position: int) -> bool:
        """The uplink is past messages that are held. Whether that is all: a cursor over rows has to be written, too."""
        held = stream.unwritten
        assert held is not None
        rows, size = held.settle(position)
        stream.rows -= rows
        stream.size_bytes -= size
        self._answers += held.answers()
        if self._answers:
            self.on_stir()
        if cursor.durable < held.start:
            return False
        cursor.position = cursor.durable = position
        if stream.first_seq >= held.start:
            stream.first_seq = position
        return True

    def write_held(self, stream: Stream) -> None:
        """Have what is held of a stream written with the next commit, and answered by it."""
        held = stream.unwritten
        if held is None or not held.rows:
            return
        assert stream not in self.pending.appended, "held messages come after all that is staged"
        first, columns, size, tokens, offered = held.take()
        if offered is not None:
            self.pending.offered[stream] = offered
        # Readable again once it is written.
        stream.committed = min(stream.committed, first)
        self.pending.appended[stream] = Appended(first, columns, size)
        self.pending.size_bytes += size
        for cursor in stream.cursors.values():
            if not cursor.volatile:
                self.pending.cursors[cursor] = stream.id
        for waiter in dict.fromkeys(waiter for waiter, _ in tokens):
            self._answer_with_commit(waiter)
        for waiter, token in tokens:
            self.pending.waiting.setdefault(waiter, []).append(token)
        if self._held_for is stream:
            self._held_for, self._staged = None, True
        self.on_stir()

    def _hold_again(self, stream: Stream, offered: Offered, batch: Batch) -> None:
        """The disk did not take what the hub may have seen: it keeps its place and its identity, in memory."""
        held = stream.unwritten
        if held is None or len(stream.cursors) != 1:
            return  # nobody may read what is not written
        for _, waiter, token in offered.tokens:
            batch.waiting[waiter].remove(token)
        held.put_back(offered)
        # What came behind it is refused, and no hub or reader has seen it: its seqs are free. With a gap, the next
        # message could not be staged behind what is held.
        stream.next_seq = offered.end_seq
        stream.committed = max(stream.committed, offered.end_seq)
        (cursor,) = stream.cursors.values()
        if cursor.position > offered.first_seq:  # settled while it was being written
            held.settle(cursor.position)
            self._answers += held.answers()
            self.on_stir()

    def turn(self, now: float) -> bool:
        """Answer whom the hub's settling answers, offer what is new, write what has lingered.

        Whether there is more to read. Called soon after `on_stir`, and at `turn_due`.
        """
        self._answer()
        offered = False
        for stream in self._holding:
            held = stream.unwritten
            assert held is not None
            if held.lingered(now):
                self.write_held(stream)
                continue
            if held.rows and stream.reserved - stream.next_seq < SEQS_RESERVED // 2:
                self._reserve(stream)
            end = held.offer(now, blocked=self.under_way is not None and stream in self.under_way.appended)
            if end is not None:
                stream.committed = end
                offered = True
        return offered

    def turn_due(self) -> float | None:
        """When the oldest message that is held has lingered long enough."""
        dues = [due for s in self._holding if s.unwritten is not None and (due := s.unwritten.due()) is not None]
        return min(dues, default=None)

    def _answer(self) -> None:
        """Give the answers that are due; behind those that a commit still owes the same waiter."""
        answers, self._answers = self._answers, deque()
        now: dict[Waiter, list[Any]] = {}
        for waiter, token, with_commit in answers:
            waits = waiter in self.pending.waiting or (self.under_way is not None and waiter in self.under_way.waiting)
            if with_commit or waits:
                self._owe(self.pending, waiter, [(token, with_commit)])
            else:
                now.setdefault(waiter, []).append(token)
        for waiter, tokens in now.items():
            waiter.committed(tokens)

    # ------------------------------------------------------------------ losses and dead letters

    def lose(self, stream: str, seq: int, reason: str, size: int, detail: str = "") -> None:
        """Enter one message in the loss ledger, with the next commit.

        Messages that never had a seq (0) share a row a commit: on a full disk they are many, and the ledger is bounded.
        """
        self.loss_count += 1
        self._staged = True
        if seq and self._holding and (about := self.streams.get(stream)) is not None and about.unwritten is not None:
            about.unwritten.ledger(seq)
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
        if not self._room.full:
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
        topic, crc, stored = self.stored(about_dead(stream.name, row.seq), row.seq, row.topic, row.body)
        self.execute(
            "INSERT INTO dead (time_us, stream, seq, condition, description, topic, crc, body) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (
                self.wall_us,
                stream.name,
                row.seq,
                condition,
                description,
                topic,
                crc,
                stored,
            ),
        )
        self.lose(stream.name, row.seq, "dead-letter", len(row.body), condition)

    def stored(self, about: bytes, id_: int, topic: str, body: bytes) -> tuple[str | bytes, int, bytes]:
        """A topic, its checksum and body as a row has them: sealed if this journal is encrypted."""
        if self.seal is None:
            return topic, checksum(id_, topic, body), body
        sealed, text = self.seal.seal_row(about, topic, body)
        return sealed, checksum(id_, sealed, text), text

    def opened(self, about: bytes, topic: str | bytes, body: bytes) -> tuple[str, bytes]:
        """The reverse. Raises ValueError for what does not open, JournalError for want of its key."""
        if isinstance(topic, str):
            return topic, body
        try:
            if self.seal is None:
                raise LookupError
            return self.seal.open_row(about, topic, body)
        except LookupError:
            self._check_keys({key_id(topic)})
            raise

    def in_ledger(self, topic: str) -> str:
        """A topic as the ledger may tell it: not at all where the journal is encrypted."""
        return topic if self.seal is None else HIDDEN

    def revive(self, dead_id: int, stream: Stream, topic: str, body: bytes) -> bool:
        """Append a dead letter again and delete it, both or neither; False when it is on its way already.

        Raises JournalFull as `append` does.
        """
        if self._dead_is_going(dead_id):
            return False
        self.append(stream, topic, lambda seq, payload: payload, body, written=True)
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

        Rows whose CRC does not fit are entered in the ledger and left out. What is held for the hub is read, too.
        """
        held = stream.unwritten
        if held is None or not held.chunks:
            return self._reading.rows(stream, seq, rows_max, bytes_max)
        rows = self._reading.rows(stream, seq, rows_max, bytes_max) if seq < held.first else []
        return rows or from_tail(held.chunks, max(seq, held.first), rows_max, bytes_max)

    def find(self, stream: Stream, seq: int) -> Row | None:
        """One message that was readable once, even if it is being written only now."""
        for row in self.read(stream, seq, 1):
            if row.seq == seq:
                return row
        for batch in (self.under_way, self.pending):
            appended = None if batch is None else batch.appended.get(stream)
            if appended is not None and (found := appended.row(seq)) is not None:
                return found
        return None

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
        try:
            return self._r.execute(statement, parameters).fetchall()
        except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
            raise self._damaged(error) from error

    # ------------------------------------------------------------------ group commit

    def begin(self) -> None:
        """Stage the pending batch into a transaction, on the caller's thread.

        Raises JournalFull when the disk does not take it; then everybody waiting has been told already.
        """
        assert self.under_way is None, "one batch at a time"
        batch, self.pending = self.pending, Batch()
        if batch.appended:
            self._admit(batch)
        elif self._room.full:
            batch = self._first_part(batch)
            self._afford(batch)
        self.under_way = batch
        self.wall_us = self._wall_us()
        self._delete_bytes_left = self.space.delete_bytes_full if self._room.full else self.space.delete_bytes
        ex = self._w.execute
        try:
            ex("BEGIN IMMEDIATE")
            # Deletions first: what they free is filled again in the same transaction, and each page written once.
            # (In WAL mode SQLite also writes pages that are merely freed.)
            for stream, before in batch.deleted.items():
                batch.touched[stream] = None
                ex("DELETE FROM message WHERE id >= ? AND id < ?", (stream.base, stream.base | before))
            for stream in batch.appended | batch.reserved:
                batch.touched[stream] = None
            written = batch.appended.keys() | batch.deleted.keys() | batch.reserved.keys()
            changed = [s for s in batch.touched if self._delete(s, None) or s in written]
            for stream, appended in batch.appended.items():
                appended.insert(self._w, self.seal, stream.written)
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
            for stream, appended in batch.appended.items():
                if appended.identities:
                    self._remember(stream, appended)
            for stream, reserved in batch.reserved.items():
                stream.reserving = max(stream.reserving, reserved)
                ex("INSERT OR REPLACE INTO meta VALUES (?, ?)", (f"reserved {stream.id}", str(stream.reserving)))
            for stream in changed:
                rows, size, held = stream.rows, stream.size_bytes, stream.unwritten
                if held is not None:
                    rows, size = rows - held.rows, size - held.size_bytes
                next_seq = max(stream.next_seq, stream.reserving)
                gained = batch.appended.get(stream)
                end = stream.written if gained is None else gained.end_seq
                ex(
                    "UPDATE stream SET next_seq = ?, rows = ?, bytes = ?, first_seq = ?, written = ? WHERE id = ?",
                    (next_seq, rows, size, stream.first_seq, end or None, stream.id),
                )
            self._save_age()
        except sqlite3.Error as error:
            raise self.failed(error) from error

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
            stream.committed = stream.written = appended.end_seq
            stream.remember(Chunk(appended.first_seq, appended.columns, appended.size_bytes))
        for stream, reserved in batch.reserved.items():
            stream.reserved = max(stream.reserved, reserved)
        for waiter, tokens in batch.waiting.items():
            waiter.committed(tokens)
        return batch

    def failed(self, error: sqlite3.Error) -> JournalFull | JournalError:
        """The commit did not come through: take everything back, tell everybody who waits, return what it was."""
        if self._w.in_transaction:
            try:
                self._w.execute("ROLLBACK")
            except sqlite3.Error as second:
                error.add_note(f"and the rollback: {second}")
        batch, self.under_way = self.under_way, None
        assert batch is not None
        if is_damage(error):
            return damaged(self.state_dir, error)
        full = takes_nothing(error)
        if full:
            self._room.found_none()
        try:
            return self._take_back(batch, f"the disk does not take it: {error}", keep_waiting=full)
        except JournalError as second:
            return second

    def commit_now(self) -> None:
        """begin, commit and committed in one go, for callers without a loop."""
        self.begin()
        try:
            self.commit()
        except sqlite3.Error as error:
            raise self.failed(error) from error
        self.committed()

    # ------------------------------------------------------------------ a full disk (storeforward/room.py decides)

    @property
    def disk_full(self) -> bool:
        """Whether messages are refused because the disk does not take them; those of urgent streams need not be."""
        return self._room.low

    @disk_full.setter
    def disk_full(self, full: bool) -> None:
        self._room.full = self._room.low = full

    def refuses(self, stream: Stream) -> bool:
        """Whether the disk's lack of room keeps messages out of this stream."""
        return self._room.full or (self._room.low and not stream.limits.urgent)

    def wal_bytes(self) -> int:
        """How much of the WAL is in use."""
        return self._room.wal_bytes()

    def checkpoint_due(self) -> bool:
        """Whether the WAL has grown enough to be copied into the file."""
        return self._room.checkpoint_due()

    def checkpoint(self) -> None:
        """Copy committed pages from the WAL into the file where no reader is in the way. Between commits only."""
        try:
            self._room.checkpoint("PASSIVE")
        except sqlite3.DatabaseError as error:
            if not takes_nothing(error):
                raise damaged(self.state_dir, error) from error
            self._room.found_none()

    def recover(self) -> bool:
        """With the disk full: give back what the drained backlog freed, and take messages again once there is room.

        Whether there is more to give back. Any thread, between commits only.
        """
        try:
            return self._room.recover()
        except sqlite3.DatabaseError as error:
            raise damaged(self.state_dir, error) from error

    def _admit(self, batch: Batch) -> None:
        refused = self._room.admit(batch.size_bytes, sum(a.rows for a in batch.appended.values()), len(batch.appended))
        if refused:
            raise self._take_back(batch, refused)

    def _afford(self, batch: Batch) -> None:
        refused = self._room.afford(batch.statements, deletes=bool(batch.touched))
        if refused:
            raise self._take_back(batch, refused, keep_waiting=True)

    def _first_part(self, batch: Batch) -> Batch:
        """With the disk full, no more statements at a time than surely fit the reserve; the rest waits, in order.

        Cursors and deletions wait for the last of them: a cursor must not be past what the ledger does not have yet.
        """
        count = self._room.statements_affordable(batch.statements)
        if count == len(batch.statements):
            return batch
        first = Batch(statements=batch.statements[:count])
        del batch.statements[:count]
        self.pending = batch
        return first

    def reclaim(self) -> None:
        """Have rows that nobody needs deleted with the next commit, few as they may be."""
        if self._room.full and self._room.wal_held:
            return
        for stream in self.streams.values():
            if stream.rows and stream.low() > stream.first_seq:
                self._delete_with_next(stream)

    def _delete_with_next(self, stream: Stream) -> None:
        self.pending.touched[stream] = None
        self._few_as_they_may_be.add(stream)

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
        if self._room.full and self._room.wal_held and not all_of_it:
            return False
        low = min(stream.low() if before is None else before, stream.committed)
        # A few are left for later, unless they are the last and large, or `reclaim` asked for them: each commit that
        # deletes costs pages. The last is not next_seq - 1: a batch that was taken back leaves a gap.
        staged = stream in self.pending.appended or (self.under_way is not None and stream in self.under_way.appended)
        last = low >= stream.committed and not staged and stream.size_bytes > LEFT_BYTES_MAX
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
        if boottime_us - self._age_saved_us > AGE_SAVED_US:
            self._age_saved_us = boottime_us
            self._w.execute("INSERT OR REPLACE INTO meta VALUES ('age', ?)", (self._saved_age(boottime_us),))

    def _saved_age(self, boottime_us: int) -> str:
        return self._age.save(boottime_us, self._right_wall_us())

    def _right_wall_us(self) -> int | None:
        return self._wall_us() if self._synchronised() else None

    def count_time_off(self) -> int:
        """Once the wall clock is known to be right, what was here before the boot is older by the time off.

        How many seconds that is, 0 if there is no news. Nothing that came since ages by it; sessions, wills, retained
        messages and requests, few as they are, do not either.
        """
        wall_us = None if self._age.before is None else self._right_wall_us()
        if wall_us is None:
            return 0
        night_us = self._reading.night_us = self._age.off_us(wall_us, int(self._clock() * 1e6))
        self._age = self._age.settled()
        return night_us // 1_000_000

    def _take_back(self, batch: Batch, reason: str, *, keep_waiting: bool = False) -> JournalFull:
        """Undo in memory what `batch` did, tell everybody who waits, and stage again what is not about new messages.

        Messages that were staged meanwhile are taken back with it: they must not be on disk before those (promise P2).
        With `keep_waiting`, who waits for a batch without messages is not told: all of it is tried again. What the hub
        may have seen is held again: refused, it would be sent to the hub a second time, as another message.
        """
        for stream in batch.appended:
            self.write_held(stream)  # what came since and is only held must not come before them, either
        if batch.appended and self.pending.appended:
            behind, self.pending = self.pending, Batch(reserved=self.pending.reserved)
            batch.absorb(behind)
        pending = self.pending
        for stream, appended in batch.appended.items():
            for identity, _ in appended.identities:
                stream.seen.pop(identity, None)
            stream.take_back(appended.identities, appended.forgotten)
        for stream, offered in batch.offered.items():
            self._hold_again(stream, offered, batch)
        self.dead_count += len(batch.revived)
        for dead_id in batch.dropped:
            pending.dropped.setdefault(dead_id)
        pending.add_losses(batch)
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
            since, pending.waiting = pending.waiting, batch.waiting
            for waiter, tokens in since.items():
                pending.waiting.setdefault(waiter, []).extend(tokens)
            owed, pending.due = pending.due, batch.due
            for waiter, due in owed.items():
                pending.due.setdefault(waiter, []).extend(due)
        else:
            for waiter, tokens in batch.waiting.items():
                self._refuse(waiter, tokens, deque(batch.due.get(waiter, ())), full)
        return full

    def _refuse(self, waiter: Waiter, tokens: list[Any], due: deque[tuple[Any, bool]], full: JournalFull) -> None:
        """Tell of a commit that failed, in order. What the hub has settled is no part of it, and answered all the same.

        Or, where the ledger is to say first what became of it, with the next commit.
        """
        refused: list[Any] = []
        for token in tokens:
            if not due or token is not due[0][0]:
                refused.append(token)
                continue
            settled = due.popleft()
            if settled[1]:
                self._owe(self.pending, waiter, [settled])
                continue
            if refused:
                waiter.failed(refused, full)
                refused = []
            waiter.committed([token])
        if refused:
            waiter.failed(refused, full)

    def _damaged(self, error: sqlite3.Error | UnicodeDecodeError) -> JournalError:
        """What reading met. If it is damage, the owner is told: a reader may be anybody, and would only try again."""
        found = damaged(self.state_dir, error)
        if isinstance(found, JournalCorrupt):
            self.on_damage(found)
        return found

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
        held = stream.unwritten
        if held is not None and held.rows:
            stream.rows += held.rows
            stream.size_bytes += held.size_bytes
            stream.first_seq = min(stream.first_seq, held.first)
