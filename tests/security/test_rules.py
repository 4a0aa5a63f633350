"""Who may do what: a truth table, what every verdict promises, and what an operator may write."""

from __future__ import annotations

import itertools
import time
from ipaddress import ip_address

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from security.filters import covers, inside_share, is_filter, matches, overlap
from security.rules import (
    Action,
    Identity,
    Rule,
    Rules,
    check_pattern,
    clauses,
    decide,
    judge,
    like,
    parse_identity,
    parse_who,
    peer_address,
    words,
)

PUB, SUB = Action.PUBLISH, Action.SUBSCRIBE
LOOPBACK = ip_address("127.0.0.1")


def rule(who: str, publish: str = "", subscribe: str = "", deny: bool = False, place: str = "") -> Rule:
    """Words are separated by blanks."""
    return Rule(
        tuple(parse_who(word) for word in who.split()), tuple(publish.split()), tuple(subscribe.split()), deny, place
    )


def peer(**fields: object) -> Identity:
    return Identity(**({"protocol": "mqtt", "client": "app-1", "address": LOOPBACK} | fields))  # type: ignore[arg-type]


ANNA = peer(user="anna")
NOBODY = peer()
CERT = peer(cn="cam.apps.example", names=("cam.apps.example", "spiffe://x/cam"))
UNIX = peer(uid=1000, address=None)
FAR = peer(address=ip_address("10.1.2.3"))
FAR6 = peer(address=ip_address("fd00::7"))
AMQP = peer(protocol="amqp", user="anna")

RULES = Rules(
    (
        rule("user:driver", "train/brake/#", "train/brake/#", place="access[0]"),
        rule("*", "train/brake/#", "train/brake/#", deny=True, place="access[1]"),
        rule("user:anna uid:1000", "train/# gw/{gateway}/x", "commands/#", place="access[2]"),
        rule("user:*", "by-user/{user}/#", "by-user/{user}/#", place="access[3]"),
        rule("cn:*.apps.example cn:spiffe://*", "by-cn/{cn}", "$SYS/broker/#", place="access[4]"),
        rule("client:app-*", "by-client/{client}/+", place="access[5]"),
        rule("address:10.0.0.0/8 address:fd00::/8", "far/#", "far/+/x", place="access[6]"),
        rule("anonymous", "guest", "guest", place="access[7]"),
        rule("protocol:amqp", "amqp/#", "amqp/#", place="access[8]"),
    ),
    "loco",
)

