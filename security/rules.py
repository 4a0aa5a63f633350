"""Access rules: who may publish to, and subscribe to, what. Pure: frozen values in, a verdict with its reason out.

**The first rule that decides wins**, in the order of the file, as in a firewall. A rule is about some peers (`who`) and
about topics, written as MQTT filters. Where no rule exists everything is allowed; as soon as one does, what no rule
allows is refused.

*Publishing* a topic: the first rule with a pattern that takes the topic decides.

*Subscribing* to a filter asks for every topic that the filter can match, so a rule **allows** it only with one pattern
that covers the whole of it (`a/#` is not allowed by `a/b/#`), and a rule **denies** it as soon as they share one topic.
That is stricter than need be where several rules together would cover a filter, never laxer: whatever is allowed
contains no topic that is not (see `tests/security/test_rules.py`). `$share/group/filter` is judged by the filter in it.
Wildcards take no topic that begins with `$`, so `$SYS/#` has to be named to be allowed.

AMQP addresses are topics of the same name: sending to one is publishing, receiving from one subscribing.

Patterns hold `{client}`, `{user}`, `{gateway}` and `{cn}`. A value that is missing or empty, holds `/ + #` or a control
character, or begins with `$` makes its pattern match nothing, so nobody widens a rule by the name he gives himself.
"""

from __future__ import annotations

import difflib
import ipaddress
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import Enum
from typing import Final, TypeAlias

from security.filters import covers, inside_share, is_filter, is_topic, matches, overlap

PLACEHOLDERS: Final = ("client", "user", "gateway", "cn")
PATTERN_BYTES_MAX: Final = 65_535
_PLACEHOLDER: Final = re.compile(r"\{([^{}]*)\}")

Address: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address
Network: TypeAlias = ipaddress.IPv4Network | ipaddress.IPv6Network


class Action(Enum):
    """What a peer wants to do."""

    PUBLISH = "publish to"
    SUBSCRIBE = "subscribe to"
    SEND = "send to"  # AMQP
    RECEIVE = "receive from"  # AMQP


@dataclass(frozen=True, slots=True)
class Identity:
    """Who a peer is. Only `client` is what it says of itself; the rest has been verified, or is missing.

    `user`: of a password that was right. `cn`, `names`: common name, and it with all alternative names, of a verified
    certificate. `uid`: the kernel's word, on a Unix socket. `address`: None there. `protocol`: "mqtt" or "amqp".
    """

    protocol: str
    client: str = ""
    user: str | None = None
    cn: str | None = None
    names: tuple[str, ...] = ()
    uid: int | None = None
    address: Address | None = None

    @property
    def anonymous(self) -> bool:
        """Nothing vouches for the peer: no password, no certificate, no uid."""
        return self.user is None and self.cn is None and not self.names and self.uid is None

    @property
    def local(self) -> bool:
        """On this machine."""
        return self.address is None or self.address.is_loopback

    def __str__(self) -> str:
        parts = [
            "" if self.user is None else f"user:{self.user}",
            *(f"cn:{name}" for name in self.names or ((self.cn,) if self.cn is not None else ())),
            "" if self.uid is None else f"uid:{self.uid}",
            f"client:{self.client}" if self.client else "",
            "" if self.address is None else f"address:{self.address}",
        ]
        return ", ".join(part for part in parts if part) or "anonymous"


class Kind(Enum):
    """What a word of `who` looks at."""

    ANYBODY = "*"
    ANONYMOUS = "anonymous"
    USER = "user"
    CN = "cn"
    CLIENT = "client"
    UID = "uid"
    ADDRESS = "address"
    PROTOCOL = "protocol"


@dataclass(frozen=True, slots=True)
class Who:
    """One word of `who`. `value`: a pattern in which `*` stands for any text; of an address, the network's."""

    kind: Kind
    value: str = ""
    network: Network | None = None

    def __str__(self) -> str:
        return f"{self.kind.value}:{self.value}" if self.value else self.kind.value


@dataclass(frozen=True, slots=True)
class Rule:
    """`place`: where it stands, for explanations."""

    who: tuple[Who, ...]
    publish: tuple[str, ...] = ()
    subscribe: tuple[str, ...] = ()
    deny: bool = False
    place: str = ""


