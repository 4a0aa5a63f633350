"""The configuration file: what it may say, and what it says.

`load` returns a frozen `Config`, or raises one `ConfigErrors` that lists every problem at once with its line, what
was found and what to write instead. Knows no socket, and nothing of how a value is used.

In Python, names carry their unit (`idle_timeout_s`, `packet_max_bytes`); in the file the unit stands in the value
(`idle_timeout = "20s"`).
"""

from __future__ import annotations

import difflib
import json
import stat
from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    StrictBool,
    StrictInt,
    ValidationError,
    ValidationInfo,
)

from gateway.config_checks import check_all
from gateway.config_fields import check_name as _check_name
from gateway.config_fields import from_value_error as _from_value_error
from gateway.config_fields import read_document, toml_document
from gateway.config_fields import seconds as _seconds
from gateway.config_fields import size as _size
from gateway.config_fields import wrong as _wrong
from gateway.config_problems import ConfigErrors, Problem, Report
from gateway.config_values import (
    ACCEPT_LOSS,
    ALLOW_PLAINTEXT,
    LISTEN_DEFAULT,
    PLACEHOLDER,
    BrokerUrl,
    HubUrl,
    Listen,
    fill,
    parse_broker_url,
    parse_hub_url,
    parse_listen,
    parse_origin,
    show_duration,
    show_size,
    topic_filter_fault,
)
from security.rules import Action, Rule, Who, check_pattern, parse_who, words

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
    "explain",
    "fill",
    "load",
    "loads",
    "parse_listen",
]

REQUESTER = "{requester}"


def _phrase(phrase: str, risk: str) -> BeforeValidator:
    """A setting that is only believed in its exact words."""

    def check(value: object) -> bool:
        if value != phrase:
            raise _wrong(f"exactly these words, because {risk}", json.dumps(phrase))
        return True

    return BeforeValidator(check)


def _check_file(value: object, info: ValidationInfo) -> object:
    """Paths are relative to the configuration file's own directory."""
    if not isinstance(value, str):
        return value
    if not value or "\0" in value:
        raise _wrong("a path")
    base = (info.context or {}).get("base", Path())
    return Path(base) / value


def _check_topic_filter(value: object) -> object:
    if isinstance(value, str) and (fault := topic_filter_fault(value)):
        raise _wrong(*fault)
    return value


def _template(*known: str, topic: bool = False) -> BeforeValidator:
    def check(value: object) -> object:
        if not isinstance(value, str):
            return value
        allowed = ", ".join(f"{{{name}}}" for name in known)
        if not value or len(value) > 1024 or not value.isprintable():
            raise _wrong("1 to 1024 printable characters")
        for name in PLACEHOLDER.findall(value):
            if name not in known:
                near = difflib.get_close_matches(name, known, 1, 0.0)[0]
                raise _wrong(f"only the placeholders {allowed}", json.dumps(value.replace(name, near, 1)))
        bare = PLACEHOLDER.sub("", value)
        if "{" in bare or "}" in bare:
            raise _wrong(f"braces only around a placeholder ({allowed})")
        if topic and ("#" in bare or "+" in bare):
            raise _wrong("a topic to publish to, which has no '#' and no '+'")
        return value

    return BeforeValidator(check)


def _listen(protocol: str) -> BeforeValidator:
    def check(value: object) -> Listen:
        if not isinstance(value, str):
            raise _wrong('"host:port" or "unix:/path"', json.dumps(LISTEN_DEFAULT[protocol]))
        try:
            return parse_listen(value, protocol)
        except ValueError as error:
            raise _from_value_error(error) from None

    return BeforeValidator(check)


def _check_origin(value: object) -> object:
    if not isinstance(value, str):
        return value
    try:
        return parse_origin(value)
    except ValueError as error:
        raise _from_value_error(error) from None


def _check_url(value: object) -> HubUrl:
    if not isinstance(value, str):
        raise _wrong("a URL", '"amqps://hub.example:5671"')
    try:
        return parse_hub_url(value)
    except ValueError as error:
        raise _from_value_error(error) from None


