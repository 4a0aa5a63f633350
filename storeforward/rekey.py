"""Rewrite what an encrypted journal holds, so that all of it lies under the first key, or none of it under any.

For a key that is to be replaced, and for what was written before there was one. With the daemon stopped. Every row
tells its own key, so whatever cuts this off leaves a journal that is as good as before; the next call goes on. An old
key is asked for until the last row under it has been rewritten.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from storeforward.inspection import explained
from storeforward.journal import Journal
from storeforward.lock import StateLock
from storeforward.sealed_tables import (
    open_due,
    open_request,
    open_retained,
    open_will,
    seal_due,
    seal_request,
    seal_retained,
    seal_will,
)
from storeforward.sealing import FOLLOWS, META, Seal, about_dead, about_row, checksum, intact, key_id

CHUNK_ROWS = 256


class Untold(Exception):
    """A row does not open: damaged, or under a key that nobody has."""


def rekey(state_dir: Path, seal: Seal, *, decrypt: bool = False) -> tuple[int, int]:
    """Return how many rows were rewritten, and how many stay as they are because they are damaged.

    Raises JournalError: a key is missing, a daemon runs, the disk is full.
    """
    journal = Journal.open(state_dir, seal=seal)
    try:
        done = kept = 0
        into = None if decrypt else seal
        for statement, parameters in _changes(journal, seal, into):
            if statement is None:
                kept += 1
                continue
            journal.execute(statement, parameters)
            done += 1
            if not done % CHUNK_ROWS:
                _commit(journal)
        if not kept:
            last = "" if decrypt else META + seal.ids[0]
            journal.execute("DELETE FROM meta WHERE key LIKE ? AND key != ?", (META + "%", last))
        _commit(journal)
    finally:
        journal.close()
    _forget(state_dir)
    return done, kept


def _commit(journal: Journal) -> None:
    if journal.pending:
        journal.commit_now()
    if journal.checkpoint_due():
        journal.checkpoint()


def _forget(state_dir: Path) -> None:
    """Write the file anew: what was rewritten would otherwise stay legible in its free pages."""
    path = state_dir / "journal.db"
    lock = StateLock(state_dir)
    try:
        with explained(path), contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
            connection.execute("VACUUM")
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    finally:
        lock.release()


_Change = tuple[str | None, tuple[Any, ...]]


def _changes(journal: Journal, seal: Seal, into: Seal | None) -> Iterator[_Change]:
    def done(topic: object) -> bool:
        return isinstance(topic, str) if into is None else isinstance(topic, bytes) and key_id(topic) == into.ids[0]

    def again(where: bytes, topic: str | bytes, body: bytes) -> tuple[str | bytes, bytes]:
        plain = (topic, body) if isinstance(topic, str) else seal.open_row(where, topic, body)
        return plain if into is None else into.seal_row(where, *plain)

    def guarded(make: Callable[[], _Change]) -> _Change:
        try:
            return make()
        except (ValueError, LookupError, Untold):
            return None, ()

    for table, seq in (("message", "id"), ("dead", "seq")):
        after = -1
        while True:
            expires_and_stream = "expires_age_us, NULL" if seq == "id" else "NULL, stream"
            rows = journal.query(
                f"SELECT id, {seq}, topic, crc, body, {expires_and_stream} FROM {table} "
                "WHERE id > ? ORDER BY id LIMIT ?",
                (after, CHUNK_ROWS),
            )
            if not rows:
                break
            after = rows[-1][0]
            for row in rows:
                if not done(row[2]):

                    def rewrite(row: tuple[Any, ...] = row, table: str = table) -> _Change:
                        id_, at, topic, crc, body, expires, stream = row
                        if not intact(at, topic, crc, body, expires):
                            raise Untold
                        topic, body = again(about_row(id_) if stream is None else about_dead(stream, at), topic, body)
                        return (
                            f"UPDATE {table} SET topic = ?, crc = ?, body = ? WHERE id = ?",
                            (topic, checksum(at, topic, body, expires) | crc & FOLLOWS, body, id_),
                        )

                    yield guarded(rewrite)
    for (name,) in journal.query("SELECT topic FROM retained"):
        if not done(name):

            def retained(name: str | bytes = name) -> _Change:
                ((crc, body),) = journal.query("SELECT crc, body FROM retained WHERE topic = ?", (name,))
                found = open_retained(seal, name, crc, body)
                if found is None:
                    raise Untold
                return (
                    "UPDATE retained SET topic = ?, crc = ?, body = ? WHERE topic = ?",
                    (*seal_retained(into, *found), name),
                )

            yield guarded(retained)
    for client, topic, payload, section in journal.query("SELECT client_id, topic, payload, properties FROM mqtt_will"):
        if not done(topic):

            def will(values: tuple[Any, ...] = (client, topic, payload, section)) -> _Change:
                plain = open_will(seal, *values)
                return (
                    "UPDATE mqtt_will SET topic = ?, payload = ?, properties = ? WHERE client_id = ?",
                    (*seal_will(into, values[0], *plain), values[0]),
                )

            yield guarded(will)
    for message_id, topic, correlation in journal.query("SELECT message_id, response_topic, correlation FROM request"):
        if not done(topic):

            def request(values: tuple[Any, ...] = (message_id, topic, correlation)) -> _Change:
                plain = open_request(seal, *values)
                return (
                    "UPDATE request SET response_topic = ?, correlation = ? WHERE message_id = ?",
                    (*seal_request(into, values[0], *plain), values[0]),
                )

            yield guarded(request)
    for client, n, topic in journal.query("SELECT client_id, n, topic FROM mqtt_retained_due"):
        if not done(topic):

            def due(client: str = client, n: int = n, topic: str | bytes = topic) -> _Change:
                value = seal_due(into, client, n, open_due(seal, client, n, topic))
                return "UPDATE mqtt_retained_due SET topic = ? WHERE client_id = ? AND n = ?", (value, client, n)

            yield guarded(due)
