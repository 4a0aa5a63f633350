"""The rules that bind several keys of a configuration, and the files it names.

They read the raw file, not the models, so that a wrong key in one place hides nothing in another; what has the wrong
type is passed over, as the models complain of it. Opens files to see that they can be read; looks up no host.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import stat
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from gateway.config_fields import path_fault, resolve_path
from gateway.config_report import Report, assign, dotted
from gateway.config_values import (
    ACCEPT_LOSS,
    ALLOW_PLAINTEXT,
    LISTEN_DEFAULT,
    PLACEHOLDER,
    TLS_SCHEME,
    BrokerUrl,
    HubUrl,
    Listen,
    parse_broker_url,
    parse_duration,
    parse_hub_url,
    parse_listen,
)
from gateway.toml_lines import Path as KeyPath
from security import passwords
from security.passwords import PasswordFileError
from security.tls_faults import TOKEN_MARK

STREAMS_MAX = 1000
RESERVED_STREAMS = frozenset({"local"})
_T = typing.TypeVar("_T")


def _tables(raw: Mapping[str, Any], key: str) -> list[tuple[int, dict[str, Any]]]:
    found = raw.get(key)
    return [(n, each) for n, each in enumerate(found) if isinstance(each, dict)] if isinstance(found, list) else []


def _table(raw: Mapping[str, Any], key: str) -> dict[str, Any]:
    found = raw.get(key)
    return found if isinstance(found, dict) else {}


def _strings(value: Any) -> list[tuple[int, str]]:
    return [(n, each) for n, each in enumerate(value) if isinstance(each, str)] if isinstance(value, list) else []


def _tried(parse: Callable[[str], _T], text: str) -> _T | None:
    """The value, or None for what the models have complained about already."""
    try:
        return parse(text)
    except ValueError:
        return None


def check_all(raw: Mapping[str, Any], base: Path, report: Report, *, check_files: bool) -> None:
    """Report everything that no single key's own rule can see. `base`: what relative paths are relative to."""
    _check_gateway(raw, report)
    if check_files:
        _check_encryption_keys(raw, base, report)
    _check_listeners(raw, base, report, check_files)
    _check_hubs(raw, base, report, check_files)
    _check_bridge(raw, base, report, check_files)
    _check_streams(raw, report)
    _check_addresses(raw, report)
    _check_access(raw, report)
    if check_files:
        _check_password_files(raw, base, report)


def _check_gateway(raw: Mapping[str, Any], report: Report) -> None:
    gateway = _table(raw, "gateway")
    if gateway.get("synchronous") in ("NORMAL", "OFF") and "accept_loss" not in gateway:
        expected = "FULL, as less would break the promise that acknowledged means on disk"
        write = f'synchronous = "FULL", or add accept_loss = {json.dumps(ACCEPT_LOSS)}'
        report.add(("gateway", "synchronous"), expected, write)


def _check_encryption_keys(raw: Mapping[str, Any], base: Path, report: Report) -> None:
    names = _strings(_table(raw, "gateway").get("encryption_keys", []))
    if not names:
        return
    from security.atrest import KeyFileError, Keyring, read_key

    keys = []
    for number, name in names:
        try:
            keys.append(read_key(resolve_path(name, base)))
        except KeyFileError as error:
            report.add(("gateway", "encryption_keys", number), f"a file with a key ({error})")
    try:
        if len(keys) == len(names):
            Keyring(keys)
    except KeyFileError as error:
        report.add(("gateway", "encryption_keys"), f"different keys ({error})")


