"""The age clock: time that surely passed counts, whatever the wall clock says; time nobody knows of does not."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storeforward import age
from storeforward import journal as journal_module
from storeforward.age import OFF_US_MAX, AgeClock
from storeforward.journal import Journal
from tests.storeforward.test_journal import encode, outbound

HOUR_S = 3600.0
YEAR_S = 365 * 86400.0
S = 1_000_000


class Machine:
    """Its clocks: since the boot, on the wall, and whether the latter is right."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.path = path
        self.boots = 0
        self.up_s = 50.0
        self.wall_s = 1.8e9
        self.right = True
        monkeypatch.setattr(journal_module, "boot_id", lambda: f"boot-{self.boots}")

    def start(self) -> Journal:
        return Journal.open(
            self.path, clock=lambda: self.up_s, wall=lambda: self.wall_s, synchronised=lambda: self.right
        )

    def passes(self, seconds: float) -> None:
        self.up_s += seconds
        self.wall_s += seconds

    def off(self, seconds: float) -> None:
        """Switched off for so long, then booted."""
        self.boots += 1
        self.wall_s += seconds
        self.up_s = 5.0


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(tmp_path, monkeypatch)


def used_for(machine: Machine, seconds: float) -> int:
    """Start, do something, let time pass, stop; the age at the end."""
    journal = machine.start()
    stream = outbound(journal)
    machine.passes(seconds)
    journal.append(stream, "a", encode, b"x")
    journal.commit_now()
    age = journal.age_us()
    journal.close()
    return age


def test_time_off_counts_where_the_clock_was_right_before_and_is_right_after(machine: Machine) -> None:
    before = used_for(machine, 100)
    machine.off(3 * HOUR_S)
    journal = machine.start()
    assert journal.age_us() - before == pytest.approx(3 * HOUR_S * S, abs=S)
    journal.close()


@pytest.mark.parametrize(("right_before", "right_after"), [(False, True), (True, False), (False, False)])
def test_otherwise_the_age_stands_still(machine: Machine, right_before: bool, right_after: bool) -> None:
    machine.right = right_before
    before = used_for(machine, 100)
    machine.off(3 * HOUR_S)
    machine.right = right_after
    journal = machine.start()
    assert journal.age_us() == before
    machine.passes(60)
    assert journal.age_us() - before == 60 * S, "what passes from then on counts"
    journal.close()


def left_s(journal: Journal, seq: int) -> float:
    """How long this message of the stream still has."""
    (row,) = journal.read(journal.streams["alarms"], seq, 1)
    assert row.expires_age_us is not None
    return (row.expires_age_us - journal.age_us()) / S


def append(journal: Journal, ttl_s: float) -> None:
    stream = outbound(journal)
    journal.append(stream, "a", encode, b"x", expires_age_us=journal.age_us() + int(ttl_s * S))
    journal.commit_now()


def boot_in_1970_and_be_told_the_time_an_hour_later(machine: Machine, off_s: float) -> Journal:
    """A message of a day before the time off, and one after it, in 1970."""
    journal = machine.start()
    append(journal, 24 * HOUR_S)
    journal.close()
    morning = machine.wall_s + off_s
    machine.off(0)
    machine.wall_s, machine.right = 0.0, False
    journal = machine.start()
    append(journal, 24 * HOUR_S)
    machine.passes(HOUR_S)
    journal.count_time_off()
    assert [left_s(journal, 1), left_s(journal, 2)] == pytest.approx([23 * HOUR_S] * 2, abs=1)
    machine.wall_s, machine.right = morning + HOUR_S, True
    journal.count_time_off()
    return journal


def test_a_box_that_boots_in_1970_and_gets_the_time_an_hour_later_counts_the_night_for_what_it_came_upon(
    machine: Machine,
) -> None:
    journal = boot_in_1970_and_be_told_the_time_an_hour_later(machine, 8 * HOUR_S)
    for _ in range(2):
        assert left_s(journal, 1) == pytest.approx(15 * HOUR_S, abs=1), "once"
        assert left_s(journal, 2) == pytest.approx(23 * HOUR_S, abs=1), "it was not there in the night"
        journal.count_time_off()
    append(journal, 60)
    assert left_s(journal, 3) == pytest.approx(60, abs=1)
    journal.close()
    journal = machine.start()
    assert left_s(journal, 2) == pytest.approx(23 * HOUR_S, abs=1), "nor after a restart"
    assert left_s(journal, 1) >= 15 * HOUR_S
    journal.close()


