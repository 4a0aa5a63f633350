"""Flipped bits in every kind of page of a real journal, and in its WAL, against a record of what had been stored.

LINESIDE_FLIPS=3 takes so many bits of every page, and every frame of the WAL (about five minutes); without it a sample
of the pages of each kind. LINESIDE_SEED takes other bits.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import sqlite3
import struct
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from gateway.amqp.message import Template
from gateway.broker import Broker
from gateway.config import loads
from gateway.mqtt.codec import Will, WillProperties
from gateway.replies import Request
from gateway.retained import Retained
from security.atrest import Keyring
from storeforward import schema
from storeforward.errors import JournalError, JournalNewer
from storeforward.journal import Journal
from storeforward.sealing import Seal, about_dead, intact
from storeforward.streams import Stream, StreamLimits
from tests.cut import abandon
from tests.daemon import HUB_CONFIG, WAIT_S, Client, Daemon, Reader, free_port, wait_until

FLIPS = int(os.environ.get("LINESIDE_FLIPS", "0"))
SEED = int(os.environ.get("LINESIDE_SEED", "7"))
SAMPLE = 8  # flips of a kind of page, without LINESIDE_FLIPS
PAGE = schema.PAGE_SIZE_BYTES
KEY = bytes(range(32))
SESSIONS = 90
STARTS_MAX = 3
KINDS = (
    "header",
    "schema",
    "table interior",
    "table leaf",
    "index interior",
    "index leaf",
    "overflow",
    "free trunk",
    "free leaf",
    "pointer map",
)

CONFIG = """
[gateway]
id = "loco"
state_dir = "{state}"
[mqtt]
[[hub]]
name = "depot"
urls = ["amqp://127.0.0.1:1"]
[[outbound]]
stream = "alarms"
topics = ["alarm/#"]
hub = "depot"
address = "a"
[[outbound]]
stream = "telemetry"
topics = ["train/#"]
hub = "depot"
address = "t"
[[inbound]]
stream = "commands"
hub = "depot"
address = "c"
topic = "commands/{{subject}}"
"""

TEMPLATE = Template("loco", "1.aa", "s", None, "t")
Row = tuple[str, int | None, bytes]


@dataclass
class Known:
    """The independent record: what was appended and acknowledged, and where everybody was."""

    path: Path
    seal: Seal | None = None
    rows: dict[str, dict[int, Row]] = field(default_factory=lambda: defaultdict(dict))
    cursors: dict[tuple[str, str], int] = field(default_factory=dict)
    ends: dict[str, int] = field(default_factory=dict)
    sessions: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    sent: dict[str, int] = field(default_factory=dict)
    incoming: dict[str, int] = field(default_factory=dict)
    retained: dict[str, bytes] = field(default_factory=dict)
    dead: dict[tuple[str, int], bytes] = field(default_factory=dict)
    wills: set[str] = field(default_factory=set)
    requests: set[str] = field(default_factory=set)
    tokens: set[str] = field(default_factory=set)
    # Of the closed file: what each page is, and which pages a message stands in.
    kinds: dict[int, str] = field(default_factory=dict)
    pages: dict[tuple[str, int], set[int]] = field(default_factory=dict)

    def owed(self, stream: str) -> dict[int, Row]:
        low = min((at for (name, _), at in self.cursors.items() if name == stream), default=1)
        return {seq: row for seq, row in self.rows[stream].items() if seq >= low}


# ---------------------------------------------------------------------- making one


def body_of(seq: int, payload: bytes) -> bytes:
    return TEMPLATE.encode(seq, payload)


class Maker:
    """A day of a gateway through its own doors. `cut`: after the checkpoint, whatever comes stays in the WAL."""

    def __init__(self, state: Path, seal: Seal | None, known: Known) -> None:
        self.journal = Journal.open(state, seal=seal)
        self.broker = Broker(loads(CONFIG.format(state=state)), self.journal)
        self.known = known
        self.random = random.Random(SEED)
        for name in ("alarms", "telemetry"):
            stream = self.journal.stream(name, "outbound")
            self.journal.cursor(stream, "uplink", "uplink")
        known.tokens.add(self.journal.epoch_token)

    def append(self, name: str, topic: str, count: int, size: int, *, age_s: int = 0) -> None:
        journal, stream = self.journal, self.journal.streams[name]
        for _ in range(count):
            payload = self.random.randbytes(size)
            expires = journal.age_us() + age_s * 1_000_000 if age_s else None
            identity = None if stream.direction != "inbound" else b"sender" + payload[:10]
            seq = journal.append(stream, topic, body_of, payload, expires, identity)
            self.known.rows[name][seq] = topic, expires, body_of(seq, payload)
        journal.commit_now()
        self.known.ends[name] = stream.next_seq

    def advance(self, name: str, cursor: str, position: int) -> None:
        journal, stream = self.journal, self.journal.streams[name]
        journal.advance(stream, stream.cursors[cursor], position)
        journal.commit_now()
        self.known.cursors[name, cursor] = position

    def session(self, n: int) -> None:
        """A durable session with two subscriptions and places in two streams."""
        client, execute = f"panel-{n:04d}", self.journal.execute
        execute("INSERT INTO mqtt_session (client_id, expiry_s) VALUES (?, NULL)", (client,))
        for each in (f"commands/{n}/#", "commands/all", f"local/{n}"):
            execute(
                "INSERT INTO mqtt_subscription (client_id, filter, qos, options, since) VALUES (?, ?, 2, 0, ?)",
                (client, each, json.dumps({"commands": 1, "local": 1})),
            )
            self.known.sessions[client].add(each)
        execute(
            "INSERT INTO mqtt_outgoing VALUES (?, ?, ?, ?, 1)", (client, self.journal.streams["commands"].id, 3, n + 1)
        )
        execute("INSERT INTO mqtt_incoming VALUES (?, ?)", (client, n + 7))
        self.known.sent[client], self.known.incoming[client] = n + 1, n + 7
        for name in ("commands", "local"):
            self.journal.cursor(self.journal.streams[name], f"mqtt:{client}", "mqtt")
            self.known.cursors[name, f"mqtt:{client}"] = 1

    def small_things(self) -> None:
        journal, broker, known = self.journal, self.broker, self.known
        for n in range(250):
            topic = f"state/of/some/part/of/the/train/{n:05d}"
            body = body_of(0, self.random.randbytes(40 if n % 50 else 20_000))
            broker.retained.set(Retained(topic, 1, None, "local", None, len(body)), body)
            known.retained[topic] = body
        for n in range(12):
            will = Will(f"gone/{n}", self.random.randbytes(60), 1, False, WillProperties(content_type="text/plain"))
            broker.wills.set(f"panel-{n:04d}", will)
            known.wills.add(f"panel-{n:04d}")
            name = f"loco:1.aa:alarms:{n:012x}"
            broker.requests.open(Request(name, "commands", f"answer/{n}", b"which", 1 << 60))
            known.requests.add(name)
        for n in range(260):
            journal.lose("telemetry", 0 if n % 3 == 0 else 100_000 + n, "too-large", 5, f"the {n}th of them")
        stream = journal.streams["alarms"]
        journal.commit_now()
        for row in journal.read(stream, stream.cursors["uplink"].position + 5, 4):
            journal.bury(stream, row, "amqp:decode-error", "no")
            known.dead["alarms", row.seq] = row.body
        journal.commit_now()

    def all(self) -> None:
        self.append("telemetry", "train/speed", 900, 200)
        self.append("alarms", "alarm/door", 120, 150)
        self.append("alarms", "alarm/ü/fire", 60, 90, age_s=10**8)
        self.advance("telemetry", "uplink", 1)
        self.advance("alarms", "uplink", 31)
        for n in range(SESSIONS):
            self.session(n)
        self.journal.commit_now()
        self.append("commands", "commands/all", 40, 100)
        self.append("local", "local/1", 40, 100)
        self.append("telemetry", "train/log", 12, 30_000)
        self.append("alarms", "alarm/picture", 6, 9_000)
        self.small_things()
        self.append("commands", "commands/all", 60, 120)
        self.append("local", "local/2", 30, 120)
        self.append("alarms", "alarm/door", 100, 150)
        # What was deleted leaves free pages; several trunks of them would take a larger file than a test can flip.
        self.advance("telemetry", "uplink", 700)
        self.journal.reclaim()
        while self.journal.pending:
            self.journal.commit_now()


@contextlib.contextmanager
def made(directory: Path, seal: Seal | None = None) -> Iterator[tuple[Maker, Known]]:
    directory.mkdir()
    known = Known(directory, seal)
    maker = Maker(directory, seal, known)
    maker.all()
    yield maker, known


@pytest.fixture(scope="module")
def ram(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory whose syncs cost nothing: thousands of starts are made here."""
    shm = Path("/dev/shm")
    if not os.access(shm, os.W_OK):
        yield tmp_path_factory.mktemp("matrix")
        return
    directory = shm / f"lineside-matrix-{os.getpid()}"
    directory.mkdir()
    yield directory
    shutil.rmtree(directory)


