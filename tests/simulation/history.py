"""What everybody outside the gateway saw, and whether the promises were kept. Knows nothing of how the gateway works.

The model apps and hubs write down what they sent, got and answered; `look` at any moment and `check` in the end hold
that, together with the journal's tables as plain SQL, against P1 (acknowledged means on disk, or accepted by the hub),
P2 (order), P3 (no loss, bounded duplicates), P4 (nothing vanishes silently) and P6 (no clock expires anything).
"""

from __future__ import annotations

import sqlite3
from bisect import bisect_right, insort
from collections import defaultdict
from collections.abc import Callable, Set
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

import proton

SEQ_BITS = 48
SEQ_MASK = (1 << SEQ_BITS) - 1
# Why a message may be in the ledger in these worlds.
REASONS = {"dead-letter", "expired"}
# Of the ttl that a message still has, in seconds: what it may lose to rounding, and gain by a power cut.
ROUNDING_S = 0.01
AGE_BACK_S = 10.5


# What is behind it in a body only makes the message larger.
PADDING = "|"
ID = "x-opt-lineside-id"


@dataclass(frozen=True, slots=True)
class Letter:
    """What a message says, by proton's own decoder."""

    payload: str
    identity: str | None
    ttl_s: float | None


def read(body: bytes) -> Letter:
    return _decoded(bytes(body))


# The same bytes come by several times: at a hub, again after a cut, and in the tables at every look.
@lru_cache(maxsize=4096)
def _decoded(body: bytes) -> Letter:
    message = proton.Message()
    message.decode(body)
    identity = (message.annotations or {}).get(proton.symbol(ID))
    return Letter(str(message.body).partition(PADDING)[0], identity, message.ttl or None)


def written(
    payload: str,
    message_id: str | None = None,
    subject: str | None = None,
    ttl_s: float | None = None,
    padding_bytes: int = 0,
) -> bytes:
    body = payload if not padding_bytes else payload + PADDING + "." * padding_bytes
    message = proton.Message(body=body, id=message_id, subject=subject, durable=True, ttl=ttl_s or 0.0)
    return bytes(message.encode())


@dataclass(frozen=True, slots=True)
class Place:
    """A message's identity, read: gateway:epoch:stream:seq."""

    text: str
    epoch: str
    stream: str
    seq: int

    @classmethod
    def of(cls, identity: str) -> Place:
        gateway, epoch, stream, seq = identity.split(":")
        assert gateway == "loco", f"identity {identity!r} is not this gateway's"
        return cls(identity, epoch, stream, int(seq, 16))


@dataclass(eq=False, slots=True)
class Arrival:
    """A message at a receiver. link: one number an attach; life: the gateway's, one number a start or reload.

    stored: the receiver kept it. ttl_s: what the message says is left of it. came, answered: when among what came and
    was answered on its link; answered is None where the link was gone by then.
    """

    link: int
    life: int
    place: Place | None
    payload: str
    answer: str
    stored: bool
    condition: str = ""
    at: float = 0.0
    ttl_s: float | None = None
    came: int = 0
    answered: int | None = None

    @property
    def final(self) -> bool:
        """Whether the receiver wants to hear no more of it."""
        return self.answer in ("accepted", "rejected", "barred")

    def open_at(self, moment: int) -> bool:
        return self.came < moment and (self.answered is None or self.answered > moment)


@dataclass(frozen=True, slots=True)
class Sent:
    """What an app handed in under one payload."""

    stream: str
    at: float
    size_bytes: int
    ttl_s: float | None = None

    def over(self, now: float) -> bool:
        """Whether it may have expired."""
        return self.ttl_s is not None and now >= self.at + self.ttl_s


@dataclass(slots=True)
class Reader:
    """What one subscription, or a queue's receivers together, got of the way back."""

    name: str
    exclusive: bool
    arrivals: list[Arrival] = field(default_factory=list)