def _check_listeners(raw: Mapping[str, Any], base: Path, report: Report, check_files: bool) -> None:
    taken: list[tuple[KeyPath, Listen]] = []
    for key in ("mqtt", "amqp"):
        table = _table(raw, key)
        default = [LISTEN_DEFAULT[key]] if key in raw else []
        for number, text in _strings(table.get("listen", default)):
            listen = _tried(partial(parse_listen, protocol=key), text)
            if listen is None:
                continue
            loc: KeyPath = (key, "listen", number)
            for other_loc, other in taken:
                if listen.overlaps(other):
                    report.add(loc, f"an address of its own, not that of {dotted(other_loc)} ({other})")
                    break
            if listen.tls and "cert" not in table:
                write = f"{report.example((key, 'cert'))} and {report.example((key, 'key'))} under [{key}]"
                report.add(loc, f"`cert` and `key` under [{key}], as this address asks for TLS", write)
            elif not listen.tls and not listen.loopback and table.get("allow_plaintext") != ALLOW_PLAINTEXT:
                here = str(replace(listen, host="127.0.0.1"))
                secure = f"{TLS_SCHEME[listen.scheme or key]}://{str(listen).partition('://')[2] or listen}"
                words = f"allow_plaintext = {json.dumps(ALLOW_PLAINTEXT)} under [{key}]"
                expected = "a loopback address or one with TLS, as others could read and write along"
                report.add(loc, expected, f'"{here}", "{secure}", or {words}')
            taken.append((loc, listen))
        _check_listener_tls(key, table, base, report, check_files)


def _check_listener_tls(key: str, table: Mapping[str, Any], base: Path, report: Report, check_files: bool) -> None:
    needs = (
        ("cert", "key"),
        ("key", "cert"),
        ("key_password_file", "key"),
        ("client_ca", "cert"),
        ("crl", "client_ca"),
    )
    for one, other in needs:
        if one in table and other not in table:
            report.add((key, other), f"it beside `{one}`", report.example((key, other)), missing=True)
            break
    if table.get("client_cert") in ("optional", "required") and "client_ca" not in table:
        expected = "`client_ca` beside it: the authority whose certificates are good"
        report.add((key, "client_cert"), expected, report.example((key, "client_ca")))
    files = ("cert", "key", "key_password_file", "client_ca", "crl")
    names = [name for name in files if isinstance(table.get(name), str)]
    if not check_files or not _check_files((key,), table, names, base, report) or not {"cert", "key"} <= set(names):
        return
    paths = {name: resolve_path(table[name], base) for name in names}
    from security.tls import TLSFileError, server_context  # only here: OpenSSL takes a while to load

    try:
        server_context(
            paths["cert"],
            paths["key"],
            paths.get("client_ca"),
            crl=paths.get("crl"),
            key_password=paths.get("key_password_file"),
        )
    except TLSFileError as error:
        order = ("key_password_file", "key", "cert", "client_ca", "crl")
        at = next((name for name in order if paths.get(name) == error.path), "cert")
        report.add((key, at), f"a file that TLS can use ({error})")


def _check_hubs(raw: Mapping[str, Any], base: Path, report: Report, check_files: bool) -> None:
    names: dict[str, int] = {}
    for number, hub in _tables(raw, "hub"):
        name = hub.get("name")
        if isinstance(name, str) and names.setdefault(name, number) != number:
            report.add(("hub", number, "name"), f"another name than that of hub[{names[name]}]")
        _check_hub_urls(number, hub, report)
        _check_hub_credentials(number, hub, report)
        if check_files:
            _check_hub_files(number, hub, base, report)
        low, high = hub.get("retry_min", "200ms"), hub.get("retry_max", "30s")
        if isinstance(low, str) and isinstance(high, str):
            low_s, high_s = _tried(parse_duration, low), _tried(parse_duration, high)
            if low_s and high_s and low_s > high_s:
                at = ("hub", number, "retry_max" if "retry_max" in hub else "retry_min")
                report.add(at, f"retry_min ({low}) to be no longer than retry_max ({high})")


def _check_hub_urls(number: int, hub: Mapping[str, Any], report: Report) -> None:
    for index, text in _strings(hub.get("urls")):
        url = _tried(parse_hub_url, text)
        if url is None or url.tls or url.loopback:
            continue
        loc: KeyPath = ("hub", number, "urls", index)
        if hub.get("user") is not None and hub.get("sasl", "auto") in ("auto", "plain"):
            secure = _over_tls(url)
            report.add(loc, "amqps://, as a password would travel in clear text", json.dumps(secure))
        elif hub.get("allow_plaintext") != ALLOW_PLAINTEXT:
            secure = _over_tls(url)
            words = f"add allow_plaintext = {json.dumps(ALLOW_PLAINTEXT)} to this [[hub]]"
            report.add(loc, "amqps:// for a hub that is not on this machine", f"{json.dumps(secure)}, or {words}")


def _over_tls(url: HubUrl) -> str:
    """What to write instead of a URL without TLS."""
    return str(HubUrl(True, url.host, 5671 if url.port == 5672 else url.port))