def _check_broker_url(value: object) -> BrokerUrl:
    if not isinstance(value, str):
        raise _wrong("a URL", '"mqtt://127.0.0.1:1883"')
    try:
        return parse_broker_url(value)
    except ValueError as error:
        raise _from_value_error(error) from None


def _check_who(value: object) -> Who:
    try:
        return parse_who(value)
    except ValueError as error:
        raise _from_value_error(error) from None


def _pattern(action: Action) -> BeforeValidator:
    def check(value: object) -> object:
        try:
            check_pattern(value, action)
        except ValueError as error:
            raise _from_value_error(error) from None
        return value

    return BeforeValidator(check)


def _listed(value: object) -> object:
    """One word needs no brackets."""
    return [value] if isinstance(value, str) else value


Name = Annotated[str, BeforeValidator(_check_name)]
FilePath = Annotated[Path, BeforeValidator(_check_file)]
TopicFilter = Annotated[str, BeforeValidator(_check_topic_filter)]
Timeout = Annotated[float, _seconds(0.01, 600)]
StreamBytes = Annotated[int, _size(1 << 16)]
Count = Annotated[StrictInt, Field(ge=1, le=1_000_000_000)]
Plaintext = Annotated[bool, _phrase(ALLOW_PLAINTEXT, "whoever shares the network can then read and write it")]
AcceptLoss = Annotated[bool, _phrase(ACCEPT_LOSS, "a power cut then takes messages that were acknowledged")]


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Gateway(_Table):
    """`[gateway]`: who this is, and where the journal lives."""

    id: Name = Field(description="the gateway's name, unique at the hub", examples=["loco-4711"])
    state_dir: FilePath = Field(default=Path("/var/lib/lineside"), examples=["/var/lib/lineside"])
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    synchronous: Literal["FULL", "NORMAL", "OFF"] = "FULL"
    accept_loss: AcceptLoss = False


class _Listener(_Table):
    """What every listener's table may say of TLS, users and passwords."""

    cert: FilePath | None = Field(default=None, examples=["/etc/lineside/pki/gateway.pem"])
    key: FilePath | None = Field(default=None, examples=["/etc/lineside/pki/gateway.key"])
    client_ca: FilePath | None = Field(default=None, examples=["/etc/lineside/pki/ca.pem"])
    client_cert: Literal["none", "optional", "required"] = "required"
    crl: FilePath | None = Field(default=None, examples=["/etc/lineside/pki/crl.pem"])
    password_file: FilePath | None = Field(default=None, examples=["/etc/lineside/passwords"])
    allow_anonymous: StrictBool | None = None

    @property
    def asks_for(self) -> Literal["none", "optional", "required"]:
        """Whether clients have to show a certificate; nobody can be asked without a `client_ca`."""
        return self.client_cert if self.client_ca is not None else "none"


class Mqtt(_Listener):
    """`[mqtt]`: the local MQTT listener."""

    listen: tuple[Annotated[Listen, _listen("mqtt")], ...] = Field(
        default=(parse_listen(LISTEN_DEFAULT["mqtt"]),), min_length=1, max_length=16, examples=[["127.0.0.1:1883"]]
    )
    allow_plaintext: Plaintext = False
    packet_max_bytes: Annotated[int, _size(1 << 10, 256 << 20)] = Field(
        default=1 << 20, alias="packet_max", examples=["1MiB"]
    )
    receive_maximum: Annotated[StrictInt, Field(ge=1, le=65535)] = 1000
    clients_max: Annotated[StrictInt, Field(ge=1, le=100_000)] = 1000
    keep_alive_max_s: Annotated[StrictInt, Field(ge=1, le=65535)] = 60
    session_expiry_max_s: Annotated[float, _seconds(0, 10 * 365 * 86400)] = Field(
        default=30 * 86400.0, alias="session_expiry_max", examples=["30d"]
    )
    session_max_messages: Count = 100_000
    send_window: Annotated[StrictInt, Field(ge=1, le=65535)] = 100
    topic_alias_max: Annotated[StrictInt, Field(ge=0, le=65535)] = 16
    retained: StrictBool = True
    retained_max: Annotated[StrictInt, Field(ge=0, le=10_000_000)] = 100_000
    wildcards: StrictBool = True
    sys_interval_s: Annotated[float, _seconds(1, 3600)] = Field(default=10.0, alias="sys_interval", examples=["10s"])
    ws_origins: tuple[Annotated[str, BeforeValidator(_check_origin)], ...] = Field(
        default=(), max_length=100, examples=[["https://hmi.example"]]
    )


