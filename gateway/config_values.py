"""The values a configuration is made of: sizes, durations, addresses, URLs, topic filters, templates.

Text in, values out. What cannot be read raises ValueError(expected, what to write instead); the second may be missing.
Knows no file and no key.
"""

from __future__ import annotations

import difflib
import ipaddress
import json
import re
import typing
from dataclasses import dataclass, replace
from urllib.parse import urlsplit

ALLOW_PLAINTEXT = "yes, without TLS"
ACCEPT_LOSS = "i accept that acknowledged messages may be lost"
UNIX_PATH_MAX_BYTES = 107
LISTEN_DEFAULT = {"mqtt": "127.0.0.1:1883", "amqp": "127.0.0.1:5672"}
LISTEN_SCHEMES = {"mqtt": ("mqtt", "mqtts", "ws", "wss"), "amqp": ("amqp", "amqps")}
PORT_DEFAULT = {"mqtt": 1883, "mqtts": 8883, "ws": 8080, "wss": 8443, "amqp": 5672, "amqps": 5671}
TLS_SCHEME = {"": "", "mqtt": "mqtts", "ws": "wss", "amqp": "amqps"}
WS_PATH_DEFAULT = "/mqtt"
_URL_PATH = re.compile(r"(?:/[A-Za-z0-9._~/-]{0,255})?")
_SIZE = re.compile(r"(\d{1,18}(?:\.\d{1,18})?)\s*([A-Za-z]+)")
SIZE_UNITS = {
    "B": 1,
    "kB": 1000,
    "MB": 1000**2,
    "GB": 1000**3,
    "TB": 1000**4,
    "KiB": 1 << 10,
    "MiB": 1 << 20,
    "GiB": 1 << 30,
    "TiB": 1 << 40,
}
_DURATION_PART = re.compile(r"(\d{1,18}(?:\.\d{1,18})?)\s*(ms|s|min|m|h|d)")
_DURATION_UNITS_S = {"ms": 0.001, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
RATE_BYTES_S_MIN, RATE_BYTES_S_MAX = 50.0, 1e11
_RATE = re.compile(r"(\d{1,12}(?:\.\d{1,9})?)\s*([A-Za-z]+/s)")
_RATE_UNITS = {"bit/s": 0.125, "kbit/s": 125.0, "Mbit/s": 125e3, "Gbit/s": 125e6, "B/s": 1.0, "kB/s": 1e3, "MB/s": 1e6}
PLACEHOLDER = re.compile(r"\{([^{}]*)\}")


def parse_size(value: object) -> int:
    """Return bytes: an integer, or a number with a unit ("64MiB", "10kB"). Raises ValueError."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    match = _SIZE.fullmatch(value.strip()) if isinstance(value, str) else None
    if match is None:
        raise ValueError('a size such as "64MiB" or "10kB", or a number of bytes')
    unit = match[2]
    if unit not in SIZE_UNITS:
        near = next((known for known in SIZE_UNITS if known.lower() == unit.lower()), None)
        if near is None and len(unit) == 1:
            near = next((known for known in SIZE_UNITS if known.lower() == f"{unit.lower()}ib"), None)
        hint = f"{match[1]}{near}" if near else "64MiB"
        raise ValueError(f"one of the units {', '.join(SIZE_UNITS)}", hint)
    return int(float(match[1]) * SIZE_UNITS[unit])


def parse_duration(value: object) -> float:
    """Return seconds from a number with a unit ("250ms", "1h", "1h30m"). Raises ValueError."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        raise ValueError("a duration with its unit (ms, s, m, h, d)", f"{value}s")
    parts = list(_DURATION_PART.finditer(value)) if isinstance(value, str) else []
    if not parts or "".join(part[0] for part in parts) != typing.cast(str, value).strip():
        raise ValueError('a duration such as "250ms", "20s" or "1h"')
    return sum(float(part[1]) * _DURATION_UNITS_S[part[2]] for part in parts)


def parse_rate(value: object) -> float:
    """Return bytes a second from a line's rate with its unit ("9.6kbit/s", "2Mbit/s", "1200B/s"). Raises ValueError."""
    match = _RATE.fullmatch(value.strip()) if isinstance(value, str) else None
    if match is None:
        raise ValueError('a rate such as "9.6kbit/s" or "2Mbit/s"')
    if match[2] not in _RATE_UNITS:
        near = next((unit for unit in _RATE_UNITS if unit.lower() == match[2].lower()), "kbit/s")
        raise ValueError(f"one of the units {', '.join(_RATE_UNITS)}", f"{match[1]}{near}")
    rate = float(match[1]) * _RATE_UNITS[match[2]]
    if not RATE_BYTES_S_MIN <= rate <= RATE_BYTES_S_MAX:
        raise ValueError("a rate from 400bit/s to 800Gbit/s")
    return rate


def show_rate(bytes_s: float) -> str:
    """A rate for people, in the units the file takes."""
    unit = next((unit for unit in ("Gbit/s", "Mbit/s", "kbit/s") if bytes_s >= _RATE_UNITS[unit]), "bit/s")
    return f"{bytes_s / _RATE_UNITS[unit]:.4g}{unit}"


@dataclass(frozen=True, slots=True)
class Shares:
    """Per cent of a line that each class of streams keeps while all have something to send; together they are 100.

    `live`: per cent of its class that streams which keep up have before those that work off a backlog.
    """

    urgent: int = 70
    normal: int = 20
    bulk: int = 10
    live: int = 80

    def of(self, class_: str) -> int:
        return {"urgent": self.urgent, "normal": self.normal, "bulk": self.bulk}[class_]


def parse_shares(value: object) -> Shares:
    """Read { urgent = 70, normal = 20, bulk = 10, live = 80 }; what is left out is as here. Raises ValueError."""
    known = Shares()
    names = ("urgent", "normal", "bulk", "live")
    whole = 'per cent, each from 1 to 98 and the first three together 100, for "urgent", "normal", "bulk" and "live"'
    write = "{ urgent = 70, normal = 20, bulk = 10, live = 80 }"
    if not isinstance(value, dict) or not set(value) <= set(names):
        raise ValueError(whole, write)
    shares = {name: value.get(name, getattr(known, name)) for name in names}
    if not all(isinstance(each, int) and not isinstance(each, bool) and 1 <= each <= 98 for each in shares.values()):
        raise ValueError(whole, write)
    out = Shares(**shares)
    if out.urgent + out.normal + out.bulk != 100:
        raise ValueError(f"{whole}, and these are {out.urgent + out.normal + out.bulk}", write)
    return out


def show_size(size_bytes: int) -> str:
    """A size for people, in the units the file takes."""
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        if size_bytes >= SIZE_UNITS[unit]:
            return f"{size_bytes / SIZE_UNITS[unit]:.4g}{unit}"
    return f"{size_bytes}B"


def show_duration(duration_s: float) -> str:
    """A duration for people, in the units the file takes."""
    for unit in ("d", "h", "m", "s"):
        if duration_s >= _DURATION_UNITS_S[unit]:
            return f"{duration_s / _DURATION_UNITS_S[unit]:.4g}{unit}"
    return f"{duration_s * 1000:.4g}ms"


def topic_filter_fault(topic_filter: str) -> tuple[str, str] | None:
    """What is wrong with an MQTT topic filter (MQTT 5.0, 4.7), and what might be meant; None if nothing is."""
    if not topic_filter or "\0" in topic_filter or len(topic_filter.encode()) > 65535:
        return "a topic filter of 1 to 65535 bytes", '"alarm/#"'
    if topic_filter.startswith("$"):
        return "a topic filter that does not begin with '$', as apps may not publish there", ""
    levels = topic_filter.split("/")
    for number, level in enumerate(levels):
        if "#" in level and (level != "#" or number != len(levels) - 1):
            head = "/".join([*levels[:number], level.split("#")[0], "#"]).replace("//", "/")
            return "'#' to stand alone as the last level", json.dumps(head)
        if "+" in level and level != "+":
            near = "/".join("+" if "+" in each else each for each in levels)
            return "'+' to stand alone in its level", json.dumps(near)
    return None


def fill(template: str, **values: str) -> str:
    """Replace each `{name}` of a template by its value."""
    return PLACEHOLDER.sub(lambda match: values[match[1]], template)


@dataclass(frozen=True, slots=True)
class Listen:
    """Where to listen: a TCP host and port, or the path of a Unix socket (then host is empty, port 0).

    `scheme` is one of PORT_DEFAULT's where it asks for more than TCP, else empty; `url_path` is a WebSocket's.
    """

    host: str
    port: int
    path: str = ""
    scheme: str = ""
    url_path: str = ""

    @property
    def tls(self) -> bool:
        return self.scheme in ("mqtts", "amqps", "wss")

    @property
    def websocket(self) -> bool:
        return self.scheme in ("ws", "wss")

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach it."""
        return bool(self.path) or is_loopback(self.host)

    def overlaps(self, other: Listen) -> bool:
        """Whether the two cannot both be opened."""
        if self.path or other.path:
            return self.path == other.path
        one, two = _host_key(self.host), _host_key(other.host)
        # Every interface means those of its own family (asyncio sets IPV6_V6ONLY); a name may be of either.
        every = "0.0.0.0" in (one, two) and not (":" in one or ":" in two)
        every_v6 = "::" in (one, two) and not (_is_ipv4(self.host) or _is_ipv4(other.host))
        return self.port == other.port != 0 and (one == two or every or every_v6)

    def __str__(self) -> str:
        if self.path:
            return f"unix:{self.path}"
        where = f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"
        return f"{self.scheme}://{where}{self.url_path}" if self.scheme else where


def _is_ipv4(host: str) -> bool:
    return re.fullmatch(r"[\d.]+", host) is not None


def _host_key(host: str) -> str:
    return "127.0.0.1" if host.lower() == "localhost" else host.lower()


def is_loopback(host: str) -> bool:
    """Whether a host, as written, can only be this machine. Looks nothing up."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def parse_listen(text: str, protocol: str = "mqtt") -> Listen:
    """Read "host:port", "[::1]:port", "unix:/path" or a URL of the protocol's ("mqtts://host:port", "ws://host:port/path").

    Raises ValueError(expected, what to write).
    """
    if text.startswith("unix:"):
        path = text[5:]
        if not path.startswith("/") or len(path.encode()) > UNIX_PATH_MAX_BYTES or "\0" in path:
            raise ValueError(f"an absolute path of at most {UNIX_PATH_MAX_BYTES} bytes after unix:")
        return Listen("", 0, path)
    scheme, separator, rest = text.partition("://")
    if not separator:
        host, port = _parse_host_port(text, PORT_DEFAULT[protocol], "")
        return Listen(host, port)
    schemes = LISTEN_SCHEMES[protocol]
    if scheme not in schemes:
        near = difflib.get_close_matches(scheme.lower(), schemes, 1, 0.0)[0]
        raise ValueError(f"one of the schemes {', '.join(f'{each}://' for each in schemes)}", f"{near}://{rest}")
    where, slash, url_path = rest.partition("/")
    if "@" in where:
        raise ValueError("no user in the address", f"{scheme}://{where.rpartition('@')[2]}{slash}{url_path}")
    host, port = _parse_host_port(where, PORT_DEFAULT[scheme], f"{scheme}://")
    bare = Listen(host, port, "", "" if scheme in ("mqtt", "amqp") else scheme)
    if not bare.websocket:
        if slash:
            raise ValueError("nothing after host and port", f"{scheme}://{where}")
        return bare
    if not _URL_PATH.fullmatch(slash + url_path):
        raise ValueError("a path of letters, digits and -._~/ after the port", f"{scheme}://{where}{WS_PATH_DEFAULT}")
    return replace(bare, url_path=slash + url_path or WS_PATH_DEFAULT)


def _parse_host_port(text: str, port_default: int, before: str) -> tuple[str, int]:
    """`before`: what stands in front of it, for the suggestions."""
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+)\]|([^\s:/\[\]]*)):(\d{1,5})", text)
    if match is None and (meant := _ipv6_meant(text, port_default)):
        raise ValueError("an IPv6 address in brackets, then a colon and the port", before + meant)
    if match is None:
        host = text.strip() if re.fullmatch(r"\s*[\w.-]*[A-Za-z.][\w.-]*\s*", text) else "127.0.0.1"
        port = text.strip(": ") if text.strip(": ").isdecimal() else str(port_default)
        forms = f'"{before}host:port"' if before else '"host:port", "[::1]:port" or "unix:/path"'
        raise ValueError(forms, f"{before}{host}:{port}")
    host, number = match[1] or match[2], int(match[3])
    if not host:
        raise ValueError("a host before the port (0.0.0.0 for every interface)", f"{before}127.0.0.1:{number}")
    if number > 65535:
        raise ValueError("a port from 0 to 65535", f"{before}{f'[{host}]' if match[1] else host}:{port_default}")
    if match[1]:
        try:
            ipaddress.IPv6Address(host)
        except ValueError:
            raise ValueError("an IPv6 address between the brackets", f"{before}[::1]:{number}") from None
    return host, number