def _check_hub_credentials(number: int, hub: Mapping[str, Any], report: Report) -> None:
    here: KeyPath = ("hub", number)
    _check_pairs(here, hub, report)
    sasl = hub.get("sasl", "auto")
    if sasl == "plain" and "user" not in hub:
        report.add((*here, "sasl"), "`user` and `password_file` beside it", 'sasl = "auto", or add both')
    if sasl == "external":
        if "cert" not in hub:
            report.add((*here, "sasl"), "`cert` and `key` beside it", 'sasl = "auto", or add both')
        for index, text in _strings(hub.get("urls")):
            url = _tried(parse_hub_url, text)
            if url and not url.tls:
                secure = _over_tls(url)
                report.add((*here, "urls", index), 'amqps://, as sasl = "external" needs TLS', json.dumps(secure))
    if hub.get("ocsp") in ("if-stapled", "require"):
        _check_hub_ocsp(here, hub, report)


def _check_hub_ocsp(here: KeyPath, hub: Mapping[str, Any], report: Report) -> None:
    for index, text in _strings(hub.get("urls")):
        url = _tried(parse_hub_url, text)
        if url and not url.tls:
            secure = _over_tls(url)
            expected = f'amqps://, as ocsp = "{hub["ocsp"]}" is about its certificate'
            report.add((*here, "urls", index), expected, f'{json.dumps(secure)}, or ocsp = "off"')
    try:
        import security.stapled  # noqa: F401  here, so that a library that lacks something is told before a hub is dialled
    except (ImportError, AttributeError) as error:
        report.add((*here, "ocsp"), f"pyOpenSSL and cryptography as pinned by this version ({error})", '"off"')


def _check_pairs(here: KeyPath, table: Mapping[str, Any], report: Report) -> None:
    """A certificate goes with its key, a revocation list with its authority, a user with a password."""
    for key, other in (
        ("cert", "key"),
        ("key", "cert"),
        ("key_password_file", "key"),
        ("crl", "ca"),
        ("user", "password_file"),
        ("password_file", "user"),
    ):
        if key in table and other not in table:
            example = report.example((*here, other))
            report.add((*here, other), f"it beside `{key}`", example, missing=True)


def _check_bridge(raw: Mapping[str, Any], base: Path, report: Report, check_files: bool) -> None:
    bridge = _table(raw, "bridge")
    if not bridge:
        return
    _check_pairs(("bridge",), bridge, report)
    if check_files:
        _check_files(("bridge",), bridge, _CLIENT_FILES, base, report)
    text = bridge.get("url")
    url = _tried(parse_broker_url, text) if isinstance(text, str) else None
    if url is not None:
        _check_bridge_url(url, bridge, raw, report)
    _check_bridge_loop(bridge, raw, report)


def _check_bridge_url(url: BrokerUrl, bridge: Mapping[str, Any], raw: Mapping[str, Any], report: Report) -> None:
    loc: KeyPath = ("bridge", "url")
    if not url.tls and not url.loopback:
        secure = json.dumps(str(BrokerUrl(True, url.host, 8883 if url.port == 1883 else url.port)))
        if bridge.get("user") is not None:
            report.add(loc, "mqtts://, as a password would travel in clear text", assign(loc, secure))
        elif bridge.get("allow_plaintext") != ALLOW_PLAINTEXT:
            words = f"add allow_plaintext = {json.dumps(ALLOW_PLAINTEXT)} to [bridge]"
            report.add(loc, "mqtts:// for a broker that is not on this machine", f"{assign(loc, secure)}, or {words}")
    if "mqtt" in raw:
        there = Listen(url.host, url.port, url.path)
        default = [LISTEN_DEFAULT["mqtt"]]
        for number, text in _strings(_table(raw, "mqtt").get("listen", default)):
            listen = _tried(parse_listen, text)
            if listen is not None and listen.overlaps(there):
                own = f"another broker's address, not our own mqtt.listen[{number}]"
                report.add(loc, own, "the other broker's address, or no [mqtt] table")


