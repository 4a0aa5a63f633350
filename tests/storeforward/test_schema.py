"""A journal is the same whichever way it came to be: made by this version, or by an older one and migrated."""

from __future__ import annotations

import sqlite3

import pytest

from storeforward import schema

# Of each type any value will do, but where a CHECK wants one of a few.
VALUES = {"TEXT": "x", "INTEGER": 1, "BLOB": b"x"}
CHOSEN = {"direction": "outbound", "kind": "uplink"}


def _file(version: int) -> sqlite3.Connection:
    db = sqlite3.connect(":memory:", isolation_level=None)
    schema.migrate(db, version)
    db.execute("PRAGMA foreign_keys = OFF")  # rows of every table, whoever they refer to
    return db


@pytest.mark.parametrize("since", range(1, schema.VERSION))
def test_a_journal_made_new_has_the_schema_of_one_that_was_migrated_with_rows_in_every_table(since: int) -> None:
    db = _file(since)
    rows: dict[str, tuple[str, list[object]]] = {}
    for (table,) in db.execute("SELECT name FROM sqlite_schema WHERE type = 'table'").fetchall():
        columns = db.execute(f"PRAGMA table_info({table})").fetchall()
        row = [CHOSEN.get(column[1], VALUES[column[2]]) for column in columns]
        rows[table] = ", ".join(column[1] for column in columns), row
        db.execute(f"INSERT INTO {table} ({rows[table][0]}) VALUES ({', '.join('?' * len(row))})", row)

    assert schema.migrate(db) == since

    for table, (names, row) in rows.items():
        assert tuple(row) in db.execute(f"SELECT {names} FROM {table}").fetchall()
    statements = "SELECT type, name, tbl_name, sql FROM sqlite_schema ORDER BY type, name"
    assert db.execute(statements).fetchall() == _file(schema.VERSION).execute(statements).fetchall()
    assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