# Who, what, on which topic or filter, the rule that decides ("" if none does), and whether it is allowed.
TABLE = [
    (ANNA, PUB, "train/speed", 2, True),
    (ANNA, PUB, "train", 2, True),
    (ANNA, PUB, "train/brake/x", 1, False),
    (peer(user="driver"), PUB, "train/brake/x", 0, True),
    (peer(user="driver"), SUB, "train/brake/+", 0, True),
    (peer(user="driver"), SUB, "train/+/x", 1, False),
    (NOBODY, PUB, "train/brake", 1, False),
    (NOBODY, PUB, "train/speed", None, False),
    (UNIX, PUB, "train/speed", 2, True),
    (peer(uid=1001, address=None), PUB, "train/speed", None, False),
    (ANNA, PUB, "gw/loco/x", 2, True),
    (ANNA, PUB, "gw/{gateway}/x", None, False),
    (ANNA, PUB, "by-user/anna/x", 3, True),
    (ANNA, PUB, "by-user/bert/x", None, False),
    (NOBODY, PUB, "by-user//x", None, False),
    (ANNA, SUB, "by-user/anna/#", 3, True),
    (ANNA, SUB, "by-user/+/x", None, False),
    (ANNA, SUB, "commands/+/x", 2, True),
    (ANNA, SUB, "$share/g/commands/+/x", 2, True),
    (ANNA, SUB, "$share/g/train/x", None, False),
    (ANNA, SUB, "$share/g", None, False),
    (ANNA, SUB, "#", 1, False),
    (ANNA, SUB, "commands", 2, True),
    (ANNA, SUB, "+/x", None, False),
    (ANNA, SUB, "$SYS/broker/load", None, False),
    (CERT, SUB, "$SYS/broker/load", 4, True),
    (CERT, SUB, "$SYS/#", None, False),
    (CERT, PUB, "by-cn/cam.apps.example", 4, True),
    (peer(names=("spiffe://x/cam",)), PUB, "by-cn/cam.apps.example", None, False),
    (peer(names=("spiffe://x/cam",)), SUB, "$SYS/broker/x", 4, True),
    (peer(cn="apps.example", names=("apps.example",)), SUB, "$SYS/broker/x", None, False),
    (NOBODY, PUB, "by-client/app-1/x", 5, True),
    (NOBODY, PUB, "by-client/app-2/x", None, False),
    (peer(client="app-+"), PUB, "by-client/app-9/x", None, False),
    (peer(client="app-/x"), PUB, "by-client/app-/x", None, False),
    (FAR, PUB, "far/x", 6, True),
    (FAR6, PUB, "far/x", 6, True),
    (NOBODY, PUB, "far/x", None, False),
    (UNIX, PUB, "far/x", None, False),
    (FAR, SUB, "far/a/x", 6, True),
    (FAR, SUB, "far/a/+", None, False),
    (NOBODY, PUB, "guest", 7, True),
    (ANNA, PUB, "guest", None, False),
    (UNIX, PUB, "guest", None, False),
    (AMQP, PUB, "amqp/x", 8, True),
    (ANNA, PUB, "amqp/x", None, False),
    (AMQP, Action.SEND, "train/speed", 2, True),
    (AMQP, Action.SEND, "train/brake/x", 1, False),
    (AMQP, Action.RECEIVE, "commands/x", 2, True),
    (AMQP, Action.RECEIVE, "train/speed", None, False),
    (ANNA, PUB, "train/+", None, False),
    (ANNA, PUB, "", None, False),
    (ANNA, SUB, "commands/x#", None, False),
    (ANNA, SUB, "commands/#/x", None, False),
]


@pytest.mark.parametrize(
    ("who", "action", "name", "place", "allowed"), TABLE, ids=lambda value: str(value) if isinstance(value, str) else ""
)
def test_the_truth_table(who: Identity, action: Action, name: str, place: int | None, allowed: bool) -> None:
    verdict = decide(RULES, who, action, name)
    decided = verdict.clause.rule.place if verdict.clause is not None else None
    assert (verdict.allowed, decided) == (allowed, None if place is None else f"access[{place}]")
    assert verdict.text.startswith("allowed" if allowed else "refused")
    assert decided is None or decided in verdict.text


def test_without_a_rule_everything_is_allowed_and_with_one_only_what_it_says() -> None:
    assert decide(Rules(), NOBODY, PUB, "x").allowed
    assert decide(Rules(), NOBODY, SUB, "#").allowed
    only = Rules((rule("*", "a"),))
    assert decide(only, NOBODY, PUB, "a").allowed
    assert not decide(only, NOBODY, PUB, "b").allowed
    assert not decide(only, NOBODY, SUB, "a").allowed


def test_a_verdict_says_which_rule_decided_and_what_a_pattern_reads_here() -> None:
    assert decide(RULES, ANNA, PUB, "by-user/anna/x").text == (
        'allowed by access[3], which lets user:* publish to "by-user/{user}/#", here by-user/anna/#'
    )
    assert decide(RULES, ANNA, SUB, "train/#").text == (
        'refused by access[1], which denies * to subscribe to "train/brake/#"'
    )
    assert decide(RULES, ANNA, SUB, "+/x").text.endswith("; access[2] allows a part of it, commands/#")