def _check_bridge_loop(bridge: Mapping[str, Any], raw: Mapping[str, Any], report: Report) -> None:
    """A client of MQTT 3.1.1 gets back what it publishes itself, if it reads those topics: it would go in circles."""
    if bridge.get("version", "5.0") != "3.1.1":
        return
    from gateway.routing import filters_overlap  # it imports the models, which import these rules

    if "topics" in bridge:
        read: list[tuple[KeyPath, str]] = [
            (("bridge", "topics", index), each) for index, each in _strings(bridge["topics"])
        ]
    else:
        read = [
            (("outbound", number, "topics", index), each)
            for number, table in _tables(raw, "outbound")
            for index, each in _strings(table.get("topics"))
        ]
    gateway = _table(raw, "gateway").get("id")
    for number, table in _tables(raw, "inbound"):
        topic = table.get("topic")
        if not isinstance(topic, str):
            continue
        written = _topic_range(topic.replace("{gateway}", gateway if isinstance(gateway, str) else "+"))
        for loc, each in read:
            if filters_overlap(each, written):
                back = f"inbound[{number}].topic ({topic})"
                expected = f"a filter that does not take {back}, or it comes back, as 3.1.1 has no 'no local'"
                report.add(loc, expected, 'another filter, or version = "5.0" under [bridge]')


def _topic_range(template: str) -> str:
    """A filter for every topic that a template can become: a value may hold any number of levels."""
    levels = template.split("/")
    filled = next((n for n, level in enumerate(levels) if PLACEHOLDER.search(level)), None)
    return template if filled is None else "/".join([*levels[:filled], "#"])


_CLIENT_FILES = ("ca", "cert", "key", "key_password_file", "crl", "password_file")
_PEM_MARKS = {
    "ca": re.compile(rb"-----BEGIN (TRUSTED )?CERTIFICATE-----"),
    "client_ca": re.compile(rb"-----BEGIN (TRUSTED )?CERTIFICATE-----"),
    "cert": re.compile(rb"-----BEGIN (TRUSTED )?CERTIFICATE-----"),
    "key": re.compile(rb"-----BEGIN ([A-Z ]*PRIVATE KEY|PKCS#11 PROVIDER URI)-----"),
    "crl": re.compile(rb"-----BEGIN X509 CRL-----"),
}
_PEM_NAMES = {
    "ca": "a certificate",
    "client_ca": "a certificate",
    "cert": "a certificate",
    "key": "a private key",
    "crl": "a revocation list",
}
_PEM_MAX_BYTES = 4 << 20


def _check_hub_files(number: int, hub: Mapping[str, Any], base: Path, report: Report) -> None:
    good = _check_files(("hub", number), hub, _CLIENT_FILES, base, report)
    key = hub.get("key")
    if good and isinstance(key, str) and hub.get("ocsp") in ("if-stapled", "require"):
        path = resolve_path(key, base)
        content = _read_file(path)
        if isinstance(content, bytes) and TOKEN_MARK in content:
            expected = f"a file with the key itself, as {path} names one in a token, which ocsp does without"
            report.add(("hub", number, "key"), expected, 'another key, or ocsp = "off"')


def _check_files(here: KeyPath, table: Mapping[str, Any], keys: Sequence[str], base: Path, report: Report) -> bool:
    """Report what can't be read or is not of its kind; return whether all were good."""
    before = len(report.problems)
    for key in keys:
        value = table.get(key)
        if not isinstance(value, str) or path_fault(value):
            continue
        loc: KeyPath = (*here, key)
        path = resolve_path(value, base)
        content = _read_file(path)
        if isinstance(content, str):
            report.add(loc, f"a file that can be read ({path}: {content})")
        elif key in _PEM_MARKS and not _PEM_MARKS[key].search(content):
            report.add(loc, f"{_PEM_NAMES[key]} in PEM form ({path} holds none)")
        elif key in ("password_file", "key_password_file") and not content.strip():
            report.add(loc, f"a password in the file ({path} is empty)")
    return len(report.problems) == before


