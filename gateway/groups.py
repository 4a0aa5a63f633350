"""Competing consumers: several members share one durable cursor, and every row they want is finished by one of them.

Serves AMQP queues and MQTT shared subscriptions (MQTT 5.0 §4.8.2). Rows are handed out in order; what a member gives
back, or leaves behind when it goes, is handed out again before anything newer, marked as redelivered. The cursor moves
only over rows without a gap; rows finished beyond an unfinished one are remembered in memory, a bounded number of
them, and would be handed out again after a crash. Knows no socket, no clock and no protocol; keeps no message's bytes.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass

from storeforward.journal import Journal
from storeforward.streams import Cursor, Row, Stream

# Wanted rows between the cursor and the newest one handed out: what one stuck member lets the others run ahead, and
# what a crash can make them see twice at most.
GROUP_AHEAD_MAX = 4096
# Rows looked at in one call, so that a long stretch that nobody wants does not stop the daemon: see `behind`.
SCAN_ROWS_MAX = 4096
READ_ROWS = 256
TAKE_BYTES_MAX = 1 << 20


@dataclass(eq=False, slots=True)
class _Entry:
    """A wanted row at or above the cursor. holder None and not done: given back, and waiting in `_back`."""

    seq: int
    holder: Hashable | None
    done: bool = False
    redelivered: bool = False
    failures: int = 0
    barred: tuple[Hashable, ...] = ()


class Group:
    """`wants(row)` is one answer for the whole group. Call `take` after commits and whenever a member has room."""

    def __init__(
        self,
        journal: Journal,
        stream: Stream,
        cursor: Cursor,
        wants: Callable[[Row], bool],
        *,
        announced: bool = False,
    ) -> None:
        """`announced`: `woken` is called for every commit that holds a wanted row; others then need no looking at."""
        self._announced = announced
        # All that is left is unwanted; and: the next row is known to be wanted. Neither is known at first.
        self._quiet = self._waiting = False
        self.journal = journal
        self.stream = stream
        self.cursor = cursor
        self._wants = wants
        self._next = cursor.position
        self._ahead: deque[_Entry] = deque()  # ascending
        self._entries: dict[int, _Entry] = {}
        self._back: list[int] = []  # ascending seqs
        self._members: dict[Hashable, dict[int, None]] = {}

    # ------------------------------------------------------------------ members

    @property
    def members(self) -> int:
        return len(self._members)

    def names(self) -> list[Hashable]:
        """The members, in the order they joined."""
        return list(self._members)

    def has(self, member: Hashable) -> bool:
        return member in self._members

    @property
    def blocker(self) -> Hashable | None:
        """The member that holds the oldest row, while GROUP_AHEAD_MAX rows wait behind it."""
        return self._ahead[0].holder if len(self._ahead) >= GROUP_AHEAD_MAX else None

    @property
    def ahead(self) -> int:
        """How many wanted rows are handed out, given back, or finished beyond an unfinished one."""
        return len(self._ahead)

    @property
    def behind(self) -> bool:
        """Whether there are rows that no `take` has looked at and that one could now: call it again soon."""
        return len(self._ahead) < GROUP_AHEAD_MAX and max(self._next, self.cursor.position) < self.stream.committed

    def held(self, member: Hashable) -> int:
        """How many rows the member has neither finished nor given back."""
        return len(self._members.get(member, ()))

    def failures(self, seq: int) -> int:
        """How often a row that is handed out now failed before: left behind, or released with `failed`."""
        entry = self._entries.get(seq)
        return 0 if entry is None else entry.failures

    def join(self, member: Hashable) -> None:
        assert member not in self._members, "a member joins once"
        self._members[member] = {}

    def leave(self, member: Hashable) -> None:
        """What the member has not finished goes back, for the others or for who comes next."""
        for seq in self._members.pop(member):
            self._entries[seq].failures += 1
            self._give_back(self._entries[seq])
        for entry in self._ahead:  # its objections leave with it
            if member in entry.barred:
                entry.barred = tuple(each for each in entry.barred if each != member)

    # ------------------------------------------------------------------ rows

    def take(self, member: Hashable, rows_max: int, bytes_max: int = TAKE_BYTES_MAX) -> list[tuple[Row, bool]]:
        """Hand out up to `rows_max` rows, about `bytes_max` bytes, ascending: (row, whether it was handed out before).

        Empty when there is nothing, or when GROUP_AHEAD_MAX rows wait behind one that is not finished.
        """
        self._catch_up()
        self._waiting = False
        if self._quiet:
            self._next = self.stream.committed
        held = self._members[member]
        out: list[tuple[Row, bool]] = []
        if self._back:
            self._take_back(member, rows_max, bytes_max, out)
        size = sum(len(row.body) for row, _ in out)
        scanned = 0
        while len(out) < rows_max and size < bytes_max and scanned < SCAN_ROWS_MAX:
            room = min(rows_max - len(out), GROUP_AHEAD_MAX - len(self._ahead))
            if room <= 0 or self._next >= self.stream.committed:
                break
            rows = self.journal.read(self.stream, self._next, READ_ROWS, bytes_max - size)
            if not rows:
                # Only a gap is left: rows that a failed commit took back, or that did not read.
                self._next = self.stream.committed
                break
            scanned += len(rows)
            for row in rows:
                if room <= 0:
                    break
                self._next = row.seq + 1
                if self._wants(row) and not self._expired(row):
                    entry = _Entry(row.seq, member)
                    self._ahead.append(entry)
                    self._entries[row.seq] = entry
                    out.append((row, False))
                    size += len(row.body)
                    room -= 1
        for row, _ in out:
            held[row.seq] = None
        self._quiet = self._announced and self._next >= self.stream.committed
        self._move_cursor()
        return out

    def woken(self) -> None:
        """A commit added a row that the group wants."""
        self._quiet = False

    def caught_up(self) -> None:
        """Move over what nobody here wants, up to the first row that somebody does. Only for announced groups.

        Costs nothing where nothing wanted has come since the last look, or where a wanted row was found then.
        """
        if self._quiet:
            self._next = self.stream.committed
            self._move_cursor()
        elif not self._waiting:
            self.skip_unwanted()
            self._waiting = self._next < self.stream.committed
            self._quiet = not self._waiting

    def skip_unwanted(self) -> None:
        """Move over rows that the group does not want, as far as they are the next: they hold up others' deletion."""
        self._catch_up()
        while self._next < self.stream.committed:
            rows = self.journal.read(self.stream, self._next, READ_ROWS)
            for row in rows:
                if self._wants(row):
                    self._move_cursor()
                    return
                self._next = row.seq + 1
            if not rows:
                self._next = self.stream.committed
        self._move_cursor()

    def done(self, member: Hashable, seq: int) -> bool:
        """The member is finished with a row for good. False if it was not the member's (any more)."""
        entry = self._release_hold(member, seq)
        if entry is None:
            return False
        self._finish(entry)
        self._move_cursor()
        return True

    def release(self, member: Hashable, seq: int, *, failed: bool = False, barred: bool = False) -> bool:
        """The member gives a row back. `failed`: it tried; `barred`: not to this member again, while it is here."""
        entry = self._release_hold(member, seq)
        if entry is None:
            return False
        entry.failures += failed
        if barred:
            entry.barred += (member,)
        self._give_back(entry)
        return True

    # ------------------------------------------------------------------ within

    def _release_hold(self, member: Hashable, seq: int) -> _Entry | None:
        held = self._members.get(member)
        if held is None or seq not in held:
            return None
        del held[seq]
        return self._entries.get(seq)

    def _give_back(self, entry: _Entry) -> None:
        entry.holder = None
        entry.redelivered = True
        insort(self._back, entry.seq)

    def _finish(self, entry: _Entry) -> None:
        entry.done = True
        entry.holder = None
        entry.barred = ()
        del self._entries[entry.seq]

    def _take_back(self, member: Hashable, rows_max: int, bytes_max: int, out: list[tuple[Row, bool]]) -> None:
        kept: list[int] = []
        size = 0
        for seq in self._back:
            entry = self._entries[seq]
            if len(out) >= rows_max or size >= bytes_max or member in entry.barred:
                kept.append(seq)
                continue
            row = next((r for r in self.journal.read(self.stream, seq, 1) if r.seq == seq), None)
            # A row that is gone or does not read was entered in the ledger by whoever found or dropped it.
            if row is None or self._expired(row):
                self._finish(entry)
                continue
            entry.holder = member
            out.append((row, entry.redelivered))
            size += len(row.body)
        self._back = kept

    def _expired(self, row: Row) -> bool:
        if row.expires_age_us is None or row.expires_age_us > self.journal.age_us():
            return False
        self.journal.lose(self.stream.name, row.seq, "expired", len(row.body), self.cursor.name)
        return True

    def _catch_up(self) -> None:
        """A full stream may have moved the cursor on from outside (with ledger rows): what is before it is over."""
        position = self.cursor.position
        self._next = max(self._next, position)
        while self._ahead and self._ahead[0].seq < position:
            entry = self._ahead.popleft()
            if entry.done:
                continue
            if entry.holder is not None:
                self._members[entry.holder].pop(entry.seq, None)
            else:
                del self._back[bisect_left(self._back, entry.seq)]
            self._finish(entry)

    def _move_cursor(self) -> None:
        ahead = self._ahead
        while ahead and ahead[0].done:
            ahead.popleft()
        position = ahead[0].seq if ahead else self._next
        self.journal.advance(self.stream, self.cursor, position, lazily=self.cursor.volatile)
