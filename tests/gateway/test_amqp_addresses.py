"""The table of addresses, as a table."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.amqp.addresses import Address, AddressError, Kind, Rule, covers, kind_of, parse, reply_topic
from gateway.mqtt.topics import filter_matches

QUEUE, TOPIC = Kind.QUEUE, Kind.TOPIC


@pytest.mark.parametrize(
    ("written", "topic", "kind"),
    [
        ("alarm/door", "alarm/door", None),
        ("alarm", "alarm", None),
        ("/alarm", "/alarm", None),
        ("/queues/jobs", "/queues/jobs", None),
        ("edge.loco.alarms", "edge.loco.alarms", None),
        ("queue://jobs/print", "jobs/print", QUEUE),
        ("topic://news", "news", TOPIC),
        ("topic://queue://x", "queue://x", TOPIC),
        ("amqp://host/alarm/door", "alarm/door", None),
        ("amqp://host:5672/alarm", "alarm", None),
        ("amqp://user@host/alarm", "alarm", None),
        ("amqps://[::1]:5671/a%20b/c", "a b/c", None),
        ("amqps://host/queue://jobs", "jobs", QUEUE),
        ("amqp://host//alarm", "/alarm", None),
        ("amqp://host/a?b", "a?b", None),
        ("http://host/x", "http://host/x", None),
        ("alarm/*", "alarm/*", None),
        ("alarm.>", "alarm.>", None),
        ("$lineside/reply/ab", "$lineside/reply/ab", None),
        ("q::fqqn", "q::fqqn", None),
    ],
)
def test_what_an_app_writes_is_a_topic_and_perhaps_a_wish(written: str, topic: str, kind: Kind | None) -> None:
    assert parse(written) == parse(written, receiver=True) == Address(topic, kind)


@pytest.mark.parametrize("written", ["alarm/+", "#", "queue://jobs/#", "amqp://host/a/+/b", "topic://a/#"])
def test_wildcards_are_for_receivers(written: str) -> None:
    assert written.endswith(parse(written, receiver=True).topic)
    with pytest.raises(AddressError, match="no wildcard"):
        parse(written)


@pytest.mark.parametrize(
    ("written", "why"),
    [
        (None, "at least one character"),
        ("", "at least one character"),
        ("queue://", "at least one character"),
        ("amqp://host", "names a host and nothing on it"),
        ("amqp://host/", "names a host and nothing on it"),
        ("amqp://[::1/x", "IPv6"),
        ("a\0b", "U\\+0000"),
        ("amqp://host/a%00b", "U\\+0000"),
        ("x" * 70_000, "65535"),
        ("alarm/#/x", "only at the end"),
        ("alarm/a+", "stands alone"),
        ("$share/g/x", "queue://"),
    ],
)
def test_what_means_nothing_is_refused_with_the_reason(written: str | None, why: str) -> None:
    with pytest.raises(AddressError, match=why):
        parse(written, receiver=True)


RULES = (Rule("jobs/#", QUEUE), Rule("news/+", TOPIC), Rule("#", TOPIC))


@pytest.mark.parametrize(
    ("written", "capabilities", "rules", "kind"),
    [
        ("alarm", (), (), TOPIC),
        ("alarm", ("queue",), (), QUEUE),
        ("alarm", ("temporary-queue", "x"), (), QUEUE),
        ("alarm", ("topic", "shared"), (), TOPIC),
        ("queue://alarm", (), (), QUEUE),
        ("queue://alarm", ("queue",), (), QUEUE),
        ("jobs/a", (), RULES, QUEUE),
        ("jobs/a", ("queue",), RULES, QUEUE),
        ("jobs", (), RULES, QUEUE),
        ("jobs/#", (), RULES, QUEUE),
        ("jobs/+/x", (), RULES, QUEUE),
        ("#", (), RULES, TOPIC),
        ("news/a", ("topic",), RULES, TOPIC),
        ("news/#", (), (Rule("news/+", QUEUE),), TOPIC),
    ],
)
def test_prefix_capability_and_configuration_decide_between_queue_and_topic(
    written: str, capabilities: tuple[str, ...], rules: tuple[Rule, ...], kind: Kind
) -> None:
    assert kind_of(parse(written, receiver=True), capabilities, rules) is kind


@pytest.mark.parametrize(
    ("written", "capabilities"),
    [("queue://x", ("topic",)), ("x", ("topic", "queue")), ("topic://jobs/a", ()), ("jobs/a", ("topic",))],
)
def test_wishes_that_contradict_one_another_or_the_configuration_are_refused(
    written: str, capabilities: tuple[str, ...]
) -> None:
    with pytest.raises(AddressError):
        kind_of(parse(written), capabilities, RULES)


level = st.sampled_from(["a", "b", "+"])
some_filter = st.builds(lambda ls, end: "/".join(ls + end), st.lists(level, min_size=1), st.sampled_from([[], ["#"]]))
some_topic = st.lists(st.sampled_from("ab"), min_size=1).map("/".join)


@given(some_filter, some_filter, some_topic)
def test_a_rule_that_covers_a_filter_takes_whatever_the_filter_takes(rule: str, inner: str, topic: str) -> None:
    if covers(rule, inner) and filter_matches(inner, topic):
        assert filter_matches(rule, topic)


@given(st.text(max_size=40))
def test_any_text_is_an_address_or_an_address_error(text: str) -> None:
    for prefix in ("", "amqp://", "amqps://h/", "queue://"):
        try:
            parse(prefix + text, receiver=True)
        except AddressError:
            continue


def test_a_reply_to_becomes_a_topic_or_nothing() -> None:
    assert reply_topic("queue://answers") == "answers"
    assert reply_topic("amqp://host/a/b") == "a/b"
    assert reply_topic(None) is reply_topic("a/#") is reply_topic("") is None