@dataclass(frozen=True, slots=True)
class Rules:
    """All rules in their order, and the gateway's name, which `{gateway}` stands for."""

    rules: tuple[Rule, ...] = ()
    gateway: str = ""


@dataclass(frozen=True, slots=True)
class Clause:
    """One pattern of one rule as it reads for one identity: placeholders filled."""

    filter: str
    pattern: str
    rule: Rule
    who: Who


@dataclass(frozen=True, slots=True)
class Verdict:
    """`clause`: what decided; None where no rule did. `text`: the whole in a sentence."""

    allowed: bool
    text: str
    clause: Clause | None = None


def decide(rules: Rules, identity: Identity, action: Action, name: str) -> Verdict:
    """May this identity do this to that topic, filter or address? And why."""
    if not rules.rules:
        return Verdict(True, "allowed, as there is no rule")
    return judge(clauses(rules, identity, action), action, name)


def clauses(rules: Rules, identity: Identity, action: Action) -> tuple[Clause, ...]:
    """The patterns that concern this identity and action, in order; made once for many `judge`."""
    found: list[Clause] = []
    values = _values(identity, rules.gateway)
    for rule in rules.rules:
        who = next((each for each in rule.who if _is(each, identity)), None)
        if who is None:
            continue
        patterns = rule.publish if action in (Action.PUBLISH, Action.SEND) else rule.subscribe
        for pattern in patterns:
            filled = _fill(pattern, values)
            if filled is not None:
                found.append(Clause(filled, pattern, rule, who))
    return tuple(found)


def judge(applicable: tuple[Clause, ...], action: Action, name: str) -> Verdict:
    """As `decide`, by the clauses of the one who asks, where rules exist."""
    if action in (Action.PUBLISH, Action.SEND):
        if not is_topic(name):
            return Verdict(False, f"refused, as {json.dumps(name)} is no topic name")
        for clause in applicable:
            if matches(clause.filter, name):
                return _decided(clause, action, name)
        return Verdict(False, f"refused, as no rule lets this identity {action.value} {name}")
    inner = inside_share(name)
    if not is_filter(inner):
        return Verdict(False, f"refused, as {json.dumps(name)} is no topic filter")
    partly: Clause | None = None
    for clause in applicable:
        if clause.rule.deny:
            if overlap(clause.filter, inner):
                return _decided(clause, action, name)
        elif covers(clause.filter, inner):
            return _decided(clause, action, name)
        elif partly is None and overlap(clause.filter, inner):
            partly = clause
    text = f"refused, as no rule lets this identity {action.value} {name}"
    if partly is not None:
        text += f"; {partly.rule.place or 'a rule'} allows a part of it, {partly.filter}"
    return Verdict(False, text)


def _decided(clause: Clause, action: Action, name: str) -> Verdict:
    rule = clause.rule
    filled = "" if clause.filter == clause.pattern else f", here {clause.filter}"
    pattern = f"{json.dumps(clause.pattern, ensure_ascii=False)}{filled}"
    where = f" by {rule.place}" if rule.place else ""
    if rule.deny:
        text = f"refused{where}, which denies {clause.who} to {action.value} {pattern}"
        return Verdict(False, text, clause)
    return Verdict(True, f"allowed{where}, which lets {clause.who} {action.value} {pattern}", clause)


# ------------------------------------------------------------------------------------------------------- identities


def _is(who: Who, identity: Identity) -> bool:
    match who.kind:
        case Kind.ANYBODY:
            return True
        case Kind.ANONYMOUS:
            return identity.anonymous
        case Kind.USER:
            return identity.user is not None and like(who.value, identity.user)
        case Kind.CN:
            return any(like(who.value, name) for name in (identity.cn, *identity.names) if name is not None)
        case Kind.CLIENT:
            return bool(identity.client) and like(who.value, identity.client)
        case Kind.UID:
            return identity.uid is not None and str(identity.uid) == who.value
        case Kind.ADDRESS:
            return who.network is not None and identity.address is not None and identity.address in who.network
        case Kind.PROTOCOL:
            return who.value == identity.protocol


