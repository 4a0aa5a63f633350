"""One connection's input, where things go wrong; what it does for the others is measured in test_fairness."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable

import pytest

from gateway.slices import DISCARDED_BYTES_MAX, Looked, Slices
from gateway.turns import Account, Turns


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


def play(
    transport: Transport, look: Callable[[bytes], Looked], story: Callable[[Slices], None], *, gated: bool = False
) -> None:
    async def run() -> None:
        story(Slices(Turns(asyncio.get_running_loop()), Account(), transport, look, gated=gated))

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


def test_what_waits_for_its_turn_is_there_when_the_connection_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """A WebSocket client's last frames may hold what nobody sends again, and its goodbye."""
    seen: list[bytes] = []

    def look(data: bytes) -> Looked:
        seen.append(data)
        return Looked(1, 0, False, 0.0)

    def story(slices: Slices) -> None:
        slices.feed(b"last frames")
        assert not seen
        assert slices.end() == b"last frames"
        assert slices.end() == b""

    monkeypatch.setattr(Turns, "ready", False)
    play(Transport(), look, story, gated=True)
