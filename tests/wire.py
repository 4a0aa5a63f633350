"""Two AMQP engines back to back with one link between them, no sockets: what drains and intakes are tested on."""

from __future__ import annotations

from typing import TypeVar

from gateway.amqp.engine import Engine, Receiver, Sender
from gateway.amqp.events import Deliveries, Event, LinkAttached
from gateway.amqp.termini import Terminus

NOW = 100.0
E = TypeVar("E")


class Wire:
    """`near` sends, `far` receives. Each `attach` makes a fresh pair of connections."""

    sender: Sender
    receiver: Receiver

    def attach(self, credit: int = 100, max_message_bytes: int = 0) -> Wire:
        self.near = Engine(server=False, container="near")
        self.far = Engine(server=True, container="far")
        self._heard: list[Event] = []
        self.got: list[tuple[int, bytes]] = []
        self.near.open()
        self.run()
        self.far.open()
        self.run()
        self.sender = self.near.sender(self.near.session(), "link", Terminus("edge"))
        self.run()
        link = next(event.link for event in self._heard if isinstance(event, LinkAttached))
        assert isinstance(link, Receiver)
        self.receiver = link
        link.confirm(max_message_bytes=max_message_bytes)
        link.topup(credit)
        self.run()
        return self

    def run(self) -> None:
        """Carry bytes until both are silent; what arrived is in `got`, oldest first."""
        for _ in range(10_000):
            up, down = self.near.data_to_send(), self.far.data_to_send()
            self._hear(self.far.take_events())
            self.near.take_events()
            if not up and not down:
                return
            if up:
                self._hear(self.far.receive(up, NOW))
            if down:
                self.near.receive(down, NOW)
        raise AssertionError("the engines never fall silent")

    def _hear(self, events: list[Event]) -> None:
        self._heard += events
        for event in events:
            if isinstance(event, Deliveries):
                self.got += event.batch

    def take(self) -> list[tuple[int, bytes]]:
        """(handle, body) of everything that arrived since the last call."""
        self.run()
        got, self.got = self.got, []
        return got
