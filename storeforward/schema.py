"""The journal's tables and their numbered migrations.

Knows the shape of the file and nothing of who writes to it. `PRAGMA user_version` holds the number of the last
migration applied; a file whose number is higher than ours was written by a newer version and is never opened.
"""

from __future__ import annotations

import secrets
import sqlite3
from collections.abc import Callable
from typing import TYPE_CHECKING
from zlib import crc32

if TYPE_CHECKING:
    import sqlite_utils

SEQ_BITS = 48
SEQ_MASK = (1 << SEQ_BITS) - 1
STREAMS_MAX = 1 << 15
# The key in `meta` of a journal that was handed over, and the file beside one that is damaged: neither is just opened.
MOVED = "moved"
VERSION_KEY = "schema"  # in `meta`, too: the number of the last migration
SUSPECT = "journal.suspect"

# Measured (tests/bench/written.py): one 1 KB message a commit costs half the bytes that pages of 16 KB cost; at full
# load as many rows fit into as many bytes, as fast. Pages of 4 KB hold three such rows and waste a fifth.
PAGE_SIZE_BYTES = 8192

_V1 = f"""
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;

-- One row a stream. rows and bytes are kept with every commit, so nobody ever has to count.
CREATE TABLE stream (
    id INTEGER PRIMARY KEY,
    name TEXT NOT NULL UNIQUE,
    direction TEXT NOT NULL CHECK (direction IN ('outbound', 'inbound', 'local')),
    next_seq INTEGER NOT NULL DEFAULT 1,
    rows INTEGER NOT NULL DEFAULT 0,
    bytes INTEGER NOT NULL DEFAULT 0
);

-- id = stream << {SEQ_BITS} | seq: one B-tree, each stream a contiguous run of it.
-- body: the message as encoded AMQP 1.0 sections; crc, and rows whose topic is a BLOB: storeforward/sealing.py.
-- time_us: wall clock, for people only.
-- expires_age_us: on the journal's own age clock (storeforward/age.py), which no clock jump moves.
CREATE TABLE message (
    id INTEGER PRIMARY KEY,
    time_us INTEGER NOT NULL,
    expires_age_us INTEGER,
    topic TEXT NOT NULL,
    crc INTEGER NOT NULL,
    body BLOB NOT NULL
);

-- position: the first seq that this consumer has not finished with.
CREATE TABLE cursor (
    id INTEGER PRIMARY KEY,
    stream INTEGER NOT NULL REFERENCES stream (id),
    name TEXT NOT NULL,
    kind TEXT NOT NULL CHECK (kind IN ('uplink', 'mqtt', 'amqp')),
    position INTEGER NOT NULL,
    UNIQUE (stream, name)
);

-- Identities of received messages, by the id of the message they were stored as (DESIGN: duplicates).
CREATE TABLE seen (id INTEGER PRIMARY KEY, identity BLOB NOT NULL);

CREATE TABLE dead (
    id INTEGER PRIMARY KEY,
    time_us INTEGER NOT NULL,
    stream TEXT NOT NULL,
    seq INTEGER NOT NULL,
    condition TEXT NOT NULL,
    description TEXT NOT NULL,
    topic TEXT NOT NULL,
    crc INTEGER NOT NULL,
    body BLOB NOT NULL
);

CREATE TABLE loss (
    id INTEGER PRIMARY KEY,
    time_us INTEGER NOT NULL,
    stream TEXT NOT NULL,
    seq INTEGER NOT NULL,
    reason TEXT NOT NULL,
    size INTEGER NOT NULL,
    detail TEXT NOT NULL DEFAULT ''
);
CREATE TABLE loss_total (
    stream TEXT NOT NULL,
    reason TEXT NOT NULL,
    messages INTEGER NOT NULL,
    bytes INTEGER NOT NULL,
    PRIMARY KEY (stream, reason)
) WITHOUT ROWID;

-- expiry_s: MQTT session expiry interval; NULL never. gone_age_us: when the client left, on the age clock.
CREATE TABLE mqtt_session (
    client_id TEXT PRIMARY KEY,
    expiry_s INTEGER,
    gone_age_us INTEGER
) WITHOUT ROWID;
-- since: JSON, stream name to the first seq this subscription is about.
CREATE TABLE mqtt_subscription (
    client_id TEXT NOT NULL REFERENCES mqtt_session (client_id) ON DELETE CASCADE,
    filter TEXT NOT NULL,
    qos INTEGER NOT NULL,
    options INTEGER NOT NULL DEFAULT 0,
    identifier INTEGER,
    since TEXT NOT NULL DEFAULT '{{}}',
    PRIMARY KEY (client_id, filter)
) WITHOUT ROWID;

-- For people: everything by name.
CREATE VIEW messages AS
    SELECT s.name AS stream, m.id & {SEQ_MASK} AS seq, m.time_us, m.expires_age_us, m.topic,
           length(m.body) AS size, m.crc, m.body
    FROM message m JOIN stream s ON s.id = m.id >> {SEQ_BITS};
"""

