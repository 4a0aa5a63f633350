"""`publish` and `subscribe`: a small MQTT 5 client for trying a gateway out and for scripts.

A message counts as published once the gateway has acknowledged it, and as received once it has been printed.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from gateway.cli.output import config_option, json_body, json_option, print_json, safe, show_body
from gateway.errors import LinesideError
from gateway.mqtt.topics import check_filter, check_topic

if TYPE_CHECKING:
    from paho.mqtt.client import Client, MQTTMessage

    from gateway.config import Listen

F = TypeVar("F", bound=Callable[..., Any])

WINDOW = 500
KEEP_ALIVE_S = 30
STEP_S = 0.2
SETTLE_S = 5.0
DURABLE_EXPIRY_S = 7 * 86400


def connection_options(command: F) -> F:
    """Where to connect, and as whom."""
    for option in (
        click.option("--password-file", type=click.Path(path_type=Path), help="Holds the password of --user."),
        click.option("--user", help="The user to connect as."),
        click.option("--client-id", default="", help="The MQTT client id; without it, one is made up."),
        click.option(
            "--key", type=click.Path(path_type=Path), help="The key of --cert, where it is not in the same file."
        ),
        click.option("--cert", type=click.Path(path_type=Path), help="The certificate to show (mqtts, wss)."),
        click.option(
            "--ca", type=click.Path(path_type=Path), help="Who must have issued the gateway's certificate (mqtts, wss)."
        ),
        click.option(
            "--to",
            "target",
            help="host:port, unix:/path, mqtts://host:port, ws://host:port/path or wss://..., instead of what the "
            "configuration says.",
        ),
    ):
        command = option(command)
    return config_option(command)


@click.command()
@click.argument("topic")
@click.option("-m", "--message", help="The payload, as text.")
@click.option("--stdin-line", is_flag=True, help="Publish each line of standard input as a message.")
@click.option("-q", "--qos", type=click.IntRange(0, 2), default=1, show_default=True, help="Quality of service.")
@click.option("-r", "--retain", is_flag=True, help="Have it kept for later subscribers.")
@click.option(
    "--timeout", "timeout_s", type=click.FloatRange(min=0.1), default=30.0, show_default=True, help="Seconds."
)
@connection_options
@json_option
def publish(
    topic: str,
    message: str | None,
    stdin_line: bool,
    qos: int,
    retain: bool,
    timeout_s: float,
    config: Path,
    target: str | None,
    client_id: str,
    user: str | None,
    password_file: Path | None,
    ca: Path | None,
    cert: Path | None,
    key: Path | None,
    as_json: bool,
) -> None:
    """Publish to TOPIC and wait until everything is acknowledged; exit status 1 if anything was not."""
    if (message is not None) == stdin_line:
        raise click.UsageError("Give either --message or --stdin-line.")
    _check(check_topic, topic, "TOPIC")
    listen = _target(config, target)
    client = _client(listen, client_id, user, password_file, (ca, cert, key))
    payloads = _lines() if stdin_line else iter([(message or "").encode()])
    publisher = _Publisher(client, timeout_s)
    begun = time.monotonic()
    publisher.connect(listen)
    try:
        publisher.publish(topic, payloads, qos, retain)
    except LinesideError as error:
        done = publisher.done - len(publisher.refused)
        raise LinesideError(f"{error}; {done} acknowledged before") from None
    finally:
        client.disconnect()
        client.loop(STEP_S)
    seconds = time.monotonic() - begun
    acknowledged = publisher.done - len(publisher.refused)
    if as_json:
        print_json({"acknowledged": acknowledged, "refused": publisher.refused, "seconds": round(seconds, 3)})
    elif not publisher.refused:
        word = "acknowledged" if qos else "sent, and with -q 0 not acknowledged"
        click.echo(f"{acknowledged} {word}", err=True)
    if publisher.refused:
        reasons = ", ".join(sorted(set(publisher.refused)))
        raise LinesideError(f"{len(publisher.refused)} of {publisher.done} refused: {reasons}")


def _check(check: Callable[[str], None], text: str, hint: str) -> None:
    try:
        check(text)
    except ValueError as error:
        raise click.BadParameter(f"{safe(text)}: {error}.", param_hint=hint) from None


def _lines() -> Iterator[bytes]:
    for line in sys.stdin.buffer:
        yield line.rstrip(b"\r\n")


class _Publisher:
    """Keeps a window of messages unacknowledged, all on one thread."""

    def __init__(self, client: Client, timeout_s: float) -> None:
        self.done = 0
        self.refused: list[str] = []
        self._client = client
        self._timeout_s = timeout_s
        self._sent = 0
        self._limits = _Limits(WINDOW, 2, True)
        client.on_publish = self._on_publish

    def connect(self, listen: Listen) -> None:
        self._limits = _connect(self._client, listen, self._timeout_s)

    def publish(self, topic: str, payloads: Iterable[bytes], qos: int, retain: bool) -> None:
        if qos > self._limits.qos_max:
            raise LinesideError(f"the gateway takes no QoS {qos}, only up to {self._limits.qos_max}")
        if retain and not self._limits.retain:
            raise LinesideError("the gateway keeps no messages for later subscribers")
        for payload in payloads:
            self._wait_for(self._sent - self._limits.window + 1)
            try:
                self._client.publish(topic, payload, qos, retain)
            except ValueError as error:
                raise LinesideError(f"{topic!r} cannot be published: {error}") from None
            self._sent += 1
            if self._sent % 50 == 0:
                _step(self._client, 0)
        self._wait_for(self._sent)

    def _wait_for(self, count: int) -> None:
        """Until `count` are acknowledged; the timeout begins anew with each acknowledgement."""
        before, since = self.done, time.monotonic()
        while self.done < count:
            _step(self._client, STEP_S)
            if self.done > before:
                before, since = self.done, time.monotonic()
            elif time.monotonic() - since > self._timeout_s:
                raise LinesideError(
                    f"{self._sent - self.done} of {self._sent} not acknowledged within {self._timeout_s:g} s"
                )

    def _on_publish(self, client: Client, userdata: Any, mid: int, reason: Any, properties: Any) -> None:
        self.done += 1
        if reason.is_failure:
            self.refused.append(str(reason))


@click.command()
@click.argument("filter", metavar="FILTER")
@click.option("-n", "--count", type=click.IntRange(min=1), help="End after so many messages.")
@click.option("-q", "--qos", type=click.IntRange(0, 1), default=1, show_default=True, help="Quality of service.")
@click.option("--timeout", "timeout_s", type=click.FloatRange(min=0.1), help="End after so many seconds.")
@click.option(
    "--durable",
    is_flag=True,
    help="Keep the session, so that nothing is missed until next time. Needs --client-id.",
)
@connection_options
@json_option
def subscribe(
    filter: str,
    count: int | None,
    qos: int,
    timeout_s: float | None,
    durable: bool,
    config: Path,
    target: str | None,
    client_id: str,
    user: str | None,
    password_file: Path | None,
    ca: Path | None,
    cert: Path | None,
    key: Path | None,
    as_json: bool,
) -> None:
    """Print topic and payload of what matches FILTER, until interrupted.

    With --count, or --timeout before it, exit status 1 says that fewer came. Each message is acknowledged only after
    it has been printed.
    """
    if durable and not client_id:
        raise click.UsageError("--durable needs --client-id, by which the session is found again.")
    _check(check_filter, filter, "FILTER")
    listen = _target(config, target)
    client = _client(listen, client_id, user, password_file, (ca, cert, key), manual_ack=True)
    printed, ending = 0, False

    def on_message(client: Client, userdata: Any, message: MQTTMessage) -> None:
        nonlocal printed
        if ending or (count is not None and printed >= count):
            return  # not acknowledged: a durable session gets it again
        _print_received(message, as_json)
        printed += 1
        client.ack(message.mid, message.qos)

    client.on_message = on_message
    _connect(client, listen, timeout_s or 30.0, subscribe=(filter, qos), durable=durable)
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    try:
        while count is None or printed < count:
            if deadline is not None and time.monotonic() > deadline:
                break
            _step(client, STEP_S)
    except KeyboardInterrupt:
        pass
    finally:
        ending = True
        if durable and printed:
            _settle(client, filter, qos)
        client.disconnect()
    if count is not None and printed < count:
        raise LinesideError(f"{printed} of {count} messages came")


def _settle(client: Client, filter: str, qos: int) -> None:
    """Wait until the gateway has taken our acknowledgements.

    Closing with unread data makes the kernel reset the connection, and what we sent last may go with it. A
    subscription that changes nothing is answered after everything sent before it.
    """
    from paho.mqtt.subscribeoptions import SubscribeOptions

    answered: list[int] = []
    client.on_subscribe = lambda client, userdata, mid, reasons, properties: answered.append(mid)
    options = SubscribeOptions(qos=qos, retainHandling=SubscribeOptions.RETAIN_DO_NOT_SEND)
    client.subscribe(filter, options=options)
    end = time.monotonic() + SETTLE_S
    while not answered and time.monotonic() < end and client.loop(STEP_S) == 0:
        pass


def _print_received(message: MQTTMessage, as_json: bool) -> None:
    if as_json:
        told: dict[str, Any] = {"topic": message.topic, **json_body(bytes(message.payload)), "qos": message.qos}
        told["retain"] = message.retain
        properties: list[tuple[str, str]] = getattr(message.properties, "UserProperty", None) or []
        if properties:
            told["properties"] = [list(pair) for pair in properties]
        print_json(told)
    else:
        click.echo(f"{safe(message.topic)} {show_body(bytes(message.payload))}")
    sys.stdout.flush()


def _target(config: Path, target: str | None) -> Listen:
    """Where the gateway listens, as seen from this machine."""
    from gateway.config import load, parse_listen

    if target is not None:
        try:
            return parse_listen(target)
        except ValueError as error:
            raise click.UsageError(f"--to: expected {error.args[0]}") from None
    loaded = load(config, check_files=False)
    if loaded.mqtt is None:
        raise LinesideError(f"{config}: there is no [mqtt]; say where to connect with --to host:port")
    plain = [listen for listen in loaded.mqtt.listen if not listen.scheme]
    listen = plain[0] if plain else loaded.mqtt.listen[0]
    return replace(listen, host={"0.0.0.0": "127.0.0.1", "::": "::1"}.get(listen.host, listen.host))


def _client(
    listen: Listen,
    client_id: str,
    user: str | None,
    password_file: Path | None,
    tls_files: tuple[Path | None, Path | None, Path | None],
    *,
    manual_ack: bool = False,
) -> Client:
    from paho.mqtt.client import Client
    from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion

    client = Client(
        CallbackAPIVersion.VERSION2,
        client_id=client_id,
        protocol=MQTTProtocolVersion.MQTTv5,
        transport="unix" if listen.path else "websockets" if listen.websocket else "tcp",
        manual_ack=manual_ack,
        reconnect_on_failure=False,
    )
    client.max_inflight_messages_set(WINDOW)
    if listen.websocket:
        client.ws_set_options(listen.url_path)
    if listen.tls:
        from security.tls import TLSFileError, client_context

        try:
            client.tls_set_context(client_context(*tls_files))
        except TLSFileError as error:
            raise LinesideError(str(error)) from None
    elif any(tls_files):
        raise click.UsageError(f"--ca, --cert and --key are for TLS, and {listen} has none.")
    if user is not None:
        client.username_pw_set(user, _password(password_file))
    return client


def _password(path: Path | None) -> str | None:
    if path is None:
        return None
    try:
        return path.read_text().rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        raise LinesideError(f"{path}: {error}") from None


@dataclass(frozen=True, slots=True)
class _Limits:
    """What the gateway takes, as it said when we connected (MQTT 5.0, 3.2.2.3). paho heeds none of it by itself."""

    window: int
    qos_max: int
    retain: bool


def _connect(
    client: Client, listen: Listen, timeout_s: float, subscribe: tuple[str, int] | None = None, durable: bool = False
) -> _Limits:
    """Connect, and subscribe if asked, or raise LinesideError that says who refused and why."""
    from paho.mqtt.packettypes import PacketTypes
    from paho.mqtt.properties import Properties

    outcome: dict[str, Any] = {}

    def on_connect(client: Client, userdata: Any, flags: Any, reason: Any, properties: Any) -> None:
        outcome["connect"] = reason
        outcome["properties"] = properties
        if not reason.is_failure and subscribe is not None:
            try:
                client.subscribe(*subscribe)
            except ValueError:
                outcome["invalid"] = True

    def on_subscribe(client: Client, userdata: Any, mid: int, reasons: list[Any], properties: Any) -> None:
        outcome["subscribe"] = reasons[0]

    def on_disconnect(client: Client, userdata: Any, flags: Any, reason: Any, properties: Any) -> None:
        if flags.is_disconnect_packet_from_server:
            client.user_data_set(f"the gateway ended the connection: {reason}")

    client.on_connect, client.on_subscribe, client.on_disconnect = on_connect, on_subscribe, on_disconnect
    properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
    properties.ReceiveMaximum = 100
    if durable:
        properties.SessionExpiryInterval = DURABLE_EXPIRY_S
    try:
        client.connect_timeout = min(timeout_s, 10.0)
        client.connect(
            listen.path or listen.host,
            listen.port or 1,
            KEEP_ALIVE_S,
            clean_start=not durable,
            properties=properties,
        )
    except (OSError, ValueError) as error:
        raise LinesideError(f"no MQTT at {listen}: {error}; is the gateway running?") from None
    deadline = time.monotonic() + timeout_s
    wanted = "subscribe" if subscribe else "connect"
    while wanted not in outcome:
        if time.monotonic() > deadline:
            raise LinesideError(f"{listen} did not answer within {timeout_s:g} s")
        try:
            _step(client, STEP_S)
        except LinesideError:
            if "connect" in outcome and outcome["connect"].is_failure:
                break
            raise
        if outcome.get("invalid"):
            raise LinesideError(f"{subscribe[0] if subscribe else ''!r} is not a topic filter")
        if "connect" in outcome and outcome["connect"].is_failure:
            break
    for step in ("connect", "subscribe"):
        if step in outcome and outcome[step].is_failure:
            raise LinesideError(f"{listen} refused to {step}: {outcome[step]}")
    told = outcome["properties"]
    return _Limits(
        window=min(WINDOW, getattr(told, "ReceiveMaximum", WINDOW)),
        qos_max=getattr(told, "MaximumQoS", 2),
        retain=bool(getattr(told, "RetainAvailable", 1)),
    )


def _step(client: Client, wait_s: float) -> None:
    code = client.loop(wait_s)
    if code:
        from paho.mqtt.client import error_string

        told: str | None = client.user_data_get()
        raise LinesideError(told or f"the connection to the gateway was lost: {error_string(code)}")
