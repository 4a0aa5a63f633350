"""The configuration: what it says, once it has been read and checked.

`load` returns a frozen `Config`, or raises one `ConfigErrors` that lists every problem at once with its line, what
was found and what to write instead. Knows no socket, and nothing of how a value is used.

In Python, names carry their unit (`idle_timeout_s`, `packet_max_bytes`); in the file the unit stands in the value
(`idle_timeout = "20s"`).

The annotations are what pydantic checks a file by. They are text until `config_schema` reads them: whoever has a
finished `Config` needs no pydantic, and the daemon holds none (`config_child`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from gateway.config_problems import ConfigErrors, Problem
from gateway.config_values import (
    LISTEN_DEFAULT,
    BrokerUrl,
    HubUrl,
    Listen,
    Shares,
    fill,
    parse_listen,
)
from security.admission import REMOTE

if TYPE_CHECKING:
    from gateway.config_schema import (
        AcceptLoss,
        BeforeValidator,
        Count,
        Field,
        FilePath,
        Name,
        Plaintext,
        StreamBytes,
        StrictBool,
        StrictInt,
        Timeout,
        TopicFilter,
        check_broker_url,
        check_origin,
        check_rate,
        check_shares,
        check_url,
        check_who,
        listed,
        listen_at,
        pattern,
        seconds,
        size,
        template,
    )
    from security.rules import Action, Who

__all__ = [
    "Access",
    "Address",
    "Amqp",
    "Bridge",
    "BrokerUrl",
    "Config",
    "ConfigErrors",
    "Gateway",
    "Hub",
    "HubUrl",
    "Inbound",
    "Listen",
    "Local",
    "Mqtt",
    "Outbound",
    "Problem",
    "fill",
    "load",
    "loads",
    "parse_listen",
]

REQUESTER = "{requester}"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Table:
    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012  as pydantic reads it off a dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Gateway(_Table):
    """`[gateway]`: who this is, and where the journal lives."""

    id: Annotated[Name, Field(description="the gateway's name, unique at the hub", examples=["loco-4711"])]
    state_dir: Annotated[FilePath, Field(examples=["/var/lib/lineside"])] = Path("/var/lib/lineside")
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    synchronous: Literal["FULL", "NORMAL", "OFF"] = "FULL"
    accept_loss: AcceptLoss = False
    encryption_keys: Annotated[
        tuple[FilePath, ...], Field(min_length=1, max_length=16, examples=[["credential:journal-key"]])
    ] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Listener(_Table):
    """What every listener's table may say of TLS, users and passwords."""

    cert: Annotated[FilePath | None, Field(examples=["/etc/lineside/pki/gateway.pem"])] = None
    key: Annotated[FilePath | None, Field(examples=["/etc/lineside/pki/gateway.key"])] = None
    key_password_file: Annotated[FilePath | None, Field(examples=["credential:key-password"])] = None
    client_ca: Annotated[FilePath | None, Field(examples=["/etc/lineside/pki/ca.pem"])] = None
    client_cert: Literal["none", "optional", "required"] = "required"
    crl: Annotated[FilePath | None, Field(examples=["/etc/lineside/pki/crl.pem"])] = None
    password_file: Annotated[FilePath | None, Field(examples=["/etc/lineside/passwords"])] = None
    allow_anonymous: StrictBool | None = None
    connect_rate: Annotated[float, Field(ge=0.1, le=10_000), Field(examples=[10])] = REMOTE.per_s

    @property
    def asks_for(self) -> Literal["none", "optional", "required"]:
        """Whether clients have to show a certificate; nobody can be asked without a `client_ca`."""
        return self.client_cert if self.client_ca is not None else "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class Mqtt(_Listener):
    """`[mqtt]`: the local MQTT listener."""

    listen: Annotated[
        tuple[Annotated[Listen, listen_at("mqtt")], ...],
        Field(min_length=1, max_length=16, examples=[["127.0.0.1:1883"]]),
    ] = (parse_listen(LISTEN_DEFAULT["mqtt"]),)
    allow_plaintext: Plaintext = False
    packet_max_bytes: Annotated[int, size(1 << 10, 256 << 20), Field(alias="packet_max", examples=["1MiB"])] = 1 << 20
    receive_maximum: Annotated[StrictInt, Field(ge=1, le=65535)] = 1000
    clients_max: Annotated[StrictInt, Field(ge=1, le=100_000)] = 1000
    keep_alive_max_s: Annotated[StrictInt, Field(ge=1, le=65535)] = 60
    session_expiry_max_s: Annotated[
        float, seconds(0, 10 * 365 * 86400), Field(alias="session_expiry_max", examples=["30d"])
    ] = 30 * 86400.0
    session_max_messages: Count = 100_000
    send_window: Annotated[StrictInt, Field(ge=1, le=65535)] = 100
    topic_alias_max: Annotated[StrictInt, Field(ge=0, le=65535)] = 16
    retained: StrictBool = True
    retained_max: Annotated[StrictInt, Field(ge=0, le=10_000_000)] = 100_000
    wildcards: StrictBool = True
    sys_interval_s: Annotated[float, seconds(1, 3600), Field(alias="sys_interval", examples=["10s"])] = 10.0
    ws_origins: Annotated[
        tuple[Annotated[str, BeforeValidator(check_origin)], ...],
        Field(max_length=100, examples=[["https://hmi.example"]]),
    ] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Amqp(_Listener):
    """`[amqp]`: the local AMQP 1.0 listener."""

    listen: Annotated[
        tuple[Annotated[Listen, listen_at("amqp")], ...],
        Field(min_length=1, max_length=16, examples=[["127.0.0.1:5672"]]),
    ] = (parse_listen(LISTEN_DEFAULT["amqp"]),)
    allow_plaintext: Plaintext = False
    message_max_bytes: Annotated[int, size(1 << 10, 256 << 20), Field(alias="message_max", examples=["1MiB"])] = 1 << 20
    connections_max: Annotated[StrictInt, Field(ge=1, le=100_000)] = 1000
    idle_timeout_s: Annotated[Timeout, Field(alias="idle_timeout", examples=["60s"])] = 60.0
    window: Annotated[StrictInt, Field(ge=1, le=65535)] = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Hub(_Table):
    """`[[hub]]`: one place to forward to, by one or more URLs in order of preference."""

    name: Annotated[Name, Field(description="the name streams call this hub by", examples=["depot"])]
    urls: Annotated[
        tuple[Annotated[HubUrl, BeforeValidator(check_url)], ...],
        Field(
            min_length=1, max_length=16, description="where the hub listens", examples=[["amqps://hub.example:5671"]]
        ),
    ]
    kind: Literal["generic", "artemis", "rabbitmq", "lineside", "dispatch"] = "generic"
    ca: Annotated[FilePath | None, Field(examples=["/etc/lineside/pki/ca.pem"])] = None
    cert: Annotated[FilePath | None, Field(examples=["/etc/lineside/pki/gateway.pem"])] = None
    key: Annotated[FilePath | None, Field(examples=["/etc/lineside/pki/gateway.key"])] = None
    key_password_file: Annotated[FilePath | None, Field(examples=["credential:key-password"])] = None
    crl: Annotated[FilePath | None, Field(examples=["/etc/lineside/pki/crl.pem"])] = None
    ocsp: Literal["off", "if-stapled", "require"] = "off"
    sasl: Literal["auto", "external", "plain", "anonymous"] = "auto"
    user: Annotated[str | None, Field(min_length=1, max_length=255, examples=["loco-4711"])] = None
    password_file: Annotated[FilePath | None, Field(examples=["/etc/lineside/depot.password"])] = None
    allow_plaintext: Plaintext = False
    window: Annotated[StrictInt, Field(ge=1, le=65535)] = 1000
    idle_timeout_s: Annotated[float, seconds(1, 600), Field(alias="idle_timeout", examples=["20s"])] = 20.0
    connect_timeout_s: Annotated[Timeout, Field(alias="connect_timeout", examples=["10s"])] = 10.0
    sasl_timeout_s: Annotated[Timeout, Field(alias="sasl_timeout", examples=["10s"])] = 10.0
    open_timeout_s: Annotated[Timeout, Field(alias="open_timeout", examples=["10s"])] = 10.0
    attach_timeout_s: Annotated[Timeout, Field(alias="attach_timeout", examples=["10s"])] = 10.0
    settle_timeout_s: Annotated[Timeout, Field(alias="settle_timeout", examples=["30s"])] = 30.0
    retry_min_s: Annotated[Timeout, Field(alias="retry_min", examples=["200ms"])] = 0.2
    retry_max_s: Annotated[float, seconds(0.01, 3600), Field(alias="retry_max", examples=["30s"])] = 30.0
    rate: Annotated[Annotated[float, BeforeValidator(check_rate)] | None, Field(examples=["9.6kbit/s"])] = None
    shares: Annotated[Shares, BeforeValidator(check_shares), Field(examples=[{"urgent": 70}])] = field(
        default_factory=Shares
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Bridge(_Table):
    """`[bridge]`: a broker that is already there; apps speak to it, and this gateway is its client."""

    url: Annotated[
        BrokerUrl,
        BeforeValidator(check_broker_url),
        Field(description="where the broker listens", examples=["mqtt://127.0.0.1:1883"]),
    ]
    version: Literal["5.0", "3.1.1"] = "5.0"
    client_id: Annotated[str, template("gateway"), Field(max_length=1024, examples=["lineside-{gateway}"])] = (
        "lineside-{gateway}"
    )
    topics: Annotated[tuple[TopicFilter, ...] | None, Field(min_length=1, max_length=1000, examples=[["alarm/#"]])] = (
        None
    )
    user: Annotated[str | None, Field(min_length=1, max_length=255, examples=["lineside"])] = None
    password_file: Annotated[FilePath | None, Field(examples=["/etc/lineside/bridge.password"])] = None
    ca: Annotated[FilePath | None, Field(examples=["/etc/lineside/pki/ca.pem"])] = None
    cert: Annotated[FilePath | None, Field(examples=["/etc/lineside/pki/gateway.pem"])] = None
    key: Annotated[FilePath | None, Field(examples=["/etc/lineside/pki/gateway.key"])] = None
    key_password_file: Annotated[FilePath | None, Field(examples=["credential:key-password"])] = None
    crl: Annotated[FilePath | None, Field(examples=["/etc/lineside/pki/crl.pem"])] = None
    allow_plaintext: Plaintext = False
    window: Annotated[StrictInt, Field(ge=1, le=65535)] = 1000
    keep_alive_s: Annotated[float, seconds(1, 65535), Field(alias="keep_alive", examples=["20s"])] = 20.0
    session_expiry_s: Annotated[
        Annotated[float, seconds(60, 4294967294)] | None, Field(alias="session_expiry", examples=["30d"])
    ] = None
    connect_timeout_s: Annotated[Timeout, Field(alias="connect_timeout", examples=["10s"])] = 10.0

    def client_id_for(self, gateway: str) -> str:
        """The client identifier with its placeholder filled."""
        return fill(self.client_id, gateway=gateway)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outbound(_Table):
    """`[[outbound]]`: topics that are journaled in one stream and forwarded to one address."""

    stream: Annotated[Name, Field(description="the stream's name", examples=["alarms"])]
    topics: Annotated[
        tuple[TopicFilter, ...],
        Field(min_length=1, max_length=1000, description="the topics it takes", examples=[["alarm/#"]]),
    ]
    hub: Annotated[Name, Field(description="the name of a [[hub]]", examples=["depot"])]
    address: Annotated[
        str,
        template("gateway", "stream", "requester"),
        Field(description="the hub's address to send to", examples=["edge.{gateway}.alarms"]),
    ]
    class_: Annotated[Literal["urgent", "normal", "bulk"], Field(alias="class")] = "normal"
    max_bytes: Annotated[StreamBytes, Field(examples=["64MiB"])] = 256 << 20
    max_messages: Count = 1_000_000
    when_full: Literal["refuse", "drop-oldest"] = "refuse"
    ttl_s: Annotated[Annotated[float, seconds(0.001, 4294967.295)] | None, Field(alias="ttl", examples=["1h"])] = None
    ack: Annotated[
        Literal["disk", "disk-or-hub"], Field(description="what an acknowledgement means", examples=["disk-or-hub"])
    ] = "disk"
    linger_s: Annotated[float, seconds(0.005, 5), Field(alias="linger", examples=["250ms"])] = 0.25
    reply_to: Annotated[Annotated[str, template("gateway")] | None, Field(examples=["edge.{gateway}.replies"])] = None
    reply_timeout_s: Annotated[float, seconds(1, 30 * 86400), Field(alias="reply_timeout", examples=["5m"])] = 300.0

    @property
    def answers(self) -> str | None:
        """What the topics begin with that go to the reply-to of a request from the hub; None of any other stream."""
        return self.topics[0][:-1] if self.address == REQUESTER else None

    def reply_to_for(self, gateway: str) -> str | None:
        """The reply address with its placeholder filled; it is that of an inbound stream of the same hub."""
        return None if self.reply_to is None else fill(self.reply_to, gateway=gateway)

    def address_for(self, gateway: str) -> str:
        """The address with its placeholders filled."""
        return fill(self.address, gateway=gateway, stream=self.stream, requester="(reply-to)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Inbound(_Table):
    """`[[inbound]]`: a hub's address that is journaled in one stream and handed to local apps."""

    stream: Annotated[Name, Field(description="the stream's name", examples=["commands"])]
    hub: Annotated[Name, Field(description="the name of a [[hub]]", examples=["depot"])]
    address: Annotated[
        str,
        template("gateway", "stream"),
        Field(description="the hub's address to receive from", examples=["edge.{gateway}.commands"]),
    ]
    topic: Annotated[
        str,
        template("subject", "gateway", topic=True),
        Field(description="the local topic to publish to", examples=["commands/{subject}"]),
    ]
    max_bytes: Annotated[StreamBytes, Field(examples=["64MiB"])] = 256 << 20
    max_messages: Count = 1_000_000
    credit: Annotated[StrictInt, Field(ge=1, le=65535)] = 500
    dedup: Annotated[StrictInt, Field(ge=0, le=10_000_000)] = 10_000

    def address_for(self, gateway: str) -> str:
        """The address with its placeholders filled."""
        return fill(self.address, gateway=gateway, stream=self.stream)


@dataclass(frozen=True, slots=True, kw_only=True)
class Address(_Table):
    """`[[address]]`: what an address, or all that a filter takes, is to AMQP apps."""

    name: Annotated[TopicFilter, Field(description="an address, or a filter that takes several", examples=["jobs/#"])]
    kind: Annotated[
        Literal["queue", "topic"],
        Field(description="queue: one receiver gets a message; topic: all do", examples=["queue"]),
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Local(_Table):
    """`[local]`: what apps say to one another and no stream takes."""

    max_bytes: Annotated[StreamBytes, Field(examples=["64MiB"])] = 64 << 20
    max_messages: Count = 100_000
    when_full: Literal["refuse", "drop-oldest"] = "drop-oldest"


@dataclass(frozen=True, slots=True, kw_only=True)
class Access(_Table):
    """`[[access]]`: who may publish to, and subscribe to, what. The first rule that decides wins."""

    who: Annotated[
        tuple[Annotated[Who, BeforeValidator(check_who)], ...],
        BeforeValidator(listed),
        Field(min_length=1, max_length=100, description="whom the rule is about", examples=[["user:anna"]]),
    ]
    publish: Annotated[
        tuple[Annotated[str, pattern(Action.PUBLISH)], ...],
        BeforeValidator(listed),
        Field(max_length=100, examples=[["train/{client}/#"]]),
    ] = ()
    subscribe: Annotated[
        tuple[Annotated[str, pattern(Action.SUBSCRIBE)], ...],
        BeforeValidator(listed),
        Field(max_length=100, examples=[["commands/#"]]),
    ] = ()
    deny: StrictBool = False
    line: int = field(default=0, init=False, compare=False)

    def place(self, number: int) -> str:
        """Where the rule stands in the file."""
        return f"access[{number}] (line {self.line})" if self.line else f"access[{number}]"


@dataclass(frozen=True, slots=True, kw_only=True)
class Config(_Table):
    """The whole file."""

    gateway: Annotated[Gateway, Field(description="a [gateway] table", examples=[{}])]
    mqtt: Mqtt | None = None
    amqp: Amqp | None = None
    bridge: Bridge | None = None
    hubs: Annotated[tuple[Hub, ...], Field(alias="hub", max_length=100)] = ()
    outbound: tuple[Outbound, ...] = ()
    inbound: tuple[Inbound, ...] = ()
    addresses: Annotated[tuple[Address, ...], Field(alias="address", max_length=1000)] = ()
    local: Local = Local()
    access: Annotated[tuple[Access, ...], Field(max_length=500)] = ()

    def allows_anonymous(self, protocol: str) -> bool | None:
        """Whether that listener lets in whom nothing vouches for; None: those on this machine."""
        table = self.mqtt if protocol == "mqtt" else self.amqp
        if table is None:
            return None
        if table.allow_anonymous is not None or not (self.access or table.password_file):
            return table.allow_anonymous
        return False

    @property
    def bridge_topics(self) -> tuple[str, ...]:
        """What the bridge reads from its broker: its own `topics`, else those of every outbound stream."""
        if self.bridge is None:
            return ()
        if self.bridge.topics is not None:
            return self.bridge.topics
        return tuple(dict.fromkeys(topic for each in self.outbound for topic in each.topics))

    def hub(self, name: str) -> Hub:
        """The hub of that name; every stream's hub exists in a Config that `load` returned."""
        return next(hub for hub in self.hubs if hub.name == name)


def load(path: Path, *, check_files: bool = True) -> Config:
    """Read and check the file. Raises ConfigErrors with every problem in it.

    `check_files=False` leaves out whether certificates, keys and passwords can be read: for commands that need
    none of them and may run as somebody who may not read them.
    """
    from gateway.config_schema import load

    return load(path, check_files=check_files)


def loads(data: bytes | str, *, file: str = "config", base: Path = Path(), check_files: bool = True) -> Config:
    """As `load`, from the content itself; paths in it are relative to `base`."""
    from gateway.config_schema import loads

    return loads(data, file=file, base=base, check_files=check_files)
