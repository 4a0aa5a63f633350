"""Answers about a journal, read from the file itself: with the daemon running, stopped or dead.

Opens the file read-only, holds no lock and never keeps a read transaction open between two answers, so that it
cannot stand in the daemon's way. Counts come from the counters that are kept with every commit, never from counting.
Knows nothing of what a message's bytes say, nor of who asks.
"""

from __future__ import annotations

import base64
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import sqlite_utils

from storeforward.errors import JournalCorrupt, JournalError, JournalNewer
from storeforward.schema import SEQ_BITS, SEQ_MASK, VERSION
from storeforward.sealing import HIDDEN, Seal, about_dead, about_row, intact, key_id

LIMIT_MAX = 1_000_000
EXPORT_CHUNK_ROWS = 256
BUSY_TIMEOUT_S = 2.0


@dataclass(frozen=True, slots=True)
class StreamSummary:
    """One stream by its counters. `waiting`: seqs between the slowest cursor and the end, some of which may be gone.

    `oldest_us` is the wall clock of the oldest row, as the machine believed it to be; None when there is none.
    """

    name: str
    direction: str
    rows: int
    bytes: int
    next_seq: int
    cursors: int
    waiting: int
    oldest_us: int | None


@dataclass(frozen=True, slots=True)
class MessageSummary:
    """One journaled message without its bytes. `size`: of the encoded message, in bytes."""

    stream: str
    seq: int
    time_us: int
    expires_age_us: int | None
    topic: str
    size: int


@dataclass(frozen=True, slots=True)
class StoredMessage:
    """One journaled message. `intact`: whether its bytes match the checksum they were stored with."""

    stream: str
    seq: int
    time_us: int
    expires_age_us: int | None
    topic: str
    intact: bool
    body: bytes


@dataclass(frozen=True, slots=True)
class DeadSummary:
    """One dead letter without its bytes. `id` is what requeue and drop ask for."""

    id: int
    time_us: int
    stream: str
    seq: int
    condition: str
    description: str
    topic: str
    size: int


@dataclass(frozen=True, slots=True)
class DeadMessage:
    """One dead letter."""

    id: int
    time_us: int
    stream: str
    seq: int
    condition: str
    description: str
    topic: str
    intact: bool
    body: bytes


@dataclass(frozen=True, slots=True)
class Loss:
    """One row of the loss ledger."""

    time_us: int
    stream: str
    seq: int
    reason: str
    size: int
    detail: str


@dataclass(frozen=True, slots=True)
class LossTotal:
    """All that a stream ever lost for one reason."""

    stream: str
    reason: str
    messages: int
    bytes: int


@dataclass(frozen=True, slots=True)
class CursorSummary:
    """One consumer's place: `position` is the first seq it has not finished with."""

    stream: str
    name: str
    kind: str
    position: int
    behind: int


@dataclass(frozen=True, slots=True)
class SessionSummary:
    """One stored MQTT session. `expiry_s` None: it never expires."""

    client_id: str
    expiry_s: int | None
    subscriptions: int


