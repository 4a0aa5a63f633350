"""A configuration in sentences, for `lineside check`: what the gateway will do, and what deserves a thought.

Looks at the modes of the files it names, and at nothing else outside the configuration.
"""

from __future__ import annotations

import stat
from pathlib import Path

from gateway.config import Amqp, Config, Hub, Mqtt, Outbound
from gateway.config_values import Listen, fill, show_duration, show_rate, show_size
from security.rules import Rule, words

_WHEN_FULL = {
    "refuse": "new messages are refused",
    "drop-oldest": "the oldest are dropped and recorded as lost",
}
_CLIENT_CERT = {
    "none": "clients are not asked for a certificate",
    "optional": "clients may show a certificate, which {ca} must have issued",
    "required": "clients must show a certificate that {ca} issued",
}


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


def _explain_tls(what: str, listener: Mqtt | Amqp, listens: tuple[Listen, ...]) -> list[str]:
    lines: list[str] = []
    secure = [str(listen) for listen in listens if listen.tls]
    if secure:
        clients = _CLIENT_CERT[listener.asks_for].format(ca=listener.client_ca)
        lines.append(f"{what} with TLS on {', '.join(secure)}: certificate {listener.cert}; {clients}")
        lines += _explain_crl(listener.crl, "clients are")
        for path in (listener.key, listener.key_password_file):
            if path is not None and _readable_by_all(path):
                lines.append(f"note: {path} can be read by every user: chmod 640 {path}")
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
    lines += _explain_crl(bridge.crl, "the bridge's broker is")
    for path in (bridge.key, bridge.key_password_file, bridge.password_file):
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
    lines += _explain_ocsp(hub)
    shares = hub.shares
    rate = "as fast as the line takes it" if hub.rate is None else f"at most {show_rate(hub.rate)}"
    lines.append(
        f"hub {hub.name} is sent to {rate}; where streams wait, urgent ones go first and keep {shares.urgent} % of "
        f"the line, normal ones {shares.normal} %, bulk {shares.bulk} %; within a class, those that keep up have "
        f"{shares.live} %"
    )
    if any(not url.tls and not url.loopback for url in hub.urls):
        lines.append(f"note: hub {hub.name} is reached without TLS")
    for path in (hub.key, hub.key_password_file, hub.password_file):
        if path is not None and _readable_by_all(path):
            lines.append(f"note: {path} can be read by every user: chmod 640 {path}")
    return lines


def _explain_crl(crl: Path | None, whose: str) -> list[str]:
    if crl is None:
        return []
    return [f"{whose} refused if revoked in {crl}, and once that list ends: `lineside pki show {crl}` tells when"]


def _explain_ocsp(hub: Hub) -> list[str]:
    match hub.ocsp:
        case "off":
            return []
        case "require":
            return [
                f"hub {hub.name} is refused unless it staples an OCSP response that says that its certificate is good"
            ]
        case "if-stapled":
            return [
                f"hub {hub.name} is refused if it staples an OCSP response, and not one that says that its certificate "
                "is good",
                f"note: who has stolen hub {hub.name}'s key need staple nothing, unless the certificate says that its "
                'holder does (RFC 7633): ocsp = "require" refuses that',
            ]


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
    if outbound.ack == "disk-or-hub":
        lines.append(
            f"acknowledged on stream {outbound.stream} means: on disk, or accepted by {outbound.hub}, whose copy may "
            f"then be the only one; what it has not accepted within {show_duration(outbound.linger_s)} is written "
            "(and at once: QoS 2, retained messages, requests, other gateways' messages, and all while a local app "
            "reads the stream)"
        )
        if config.hub(outbound.hub).kind == "rabbitmq":
            lines.append(
                f"note: RabbitMQ accepts messages that no queue takes, and loses them; stream {outbound.stream} may "
                "have no other copy"
            )
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