class Amqp(_Listener):
    """`[amqp]`: the local AMQP 1.0 listener."""

    listen: tuple[Annotated[Listen, _listen("amqp")], ...] = Field(
        default=(parse_listen(LISTEN_DEFAULT["amqp"]),), min_length=1, max_length=16, examples=[["127.0.0.1:5672"]]
    )
    allow_plaintext: Plaintext = False
    message_max_bytes: Annotated[int, _size(1 << 10, 256 << 20)] = Field(
        default=1 << 20, alias="message_max", examples=["1MiB"]
    )
    connections_max: Annotated[StrictInt, Field(ge=1, le=100_000)] = 1000
    idle_timeout_s: Timeout = Field(default=60.0, alias="idle_timeout", examples=["60s"])
    window: Annotated[StrictInt, Field(ge=1, le=65535)] = 1000


class Hub(_Table):
    """`[[hub]]`: one place to forward to, by one or more URLs in order of preference."""

    name: Name = Field(description="the name streams call this hub by", examples=["depot"])
    urls: tuple[Annotated[HubUrl, BeforeValidator(_check_url)], ...] = Field(
        min_length=1,
        max_length=16,
        description="where the hub listens",
        examples=[["amqps://hub.example:5671"]],
    )
    kind: Literal["generic", "artemis", "rabbitmq", "lineside", "dispatch"] = "generic"
    ca: FilePath | None = Field(default=None, examples=["/etc/lineside/pki/ca.pem"])
    cert: FilePath | None = Field(default=None, examples=["/etc/lineside/pki/gateway.pem"])
    key: FilePath | None = Field(default=None, examples=["/etc/lineside/pki/gateway.key"])
    crl: FilePath | None = Field(default=None, examples=["/etc/lineside/pki/crl.pem"])
    sasl: Literal["auto", "external", "plain", "anonymous"] = "auto"
    user: str | None = Field(default=None, min_length=1, max_length=255, examples=["loco-4711"])
    password_file: FilePath | None = Field(default=None, examples=["/etc/lineside/depot.password"])
    allow_plaintext: Plaintext = False
    window: Annotated[StrictInt, Field(ge=1, le=65535)] = 1000
    idle_timeout_s: Annotated[float, _seconds(1, 600)] = Field(default=20.0, alias="idle_timeout", examples=["20s"])
    connect_timeout_s: Timeout = Field(default=10.0, alias="connect_timeout", examples=["10s"])
    sasl_timeout_s: Timeout = Field(default=10.0, alias="sasl_timeout", examples=["10s"])
    open_timeout_s: Timeout = Field(default=10.0, alias="open_timeout", examples=["10s"])
    attach_timeout_s: Timeout = Field(default=10.0, alias="attach_timeout", examples=["10s"])
    settle_timeout_s: Timeout = Field(default=30.0, alias="settle_timeout", examples=["30s"])
    retry_min_s: Timeout = Field(default=0.2, alias="retry_min", examples=["200ms"])
    retry_max_s: Annotated[float, _seconds(0.01, 3600)] = Field(default=30.0, alias="retry_max", examples=["30s"])