class Inspection:
    """A journal opened for reading. A context manager; use from one thread.

    `seal`: opens what is encrypted; what it can't open is told without topic and bytes. Raises JournalError
    (JournalNewer, JournalCorrupt) with one line that says what to do.
    """

    def __init__(self, state_dir: Path, seal: Seal | None = None) -> None:
        self._seal = seal
        self.path = state_dir / "journal.db"
        with self._explained():
            self._connection = open_journal(self.path)
            self._db = sqlite_utils.Database(self._connection)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._connection.close()

    # ------------------------------------------------------------------------------------------------- answers

    def meta(self) -> dict[str, str]:
        """What the journal says of itself: `epoch`, `age` and so on."""
        return {row["key"]: row["value"] for row in self._query("SELECT key, value FROM meta")}

    def streams(self) -> list[StreamSummary]:
        """Every stream, in the order they were made."""
        rows = self._query(
            f"""
            SELECT s.name, s.direction, s.rows, s.bytes, s.next_seq, count(c.id) AS cursors,
                   min(s.rows, s.next_seq - coalesce(min(c.position), s.next_seq - s.rows)) AS waiting,
                   (SELECT m.time_us FROM message m
                    WHERE m.id BETWEEN s.id << {SEQ_BITS} AND (s.id << {SEQ_BITS}) | {SEQ_MASK}
                    ORDER BY m.id LIMIT 1) AS oldest_us
            FROM stream s LEFT JOIN cursor c ON c.stream = s.id GROUP BY s.id ORDER BY s.id
            """
        )
        return [StreamSummary(**row) for row in rows]

    def backlog(self, stream: str, limit: int = 100, from_seq: int | None = None) -> list[MessageSummary]:
        """Up to `limit` messages in order, from `from_seq` or else from the first that somebody still waits for."""
        base = self._base(stream)
        if from_seq is None:
            from_seq = self._first_waiting(base)
        rows = self._query(
            "SELECT id, time_us, expires_age_us, topic, length(body) AS size, "
            "CASE typeof(topic) WHEN 'blob' THEN body END AS body FROM message "
            "WHERE id BETWEEN :low AND :high ORDER BY id LIMIT :limit",
            {
                "low": base | min(max(from_seq, 0), SEQ_MASK),
                "high": base | SEQ_MASK,
                "limit": _limit(limit),
            },
        )
        for row in rows:
            id_ = row.pop("id")
            row["seq"] = id_ & SEQ_MASK
            row["topic"] = self._opened(about_row(id_), row["topic"], row.pop("body"))[0]
        return [MessageSummary(stream=stream, **row) for row in rows]

    def show(self, stream: str, seq: int) -> StoredMessage:
        """One message with its bytes. Raises JournalError if the stream no longer, or not yet, holds it."""
        base = self._base(stream)
        rows = []
        if 0 <= seq <= SEQ_MASK:
            rows = self._query(
                "SELECT time_us, expires_age_us, topic, crc, body FROM message WHERE id = ?", [base | seq]
            )
        if not rows:
            raise JournalError(f"stream {stream} holds no message {seq}")
        return StoredMessage(
            stream=stream, seq=seq, **self._checked(rows[0], base | seq, about_row(base | seq), f"message {seq}")
        )

    def export(
        self, stream: str, describe: Callable[[bytes], Mapping[str, Any]] | None = None
    ) -> Iterator[dict[str, Any]]:
        """Every message of a stream in order, as a dict fit for JSON; the encoded bytes as `body_base64`.

        `describe` adds what it makes of the bytes, under `message`. Reads in small chunks: messages that the daemon
        finishes with meanwhile may be missing, and one that arrives meanwhile may be there.
        """
        base = self._base(stream)
        return self._export(stream, base, describe)

    def _export(
        self, stream: str, base: int, describe: Callable[[bytes], Mapping[str, Any]] | None
    ) -> Iterator[dict[str, Any]]:
        after = base - 1
        while True:
            rows = self._query(
                "SELECT id, time_us, expires_age_us, topic, crc, body FROM message "
                "WHERE id > ? AND id <= ? ORDER BY id LIMIT ?",
                [after, base | SEQ_MASK, EXPORT_CHUNK_ROWS],
            )
            if not rows:
                return
            after = rows[-1]["id"]
            for row in rows:
                id_ = row.pop("id")
                seq = id_ & SEQ_MASK
                row = self._checked(row, id_, about_row(id_), f"message {seq}")
                body = row.pop("body")
                out = {"stream": stream, "seq": seq, **row, "size": len(body)}
                if describe is not None:
                    out["message"] = dict(describe(body))
                out["body_base64"] = base64.b64encode(body).decode("ascii")
                yield out

    def dead(self, limit: int = 100, stream: str | None = None) -> list[DeadSummary]:
        """Up to `limit` dead letters, the newest first."""
        rows = self._query(
            "SELECT id, time_us, stream, seq, condition, description, topic, length(body) AS size, "
            "CASE typeof(topic) WHEN 'blob' THEN body END AS body FROM dead "
            "WHERE :stream IS NULL OR stream = :stream ORDER BY id DESC LIMIT :limit",
            {"stream": stream, "limit": _limit(limit)},
        )
        for row in rows:
            about = about_dead(row["stream"], row["seq"])
            row["topic"] = self._opened(about, row["topic"], row.pop("body"))[0]
        return [DeadSummary(**row) for row in rows]

    def dead_show(self, id: int) -> DeadMessage:
        """One dead letter with its bytes. Raises JournalError if there is none."""
        rows = []
        if abs(id) < 1 << 63:
            rows = self._query(
                "SELECT id, time_us, stream, seq, condition, description, topic, crc, body FROM dead WHERE id = ?",
                [id],
            )
        if not rows:
            raise JournalError(f"there is no dead letter {id}")
        row = rows[0]
        about = about_dead(row["stream"], row["seq"])
        return DeadMessage(**self._checked(row, row["seq"], about, f"dead letter {id}"))

    def dead_ids(self, stream: str | None = None) -> list[int]:
        """The id of every dead letter, the oldest first: the order in which to send them again."""
        rows = self._query("SELECT id FROM dead WHERE :s IS NULL OR stream = :s ORDER BY id", {"s": stream})
        return [row["id"] for row in rows]

    def dead_count(self) -> int:
        return int(self._query("SELECT count(*) AS n FROM dead")[0]["n"])

    def losses(self, limit: int = 100, stream: str | None = None) -> list[Loss]:
        """Up to `limit` rows of the loss ledger, the newest first."""
        rows = self._query(
            "SELECT time_us, stream, seq, reason, size, detail FROM loss "
            "WHERE :stream IS NULL OR stream = :stream ORDER BY id DESC LIMIT :limit",
            {"stream": stream, "limit": _limit(limit)},
        )
        return [Loss(**row) for row in rows]

    def loss_totals(self, stream: str | None = None) -> list[LossTotal]:
        """What was ever lost, by stream and reason; also of rows that the ledger itself has since dropped."""
        rows = self._query(
            "SELECT stream, reason, messages, bytes FROM loss_total "
            "WHERE :stream IS NULL OR stream = :stream ORDER BY stream, reason",
            {"stream": stream},
        )
        return [LossTotal(**row) for row in rows]

    def cursors(self, stream: str | None = None) -> list[CursorSummary]:
        """Every consumer's place in every stream it reads."""
        rows = self._query(
            "SELECT s.name AS stream, c.name, c.kind, c.position, s.next_seq - c.position AS behind "
            "FROM cursor c JOIN stream s ON s.id = c.stream "
            "WHERE :stream IS NULL OR s.name = :stream ORDER BY s.id, c.id",
            {"stream": stream},
        )
        return [CursorSummary(**row) for row in rows]

    def sessions(self) -> list[SessionSummary]:
        """Every stored MQTT session, whether its client is connected or not."""
        rows = self._query(
            "SELECT s.client_id, s.expiry_s, count(u.filter) AS subscriptions FROM mqtt_session s "
            "LEFT JOIN mqtt_subscription u USING (client_id) GROUP BY s.client_id ORDER BY s.client_id"
        )
        return [SessionSummary(**row) for row in rows]

    def require_stream(self, stream: str) -> None:
        """Raises JournalError for a name that is no stream's."""
        self._base(stream)

    # ------------------------------------------------------------------------------------------------- helpers

    def _base(self, stream: str) -> int:
        """The id before the stream's first. Raises JournalError for a name that is none."""
        rows = self._query("SELECT id FROM stream WHERE name = ?", [stream])
        if not rows:
            names = [row["name"] for row in self._query("SELECT name FROM stream ORDER BY id LIMIT 20")]
            known = f"; there are {', '.join(names)}" if names else "; there are none yet"
            raise JournalError(f"there is no stream {stream!r}{known}")
        return int(rows[0]["id"]) << SEQ_BITS

    def _first_waiting(self, base: int) -> int:
        rows = self._query("SELECT min(position) AS seq FROM cursor WHERE stream = ?", [base >> SEQ_BITS])
        return int(rows[0]["seq"] or 0)

    def _opened(self, about: bytes, topic: str | bytes, body: bytes | None) -> tuple[str, bytes | None]:
        """What is encrypted in plain text; None for bytes that do not open."""
        if isinstance(topic, str):
            return topic, body
        try:
            return (HIDDEN, None) if self._seal is None else self._seal.open_row(about, topic, body or b"")
        except (LookupError, ValueError):
            return HIDDEN, None

    def _checked(self, row: dict[str, Any], id_: int, about: bytes, what: str) -> dict[str, Any]:
        """Replace the stored checksum by whether it is right. Raises JournalError for what does not open."""
        expires = row.get("expires_age_us")
        whole = row["intact"] = intact(id_, row["topic"], row.pop("crc"), row["body"], expires)
        if isinstance(row["topic"], bytes) and whole:
            key = key_id(row["topic"])
            row["topic"], body = self._opened(about, row["topic"], row["body"])
            if body is None:
                if self._seal is not None and key in self._seal.ids:
                    row["intact"] = False  # its key is here, and it does not open: somebody changed it
                    return row
                raise JournalError(
                    f"{what} is encrypted under key {key}, {len(row['body'])} bytes; name the configuration whose "
                    "encryption_keys has it with --config, as a user that may read it"
                )
            row["body"] = body
        elif isinstance(row["topic"], bytes):
            row["topic"] = HIDDEN
        return row

    def _query(self, sql: str, parameters: Any = None) -> list[dict[str, Any]]:
        """All rows at once: the read transaction ends with them."""
        with self._explained():
            return list(self._db.query(sql, parameters))

    @contextmanager
    def _explained(self) -> Iterator[None]:
        with explained(self.path):
            yield


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """SQLite's errors about this file become a JournalError of one line for the operator."""
    try:
        yield
    except sqlite3.Error as error:
        raise _explain(path, error) from error


