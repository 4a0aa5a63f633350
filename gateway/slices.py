"""What one peer sent, looked at slice by slice, lest one that sends much keeps the others waiting.

A slice takes about PORTION_S, by what the last ones took. After one that was plain the others have as long, if any of
them has something to say; one that was dear is charged (see `turns`), and where a protocol shows only afterwards what
that was (`gated`), the peer waits for its turn with the next. Between slices nothing is read from the socket. What came
before the end of a connection is looked at like the rest, and its end comes after that. Knows no protocol: `look` says
what a slice was.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Final, NamedTuple, Protocol

from gateway.turns import PORTION_S, Account, Turns

log = logging.getLogger("lineside.turns")

BYTES_MIN: Final = 512
BYTES_FIRST: Final = 4096  # where `gated`
BYTES_MAX: Final = 1 << 20  # more than a transport hands over at once
SLOW_S: Final = 4 * PORTION_S  # a plain slice that takes longer has smaller ones follow
PLAIN_PER_DEAR: Final = 8  # so many messages cost about as much as one thing that is dear
DEAR_S: Final = PORTION_S / 10  # what costs less makes nobody dear
# Of what a peer goes on to say after our last words: more than the socket buffers at both ends hold.
DISCARDED_BYTES_MAX: Final = 16 << 20
LINGER_S: Final = 2.0
READS_MAX: Final = 16  # of what lies in the socket at the end: with 256 KB each, about what fits in there


class Looked(NamedTuple):
    """What was in a slice: how much that is dear, and about how many messages or as much as that.

    `staged`: some of them wait for a commit now. `accounted_s`: what of its cost was accounted for by somebody else.
    """

    dear: int
    plain: float
    staged: bool
    accounted_s: float


class Payer(Protocol):
    """Whom a connection costs; for a client that is let in that may be somebody else than before."""

    @property
    def account(self) -> Account: ...


class Slices:
    """One connection's. `hold` until `release`: its owner takes nothing more."""

    def __init__(
        self,
        turns: Turns,
        payer: Payer,
        transport: asyncio.Transport,
        look: Callable[[bytes], Looked],
        *,
        gated: bool = True,
    ) -> None:
        self._payer = payer
        self._turns = turns
        self._helpings = turns.helpings
        self._transport = transport
        self._look = look
        self._loop = asyncio.get_running_loop()
        self._rest = b""
        self._gated = gated
        self._bytes_max = BYTES_FIRST if gated else BYTES_MAX
        self._dear = gated
        self._took_s = 0.0
        self._byte_s = 0.0  # what one byte of messages cost lately
        self._held = False
        self._waits = False
        self._looking = False
        self._reading = True
        self._over = False
        self._then: Callable[[], None] | None = None
        self._reads_left = 0
        self._discarded_bytes = 0

    @property
    def account(self) -> Account:
        return self._payer.account

    @property
    def dear(self) -> bool:
        """Whether what came last was."""
        return self._dear

    def feed(self, data: bytes) -> None:
        if self._over:
            self._discarded_bytes += len(data)
            if self._discarded_bytes > DISCARDED_BYTES_MAX:
                self.abort()
        elif self._rest or self._waits or self._held or self._looking:
            self._rest += data
        elif self._dear or len(data) > self._bytes_max or not self._helpings.fits(self, len(data) * self._byte_s):
            self._rest = data
            self._go_on()
        else:  # HOT: tests/bench, intake
            self._see(data)
            if self._rest or not self._reading:
                self._next()

    def hold(self) -> None:
        self._held = True
        self._read(False)

    def release(self) -> None:
        self._held = False
        if not (self._waits or self._looking):
            self._again()

    def read_out(self) -> None:
        """Before `end`, of a connection that is not gone: what the peer said while it was not read from counts, too.

        It may be read from again only since a moment ago.
        """
        self._reads_left = READS_MAX

    def end(self, then: Callable[[], None]) -> None:
        """Nothing more is read. What there is is looked at by turns as before, then `then` is called, once."""
        self._then = then
        if not (self._waits or self._looking):
            self._again()

    def drop(self) -> None:
        """Nothing more is looked at."""
        self._over = True
        self._rest = b""
        if self._then is not None and not self._looking:
            self._again()

    def last_words(self) -> None:
        """All is said from here. A peer that still sends must get to hear it: closed on unread bytes, TCP resets, and
        what the peer has not read by then is lost to it. So bytes are thrown away until its end, for a while.
        """
        self.drop()
        transport = self._transport
        try:
            if transport.can_write_eof():
                transport.write_eof()
        except OSError:  # the peer has reset the connection, and asyncio does not know yet
            self.abort()
            return
        if not self._reading:
            transport.resume_reading()
        self._loop.call_later(LINGER_S, self.abort)

    # ------------------------------------------------------------------ turns

    def turn(self) -> None:
        self._waits = False
        self._slice()
        while self._dear and self._rest and not (self._held or self._turns.over):
            self._slice()
        self._next()

    def abort(self) -> None:
        self.drop()
        self._transport.abort()

    def _go_on(self) -> None:
        if self._rest and (self._turns.ready if self._dear else self._helpings.left_s(self) > 0):
            self._slice()
        self._next()

    def _again(self) -> None:
        self._waits = False
        try:
            self._go_on()
        except Exception:  # as in `data_received`: only this connection pays, and not the commit that may have called
            log.exception("a connection failed; it is closed")
            self.abort()

    def _next(self) -> None:
        if self._held and not self._over:
            return
        if not self._rest:
            if self._then is None:
                self._read(True)
            elif self._reads_left and not (self._over or self._transport.is_closing()):
                self._read_once()
            else:
                self._finish(self._then)
            return
        self._read(False)
        self._waits = True
        if self._dear:
            self._turns.enter(self)
        elif self._helpings.left_s(self) <= 0:
            self._helpings.wait(self, self._again)
        elif self._helpings.others(self):
            # Idle for as long as it took: the thread that commits needs the interpreter, too.
            self._loop.call_later(self._took_s, self._again)
        else:
            self._loop.call_soon(self._again)

    def _read_once(self) -> None:
        self._waits = self._reading = True
        self._transport.resume_reading()
        self._loop.call_soon(self._loop.call_soon, self._read_back)  # the selector is asked in between

    def _read_back(self) -> None:
        if not self._transport.is_closing():
            self._reading = False
            self._transport.pause_reading()
        self._reads_left = self._reads_left - 1 if self._rest else 0
        self._again()

    def _finish(self, then: Callable[[], None]) -> None:
        self._over, self._then = True, None
        self._helpings.forget(self)
        if self._turns.serving is None:
            with self._turns.charging(self.account):
                then()
        else:
            then()

    def _slice(self) -> None:
        if self._held or not self._rest:
            return
        size = self._bytes_max
        if not self._dear and self._byte_s:
            size = max(BYTES_MIN, int(min(size, self._helpings.left_s(self) / self._byte_s)))
        data, self._rest = self._rest[:size], self._rest[size:]
        self._see(data)

    def _see(self, data: bytes) -> None:
        turns = self._turns
        self._looking = True
        began = turns.cpu()
        try:
            dear, plain, staged, accounted_s = self._look(data)
        except Exception:
            self.drop()
            raise
        finally:
            self._looking = False
        took = self._took_s = turns.cpu() - began - accounted_s
        messages_s = took
        if dear:
            part = dear / (dear + plain / PLAIN_PER_DEAR)
            self._dear = self._gated and part > 0.5 and took > DEAR_S
            messages_s -= took * part
            if turns.serving is None:
                turns.spent(self.account, took * part)
        elif plain:
            self._dear = False
        # A peer that was slow once is read whole again after a while.
        if took > SLOW_S or (self._dear and took > PORTION_S):
            self._bytes_max = max(BYTES_MIN, int(len(data) * PORTION_S / took))
        elif self._bytes_max < BYTES_MAX:
            self._bytes_max += self._bytes_max >> 5
        if turns.serving is None:
            if staged:
                self._byte_s = took / len(data)
                self._helpings.took(self, took)
            turns.messages(messages_s, staged=staged)

    def _read(self, on: bool) -> None:
        if self._reading is not on and not (self._over or self._then is not None or self._transport.is_closing()):
            self._reading = on
            (self._transport.resume_reading if on else self._transport.pause_reading)()