class Bridge(_Table):
    """`[bridge]`: a broker that is already there; apps speak to it, and this gateway is its client."""

    url: Annotated[BrokerUrl, BeforeValidator(_check_broker_url)] = Field(
        description="where the broker listens", examples=["mqtt://127.0.0.1:1883"]
    )
    version: Literal["5.0", "3.1.1"] = "5.0"
    client_id: Annotated[str, _template("gateway")] = Field(
        default="lineside-{gateway}", max_length=1024, examples=["lineside-{gateway}"]
    )
    topics: tuple[TopicFilter, ...] | None = Field(default=None, min_length=1, max_length=1000, examples=[["alarm/#"]])
    user: str | None = Field(default=None, min_length=1, max_length=255, examples=["lineside"])
    password_file: FilePath | None = Field(default=None, examples=["/etc/lineside/bridge.password"])
    ca: FilePath | None = Field(default=None, examples=["/etc/lineside/pki/ca.pem"])
    cert: FilePath | None = Field(default=None, examples=["/etc/lineside/pki/gateway.pem"])
    key: FilePath | None = Field(default=None, examples=["/etc/lineside/pki/gateway.key"])
    allow_plaintext: Plaintext = False
    window: Annotated[StrictInt, Field(ge=1, le=65535)] = 1000
    keep_alive_s: Annotated[float, _seconds(1, 65535)] = Field(default=20.0, alias="keep_alive", examples=["20s"])
    session_expiry_s: Annotated[float, _seconds(60, 4294967294)] | None = Field(
        default=None, alias="session_expiry", examples=["30d"]
    )
    connect_timeout_s: Timeout = Field(default=10.0, alias="connect_timeout", examples=["10s"])

    def client_id_for(self, gateway: str) -> str:
        """The client identifier with its placeholder filled."""
        return fill(self.client_id, gateway=gateway)


class Outbound(_Table):
    """`[[outbound]]`: topics that are journaled in one stream and forwarded to one address."""

    stream: Name = Field(description="the stream's name", examples=["alarms"])
    topics: tuple[TopicFilter, ...] = Field(
        min_length=1, max_length=1000, description="the topics it takes", examples=[["alarm/#"]]
    )
    hub: Name = Field(description="the name of a [[hub]]", examples=["depot"])
    address: Annotated[str, _template("gateway", "stream", "requester")] = Field(
        description="the hub's address to send to", examples=["edge.{gateway}.alarms"]
    )
    class_: Literal["urgent", "normal", "bulk"] = Field(default="normal", alias="class")
    max_bytes: StreamBytes = Field(default=256 << 20, examples=["64MiB"])
    max_messages: Count = 1_000_000
    when_full: Literal["refuse", "drop-oldest"] = "refuse"
    ttl_s: Annotated[float, _seconds(0.001, 4294967.295)] | None = Field(default=None, alias="ttl", examples=["1h"])
    reply_to: Annotated[str, _template("gateway")] | None = Field(default=None, examples=["edge.{gateway}.replies"])
    reply_timeout_s: Annotated[float, _seconds(1, 30 * 86400)] = Field(
        default=300.0, alias="reply_timeout", examples=["5m"]
    )

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


class Inbound(_Table):
    """`[[inbound]]`: a hub's address that is journaled in one stream and handed to local apps."""

    stream: Name = Field(description="the stream's name", examples=["commands"])
    hub: Name = Field(description="the name of a [[hub]]", examples=["depot"])
    address: Annotated[str, _template("gateway", "stream")] = Field(
        description="the hub's address to receive from", examples=["edge.{gateway}.commands"]
    )
    topic: Annotated[str, _template("subject", "gateway", topic=True)] = Field(
        description="the local topic to publish to", examples=["commands/{subject}"]
    )
    max_bytes: StreamBytes = Field(default=256 << 20, examples=["64MiB"])
    max_messages: Count = 1_000_000
    credit: Annotated[StrictInt, Field(ge=1, le=65535)] = 500
    dedup: Annotated[StrictInt, Field(ge=0, le=10_000_000)] = 10_000

    def address_for(self, gateway: str) -> str:
        """The address with its placeholders filled."""
        return fill(self.address, gateway=gateway, stream=self.stream)


class Address(_Table):
    """`[[address]]`: what an address, or all that a filter takes, is to AMQP apps."""

    name: TopicFilter = Field(description="an address, or a filter that takes several", examples=["jobs/#"])
    kind: Literal["queue", "topic"] = Field(
        description="queue: one receiver gets a message; topic: all do", examples=["queue"]
    )


