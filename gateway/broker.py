"""Between listeners and journal: routes what clients publish, keeps their sessions, wakes whoever reads.

Owns no socket: listeners call it, and it calls back through the small protocols they implement.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable

from gateway.amqp.message import Message, decode
from gateway.config import Config
from gateway.mqtt.topics import filter_matches, split_shared
from gateway.routing import Router, filters_overlap, inbound_filter
from gateway.sessions import Feed, Outlet, Session, Subscription
from storeforward.journal import Batch, Journal
from storeforward.streams import Row, Stream, StreamLimits, WhenFull

log = logging.getLogger("lineside.broker")

LOCAL = "local"
DECODED_MAX = 1024
TRIM_ROWS_MAX = 10_000


class Broker:
    """Streams by configuration, sessions by client."""

    def __init__(self, config: Config, journal: Journal) -> None:
        self.config = config
        self.journal = journal
        self.sessions: dict[str, Session] = {}
        self._decoded: dict[tuple[int, int], Message] = {}
        self._filters: dict[Stream, list[str]] = {}
        self._readers: dict[Stream, list[Session]] = {}
        # Whether AMQP apps are to find this topic's messages in a queue, though none of them reads there yet.
        self.queue_for: Callable[[str], bool] = lambda topic: False
        self.local = self._streams_of(config)
        self.router = self._router()
        self._load()

    # ------------------------------------------------------------------ streams

    def _streams_of(self, config: Config) -> Stream:
        journal = self.journal
        self._filters.clear()
        for out in config.outbound:
            limits = StreamLimits(out.max_bytes, out.max_messages, WhenFull(out.when_full))
            stream = journal.stream(out.stream, "outbound", limits)
            journal.cursor(stream, "uplink", "uplink")
            self._filters[stream] = list(out.topics)
        for inbound in config.inbound:
            limits = StreamLimits(inbound.max_bytes, inbound.max_messages, seen_max=inbound.dedup)
            stream = journal.stream(inbound.stream, "inbound", limits)
            self._filters[stream] = [inbound_filter(inbound, config.gateway.id)]
        limits = StreamLimits(config.local.max_bytes, config.local.max_messages, WhenFull(config.local.when_full))
        local = journal.stream(LOCAL, "local", limits)
        self._filters[local] = ["#"]
        return local

    def _router(self) -> Router:
        return Router(self.config, self.journal.streams, self.local, self.journal.epoch_token, self._read_locally)

    def reload(self, config: Config) -> None:
        """Take over new routes and limits; sessions stay and read new streams, too."""
        self.config = config
        self.local = self._streams_of(config)
        self.router = self._router()
        for session in self.sessions.values():
            self._feed(session)

    def _read_locally(self, topic: str) -> bool:
        if self.queue_for(topic):
            return True
        return any(
            filter_matches(s.filter, topic) for each in self.sessions.values() for s in each.subscriptions.values()
        ) or any(c.kind == "amqp" for c in self.local.cursors.values())

    def streams_for(self, filter_: str) -> list[Stream]:
        """The streams that may hold messages which this filter takes."""
        return [
            stream for stream, filters in self._filters.items() if any(filters_overlap(filter_, f) for f in filters)
        ]

    # ------------------------------------------------------------------ sessions

    def _load(self) -> None:
        for client_id, expiry_s, gone in self.journal.query(
            "SELECT client_id, expiry_s, gone_age_us FROM mqtt_session"
        ):
            session = Session(client_id, True)
            session.expiry_s = expiry_s
            session.gone_age_us = gone if gone is not None else self.journal.age_us()
            self.sessions[client_id] = session
        for client_id, filter_, qos, options, identifier, since in self.journal.query(
            "SELECT client_id, filter, qos, options, identifier, since FROM mqtt_subscription"
        ):
            session = self.sessions[client_id]
            session.subscriptions[filter_] = Subscription(filter_, qos, options, identifier, json.loads(since))
        for session in self.sessions.values():
            self._feed(session)

    def connect(self, client_id: str, clean_start: bool, expiry_s: int | None, outlet: Outlet) -> tuple[Session, bool]:
        """The client's session, and whether it was there before.

        `expiry_s` None: it never expires; 0: it ends with the connection.
        """
        session = self.sessions.get(client_id)
        if session is not None and (clean_start or not session.durable):
            self.end(session)
            session = None
        present = session is not None
        if session is None:
            session = self.sessions[client_id] = Session(client_id, expiry_s != 0)
        session.durable = session.durable or expiry_s != 0
        session.expiry_s = expiry_s
        if session.durable:
            self._save(session)
        session.attach(outlet)
        return session, present

    def _save(self, session: Session) -> None:
        self.journal.execute(
            "INSERT INTO mqtt_session (client_id, expiry_s, gone_age_us) VALUES (?1, ?2, ?3) "
            "ON CONFLICT DO UPDATE SET expiry_s = ?2, gone_age_us = ?3",
            (session.client_id, session.expiry_s, session.gone_age_us),
        )

    def disconnect(self, session: Session, outlet: Outlet, expiry_s: int | bool | None = False) -> None:
        """The connection is gone. `expiry_s` as in `connect`, False to leave it (MQTT 5.0 §3.14.2.2.2)."""
        if session.outlet is not outlet:
            return  # taken over meanwhile
        session.detach()
        if expiry_s is not False:
            session.expiry_s = expiry_s if expiry_s is None else int(expiry_s)
        if not session.durable or session.expiry_s == 0:
            self.end(session)
            return
        session.gone_age_us = self.journal.age_us()
        self._save(session)

    def end(self, session: Session) -> None:
        """Forget a session for good: its cursors no longer hold anything."""
        self.sessions.pop(session.client_id, None)
        for stream in list(session.feeds):
            self.journal.drop_cursor(stream, session.cursor_name)
            self._readers[stream].remove(session)
        session.feeds.clear()
        if session.durable:
            self.journal.execute("DELETE FROM mqtt_session WHERE client_id = ?", (session.client_id,))
        self.router.forget()

    def expire_sessions(self) -> None:
        """End sessions whose clients have stayed away for longer than their expiry interval, on the age clock."""
        now = self.journal.age_us()
        over = [
            s
            for s in self.sessions.values()
            if s.outlet is None
            and s.expiry_s is not None
            and s.gone_age_us is not None
            and now - s.gone_age_us >= s.expiry_s * 1_000_000
        ]
        for session in over:
            log.info("session expired", extra={"client": session.client_id, "expiry_s": session.expiry_s})
            self.end(session)

    def trim_sessions(self) -> None:
        """Move sessions on that have more waiting than they may; what they miss is in the ledger (promise P4)."""
        most = self.config.mqtt.session_max_messages if self.config.mqtt is not None else None
        if most is None:
            return
        for session in self.sessions.values():
            for stream, feed in session.feeds.items():
                start, end = feed.cursor.position, stream.committed - most
                if start >= end or session.outlet is not None:
                    continue  # who is here and reads gets what there is
                end = min(end, start + TRIM_ROWS_MAX)
                for row in self.journal.read_range(stream, start, end):
                    if session.wants(stream, row) >= 0:
                        self.journal.lose(stream.name, row.seq, "session-limit", len(row.body), session.cursor_name)
                self.journal.advance(stream, feed.cursor, end)

    def subscribe(self, session: Session, requests: Iterable[tuple[str, int, int, int | None]]) -> list[int]:
        """(filter, qos, options byte, identifier) each; returns a SUBACK code each."""
        codes: list[int] = []
        for filter_, qos, options, identifier in requests:
            if split_shared(filter_)[0] is not None:
                codes.append(0x9E)
                continue
            granted = min(qos, 1)
            old = session.subscriptions.get(filter_)
            fresh = [
                stream
                for stream, filters in self._filters.items()
                if stream not in session.feeds and any(filters_overlap(filter_, f) for f in filters)
            ]
            since = (
                old.since
                if old is not None
                else {s.name: f.stream.next_seq for s, f in session.feeds.items() if s not in fresh}
            )
            subscription = Subscription(filter_, granted, options, identifier, since)
            session.subscriptions[filter_] = subscription
            self._feed(session)
            if session.durable:
                self.journal.execute(
                    "INSERT OR REPLACE INTO mqtt_subscription (client_id, filter, qos, options, identifier, since) "
                    "VALUES (?, ?, ?, ?, ?, ?)",
                    (session.client_id, filter_, granted, options, identifier, json.dumps(since)),
                )
            codes.append(granted)
        session.changed()
        self.router.forget()
        return codes

    def unsubscribe(self, session: Session, filters: Iterable[str]) -> list[int]:
        codes = []
        for filter_ in filters:
            had = session.subscriptions.pop(filter_, None)
            if had is not None and session.durable:
                self.journal.execute(
                    "DELETE FROM mqtt_subscription WHERE client_id = ? AND filter = ?", (session.client_id, filter_)
                )
            codes.append(0x00 if had is not None else 0x11)
        session.changed()
        self._feed(session)
        self.router.forget()
        return codes

    def _feed(self, session: Session) -> None:
        """Give the session a cursor on every stream its filters can match, and none on others."""
        for stream, filters in self._filters.items():
            needed = any(filters_overlap(s, f) for s in session.subscriptions for f in filters)
            if needed and stream not in session.feeds:
                cursor = self.journal.cursor(stream, session.cursor_name, "mqtt", volatile=not session.durable)
                session.feeds[stream] = Feed(stream, cursor, cursor.position, cursor.position)
                self._readers.setdefault(stream, []).append(session)
            elif not needed and stream in session.feeds:
                del session.feeds[stream]
                self._readers[stream].remove(session)
                self.journal.drop_cursor(stream, session.cursor_name)

    # ------------------------------------------------------------------ delivery

    def committed(self, batch: Batch) -> None:
        """Wake the sessions that read what a commit added."""
        woken: dict[Session, None] = {}
        for stream in batch.appended:
            woken.update(dict.fromkeys(self._readers.get(stream, ())))
        for session in woken:
            self.pump(session)

    def pump(self, session: Session) -> None:
        session.pump(self.journal, self._decode)

    def acked(self, session: Session, packet_ids: list[int]) -> None:
        session.acked(packet_ids, self.journal)
        self.pump(session)

    def _decode(self, stream: Stream, row: Row) -> Message:
        """A row's message; the newest ones are kept, because a thousand subscribers read the same rows."""
        key = stream.id, row.seq
        message = self._decoded.get(key)
        if message is None:
            if len(self._decoded) >= DECODED_MAX:
                self._decoded.clear()
            message = self._decoded[key] = decode(row.body)
        return message
