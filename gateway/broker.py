"""Between listeners and journal: routes what clients publish, keeps their sessions, wakes whoever reads.

Owns no socket and no timer: listeners call it, and it calls back through the small protocols they implement.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from gateway.amqp.message import ANNOTATION_RETAIN, MessageError
from gateway.config import Config
from gateway.endings import Endings
from gateway.groups import Group
from gateway.mqtt.delivery import Delivery
from gateway.mqtt.mapping import ANNOTATION_SOURCE, append_with, template_with
from gateway.mqtt.packets import Connect, PublishProperties, Reason
from gateway.mqtt.topics import split_shared
from gateway.mqtt.tree import FilterTree
from gateway.replies import Requests
from gateway.retained import Retained, RetainedStore
from gateway.routing import Router, filters_overlap, inbound_filter
from gateway.sessions import Arrival, Due, Feed, Item, Outlet, SentState, Session, Subscription, Want
from gateway.shares import ShareGroup
from gateway.wills import Testament, Wills
from storeforward.batch import Appended, Batch
from storeforward.errors import JournalFull
from storeforward.journal import Journal
from storeforward.schema import SEQ_MASK
from storeforward.sealed_tables import open_due
from storeforward.streams import COLUMNS, Row, Stream, StreamLimits, WhenFull

log = logging.getLogger("lineside.broker")

LOCAL = "local"
DECODED_MAX = 1024
DECODED_BYTES_MAX = 4 << 20
AUDIENCES_MAX = 10_000
TRIM_ROWS_MAX = 10_000
# Idle sessions are moved on after so many rows, that a full stream finds nobody behind who wants nothing of it.
CATCH_UP_ROWS = 4096
SYS = "$SYS"
SHARED_QOS_MAX = 1
SUBSCRIPTIONS_MAX = 10_000  # of one session; one more is refused with 0x97, on 3.1.1 with 0x80
# Commits of more rows are read by each session at its own pace.
LIVE_ROWS_MAX = 64

Reader = Session | ShareGroup


class Broker:
    """Streams by configuration, sessions by client.

    `schedule(delay_s)` is called when `run_due` has to be, so many seconds from now; the owner sets it.
    """

    def __init__(self, config: Config, journal: Journal) -> None:
        self.config = config
        self.journal = journal
        self.sessions: dict[str, Session] = {}
        self.shares: dict[tuple[str, str], ShareGroup] = {}
        self.retained = RetainedStore(journal, config.mqtt.retained_max if config.mqtt is not None else 0)
        self.wills = Wills(journal)
        self._endings = Endings(journal)
        self.requests = Requests(journal)
        self.schedule: Callable[[float], None] = lambda delay_s: None
        self._tree: FilterTree[tuple[Reader, str]] = FilterTree()
        self._audiences: dict[tuple[int, str], dict[Reader, Want]] = {}
        self._deliveries: dict[tuple[int, int], Delivery] = {}
        self._delivery_bytes = 0
        self._filters: dict[Stream, list[str]] = {}
        self._rows_since = 0
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
            linger_s = out.linger_s if out.ack == "disk-or-hub" else None
            limits = StreamLimits(
                out.max_bytes,
                out.max_messages,
                WhenFull(out.when_full),
                linger_s=linger_s,
                urgent=out.class_ == "urgent",
            )
            stream = journal.stream(out.stream, "outbound", limits)
            journal.cursor(stream, "uplink", "uplink")
            self._filters[stream] = list(out.topics)
        for inbound in config.inbound:
            limits = StreamLimits(inbound.max_bytes, inbound.max_messages, seen_max=inbound.dedup)
            stream = journal.stream(inbound.stream, "inbound", limits)
            self._filters[stream] = [inbound_filter(inbound, config)]
        limits = StreamLimits(config.local.max_bytes, config.local.max_messages, WhenFull(config.local.when_full))
        local = journal.stream(LOCAL, "local", limits)
        self._filters[local] = ["#"]
        return local

    def _router(self) -> Router:
        journal = self.journal
        return Router(self.config, journal.streams, self.local, journal.epoch_token, self._read_locally, self.requests)

    def reload(self, config: Config) -> None:
        """Take over new routes and limits; sessions stay and read new streams, too."""
        self.config = config
        self.local = self._streams_of(config)
        self.router = self._router()
        for session in self.sessions.values():
            session.needs = Counter()
            for subscription in session.subscriptions.values():
                self._need(session, subscription)
            self._feed(session)
        for share in self.shares.values():
            self._feed_share(share)
        self._audiences.clear()

    def streams_for(self, filter_: str) -> list[Stream]:
        """The streams that may hold messages which this filter takes."""
        return [s for s, filters in self._filters.items() if any(filters_overlap(filter_, f) for f in filters)]

    def _read_locally(self, topic: str) -> bool:
        if self.queue_for(topic):
            return True
        return any(True for _ in self._tree.matches(topic)) or any(
            c.kind == "amqp" for c in self.local.cursors.values()
        )

    # ------------------------------------------------------------------ publishing

    def publish(
        self,
        topic: str,
        qos: int,
        retain: bool,
        payload: bytes,
        properties: PublishProperties | None,
        age_us: int,
        source: Session | None = None,
    ) -> None:
        """Stage one message of any kind, and what is retained of it. Raises JournalFull, and then nothing is staged."""
        route = self.router.route(topic, qos)
        notes: dict[str, Any] = {}
        if retain:
            notes[ANNOTATION_RETAIN] = True
        if source is not None and source.no_local:
            notes[ANNOTATION_SOURCE] = source.client_id
        seq: int | None = None
        body = b""
        expires: int | None = None
        if route.wanted:
            seq, body, expires = append_with(
                self.journal, self.router.identity, route, qos, payload, properties, age_us, notes
            )
        if not retain:
            return
        if payload and seq is None:  # nobody is here to be told, so it was not encoded yet
            if self.journal.refuses(route.stream):
                raise JournalFull(route.stream.name, "the disk is full")
            template, expires = template_with(self.router.identity, route, qos, properties, age_us, notes)
            body = template.encode(0, payload)
        self._retain(Retained(topic, qos, expires, route.stream.name, seq, len(payload)), body)

    def retain_received(self, stream: Stream, seq: int, topic: str, body: bytes, expires: int | None) -> None:
        """A message from a hub asked to be retained."""
        delivery = self.decoded(topic, body, expires)
        if delivery.retain:
            self._retain(Retained(topic, delivery.qos, expires, stream.name, seq, len(delivery.payload)), body)

    def _retain(self, message: Retained, body: bytes) -> None:
        """An empty message ends what is retained of its topic; one too many is told and in the ledger."""
        retained = self.retained
        if not message.size:
            retained.clear(message.topic)
        elif retained.full_for(message.topic):
            if retained.tell_full(self.journal.age_us()):
                full = {"topic": message.topic, "retained_max": retained.messages_max}
                log.warning("not retained: too many", extra=full)
            self.journal.lose(
                message.stream, message.seq or 0, "retained-full", message.size, self.journal.in_ledger(message.topic)
            )
        else:
            retained.set(message, body)

    # ------------------------------------------------------------------ sessions

    def _load(self) -> None:
        query = self.journal.query
        now = self.journal.age_us()
        for client_id, expiry_s, gone in query("SELECT client_id, expiry_s, gone_age_us FROM mqtt_session"):
            session = Session(client_id, True, self)
            session.expiry_s = expiry_s
            session.gone_age_us = gone if gone is not None else now
            self.sessions[client_id] = session
        for client_id, filter_, qos, options, identifier, since in query(
            "SELECT client_id, filter, qos, options, identifier, since FROM mqtt_subscription"
        ):
            self._subscribed(self.sessions[client_id], filter_, qos, options, identifier, json.loads(since))
        for session in self.sessions.values():
            self._feed(session)
        for share in self.shares.values():
            self._feed_share(share)
        self._adopt_orphans()
        by_id = {s.id: s for s in self.journal.streams.values()}
        for client_id, stream_id, seq, packet_id, state in query(
            "SELECT client_id, stream, seq, packet_id, state FROM mqtt_outgoing ORDER BY client_id, stream, seq"
        ):
            if stream_id == 0 or stream_id in by_id:
                self.sessions[client_id].restore(by_id.get(stream_id), seq, packet_id, SentState(state))
        for client_id, packet_id in query("SELECT client_id, packet_id FROM mqtt_incoming"):
            self.sessions[client_id].incoming[packet_id] = Arrival()
        for client_id, n, topic, qos, identifiers in query(
            "SELECT client_id, n, topic, qos, identifiers FROM mqtt_retained_due ORDER BY client_id, n"
        ):
            try:
                topic = open_due(self.journal.seal, client_id, n, topic)
            except ValueError:
                self.journal.lose("retained", 0, "corrupt", 0, f"owed to {client_id}")
                self.journal.execute("DELETE FROM mqtt_retained_due WHERE client_id = ? AND n = ?", (client_id, n))
                continue
            self.sessions[client_id].restore_due(n, Due(topic, qos, tuple(json.loads(identifiers))))

    def _adopt_orphans(self) -> None:
        """Cursors that no subscription needs: of shared ones whose last member was not durable, and of sessions.

        A session reads on where messages of QoS 2 are under way to it; any other cursor would hold its stream for good.
        """
        names = {share.cursor_name for share in self.shares.values()}
        under_way = set(self.journal.query("SELECT DISTINCT client_id, stream FROM mqtt_outgoing"))
        for stream in self.journal.streams.values():
            for name, cursor in list(stream.cursors.items()):
                if not name.startswith(("mqtt:", "share:")) or name in names:
                    continue
                session = self.sessions.get(name[5:]) if name.startswith("mqtt:") else None
                if session is not None and stream in session.feeds:
                    continue
                if session is not None and (session.client_id, stream.id) in under_way:
                    session.feeds[stream] = Feed(stream, cursor, cursor.position)
                else:
                    self.journal.drop_cursor(stream, name)

    def connect(
        self, connect: Connect, client_id: str, expiry_s: int | None, outlet: Outlet
    ) -> tuple[Session, bool, bool]:
        """The client's session, whether it was there before, and whether the CONNACK speaks of what has to be on disk.

        That is a session or a will that lasts, and the end of one that did: after a crash it would be there again.
        Call `attach` once the client may be sent something. `expiry_s` None: it never expires; 0: it ends with the
        connection.
        """
        session = self.sessions.get(client_id)
        if session is not None and self._expired(session, self.journal.age_us()):
            self._expire(session)
            session = None
        if session is not None and (connect.clean_start or not session.durable):
            self.end(session)
            session = None
        present = session is not None
        if session is None:
            session = self.sessions[client_id] = Session(client_id, expiry_s != 0, self)
        elif not session.durable and expiry_s != 0:
            session.durable = True
        session.expiry_s = expiry_s
        session.gone_age_us = None
        self.wills.forget(client_id)
        if connect.will is not None:
            self.wills.set(client_id, connect.will)
        if session.durable:
            self._save(session)
        session.outlet = outlet
        return session, present, session.durable or connect.will is not None or client_id in self._endings

    def attach(self, session: Session, outlet: Outlet) -> None:
        """The client has its CONNACK: what waits for it goes out."""
        session.attach(outlet)
        session.pump()
        for share in session.groups.values():
            share.pump()

    def _save(self, session: Session) -> None:
        self.journal.execute(
            "INSERT INTO mqtt_session (client_id, expiry_s, gone_age_us) VALUES (?1, ?2, ?3) "
            "ON CONFLICT DO UPDATE SET expiry_s = ?2, gone_age_us = ?3",
            (session.client_id, session.expiry_s, session.gone_age_us),
        )

    def disconnect(
        self, session: Session, outlet: Outlet, expiry_s: int | bool | None = False, *, clean: bool = False
    ) -> None:
        """The connection is gone. `expiry_s` as in `connect`, False to leave it (MQTT 5.0 §3.14.2.2.2).

        `clean`: the client said goodbye, and its will with it (MQTT-3.14.4-3).
        """
        if session.outlet is not outlet:
            return  # taken over meanwhile
        session.detach()
        if expiry_s is not False:
            session.expiry_s = expiry_s if expiry_s is None else int(expiry_s)
        if clean:
            self.wills.forget(session.client_id)
        ends = not session.durable or session.expiry_s == 0
        self.wills.start(session.client_id, 0 if ends else session.expiry_s)
        if ends:
            self.end(session)
        else:
            session.gone_age_us = self.journal.age_us()
            self._save(session)
            if session.expiry_s is not None:
                self.schedule(session.expiry_s)
        self.run_wills()

    def end(self, session: Session) -> None:
        """Forget a session for good: its cursors no longer hold anything, and its will has no reason to wait."""
        self.sessions.pop(session.client_id, None)
        for filter_ in list(session.subscriptions):
            self._unsubscribed(session, filter_)
        for stream in list(session.feeds):
            self.journal.drop_cursor(stream, session.cursor_name)
        session.feeds.clear()
        if session.durable:
            self.journal.execute("DELETE FROM mqtt_session WHERE client_id = ?", (session.client_id,))
            self._endings.add(session.client_id)
        self._subscriptions_changed()
        will = self.wills.get(session.client_id)
        if will is not None:
            self._publish_will(will)

    def expire_sessions(self) -> None:
        """End sessions whose clients have stayed away for longer than their expiry interval, on the age clock."""
        now = self.journal.age_us()
        for session in [s for s in self.sessions.values() if self._expired(s, now)]:
            self._expire(session)

    @staticmethod
    def _expired(session: Session, now: int) -> bool:
        return (
            session.outlet is None
            and session.expiry_s is not None
            and session.gone_age_us is not None
            and now - session.gone_age_us >= session.expiry_s * 1_000_000
        )

    def _expire(self, session: Session) -> None:
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
                    want = self.audience(stream, row.topic).get(session)
                    if want is not None and want.at(stream.name, row.seq) is not None:
                        self.journal.lose(stream.name, row.seq, "session-limit", len(row.body), session.cursor_name)
                self.journal.advance(stream, feed.cursor, end)
                feed.next = max(feed.next, end)
                feed.parked = False

    # ------------------------------------------------------------------ wills

    def run_due(self) -> None:
        """What time brings: wills, and sessions that have expired."""
        self.expire_sessions()
        self.run_wills()
        self.requests.expire(self.journal.age_us())

    def run_wills(self) -> None:
        """Publish the wills that are due; have the next one scheduled."""
        now = self.journal.age_us()
        for will in self.wills.due(now):
            self._publish_will(will)
        due = self.wills.next_due()
        if due is not None:
            self.schedule(max(0.0, (due - now) / 1e6))

    def _publish_will(self, will: Testament) -> None:
        log.info("will is due", extra={"client": will.client_id, "topic": will.topic})
        try:
            self.publish(will.topic, will.qos, will.retain, will.payload, will.properties, self.journal.age_us())
        except JournalFull as error:
            if self.journal.disk_full:
                self.wills.postpone(will)
                return
            log.error("will lost", extra={"client": will.client_id, "topic": will.topic, "error": error.reason})
            self.journal.lose(error.stream, 0, "will-refused", len(will.payload), will.client_id)
        self.wills.published(will)

    # ------------------------------------------------------------------ subscriptions

    def starts(self, session: Session, filters: Iterable[str]) -> list[dict[str, int]]:
        """From where on new subscriptions to these would count, for `subscribe`.

        Of all of a packet before the first gives the session cursors: what is held for a first reader is for each.
        """
        return [self._since(session, split_shared(filter_)[1]) for filter_ in filters]

    def subscribe(
        self,
        session: Session,
        requests: Sequence[tuple[str, int, int, int | None]],
        starts: Sequence[dict[str, int]],
    ) -> tuple[list[int], list[str]]:
        """(filter, qos, options, identifier) each: a SUBACK code each, and the filters to give retained messages for.

        options: no local | retain as published << 1 | retain handling << 2.
        """
        codes: list[int] = []
        retained: list[str] = []
        for (filter_, qos, options, identifier), start in zip(requests, starts, strict=True):
            share, _ = split_shared(filter_)
            granted = qos if share is None else min(qos, SHARED_QOS_MAX)
            old = session.subscriptions.get(filter_)
            if old is None and len(session.subscriptions) + len(session.suspended) >= SUBSCRIPTIONS_MAX:
                codes.append(Reason.QUOTA_EXCEEDED)
                continue
            since = old.since if old is not None else start
            session.suspended.pop(filter_, None)
            self._subscribed(session, filter_, granted, options, identifier, since)
            if share is None:
                self._feed(session)
            else:
                self._feed_share(session.groups[filter_])
            if session.durable:
                self.journal.execute(
                    "INSERT OR REPLACE INTO mqtt_subscription (client_id, filter, qos, options, identifier, since) "
                    "VALUES (?, ?, ?, ?, ?, ?)",
                    (session.client_id, filter_, granted, options, identifier, json.dumps(since)),
                )
            codes.append(granted)
            handling = options >> 2 & 3
            # MQTT 5.0 §3.3.1.3: never for a shared subscription, and as its retain handling says.
            if share is None and (handling == 0 or (handling == 1 and old is None)):
                retained.append(filter_)
        self._subscriptions_changed()
        return codes, retained

    def _since(self, session: Session, filter_: str) -> dict[str, int]:
        """From where on a new subscription counts: from the next message; what is held for a first reader counts."""
        return {
            stream.name: stream.next_seq if stream in session.feeds else self.journal.cursor_start(stream)
            for stream, filters in self._filters.items()
            if any(filters_overlap(filter_, f) for f in filters)
        }

    def owing(self, session: Session, filters: Iterable[str]) -> Iterator[bool]:
        """Have the session owed what is retained for these, in portions; each says whether it waits for a commit."""
        now = self.journal.age_us()
        for filter_ in filters:
            for found in self.retained.matching(filter_, now):
                subscription = session.subscriptions.get(filter_)
                if subscription is None:
                    break
                identifiers = () if subscription.identifier is None else (subscription.identifier,)
                yield session.owe([(message, subscription.qos, identifiers) for message in found])

    def _subscribed(
        self,
        session: Session,
        filter_: str,
        qos: int,
        options: int,
        identifier: int | None,
        since: dict[str, int],
    ) -> None:
        share, inner = split_shared(filter_)
        subscription = Subscription(inner, qos, options, identifier, since, share)
        old = session.subscriptions.get(filter_)
        session.no_local += subscription.no_local - (old is not None and old.no_local)
        session.subscriptions[filter_] = subscription
        if share is None:
            self._tree.add(inner, (session, filter_))
            if old is None:
                self._need(session, subscription)
            return
        group = self.shares.get((share, inner))
        if group is None:
            group = self.shares[share, inner] = ShareGroup(share, inner, self)
            self._tree.add(inner, (group, ""))
        group.members[session] = subscription
        if filter_ not in session.groups:
            session.groups[filter_] = group
            if session.outlet is not None:
                group.join(session)

    def _unsubscribed(self, session: Session, filter_: str) -> Subscription | None:
        subscription = session.subscriptions.pop(filter_, None)
        if subscription is None:
            return None
        session.no_local -= subscription.no_local
        if subscription.share is None:
            self._tree.remove(subscription.filter, (session, filter_))
            session.needs.subtract(self.streams_for(subscription.filter))
            return subscription
        group = session.groups.pop(filter_)
        group.leave(session)
        del group.members[session]
        if not group.members:
            del self.shares[group.name, group.filter]
            self._tree.remove(group.filter, (group, ""))
            for stream in group.feeds:
                self.journal.drop_cursor(stream, group.cursor_name)
        return subscription

    def unsubscribe(self, session: Session, filters: Iterable[str]) -> list[int]:
        codes: list[int] = []
        for filter_ in filters:
            had = self._unsubscribed(session, filter_) or session.suspended.pop(filter_, None)
            if had is not None and session.durable:
                self.journal.execute(
                    "DELETE FROM mqtt_subscription WHERE client_id = ? AND filter = ?", (session.client_id, filter_)
                )
            codes.append(Reason.SUCCESS if had is not None else Reason.NO_SUBSCRIPTION_EXISTED)
        if Reason.SUCCESS in codes:
            self._feed(session)
            self._subscriptions_changed()
        return codes

    def _subscriptions_changed(self) -> None:
        self._audiences.clear()
        self.router.forget()

    def suspend(self, session: Session, allowed: Callable[[str], bool] | None) -> list[str]:
        """Deliver only what is allowed (None: everything); return the filters that are not.

        They stay the session's, also in the journal, so that rules that allow them again bring them back; what is
        published in between is not kept for them.
        """
        every = [*session.subscriptions, *session.suspended]
        forbidden = set() if allowed is None else {f for f in every if not allowed(f)}
        back = [f for f in session.suspended if f not in forbidden]
        gone = [f for f in session.subscriptions if f in forbidden]
        for filter_ in back:
            s = session.suspended.pop(filter_)
            since = self._since(session, s.filter)
            self._subscribed(session, filter_, s.qos, s.options, s.identifier, since)
            if s.share is not None:
                self._feed_share(session.groups[filter_])
        for filter_ in gone:
            had = self._unsubscribed(session, filter_)
            assert had is not None
            session.suspended[filter_] = had
        if back or gone:
            self._feed(session)
            self._subscriptions_changed()
        return list(session.suspended)

    def _need(self, session: Session, subscription: Subscription) -> None:
        if subscription.share is None:
            session.needs.update(self.streams_for(subscription.filter))

    def _feed(self, session: Session) -> None:
        """Give the session a cursor on every stream its filters can match, and none on others.

        A cursor that still has messages under way stays: they are finished (MQTT-3.10.4-3).
        """
        for stream in self._filters:
            needed = session.needs[stream] > 0
            feed = session.feeds.get(stream)
            if needed and feed is None:
                self._add_feed(session, stream)
            elif not needed and feed is not None and not feed.order:
                del session.feeds[stream]
                self.journal.drop_cursor(stream, session.cursor_name)

    def _add_feed(self, session: Session, stream: Stream) -> None:
        cursor = self.journal.cursor(stream, session.cursor_name, "mqtt", volatile=not session.durable)
        session.feeds[stream] = Feed(stream, cursor, cursor.position)

    def _feed_share(self, share: ShareGroup) -> None:
        for stream, filters in self._filters.items():
            if stream not in share.feeds and any(filters_overlap(share.filter, f) for f in filters):
                cursor = self.journal.cursor(stream, share.cursor_name, "mqtt")
                share.add_feed(stream, Group(self.journal, stream, cursor, share.wants))

    # ------------------------------------------------------------------ delivery

    def audience(self, stream: Stream, topic: str) -> dict[Reader, Want]:
        """Who reads a topic of a stream, and how."""
        key = stream.id, topic
        audience = self._audiences.get(key)
        if audience is None:
            if len(self._audiences) >= AUDIENCES_MAX:
                self._audiences.clear()
            found: dict[Reader, list[Subscription]] = {}
            for reader, filter_ in self._tree.matches(topic):
                among = found.setdefault(reader, [])
                if isinstance(reader, Session):
                    among.append(reader.subscriptions[filter_])
                else:
                    among.extend(reader.members.values())
            audience = self._audiences[key] = {r: Want.of(stream.name, among) for r, among in found.items()}
        return audience

    def committed(self, batch: Batch) -> None:
        """Wake those who read what a commit added."""
        woken: dict[Reader, None] = {}
        for stream, appended in batch.appended.items():
            self._rows_since += appended.rows
            if appended.rows <= LIVE_ROWS_MAX:
                self._hand_out(stream, appended, woken)
                continue
            for topic in dict.fromkeys(appended.columns[3::COLUMNS]):
                for reader in self.audience(stream, topic):
                    reader.woken(stream, appended.first_seq)
                    woken[reader] = None
        for reader in woken:
            reader.pump()
        if self._rows_since >= CATCH_UP_ROWS:
            self.caught_up()

    def _hand_out(self, stream: Stream, appended: Appended, woken: dict[Reader, None]) -> None:
        """Give a small commit's rows to those who have had all before them; the others are woken."""
        columns = appended.columns
        items: dict[Reader, list[Item]] = {}
        for at in range(0, len(columns), COLUMNS):
            topic = columns[at + 3]
            audience = self.audience(stream, topic)
            if not audience:
                continue
            row = Row(columns[at] & SEQ_MASK, topic, columns[at + 2], columns[at + 5])
            delivery = self.delivery(stream, row)
            seq = row.seq
            for reader, want in audience.items():
                item = (seq, delivery, want)
                if reader in items:
                    items[reader].append(item)
                else:
                    items[reader] = [item]
        for reader, its in items.items():
            if type(reader) is not Session or not reader.live(stream, its):
                reader.woken(stream, appended.first_seq)
                woken[reader] = None

    def caught_up(self) -> None:
        """Move those on who want nothing of what there is."""
        self._rows_since = 0
        for session in self.sessions.values():
            session.caught_up()
        for share in self.shares.values():
            share.caught_up()

    def pump(self, session: Session) -> None:
        """The client's socket takes more."""
        session.pump()
        for share in session.groups.values():
            share.pump()

    def answered(self, session: Session) -> None:
        """The client has acknowledged: there may be room in its window."""
        if session.behind:
            session.pump()
        for share in session.groups.values():
            share.pump()

    def delivery(self, stream: Stream, row: Row) -> Delivery:
        """A row's message; the newest ones are kept, because a thousand subscribers read the same rows."""
        key = stream.id, row.seq
        delivery = self._deliveries.get(key)
        if delivery is None:
            self._delivery_bytes += len(row.body)
            if len(self._deliveries) >= DECODED_MAX or self._delivery_bytes > DECODED_BYTES_MAX:
                self._deliveries.clear()
                self._delivery_bytes = len(row.body)
            delivery = self._deliveries[key] = self.decoded(row.topic, row.body, row.expires_age_us)
        return delivery

    def decoded(self, topic: str, body: bytes, expires_age_us: int | None) -> Delivery:
        try:
            return Delivery.of(topic, body, expires_age_us, self.config.gateway.id)
        except MessageError:
            log.error("a journaled message does not decode; its bytes are handed on", extra={"topic": topic})
            return Delivery(topic, body, 1, False, None, None, expires_age_us)
