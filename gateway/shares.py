"""Shared subscriptions: whose turn it is to get the next rows of a group's cursor (MQTT 5.0 §4.8.2).

What is handed to whom and comes back is the business of `groups`. Knows no socket and no packet.
"""

from __future__ import annotations

from gateway.groups import Group
from gateway.mqtt.topics import filter_matches
from gateway.sessions import Desk, Outlet, Sent, Session, Subscription
from storeforward.streams import Row, Stream

GROUP_ROWS_A_TURN = 16


class ShareGroup:
    """A shared subscription: its members compete for the rows of one durable cursor a stream (MQTT 5.0 §4.8.2).

    At most QoS 1: what a member leaves unfinished goes to the others.
    """

    def __init__(self, name: str, filter: str, desk: Desk) -> None:
        self.name = name
        self.filter = filter
        self.feeds: dict[Stream, Group] = {}
        self.members: dict[Session, Subscription] = {}
        self.here: dict[Session, None] = {}
        self._desk = desk
        self._pumping = False

    @property
    def cursor_name(self) -> str:
        return f"share:{self.name}/{self.filter}"  # a name has no slash: no two groups share a cursor

    def wants(self, row: Row) -> bool:
        return filter_matches(self.filter, row.topic)

    def join(self, session: Session) -> None:
        """A member is connected."""
        if session not in self.here:
            self.here[session] = None
            for group in self.feeds.values():
                group.join(session)

    def leave(self, session: Session) -> None:
        """A member's connection is gone: what it has not finished goes to the others."""
        if session in self.here:
            del self.here[session]
            for group in self.feeds.values():
                group.leave(session)
            self.pump()

    def add_feed(self, stream: Stream, group: Group) -> None:
        self.feeds[stream] = group
        for session in self.here:
            group.join(session)

    def woken(self, stream: Stream, first_seq: int) -> None:
        """Nothing to remember: a group always reads on from where it is."""

    def caught_up(self) -> None:
        """Move over rows that the group does not want, and go on where a turn ended only because it had taken long."""
        for group in self.feeds.values():
            group.skip_unwanted()
        if self.here and any(group.behind for group in self.feeds.values()):
            self.pump()

    def pump(self) -> None:
        """A few rows to each member in turn, as long as anybody takes any."""
        if self._pumping:
            return
        self._pumping = True
        try:
            busy = True
            while busy:
                busy = False
                for session in list(self.here):
                    if self._turn(session):
                        busy = True
                        self.here.pop(session, None)  # to the end of the row
                        self.here[session] = None
        finally:
            self._pumping = False
        for session in self.here:
            if session.outlet is not None:
                session.outlet.flush()

    def _turn(self, session: Session) -> bool:
        outlet = session.outlet
        if outlet is None or outlet.congested or session.planning:
            return False
        subscription = self.members[session]
        room = min(outlet.window_left, GROUP_ROWS_A_TURN)
        if room <= 0:
            return False
        took = False
        for stream, group in self.feeds.items():
            for row, _ in group.take(session, room):
                took = True
                self._hand(session, outlet, subscription, stream, group, row)
            room = min(outlet.window_left, GROUP_ROWS_A_TURN)
            if room <= 0:
                break
        return took

    def _hand(
        self, session: Session, outlet: Outlet, subscription: Subscription, stream: Stream, group: Group, row: Row
    ) -> None:
        delivery = self._desk.delivery(stream, row)
        identifiers = () if subscription.identifier is None else (subscription.identifier,)
        qos = min(subscription.qos, delivery.qos, 1)
        if not outlet.takes(delivery, qos, identifiers):
            # Another member may take it; without one it waits, as for a group that nobody reads.
            group.release(session, row.seq, barred=True)
            return
        retain = delivery.retain and subscription.retain_as_published
        number = outlet.deliver(delivery, qos, retain, identifiers)
        if number is None:
            group.release(session, row.seq)
        elif not qos:
            group.done(session, row.seq)
        else:
            session.sent[number] = Sent(number, group, row.seq, qos, tried=True)
