"""MQTT properties and AMQP messages: what the one becomes in the other, for the listener and the bridge alike.

Content type, correlation data, response topic ↔ reply-to, message expiry → ttl, user properties ↔ application
properties; RETAIN, payload format and what AMQP's fields can't hold ↔ message annotations. Knows no socket, no session
and no packet.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gateway.amqp.addresses import reply_topic
from gateway.amqp.message import (
    ANNOTATION_REQUEST,
    Message,
    Template,
    answer_to,
    correlation_id,
    message_id,
    user_properties,
)
from gateway.mqtt.codec import TEXT_MAX_BYTES
from gateway.mqtt.packets import PublishProperties
from gateway.mqtt.topics import check_topic
from gateway.replies import annotation
from gateway.routing import DUPLICATE_PROPERTY, Route
from storeforward.journal import Encode, Journal

ANNOTATION_SOURCE = "x-opt-lineside-client"
ANNOTATION_PAYLOAD_FORMAT = "x-opt-lineside-payload-format"
# Content types are symbols in AMQP, thus ASCII; in MQTT they are any text.
ANNOTATION_CONTENT_TYPE = "x-opt-lineside-content-type"
TTL_MS_MAX = 0xFFFFFFFF
_OURS = frozenset(DUPLICATE_PROPERTY.values())
_NO_NUL = {0: "\ufffd"}


class Encoders(dict[tuple[int, int], tuple[Route, PublishProperties, Encode | None]]):
    """How messages of one topic with the very same properties are encoded, kept for the next ones. Bounded.

    By the identity of both: what decodes PUBLISH gives the same object for the same bytes.
    """

    def __init__(self, identity: tuple[str, str], entries_max: int = 1024) -> None:
        super().__init__()
        self._identity = identity
        self._entries_max = entries_max

    def of(self, route: Route, qos: int, properties: PublishProperties) -> Encode | None:
        """None where each message is its own: it expires, asks for a reply, or its payload has to be looked at."""
        key = id(route), id(properties)
        known = self.get(key)
        if known is not None and known[0] is route and known[1] is properties:
            return known[2]
        encode: Encode | None = None
        p = properties
        own = p.message_expiry_interval, p.response_topic, p.correlation_data, route.ttl_us
        if own == (None, None, None, None) and not p.payload_format_indicator:
            encode = template_with(self._identity, route, qos, properties, 0)[0].encode
        if len(self) >= self._entries_max:
            self.clear()
        self[key] = route, properties, encode
        return encode


def append_with(
    journal: Journal,
    identity: tuple[str, str],
    route: Route,
    qos: int,
    payload: bytes,
    properties: PublishProperties | None,
    age_us: int,
    annotations: Mapping[str, Any] | None = None,
) -> tuple[int, bytes, int | None]:
    """Stage a message that has properties or annotations or expires; `identity` is the router's. Raises JournalFull.

    Returns its seq, the bytes it was encoded as, and when it expires.
    """
    if route.reply_to is not None and properties is not None and properties.response_topic is not None:
        return _append_request(journal, identity, route, qos, payload, properties, age_us, annotations)
    template, expires = template_with(identity, route, qos, properties, age_us, annotations)
    bodies: list[bytes] = []

    def encode(seq: int, payload: bytes) -> bytes:
        bodies.append(template.encode(seq, payload))
        return bodies[0]

    seq = journal.append(route.stream, route.topic, encode, payload, expires)
    return seq, bodies[0], expires


def _append_request(
    journal: Journal,
    identity: tuple[str, str],
    route: Route,
    qos: int,
    payload: bytes,
    properties: PublishProperties,
    age_us: int,
    annotations: Mapping[str, Any] | None,
) -> tuple[int, bytes, int | None]:
    """As `append_with`, for a request whose reply comes back over the hub (gateway.replies).

    For those who read the stream on this side, what the requester wrote stands in an annotation.
    """
    reply_to, response_topic, correlation = route.reply_to, properties.response_topic, properties.correlation_data
    assert reply_to is not None
    assert response_topic is not None
    gateway, epoch = identity
    notes = dict(annotations or {})
    notes[ANNOTATION_REQUEST] = annotation(gateway, response_topic, correlation)
    seq = route.stream.next_seq
    name = message_id(gateway, epoch, route.stream.name, seq)
    template, expires = template_with(identity, route, qos, properties, age_us, notes, (reply_to.address, name))
    body = template.encode(seq, payload)
    staged = journal.append(route.stream, route.topic, lambda seq, payload: body, payload, expires)
    assert staged == seq
    asked = properties.message_expiry_interval is not None
    reply_to.remember(name, response_topic, correlation, age_us, expires if asked else None)
    return seq, body, expires


def template_with(
    identity: tuple[str, str],
    route: Route,
    qos: int,
    properties: PublishProperties | None,
    age_us: int,
    annotations: Mapping[str, Any] | None = None,
    answer: tuple[str, str] | None = None,
) -> tuple[Template, int | None]:
    """How such a message is encoded, and when it expires on the age clock.

    `answer`: reply-to and correlation-id, where they are not what the properties say.
    """
    p = properties or PublishProperties()
    ttl_us = route.ttl_us
    if p.message_expiry_interval is not None:
        asked_us = p.message_expiry_interval * 1_000_000
        ttl_us = asked_us if ttl_us is None else min(ttl_us, asked_us)
    notes = dict(annotations or {})
    if p.payload_format_indicator:
        notes[ANNOTATION_PAYLOAD_FORMAT] = p.payload_format_indicator
    if p.content_type is not None and (not p.content_type or not p.content_type.isascii()):
        notes[ANNOTATION_CONTENT_TYPE] = p.content_type
    gateway, epoch = identity
    template = Template(
        gateway,
        epoch,
        route.stream.name,
        route.address,
        route.topic,
        None if ttl_us is None else min(ttl_us // 1000, TTL_MS_MAX),
        content_type=p.content_type,
        reply_to=p.response_topic if answer is None else answer[0],
        correlation_id=correlation_id(p.correlation_data) if answer is None else answer[1],
        user_properties=p.user_property,
        annotations=notes,
        duplicate_property=route.duplicate_property,
        qos=qos,
    )
    return template, None if ttl_us is None else age_us + ttl_us


def to_mqtt(message: Message, gateway: str | None = None) -> PublishProperties | None:
    """The properties to publish a message with; None where it has none of those that MQTT knows.

    `gateway`: whose apps they are for. What MQTT has no way to say is left out: AMQP has longer texts, texts that hold
    U+0000 (MQTT-1.5.4-2), and addresses that are no topics (MQTT-3.3.2-14).
    """
    pairs = [_pair(*pair) for pair in user_properties(message) if pair[0] not in _OURS]
    response_topic = reply_topic(message.reply_to)
    if response_topic is not None and not _is_topic(response_topic):
        response_topic = None
    correlation = answer_to(message, can_be_answered=response_topic is not None)
    notes = message.annotations
    match notes.get(ANNOTATION_REQUEST):
        case [str(home), str() | None as response_topic_here, bytes() | None as correlation_here] if home == gateway:
            response_topic, correlation = response_topic_here, correlation_here
    if correlation is not None and len(correlation) > TEXT_MAX_BYTES:
        correlation = None
    if response_topic is not None and not _is_topic(response_topic):
        response_topic = None
    content_type = notes.get(ANNOTATION_CONTENT_TYPE, message.content_type)
    if not isinstance(content_type, str) or "\0" in content_type or not _fits(content_type):
        content_type = None
    properties = PublishProperties(
        payload_format_indicator=1 if notes.get(ANNOTATION_PAYLOAD_FORMAT) == 1 else None,
        response_topic=response_topic,
        correlation_data=correlation,
        content_type=content_type,
        user_property=tuple(pair for pair in pairs if pair is not None),
    )
    return None if properties == PublishProperties() else properties


def _pair(name: str, value: str) -> tuple[str, str] | None:
    """A user property as MQTT can say it; None where it can't."""
    if "\0" in name or "\0" in value:
        name, value = name.translate(_NO_NUL), value.translate(_NO_NUL)
    return (name, value) if _fits(name) and _fits(value) else None


def _fits(text: str) -> bool:
    return len(text) <= TEXT_MAX_BYTES // 4 or len(text.encode()) <= TEXT_MAX_BYTES


def _is_topic(text: str) -> bool:
    try:
        check_topic(text)
    except ValueError:
        return False
    return True