# What MQTT promises beyond messages: retained messages, wills, and what is under way at QoS 2.
_V2 = """
-- stream, seq: where the same message stands for those who were subscribed; seq NULL if nowhere.
CREATE TABLE retained (
    topic TEXT PRIMARY KEY,
    qos INTEGER NOT NULL,
    time_us INTEGER NOT NULL,
    expires_age_us INTEGER,
    stream TEXT NOT NULL,
    seq INTEGER,
    crc INTEGER NOT NULL,
    body BLOB NOT NULL
);

-- properties: as in an MQTT 5.0 PUBLISH, NULL for none. due_age_us: NULL while the client is connected.
CREATE TABLE mqtt_will (
    client_id TEXT PRIMARY KEY,
    topic TEXT NOT NULL,
    payload BLOB NOT NULL,
    qos INTEGER NOT NULL,
    retain INTEGER NOT NULL,
    properties BLOB,
    delay_s INTEGER NOT NULL,
    due_age_us INTEGER
);

-- Packet ids of messages of QoS 2 that a client sent, that are journaled, and that it has not released.
CREATE TABLE mqtt_incoming (
    client_id TEXT NOT NULL REFERENCES mqtt_session (client_id) ON DELETE CASCADE,
    packet_id INTEGER NOT NULL,
    PRIMARY KEY (client_id, packet_id)
) WITHOUT ROWID;

-- Messages of QoS 2 on their way to a client. state: 1 sent, 2 the client has it, 3 finished though the cursor is not
-- past it. stream 0: a retained message, seq then is mqtt_retained_due's n.
CREATE TABLE mqtt_outgoing (
    client_id TEXT NOT NULL REFERENCES mqtt_session (client_id) ON DELETE CASCADE,
    stream INTEGER NOT NULL,
    seq INTEGER NOT NULL,
    packet_id INTEGER NOT NULL,
    state INTEGER NOT NULL,
    PRIMARY KEY (client_id, stream, seq)
) WITHOUT ROWID;

-- Retained messages that a subscription is still to be given, in the order of n. identifiers: a JSON list.
CREATE TABLE mqtt_retained_due (
    client_id TEXT NOT NULL REFERENCES mqtt_session (client_id) ON DELETE CASCADE,
    n INTEGER NOT NULL,
    topic TEXT NOT NULL,
    qos INTEGER NOT NULL,
    identifiers TEXT NOT NULL,
    PRIMARY KEY (client_id, n)
) WITHOUT ROWID;
"""

# Requests whose replies come back over a hub.
_V3 = """
-- One row a request that may still be answered, oldest first by n. message_id: what its reply names; inbound: the
-- stream that the reply comes in on; correlation: the requester's own data, NULL for none.
CREATE TABLE request (
    n INTEGER PRIMARY KEY,
    message_id TEXT NOT NULL UNIQUE,
    inbound TEXT NOT NULL,
    response_topic TEXT NOT NULL,
    correlation BLOB,
    expires_age_us INTEGER NOT NULL,
    answered INTEGER NOT NULL DEFAULT 0
);
"""

