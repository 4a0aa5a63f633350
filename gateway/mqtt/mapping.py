"""MQTT properties and AMQP messages: what the one becomes in the other, for the listener and the bridge alike.

Content type, correlation data, response topic ↔ reply-to, message expiry → ttl, user properties ↔ application
properties; RETAIN, payload format and what AMQP's fields can't hold ↔ message annotations. Knows no socket, no session
and no packet.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gateway.amqp.addresses import reply_topic
from gateway.amqp.message import Message, Template, answer_to, correlation_id, user_properties
from gateway.mqtt.codec import PublishProperties
from gateway.routing import DUPLICATE_PROPERTY, Route
from storeforward.journal import Journal

ANNOTATION_SOURCE = "x-opt-lineside-client"
ANNOTATION_PAYLOAD_FORMAT = "x-opt-lineside-payload-format"
# Content types are symbols in AMQP, thus ASCII; in MQTT they are any text.
ANNOTATION_CONTENT_TYPE = "x-opt-lineside-content-type"
TTL_MS_MAX = 0xFFFFFFFF
_OURS = frozenset(DUPLICATE_PROPERTY.values())


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
    template, expires = template_with(identity, route, qos, properties, age_us, annotations)
    bodies: list[bytes] = []

    def encode(seq: int, payload: bytes) -> bytes:
        bodies.append(template.encode(seq, payload))
        return bodies[0]

    seq = journal.append(route.stream, route.topic, encode, payload, expires)
    return seq, bodies[0], expires


def template_with(
    identity: tuple[str, str],
    route: Route,
    qos: int,
    properties: PublishProperties | None,
    age_us: int,
    annotations: Mapping[str, Any] | None = None,
) -> tuple[Template, int | None]:
    """How such a message is encoded, and when it expires on the age clock."""
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
        reply_to=p.response_topic,
        correlation_id=correlation_id(p.correlation_data),
        user_properties=p.user_property,
        annotations=notes,
        duplicate_property=route.duplicate_property,
        qos=qos,
    )
    return template, None if ttl_us is None else age_us + ttl_us


def to_mqtt(message: Message) -> PublishProperties | None:
    """The properties to publish a message with; None where it has none of those that MQTT knows."""
    pairs = tuple(pair for pair in user_properties(message) if pair[0] not in _OURS)
    correlation = answer_to(message)
    response_topic = reply_topic(message.reply_to)
    notes = message.annotations
    content_type = notes.get(ANNOTATION_CONTENT_TYPE, message.content_type)
    payload_format = 1 if notes.get(ANNOTATION_PAYLOAD_FORMAT) == 1 else None
    if not (pairs or correlation is not None or response_topic or content_type is not None or payload_format):
        return None
    return PublishProperties(
        payload_format_indicator=payload_format,
        response_topic=response_topic,
        correlation_data=correlation,
        content_type=content_type if isinstance(content_type, str) else None,
        user_property=pairs,
    )
