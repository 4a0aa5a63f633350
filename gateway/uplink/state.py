"""The link to one hub as a state machine: when to dial which address, and when to give up on one.

Time and chance are arguments. Knows no socket and no AMQP: a driver tells what happened and asks what is due.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from random import Random

BACKOFF_S_MIN, BACKOFF_S_MAX = 0.2, 30.0
AUTH_BACKOFF_S_MIN, AUTH_BACKOFF_S_MAX = 5.0, 300.0
UNREACHABLE_BACKOFF_S_MAX = 0.7
DROPPED_BACKOFF_S_MAX = 2.0
# While nothing is heard attempts overlap, so far apart; further, once whole handshakes have been waited for in vain:
# then it is not the line that is silent but a hub that cannot keep up, and each new connection makes it slower. At the
# longest distance they overlap no more, and the backoff of a failing hub takes over.
STAGGER_S, STAGGER_S_MAX = 0.7, 12.0
ATTEMPTS_MAX = 4
# So many at one address without an answer, and it is the next one's turn.
DIALS_AN_ADDRESS = 4
FAIL_BACK_S = 30.0


class State(Enum):
    DOWN = "down"
    CONNECTING = "connecting"
    UP = "up"
    BACKOFF = "backoff"
    STOPPED = "stopped"


class Event(Enum):
    DIAL = "dial"
    OPENED = "opened"
    FAILED = "failed"
    LOST = "lost"
    STOP = "stop"


class Failure(Enum):
    """How far an attempt got, which decides how soon the next one is polite."""

    UNREACHABLE = "unreachable"  # no answer on the way there: the line is down, a new try costs the hub nothing
    HANDSHAKE = "handshake"  # the hub was reached and something failed
    DROPPED = "dropped"  # it was open and ended without a word: a line that flaps, or a hub that crashes
    AUTHENTICATION = "authentication"  # the hub does not want us: trying again soon won't help


TRANSITIONS: dict[tuple[State, Event], State] = {
    (State.DOWN, Event.DIAL): State.CONNECTING,
    (State.BACKOFF, Event.DIAL): State.CONNECTING,
    (State.CONNECTING, Event.DIAL): State.CONNECTING,
    (State.CONNECTING, Event.OPENED): State.UP,
    (State.CONNECTING, Event.FAILED): State.BACKOFF,
    (State.UP, Event.LOST): State.BACKOFF,
} | {(state, Event.STOP): State.STOPPED for state in State}


@dataclass(frozen=True, slots=True)
class Status:
    state: State
    url: str
    since: float
    error: str | None
    retry_at: float | None


class LinkState:
    """Ask `due(now)` when to act next and `dial(now)` for the address to try."""

    def __init__(
        self,
        urls: list[str],
        random: Random,
        now: float,
        backoff_s_min: float = BACKOFF_S_MIN,
        backoff_s_max: float = BACKOFF_S_MAX,
        stagger_s: float = STAGGER_S,
    ) -> None:
        assert urls
        self._stagger_s_min = stagger_s
        self._backoff_s_min = backoff_s_min
        self._backoff_s_max = max(backoff_s_min, backoff_s_max)
        self.urls = urls
        self._random = random
        self.state = State.DOWN
        self.since = now
        self.index = 0
        self.error: str | None = None
        self._failures = self._auth_failures = self._dropped = 0
        self._retry_at = now
        self._attempts = 0
        self._dials_here = 0
        self._stagger_s = self._stagger_s_min
        self._slowed_at = now
        self._fail_back_at: float | None = None
        self.dialled = self.connected = 0  # ever

    def _go(self, event: Event, now: float) -> None:
        state = TRANSITIONS[self.state, event]
        if state is not self.state:
            self.state, self.since = state, now

    @property
    def url(self) -> str:
        return self.urls[self.index]

    def status(self) -> Status:
        retry = self._retry_at if self.state is State.BACKOFF else None
        return Status(self.state, self.url, self.since, self.error, retry)

    def due(self) -> float | None:
        """When the driver should call `dial` next; None where only an event can change anything."""
        match self.state:
            case State.DOWN | State.BACKOFF:
                return self._retry_at
            case State.CONNECTING:
                return self._retry_at
            case State.UP:
                return self._fail_back_at
            case State.STOPPED:
                return None

    def dial(self, now: float) -> str:
        """Begin an attempt and return its address.

        Attempts overlap: one that got no answer on a dead line must not stand in the way when the line is back,
        because its packets would be repeated only seconds later.
        """
        self._go(Event.DIAL, now)
        if self._dials_here >= DIALS_AN_ADDRESS:
            self._turn_to(self.index + 1)
        self._attempts += 1
        self._dials_here += 1
        self.dialled += 1
        self._retry_at = now + self._stagger_s
        return self.url

    def _turn_to(self, index: int) -> None:
        self.index = index % len(self.urls)
        self._dials_here = 0

    def attempt_replaced(self) -> None:
        """An attempt without an answer gave way to a fresh one."""
        self._attempts -= 1

    def opened(self, now: float, url: str) -> None:
        self._go(Event.OPENED, now)
        self.connected += 1
        self._turn_to(self.urls.index(url))
        self.error = None
        self._attempts = 0
        self._fail_back_at = now + FAIL_BACK_S if self.index else None

    def settled(self) -> None:
        """A message was settled: only this proves the hub works, so only this forgets earlier failures."""
        self._failures = self._auth_failures = self._dropped = 0
        self._stagger_s = self._stagger_s_min

    def attempt_failed(self, now: float, failure: Failure, error: str, waited_s: float = 0.0) -> None:
        """One attempt ended. The link is in backoff when no other attempt is left.

        `waited_s`: how long somebody who had taken the connection left it without an answer.
        """
        self.error = error
        self._attempts -= 1
        if waited_s and now - self._slowed_at >= waited_s:
            self._slowed_at = now
            self._stagger_s = min(max(STAGGER_S_MAX, self._stagger_s_min), 2 * self._stagger_s)
        if self._attempts <= 0:
            self._attempts = 0
            self._go(Event.FAILED, now)
            self._back_off(now, failure)

    def lost(self, now: float, error: str, failure: Failure = Failure.HANDSHAKE) -> None:
        """The open connection ended. The first try after one that worked is immediate but for a little jitter."""
        self.error = error
        self._go(Event.LOST, now)
        self._fail_back_at = None
        self._back_off(now, failure)

    def _back_off(self, now: float, failure: Failure) -> None:
        self._turn_to(self.index + 1)
        match failure:
            case Failure.UNREACHABLE:
                # Not counted: however long the tunnel was, the first failure after it is the first.
                delay_s = self._random.uniform(BACKOFF_S_MIN, UNREACHABLE_BACKOFF_S_MAX)
            case Failure.HANDSHAKE:
                rounds = self._failures // len(self.urls)
                self._failures += 1
                top = min(self._backoff_s_max, self._backoff_s_min * 2 ** min(rounds, 16))
                delay_s = self._random.uniform(0, top)
            case Failure.DROPPED:
                # On a line that flaps faster than a message is settled, this must not grow into minutes of silence.
                rounds = self._dropped // len(self.urls)
                self._dropped += 1
                top = min(DROPPED_BACKOFF_S_MAX, self._backoff_s_max, self._backoff_s_min * 2 ** min(rounds, 16))
                delay_s = self._random.uniform(0, max(top, self._backoff_s_min))
            case Failure.AUTHENTICATION:
                top = min(AUTH_BACKOFF_S_MAX, AUTH_BACKOFF_S_MIN * 2 ** min(self._auth_failures, 16))
                delay_s = self._random.uniform(AUTH_BACKOFF_S_MIN, top)
                self._auth_failures += 1
        self._retry_at = now + delay_s

    def network_changed(self, now: float) -> None:
        """A route, an address or a carrier came: whatever the backoff was, try now."""
        self._stagger_s = self._stagger_s_min
        if self.state is State.BACKOFF:
            self._retry_at = now
            self._turn_to(0)
        elif self.state is State.CONNECTING:
            self._retry_at = min(self._retry_at, now)

    def failed_back_later(self, now: float) -> None:
        """The first address is not back yet: look again later."""
        self._fail_back_at = now + FAIL_BACK_S

    def fail_back(self, now: float) -> None:
        """The first address is back and the window is empty: dial it next, at once."""
        self._go(Event.LOST, now)
        self._fail_back_at = None
        self.index = 0
        self._retry_at = now

    def stop(self, now: float) -> None:
        self._go(Event.STOP, now)