# Since then a row's checksum is of its topic and id, too, and rows may be sealed: older versions would take them for
# damaged. No row is touched; the old ones keep the checksum they have.
_V4 = f"""
DROP VIEW messages;
CREATE VIEW messages AS
    SELECT s.name AS stream, m.id & {SEQ_MASK} AS seq, m.time_us, m.expires_age_us,
           CASE typeof(m.topic) WHEN 'blob' THEN '(encrypted)' ELSE m.topic END AS topic,
           length(m.body) AS size, m.crc & 0xFFFFFFFF AS crc, m.body
    FROM message m JOIN stream s ON s.id = m.id >> {SEQ_BITS};
"""

# A flipped bit in a number is a number: SQLite would not mind a cursor that has moved past a thousand messages. So the
# small tables say everything again, most of them twice, in `copies`: of three that differ the two that agree are right
# (storeforward/checks.py, storeforward/harvest.py). By SQL alone: any sqlite3 may still write here. Bodies have
# checksums of their own, and stand last: what is before them reads without them.
CHECKED: dict[str, tuple[int, tuple[str, ...]]] = {
    "meta": (2, ("key", "value")),
    "stream": (2, ("id", "name", "direction", "next_seq", "rows", "bytes", "first_seq", "written")),
    "cursor": (2, ("id", "stream", "name", "kind", "position")),
    "mqtt_session": (2, ("client_id", "expiry_s", "gone_age_us")),
    "mqtt_subscription": (2, ("client_id", "filter", "qos", "options", "identifier", "since")),
    "mqtt_incoming": (2, ("client_id", "packet_id")),
    "mqtt_outgoing": (2, ("client_id", "stream", "seq", "packet_id", "state")),
    "mqtt_retained_due": (2, ("client_id", "n", "topic", "qos", "identifiers")),
    "mqtt_will": (
        1,
        ("client_id", "topic", "payload", "qos", "retain", "properties", "delay_s", "due_age_us"),
    ),
    "request": (
        2,
        ("n", "message_id", "inbound", "response_topic", "correlation", "expires_age_us", "answered"),
    ),
    "retained": (1, ("topic", "qos", "time_us", "expires_age_us", "stream", "seq", "crc")),
    "dead": (1, ("id", "time_us", "stream", "seq", "condition", "description", "topic", "crc")),
    "loss": (1, ("id", "time_us", "stream", "seq", "reason", "size", "detail")),
    "loss_total": (2, ("stream", "reason", "messages", "bytes")),
}
COPIES_BETWEEN = "|"


def copies(table: str) -> str:
    """The SQL of what `copies` holds: the table's name and its values as `quote` writes them, once or twice."""
    times, columns = CHECKED[table]
    once = f"'{table}'" + "".join(f"||','||quote({column})" for column in columns)
    return f"||'{COPIES_BETWEEN}'||".join([once] * times)


def _copies(table: str) -> str:
    return f"copies TEXT NOT NULL GENERATED ALWAYS AS ({copies(table)}) STORED"