def _limit(limit: int) -> int:
    return min(max(limit, 0), LIMIT_MAX)


def open_journal(path: Path, *, older: bool = False) -> sqlite3.Connection:
    """Open for reading, whatever state the daemon left the file in; check that it is a journal we know.

    `older`: one that an older version wrote will do. Raises JournalError, sqlite3.Error.
    """
    try:
        found = path.is_file()
    except PermissionError:
        found = True
    if not found:
        raise JournalError(f"{path}: there is no journal; has the daemon run with this state directory?")
    try:
        return connect(path, "mode=ro", older=older)
    except sqlite3.OperationalError as error:
        if not _needs_writing(error) or _may_have_wal(path):
            raise
    # A stopped daemon leaves no WAL, and where we may not create one the file is complete without it.
    return connect(path, "mode=ro&immutable=1", older=older)


def connect(path: Path, how: str, *, older: bool = False) -> sqlite3.Connection:
    """Open with these parameters of SQLite's file URI, for reading only; else like `open_journal`."""
    connection = sqlite3.connect(
        f"{path.absolute().as_uri()}?{how}", uri=True, timeout=BUSY_TIMEOUT_S, isolation_level=None
    )
    try:
        connection.execute("PRAGMA query_only = ON")
        _check_version(path, connection, older)
    except BaseException:
        connection.close()
        raise
    return connection


