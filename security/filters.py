"""Sets of topics, written as MQTT topic filters: what is in one, what lies within another, what two have in common.

All filters and topics are taken as well formed (MQTT 5.0 §4.7) and without `$share/`. Knows no rule and no identity.
"""

from __future__ import annotations

_EVERYTHING = frozenset({"#", "+/#"})


def matches(pattern: str, topic: str) -> bool:
    """Whether the filter takes the topic. A leading wildcard takes no topic that begins with `$` (MQTT-4.7.2-1)."""
    if topic[:1] == "$" and pattern[:1] in ("+", "#"):
        return False
    levels = topic.split("/")
    wanted = pattern.split("/")
    for depth, level in enumerate(wanted):
        if level == "#":  # also the parent level (§4.7.1.2)
            return True
        if depth == len(levels) or level not in ("+", levels[depth]):
            return False
    return len(wanted) == len(levels)


def covers(outer: str, inner: str) -> bool:
    """Whether every topic that `inner` takes is one that `outer` takes. Exact, as a level has infinitely many names."""
    if inner[:1] == "$" and outer[:1] in ("+", "#"):
        return False
    if inner in _EVERYTHING:  # neither takes `$` topics; and `+/#` takes single levels, too
        return outer in _EVERYTHING
    if inner == "/#":  # its parent level would be the empty topic, which there is not
        inner = "/+/#"
    of_outer, of_inner = outer.split("/"), inner.split("/")
    for depth, level in enumerate(of_outer):
        if level == "#":
            return True
        if depth == len(of_inner) or of_inner[depth] == "#" or level not in ("+", of_inner[depth]):
            return False
    return len(of_outer) == len(of_inner)


def overlap(one: str, other: str) -> bool:
    """Whether some topic is taken by both."""
    firsts = one[:1], other[:1]
    if "$" in firsts and ("+" in firsts or "#" in firsts):
        return False
    a, b = one.split("/"), other.split("/")
    for depth in range(max(len(a), len(b)) + 1):
        x = a[depth] if depth < len(a) else None
        y = b[depth] if depth < len(b) else None
        if x == "#" or y == "#":
            return True
        if x is None or y is None:
            return x is y
        if "+" not in (x, y) and x != y:
            return False
    raise AssertionError("both filters ended unseen")


def inside_share(filter_: str) -> str:
    """The filter inside `$share/group/filter` (MQTT 5.0 §4.8.2); any other as it is."""
    if filter_.startswith("$share/"):
        group, _, inner = filter_[7:].partition("/")
        if group and inner:
            return inner
    return filter_


def is_topic(text: str) -> bool:
    """Whether a message could be published to it: no wildcard, not empty (MQTT-3.3.2-2, MQTT-4.7.3-1)."""
    return bool(text) and not any(mark in text for mark in "+#\0")


def is_filter(text: str) -> bool:
    """Whether it could be subscribed to: wildcards stand alone in their level, `#` only in the last."""
    levels = text.split("/")
    return (
        bool(text)
        and "\0" not in text
        and "#" not in levels[:-1]
        and not any(len(level) > 1 and ("+" in level or "#" in level) for level in levels)
    )
