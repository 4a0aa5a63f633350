"""MQTT properties and AMQP messages: what the one becomes in the other, for the listener and the bridge alike.

Content type, correlation data, response topic ↔ reply-to, message expiry → ttl, user properties ↔ application
properties. Knows no socket, no session and no packet.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gateway.amqp.message import Message, Template, user_properties
from gateway.mqtt.codec import PublishProperties
from gateway.routing import Route
from storeforward.journal import Journal


def append_with(
    journal: Journal,
    identity: tuple[str, str],
    route: Route,
    qos: int,
    payload: bytes,
    properties: PublishProperties | None,
    age_us: int,
    annotations: Mapping[str, Any] | None = None,
) -> None:
    """Stage a message that has properties or expires; `identity` is the router's. Raises JournalFull.

    `annotations`: message annotations to give it.
    """
    ttl_us = route.ttl_us
    encode = route.encode
    if properties is None and annotations:
        properties = PublishProperties()
    if properties is not None:
        if properties.message_expiry_interval is not None:
            asked_us = properties.message_expiry_interval * 1_000_000
            ttl_us = asked_us if ttl_us is None else min(ttl_us, asked_us)
        gateway, epoch = identity
        encode = Template(
            gateway,
            epoch,
            route.stream.name,
            route.address,
            route.topic,
            None if ttl_us is None else min(ttl_us // 1000, 0xFFFFFFFF),
            content_type=properties.content_type,
            reply_to=properties.response_topic,
            correlation_id=properties.correlation_data,
            user_properties=properties.user_property,
            annotations=annotations,
            duplicate_property=route.duplicate_property,
            qos=qos,
        ).encode
    expires = None if ttl_us is None else age_us + ttl_us
    journal.append(route.stream, route.topic, encode, payload, expires)


def to_mqtt(message: Message) -> PublishProperties | None:
    """The properties to publish a message with; None where it has none of those that MQTT knows."""
    pairs = tuple(user_properties(message))
    correlation = message.correlation_id
    if isinstance(correlation, str):
        correlation = correlation.encode()
    if not isinstance(correlation, bytes):
        correlation = None if correlation is None else str(correlation).encode()
    if not (pairs or correlation or message.reply_to or message.content_type):
        return None
    return PublishProperties(
        response_topic=message.reply_to,
        correlation_data=correlation,
        content_type=message.content_type,
        user_property=pairs,
    )