@pytest.fixture(scope="module")
def closed(ram: Path) -> Known:
    with made(ram / "closed") as (maker, known):
        maker.journal.close()
    (known.path / "reserve").unlink()
    look_at_pages(known)
    return known


@pytest.fixture(scope="module")
def sealed(ram: Path) -> Known:
    with made(ram / "sealed", Keyring([KEY])) as (maker, known):
        maker.journal.close()
    (known.path / "reserve").unlink()
    look_at_pages(known)
    return known


@pytest.fixture(scope="module")
def killed(ram: Path) -> Known:
    """As a SIGKILL leaves it: what came after the last checkpoint is in the WAL only."""
    with made(ram / "running") as (maker, known):
        maker.journal.checkpoint()
        for n in range(12):
            maker.append("alarms", "alarm/door", 8, 150)
            maker.append("telemetry", "train/speed", 10, 200)
            maker.advance("alarms", "uplink", 40 + n)
        maker.append("telemetry", "train/log", 1, 30_000)
        maker.append("alarms", "alarm/door", 3, 150)
        known.path = ram / "killed"
        shutil.copytree(ram / "running", known.path)
        maker.journal.close()
    (known.path / "reserve").unlink()
    return known


# ---------------------------------------------------------------------- what is in which page, by a walk of its own


