"""What stands behind the addresses that AMQP apps name: durable subscriptions, queues, reply addresses.

Each is a set of groups, one for every stream that holds messages for its filter; a group's cursor is its place there.
Subscriptions and queues survive a restart: their cursors are in the journal, and what else is to be known of them is
in its `meta` table. Knows no link, no connection and no socket.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass, field

from gateway.amqp.addresses import REPLY_PREFIX, Kind, Rule, covers
from gateway.groups import Group
from gateway.mqtt.topics import filter_matches
from gateway.mqtt.tree import FilterTree
from storeforward.journal import Journal
from storeforward.streams import Row, Stream

log = logging.getLogger("lineside.amqp")

SUBSCRIPTIONS_MAX = 10_000
QUEUES_MAX = 1_000
AUDIENCES_MAX = 10_000
REPLIES_A_CONNECTION_MAX = 64
NAME_BYTES_MAX = 1024
# A queue that is not in the configuration goes once it has been empty and without receivers for so long.
QUEUE_IDLE_S = 86_400.0
_META = "amqp-subscription "


class TooMany(Exception):
    """A limit is reached; the text says which."""


@dataclass(eq=False, slots=True)
class Source:
    """Where a receiver reads. exclusive: one receiver at a time, and in order even where it releases."""

    filter: str
    cursor_name: str
    kind: Kind
    durable: bool
    exclusive: bool
    groups: dict[Stream, Group] = field(default_factory=dict)

    @property
    def members(self) -> int:
        return max((group.members for group in self.groups.values()), default=0)

    @property
    def empty(self) -> bool:
        """Nothing waits, as far as anybody has looked."""
        return all(not g.ahead and g.cursor.position >= g.stream.committed for g in self.groups.values())


@dataclass(eq=False, slots=True)
class Subscription:
    """A durable one, known by container and link name; owner: the identity that made it, None for anonymous."""

    container: str
    link: str
    owner: str | None
    source: Source


@dataclass(eq=False, slots=True)
class _Queue:
    source: Source
    configured: bool
    idle_since: float | None = None


@dataclass(frozen=True, eq=False, slots=True)
class Reply:
    """A dynamic address, that only `owner` may receive from. source: its queue, None where it is a topic."""

    topic: str
    owner: Hashable
    source: Source | None


class Directory:
    """`streams_for(filter)`: the streams that may hold messages for it. `changed()`: what is read has changed."""

    def __init__(
        self, journal: Journal, streams_for: Callable[[str], list[Stream]], changed: Callable[[], None]
    ) -> None:
        self.journal = journal
        self._streams_for = streams_for
        self._changed = changed
        self.rules: tuple[Rule, ...] = ()
        self.subscriptions: dict[str, Subscription] = {}
        self._queues: dict[str, _Queue] = {}
        self._replies: dict[str, Reply] = {}
        self._volatile: dict[Source, None] = {}
        self._tree: FilterTree[Source] = FilterTree()
        self._audiences: dict[str, list[Source]] = {}
        self._number = 0
        self._load()

    # ------------------------------------------------------------------ from the journal and the configuration

    def _load(self) -> None:
        names = {name for s in self.journal.streams.values() for name, c in s.cursors.items() if c.kind == "amqp"}
        for key, value in self.journal.query("SELECT key, value FROM meta WHERE key LIKE ?", (_META + "%",)):
            name = key[len(_META) :]
            told = json.loads(value)
            source = Source(told["filter"], name, Kind.TOPIC, True, True)
            self.subscriptions[name] = Subscription(told["container"], told["link"], told["owner"], source)
        for name in names:
            if name.startswith("queue:"):
                filter_ = name.removeprefix("queue:")
                self._queues[filter_] = _Queue(Source(filter_, name, Kind.QUEUE, True, False), False)
        self._feed_all()

    def configure(self, rules: tuple[Rule, ...]) -> None:
        """Take over the configuration's addresses, and whatever streams there are now."""
        self.rules = rules
        for queue in self._queues.values():
            queue.configured = False
        for rule in rules:
            # A single address can hold messages before anybody ever receives from it.
            if rule.kind is Kind.QUEUE and "+" not in rule.filter and "#" not in rule.filter:
                self.queue(rule.filter)
                self._queues[rule.filter].configured = True
        self._feed_all()

    def _sources(self) -> Iterator[Source]:
        yield from (subscription.source for subscription in self.subscriptions.values())
        yield from (queue.source for queue in self._queues.values())
        yield from self._volatile

    def _feed_all(self) -> None:
        for source in self._sources():
            self._feed(source)
        self._changed()

    def _feed(self, source: Source) -> None:
        """A group on every stream that can hold what the filter takes, and none on others."""
        self._tree.add(source.filter, source)
        self._audiences.clear()
        streams = self._streams_for(source.filter)
        for stream in streams:
            if stream not in source.groups:
                fresh = source.cursor_name not in stream.cursors
                cursor = self.journal.cursor(stream, source.cursor_name, "amqp", volatile=not source.durable)
                if fresh and stream.direction == "local":
                    # What local apps said before nobody has promised to keep (see Stream.low).
                    self.journal.advance(stream, cursor, stream.next_seq)
                source.groups[stream] = Group(self.journal, stream, cursor, _wants(source.filter), announced=True)
        for stream in [s for s in source.groups if s not in streams]:
            if not source.groups[stream].members:
                del source.groups[stream]
                self.journal.drop_cursor(stream, source.cursor_name)

    def _drop(self, source: Source) -> None:
        self._tree.remove(source.filter, source)
        self._audiences.clear()
        for stream in source.groups:
            self.journal.drop_cursor(stream, source.cursor_name)
        self._changed()

    def committed(self, stream: Stream, topics: Iterable[str]) -> dict[Group, None]:
        """A commit added rows of these topics to a stream: the groups that want some of them."""
        woken: dict[Group, None] = {}
        for topic in topics:
            audience = self._audiences.get(topic)
            if audience is None:
                if len(self._audiences) >= AUDIENCES_MAX:
                    self._audiences.clear()
                audience = self._audiences[topic] = list(self._tree.matches(topic))
            for source in audience:
                group = source.groups.get(stream)
                if group is not None:
                    group.woken()
                    woken[group] = None
        return woken

    def caught_up(self) -> None:
        """Move those on who want nothing of what there is."""
        for source in self._sources():
            for group in source.groups.values():
                group.caught_up()

    # ------------------------------------------------------------------ subscriptions

    @staticmethod
    def subscription_name(container: str, link: str) -> str:
        """The cursor's name: the two parts cannot run into one another."""
        return "amqp:" + ":".join(part.replace("%", "%25").replace(":", "%3A") for part in (container, link))

    def subscription(self, container: str, link: str) -> Subscription | None:
        return self.subscriptions.get(self.subscription_name(container, link))

    def subscribe(self, container: str, link: str, owner: str | None, filter_: str) -> Subscription:
        """The durable subscription of that name, made if there is none, or if it was about another address.

        Raises TooMany.
        """
        name = self.subscription_name(container, link)
        found = self.subscriptions.get(name)
        if found is not None and found.source.filter == filter_:
            return found
        if found is not None:
            self.unsubscribe(found)
        if len(self.subscriptions) >= SUBSCRIPTIONS_MAX:
            raise TooMany(f"there are {SUBSCRIPTIONS_MAX} durable subscriptions already")
        source = Source(filter_, name, Kind.TOPIC, True, True)
        made = self.subscriptions[name] = Subscription(container, link, owner, source)
        told = {"filter": filter_, "container": container, "link": link, "owner": owner}
        self.journal.execute(
            "INSERT OR REPLACE INTO meta VALUES (?, ?)", (_META + name, json.dumps(told, ensure_ascii=False))
        )
        self._feed(source)
        self._changed()
        return made

    def unsubscribe(self, subscription: Subscription) -> None:
        name = subscription.source.cursor_name
        if self.subscriptions.get(name) is subscription:
            del self.subscriptions[name]
            self.journal.execute("DELETE FROM meta WHERE key = ?", (_META + name,))
            self._drop(subscription.source)

    # ------------------------------------------------------------------ volatile receivers

    def volatile(self, filter_: str, container: str, link: str, *, browse: Source | None = None) -> Source:
        """A place of one's own for as long as a link lives; `browse`: beginning where that one stands."""
        self._number += 1
        name = f"{self.subscription_name(container, link)}:{self._number}"
        source = Source(filter_, name, Kind.TOPIC, False, True)
        self._feed(source)
        if browse is not None:
            for stream, group in browse.groups.items():
                mine = source.groups[stream]
                mine.cursor.position = mine.cursor.durable = group.cursor.position
                source.groups[stream] = Group(self.journal, stream, mine.cursor, _wants(filter_), announced=True)
        self._volatile[source] = None
        self._changed()
        return source

    def forget(self, source: Source) -> None:
        """A volatile receiver is gone."""
        self._volatile.pop(source, None)
        self._drop(source)

    # ------------------------------------------------------------------ queues

    def queue(self, filter_: str) -> Source:
        """The queue of that name, made if it is new. Raises TooMany."""
        queue = self._queues.get(filter_)
        if queue is None:
            if len(self._queues) >= QUEUES_MAX:
                raise TooMany(f"there are {QUEUES_MAX} queues already")
            source = Source(filter_, f"queue:{filter_}", Kind.QUEUE, True, False)
            queue = self._queues[filter_] = _Queue(source, False)
            self._feed(source)
            self._changed()
        queue.idle_since = None
        return queue.source

    def expects(self, topic: str) -> bool:
        """Whether the configuration makes a queue of this topic; it begins to hold messages with this call."""
        rule = next((rule for rule in self.rules if covers(rule.filter, topic)), None)
        if rule is None or rule.kind is not Kind.QUEUE:
            return False
        try:
            self.queue(topic)
        except TooMany as error:
            log.error("no queue for this address", extra={"address": topic, "error": str(error)})
            return False
        return True

    def housekeeping(self, now: float) -> None:
        """Move on who wants nothing of what there is; let go of queues long unused (QUEUE_IDLE_S) that hold nothing."""
        self.caught_up()
        for filter_, queue in list(self._queues.items()):
            if queue.configured or queue.source.members or not queue.source.empty:
                queue.idle_since = None
            elif queue.idle_since is None:
                queue.idle_since = now
            elif now - queue.idle_since >= QUEUE_IDLE_S:
                del self._queues[filter_]
                self._drop(queue.source)

    @property
    def queues(self) -> dict[str, Source]:
        return {name: queue.source for name, queue in self._queues.items()}

    # ------------------------------------------------------------------ replies

    def open_reply(self, owner: Hashable, token: str, kind: Kind = Kind.QUEUE) -> Reply:
        """A fresh address: a volatile queue, or a topic, whose receivers get a `volatile` each. Raises TooMany."""
        if sum(1 for each in self._replies.values() if each.owner is owner) >= REPLIES_A_CONNECTION_MAX:
            raise TooMany(f"{REPLIES_A_CONNECTION_MAX} dynamic addresses on one connection")
        topic = REPLY_PREFIX + token
        source = None
        if kind is Kind.QUEUE:
            source = Source(topic, f"reply:{token}", Kind.QUEUE, False, False)
            self._feed(source)
            self._volatile[source] = None
            self._changed()
        reply = self._replies[topic] = Reply(topic, owner, source)
        return reply

    def close_reply(self, topic: str) -> None:
        reply = self._replies.pop(topic, None)
        if reply is not None and reply.source is not None:
            self.forget(reply.source)

    def reply(self, topic: str) -> Reply | None:
        """A reply address that is alive."""
        return self._replies.get(topic)


def _wants(filter_: str) -> Callable[[Row], bool]:
    return lambda row: filter_matches(filter_, row.topic)
