"""Which stream a topic belongs to, and how its messages are encoded for it. Pure, but for the cache it keeps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gateway.amqp.message import Template
from gateway.config import Config, Inbound, Outbound
from gateway.mqtt.topics import filter_matches
from gateway.replies import ReplyTo, Requests, answer_address
from storeforward.streams import Stream

CACHE_TOPICS_MAX = 10_000
DUPLICATE_PROPERTY = {"artemis": "_AMQ_DUPL_ID"}


@dataclass(slots=True)
class Route:
    """One topic's way: `wanted` is false where nobody would ever read the message.

    `reply_to`: where replies to what is asked on it come in; None where response topics travel as they are.
    """

    stream: Stream
    topic: str
    encode: Callable[[int, bytes], bytes]
    ttl_us: int | None
    address: str
    duplicate_property: str | None
    wanted: bool
    reply_to: ReplyTo | None = None


class Router:
    """First outbound stream whose filter takes the topic; else the local stream."""

    def __init__(
        self,
        config: Config,
        streams: dict[str, Stream],
        local: Stream,
        epoch: str,
        read_locally: Callable[[str], bool],
        requests: Requests,
    ) -> None:
        self._gateway = config.gateway.id
        self._epoch = epoch
        self._streams = streams
        self._local = local
        self._read_locally = read_locally
        self._outbound: Sequence[Outbound] = config.outbound
        self._reply_to = {out.stream: reply_to_of(out, config, requests) for out in config.outbound}
        self._kinds = {hub.name: hub.kind for hub in config.hubs}
        self._cache: dict[tuple[str, int], Route] = {}
        self._local_topics: set[tuple[str, int]] = set()

    def forget(self) -> None:
        """Subscriptions changed: what nobody read before may be wanted now."""
        for key in self._local_topics:
            self._cache.pop(key, None)
        self._local_topics.clear()

    def route(self, topic: str, qos: int) -> Route:
        route = self._cache.get((topic, qos))
        if route is None:
            if len(self._cache) >= CACHE_TOPICS_MAX:
                self._cache.clear()
                self._local_topics.clear()
            route = self._cache[topic, qos] = self._make(topic, qos)
            if route.stream is self._local:
                self._local_topics.add((topic, qos))
        return route

    def _make(self, topic: str, qos: int) -> Route:
        for out in self._outbound:
            if any(filter_matches(each, topic) for each in out.topics):
                address: str | None = out.address_for(self._gateway)
                if out.answers is not None:
                    address = answer_address(out.answers, topic)
                if address is None:
                    continue
                duplicate = DUPLICATE_PROPERTY.get(self._kinds.get(out.hub, ""))
                ttl_ms = None if out.ttl_s is None else int(out.ttl_s * 1000)
                stream = self._streams[out.stream]
                route = self._built(stream, topic, qos, address, ttl_ms, duplicate, True)
                route.reply_to = self._reply_to[out.stream]
                return route
        return self._built(self._local, topic, qos, topic, None, None, self._read_locally(topic))

    def _built(
        self,
        stream: Stream,
        topic: str,
        qos: int,
        address: str,
        ttl_ms: int | None,
        duplicate: str | None,
        wanted: bool,
    ) -> Route:
        template = self.template(stream, topic, address, ttl_ms, duplicate, qos)
        ttl_us = None if ttl_ms is None else ttl_ms * 1000
        return Route(stream, topic, template.encode, ttl_us, address, duplicate, wanted)

    def template(
        self, stream: Stream, topic: str, address: str, ttl_ms: int | None, duplicate: str | None, qos: int
    ) -> Template:
        return Template(
            self._gateway, self._epoch, stream.name, address, topic, ttl_ms, duplicate_property=duplicate, qos=qos
        )

    @property
    def identity(self) -> tuple[str, str]:
        """Gateway and epoch, as they stand in message ids."""
        return self._gateway, self._epoch


def reply_to_of(out: Outbound, config: Config, requests: Requests) -> ReplyTo | None:
    """Where the replies to a stream's requests come in, by configuration."""
    gateway = config.gateway.id
    address = out.reply_to_for(gateway)
    if address is None:
        return None
    inbound = next(i for i in config.inbound if i.hub == out.hub and i.address_for(gateway) == address)
    return ReplyTo(address, inbound.stream, int(out.reply_timeout_s * 1_000_000), requests)


def filters_overlap(one: str, other: str) -> bool:
    """Whether some topic matches both filters."""
    a, b = one.split("/"), other.split("/")
    for i in range(max(len(a), len(b)) + 1):
        x = a[i] if i < len(a) else None
        y = b[i] if i < len(b) else None
        if x == "#" or y == "#":
            return True
        if x is None or y is None:
            return x is y
        if "+" not in (x, y) and x != y:
            return False
    return True


def inbound_filter(inbound: Inbound, config: Config) -> str:
    """A filter that takes every topic an inbound stream can produce: a subject may hold any number of levels.

    Where replies come in, that is any topic: the requesters choose it.
    """
    gateway = config.gateway.id
    for out in config.outbound:
        if out.hub == inbound.hub and out.reply_to_for(gateway) == inbound.address_for(gateway):
            return "#"
    levels: list[str] = []
    for level in inbound.topic.replace("{gateway}", gateway).split("/"):
        if "{" in level:
            return "/".join([*levels, "#"])
        levels.append(level)
    return "/".join(levels)
