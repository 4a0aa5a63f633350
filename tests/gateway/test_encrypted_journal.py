"""A journal under a key: nothing legible in its files, keys that come and go, and a refusal where one is missing."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from gateway.mqtt.packets import PublishProperties, Will, WillProperties
from gateway.replies import Request, Requests
from gateway.retained import Retained, RetainedStore
from gateway.wills import Wills
from security.atrest import Keyring, key_id
from storeforward import backup, maintenance, schema
from storeforward.errors import JournalError
from storeforward.inspection import Inspection
from storeforward.journal import Journal
from storeforward.rekey import rekey
from storeforward.sealed_tables import open_due, seal_due
from storeforward.streams import Row

OLD, NEW = bytes(range(32)), bytes(range(32, 64))
BODY, TOPIC = b"the body of the message", "the/topic"
WORDS = (b"the body", b"the/topic", b"the will", b"the/will", b"the/answer", b"the correlation")


def fill(state: Path, *keys: bytes, rows: int = 300) -> None:
    """Something in every table that holds what users sent."""
    seal = Keyring(keys) if keys else None
    state.mkdir(exist_ok=True)
    journal = Journal.open(state, seal=seal)
    stream = journal.stream("alarms", "outbound")
    journal.cursor(stream, "uplink", "uplink")
    for _ in range(rows):
        journal.append(stream, TOPIC, lambda seq, payload: payload, BODY)
    journal.commit_now()
    row = next(iter(journal.read_range(stream, stream.first_seq, stream.next_seq)))
    journal.bury(stream, Row(row.seq, row.topic, None, row.body), "amqp:rejected", "")
    retained = RetainedStore(journal, 10)
    retained.set(Retained(TOPIC, 1, None, "alarms", 1, len(BODY)), BODY)
    will = Will("the/will", b"the will", 1, False, WillProperties(content_type="text/plain"))
    Wills(journal).set("app", will)
    name = f"loco:1.aa:alarms:{stream.next_seq:x}"
    if name not in Requests(journal)._open:
        Requests(journal).open(Request(name, "replies", "the/answer", b"the correlation", 1 << 60))
    journal.commit_now()
    journal.close()


def check(state: Path, *keys: bytes, rows: int = 300) -> None:
    """All of it reads."""
    journal = Journal.open(state, seal=Keyring(keys) if keys else None)
    assert journal.salvaged is None
    stream = journal.streams["alarms"]
    found = list(journal.read_range(stream, stream.first_seq, stream.next_seq))
    assert [(row.topic, row.body) for row in found] == [(TOPIC, BODY)] * rows
    retained = RetainedStore(journal, 10)
    assert [each.topic for some in retained.matching("#", 0) for each in some] == [TOPIC]
    assert retained.body(TOPIC) == BODY
    will = Wills(journal).get("app")
    assert will is not None
    assert (will.topic, will.payload) == ("the/will", b"the will")
    assert will.properties == PublishProperties(content_type="text/plain")
    (request,) = [each for known in (Requests(journal)._open,) for each in known.values()][-1:]
    assert (request.response_topic, request.correlation) == ("the/answer", b"the correlation")
    assert journal.loss_count == journal.dead_count
    journal.close()


def legible(state: Path) -> set[bytes]:
    data = b"".join(path.read_bytes() for path in state.glob("journal.db*"))
    return {word for word in WORDS if word in data}


def test_nothing_that_a_user_sent_is_legible_in_the_files_and_all_of_it_reads_with_the_key(tmp_path: Path) -> None:
    fill(tmp_path, NEW)
    assert not legible(tmp_path)
    check(tmp_path, NEW)
    fill(plain := tmp_path / "plain")
    assert legible(plain) == set(WORDS)  # so the search does find what is there


def test_without_the_key_the_start_is_refused_and_nothing_is_touched_or_set_aside(tmp_path: Path) -> None:
    fill(tmp_path, NEW)
    before = (tmp_path / "journal.db").read_bytes()
    for keys in ((), (OLD,)):
        with pytest.raises(JournalError, match=f"encrypted under key {key_id(NEW)}.*encryption_keys") as caught:
            Journal.open(tmp_path, seal=Keyring(keys) if keys else None)
        assert NEW.hex() not in str(caught.value)
    assert (tmp_path / "journal.db").read_bytes() == before
    assert not (tmp_path / "quarantine").exists()
    check(tmp_path, NEW)


def test_plain_rows_and_rows_of_two_keys_mix_and_rekey_brings_all_under_the_first(tmp_path: Path) -> None:
    fill(tmp_path, rows=100)
    fill(tmp_path, OLD, rows=100)
    fill(tmp_path, NEW, OLD, rows=100)
    check(tmp_path, NEW, OLD)
    with pytest.raises(JournalError, match=key_id(OLD)):
        Journal.open(tmp_path, seal=Keyring([NEW]))
    done, damaged = rekey(tmp_path, Keyring([NEW, OLD]))
    assert done >= 202
    assert damaged == 0
    assert not legible(tmp_path)
    check(tmp_path, NEW)
    assert rekey(tmp_path, Keyring([NEW])) == (0, 0)
    rekey(tmp_path, Keyring([NEW]), decrypt=True)
    check(tmp_path)


def test_a_dead_letter_goes_back_to_its_stream_under_the_key(tmp_path: Path) -> None:
    fill(tmp_path, OLD, rows=10)
    with Inspection(tmp_path, Keyring([OLD])) as inspection:
        (letter,) = inspection.dead()
        assert letter.topic == TOPIC
        assert inspection.dead_show(letter.id).body == BODY
    with Inspection(tmp_path) as inspection:
        assert inspection.dead()[0].topic == "(encrypted)"
        assert inspection.dead()[0].size == len(BODY)
    assert maintenance.requeue_dead(tmp_path, [letter.id], Keyring([NEW, OLD])) == 1
    journal = Journal.open(tmp_path, seal=Keyring([NEW, OLD]))
    rows = list(journal.read_range(journal.streams["alarms"], 1, 12))
    assert [row.body for row in rows] == [BODY] * 11
    journal.close()
    assert not legible(tmp_path)


def test_a_row_moved_to_another_place_is_refused_though_its_checksum_was_made_to_fit(tmp_path: Path) -> None:
    from storeforward.sealing import checksum

    fill(tmp_path, NEW, rows=3)
    with sqlite3.connect(tmp_path / "journal.db") as db:
        rows = db.execute("SELECT id, topic, body FROM message ORDER BY id").fetchall()
        one, (_, topic, body) = rows[0][0], rows[1]
        db.execute(
            "UPDATE message SET topic = ?, body = ?, crc = ? WHERE id = ?",
            (topic, body, checksum(one, topic, body), one),
        )
    db.close()
    journal = Journal.open(tmp_path, seal=Keyring([NEW]))
    stream = journal.streams["alarms"]
    assert [row.seq for row in journal.read(stream, 1, 10)] == [2, 3]
    assert journal.loss_count == 2  # the dead letter of `fill`, and this
    journal.close()


@pytest.mark.parametrize("keys", [(), (NEW,)])
def test_plain_rows_that_changed_places_do_not_match_their_checksums(tmp_path: Path, keys: tuple[bytes, ...]) -> None:
    fill(tmp_path, *keys, rows=4)
    with sqlite3.connect(tmp_path / "journal.db") as db:
        first, second = [id_ for (id_,) in db.execute("SELECT id FROM message ORDER BY id LIMIT 2")]
        db.execute("UPDATE message SET id = -1 WHERE id = ?", (first,))
        db.execute("UPDATE message SET id = ? WHERE id = ?", (first, second))
        db.execute("UPDATE message SET id = ? WHERE id = -1", (second,))
    db.close()
    journal = Journal.open(tmp_path, seal=Keyring(keys) if keys else None)
    assert [row.seq for row in journal.read(journal.streams["alarms"], 1, 10)] == [3, 4]
    journal.close()


def test_a_changed_topic_does_not_match_the_checksum(tmp_path: Path) -> None:
    fill(tmp_path, rows=2)
    with sqlite3.connect(tmp_path / "journal.db") as db:
        db.execute("UPDATE message SET topic = 'the/topiC' WHERE id & ? = 1", (schema.SEQ_MASK,))
    db.close()
    journal = Journal.open(tmp_path)
    assert [row.seq for row in journal.read(journal.streams["alarms"], 1, 10)] == [2]
    journal.close()


def test_a_journal_of_schema_3_is_taken_over_without_touching_a_row_and_refused_by_version_3(tmp_path: Path) -> None:
    from zlib import crc32

    fill(tmp_path, rows=50)
    (tmp_path / "journal.db").rename(tmp_path / "newer.db")
    with closing(sqlite3.connect(tmp_path / "journal.db", isolation_level=None)) as db:
        schema.migrate(db, 3)
        db.execute("ATTACH ? AS newer", (str(tmp_path / "newer.db"),))
        for table in ("meta", "stream", "cursor", "message", "dead", "retained", "loss", "loss_total"):
            names = ", ".join(row[1] for row in db.execute(f"PRAGMA main.table_info({table})"))
            db.execute(f"INSERT INTO main.{table} ({names}) SELECT {names} FROM newer.{table}")
        db.execute("DELETE FROM meta WHERE key = ?", (schema.VERSION_KEY,))
        # As version 3 wrote it: checksums of the bodies only.
        for table in ("message", "dead", "retained"):
            db.execute(f"UPDATE main.{table} SET crc = ?", (crc32(BODY),))
    fill(tmp_path, NEW, rows=50)
    check(tmp_path, NEW, rows=100)
    with sqlite3.connect(tmp_path / "journal.db") as db:
        assert db.execute("PRAGMA user_version").fetchone() == (schema.VERSION,)
        assert db.execute("SELECT count(*) FROM message WHERE crc = ?", (crc32(BODY),)).fetchone() == (50,)
        assert db.execute("SELECT count(*) FROM messages WHERE topic = '(encrypted)'").fetchone() == (50,)
    db.close()


def test_salvage_and_backup_need_no_key_and_keep_what_is_sealed(tmp_path: Path) -> None:
    state = tmp_path / "state"
    fill(state, NEW, rows=20)
    backup.back_up(state, tmp_path / "copy")
    backup.restore(tmp_path / "copy", tmp_path / "other")
    check(tmp_path / "other", NEW, rows=20)
    with sqlite3.connect(state / "journal.db") as db:
        db.execute("DELETE FROM meta WHERE key LIKE 'atrest%'")
    db.close()
    (state / "journal.suspect").write_text("a test says so\n")
    with pytest.raises(JournalError, match=key_id(NEW)):
        Journal.open(state)
    check(state, NEW, rows=20)


def test_the_topic_that_a_session_is_owed_is_sealed_for_that_session() -> None:
    seal = Keyring([NEW])
    value = seal_due(seal, "app", 1, TOPIC)
    assert isinstance(value, bytes)
    assert open_due(seal, "app", 1, value) == TOPIC
    with pytest.raises(ValueError, match="another row"):
        open_due(seal, "other", 1, value)


def test_commands_open_with_the_configurations_key_and_tell_sizes_without(tmp_path: Path) -> None:
    state = tmp_path / "state"
    fill(state, NEW, rows=2)
    (tmp_path / "key").write_text(NEW.hex())
    config = tmp_path / "lineside.toml"
    text = f'[gateway]\nid = "loco"\nstate_dir = "{state}"\n'

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "gateway", *words, "--config", str(config)]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)

    config.write_text(text)
    listed = json.loads(run("backlog", "alarms", "--json").stdout)["messages"]
    assert [(each["topic"], each["size"]) for each in listed] == [("(encrypted)", len(BODY))] * 2
    shown = run("show", "alarms", "1")
    assert shown.returncode == 1
    assert f"encrypted under key {key_id(NEW)}, {len(BODY)} bytes" in shown.stderr
    config.write_text(text + 'encryption_keys = ["key"]\n')
    assert json.loads(run("show", "alarms", "1", "--json").stdout)["topic"] == TOPIC
    assert json.loads(run("rekey", "--decrypt", "--json").stdout)["damaged"] == 0
    config.write_text(text)
    assert json.loads(run("show", "alarms", "1", "--json").stdout)["topic"] == TOPIC