# first_seq: everything before it was deleted; written: one past the last row, NULL where no commit has said so yet. A
# row that has vanished from either end of a stream is missed by them; one from the middle, by the row after it, whose
# `crc` says that it follows (storeforward/sealing.py). No CHECK: with one, and a generated column beside it, SQLite
# 3.40 refuses to VACUUM INTO from a file that it opened for reading only, as a backup does.
_V5 = f"""
CREATE TABLE new_meta (key TEXT PRIMARY KEY, value TEXT NOT NULL, {_copies("meta")}) WITHOUT ROWID;
CREATE TABLE new_stream (
    id INTEGER PRIMARY KEY,
    name TEXT NOT NULL UNIQUE,
    direction TEXT NOT NULL,
    next_seq INTEGER NOT NULL DEFAULT 1,
    rows INTEGER NOT NULL DEFAULT 0,
    bytes INTEGER NOT NULL DEFAULT 0,
    first_seq INTEGER,
    written INTEGER,
    {_copies("stream")}
);
CREATE TABLE new_cursor (
    id INTEGER PRIMARY KEY,
    stream INTEGER NOT NULL REFERENCES stream (id),
    name TEXT NOT NULL,
    kind TEXT NOT NULL,
    position INTEGER NOT NULL,
    {_copies("cursor")},
    UNIQUE (stream, name)
);
CREATE TABLE new_mqtt_session (
    client_id TEXT PRIMARY KEY,
    expiry_s INTEGER,
    gone_age_us INTEGER,
    {_copies("mqtt_session")}
) WITHOUT ROWID;
CREATE TABLE new_mqtt_subscription (
    client_id TEXT NOT NULL REFERENCES mqtt_session (client_id) ON DELETE CASCADE,
    filter TEXT NOT NULL,
    qos INTEGER NOT NULL,
    options INTEGER NOT NULL DEFAULT 0,
    identifier INTEGER,
    since TEXT NOT NULL DEFAULT '{{}}',
    {_copies("mqtt_subscription")},
    PRIMARY KEY (client_id, filter)
) WITHOUT ROWID;
CREATE TABLE new_mqtt_incoming (
    client_id TEXT NOT NULL REFERENCES mqtt_session (client_id) ON DELETE CASCADE,
    packet_id INTEGER NOT NULL,
    {_copies("mqtt_incoming")},
    PRIMARY KEY (client_id, packet_id)
) WITHOUT ROWID;
CREATE TABLE new_mqtt_outgoing (
    client_id TEXT NOT NULL REFERENCES mqtt_session (client_id) ON DELETE CASCADE,
    stream INTEGER NOT NULL,
    seq INTEGER NOT NULL,
    packet_id INTEGER NOT NULL,
    state INTEGER NOT NULL,
    {_copies("mqtt_outgoing")},
    PRIMARY KEY (client_id, stream, seq)
) WITHOUT ROWID;
CREATE TABLE new_mqtt_retained_due (
    client_id TEXT NOT NULL REFERENCES mqtt_session (client_id) ON DELETE CASCADE,
    n INTEGER NOT NULL,
    topic TEXT NOT NULL,
    qos INTEGER NOT NULL,
    identifiers TEXT NOT NULL,
    {_copies("mqtt_retained_due")},
    PRIMARY KEY (client_id, n)
) WITHOUT ROWID;
CREATE TABLE new_mqtt_will (
    client_id TEXT PRIMARY KEY,
    topic TEXT NOT NULL,
    payload BLOB NOT NULL,
    qos INTEGER NOT NULL,
    retain INTEGER NOT NULL,
    properties BLOB,
    delay_s INTEGER NOT NULL,
    due_age_us INTEGER,
    {_copies("mqtt_will")}
);
CREATE TABLE new_request (
    n INTEGER PRIMARY KEY,
    message_id TEXT NOT NULL UNIQUE,
    inbound TEXT NOT NULL,
    response_topic TEXT NOT NULL,
    correlation BLOB,
    expires_age_us INTEGER NOT NULL,
    answered INTEGER NOT NULL DEFAULT 0,
    {_copies("request")}
);
CREATE TABLE new_retained (
    topic TEXT PRIMARY KEY,
    qos INTEGER NOT NULL,
    time_us INTEGER NOT NULL,
    expires_age_us INTEGER,
    stream TEXT NOT NULL,
    seq INTEGER,
    crc INTEGER NOT NULL,
    {_copies("retained")},
    body BLOB NOT NULL
);
CREATE TABLE new_dead (
    id INTEGER PRIMARY KEY,
    time_us INTEGER NOT NULL,
    stream TEXT NOT NULL,
    seq INTEGER NOT NULL,
    condition TEXT NOT NULL,
    description TEXT NOT NULL,
    topic TEXT NOT NULL,
    crc INTEGER NOT NULL,
    {_copies("dead")},
    body BLOB NOT NULL
);
CREATE TABLE new_loss (
    id INTEGER PRIMARY KEY,
    time_us INTEGER NOT NULL,
    stream TEXT NOT NULL,
    seq INTEGER NOT NULL,
    reason TEXT NOT NULL,
    size INTEGER NOT NULL,
    detail TEXT NOT NULL DEFAULT '',
    {_copies("loss")}
);
CREATE TABLE new_loss_total (
    stream TEXT NOT NULL,
    reason TEXT NOT NULL,
    messages INTEGER NOT NULL,
    bytes INTEGER NOT NULL,
    {_copies("loss_total")},
    PRIMARY KEY (stream, reason)
) WITHOUT ROWID;
"""
_VIEW = _V4.partition(";")[2]
COPIES_SINCE = 5
ID_SPREAD = 40503