def test_the_order_of_the_rules_decides() -> None:
    allow, deny = rule("*", "a/#", "a/#"), rule("*", "a/b", "a/b", deny=True)
    assert decide(Rules((allow, deny)), NOBODY, PUB, "a/b").allowed
    assert decide(Rules((allow, deny)), NOBODY, SUB, "a/#").allowed
    assert not decide(Rules((deny, allow)), NOBODY, PUB, "a/b").allowed
    assert not decide(Rules((deny, allow)), NOBODY, SUB, "a/#").allowed
    assert decide(Rules((deny, allow)), NOBODY, SUB, "a/c").allowed


# ---------------------------------------------------------------------------------------------- what always holds

levels = st.sampled_from(["a", "b", "", "$s"])
topics = st.lists(levels, min_size=1, max_size=4).map("/".join).filter(bool)
filters = st.builds(
    lambda inner, tail: "/".join([*inner, *tail]),
    st.lists(st.sampled_from(["a", "b", "", "+", "$s"]), max_size=4),
    st.sampled_from([[], ["#"]]),
).filter(bool)
names = st.sampled_from(["a", "b", "a/b", "+", "#", "$s", "", "a\0"])
identities = st.builds(
    Identity,
    st.sampled_from(["mqtt", "amqp"]),
    names,
    st.none() | names,
    st.none() | names,
    st.lists(names, max_size=2).map(tuple),
    st.none() | st.sampled_from([0, 1000]),
    st.none() | st.sampled_from([LOOPBACK, ip_address("10.0.0.1"), ip_address("::1")]),
)
whos = st.sampled_from(
    [
        "*",
        "*",
        "*",
        "anonymous",
        "user:*",
        "user:a",
        "cn:a*",
        "client:*b",
        "uid:1000",
        "address:10.0.0.0/8",
        "address:::/0",
        "protocol:amqp",
    ]
).map(parse_who)
patterns = filters | st.sampled_from(
    ["{client}/#", "a/{user}", "{cn}", "{gateway}/+", "a/x{client}/#", "a/{user}/{cn}"]
)
ruleses = st.builds(
    Rules,
    st.lists(
        st.builds(
            Rule,
            st.lists(whos, min_size=1, max_size=2).map(tuple),
            st.lists(patterns, max_size=3).map(tuple),
            st.lists(patterns, max_size=3).map(tuple),
            st.booleans(),
        ),
        min_size=1,
        max_size=5,
    ).map(tuple),
    st.just("a"),
)


SMALL_TOPICS = [
    "/".join(each) for depth in (1, 2, 3) for each in itertools.product(["a", "b", "z", "$s"], repeat=depth)
]


@given(ruleses, identities, filters)
@example(Rules((rule("*", subscribe="+/#", deny=True), rule("*", subscribe="#"))), NOBODY, "#")
@example(Rules((rule("*", subscribe="a/b", deny=True), rule("*", subscribe="#"))), NOBODY, "a/+")
@example(Rules((rule("*", subscribe="a/b"), rule("*", subscribe="a/#", deny=True))), NOBODY, "a/b")
@settings(max_examples=500)
def test_whatever_an_allowed_filter_can_match_is_allowed_too(rules_: Rules, identity: Identity, filter_: str) -> None:
    if decide(rules_, identity, SUB, filter_).allowed:
        for topic in SMALL_TOPICS:
            if matches(filter_, topic):
                assert decide(rules_, identity, SUB, topic).allowed, topic


@given(ruleses, identities, filters)
def test_adding_a_deny_in_front_never_allows_more(rules_: Rules, identity: Identity, filter_: str) -> None:
    denied = Rules((rule("*", subscribe="a/+", deny=True), *rules_.rules), "a")
    if decide(denied, identity, SUB, filter_).allowed:
        assert decide(rules_, identity, SUB, filter_).allowed
        assert not overlap(filter_, "a/+")


