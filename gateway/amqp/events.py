"""What the engine of one AMQP connection tells its owner: events and outcomes, and the standard's names of conditions.

Frozen values. Knows nothing of bytes, nor of how proton says the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, Final

from gateway.amqp.termini import Terminus

if TYPE_CHECKING:
    from gateway.amqp.engine import Receiver, Sender, Session

LINK_STOLEN: Final = "amqp:link:stolen"
MESSAGE_SIZE_EXCEEDED: Final = "amqp:link:message-size-exceeded"
TRANSFER_LIMIT_EXCEEDED: Final = "amqp:link:transfer-limit-exceeded"
RESOURCE_LIMIT_EXCEEDED: Final = "amqp:resource-limit-exceeded"
DECODE_ERROR: Final = "amqp:decode-error"
NOT_ALLOWED: Final = "amqp:not-allowed"
NOT_IMPLEMENTED: Final = "amqp:not-implemented"
UNAUTHORIZED: Final = "amqp:unauthorized-access"
NOT_FOUND: Final = "amqp:not-found"
INVALID_FIELD: Final = "amqp:invalid-field"
CONTAINER_ID: Final = "container-id"  # which field that was, in the condition's info
CONNECTION_REDIRECT: Final = "amqp:connection:redirect"
LINK_REDIRECT: Final = "amqp:link:redirect"
FRAMING_ERROR: Final = "amqp:connection:framing-error"


class Role(Enum):
    """Our own role on a link."""

    SENDER = "sender"
    RECEIVER = "receiver"


class SettleMode(Enum):
    """snd-settle-mode, part 2.8.2."""

    UNSETTLED = 0
    SETTLED = 1
    MIXED = 2


class OutcomeKind(Enum):
    ACCEPTED = "accepted"
    REJECTED = "rejected"
    RELEASED = "released"
    MODIFIED = "modified"
    UNKNOWN = "unknown"  # settled without an outcome: the message may or may not be there


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of `count` messages, the last of which is `seq`. Only accepted ones ever come several at once."""

    kind: OutcomeKind
    seq: int
    count: int = 1
    condition: str | None = None
    description: str | None = None
    delivery_failed: bool = False
    undeliverable_here: bool = False


@dataclass(frozen=True, slots=True)
class Authenticated:
    """The SASL layer is over. identity: None for an anonymous peer (server) or without a user name (client)."""

    identity: str | None
    mechanism: str | None


@dataclass(frozen=True, slots=True)
class Opened:
    """The peer's open. A server answers it with Engine.open() or Engine.refuse()."""

    container: str
    hostname: str | None
    max_frame_bytes: int
    idle_timeout_s: float
    capabilities: tuple[str, ...]
    properties: Mapping[str, Any]
    desired: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class RemoteClosed:
    """The peer closed the connection; the answer is already on its way."""

    condition: str | None
    description: str | None


@dataclass(frozen=True, slots=True)
class SessionClosed:
    """The peer ended a session; a LinkClosed for each of its links came before this."""

    session: Session
    condition: str | None
    description: str | None


@dataclass(frozen=True, slots=True)
class LinkAttached:
    """by_peer: the peer wants this link, confirm() or refuse() it. Otherwise the peer confirmed ours."""

    link: Sender | Receiver
    by_peer: bool
    name: str
    role: Role
    source: Terminus | None
    target: Terminus | None


@dataclass(frozen=True, slots=True)
class LinkClosed:
    """The link is gone, whoever began it; what was unsettled on it has no known fate.

    detached: the terminus stays and may be attached again, also where only the session ended. refused: the peer never
    accepted the attach.
    """

    link: Sender | Receiver
    condition: str | None
    description: str | None
    detached: bool = False
    refused: bool = False


@dataclass(frozen=True, slots=True)
class Credit:
    """The sender may send (see its capacity), or is asked to drain (see its draining)."""

    sender: Sender


@dataclass(frozen=True, slots=True)
class Settled:
    """The sender's take_outcomes() has something."""

    sender: Sender


@dataclass(frozen=True, slots=True)
class Deliveries:
    """Whole messages in order: (handle, bytes). Each handle is to be settled once; then it means nothing."""

    receiver: Receiver
    batch: list[tuple[int, bytes]]


@dataclass(frozen=True, slots=True)
class Failed:
    """The connection is broken. Send what data_to_send() still gives, then close. auth: credentials were refused."""

    condition: str
    description: str
    auth: bool = False


Event = (
    Authenticated
    | Opened
    | RemoteClosed
    | SessionClosed
    | LinkAttached
    | LinkClosed
    | Credit
    | Settled
    | Deliveries
    | Failed
)