def _script(script: str) -> Callable[[sqlite_utils.Database], None]:
    """The migration that is nothing but these statements."""

    def run(db: sqlite_utils.Database) -> None:
        for statement in sqlite_statements(script):
            db.execute(statement)

    return run


def _v5(db: sqlite_utils.Database) -> None:
    db.execute("DROP VIEW messages")
    for statement in sqlite_statements(_V5):
        # One after the other, each in the pages that the last one left: SQLite takes a file for damaged whose WAL has
        # much less in it than the file is to grow by, and pages that are free again by the commit are not in it.
        table = statement.split()[2].removeprefix("new_")
        (empty,) = db.execute(f"SELECT NOT EXISTS (SELECT 1 FROM {table})").fetchone()
        if empty:
            # Renaming reads the whole schema again, which is most of what making a journal costs. The statement that
            # is left in the schema is the one that renaming leaves.
            db.execute(f"DROP TABLE {table}")
            db.execute(statement.replace(f"TABLE new_{table} ", f'TABLE "{table}" ', 1))
            continue
        db.execute(statement)
        names = ", ".join(row[1] for row in db.execute(f"PRAGMA table_info({table})"))
        db.execute(f"INSERT INTO new_{table} ({names}) SELECT {names} FROM {table}")
        db.execute(f"DROP TABLE {table}")
        db.execute(f"ALTER TABLE new_{table} RENAME TO {table}")
    _script(_VIEW)(db)
    # Which journal this is, on the first page of the file and of its WAL: SQLite would take another's WAL for its own.
    half = 1 + secrets.randbelow((1 << 15) - 1)
    db.execute(f"PRAGMA application_id = {half << 16 | half * ID_SPREAD & 0xFFFF:d}")


def fingerprint(connection: sqlite3.Connection) -> int:
    """A checksum of the statements that made the tables, wherever their pages are."""
    rows = connection.execute("SELECT type, name, tbl_name, sql FROM sqlite_schema ORDER BY type, name")
    return crc32("\0".join(str(value) for row in rows for value in row).encode())


def is_journal_id(number: int) -> bool:
    """Whether a file's application_id can be a journal's; of those that a flipped bit makes none is."""
    half = number >> 16
    return half > 0 and half * ID_SPREAD & 0xFFFF == number & 0xFFFF


def sqlite_statements(script: str) -> list[str]:
    """Split a script into statements, so that a migration stays in the caller's transaction."""
    out: list[str] = []
    part = ""
    for line in script.splitlines(keepends=True):
        part += line
        if sqlite3.complete_statement(part):
            out.append(part.strip())
            part = ""
    assert not part.strip(), part
    return out


MIGRATIONS: tuple[Callable[[sqlite_utils.Database], None], ...] = (*map(_script, (_V1, _V2, _V3, _V4)), _v5)
VERSION = len(MIGRATIONS)


def migrate(connection: sqlite3.Connection, to: int = VERSION) -> int:
    """Bring the schema to version `to`, all in one transaction; return the version found before."""
    (found,) = connection.execute("PRAGMA user_version").fetchone()
    if found >= to:
        return int(found)
    import sqlite_utils  # 6 MB of memory that a daemon whose journal is up to date need not spend

    # A table that is made anew must not take the rows with it that refer to the old one.
    connection.execute("PRAGMA foreign_keys = OFF")
    connection.execute("BEGIN EXCLUSIVE")
    try:
        db = sqlite_utils.Database(connection)
        for number in range(found, to):
            MIGRATIONS[number](db)
        connection.execute(f"PRAGMA user_version = {to:d}")
        # Once more, in another page: a flipped bit of the number would keep an old version's advice, or a newer one's.
        if to >= COPIES_SINCE:
            second = f"{to} {fingerprint(connection)}"
            connection.execute("INSERT OR REPLACE INTO meta (key, value) VALUES (?, ?)", (VERSION_KEY, second))
        connection.execute("COMMIT")
    except BaseException:
        connection.execute("ROLLBACK")
        raise
    finally:
        connection.execute("PRAGMA foreign_keys = ON")
    return int(found)