def _ipv6_meant(text: str, port_default: int) -> str | None:
    """ "[::1]5672", "::1:5672" or "fe80::1" as it has to be written; None for what has no IPv6 address in it."""
    match = re.fullmatch(r"\s*\[?([0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*?)(?:\]:?|:)(\d{4,5})\s*", text)
    for host, port in ([(match[1], int(match[2]))] if match else []) + [(text.strip(" []"), port_default)]:
        try:
            return f"[{ipaddress.IPv6Address(host)}]:{port if port <= 65535 else port_default}"
        except ValueError:
            continue
    return None


def parse_origin(text: str) -> str:
    """Read a web page's origin as browsers send it (RFC 6454 §6.1), or "*" for any. Raises ValueError."""
    if text in ("*", "null"):
        return text
    if "://" not in text:
        raise ValueError('an origin such as "https://hmi.example", or "*"', f"https://{text}" if text else "")
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError:
        raise ValueError('"https://host" or "https://host:port"') from None
    host = parts.hostname or ""
    if not host or not host.isprintable() or " " in host:
        raise ValueError("a host name or address after ://", f"{parts.scheme}://hmi.example")
    shown = f"[{host}]" if ":" in host else host
    default = {"http": 80, "https": 443}.get(parts.scheme)
    origin = f"{parts.scheme}://{shown}" + ("" if port is None or port == default else f":{port}")
    if origin != text.lower():
        raise ValueError("scheme, host and port only, as browsers send them", origin)
    return origin


