"""What the server's end of an MQTT connection tells its owner, as frozen values. Each says what answer it wants.

Knows nothing of bytes, nor of the states of a connection.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from gateway.mqtt.packets import Connect, Disconnect, MqttError, PublishProperties, Subscribe, Unsubscribe

# topic, QoS, retain, dup, packet id (2 bytes; b"" at QoS 0), payload, properties (None: none, or 3.1.1).
# A plain tuple and the id as bytes: made once per message, and the id goes back out as it came.
Message: TypeAlias = tuple[str, int, bool, bool, bytes, bytes, PublishProperties | None]


@dataclass(frozen=True, slots=True)
class Connected:
    """The client asks to connect: answer with `accept` or `refuse`."""

    connect: Connect


@dataclass(frozen=True, slots=True)
class Publishes:
    """Messages in the order they came. Those of QoS 1 want `puback`, those of QoS 2 `pubrec`.

    One of QoS 2 may be a repeat of one that was never released: only the owner's memory can tell (§4.3.3).
    """

    messages: list[Message]


@dataclass(frozen=True, slots=True)
class Released:
    """PUBRELs: the client will not send these messages of QoS 2 again. They want `pubcomp`."""

    packet_ids: list[int]


@dataclass(frozen=True, slots=True)
class Acked:
    """PUBACKs for messages we sent, in the order they came. `refused`: those with a reason of failure, and it.

    A refused message is finished, too (MQTT 5.0 §4.3.2), but it was lost and belongs in the ledger.
    """

    packet_ids: list[int]
    refused: list[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Received:
    """PUBRECs for messages of QoS 2 that we sent: the client has them. They want `pubrel`.

    `refused`: those with a reason of failure, and it. They are finished, and were lost.
    """

    packet_ids: list[int]
    refused: list[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Completed:
    """PUBCOMPs: these messages of QoS 2 are finished."""

    packet_ids: list[int]


@dataclass(frozen=True, slots=True)
class Subscribed:
    """Answer with `suback`, one reason a subscription."""

    packet: Subscribe


@dataclass(frozen=True, slots=True)
class Unsubscribed:
    """Answer with `unsuback`, one reason a filter."""

    packet: Unsubscribe


@dataclass(frozen=True, slots=True)
class Disconnected:
    """The client is gone. `clean`: it said so, and the will must not be published. No packet: TCP just ended."""

    packet: Disconnect | None
    clean: bool
    reason: str


@dataclass(frozen=True, slots=True)
class Failed:
    """The client broke the protocol or kept silent. The will must be published; nothing more is read."""

    error: MqttError


Event: TypeAlias = (
    Connected | Publishes | Released | Acked | Received | Completed | Subscribed | Unsubscribed | Disconnected | Failed
)
