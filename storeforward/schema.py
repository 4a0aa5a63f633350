"""The journal's tables and their numbered migrations.

Knows the shape of the file and nothing of who writes to it. `PRAGMA user_version` holds the number of the last
migration applied; a file whose number is higher than ours was written by a newer version and is never opened.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import sqlite_utils

SEQ_BITS = 48
SEQ_MASK = (1 << SEQ_BITS) - 1
STREAMS_MAX = 1 << 15

PAGE_SIZE_BYTES = 16384

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
-- body: the message as encoded AMQP 1.0 sections; crc: CRC-32 of body. time_us: wall clock, for people only.
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


def _v1(db: sqlite_utils.Database) -> None:
    for statement in sqlite_statements(_V1):
        db.execute(statement)


def _v2(db: sqlite_utils.Database) -> None:
    for statement in sqlite_statements(_V2):
        db.execute(statement)


def _v3(db: sqlite_utils.Database) -> None:
    for statement in sqlite_statements(_V3):
        db.execute(statement)


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


MIGRATIONS: tuple[Callable[[sqlite_utils.Database], None], ...] = (_v1, _v2, _v3)
VERSION = len(MIGRATIONS)


def migrate(connection: sqlite3.Connection, to: int = VERSION) -> int:
    """Bring the schema to version `to`, all in one transaction; return the version found before."""
    (found,) = connection.execute("PRAGMA user_version").fetchone()
    if found >= to:
        return int(found)
    import sqlite_utils  # 6 MB of memory that a daemon whose journal is up to date need not spend

    connection.execute("BEGIN EXCLUSIVE")
    try:
        db = sqlite_utils.Database(connection)
        for number in range(found, to):
            MIGRATIONS[number](db)
        connection.execute(f"PRAGMA user_version = {to:d}")
        connection.execute("COMMIT")
    except BaseException:
        connection.execute("ROLLBACK")
        raise
    return int(found)