@pytest.mark.parametrize("off_s", [-HOUR_S, 50 * YEAR_S, -50 * YEAR_S])
def test_a_time_that_cannot_be_right_an_hour_after_the_boot_ages_nothing(machine: Machine, off_s: float) -> None:
    journal = boot_in_1970_and_be_told_the_time_an_hour_later(machine, off_s)
    assert [left_s(journal, 1), left_s(journal, 2)] == pytest.approx([23 * HOUR_S] * 2, abs=1)
    journal.close()


def test_of_two_times_off_with_no_right_clock_between_neither_counts(machine: Machine) -> None:
    before = used_for(machine, 100)
    machine.right = False
    machine.off(HOUR_S)
    used_for(machine, 60)
    machine.off(HOUR_S)
    machine.right = True
    journal = machine.start()
    assert journal.age_us() - before == 60 * S, "what came between them may not age by the first"
    journal.close()


@pytest.mark.parametrize("jump_s", [50 * YEAR_S, -50 * YEAR_S, 2 * YEAR_S, -10.0])
def test_a_clock_that_says_it_is_right_and_cannot_be_expires_nothing(machine: Machine, jump_s: float) -> None:
    before = used_for(machine, 100)
    machine.off(jump_s)
    journal = machine.start()
    assert journal.age_us() == before
    journal.close()


@pytest.mark.parametrize("jump_s", [50 * YEAR_S, -50 * YEAR_S, 1.0, -1.0])
def test_within_a_boot_the_wall_clock_is_not_asked(machine: Machine, jump_s: float) -> None:
    before = used_for(machine, 100)
    machine.wall_s += jump_s
    machine.passes(30)
    journal = machine.start()
    assert journal.age_us() - before == 30 * S
    journal.close()


@given(st.text(max_size=60) | st.from_regex(r"-?\d{1,25} -?\d{1,25} [a-z]{0,4}( -?\d{1,25}){0,3}", fullmatch=True))
def test_whatever_stands_in_the_journal_the_clock_runs(saved: str) -> None:
    clock = AgeClock.resume(saved, "b", 1000)
    assert clock.now_us(2000) - clock.now_us(1000) == 1000
    assert 0 <= clock.off_us(10**15, 1000) <= OFF_US_MAX
    right = AgeClock.resume(saved, "b", 1000, 10**15)
    assert right.now_us(1000) - clock.now_us(1000) == clock.off_us(10**15, 1000)
    assert AgeClock.resume(right.save(1000, 5), "b", 1000).now_us(1000) == right.now_us(1000)


class Libc:
    """The C library, of which the kernel's answer is all that is asked."""

    def __init__(self, answer: int) -> None:
        self.answer = answer
        self.asked: list[bytes] = []

    def adjtimex(self, timex: ctypes.Array[ctypes.c_char]) -> int:
        self.asked.append(timex.raw)
        return self.answer


@pytest.mark.parametrize("timesync", [True, False])
@pytest.mark.parametrize(("answer", "right"), [(0, True), (1, True), (4, True), (5, False), (-1, False)])
def test_the_clock_is_right_by_the_kernels_word_or_by_timesyncds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: int, right: bool, timesync: bool
) -> None:
    libc = Libc(answer)
    monkeypatch.setattr(age.ctypes, "CDLL", lambda name: libc)
    monkeypatch.setattr(age, "TIMESYNC", tmp_path / "synchronized")
    if timesync:
        age.TIMESYNC.touch()
    assert age.clock_synchronised() is (right or timesync)
    assert [set(timex) for timex in libc.asked] == [{0}], "nothing but zeros changes nothing"


@pytest.mark.parametrize("timesync", [True, False])
@pytest.mark.parametrize("lacks", ["adjtimex", "libc"])
def test_where_the_kernel_cannot_be_asked_timesyncd_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lacks: str, timesync: bool
) -> None:
    def load(name: None) -> object:
        if lacks == "libc":
            raise OSError("no shared library")
        return object()

    monkeypatch.setattr(age.ctypes, "CDLL", load)
    monkeypatch.setattr(age, "TIMESYNC", tmp_path / "synchronized")
    if timesync:
        age.TIMESYNC.touch()
    assert age.clock_synchronised() is timesync


def test_this_machines_kernel_can_be_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(age, "TIMESYNC", tmp_path / "synchronized")
    guard = b"\xa5" * 4096
    timex = ctypes.create_string_buffer(bytes(age._TIMEX_BYTES) + guard, age._TIMEX_BYTES + len(guard))
    answer = ctypes.CDLL(None).adjtimex(timex)
    assert -1 <= answer <= age._TIME_ERROR
    assert timex.raw[age._TIMEX_BYTES :] == guard, "struct timex is no larger than what it is given"
    assert age.clock_synchronised() is (0 <= answer < age._TIME_ERROR)