def like(pattern: str, text: str) -> bool:
    """Whether `text` is as `pattern` says, where `*` stands for any text, also none. Linear, whatever a peer sends."""
    first, *rest = pattern.split("*")
    if not rest:
        return text == pattern
    last = rest.pop()
    if len(text) < len(first) + len(last) or not text.startswith(first) or not text.endswith(last):
        return False
    at, end = len(first), len(text) - len(last)
    for piece in rest:  # the earliest place is as good as any later one
        at = text.find(piece, at, end)
        if at < 0:
            return False
        at += len(piece)
    return True


def peer_address(text: str) -> Address | None:
    """An address as the socket gives it; IPv4 within IPv6 as the IPv4 it is, so that rules see one of them only."""
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address


def _values(identity: Identity, gateway: str) -> dict[str, str | None]:
    return {"client": identity.client, "user": identity.user, "gateway": gateway, "cn": identity.cn}


def _fill(pattern: str, values: dict[str, str | None]) -> str | None:
    """The filter that a pattern is for these values; None where one of them must not be filled in."""
    if "{" not in pattern:
        return pattern
    for name in _PLACEHOLDER.findall(pattern):
        value = values.get(name)
        if not value or value[0] == "$" or any(mark in value for mark in "/+#") or not value.isprintable():
            return None
    return _PLACEHOLDER.sub(lambda match: values[match[1]] or "", pattern)


# ----------------------------------------------------------------------------------- reading what an operator wrote


_EXAMPLES = {
    Kind.ANYBODY: "*",
    Kind.ANONYMOUS: "anonymous",
    Kind.USER: "user:anna",
    Kind.CN: "cn:*.apps.example",
    Kind.CLIENT: "client:sensor-*",
    Kind.UID: "uid:1000",
    Kind.ADDRESS: "address:10.0.0.0/8",
    Kind.PROTOCOL: "protocol:mqtt",
}


def parse_who(text: object) -> Who:
    """One word of `who`. Raises ValueError(expected, what to write instead); the second may be missing."""
    if not isinstance(text, str):
        raise ValueError(f"one of {', '.join(_EXAMPLES.values())}", "*")
    name, colon, value = text.partition(":")
    kind = next((each for each in Kind if each.value == name), None)
    if kind is None:
        _unknown_kind(text, name, value)
    assert kind is not None
    if kind in (Kind.ANYBODY, Kind.ANONYMOUS):
        if colon:
            raise ValueError(f"nothing after {name}", name)
        return Who(kind)
    if not value or value != value.strip() or not value.isprintable():
        raise ValueError(f"something after {name}:, without blanks around it", _EXAMPLES[kind])
    match kind:
        case Kind.ADDRESS:
            return _parse_network(value)
        case Kind.UID if not re.fullmatch(r"0|[1-9][0-9]{0,9}", value):
            raise ValueError("the number of a Unix user after uid:", _EXAMPLES[kind])
        case Kind.PROTOCOL if value not in ("mqtt", "amqp"):
            raise ValueError("mqtt or amqp after protocol:", "protocol:mqtt")
        case _:
            return Who(kind, value)


def parse_identity(said: Iterable[str]) -> Identity:
    """Somebody to ask about, by words as in `who`, but without `*`; a word without a kind is a user's name.

    Raises ValueError with a sentence. The peer is on this machine unless an address says otherwise.
    """
    identity = Identity("mqtt", address=ipaddress.IPv4Address("127.0.0.1"))
    for word in said:
        name, colon, value = word.partition(":")
        if not colon and word not in ("*", "anonymous"):
            name, value = "user", word
        kind = next((each for each in Kind if each.value == name), None)
        match kind:
            case Kind.USER if value:
                identity = replace(identity, user=value)
            case Kind.CLIENT if value:
                identity = replace(identity, client=value)
            case Kind.CN if value:
                names = (*identity.names, value)
                identity = replace(identity, cn=identity.cn or value, names=names)
            case Kind.UID if value.isascii() and value.isdigit() and len(value) <= 10:
                identity = replace(identity, uid=int(value), address=None)
            case Kind.ADDRESS:
                address = peer_address(value)
                if address is None:
                    raise ValueError(f"{json.dumps(value)} is no IP address")
                identity = replace(identity, address=address)
            case Kind.PROTOCOL if value in ("mqtt", "amqp"):
                identity = replace(identity, protocol=value)
            case Kind.ANONYMOUS if not colon:
                pass
            case _:
                kinds = "user:NAME, cn:NAME, client:ID, uid:NUMBER, address:IP, protocol:mqtt or protocol:amqp"
                raise ValueError(f"{json.dumps(word)} is none of {kinds} and anonymous")
    return identity