@dataclass(slots=True)
class History:
    """window: of the uplink; local_window: of the gateway towards its apps. A restore excuses what it took back.

    consistent: whether the hubs take nothing out of turn. outbound: the streams that go to them. boots: power cuts.
    stir: is told what happens as it happens.
    """

    window: int
    local_window: int
    consistent: bool
    outbound: tuple[str, ...]
    now: Callable[[], float]
    stir: Callable[[str], None] = lambda what: None
    life: int = 0
    boots: int = 0
    lingering: tuple[str, ...] = ()  # outbound streams whose messages the hub may settle before they are written
    sent: dict[str, Sent] = field(default_factory=dict)
    acked: set[str] = field(default_factory=set)  # payloads an app was told are safe
    refused: dict[str, str] = field(default_factory=dict)
    hub: list[Arrival] = field(default_factory=list)
    to_gateway: list[str] = field(default_factory=list)  # payloads in the order that the hub sent them first
    taken: set[str] = field(default_factory=set)  # of these, what the gateway accepted
    readers: list[Reader] = field(default_factory=list)
    positions: dict[tuple[str, str], int] = field(default_factory=dict)  # of the cursors, as last seen on disk
    restored: bool = False  # an older copy of the journal was put in its place
    excused: set[str] = field(default_factory=set)

    # ------------------------------------------------------------------ at any time

    def look(self, path: Path) -> Books:
        """Read the journal's file as anybody could, and check what must hold at every moment."""
        books = Books.read(path)
        for (stream, name), position in books.positions.items():
            before = self.positions.get((stream, name), 0)
            assert position >= before, f"cursor {name} of {stream} went back from {before} to {position}"
            if name != "uplink":
                continue
            over = self.finished(books)[stream]
            for seq in books.rows[stream]:
                assert seq >= position or seq in over, f"{stream}: the cursor is at {position}, {seq} is not settled"
        self.positions = books.positions
        self.check_acknowledged(books)
        return books

    def check_acknowledged(self, books: Books) -> None:
        """What an app or the hub was told is safe is on disk now, or at whom it is for, or in the ledger (P1, P4)."""
        held = {payload for stream in self.outbound for payload in books.rows[stream].values()}
        self._check_kept(books, held)
        waiting = set(books.rows["cmd"].values())
        dead = set(books.dead_payloads)
        for reader in self.readers:
            lost = self.taken - {a.payload for a in reader.arrivals if a.stored} - waiting - dead - self.excused
            assert not lost, f"{reader.name}: taken from the hub, and not there: {sorted(lost)}"

    def _check_kept(self, books: Books, held: set[str]) -> None:
        """held: what else is as good as stored."""
        now = self.now()
        lost = self.acked - {a.payload for a in self.hub if a.stored} - set(books.dead_payloads) - self.excused - held
        late = {payload for payload in lost if self.sent[payload].over(now)}
        assert lost == late, f"acknowledged, and gone: {sorted(lost - late)}"
        for stream in self.outbound if not self.restored else ():
            expired = {seq for name, seq, reason in books.losses if name == stream and reason == "expired"}
            due = sum(1 for sent in self.sent.values() if sent.stream == stream and sent.over(now))
            gone = sum(1 for payload in late if self.sent[payload].stream == stream)
            assert gone <= len(expired), f"{stream}: {gone} are gone, and the ledger has {len(expired)} as expired"
            assert len(expired) <= due, f"{stream}: {len(expired)} are expired in the ledger, and only {due} can be"

    def finished(self, books: Books) -> dict[str, set[int]]:
        over: dict[str, set[int]] = defaultdict(set)
        for arrival in self.hub:
            if arrival.stored and arrival.place is not None:
                over[arrival.place.stream].add(arrival.place.seq)
        for stream, seq, _ in books.losses:
            over[stream].add(seq)
        return over

    # ------------------------------------------------------------------ in the end

    def check(self, books: Books) -> None:
        self.check_identities()
        self.check_nothing_lost(books)
        self.check_ages()
        expired = {(stream, seq) for stream, seq, reason in books.losses if reason == "expired"}
        if self.restored or self.boots:
            # The ledger is the copy's, too; and what a power cut made younger comes after all, passed by or not.
            now = self.now()
            expired |= {(a.place.stream, a.place.seq) for a in self.hub if a.place and self.sent[a.payload].over(now)}
        self.check_links("hub", self.hub, self.window, self.consistent, expired)
        self.check_producers()
        self.check_dead_letters(books)
        self.check_barred(books)
        for reader in self.readers:
            self.check_reader(reader, books)

    def check_identities(self) -> None:
        """One identity is one message, and the other way round; a seq is used once."""
        by_identity: dict[str, str] = {}
        by_payload: dict[str, str] = {}
        by_seq: dict[tuple[str, int], str] = {}
        for arrival in self.hub:
            assert arrival.place is not None
            key, payload = arrival.place.text, arrival.payload
            assert by_identity.setdefault(key, payload) == payload, f"{key} is {by_identity[key]} and {payload}"
            assert by_payload.setdefault(payload, key) == key, f"{payload} is {by_payload[payload]} and {key}"
            if not self.restored:
                at = arrival.place.stream, arrival.place.seq
                assert by_seq.setdefault(at, key) == key, f"seq {at} is {by_seq[at]} and {key}"

    def check_nothing_lost(self, books: Books) -> None:
        self._check_kept(books, set())
        for stream, seq, reason in books.losses:
            assert reason in REASONS, f"{stream} {seq} was lost: {reason}"
        for stream, rows in books.rows.items():
            if stream in self.outbound:
                assert not [s for s in rows if s >= books.positions[stream, "uplink"]], f"{stream}: not all has gone"

    def check_ages(self) -> None:
        """A message that was told a ttl ages as time passes, and never faster (P6).

        A power cut takes a little of its age back.
        """
        for arrival in self.hub:
            sent = self.sent[arrival.payload]
            if sent.ttl_s is None:
                assert arrival.ttl_s is None, f"{arrival.payload}: a ttl that nobody gave it"
                continue
            assert arrival.ttl_s is not None, f"{arrival.payload}: its ttl is gone"
            least = sent.ttl_s - (arrival.at - sent.at) - ROUNDING_S
            assert least <= arrival.ttl_s <= sent.ttl_s + self.boots * AGE_BACK_S, (
                f"{arrival.payload}: {arrival.ttl_s} s are left of {sent.ttl_s} after {arrival.at - sent.at:.3f}"
            )

    def check_links(
        self,
        who: str,
        arrivals: list[Arrival],
        window: int,
        consistent: bool,
        expired: Set[tuple[str, int]] = frozenset(),
        *,
        any_order: bool = False,
    ) -> None:
        """Order on each link, and what is repeated on the next.

        A link's messages ascend, until it goes back to the first that was given back; then they ascend again, and none
        that was given back before may be left out, or be passed by a new one, unless it expired meanwhile.

        any_order: its answers count when they come. What was answered while a message before it was open took no room
        in the window any more, and may come again beyond it, as a cursor is one place.
        """
        by_link: dict[tuple[int, str], list[Arrival]] = defaultdict(list)
        for arrival in arrivals:
            assert arrival.place is not None
            by_link[arrival.link, arrival.place.stream].append(arrival)
        first_kept: dict[str, dict[int, int]] = defaultdict(dict)  # seq to the link on which it was kept first
        over: dict[str, set[int]] = defaultdict(set)  # seqs that were kept, or answered for good
        # Of these, those that took room in the window until the cursor was past them.
        in_window: dict[str, list[int]] = defaultdict(list)
        for (link, stream), its in sorted(by_link.items()):
            kept, known, counted = first_kept[stream], over[stream], in_window[stream]
            given_back: set[int] = set()
            owed: set[int] = set()
            final: set[int] = set()
            last = 0
            for arrival in its:
                assert arrival.place is not None
                seq = arrival.place.seq
                told = f"{who}, link {link}, {stream}: {seq} after {last}"
                if seq <= last:
                    owed |= given_back
                    given_back.clear()
                    assert owed, f"{told}: out of order"
                if owed:
                    passed = {each for each in owed if each < seq and (stream, each) not in expired}
                    assert not passed, f"{told}: {min(passed)} was given back, and is passed by"
                assert seq not in final, f"{told}: it was answered for good on this very link"
                if seq in known and kept.get(seq, link) != link and not self.restored:
                    behind = len(counted) - bisect_right(counted, seq)
                    assert behind < window, f"{told}: repeated, {behind} were finished after it, the window is {window}"
                owed.discard(seq)
                if arrival.answer in ("released", "modified", "unknown"):
                    given_back.add(seq)
                else:
                    final.add(seq)
                if arrival.stored:
                    kept.setdefault(seq, link)
                if (arrival.stored or arrival.final) and seq not in known and not self._died(arrival):
                    known.add(seq)
                    if not (any_order and self._behind_open(seq, arrival.answered, its)):
                        insort(counted, seq)
                last = seq
        if consistent and not self.restored:
            # What expired is passed by; an old connection may still bring it.
            self.check_order(who, [a for a in arrivals if a.place and (a.place.stream, a.place.seq) not in expired])

    @staticmethod
    def _behind_open(seq: int, answered: int | None, its: list[Arrival]) -> bool:
        """Whether it was answered while one that goes before it, of `its` link and stream, was not."""
        if answered is None:
            return False
        return any(other.place is not None and other.place.seq < seq and other.open_at(answered) for other in its)

    def _died(self, arrival: Arrival) -> bool:
        """Never written and never acknowledged, it died with the gateway that held it; its app sends it anew.

        In the end, that is: by then everything else is acknowledged.
        """
        place = arrival.place
        return place is not None and place.stream in self.lingering and arrival.payload not in self.acked

    @staticmethod
    def check_order(who: str, arrivals: list[Arrival]) -> None:
        """A receiver that takes nothing out of turn has everything in order, each the first time that it came."""
        newest: dict[str, int] = defaultdict(int)
        seen: dict[str, set[int]] = defaultdict(set)
        for arrival in arrivals:
            assert arrival.place is not None
            stream, seq = arrival.place.stream, arrival.place.seq
            if arrival.stored and seq not in seen[stream]:
                assert seq > newest[stream], f"{who}, {stream}: {seq} is kept after {newest[stream]}"
                seen[stream].add(seq)
                newest[stream] = seq

    def check_producers(self) -> None:
        """Payloads are producer:round:number; a producer sends rounds one after another, each in ascending numbers."""
        places = {a.place.text: (a.place, a.payload) for a in self.hub if a.place is not None}
        latest: dict[tuple[str, str], tuple[int, int]] = {}
        for place, payload in sorted(places.values(), key=lambda each: (each[0].stream, each[0].seq)):
            producer, round_, number = payload.split(":")
            at = int(round_), int(number)
            key = place.stream, producer
            if not self.restored:
                assert at > latest.get(key, (0, 0)), f"{producer}: {at} was journaled after {latest[key]}"
            latest[key] = at

    def check_dead_letters(self, books: Books) -> None:
        """Each is what the hub rejected, with the hub's word for it, and each rejection that counted is one.

        Of one message there is one a life of the gateway at most: killed before the cursor was past it, it sends the
        message once more, as everything of the window (P3), and if that is rejected again, that is told again, too.
        """
        rejected: dict[tuple[str, int], set[str]] = defaultdict(set)
        lives: dict[tuple[str, int], set[int]] = defaultdict(set)
        kept: set[tuple[str, int]] = set()
        all_lives: dict[tuple[str, int], set[int]] = defaultdict(set)
        latest: dict[tuple[str, int], str] = {}
        # By links: what an older connection had on its way may arrive after what a newer one sent.
        for arrival in sorted(self.hub, key=lambda each: each.link):
            assert arrival.place is not None
            key = arrival.place.stream, arrival.place.seq
            all_lives[key].add(arrival.life)
            latest[key] = arrival.answer
            if arrival.answer == "rejected":
                rejected[key].add(arrival.condition)
                lives[key].add(arrival.life)
            if arrival.stored:
                kept.add(key)
        dead: dict[tuple[str, int], int] = defaultdict(int)
        for stream, seq, condition in books.dead:
            if stream not in self.outbound:
                continue
            dead[stream, seq] += 1
            assert condition in rejected[stream, seq], f"{stream} {seq}: {condition!r} is not what the hub said"
        for key, times in dead.items():
            assert times <= len(lives[key]) or self.restored, (
                f"{key}: rejected in {len(lives[key])} lives, dead {times} times"
            )
            if len(all_lives[key]) == 1 and not self.restored:
                assert latest[key] == "rejected", f"{key}: a dead letter, and sent again after that in the same life"
        self._check_ledger(books, dead, lambda stream: stream in self.outbound)
        over = {(stream, seq) for stream, seq, reason in books.losses if reason == "expired"}
        over |= {(a.place.stream, a.place.seq) for a in self.hub if a.place is not None and self._died(a)}
        for key in rejected:
            if key not in kept and key not in over and not self.restored:
                assert key in dead, f"{key}: rejected, and neither a dead letter nor sent again"

    @staticmethod
    def _check_ledger(books: Books, dead: dict[tuple[str, int], int], about: Callable[[str], bool]) -> None:
        """The ledger tells of each dead letter, and of no other."""
        told: dict[tuple[str, int], int] = defaultdict(int)
        for stream, seq, reason in books.losses:
            if reason == "dead-letter" and about(stream):
                told[stream, seq] += 1
        assert told == dead, f"the ledger tells of {dict(told)} as dead letters, and there are {dict(dead)}"

    def check_reader(self, reader: Reader, books: Books) -> None:
        number = {payload: n for n, payload in enumerate(self.to_gateway, 1)}
        arrivals = [
            replace(arrival, place=Place(arrival.payload, "", "cmd", number[arrival.payload]))
            for arrival in reader.arrivals
        ]
        if reader.exclusive:
            self.check_links(reader.name, arrivals, self.local_window, True, any_order=True)
        stored = {a.payload for a in arrivals if a.stored}
        dead = set(books.dead_payloads)
        lost = self.taken - stored - dead - self.excused
        assert not lost, f"{reader.name}: taken from the hub, and gone: {sorted(lost, key=number.__getitem__)}"

    def check_barred(self, books: Books) -> None:
        """What its only receiver bars is a dead letter, one for each receiver and life of the gateway at most.

        As of those of the hub: killed before the cursor is past it, the gateway sends it on once more.
        """
        barred: dict[str, set[tuple[str, int]]] = defaultdict(set)
        must: dict[str, int] = defaultdict(int)
        for reader in self.readers:
            if not reader.exclusive:
                continue
            stored = {a.payload for a in reader.arrivals if a.stored}
            for payload in {a.payload for a in reader.arrivals if a.answer == "barred"}:
                barred[payload] |= {(reader.name, a.life) for a in reader.arrivals if a.payload == payload if a.final}
                must[payload] += payload not in stored
        dead: dict[tuple[str, int], int] = defaultdict(int)
        times: dict[str, int] = defaultdict(int)
        for (stream, seq, condition), payload in zip(books.dead, books.dead_payloads, strict=True):
            if stream != "cmd":
                continue
            dead[stream, seq] += 1
            times[payload] += 1
            assert condition == "undeliverable-here", f"{payload}: {condition!r} is not what its receiver said"
        self._check_ledger(books, dead, "cmd".__eq__)
        for payload in times.keys() | must.keys() if not self.restored else ():
            most = len(barred[payload])
            assert must[payload] <= times[payload] <= most, (
                f"{payload}: dead {times[payload]} times; barred and never taken by {must[payload]} receivers, "
                f"barred in {most} lives"
            )


@dataclass(slots=True)
class Books:
    """The journal's tables. rows: payloads by stream and seq."""

    positions: dict[tuple[str, str], int]
    rows: dict[str, dict[int, str]]
    dead: list[tuple[str, int, str]]
    dead_payloads: list[str]
    losses: list[tuple[str, int, str]]

    @classmethod
    def read(cls, path: Path) -> Books:
        db = sqlite3.connect(path)
        try:
            names = dict(db.execute("SELECT id, name FROM stream").fetchall())
            rows: dict[str, dict[int, str]] = {name: {} for name in names.values()}
            for id_, body in db.execute("SELECT id, body FROM message"):
                rows[names[id_ >> SEQ_BITS]][id_ & SEQ_MASK] = read(body).payload
            dead = db.execute("SELECT stream, seq, condition, body FROM dead").fetchall()
            return cls(
                {
                    (names[stream], name): position
                    for stream, name, position in db.execute("SELECT stream, name, position FROM cursor")
                },
                rows,
                [(stream, seq, condition) for stream, seq, condition, _ in dead],
                [read(body).payload for _, _, _, body in dead],
                db.execute("SELECT stream, seq, reason FROM loss WHERE seq > 0").fetchall(),
            )
        finally:
            db.close()