class Local(_Table):
    """`[local]`: what apps say to one another and no stream takes."""

    max_bytes: StreamBytes = Field(default=64 << 20, examples=["64MiB"])
    max_messages: Count = 100_000
    when_full: Literal["refuse", "drop-oldest"] = "drop-oldest"


class Access(_Table):
    """`[[access]]`: who may publish to, and subscribe to, what. The first rule that decides wins."""

    who: Annotated[
        tuple[Annotated[Who, BeforeValidator(_check_who)], ...],
        BeforeValidator(_listed),
        Field(min_length=1, max_length=100, description="whom the rule is about", examples=[["user:anna"]]),
    ]
    publish: Annotated[
        tuple[Annotated[str, _pattern(Action.PUBLISH)], ...],
        BeforeValidator(_listed),
        Field(max_length=100, examples=[["train/{client}/#"]]),
    ] = ()
    subscribe: Annotated[
        tuple[Annotated[str, _pattern(Action.SUBSCRIBE)], ...],
        BeforeValidator(_listed),
        Field(max_length=100, examples=[["commands/#"]]),
    ] = ()
    deny: StrictBool = False
    _line: int = PrivateAttr(0)

    def place(self, number: int) -> str:
        """Where the rule stands in the file."""
        return f"access[{number}] (line {self._line})" if self._line else f"access[{number}]"


class Config(_Table):
    """The whole file."""

    gateway: Gateway = Field(description="a [gateway] table", examples=[{}])
    mqtt: Mqtt | None = None
    amqp: Amqp | None = None
    bridge: Bridge | None = None
    hubs: tuple[Hub, ...] = Field(default=(), alias="hub", max_length=100)
    outbound: tuple[Outbound, ...] = ()
    inbound: tuple[Inbound, ...] = ()
    addresses: tuple[Address, ...] = Field(default=(), alias="address", max_length=1000)
    local: Local = Local()
    access: tuple[Access, ...] = Field(default=(), max_length=500)

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
    data = read_document(path, "a configuration file")
    return loads(data, file=str(path), base=path.parent, check_files=check_files)


def loads(data: bytes | str, *, file: str = "config", base: Path = Path(), check_files: bool = True) -> Config:
    """As `load`, from the content itself; paths in it are relative to `base`."""
    raw, lines = toml_document(data, file)
    report = Report(Config, file, raw, lines)
    context = {"base": base.absolute()}
    config: Config | None = None
    try:
        config = Config.model_validate(raw, context=context)
    except ValidationError as errors:
        for each in errors.errors(include_url=False):
            report.add_from_pydantic(each["type"], each["loc"], each.get("ctx") or {}, each["msg"])
    check_all(raw, context["base"], report, check_files=check_files)
    if report.problems or config is None:
        raise ConfigErrors(report.problems)
    for number, rule in enumerate(config.access):
        rule._line = lines.get(("access", number), 0)
    return config


def explain(config: Config) -> list[str]:
    """The configuration in sentences, for `lineside check`; lines that begin with "note:" deserve a thought."""
    gateway = config.gateway
    lines = [f"gateway {gateway.id} keeps its journal in {gateway.state_dir}"]
    if gateway.synchronous != "FULL":
        lines.append(f"note: synchronous = {gateway.synchronous}: a power cut may take acknowledged messages")
    lines += _explain_listeners(config)
    lines += _explain_access(config)
    lines += _explain_bridge(config)
    for hub in config.hubs:
        lines += _explain_hub(hub)
    for outbound in config.outbound:
        lines += _explain_outbound(outbound, config)
    for inbound in config.inbound:
        lines.append(
            f"stream {inbound.stream} (inbound): {inbound.hub}'s {inbound.address_for(gateway.id)} to local topic "
            f"{fill(inbound.topic, gateway=gateway.id, subject='<subject>')}, up to "
            f"{show_size(inbound.max_bytes)} and {inbound.max_messages} messages, credit {inbound.credit}; "
            f"remembers {inbound.dedup} identities of each sender"
        )
    lines += [f"address {each.name} is a {each.kind} to AMQP apps" for each in config.addresses]
    local = config.local
    full = _WHEN_FULL[local.when_full]
    lines.append(f"all other topics stay local, up to {show_size(local.max_bytes)}; when full, {full}")
    total = sum(each.max_bytes for each in config.outbound) + sum(each.max_bytes for each in config.inbound)
    total += local.max_bytes
    lines.append(f"the streams together may take {show_size(total)} of disk")
    return lines