def _unknown_kind(text: str, name: str, value: str) -> None:
    known = f"one of {', '.join(_EXAMPLES.values())}"
    try:
        ipaddress.ip_network(text, strict=False)
    except ValueError:
        pass
    else:
        raise ValueError(known, f"address:{text}")
    near = difflib.get_close_matches(name.lower(), [kind.value for kind in Kind], 1, 0.6)
    if near:
        raise ValueError(known, f"{near[0]}:{value}" if value else _EXAMPLES[Kind(near[0])])
    raise ValueError(known, f"user:{text}" if text and ":" not in text and text.isprintable() else "*")


def _parse_network(value: str) -> Who:
    try:
        network = ipaddress.ip_network(value, strict=True)
    except ValueError:
        pass
    else:
        mapped = network.network_address
        if isinstance(mapped, ipaddress.IPv6Address) and mapped.ipv4_mapped and network.prefixlen >= 96:
            near = f"address:{mapped.ipv4_mapped}/{network.prefixlen - 96}"
            raise ValueError("an IPv4 network as such, as peers are known by their IPv4 address", near)
        return Who(Kind.ADDRESS, str(network), network)
    try:
        near = f"address:{ipaddress.ip_network(value, strict=False)}"
    except ValueError:
        raise ValueError("an address or network after address:", _EXAMPLES[Kind.ADDRESS]) from None
    raise ValueError("a network without bits set behind its prefix", near)


def check_pattern(pattern: object, action: Action) -> None:
    """Raise ValueError(expected, what to write instead) unless `pattern` may stand in a rule."""
    if not isinstance(pattern, str):
        raise ValueError("a topic filter in quotes", "train/#")
    try:
        size = len(pattern.encode())
    except UnicodeEncodeError:
        size = 0
    if not 0 < size <= PATTERN_BYTES_MAX or not pattern.isprintable():
        raise ValueError(f"a topic filter of 1 to {PATTERN_BYTES_MAX} bytes, all printable", "train/#")
    allowed = ", ".join(f"{{{name}}}" for name in PLACEHOLDERS)
    for name in _PLACEHOLDER.findall(pattern):
        if name not in PLACEHOLDERS:
            near = difflib.get_close_matches(name.lower(), PLACEHOLDERS, 1, 0.0)[0]
            raise ValueError(f"only the placeholders {allowed}", pattern.replace(f"{{{name}}}", f"{{{near}}}"))
    bare = _PLACEHOLDER.sub("x", pattern)
    if "{" in bare or "}" in bare:
        raise ValueError(f"braces only around a placeholder ({allowed})")
    if bare.startswith("$share/"):
        raise ValueError("the filter alone, as shared subscriptions are judged by it", inside_share(pattern))
    if pattern[:1] == "$" and action is Action.PUBLISH:
        raise ValueError("a topic filter that does not begin with '$', as apps may not publish there")
    if not is_filter(bare):
        _wrong_wildcard(pattern)


def _wrong_wildcard(pattern: str) -> None:
    levels = pattern.split("/")
    for number, level in enumerate(levels):
        if "#" in level and (level != "#" or number != len(levels) - 1):
            near = "/".join([*levels[:number], *filter(None, [level.split("#")[0]]), "#"])
            raise ValueError("'#' to stand alone as the last level", near)
    near = "/".join("+" if "+" in each else each for each in levels)
    raise ValueError("'+' to stand alone in its level", near)


def words(rule: Rule) -> str:
    """A rule in a sentence."""
    who = " or ".join("anybody" if each.kind is Kind.ANYBODY else str(each) for each in rule.who)
    what = [
        f"{action.value} {', '.join(patterns)}"
        for action, patterns in ((Action.PUBLISH, rule.publish), (Action.SUBSCRIBE, rule.subscribe))
        if patterns
    ]
    return f"{who} may {'not ' if rule.deny else ''}{' and '.join(what) if not rule.deny else ' nor '.join(what)}"