def look_at_pages(known: Known) -> None:
    data = (known.path / "journal.db").read_bytes()
    kinds: dict[int, str] = {1: "header"}
    with contextlib.closing(sqlite3.connect(known.path / "journal.db")) as db:
        roots = dict(db.execute("SELECT name, rootpage FROM sqlite_schema WHERE rootpage > 0"))
        names = dict(db.execute("SELECT id, name FROM stream"))
    entries = PAGE // 5
    for page in range(2, len(data) // PAGE + 1, entries + 1):
        kinds[page] = "pointer map"
    trunk = int.from_bytes(data[32:36], "big")
    while trunk:
        kinds[trunk] = "free trunk"
        at = (trunk - 1) * PAGE
        next_, count = struct.unpack_from(">2I", data, at)
        for leaf in struct.unpack_from(f">{count}I", data, at + 8):
            kinds[leaf] = "free leaf"
        trunk = next_

    def walk(page: int, where: Callable[[int, list[int]], None]) -> None:
        at = (page - 1) * PAGE
        head = at + (100 if page == 1 else 0)
        kind = data[head]
        name = {13: "table leaf", 5: "table interior", 10: "index leaf", 2: "index interior"}[kind]
        kinds.setdefault(page, name)
        (count,) = struct.unpack_from(">H", data, head + 3)
        for pointer in struct.unpack_from(f">{count}H", data, head + (12 if kind in (2, 5) else 8)):
            cell = at + pointer
            if kind in (2, 5):
                walk(int.from_bytes(data[cell : cell + 4], "big"), where)
            if kind == 5:
                continue
            size, cell = varint(data, cell + (4 if kind == 2 else 0))
            rowid, cell = varint(data, cell) if kind == 13 else (0, cell)
            chain = [page]
            most = PAGE - 35 if kind == 13 else (PAGE - 12) * 64 // 255 - 23
            if size > most:
                least = (PAGE - 12) * 32 // 255 - 23
                kept = least + (size - least) % (PAGE - 4)
                cell += kept if kept <= most else least
                overflow = int.from_bytes(data[cell : cell + 4], "big")
                while overflow:
                    kinds[overflow] = "overflow"
                    chain.append(overflow)
                    overflow = int.from_bytes(data[(overflow - 1) * PAGE :][:4], "big")
            where(rowid, chain)
        if kind in (2, 5):
            walk(int.from_bytes(data[head + 8 : head + 12], "big"), where)

    def message(rowid: int, chain: list[int]) -> None:
        known.pages[names[rowid >> schema.SEQ_BITS], rowid & schema.SEQ_MASK] = set(chain)

    walk(1, lambda rowid, chain: None)
    for page in [page for page, kind in kinds.items() if kind.startswith("table") or kind == "overflow"]:
        kinds[page] = "schema"
    for name, root in roots.items():
        walk(root, message if name == "message" else lambda rowid, chain: None)
    known.kinds = kinds
    assert set(kinds) == set(range(1, len(data) // PAGE + 1)), "a page that the walk did not come by"
    assert set(kinds.values()) == set(KINDS), f"of some kinds there is none: {set(KINDS) - set(kinds.values())}"


def varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for n in range(9):
        value = value << 7 | data[at + n] & 0x7F
        if data[at + n] < 0x80:
            return value, at + n + 1
    return value, at + 9


def places(data: bytes, page: int, kind: str, rng: random.Random) -> Iterator[tuple[str, int]]:
    """Bits of one page, endlessly: of its header, its cell pointers, and what stands in it."""
    start = (page - 1) * PAGE
    head = start + (100 if page == 1 else 0)
    tree = kind in ("header", "schema") or "leaf" in kind or "interior" in kind
    tree = tree and not kind.startswith("free")
    (count,) = struct.unpack_from(">H", data, head + 3) if tree else (0,)
    cells = head + (12 if "interior" in kind else 8)
    (content,) = struct.unpack_from(">H", data, head + 5) if tree else (0,)
    spans = [("content", start + content, start + PAGE)]
    if tree:
        spans += [("page header", head, cells), ("cell pointers", cells, cells + 2 * max(1, count))]
    elif kind == "free trunk":
        spans = [("trunk", start, start + 8 + 4 * int.from_bytes(data[start + 4 : start + 8], "big"))]
    elif kind == "pointer map":
        spans = [("entries", start, start + 5 * (len(data) // PAGE - page))]
    if page == 1:
        spans.append(("file header", 0, 100))
    while True:
        for where, begin, end in (span for span in spans if span[1] < span[2]):
            yield where, rng.randrange(begin * 8, end * 8)


# ---------------------------------------------------------------------- using one, as the daemon does


@dataclass
class Found:
    """What a start, or several, made of a damaged journal."""

    starts: int = 0
    reports: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    rows: dict[str, dict[int, Row]] = field(default_factory=lambda: defaultdict(dict))
    lost: dict[str, set[int]] = field(default_factory=lambda: defaultdict(set))
    lost_rows: int = 0
    cursors: dict[tuple[str, str], int] = field(default_factory=dict)
    ends: dict[str, int] = field(default_factory=dict)
    sessions: dict[str, set[str]] = field(default_factory=dict)
    sent: dict[str, int] = field(default_factory=dict)
    incoming: dict[str, int] = field(default_factory=dict)
    retained: dict[str, bytes] = field(default_factory=dict)
    dead: dict[tuple[str, int], bytes] = field(default_factory=dict)
    damaged: set[tuple[str, int]] = field(default_factory=set)
    wills: set[str] = field(default_factory=set)
    requests: set[str] = field(default_factory=set)
    tokens: list[str] = field(default_factory=list)
    given: dict[str, int] = field(default_factory=dict)


def start(state: Path, known: Known, *, work: bool = True) -> Found:
    """Start, work, read everything as consumers do, until a run goes through; a run that meets damage ends."""
    found = Found()
    while found.starts < STARTS_MAX:
        found.starts += 1
        journal = Journal.open(state, seal=known.seal)
        found.tokens.append(journal.epoch_token)
        if journal.salvaged:
            found.reports.append(journal.salvaged)
        if known.seal is not None and isinstance(known.seal, Keyring):
            assert journal.seal is known.seal
        heard: list[JournalError] = []
        journal.on_damage = heard.append
        try:
            use(journal, known, found, work=work)
        except JournalError as error:
            found.errors.append(str(error))
            abandon(journal)
            continue
        assert not heard, "damage that was told, and not raised"
        journal.close()
        return found
    raise AssertionError(f"not usable after {STARTS_MAX} starts: {found.errors} {found.reports}")


def use(journal: Journal, known: Known, found: Found, *, work: bool) -> None:
    broker = Broker(loads(CONFIG.format(state=journal.state_dir)), journal)
    found.cursors.clear()
    for name in ("alarms", "telemetry"):
        stream = journal.stream(name, "outbound", StreamLimits())
        journal.cursor(stream, "uplink", "uplink")
    for stream in journal.streams.values():
        found.cursors |= {(stream.name, name): cursor.position for name, cursor in stream.cursors.items()}
        found.ends[stream.name] = stream.next_seq
    found.sessions = {client: set(session.subscriptions) for client, session in broker.sessions.items()}
    found.sent = {client: n for client, session in broker.sessions.items() for n in session.sent}
    found.incoming = {client: n for client, session in broker.sessions.items() for n in session.incoming}
    found.wills = {client for client in known.wills if client in broker.wills}
    found.requests = set(broker.requests._open)
    for _ in range(2 if work else 1):
        # Twice, with work between: what takes a page for free that is not shows only when it has been filled.
        for stream in journal.streams.values():
            found.rows[stream.name] = {}
            read(journal, stream, found.rows[stream.name])
        if work:
            busy(journal, found)
    found.retained = {}
    for topic in known.retained:
        body = broker.retained.body(topic)
        if body is not None:
            found.retained[topic] = body
    journal.commit_now()
    found.dead = {}
    found.damaged.clear()
    for stream_name, seq, topic, crc, body in journal.query("SELECT stream, seq, topic, crc, body FROM dead"):
        if not intact(seq, topic, crc, body):
            found.damaged.add((stream_name, seq))  # shown as such, and never sent
        else:
            found.dead[stream_name, seq] = journal.opened(about_dead(stream_name, seq), topic, body)[1]
    found.lost.clear()
    for stream_name, seq in journal.query("SELECT stream, seq FROM loss WHERE reason = 'corrupt'"):
        found.lost[stream_name].add(seq)
    ((found.lost_rows,),) = journal.query("SELECT count(*) FROM loss WHERE reason = 'too-large'")


def read(journal: Journal, stream: Stream, into: dict[int, Row]) -> None:
    """From where the slowest consumer is, as each of them would."""
    seq = min((cursor.position for cursor in stream.cursors.values()), default=stream.first_seq)
    while seq < stream.committed:
        rows = journal.read(stream, seq, 100)
        if not rows:
            break  # as a drain does: "only a gap is left"
        for row in rows:
            into[row.seq] = row.topic, row.expires_age_us, row.body
        seq = rows[-1].seq + 1
    journal.commit_now()


def busy(journal: Journal, found: Found) -> None:
    """Rows of all sizes, more than there are free pages; a checkpoint, so that they are read from the file."""
    for stream in journal.streams.values():
        first = stream.next_seq
        for n in range(60):
            journal.append(stream, "busy", body_of, bytes(5000 if n % 10 == 0 else 300))
        found.given.setdefault(stream.name, first)
        journal.commit_now()
        stream.tail.clear()
        stream.tail_bytes = stream.tail_rows = 0
    journal.checkpoint()


# ---------------------------------------------------------------------- what has to hold


def compare(known: Known, found: Found, damaged: set[int], *, wal: bool = False) -> None:
    """`damaged`: pages of the file that are. `wal`: it was the WAL, and what it takes with it are the last commits."""
    told = bool(found.reports)
    assert len(set(found.tokens) | known.tokens) == len(found.tokens) + len(known.tokens), "an epoch twice"
    for name in ("alarms", "telemetry", "commands", "local"):
        have, owed, lost = found.rows[name], known.owed(name), found.lost[name]
        end = found.ends.get(name, 1)
        mine = {seq: row for seq, row in have.items() if seq < found.given.get(name, end)}
        wrong = {seq for seq, row in mine.items() if row != known.rows[name].get(seq)}
        assert not wrong, f"{name}: rows that nobody stored: {sorted(wrong)[:5]}"
        assert list(have) == sorted(have), f"{name}: out of order"
        missing = owed.keys() - have.keys()
        if not wal:
            assert end >= known.ends[name], f"{name}: ends at {end}, seqs would be used again"
            kept = {seq for seq in missing if not known.pages[name, seq] & damaged}
            assert not kept, f"{name}: rows of pages that are whole are gone: {sorted(kept)[:5]}"
        untold = {seq for seq in missing if seq < end} - lost
        assert not untold, f"{name}: gone and not in the ledger: {sorted(untold)[:5]}"
        if missing and not wal:
            assert told or lost, "damage that was not told"
    for key, position in known.cursors.items():
        if key not in found.cursors:
            assert key[0] in ("commands", "local"), f"{key}: the cursor is gone"
            assert told, f"{key}: the cursor is gone, and nobody says so"
            continue
        passed = {seq for seq in known.owed(key[0]) if position <= seq < found.cursors[key]}
        assert passed <= found.lost[key[0]], f"{key}: at {found.cursors[key]}, was at {position}"
    for what in ("sessions", "sent", "incoming", "retained", "dead"):
        before, after = getattr(known, what), getattr(found, what)
        strange = {key for key, value in after.items() if key in before and value != before[key]}
        if told:  # subscriptions may be lost, too
            strange = {key for key in strange if what != "sessions" or not after[key] <= before[key]}
        gone = before.keys() - after.keys() - found.damaged
        if wal:
            continue
        assert not strange, f"{what}: changed: {sorted(strange)[:3]}"
        assert not gone or told or found.lost["retained"], f"{what}: gone and not told: {sorted(gone)[:3]}"
    for what in ("wills", "requests"):
        gone = getattr(known, what) - getattr(found, what)
        assert not gone or told or wal, f"{what}: gone and not told: {sorted(gone)[:3]}"


def set_aside(state: Path, before: dict[str, bytes], found: Found) -> None:
    """Whole, byte for byte, if it was the start that found it; else the daemon had worked on it."""
    sets = sorted((state / "quarantine").iterdir()) if (state / "quarantine").exists() else []
    assert len(sets) == len(found.reports)
    if found.reports and not (found.errors and found.starts > 1 and len(found.reports) < found.starts):
        kept = {path.name: path.read_bytes() for path in sets[0].iterdir()}
        for name, data in before.items():
            assert kept.get(name) == data, f"{name} is not what it was"
    for each in sets:
        assert (each / "journal.db").exists() or (each / "journal.db-wal").exists()


def files_of(state: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in state.glob("journal.db*") if not path.name.endswith("-shm")}


def try_it(
    known: Known, state: Path, change: Callable[[Path], str], damaged: set[int], *, wal: bool = False, work: bool = True
) -> Found:
    if state.exists():
        shutil.rmtree(state)
    shutil.copytree(known.path, state)
    what = change(state)
    before = files_of(state)
    found = None
    try:
        found = start(state, known, work=work)
        set_aside(state, before, found)
        compare(known, found, damaged, wal=wal)
    except BaseException as error:
        error.add_note(what)
        if found is not None:
            error.add_note(f"starts {found.starts}; {found.reports}; {found.errors}")
        raise
    return found


def flip(path: Path, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(bit // 8)
        (byte,) = file.read(1)
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))


# ---------------------------------------------------------------------- the tests


@pytest.mark.parametrize("encrypted", [False, True], ids=["plain", "sealed"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.timeout(60 + 120 * FLIPS)
def test_whatever_bit_of_a_page_flips_nothing_is_passed_over_and_what_reads_is_kept(
    request: pytest.FixtureRequest, ram: Path, kind: str, encrypted: bool
) -> None:
    known: Known = request.getfixturevalue("sealed" if encrypted else "closed")
    data = (known.path / "journal.db").read_bytes()
    rng = random.Random(f"{SEED} {kind} {encrypted}")
    of_kind = [page for page, each in known.kinds.items() if each == kind]
    pages = of_kind if FLIPS else [rng.choice(of_kind) for _ in range(1 if len(of_kind) == 1 else SAMPLE)]
    bits = FLIPS or (SAMPLE * 2 if len(of_kind) == 1 else 1)
    if encrypted and not FLIPS:
        pages, bits = pages[: len(pages) // 3 or 1], min(bits, SAMPLE // 3)
    count: Counter[str] = Counter()
    for page in pages:
        spots = places(data, page, kind, rng)
        for _ in range(bits):
            where, bit = next(spots)

            def change(state: Path, bit: int = bit, where: str = where, page: int = page) -> str:
                flip(state / "journal.db", bit)
                return f"bit {bit % 8} of byte {bit // 8 % PAGE} of page {page} ({kind}, {where}), seed {SEED}"

            found = try_it(known, ram / "case", change, {page})
            count["flips"] += 1
            count["found by the start" if found.reports and not found.errors else "found while running"] += bool(
                found.reports
            )
            count["rows lost"] += sum(map(len, found.lost.values()))
    print(f"{kind}: {len(set(pages))} of {len(of_kind)} pages: {dict(count)}")


# ---------------------------------------------------------------------- the WAL

FRAME = PAGE + 24


def frames_of(data: bytes) -> int:
    """How many frames there are; behind them may be some of an earlier round, with other salts."""
    salts = [data[32 + at + 8 : 32 + at + 16] for at in range(0, len(data) - 32, FRAME)]
    return next((n for n, each in enumerate(salts) if each != data[16:24]), len(salts))


def commits_of(data: bytes) -> list[int]:
    """At which frames, counted from 1, a transaction ends."""
    frames = frames_of(data)
    return [n for n in range(1, frames + 1) if any(data[32 + (n - 1) * FRAME + 4 : 32 + (n - 1) * FRAME + 8])]


def ends_at(known: Known, ram: Path, frames: int) -> dict[str, int]:
    """Where the streams end after so many whole frames, as SQLite alone reads it."""
    copy = ram / "prefix"
    shutil.rmtree(copy, ignore_errors=True)
    copy.mkdir()
    shutil.copy(known.path / "journal.db", copy)
    (copy / "journal.db-wal").write_bytes((known.path / "journal.db-wal").read_bytes()[: 32 + frames * FRAME])
    with contextlib.closing(sqlite3.connect(copy / "journal.db")) as db:
        return dict(db.execute("SELECT name, next_seq FROM stream"))


def in_order_up_to(found: Found, known: Known, ends: dict[str, int]) -> None:
    """Everything that had been committed by then is there, without a gap, and nothing that came later."""
    assert found.ends == ends
    for name, end in ends.items():
        have = {seq: row for seq, row in found.rows[name].items() if seq < end}
        low = min((at for (stream, _), at in found.cursors.items() if stream == name), default=1)
        assert {seq: row for seq, row in known.rows[name].items() if low <= seq < end} == have


@pytest.mark.timeout(600)
def test_a_wal_cut_anywhere_leaves_the_commits_before_the_cut_in_order_and_nothing_half(
    killed: Known, ram: Path
) -> None:
    data = (killed.path / "journal.db-wal").read_bytes()
    commits = commits_of(data)
    frames = frames_of(data)
    assert len(commits) > 30
    rng = random.Random(SEED)
    cuts = [(n, 0) for n in range(frames + 1)] + [(n, rng.randrange(1, FRAME)) for n in range(frames)]
    for n, more in cuts if FLIPS else rng.sample(cuts, 20):
        cut = 32 + n * FRAME + more

        def change(state: Path, cut: int = cut) -> str:
            os.truncate(state / "journal.db-wal", cut)
            return f"cut at byte {cut}, frame {(cut - 32) // FRAME} and {(cut - 32) % FRAME} bytes"

        found = try_it(killed, ram / "case", change, set(), wal=True, work=False)
        # Whoever cuts it off whole leaves nothing to tell that there was more; only the identities stay apart.
        assert not found.reports
        whole = max((c for c in commits if c <= n), default=0)
        in_order_up_to(found, killed, ends_at(killed, ram, whole))
    print(f"WAL: {len(cuts) if FLIPS else 20} cuts in {frames} frames, {len(commits)} commits")


@pytest.mark.timeout(1200)
def test_a_bit_of_the_wal_costs_the_rows_it_stands_in_and_not_the_commits_behind_it(killed: Known, ram: Path) -> None:
    data = (killed.path / "journal.db-wal").read_bytes()
    commits = commits_of(data)
    frames = frames_of(data)
    rng = random.Random(SEED)
    spots = [("wal header", rng.randrange(32 * 8)) for _ in range(FLIPS or 8)]
    for n in range(frames):
        at = 32 + n * FRAME
        for where, begin, end in (("frame header", at, at + 24), ("page", at + 24, at + FRAME)):
            spots += [(where, rng.randrange(begin * 8, end * 8)) for _ in range(max(1, FLIPS // 10))]
    count: Counter[str] = Counter()
    for where, bit in spots if FLIPS else [*spots[:8], *rng.sample(spots[8:], 24)]:

        def change(state: Path, bit: int = bit, where: str = where) -> str:
            flip(state / "journal.db-wal", bit)
            at = bit // 8 - 32
            return f"bit {bit % 8} of byte {at % FRAME} of frame {at // FRAME + 1} of {frames} ({where}), seed {SEED}"

        found = try_it(killed, ram / "case", change, set(), wal=True, work=False)
        count["flips"] += 1
        damaged = (bit // 8 - 32) // FRAME + 1
        behind = [c for c in commits if c >= damaged]
        if where == "wal header" or len(behind) > 1:
            assert found.reports, "commits that were synced are behind it, and nobody says so"
            assert found.ends == killed.ends, "commits behind the damage are gone"
            gone = {name: killed.owed(name).keys() - found.rows[name].keys() for name in killed.ends}
            assert sum(map(len, gone.values())) < 40, "more is gone than one page"
            count["salvaged"] += 1
            count["rows lost"] += sum(map(len, found.lost.values()))
        else:
            # The power may have cut off the last commit just so: nothing was acknowledged, or nobody can know.
            assert not found.reports
            in_order_up_to(found, killed, ends_at(killed, ram, max((c for c in commits if c < damaged), default=0)))
            count["last commit gone"] += 1
    print(f"WAL: {dict(count)} in {frames} frames")


def test_the_last_commit_cut_off_by_a_power_cut_is_no_damage_where_commits_are_not_synced_none_is(
    killed: Known, ram: Path
) -> None:
    state = ram / "weak"
    shutil.copytree(killed.path, state)
    flip(state / "journal.db-wal", (32 + 3 * FRAME + 500) * 8)
    journal = Journal.open(state, synchronous="OFF")
    assert journal.salvaged is None
    journal.close()


# ---------------------------------------------------------------------- files that are missing, or another's


def shm_gone(state: Path) -> str:
    (state / "journal.db-shm").unlink(missing_ok=True)
    return "no -shm"


def shm_noise(state: Path) -> str:
    (state / "journal.db-shm").write_bytes(random.Random(SEED).randbytes(32768))
    return "-shm of noise"


def shm_short(state: Path) -> str:
    (state / "journal.db-shm").write_bytes(b"\1" * 77)
    return "-shm of 77 bytes"


@pytest.mark.parametrize("change", [shm_gone, shm_noise, shm_short], ids=["gone", "noise", "short"])
def test_the_index_of_the_wal_is_made_again_whatever_is_in_its_place(
    killed: Known, ram: Path, change: Callable[[Path], str]
) -> None:
    found = try_it(killed, ram / "case", change, set(), wal=True)
    assert not found.reports
    assert found.ends == killed.ends


def test_the_index_of_another_journals_wal_is_not_believed(killed: Known, closed: Known, ram: Path) -> None:
    other = ram / "other"
    other.mkdir()
    journal = Journal.open(other)
    stream = journal.stream("x", "outbound")
    journal.append(stream, "t", body_of, b"x")
    journal.commit_now()
    stale = (other / "journal.db-shm").read_bytes()
    foreign = (other / "journal.db-wal").read_bytes()
    journal.close()

    def change(state: Path) -> str:
        (state / "journal.db-shm").write_bytes(stale)
        return "-shm of another"

    found = try_it(killed, ram / "case", change, set(), wal=True)
    assert not found.reports
    assert found.ends == killed.ends

    def another(state: Path) -> str:
        (state / "journal.db-wal").write_bytes(foreign)
        return "WAL of another"

    found = try_it(closed, ram / "case", another, set())
    assert found.reports
    assert "x" not in found.ends
    assert found.ends == closed.ends
    assert not any(found.lost.values())


def test_an_empty_file_beside_a_wal_is_damage_and_the_wal_is_not_thrown_away(killed: Known, ram: Path) -> None:
    def change(state: Path) -> str:
        os.truncate(state / "journal.db", 0)
        return "no bytes"

    def gone(state: Path) -> str:
        (state / "journal.db").unlink()
        return "no file"

    for each in (change, gone):
        state = ram / "case"
        shutil.rmtree(state, ignore_errors=True)
        shutil.copytree(killed.path, state)
        each(state)
        before = (state / "journal.db-wal").read_bytes()
        found = start(state, killed, work=False)
        assert found.reports
        assert (state / "quarantine" / "0001" / "journal.db-wal").read_bytes() == before
        # What came after the last checkpoint is in it, and the pages that it changed.
        newest = {name: seq for name, seq in killed.ends.items() if name in ("alarms", "telemetry")}
        assert {name: found.ends[name] for name in newest} == newest
        for name in newest:
            assert killed.ends[name] - 1 in found.rows[name]
            assert killed.owed(name).keys() - found.rows[name].keys() <= found.lost[name] | set(found.rows[name])


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.97], ids=str)
@pytest.mark.parametrize("odd", [0, 1000], ids=["whole pages", "part of a page"])
def test_of_a_file_that_was_cut_off_what_is_left_is_salvaged(closed: Known, ram: Path, share: float, odd: int) -> None:
    pages = max(closed.kinds)
    left = int(pages * share)

    def change(state: Path) -> str:
        os.truncate(state / "journal.db", left * PAGE + odd)
        return f"{left} of {pages} pages, and {odd} bytes"

    found = try_it(closed, ram / "case", change, set(range(left + 1, pages + 1)))
    assert found.reports


def test_a_wal_that_is_gone_costs_what_was_in_it(killed: Known, ram: Path) -> None:
    def change(state: Path) -> str:
        (state / "journal.db-wal").unlink()
        return "no WAL"

    found = try_it(killed, ram / "case", change, set(), wal=True, work=False)
    in_order_up_to(found, killed, ends_at(killed, ram, 0))


def test_what_is_no_file_or_may_not_be_read_is_said_and_left_alone(ram: Path) -> None:
    state = ram / "none"
    (state / "journal.db").mkdir(parents=True)
    with pytest.raises(JournalError, match="is a directory"):
        Journal.open(state)
    (state / "journal.db").rmdir()
    (state / "journal.db").symlink_to(state / "journal.db")
    with pytest.raises(JournalError, match=r"journal\.db"):
        Journal.open(state)
    assert not (state / "quarantine").exists()


def test_another_programs_file_is_refused_and_left_alone(ram: Path) -> None:
    state = ram / "foreign"
    state.mkdir()
    with contextlib.closing(sqlite3.connect(state / "journal.db", isolation_level=None)) as db:
        db.execute("PRAGMA application_id = 252006674")
        db.execute("CREATE TABLE songs (title TEXT)")
        db.execute("INSERT INTO songs VALUES ('a')")
    before = (state / "journal.db").read_bytes()
    with pytest.raises(JournalError, match="another program's file"):
        Journal.open(state)
    assert (state / "journal.db").read_bytes() == before
    assert not (state / "quarantine").exists()


@pytest.mark.parametrize("version", [0, 1, schema.VERSION - 1, schema.VERSION + 1, 1 << 30])
def test_a_schema_number_that_its_tables_do_not_have_is_damage_not_another_version(
    closed: Known, ram: Path, version: int
) -> None:
    def change(state: Path) -> str:
        with (state / "journal.db").open("r+b") as file:
            file.seek(60)
            file.write(struct.pack(">I", version))
        return f"schema {version}"

    found = try_it(closed, ram / "case", change, set())
    assert found.reports
    assert not any(found.lost.values())


def test_a_newer_versions_file_is_left_to_it(closed: Known, ram: Path) -> None:
    state = ram / "newer"
    shutil.copytree(closed.path, state)
    with contextlib.closing(sqlite3.connect(state / "journal.db", isolation_level=None)) as db:
        db.execute(f"PRAGMA user_version = {schema.VERSION + 1}")
        db.execute("UPDATE meta SET value = ? WHERE key = ?", (f"{schema.VERSION + 1} 1", schema.VERSION_KEY))
    before = (state / "journal.db").read_bytes()
    with pytest.raises(JournalNewer):
        Journal.open(state)
    assert (state / "journal.db").read_bytes() == before


# ---------------------------------------------------------------------- the daemon


def test_a_page_that_a_drain_finds_damaged_hours_after_the_start_ends_the_daemon_and_the_next_start_sends_the_rest(
    tmp_path: Path,
) -> None:
    for name in ("gateway", "hub"):
        (tmp_path / name).mkdir()
    hub_port = free_port()
    gateway = Daemon(tmp_path / "gateway", hub_port=hub_port)
    daemons = [gateway]
    try:
        gateway.status()
        app = Client(gateway.port)
        app.publish(3000)
        app.close()
        gateway.process.terminate()
        assert gateway.process.wait(WAIT_S) == 0
        path = gateway.state / "journal.db"
        data = bytearray(path.read_bytes())
        leaves = [at for at in range(0, len(data), PAGE) if data[at] == 13 and b"train/speed" in data[at : at + PAGE]]
        middle = leaves[len(leaves) // 2]
        data[middle] ^= 0x20  # a page of no kind; all that stands in it is still there
        path.write_bytes(data)
        gateway.start()
        gateway.status()
        assert "salvaged" not in gateway.log.read_text(), "so it was not the start that found it"

        with gateway.paused():  # a topic keeps nothing of what comes before its reader
            hub = Daemon(tmp_path / "hub", HUB_CONFIG, hub_port)
            daemons.append(hub)
            hub.status()
            reader = Reader(hub)
        assert gateway.process.wait(2 * WAIT_S) == 1, gateway.log.read_text()
        assert "the next start" in gateway.log.read_text()
        before = len(reader.got)
        assert before < 3000

        gateway.start()  # as systemd does
        wait_until(lambda: len(set(reader.got)) == 3000, within_s=30)
        firsts = list(dict.fromkeys(reader.got))
        assert firsts == list(range(3000)), "passed over, or out of order"
        assert gateway.status()["losses"] == 0
        assert "salvaged" in gateway.log.read_text()
        assert (gateway.state / "quarantine" / "0001" / "journal.db").exists()
    finally:
        for daemon in daemons:
            daemon.end()