_WHEN_FULL = {
    "refuse": "new messages are refused",
    "drop-oldest": "the oldest are dropped and recorded as lost",
}


def _explain_listeners(config: Config) -> list[str]:
    lines: list[str] = []
    if config.mqtt:
        where = ", ".join(str(listen) for listen in config.mqtt.listen)
        limits = f"{config.mqtt.clients_max} clients, packets up to {show_size(config.mqtt.packet_max_bytes)}"
        lines.append(f"MQTT on {where}: at most {limits}")
        lines += _explain_tls("MQTT", config.mqtt, config.mqtt.listen)
        if "*" in config.mqtt.ws_origins and any(listen.websocket for listen in config.mqtt.listen):
            lines.append('note: any web page that a browser here shows may connect, as ws_origins has "*"')
    if config.amqp:
        where = ", ".join(str(listen) for listen in config.amqp.listen)
        lines.append(f"AMQP on {where}: at most {config.amqp.connections_max} connections")
        lines += _explain_tls("AMQP", config.amqp, config.amqp.listen)
    if not lines and config.bridge is None:
        lines.append("note: nothing listens, so no app can reach this gateway: add [mqtt]")
    return lines


def _explain_access(config: Config) -> list[str]:
    lines: list[str] = []
    for number, table in enumerate(config.access):
        lines.append(f"{table.place(number)}: {words(Rule(table.who, table.publish, table.subscribe, table.deny))}")
    lines.append(
        "whatever no rule allows is refused" if config.access else "every app may do everything: no [[access]]"
    )
    for name, listener in (("MQTT", config.mqtt), ("AMQP", config.amqp)):
        if listener is None:
            continue
        anonymous = config.allows_anonymous(name.lower())
        who = {True: "let in", False: "refused", None: "let in from this machine only"}[anonymous]
        file = listener.password_file
        lines.append(f"{name} users are {f'those of {file}' if file else 'not asked for'}; anonymous apps are {who}")
        if anonymous is False and file is None and not all(listen.path for listen in listener.listen):
            lines.append(
                f"note: {name} apps without a certificate can't log in over TCP, as there is no password_file and "
                "anonymous ones are refused: add one of password_file and allow_anonymous = true"
            )
        if file is not None and _readable_by_all(file):
            lines.append(f"note: {file} can be read by every user: chmod 640 {file}")
    return lines


_CLIENT_CERT = {
    "none": "clients are not asked for a certificate",
    "optional": "clients may show a certificate, which {ca} must have issued",
    "required": "clients must show a certificate that {ca} issued",
}


def _explain_tls(what: str, listener: _Listener, listens: tuple[Listen, ...]) -> list[str]:
    lines: list[str] = []
    secure = [str(listen) for listen in listens if listen.tls]
    if secure:
        clients = _CLIENT_CERT[listener.asks_for].format(ca=listener.client_ca)
        lines.append(f"{what} with TLS on {', '.join(secure)}: certificate {listener.cert}; {clients}")
        lines += _explain_crl(listener.crl, "clients are")
        if listener.key is not None and _readable_by_all(listener.key):
            lines.append(f"note: {listener.key} can be read by every user: chmod 640 {listener.key}")
    elif listener.cert is not None:
        lines.append(f"note: {what} has a cert and no address with TLS to use it on")
    if not all(listen.loopback or listen.tls for listen in listens):
        lines.append(f"note: {what} without TLS can be reached from other machines")
    return lines


