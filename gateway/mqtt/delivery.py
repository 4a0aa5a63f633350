"""A journaled message as MQTT clients are given it: decoded once, encoded once for all who get the same bytes.

Knows no connection and no session.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from gateway.amqp.message import ANNOTATION_QOS, ANNOTATION_RETAIN, decode
from gateway.mqtt.codec import encode_properties, encode_text, encode_varint
from gateway.mqtt.mapping import ANNOTATION_SOURCE, to_mqtt
from gateway.mqtt.packets import V5, PublishProperties

QOS_DEFAULT = 1
EXPIRY_S_MAX = 0xFFFFFFFF


@dataclass(slots=True)
class Delivery:
    """`source`: client id of the publisher, known only where somebody asked not to get its own messages back.

    `properties` are without expiry, identifiers and alias: those belong to one delivery.
    """

    topic: str
    payload: bytes
    qos: int
    retain: bool
    source: str | None
    properties: PublishProperties | None
    expires_age_us: int | None
    _packets: dict[tuple[int, int, bool, tuple[int, ...]], tuple[bytes, bytes]] = field(default_factory=dict)

    @classmethod
    def of(cls, topic: str, body: bytes, expires_age_us: int | None, gateway: str | None = None) -> Delivery:
        """From a row's AMQP bytes, for the MQTT apps of `gateway`. Raises MessageError."""
        message = decode(body)
        notes = message.annotations
        qos = notes.get(ANNOTATION_QOS, QOS_DEFAULT)
        source = notes.get(ANNOTATION_SOURCE)
        return cls(
            topic,
            message.body,
            qos if qos in (0, 1, 2) else QOS_DEFAULT,
            notes.get(ANNOTATION_RETAIN) is True,
            source if isinstance(source, str) else None,
            to_mqtt(message, gateway),
            expires_age_us,
        )

    def section(self, identifiers: tuple[int, ...], age_us: int) -> bytes:
        """The property section of a 5.0 PUBLISH; what is left of the expiry counts down (MQTT-3.3.2-6)."""
        properties = self.properties
        if identifiers or self.expires_age_us is not None:
            expiry_s = None
            if self.expires_age_us is not None:
                expiry_s = min(EXPIRY_S_MAX, max(0, -(-(self.expires_age_us - age_us) // 1_000_000)))
            properties = replace(
                properties or PublishProperties(),
                message_expiry_interval=expiry_s,
                subscription_identifier=identifiers,
            )
        return b"\0" if properties is None else encode_properties(properties)

    def packet(self, version: int, qos: int, retain: bool, identifiers: tuple[int, ...]) -> tuple[bytes, bytes]:
        """A first delivery's PUBLISH without its packet id: what stands before and behind that. Not if it expires."""
        key = version, qos, retain, identifiers
        packet = self._packets.get(key)
        if packet is None:
            name = encode_text(self.topic)
            tail = (self.section(identifiers, 0) if version == V5 else b"") + self.payload
            size = len(name) + (2 if qos else 0) + len(tail)
            head = bytes((0x30 | qos << 1 | retain,)) + encode_varint(size) + name
            packet = self._packets[key] = head, tail
        return packet
