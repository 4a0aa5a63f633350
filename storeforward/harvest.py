"""Which records of a damaged file's pages are rows that were written, gathered into a fresh journal.

A message is one if its checksum says so, a row of the small tables if its copies do. So it does not matter where a row
is found, nor what became of the tree that it belonged to. Knows no files.
"""

from __future__ import annotations

import sqlite3

from storeforward.copies import found_in, right_values, table_of
from storeforward.pages import Value
from storeforward.schema import CHECKED, SEQ_BITS, SEQ_MASK
from storeforward.sealing import FOLLOWS, OF_ROW, intact, is_sealed, key_id

# So far beyond its stream's end a seq is no commit's that the counter missed: the checksum covers its low bits only.
BEYOND_MAX = 1 << 31
IDENTITY_BYTES_MAX = 64
MESSAGE_VALUES, SEEN_VALUES, CURSOR_KEY_VALUES, SCHEMA_VALUES = 6, 2, 3, 5

_Key = tuple[Value, ...]


class Harvest:
    """Fills `new`, inside its transaction. `problems`: what was a row once. `keys`: under which rows are sealed."""

    def __init__(self, new: sqlite3.Connection) -> None:
        self._new = new
        self.problems: dict[str, int] = {}
        self.keys: set[str] = set()
        self._due: dict[int, tuple[int, int]] = {}
        self._cursor_names: dict[int, tuple[int, str]] = {}
        # As they stand in a record, and without what SQLite makes itself.
        self._stored = {table: [row[1] for row in new.execute(f"PRAGMA table_xinfo({table})")] for table in CHECKED}
        self._columns = {table: [row[1] for row in new.execute(f"PRAGMA table_info({table})")] for table in CHECKED}

    # ------------------------------------------------------------------ one record

    def judge(self, rowid: int | None, values: tuple[Value, ...]) -> bool:
        """Take a record if it is a row; whether it was one."""
        count = len(values)
        if rowid is None and count == CURSOR_KEY_VALUES:
            stream, name, id_ = values
            if type(stream) is int and type(name) is str and type(id_) is int:
                self._cursor_names[id_] = stream, name
            return False
        if count == SCHEMA_VALUES and values[0] in ("table", "index", "view"):
            return True
        for told in values[-2:]:
            table = table_of(told)
            if table is not None:
                return self._judge_checked(table, rowid, values)
        if rowid is not None and count == SEEN_VALUES and values[0] is None and type(values[1]) is bytes:
            return self._judge_seen(rowid, values[1])
        return self.judge_message(rowid, values)

    def judge_message(self, rowid: int | None, values: tuple[Value, ...]) -> bool:
        """As `judge`, messages only."""
        if rowid is None or len(values) != MESSAGE_VALUES or values[0] is not None:
            return False
        _, time_us, expires, topic, crc, body = values
        try:
            good = rowid >> SEQ_BITS > 0 and type(time_us) is int and intact(rowid, topic, crc, body, expires)
        except UnicodeEncodeError:
            good = False
        if not good or not self._is_due(rowid):
            return False
        if type(topic) is bytes:
            self.keys.add(key_id(topic))
        self._new.execute("INSERT OR IGNORE INTO message VALUES (?,?,?,?,?,?)", (rowid, *values[1:]))
        return True

    def rest(self, text: bytes) -> None:
        """What is no record: the copies of a row may be whole where the row is not."""
        for table, values in found_in(text):
            if len(values) == len(self._columns[table]):
                self._take(table, values)

    def _judge_seen(self, rowid: int, identity: bytes) -> bool:
        good = rowid >> SEQ_BITS > 0 and 0 < len(identity) <= IDENTITY_BYTES_MAX
        if good:
            self._new.execute("INSERT OR IGNORE INTO seen VALUES (?, ?)", (rowid, identity))
        return good

    def _judge_checked(self, table: str, rowid: int | None, values: tuple[Value, ...]) -> bool:
        columns = self._stored[table]
        if len(values) != len(columns):
            return False
        row = dict(zip(columns, values, strict=True))
        told = row.pop("copies")
        if columns[0] in ("id", "n") and row[columns[0]] is None:
            row[columns[0]] = rowid
        names = CHECKED[table][1]
        right = right_values(table, [row[name] for name in names], told)
        if right is None:
            self.problems[table] = self.problems.get(table, 0) + 1
            return False
        row.update(zip(names, right, strict=True))
        self._take(table, tuple(row.values()))
        return True

    def _take(self, table: str, row: tuple[Value, ...]) -> None:
        """Of two versions of a row the later one: a cursor and a counter only grow."""
        grows = {"cursor": "position", "stream": "next_seq"}.get(table)
        marks = ",".join("?" * len(row))
        columns = self._columns[table]
        change = "OR IGNORE"
        if grows is not None:
            (same,) = self._new.execute(
                f"SELECT max({grows}) FROM {table} WHERE id = ?", (row[columns.index("id")],)
            ).fetchone()
            value = row[columns.index(grows)]
            if same is not None and type(value) is int and value > same:
                change = "OR REPLACE"
        try:
            self._new.execute(f"INSERT {change} INTO {table} ({', '.join(columns)}) VALUES ({marks})", row)
        except (sqlite3.IntegrityError, OverflowError):
            self.problems[table] = self.problems.get(table, 0) + 1

    # ------------------------------------------------------------------ all of them

    def _is_due(self, id_: int) -> bool:
        """False for what was deleted, which can stand in a page for long, once `settle` has said what that is."""
        first, end = self._due.get(id_ >> SEQ_BITS, (0, SEQ_MASK))
        return first <= id_ & SEQ_MASK < end

    def settle(self) -> None:
        """All pages in use were shown: what is there beside messages is known now."""
        new = self._new
        for stream, next_seq, first in new.execute("SELECT id, next_seq, first_seq FROM stream").fetchall():
            base = stream << SEQ_BITS
            if first is None:
                (first,) = new.execute("SELECT min(position) FROM cursor WHERE stream = ?", (stream,)).fetchone()
            else:
                new.execute("DELETE FROM message WHERE id >= ? AND id < ?", (base, base | first))
            end = min(SEQ_MASK, next_seq + BEYOND_MAX)
            self._due[stream] = next_seq if first is None else first, end
            # Rows of schema 3 and before have no checksum of their seq, and a counter that knew them all.
            new.execute(
                "DELETE FROM message WHERE id BETWEEN ? AND ? AND (crc < ? OR id >= ?)",
                (base | next_seq, base | SEQ_MASK, OF_ROW, base | end),
            )
        # A session whose row is lost is there all the same: what it waits for would be nobody's.
        for table in ("mqtt_subscription", "mqtt_incoming", "mqtt_outgoing", "mqtt_retained_due"):
            new.execute(f"INSERT OR IGNORE INTO mqtt_session (client_id) SELECT client_id FROM {table}")

    def finish(self) -> None:
        """All pages were shown. Of lost cursors the index may know the names: they begin with what is there."""
        new = self._new
        known = {id_ for (id_,) in new.execute("SELECT id FROM cursor")}
        for id_, (stream, name) in self._cursor_names.items():
            found = new.execute("SELECT next_seq, first_seq FROM stream WHERE id = ?", (stream,)).fetchone()
            if id_ in known or found is None:
                continue
            start = found[0] if found[1] is None else found[1]
            (first,) = new.execute(
                "SELECT min(id) FROM message WHERE id BETWEEN ? AND ?",
                (stream << SEQ_BITS, stream << SEQ_BITS | SEQ_MASK),
            ).fetchone()
            if found[1] is None and first is not None:
                start = first & SEQ_MASK
            kind = name if name == "uplink" else "mqtt" if name.startswith(("mqtt:", "share:")) else "amqp"
            self._take("cursor", (id_, stream, name, kind, start))
            self.problems["cursor"] = self.problems.get("cursor", 0) + 1
        for (topic,) in new.execute("SELECT topic FROM dead UNION ALL SELECT topic FROM retained"):
            if is_sealed(topic):
                self.keys.add(key_id(topic))
        # The row that it follows is lost, and in the ledger: from now on nobody is to miss it.
        new.execute(
            "UPDATE message SET crc = crc & ~? WHERE crc & ? "
            "AND NOT EXISTS (SELECT 1 FROM message before WHERE before.id = message.id - 1)",
            (FOLLOWS, FOLLOWS),
        )