def _check_version(path: Path, connection: sqlite3.Connection, older: bool) -> None:
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    (tables,) = connection.execute("SELECT count(*) FROM sqlite_master WHERE name IN ('message', 'stream')").fetchone()
    if version > VERSION:
        raise JournalNewer(
            f"{path}: written by a newer lineside (schema {version}, this one knows {VERSION}); use that version"
        )
    if version == 0 or tables != 2:
        raise JournalError(f"{path}: not a journal of lineside")
    if version < VERSION and not older:
        raise JournalError(
            f"{path}: written by an older lineside (schema {version}, this one reads {VERSION}); "
            "start the daemon once, it converts the file"
        )


def _needs_writing(error: sqlite3.Error) -> bool:
    """Whether SQLite only failed for want of the files beside the journal, which it may not create."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF in (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY)


def _may_have_wal(path: Path) -> bool:
    try:
        return Path(f"{path}-wal").stat().st_size > 0
    except FileNotFoundError:
        return False
    except PermissionError:  # a directory that is not ours to look into
        return True


def _explain(path: Path, error: sqlite3.Error) -> JournalError:
    """SQLite's error as one line for the operator."""
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return JournalCorrupt(
            f"{path}: {error}; the daemon sets a damaged file aside at its next start and salvages what reads"
        )
    if code in (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM):
        return JournalError(f"{path}: {error}; try as root or as the user that the daemon runs as")
    if code == sqlite3.SQLITE_BUSY:
        return JournalError(f"{path}: the daemon keeps it to itself just now; try again")
    return JournalError(f"{path}: {error}")
