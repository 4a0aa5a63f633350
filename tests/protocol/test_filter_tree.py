"""The tree of filters finds what looking at each filter finds."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from gateway.mqtt.topics import filter_matches
from gateway.mqtt.tree import FilterTree

LEVELS = st.sampled_from(["a", "b", "", "$x", "c d"])
TOPICS = st.lists(LEVELS, min_size=1, max_size=4).map("/".join).filter(bool)
FILTERS = (
    st.tuples(st.lists(st.one_of(LEVELS, st.just("+")), max_size=4), st.booleans())
    .map(lambda pair: "/".join(pair[0] + ["#"] * pair[1]))
    .filter(bool)
)


@given(st.lists(st.tuples(FILTERS, st.integers(0, 3))), st.lists(st.tuples(FILTERS, st.integers(0, 3))), TOPICS)
def test_it_matches_as_the_standard_says_also_after_removals(
    added: list[tuple[str, int]], removed: list[tuple[str, int]], topic: str
) -> None:
    tree: FilterTree[tuple[str, int]] = FilterTree()
    for filter_, key in added:
        tree.add(filter_, (filter_, key))
    for filter_, key in removed:
        tree.remove(filter_, (filter_, key))
    left = set(added) - set(removed)
    assert len(tree) == len(left)
    found = list(tree.matches(topic))
    assert len(found) == len(set(found))
    assert set(found) == {pair for pair in left if filter_matches(pair[0], topic)}


def test_nothing_is_left_of_what_was_removed() -> None:
    tree: FilterTree[int] = FilterTree()
    for n in range(100):
        tree.add(f"a/{n}/+/#", n)
    for n in range(100):
        tree.remove(f"a/{n}/+/#", n)
    assert not tree._root.children