@given(ruleses, identities, filters, st.sampled_from(list(Action)))
def test_a_verdict_is_the_same_asked_at_once_or_by_prepared_clauses(
    rules_: Rules, identity: Identity, name: str, action: Action
) -> None:
    assert judge(clauses(rules_, identity, action), action, name) == decide(rules_, identity, action, name)


@given(st.text(max_size=8), topics)
@example("$s", "$s/a")
@example("+", "a/a")
@example("#", "a")
@example("a/b", "a/b/c")
@example("", "/a")
def test_the_name_a_client_gives_itself_only_opens_what_is_below_that_very_name(client: str, topic: str) -> None:
    mine = Rules((rule("*", "{client}/#", "{client}/#"),))
    for action in (PUB, SUB):
        if decide(mine, peer(client=client), action, topic).allowed:
            assert topic.split("/")[0] == client
            assert not client.startswith("$")


@given(filters, filters, st.lists(topics, max_size=20))
@example("#", "$s/a", ["$s/a"])
@example("+/a", "$s/a", ["$s/a"])
@example("+/#", "#", ["a", "a/b"])
def test_covering_and_overlapping_say_what_matching_says(one: str, other: str, some: list[str]) -> None:
    in_one = {topic for topic in some if matches(one, topic)}
    in_other = {topic for topic in some if matches(other, topic)}
    if covers(one, other):
        assert in_other <= in_one
    if in_one & in_other:
        assert overlap(one, other)
    assert overlap(one, other) == overlap(other, one)


def some_topic(filter_: str, name: str) -> list[str]:
    """Topics that the filter takes, with a name that nobody else uses in the place of wildcards."""
    found = []
    levels_ = filter_.split("/")
    if levels_[-1] != "#":
        found = [levels_]
    else:
        found = [[*levels_[:-1], name], [*levels_[:-1], name, name]]
        found += [levels_[:-1]] if len(levels_) > 1 else []
    return ["/".join(name if level == "+" else level for level in each) for each in found]


@given(filters, filters)
@example("/+/#", "/#")
def test_covering_is_exact_as_a_topic_outside_shows(outer: str, inner: str) -> None:
    witnesses = [topic for topic in some_topic(inner, "fresh") if topic and matches(inner, topic)]
    assume(witnesses)
    if not covers(outer, inner):
        assert not all(matches(outer, topic) for topic in witnesses)


@given(filters, filters)
def test_two_filters_overlap_only_if_a_topic_shows_it(one: str, other: str) -> None:
    assume(overlap(one, other))
    meeting = []
    a, b = one.split("/"), other.split("/")
    for length in range(1, 7):
        taken = [
            y if x in ("+", None) else x
            for x, y in (
                (a[n] if n < len(a) and "#" not in a[: n + 1] else None, b[n] if n < len(b) else None)
                for n in range(length)
            )
        ]
        meeting.append("/".join("z" if level in ("+", "#", None) else level for level in taken))
    assert any(matches(one, topic) and matches(other, topic) for topic in meeting if topic)


@given(filters)
def test_a_share_is_its_inner_filter(filter_: str) -> None:
    assert inside_share(f"$share/group/{filter_}") == filter_
    assert inside_share(filter_) == filter_


@given(st.lists(st.sampled_from("ab*"), max_size=6).map("".join), st.lists(st.sampled_from("ab"), max_size=6))
def test_a_star_stands_for_any_text(pattern: str, letters: list[str]) -> None:
    def slow(p: str, t: str) -> bool:
        if not p:
            return not t
        if p[0] == "*":
            return slow(p[1:], t) or (bool(t) and slow(p, t[1:]))
        return bool(t) and p[0] == t[0] and slow(p[1:], t[1:])

    assert like(pattern, "".join(letters)) == slow(pattern, "".join(letters))


def test_a_long_name_against_many_stars_costs_nothing_to_speak_of() -> None:
    began = time.perf_counter()
    assert not like("*a" * 30 + "b", "a" * 60_000)
    assert time.perf_counter() - began < 0.5


