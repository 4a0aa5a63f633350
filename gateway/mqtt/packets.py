"""What MQTT 3.1.1 and 5.0 say to one another: control packets, their properties and reason codes, as frozen values.

Knows nothing of bytes (`codec`) nor of what may be said when (`connection`). Times are seconds, as on the wire.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import TypeAlias

from gateway.errors import PeerError

V3 = 4  # the protocol level of MQTT 3.1.1
V5 = 5


class PacketType(IntEnum):
    CONNECT = 1
    CONNACK = 2
    PUBLISH = 3
    PUBACK = 4
    PUBREC = 5
    PUBREL = 6
    PUBCOMP = 7
    SUBSCRIBE = 8
    SUBACK = 9
    UNSUBSCRIBE = 10
    UNSUBACK = 11
    PINGREQ = 12
    PINGRESP = 13
    DISCONNECT = 14
    AUTH = 15


class Reason(IntEnum):
    """Reason codes of MQTT 5.0 §2.4. 0x00 is also "normal disconnection" and "granted QoS 0"."""

    SUCCESS = 0x00
    GRANTED_QOS_1 = 0x01
    GRANTED_QOS_2 = 0x02
    DISCONNECT_WITH_WILL = 0x04
    NO_MATCHING_SUBSCRIBERS = 0x10
    NO_SUBSCRIPTION_EXISTED = 0x11
    CONTINUE_AUTHENTICATION = 0x18
    REAUTHENTICATE = 0x19
    UNSPECIFIED_ERROR = 0x80
    MALFORMED_PACKET = 0x81
    PROTOCOL_ERROR = 0x82
    IMPLEMENTATION_SPECIFIC_ERROR = 0x83
    UNSUPPORTED_PROTOCOL_VERSION = 0x84
    CLIENT_IDENTIFIER_NOT_VALID = 0x85
    BAD_USER_NAME_OR_PASSWORD = 0x86
    NOT_AUTHORIZED = 0x87
    SERVER_UNAVAILABLE = 0x88
    SERVER_BUSY = 0x89
    BANNED = 0x8A
    SERVER_SHUTTING_DOWN = 0x8B
    BAD_AUTHENTICATION_METHOD = 0x8C
    KEEP_ALIVE_TIMEOUT = 0x8D
    SESSION_TAKEN_OVER = 0x8E
    TOPIC_FILTER_INVALID = 0x8F
    TOPIC_NAME_INVALID = 0x90
    PACKET_IDENTIFIER_IN_USE = 0x91
    PACKET_IDENTIFIER_NOT_FOUND = 0x92
    RECEIVE_MAXIMUM_EXCEEDED = 0x93
    TOPIC_ALIAS_INVALID = 0x94
    PACKET_TOO_LARGE = 0x95
    MESSAGE_RATE_TOO_HIGH = 0x96
    QUOTA_EXCEEDED = 0x97
    ADMINISTRATIVE_ACTION = 0x98
    PAYLOAD_FORMAT_INVALID = 0x99
    RETAIN_NOT_SUPPORTED = 0x9A
    QOS_NOT_SUPPORTED = 0x9B
    USE_ANOTHER_SERVER = 0x9C
    SERVER_MOVED = 0x9D
    SHARED_SUBSCRIPTIONS_NOT_SUPPORTED = 0x9E
    CONNECTION_RATE_EXCEEDED = 0x9F
    MAXIMUM_CONNECT_TIME = 0xA0
    SUBSCRIPTION_IDENTIFIERS_NOT_SUPPORTED = 0xA1
    WILDCARD_SUBSCRIPTIONS_NOT_SUPPORTED = 0xA2


class MqttError(PeerError):
    """The peer broke MQTT. `reason` is the 5.0 reason code; the text never quotes what the peer sent."""

    def __init__(self, reason: int, text: str) -> None:
        super().__init__(text)
        self.reason = Reason(reason)
        self.text = text


# ---------------------------------------------------------------------------------------------- properties
UserProperty: TypeAlias = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class ConnectProperties:
    session_expiry_interval: int | None = None
    receive_maximum: int | None = None
    maximum_packet_size: int | None = None
    topic_alias_maximum: int | None = None
    request_response_information: int | None = None
    request_problem_information: int | None = None
    user_property: UserProperty = ()
    authentication_method: str | None = None
    authentication_data: bytes | None = None


@dataclass(frozen=True, slots=True)
class WillProperties:
    will_delay_interval: int | None = None
    payload_format_indicator: int | None = None
    message_expiry_interval: int | None = None
    content_type: str | None = None
    response_topic: str | None = None
    correlation_data: bytes | None = None
    user_property: UserProperty = ()


@dataclass(frozen=True, slots=True)
class ConnackProperties:
    session_expiry_interval: int | None = None
    receive_maximum: int | None = None
    maximum_qos: int | None = None
    retain_available: int | None = None
    maximum_packet_size: int | None = None
    assigned_client_identifier: str | None = None
    topic_alias_maximum: int | None = None
    reason_string: str | None = None
    user_property: UserProperty = ()
    wildcard_subscription_available: int | None = None
    subscription_identifier_available: int | None = None
    shared_subscription_available: int | None = None
    server_keep_alive: int | None = None
    response_information: str | None = None
    server_reference: str | None = None
    authentication_method: str | None = None
    authentication_data: bytes | None = None


@dataclass(frozen=True, slots=True)
class PublishProperties:
    """`subscription_identifier` may repeat: one for each subscription a message answers (§3.3.2.3.8)."""

    payload_format_indicator: int | None = None
    message_expiry_interval: int | None = None
    topic_alias: int | None = None
    response_topic: str | None = None
    correlation_data: bytes | None = None
    user_property: UserProperty = ()
    subscription_identifier: tuple[int, ...] = ()
    content_type: str | None = None


@dataclass(frozen=True, slots=True)
class SubscribeProperties:
    subscription_identifier: int | None = None
    user_property: UserProperty = ()


@dataclass(frozen=True, slots=True)
class UnsubscribeProperties:
    user_property: UserProperty = ()


@dataclass(frozen=True, slots=True)
class AckProperties:
    """Of PUBACK, PUBREC, PUBREL, PUBCOMP, SUBACK and UNSUBACK."""

    reason_string: str | None = None
    user_property: UserProperty = ()


@dataclass(frozen=True, slots=True)
class DisconnectProperties:
    session_expiry_interval: int | None = None
    reason_string: str | None = None
    user_property: UserProperty = ()
    server_reference: str | None = None


@dataclass(frozen=True, slots=True)
class AuthProperties:
    authentication_method: str | None = None
    authentication_data: bytes | None = None
    reason_string: str | None = None
    user_property: UserProperty = ()


AnyProperties: TypeAlias = (
    ConnectProperties
    | WillProperties
    | ConnackProperties
    | PublishProperties
    | SubscribeProperties
    | UnsubscribeProperties
    | AckProperties
    | DisconnectProperties
    | AuthProperties
)


# ------------------------------------------------------------------------------------------------- packets
@dataclass(frozen=True, slots=True)
class Will:
    topic: str
    payload: bytes
    qos: int = 0
    retain: bool = False
    properties: WillProperties = WillProperties()


@dataclass(frozen=True, slots=True)
class Connect:
    """`version` is 4 (3.1.1) or 5; `clean_start` is 3.1.1's Clean Session; `keep_alive` is seconds, 0 for none.

    `spoken` is False of MQTT 3.1, whose CONNECT reads as 3.1.1's. It is refused, but for its version last: paho for Go
    falls back to 3.1 whatever it was refused for, and tells its user the reason that it hears then.
    """

    version: int
    client_id: str
    clean_start: bool = True
    keep_alive: int = 0
    username: str | None = None
    password: bytes | None = None
    will: Will | None = None
    properties: ConnectProperties = ConnectProperties()
    spoken: bool = True

    def __repr__(self) -> str:  # a password has no place in a log
        return f"Connect(version={self.version}, client_id={self.client_id!r}, clean_start={self.clean_start})"


@dataclass(frozen=True, slots=True)
class Connack:
    """`reason` is the 3.1.1 return code on 3.1.1."""

    session_present: bool
    reason: int = 0
    properties: ConnackProperties = ConnackProperties()


@dataclass(frozen=True, slots=True)
class Publish:
    """`packet_id` is 0 at QoS 0. `topic` is empty only beside a topic alias (5.0)."""

    topic: str
    payload: bytes
    qos: int = 0
    retain: bool = False
    dup: bool = False
    packet_id: int = 0
    properties: PublishProperties = PublishProperties()


@dataclass(frozen=True, slots=True)
class Ack:
    packet_id: int
    reason: int = 0
    properties: AckProperties = AckProperties()


@dataclass(frozen=True, slots=True)
class Puback(Ack):
    pass


@dataclass(frozen=True, slots=True)
class Pubrec(Ack):
    pass


@dataclass(frozen=True, slots=True)
class Pubrel(Ack):
    pass


@dataclass(frozen=True, slots=True)
class Pubcomp(Ack):
    pass


@dataclass(frozen=True, slots=True)
class Subscription:
    filter: str
    qos: int = 0
    no_local: bool = False
    retain_as_published: bool = False
    retain_handling: int = 0


@dataclass(frozen=True, slots=True)
class Subscribe:
    """`surplus`: how many more a peer asked for that nobody will be given; they are the last ones."""

    packet_id: int
    subscriptions: tuple[Subscription, ...]
    properties: SubscribeProperties = SubscribeProperties()
    surplus: int = 0


@dataclass(frozen=True, slots=True)
class Suback:
    packet_id: int
    reasons: tuple[int, ...]
    properties: AckProperties = AckProperties()


@dataclass(frozen=True, slots=True)
class Unsubscribe:
    packet_id: int
    filters: tuple[str, ...]
    properties: UnsubscribeProperties = UnsubscribeProperties()


@dataclass(frozen=True, slots=True)
class Unsuback:
    """`reasons` is empty on 3.1.1."""

    packet_id: int
    reasons: tuple[int, ...] = ()
    properties: AckProperties = AckProperties()


@dataclass(frozen=True, slots=True)
class Pingreq:
    pass


@dataclass(frozen=True, slots=True)
class Pingresp:
    pass


@dataclass(frozen=True, slots=True)
class Disconnect:
    reason: int = 0
    properties: DisconnectProperties = DisconnectProperties()


@dataclass(frozen=True, slots=True)
class Auth:
    reason: int = 0
    properties: AuthProperties = AuthProperties()


Packet: TypeAlias = (
    Connect
    | Connack
    | Publish
    | Puback
    | Pubrec
    | Pubrel
    | Pubcomp
    | Subscribe
    | Suback
    | Unsubscribe
    | Unsuback
    | Pingreq
    | Pingresp
    | Disconnect
    | Auth
)
