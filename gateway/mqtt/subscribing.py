"""SUBSCRIBE and UNSUBSCRIBE of one connection (MQTT 5.0 §3.8 to §3.11).

A filter costs many times what a message does, so the work is given out in portions, for the connection's turns. It is
answered once it is on the disk, and in the order it was asked for: a client may take the answer that comes last for how
things are. Knows no socket and no clock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol, TypeVar

from gateway.access import Permit
from gateway.broker import Broker
from gateway.mqtt.packets import Reason, Subscribe, Unsubscribe
from gateway.mqtt.topics import check_filter
from gateway.sessions import Session
from gateway.turns import AT_ONCE, Account, Turns
from storeforward.batch import Waiter

_T = TypeVar("_T")


class Subscriber(Waiter, Protocol):
    """The connection. `session`: None when it has left it; `permit`: of the rules in force, None if there are none."""

    session: Session | None
    permit: Permit | None
    account: Account

    @property
    def five(self) -> bool: ...
    def refusal(self, filter_: str) -> Reason | None: ...
    def begin(self, errand: Iterator[None], *, at_once: bool) -> None: ...
    def enter(self) -> None: ...
    def suback(self, packet: Subscribe, codes: Sequence[int]) -> None: ...
    def unsuback(self, packet: Unsubscribe, codes: Sequence[int]) -> None: ...
    def subscribed(self, filters: Iterable[str]) -> None: ...


@dataclass(eq=False, slots=True)
class _Request:
    """One packet. `codes`: what it is answered, one for each filter; `answer` says so, once that is known.

    `retained`: the filters that retained messages are to be given for; `searching`: the session waits for those.
    """

    session: Session
    codes: list[int] = field(default_factory=list)
    retained: list[str] = field(default_factory=list)
    searching: bool = False
    answer: Callable[[], None] | None = None

    def search(self) -> None:
        if not self.searching:
            self.searching = True
            self.session.search_begins()


class Subscriptions:
    """What one connection subscribes to and takes back, as far as that is not answered yet."""

    def __init__(self, client: Subscriber, broker: Broker, turns: Turns) -> None:
        self._client = client
        self._broker = broker
        self._journal = broker.journal
        self._turns = turns
        self._owed: deque[_Request] = deque()

    def subscribe(self, packet: Subscribe) -> None:
        """The session is there."""
        self._client.begin(self._subscribing(self._take(), packet), at_once=len(packet.subscriptions) <= AT_ONCE)

    def unsubscribe(self, packet: Unsubscribe) -> None:
        self._client.begin(self._unsubscribing(self._take(), packet), at_once=len(packet.filters) <= AT_ONCE)

    def _take(self) -> _Request:
        session = self._client.session
        assert session is not None
        request = _Request(session)
        self._owed.append(request)
        return request

    def _answer(self, request: _Request, answer: Callable[[], None]) -> None:
        request.answer = answer
        while self._owed and (give := self._owed[0].answer) is not None:
            self._owed.popleft()
            give()

    # ------------------------------------------------------------------ SUBSCRIBE

    def _subscribing(self, request: _Request, packet: Subscribe) -> Iterator[None]:
        client, broker, session, codes = self._client, self._broker, request.session, request.codes
        identifier = packet.properties.subscription_identifier
        permit = client.permit
        asked: list[tuple[int, tuple[str, int, int, int | None], dict[str, int]]] = []  # and which code it will be
        for some in _portions(packet.subscriptions):
            for s in some:
                reason = self._refusal(s.filter)
                if reason is None:
                    options = s.no_local | s.retain_as_published << 1 | s.retain_handling << 2
                    (start,) = broker.starts(session, (s.filter,))
                    asked.append((len(codes), (s.filter, s.qos, options, identifier), start))
                codes.append(reason or 0)
            yield
        if len(asked) > AT_ONCE and client.session is session:
            request.search()  # the first of them are in force before the last
        for some_asked in _portions(asked):
            if client.session is not session:
                return
            few = some_asked
            if client.permit is not permit:  # other rules came meanwhile
                for at, (filter_, *_), _ in some_asked:
                    codes[at] = self._refusal(filter_) or 0
                few = [each for each in some_asked if not codes[each[0]]]
            granted, give = broker.subscribe(session, [each[1] for each in few], [each[2] for each in few])
            for (at, _, _), code in zip(few, granted, strict=True):
                codes[at] = code
            request.retained += give
            yield
        # Not before the subscription is on disk: a power cut must not take what was promised.
        self._journal.wait(client, partial(self._stored, request, packet))

    def _refusal(self, filter_: str) -> Reason | None:
        if self._client.five and ill_formed(filter_):
            return Reason.TOPIC_FILTER_INVALID
        return self._client.refusal(filter_)

    def _stored(self, request: _Request, packet: Subscribe) -> None:
        if self._client.session is not request.session:
            return
        request.search()
        wild = sum("+" in each or "#" in each for each in request.retained)
        count = len(request.retained) + wild * len(self._broker.retained) // AT_ONCE
        with self._turns.charging(self._client.account):
            self._client.begin(self._giving(request, packet), at_once=count <= AT_ONCE and self._turns.ready)
        self._client.enter()

    def _giving(self, request: _Request, packet: Subscribe) -> Iterator[None]:
        """Have the session owed what is retained for its new subscriptions, then acknowledge them."""
        waits = False
        for more in self._broker.owing(request.session, request.retained):
            waits = waits or more
            yield
            if self._client.session is not request.session:
                return
        if waits:
            self._journal.wait(self._client, partial(self._acknowledge_charged, request, packet))
        else:
            self._acknowledge(request, packet)

    def _acknowledge_charged(self, request: _Request, packet: Subscribe) -> None:
        with self._turns.charging(self._client.account):
            self._acknowledge(request, packet)

    def _acknowledge(self, request: _Request, packet: Subscribe) -> None:
        self._answer(request, partial(self._suback, request, packet))

    def _suback(self, request: _Request, packet: Subscribe) -> None:
        self._client.suback(packet, request.codes)
        if self._client.session is request.session:
            request.session.search_ends()
            granted = zip(packet.subscriptions, request.codes, strict=True)
            self._client.subscribed([each.filter for each, code in granted if code < 0x80])

    # ------------------------------------------------------------------ UNSUBSCRIBE

    def _unsubscribing(self, request: _Request, packet: Unsubscribe) -> Iterator[None]:
        client = self._client
        for some in _portions(packet.filters):
            if client.session is not request.session:
                return
            found = self._broker.unsubscribe(request.session, some)
            if client.five:
                found = [
                    Reason.TOPIC_FILTER_INVALID if ill_formed(filter_) else code
                    for filter_, code in zip(some, found, strict=True)
                ]
            request.codes += found
            yield
        answer = partial(client.unsuback, packet, request.codes)
        self._journal.wait(client, partial(self._answer, request, answer))


def ill_formed(filter_: str) -> bool:
    """Of a 5.0 client: one of 3.1.1 was closed already for such a filter."""
    try:
        check_filter(filter_)
    except ValueError:
        return True
    return False


def _portions(items: Sequence[_T]) -> Iterator[Sequence[_T]]:
    return (items[at : at + AT_ONCE] for at in range(0, len(items), AT_ONCE))