# ------------------------------------------------------------------------------------------ what an operator writes


@pytest.mark.parametrize(
    ("text", "write"),
    [
        ("anna", "user:anna"),
        ("usr:anna", "user:anna"),
        ("User:anna", "user:anna"),
        ("10.0.0.0/8", "address:10.0.0.0/8"),
        ("address:10.0.0.1/8", "address:10.0.0.0/8"),
        ("address:box", "address:10.0.0.0/8"),
        ("address:::ffff:10.0.0.0/104", "address:10.0.0.0/8"),
        ("uid:root", "uid:1000"),
        ("uid:-1", "uid:1000"),
        ("protocol:http", "protocol:mqtt"),
        ("user:", "user:anna"),
        ("user: anna", "user:anna"),
        ("*:x", "*"),
        ("", "*"),
        (7, "*"),
    ],
)
def test_a_wrong_who_is_told_with_what_may_be_meant(text: object, write: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the arguments are looked at
        parse_who(text)
    expected, near = caught.value.args
    assert expected
    assert near == write
    assert str(parse_who(near)) == near


@pytest.mark.parametrize(
    ("pattern", "action", "write"),
    [
        ("train/{clint}/#", PUB, "train/{client}/#"),
        ("train/{CN}/#", PUB, "train/{cn}/#"),
        ("train/{gatway}/{usr}", PUB, "train/{gateway}/{usr}"),
        ("train#", PUB, "train/#"),
        ("a/#/b", SUB, "a/#"),
        ("a/b+/c", SUB, "a/+/c"),
        ("$share/g/a/#", SUB, "a/#"),
        ("$SYS/#", PUB, None),
        ("train/{client", SUB, None),
        ("", SUB, "train/#"),
        ("a\0", SUB, "train/#"),
        (1, SUB, "train/#"),
    ],
)
def test_a_wrong_pattern_is_told_with_what_may_be_meant(pattern: object, action: Action, write: str | None) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the arguments are looked at
        check_pattern(pattern, action)
    assert [*caught.value.args[1:]] == ([] if write is None else [write])


@given(st.text(max_size=20), st.sampled_from([PUB, SUB]))
def test_nothing_an_operator_writes_raises_anything_but_the_complaint(text: str, action: Action) -> None:
    for read in (lambda: parse_who(text), lambda: check_pattern(text, action), lambda: parse_identity([text])):
        try:
            read()
        except ValueError as error:
            assert type(error) is ValueError  # noqa: PT017
    try:
        check_pattern(text, action)
    except ValueError:
        return
    assert "{" in text or is_filter(text)


def test_somebody_to_ask_about_is_made_of_several_words() -> None:
    found = parse_identity(["anna", "client:x", "cn:a.example", "cn:b.example", "address:::ffff:10.1.1.1"])
    assert found == Identity("mqtt", "x", "anna", "a.example", ("a.example", "b.example"), None, ip_address("10.1.1.1"))
    assert str(parse_identity(["uid:7", "protocol:amqp"])) == "uid:7"
    assert parse_identity([]).anonymous
    for wrong in ("*", "user:", "address:x", "uid:²", "protocol:x", "usr:x"):
        with pytest.raises(ValueError, match=r"no IP address|is none of"):
            parse_identity([wrong])


def test_an_ipv4_peer_on_an_ipv6_socket_is_an_ipv4_peer() -> None:
    assert peer_address("::ffff:10.1.2.3") == ip_address("10.1.2.3")
    assert peer_address("fe80::1%eth0") == ip_address("fe80::1")
    assert peer_address("somewhere") is None


def test_a_rule_reads_as_a_sentence() -> None:
    assert words(rule("* uid:1", "a b", "c")) == "anybody or uid:1 may publish to a, b and subscribe to c"
    assert words(rule("user:x", "a", "c", deny=True)) == "user:x may not publish to a nor subscribe to c"
