"""One connection's input, where things go wrong; what it does for the others is measured in test_fairness."""

from __future__ import annotations

import asyncio
import errno
import itertools
from collections.abc import Callable

import pytest

from gateway.slices import BYTES_FIRST, DISCARDED_BYTES_MAX, Looked, Slices
from gateway.turns import PORTION_S, Account, Turns, Waiting


class Transport(asyncio.Transport):
    def __init__(self, *, gone: bool = False) -> None:
        super().__init__()
        self.gone = gone
        self.aborted = False
        self.reading = True
        self.ended = False

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        if self.gone:
            raise OSError(errno.ENOTCONN, "Transport endpoint is not connected")
        self.ended = True

    def is_closing(self) -> bool:
        return self.aborted

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True

    def abort(self) -> None:
        self.aborted = True


class Payer:
    account = Account()


def play(
    transport: Transport, look: Callable[[bytes], Looked], story: Callable[[Slices], None], *, gated: bool = False
) -> None:
    async def run() -> None:
        story(Slices(Turns(asyncio.get_running_loop()), Payer(), transport, look, gated=gated))

    asyncio.run(run())


def nothing(data: bytes) -> Looked:
    return Looked(0, 0, False, 0.0)


def broken(data: bytes) -> Looked:
    raise ValueError("our own mistake")


def test_a_peer_that_has_reset_the_connection_already_is_told_nothing() -> None:
    """asyncio hears of it later, and says so at the half-close: amid a commit that would end the daemon."""
    transport = Transport(gone=True)
    play(transport, nothing, lambda slices: slices.last_words())
    assert transport.aborted


def test_after_the_last_words_nothing_is_looked_at_and_only_so_much_is_read() -> None:
    def story(slices: Slices) -> None:
        slices.hold()
        slices.feed(b"held")
        slices.last_words()
        slices.release()
        assert transport.ended
        assert transport.reading
        for _ in range(DISCARDED_BYTES_MAX >> 20):
            slices.feed(bytes(1 << 20))
        assert not transport.aborted
        slices.feed(b"more")

    transport = Transport()
    play(transport, broken, story)
    assert transport.aborted


def test_our_own_mistake_with_what_was_held_ends_that_connection_and_not_who_released_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """That is a commit, often."""

    def story(slices: Slices) -> None:
        slices.hold()
        slices.feed(b"held")
        slices.release()

    transport = Transport()
    play(transport, broken, story)
    assert transport.aborted
    assert "a connection failed; it is closed" in caplog.text


def test_nothing_is_looked_at_while_it_is_held_though_its_turn_comes_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Turns, "ready", False)
    looked: list[bytes] = []

    def look(data: bytes) -> Looked:
        looked.append(data)
        return Looked(0, 1, False, 0.0)

    def story(slices: Slices) -> None:
        slices.feed(b"waits")
        slices.hold()
        slices.turn()
        assert not looked
        slices.release()
        slices.turn()
        assert looked == [b"waits"]

    transport = Transport()
    play(transport, look, story, gated=True)
    assert transport.reading


def test_what_came_before_the_end_is_looked_at_by_turns_and_the_end_comes_after_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The last transfers and frames may hold what nobody sends again, and a goodbye."""
    seen: list[bytes] = []
    times = itertools.count()

    def look(data: bytes) -> Looked:
        seen.append(data)
        return Looked(1, 0, False, 0.0)

    def story(slices: Slices) -> None:
        turns: list[Waiting] = []
        monkeypatch.setattr(slices._turns, "enter", turns.append)
        monkeypatch.setattr(slices._turns, "cpu", lambda: PORTION_S * next(times))
        slices.feed(bytes(3 * BYTES_FIRST))
        assert len(turns) == 1
        slices.end(lambda: seen.append(b"the end"))
        assert not seen
        while turns:
            turns.pop().turn()
        assert len(seen) >= 3
        assert seen.pop() == b"the end"
        assert b"".join(seen) == bytes(3 * BYTES_FIRST)
        slices.feed(b"more")
        assert b"more" not in seen

    monkeypatch.setattr(Turns, "ready", False)
    monkeypatch.setattr(Turns, "over", True)
    play(Transport(), look, story, gated=True)


def test_what_is_held_when_the_connection_ends_is_looked_at_once_it_is_released() -> None:
    seen: list[bytes] = []

    def look(data: bytes) -> Looked:
        seen.append(data)
        return Looked(0, 1, False, 0.0)

    def story(slices: Slices) -> None:
        slices.hold()
        slices.feed(b"held")
        slices.end(lambda: seen.append(b"the end"))
        assert not seen
        slices.release()
        assert seen == [b"held", b"the end"]

    play(Transport(), look, story)


def test_the_end_comes_though_what_was_held_is_our_own_mistake_or_is_given_up() -> None:
    ends: list[str] = []

    def mistake(slices: Slices) -> None:
        slices.hold()
        slices.feed(b"held")
        slices.end(lambda: ends.append("mistake"))
        slices.release()

    def given_up(slices: Slices) -> None:
        slices.hold()
        slices.feed(b"held")
        slices.end(lambda: ends.append("given up"))
        slices.drop()

    for story in (mistake, given_up):
        play(Transport(), broken, story)
    assert ends == ["mistake", "given up"]
