"""Subscriptions as a tree of topic levels: which of many filters take a topic, without looking at the others.

Knows no session: keys are whatever its owner uses. Filters are valid and their `$share/name/` is split off.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)


class _Node(Generic[K]):
    __slots__ = ("children", "here")

    def __init__(self) -> None:
        self.children: dict[str, _Node[K]] = {}
        self.here: dict[K, None] = {}


class FilterTree(Generic[K]):
    """A multimap from topic filter to keys, asked by topic. A lookup costs the topic's levels, not the filters."""

    def __init__(self) -> None:
        self._root: _Node[K] = _Node()
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def add(self, filter: str, key: K) -> None:
        """Once or more often: it is there once."""
        node = self._root
        for level in filter.split("/"):
            found = node.children.get(level)
            if found is None:
                found = node.children[level] = _Node()
            node = found
        self._size += key not in node.here
        node.here[key] = None

    def remove(self, filter: str, key: K) -> None:
        """Nothing happens if it is not there."""
        path: list[tuple[_Node[K], str]] = []
        node = self._root
        for level in filter.split("/"):
            found = node.children.get(level)
            if found is None:
                return
            path.append((node, level))
            node = found
        if key not in node.here:
            return
        del node.here[key]
        self._size -= 1
        for parent, level in reversed(path):
            child = parent.children[level]
            if child.here or child.children:
                break
            del parent.children[level]

    def matches(self, topic: str) -> Iterator[K]:
        """Keys of the filters that take `topic` (MQTT 5.0 §4.7); one that has several such filters comes so often."""
        levels = topic.split("/")
        # A wildcard at the first level takes no topic that begins with $ (MQTT-4.7.2-1).
        nodes = [self._root]
        for depth, level in enumerate(levels):
            after: list[_Node[K]] = []
            wild = depth > 0 or level[:1] != "$"
            for node in nodes:
                children = node.children
                if wild:
                    if (rest := children.get("#")) is not None:
                        yield from rest.here
                    if (one := children.get("+")) is not None:
                        after.append(one)
                if (same := children.get(level)) is not None and level not in ("+", "#"):
                    after.append(same)
            if not after:
                return
            nodes = after
        for node in nodes:
            yield from node.here
            if (rest := node.children.get("#")) is not None:  # also takes the parent level (§4.7.1.2)
                yield from rest.here