def _explain_bridge(config: Config) -> list[str]:
    bridge = config.bridge
    if bridge is None:
        return []
    reads = ", ".join(config.bridge_topics) or "nothing"
    writes = ", ".join(each.stream for each in config.inbound) or "nothing"
    expiry = "never expires" if bridge.session_expiry_s is None else f"lasts {show_duration(bridge.session_expiry_s)}"
    who = f"as user {bridge.user}" if bridge.user else "with its certificate" if bridge.cert else "anonymously"
    lines = [
        f"bridge to the broker at {bridge.url} over MQTT {bridge.version} {who}, client identifier "
        f"{bridge.client_id_for(config.gateway.id)}, with a session that {expiry}: reads {reads}; publishes the "
        f"inbound streams ({writes}); at most {bridge.window} messages unacknowledged each way",
        "note: what that broker has acknowledged and not yet handed over is as safe as it keeps it: see its own "
        "persistence settings",
    ]
    if not bridge.url.tls and not bridge.url.loopback:
        lines.append("note: the bridge's broker is reached without TLS")
    if bridge.url.tls and bridge.ca is None:
        lines.append("note: the bridge's broker is trusted by the system's certificate authorities, as ca is not set")
    for path in (bridge.key, bridge.password_file):
        if path is not None and _readable_by_all(path):
            lines.append(f"note: {path} can be read by every user: chmod 640 {path}")
    return lines


def _explain_hub(hub: Hub) -> list[str]:
    urls = ", then ".join(str(url) for url in hub.urls)
    who = "with its certificate" if hub.cert else f"as user {hub.user}" if hub.user else "anonymously"
    lines = [f"hub {hub.name} ({hub.kind}) at {urls}, {who}"]
    if any(url.tls for url in hub.urls) and hub.ca is None:
        lines.append(f"note: hub {hub.name} is trusted by the system's certificate authorities, as ca is not set")
    lines += _explain_crl(hub.crl, f"hub {hub.name} is")
    if any(not url.tls and not url.loopback for url in hub.urls):
        lines.append(f"note: hub {hub.name} is reached without TLS")
    for path in (hub.key, hub.password_file):
        if path is not None and _readable_by_all(path):
            lines.append(f"note: {path} can be read by every user: chmod 640 {path}")
    return lines


def _explain_crl(crl: Path | None, whose: str) -> list[str]:
    if crl is None:
        return []
    return [f"{whose} refused if revoked in {crl}, and once that list ends: `lineside pki show {crl}` tells when"]


def _readable_by_all(path: Path) -> bool:
    try:
        return bool(path.stat().st_mode & stat.S_IROTH)
    except OSError:
        return False


def _explain_outbound(outbound: Outbound, config: Config) -> list[str]:
    ttl = f", expiring after {show_duration(outbound.ttl_s)}" if outbound.ttl_s else ""
    lines = [
        f"stream {outbound.stream} (outbound, {outbound.class_}): {', '.join(outbound.topics)} to {outbound.hub}'s "
        f"{outbound.address_for(config.gateway.id)}, up to {show_size(outbound.max_bytes)} and "
        f"{outbound.max_messages} messages{ttl}; when full, {_WHEN_FULL[outbound.when_full]}"
    ]
    if outbound.answers is not None:
        lines.append(
            f"requests from {outbound.hub} reach local apps with a response topic below {outbound.answers}; what they "
            "publish there goes to the request's reply-to"
        )
        if config.hub(outbound.hub).kind == "rabbitmq":
            lines.append(f"note: RabbitMQ before 4.0 has no anonymous terminus, which stream {outbound.stream} needs")
    if outbound.reply_to is not None:
        lines.append(
            f"replies to requests on stream {outbound.stream} come in at "
            f"{outbound.reply_to_for(config.gateway.id)}, for {show_duration(outbound.reply_timeout_s)} unless the "
            "request itself says how long"
        )
    if config.mqtt and outbound.max_bytes < 2 * config.mqtt.packet_max_bytes:
        lines.append(f"note: stream {outbound.stream} is full after one packet of packet_max")
    return lines