def _read_file(path: Path) -> bytes | str:
    """The content, or what is in the way."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return "not a regular file"
        with path.open("rb") as file:
            return file.read(_PEM_MAX_BYTES)
    except OSError as error:
        if isinstance(error, PermissionError):
            return f"not for user {os.geteuid()} to read"
        return error.strerror or str(error)


def _check_access(raw: Mapping[str, Any], report: Report) -> None:
    files = [key for key in ("mqtt", "amqp") if "password_file" in _table(raw, key)]
    listener = next((key for key in ("mqtt", "amqp") if key in raw), "mqtt")
    for number, rule in _tables(raw, "access"):
        here: KeyPath = ("access", number)
        if not rule.get("publish") and not rule.get("subscribe"):
            example = report.example((*here, "publish"))
            report.add((*here, "publish"), "`publish` or `subscribe` in a rule", example, missing=True)
        who = rule.get("who")
        names = _strings([who] if isinstance(who, str) else who)
        if not files and names and all(each.startswith("user:") for _, each in names):
            expected = "a password_file in [mqtt] or [amqp], as nobody can prove to be that user without"
            report.add((*here, "who"), expected, f'password_file = "/etc/lineside/passwords" under [{listener}]')


def _check_password_files(raw: Mapping[str, Any], base: Path, report: Report) -> None:
    for key in ("mqtt", "amqp"):
        value = _table(raw, key).get("password_file")
        if not isinstance(value, str) or path_fault(value):
            continue
        path = resolve_path(value, base)
        try:
            passwords.read(path)
        except PasswordFileError as error:
            write = "" if error.line else f"lineside passwd {path} USER"
            report.add((key, "password_file"), f"a password file that can be used ({error})", write)


def _check_addresses(raw: Mapping[str, Any], report: Report) -> None:
    """The first [[address]] that takes an address decides: one that an earlier covers says nothing."""
    earlier = _Filters()
    for number, table in _tables(raw, "address"):
        name = table.get("name")
        if isinstance(name, str):
            loc: KeyPath = ("address", number, "name")
            taken = earlier.covering(name)
            if taken is not None:
                expected = f"an address that {dotted(taken)} above it does not take already"
                report.add(loc, expected, f"this table above that of {dotted(taken[:2])}")
            earlier.add(name, loc)


def _check_streams(raw: Mapping[str, Any], report: Report) -> None:
    hubs = _hub_names(raw)
    names: dict[str, KeyPath] = {}
    filters = _Filters()
    addresses: dict[tuple[str, str], KeyPath] = {}
    count = 0
    for direction in ("outbound", "inbound"):
        for number, table in _tables(raw, direction):
            here: KeyPath = (direction, number)
            count += 1
            if count == STREAMS_MAX + 1:
                report.add(here, f"at most {STREAMS_MAX} streams altogether")
            _check_stream_name((*here, "stream"), table.get("stream"), names, report)
            _check_stream_hub((*here, "hub"), table.get("hub"), hubs, report)
            if direction == "outbound":
                _check_stream_topics((*here, "topics"), table.get("topics"), filters, report)
            else:
                source = (str(table.get("hub")), str(table.get("address")))
                if "address" in table and addresses.setdefault(source, here) != here:
                    other = dotted(addresses[source])
                    report.add((*here, "address"), f"another address than that of {other}, of the same hub")
    for number, table in _tables(raw, "outbound"):
        _check_reply_to(("outbound", number), table, raw, report)
    _check_answers(raw, report)


def _check_answers(raw: Mapping[str, Any], report: Report) -> None:
    """Answers to a hub's requests: one stream a hub, its one filter the prefix of all their topics."""
    hubs: dict[str, KeyPath] = {}
    for number, table in _tables(raw, "outbound"):
        address, hub = table.get("address"), table.get("hub")
        if not isinstance(address, str) or "{requester}" not in address:
            continue
        here: KeyPath = ("outbound", number)
        if address != "{requester}":
            report.add((*here, "address"), "{requester} alone, as it is a whole address", 'address = "{requester}"')
        topics = table.get("topics")
        found = [each for _, each in _strings(topics)]
        prefix = found[0][:-2] if len(found) == 1 and found[0].endswith("/#") else ""
        if isinstance(topics, list) and (not prefix or "+" in prefix):
            expected = "one filter that ends with /# and has no other wildcard, for answers to requests of the hub"
            report.add((*here, "topics"), expected, f'topics = ["reply/{hub}/#"]')
        if isinstance(hub, str) and hubs.setdefault(hub, here) != here:
            report.add((*here, "address"), f"no second stream for answers to {hub}, which {dotted(hubs[hub])} has")