@dataclass(frozen=True, slots=True)
class HubUrl:
    """Where a hub listens: `tls` is what amqps:// asks for."""

    tls: bool
    host: str
    port: int

    @property
    def loopback(self) -> bool:
        return is_loopback(self.host)

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'amqps' if self.tls else 'amqp'}://{host}:{self.port}"


@dataclass(frozen=True, slots=True)
class BrokerUrl:
    """Where another MQTT broker listens: host and port, or the path of a Unix socket (then host is empty, port 0)."""

    tls: bool
    host: str
    port: int
    path: str = ""

    @property
    def loopback(self) -> bool:
        return bool(self.path) or is_loopback(self.host)

    def __str__(self) -> str:
        if self.path:
            return f"unix:{self.path}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'mqtts' if self.tls else 'mqtt'}://{host}:{self.port}"


def parse_broker_url(text: str) -> BrokerUrl:
    """Read "mqtt://host[:port]", "mqtts://host[:port]" or "unix:/path". Raises ValueError(expected, what to write)."""
    if text.startswith("unix:"):
        return BrokerUrl(False, "", 0, parse_listen(text).path)
    if "://" not in text:
        raise ValueError("a URL that begins with mqtt://, mqtts:// or unix:", f"mqtt://{text}" if text else "")
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError:
        raise ValueError("mqtt://host:port") from None
    if parts.scheme not in ("mqtt", "mqtts"):
        raise ValueError("the scheme mqtt or mqtts", f"mqtt://{parts.netloc.rpartition('@')[2]}")
    tls = parts.scheme == "mqtts"
    if not parts.hostname or not parts.hostname.isprintable() or " " in parts.hostname:
        raise ValueError("a host name or address after ://", f"{parts.scheme}://127.0.0.1")
    url = BrokerUrl(tls, parts.hostname, port if port is not None else (8883 if tls else 1883))
    if parts.username is not None:
        raise ValueError("no user in the URL, but in `user` and `password_file`", str(url))
    if parts.path not in ("", "/") or parts.query or parts.fragment:
        raise ValueError("nothing after host and port", str(url))
    if url.port == 0:
        raise ValueError("a port from 1 to 65535", str(BrokerUrl(tls, url.host, 8883 if tls else 1883)))
    return url


def parse_hub_url(text: str) -> HubUrl:
    """Read "amqps://host[:port]" or "amqp://host[:port]". Raises ValueError(expected, what to write)."""
    if "://" not in text:
        raise ValueError("a URL that begins with amqps:// or amqp://", f"amqps://{text}" if text else "")
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError:
        raise ValueError("amqps://host:port") from None
    if parts.scheme not in ("amqp", "amqps"):
        raise ValueError("the scheme amqps or amqp", f"amqps://{parts.netloc.rpartition('@')[2]}")
    tls = parts.scheme == "amqps"
    if not parts.hostname or not parts.hostname.isprintable() or " " in parts.hostname:
        raise ValueError("a host name or address after ://", f"{parts.scheme}://hub.example:5671")
    url = HubUrl(tls, parts.hostname, port if port is not None else (5671 if tls else 5672))
    if parts.username is not None:
        raise ValueError("no user in the URL, but in `user` and `password_file`", str(url))
    if parts.path not in ("", "/") or parts.query or parts.fragment:
        raise ValueError("nothing after host and port", str(url))
    if url.port == 0:
        raise ValueError("a port from 1 to 65535", str(HubUrl(tls, url.host, 5671 if tls else 5672)))
    return url
