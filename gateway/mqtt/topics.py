"""MQTT topic names and filters: what is well formed, what matches what. Knows no packets and no reason codes.

Everything here raises `ValueError` with a sentence; the caller knows whose mistake it was.
"""

from __future__ import annotations

TOPIC_MAX_BYTES = 65_535
SHARE_PREFIX = "$share/"


def check_topic(topic: str) -> None:
    """Raise ValueError unless `topic` may be the topic of a message (MQTT 5.0 §4.7, MQTT-3.3.2-2)."""
    _check_text(topic, "a topic name")
    if "+" in topic or "#" in topic:
        raise ValueError("a topic name holds no wildcard")


def check_filter(filter: str, *, shared: bool = True) -> None:
    """Raise ValueError unless `filter` may be subscribed to (MQTT 5.0 §4.7.1).

    `shared`: whether `$share/group/filter` has its 5.0 meaning (§4.8.2); 3.1.1 gives it none.
    """
    _check_text(filter, "a topic filter")
    if shared and filter.startswith("$share"):
        group, inner = split_shared(filter)
        if group is not None:
            _check_levels(inner)
            return
        if filter == "$share" or filter.startswith(SHARE_PREFIX):
            raise ValueError("a shared subscription is $share/<name>/<filter>, the name without + and #")
    _check_levels(filter)


def split_shared(filter: str) -> tuple[str | None, str]:
    """(share name, filter inside) of a 5.0 shared subscription, or (None, filter) of any other."""
    if filter.startswith(SHARE_PREFIX):
        group, slash, inner = filter[len(SHARE_PREFIX) :].partition("/")
        if group and slash and inner and "+" not in group and "#" not in group:
            return group, inner
    return None, filter


def filter_matches(filter: str, topic: str) -> bool:
    """Whether a valid filter (its `$share/name/` already split off) takes a valid topic.

    A filter that begins with a wildcard takes no topic that begins with `$` (MQTT-4.7.2-1).
    """
    if topic[:1] == "$" and filter[:1] in ("+", "#"):
        return False
    levels = topic.split("/")
    wanted = filter.split("/")
    for depth, level in enumerate(wanted):
        if level == "#":  # also takes the parent level (MQTT 5.0 §4.7.1.2)
            return True
        if depth == len(levels) or level not in ("+", levels[depth]):
            return False
    return len(wanted) == len(levels)


def _check_text(text: str, what: str) -> None:
    if not text:
        raise ValueError(f"{what} has at least one character")
    if "\0" in text:
        raise ValueError(f"{what} holds no U+0000")
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise ValueError(f"{what} holds no surrogates") from None
    if size > TOPIC_MAX_BYTES:
        raise ValueError(f"{what} has at most {TOPIC_MAX_BYTES} bytes")


def _check_levels(filter: str) -> None:
    levels = filter.split("/")
    for level in levels:
        if len(level) > 1 and ("+" in level or "#" in level):
            raise ValueError("a wildcard stands alone in its level")
    if "#" in levels[:-1]:
        raise ValueError("# stands only at the end of a topic filter")