def _check_reply_to(here: KeyPath, table: Mapping[str, Any], raw: Mapping[str, Any], report: Report) -> None:
    """Replies come in where an inbound stream of the same hub receives."""
    reply_to = table.get("reply_to")
    if reply_to is None and "reply_timeout" in table:
        report.add((*here, "reply_to"), "it beside `reply_timeout`", report.example((*here, "reply_to")), missing=True)
    if not isinstance(reply_to, str):
        return
    gateway = _table(raw, "gateway").get("id")
    addresses = {
        _filled(each["address"], gateway, each.get("stream")): each["address"]
        for _, each in _tables(raw, "inbound")
        if isinstance(each.get("address"), str) and each.get("hub") == table.get("hub")
    }
    if _filled(reply_to, gateway, None) in addresses:
        return
    near = difflib.get_close_matches(reply_to, addresses, 1, 0.5)
    there = f"this hub has {', '.join(addresses)}" if addresses else "this hub has none"
    expected = f"the address of an [[inbound]] of the same hub, where replies can come in ({there})"
    loc: KeyPath = (*here, "reply_to")
    report.add(loc, expected, assign(loc, json.dumps(near[0])) if near else "an [[inbound]] with this address")


def _filled(template: str, gateway: Any, stream: Any) -> str:
    filled = template.replace("{gateway}", gateway) if isinstance(gateway, str) else template
    return filled.replace("{stream}", stream) if isinstance(stream, str) else filled


def _hub_names(raw: Mapping[str, Any]) -> list[str] | None:
    """None where a hub's name cannot be told: then no stream is blamed for naming it."""
    tables = [hub for _, hub in _tables(raw, "hub")]
    names = [hub["name"] for hub in tables if isinstance(hub.get("name"), str)]
    return names if len(names) == len(tables) and isinstance(raw.get("hub", []), list) else None


def _check_stream_name(loc: KeyPath, name: Any, names: dict[str, KeyPath], report: Report) -> None:
    if not isinstance(name, str):
        return
    if name in RESERVED_STREAMS:
        report.add(loc, "another name, as this one is the gateway's own", assign(loc, f'"{name}-1"'))
    elif names.setdefault(name, loc) != loc:
        report.add(loc, f"a name of its own, not that of {dotted(names[name])}", assign(loc, f'"{name}-2"'))


def _check_stream_hub(loc: KeyPath, name: Any, hubs: list[str] | None, report: Report) -> None:
    if not isinstance(name, str) or hubs is None or name in hubs:
        return
    near = difflib.get_close_matches(name, hubs, 1, 0.5) or hubs[:1]
    known = (
        f"the name of a [[hub]] ({', '.join(dict.fromkeys(hubs))})"
        if hubs
        else "the name of a [[hub]], and there is none"
    )
    report.add(loc, known, assign(loc, json.dumps(near[0])) if near else "a [[hub]] of that name")


def _check_stream_topics(loc: KeyPath, topics: Any, earlier: _Filters, report: Report) -> None:
    """The first stream whose filter takes a topic gets it: a filter that an earlier one covers takes nothing."""
    for index, topic_filter in _strings(topics):
        taken = earlier.covering(topic_filter)
        if taken is not None:
            expected = f"a filter that {dotted(taken)} above it does not take already"
            report.add((*loc, index), expected, f"this table above that of {dotted(taken[:2])}")
    for index, topic_filter in _strings(topics):
        earlier.add(topic_filter, (*loc, index))


class _Filters:
    """The topic filters seen so far, level by level."""

    def __init__(self) -> None:
        self._below: dict[str, _Filters] = {}
        self._loc: KeyPath | None = None

    def add(self, topic_filter: str, loc: KeyPath) -> None:
        here = self
        for level in topic_filter.split("/"):
            here = here._below.setdefault(level, _Filters())
        here._loc = here._loc or loc

    def covering(self, topic_filter: str) -> KeyPath | None:
        """Where a filter stands that takes every topic this one takes; None if there is none."""
        nodes = [self]
        for level in topic_filter.split("/"):
            for node in nodes:
                if (rest := node._below.get("#")) is not None and rest._loc is not None:
                    return rest._loc
            if level == "#":
                return None
            nodes = [node._below[each] for node in nodes for each in {level, "+"} if each in node._below]
        found = [*nodes, *(node._below["#"] for node in nodes if "#" in node._below)]
        return next((node._loc for node in found if node._loc is not None), None)
