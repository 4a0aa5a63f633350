"""What an AMQP app's address means here: the one table. Pure; knows no link, no stream and no configuration file.

| the app writes                          | topic or filter       | asks for |
|-----------------------------------------|-----------------------|----------|
| `alarm/door`                            | `alarm/door`          | nothing: the configuration decides, else a topic |
| `queue://jobs/print`                    | `jobs/print`          | a queue  |
| `topic://news`                          | `news`                | a topic  |
| `amqp://any.host:5672/alarm/door`       | `alarm/door`          | nothing; the host is passed over, `%20` is a space |
| `amqps://any.host/queue://jobs`         | `jobs`                | a queue  |
| `alarm/+`, `queue://jobs/#` (receivers) | MQTT's wildcards      | as above |
| `alarm/*`, `alarm.>`, `/queues/jobs`    | themselves: `*`, `>` and a leading `/` mean nothing | nothing |
| no address (a sender)                   | each message's `to` says, written in the same ways | |

A terminus' capability `queue` or `topic` (also `temporary-queue`, `temporary-topic`) asks as the prefix does; two that
contradict one another are a mistake. In the other direction nothing is changed: a topic is its own address.

A **topic** is multicast: every receiver has its own place and gets every message. A **queue** is anycast: its receivers
share one durable place, and every message goes to one of them. Addresses below REPLY_PREFIX are made by us for
those that ask for a dynamic one: a queue, unless they ask for a topic.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from urllib.parse import unquote, urlsplit

from gateway.errors import PeerError
from gateway.mqtt.topics import check_filter, check_topic, filter_matches

# MQTT's `#` and `+` take no topic that begins with `$`: nobody reads replies by accident.
REPLY_PREFIX = "$lineside/reply/"
SHARE_PREFIX = "$share/"


class Kind(Enum):
    QUEUE = "queue"
    TOPIC = "topic"


class AddressError(PeerError):
    """The address means nothing here."""


@dataclass(frozen=True, slots=True)
class Address:
    """kind: what the address itself asks for, None if nothing."""

    topic: str
    kind: Kind | None = None

    @property
    def is_reply(self) -> bool:
        return self.topic.startswith(REPLY_PREFIX)


@dataclass(frozen=True, slots=True)
class Rule:
    """What the configuration says about the addresses that a filter takes."""

    filter: str
    kind: Kind


_PREFIXES = {"queue://": Kind.QUEUE, "topic://": Kind.TOPIC}
_SCHEMES = ("amqp://", "amqps://")
_CAPABILITIES = {
    "queue": Kind.QUEUE,
    "topic": Kind.TOPIC,
    "temporary-queue": Kind.QUEUE,
    "temporary-topic": Kind.TOPIC,
}


def parse(text: str | None, *, receiver: bool = False) -> Address:
    """Read one address; a receiver's may hold wildcards. Raises AddressError."""
    rest, kind = text or "", None
    if rest.startswith(_SCHEMES):
        rest = _path(rest)
    for prefix, each in _PREFIXES.items():
        if rest.startswith(prefix):
            rest, kind = rest[len(prefix) :], each
            break
    try:
        if receiver:
            check_filter(rest, shared=False)
        else:
            check_topic(rest)
    except ValueError as error:
        raise AddressError(f"address {_short(text)}: {error}") from None
    if rest.startswith(SHARE_PREFIX):
        raise AddressError(f"address {_short(text)}: shared subscriptions are MQTT's; ask for a queue:// instead")
    return Address(rest, kind)


def _path(url: str) -> str:
    try:
        urlsplit(url)
    except ValueError as error:
        raise AddressError(f"address {_short(url)}: {error}") from None
    # By hand: `#` and `?` are no fragment and no query in an AMQP address.
    _, slash, path = url.partition("://")[2].partition("/")
    if not slash or not path:
        raise AddressError(f"address {_short(url)}: it names a host and nothing on it")
    return unquote(path)


def _short(text: str | None) -> str:
    return repr(text if text is None or len(text) <= 100 else text[:100] + "...")


def kind_of(address: Address, capabilities: Iterable[str], rules: Sequence[Rule]) -> Kind:
    """Queue or topic: what prefix or capability asks for, what the configuration says, else a topic.

    Raises AddressError where two of them contradict one another.
    """
    wanted = asked_for(address, capabilities)
    rule = next((rule for rule in rules if covers(rule.filter, address.topic)), None)
    if rule is None:
        return wanted or Kind.TOPIC
    if wanted not in (None, rule.kind):
        raise AddressError(f"address {_short(address.topic)}: it is a {rule.kind.value} by configuration")
    return rule.kind


def asked_for(address: Address, capabilities: Iterable[str]) -> Kind | None:
    """What prefix or capability ask for, None if nothing. Raises AddressError where they contradict one another."""
    asked = {_CAPABILITIES[name] for name in capabilities if name in _CAPABILITIES}
    if address.kind is not None:
        asked.add(address.kind)
    if len(asked) > 1:
        raise AddressError(f"address {_short(address.topic)}: asked for as a queue and as a topic")
    return asked.pop() if asked else None


def covers(rule: str, topic_or_filter: str) -> bool:
    """Whether everything that the second takes is taken by the first."""
    if topic_or_filter.split("/")[-1] == "#" and rule.split("/")[-1] != "#":
        return False
    return filter_matches(rule, topic_or_filter)


def reply_topic(address: str | None) -> str | None:
    """A reply-to as the topic an MQTT app is to answer to; None where it is none."""
    try:
        return parse(address).topic
    except AddressError:
        return None
