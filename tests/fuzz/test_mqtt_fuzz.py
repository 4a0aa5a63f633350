"""MQTT against arbitrary peers: nothing a peer can send escapes `receive`, and no split of it changes what it means."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.mqtt.codec import check_first_byte, decode, decode_body, encode, remaining_length
from gateway.mqtt.connection import Limits, ServerConnection, State, TooLargeForPeer
from gateway.mqtt.delivery import Delivery
from gateway.mqtt.events import Acked, Completed, Event, Failed, Publishes, Received, Released
from gateway.mqtt.packets import (
    V3,
    V5,
    Ack,
    Connect,
    ConnectProperties,
    MqttError,
    Packet,
    Pingreq,
    Puback,
    Pubcomp,
    Publish,
    PublishProperties,
    Pubrec,
    Pubrel,
    Subscribe,
    SubscribeProperties,
    Subscription,
    Unsubscribe,
    Will,
    WillProperties,
)
from gateway.mqtt.topics import check_filter, check_topic, filter_matches

LIMITS = Limits(packet_max_bytes=2000, receive_maximum=20, topic_alias_max=3, held_max_bytes=3000)

versions = st.sampled_from([V3, V5])
texts = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=12)
levels = st.text(st.characters(exclude_characters="\0+#/$", exclude_categories=["Cs"]), max_size=3)
topics = st.lists(levels, min_size=1, max_size=4).map("/".join).filter(bool)
filters = (
    st.lists(levels | st.just("+"), min_size=1, max_size=4)
    .flatmap(lambda each: st.sampled_from([each, [*each, "#"]]))
    .map("/".join)
    .filter(bool)
)
packet_ids = st.integers(1, 65_535)
user_properties = st.lists(st.tuples(texts, texts), max_size=2).map(tuple)
maybe = st.none
u32 = st.integers(0, 2**32 - 1)


@st.composite
def publishes(draw: st.DrawFn, version: int, sane: bool = True) -> Publish:
    qos = draw(st.sampled_from([0, 1, 1, 2]))
    properties = PublishProperties()
    topic = draw(topics)
    if version == V5 and draw(st.booleans()):
        properties = draw(
            st.builds(
                PublishProperties,
                payload_format_indicator=maybe() | st.integers(0, 1),
                message_expiry_interval=maybe() | u32,
                topic_alias=maybe() | st.integers(1, 3 if sane else 65_535),
                response_topic=maybe() | topics,
                correlation_data=maybe() | st.binary(max_size=8),
                user_property=user_properties,
                content_type=maybe() | texts,
            )
        )
        if properties.topic_alias and not sane and draw(st.booleans()):
            topic = ""
    dup = bool(qos) and draw(st.booleans())
    packet_id = draw(packet_ids) if qos else 0
    return Publish(topic, draw(st.binary(max_size=200)), qos, draw(st.booleans()), dup, packet_id, properties)


def subscribes(version: int) -> st.SearchStrategy[Subscribe]:
    if version == V3:
        return st.builds(
            Subscribe,
            packet_ids,
            st.lists(st.builds(Subscription, filters, st.integers(0, 2)), min_size=1).map(tuple),
        )
    subscription = st.builds(Subscription, filters, st.integers(0, 2), st.booleans(), st.booleans(), st.integers(0, 2))
    properties = st.builds(SubscribeProperties, maybe() | st.integers(1, 268_435_455), user_properties)
    return st.builds(Subscribe, packet_ids, st.lists(subscription, min_size=1, max_size=3).map(tuple), properties)


def wills(version: int) -> st.SearchStrategy[Will]:
    properties = st.builds(WillProperties, maybe() | u32, maybe() | st.integers(0, 1), user_property=user_properties)
    payload = st.binary(max_size=20)
    more = properties if version == V5 else st.just(WillProperties())
    return st.builds(Will, topics, payload, st.integers(0, 1), st.booleans(), more)


def connects(version: int) -> st.SearchStrategy[Connect]:
    name = st.tuples(maybe() | texts, maybe() | st.binary(max_size=9)).filter(
        lambda pair: version == V5 or pair[0] is not None or pair[1] is None
    )
    return st.builds(
        lambda client_id, clean, keep_alive, pair, will: Connect(
            version, client_id, clean, keep_alive, pair[0], pair[1], will
        ),
        texts.filter(bool),
        st.booleans(),
        st.integers(0, 65_535),
        name,
        maybe() | wills(version),
    )


def packets(version: int) -> st.SearchStrategy[Packet]:
    return st.one_of(
        publishes(version),
        publishes(version),
        subscribes(version),
        st.builds(Unsubscribe, packet_ids, st.lists(filters, min_size=1, max_size=3).map(tuple)),
        st.builds(Puback, packet_ids),
        st.builds(lambda kind, number: kind(number), st.sampled_from([Pubrec, Pubrel, Pubcomp]), st.integers(1, 12)),
        st.just(Pingreq()),
        connects(version),
    )


def split(data: bytes, cuts: list[int]) -> list[bytes]:
    places = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    return [data[a:b] for a, b in pairwise(places)]


def meaning(pieces: list[bytes], *, open_as: int | None = None, dear: Callable[[], int] | None = None) -> list[object]:
    """What the pieces mean, however they were grouped: messages and ids one by one, then bytes out, then the state.

    `dear`: how much of that may be done each time, until nothing is left of it.
    """
    conn = ServerConnection(LIMITS)
    if open_as is not None:
        conn.receive(encode(Connect(open_as, "c"), open_as), 0.0)
        conn.accept(False)
        conn.publish("out", b"", 1)
        conn.data_to_send()
    told: list[object] = []
    acks: list[object] = []  # gathered beside the messages, so their place among them depends on the split

    def take(events: list[Event]) -> None:
        for event in events:
            match event:
                case Publishes():
                    told.extend(event.messages)
                case Acked():
                    acks.extend(event.packet_ids)
                    acks.extend(event.refused)
                case Failed():
                    told.append(("failed", event.error.reason))
                case Released():
                    told.extend(("released", packet_id) for packet_id in event.packet_ids)
                case _:
                    told.append(event)

    for piece in pieces:
        if dear is not None:
            conn.dear_left = dear()
        take(conn.receive(piece, 0.0))
        if dear is not None and conn.waiting and dear():
            take(conn.go_on(dear(), 0.0))
    while conn.waiting:
        assert dear is not None
        take(conn.go_on(1 + dear(), 0.0))
    # The verdict comes last, so that what is held is the same in every split.
    if conn.state is State.AWAITING_VERDICT:
        take(conn.accept(False, assigned_client_id="auto"))
    told += [acks, conn.data_to_send()]
    told.append(conn.state)
    assert len(conn._buffer) <= max(LIMITS.packet_max_bytes, LIMITS.held_max_bytes)
    return told


@given(st.binary(max_size=300), versions | st.none(), st.lists(st.integers(0, 300), max_size=6))
@settings(max_examples=300, deadline=None)
def test_random_bytes_never_raise_and_mean_the_same_in_any_split(
    data: bytes, version: int | None, cuts: list[int]
) -> None:
    assert meaning(split(data, cuts), open_as=version) == meaning([data], open_as=version)


@st.composite
def damaged_traffic(draw: st.DrawFn) -> tuple[int, bytes]:
    version = draw(versions)
    data = bytearray(b"".join(encode(packet, version) for packet in draw(st.lists(packets(version), max_size=6))))
    for _ in range(draw(st.integers(0, 3))):
        if data:
            at = draw(st.integers(0, len(data) - 1))
            match draw(st.sampled_from(["set", "cut", "insert"])):
                case "set":
                    data[at] = draw(st.integers(0, 255))
                case "cut":
                    del data[at : at + draw(st.integers(1, 4))]
                case _:
                    data[at:at] = draw(st.binary(max_size=4))
    return version, bytes(data)


@given(damaged_traffic(), st.lists(st.integers(0, 2000), max_size=8))
@settings(max_examples=400, deadline=None)
def test_damaged_traffic_never_raises_and_means_the_same_in_any_split(
    traffic: tuple[int, bytes], cuts: list[int]
) -> None:
    version, data = traffic
    whole = meaning([data], open_as=version)
    assert meaning(split(data, cuts), open_as=version) == whole
    assert meaning([data[i : i + 1] for i in range(len(data))], open_as=version) == whole


@given(damaged_traffic(), st.data())
@settings(max_examples=200, deadline=None)
def test_a_whole_conversation_from_connect_means_the_same_in_any_split(
    traffic: tuple[int, bytes], data: st.DataObject
) -> None:
    version, tail = traffic
    stream = encode(data.draw(connects(version)), version) + tail
    stream = stream[: data.draw(st.integers(0, len(stream)))]
    cuts = data.draw(st.lists(st.integers(0, 3000), max_size=6))
    assert meaning(split(stream, cuts)) == meaning([stream])


@given(damaged_traffic(), st.lists(st.integers(0, 400), max_size=4), st.randoms(use_true_random=False))
@settings(max_examples=400, deadline=None)
def test_what_waits_for_its_turn_means_the_same_when_it_comes(
    traffic: tuple[int, bytes], cuts: list[int], chance: Random
) -> None:
    """However little is done at once of what is dear, and wherever more bytes come meanwhile."""
    version, data = traffic
    slow = meaning(split(data, cuts), open_as=version, dear=lambda: chance.randrange(4))
    assert slow == meaning([data], open_as=version)


@given(st.data(), versions)
@settings(max_examples=400, deadline=None)
def test_every_packet_survives_the_round_trip(data: st.DataObject, version: int) -> None:
    packet = data.draw(packets(version))
    assert decode(encode(packet, version), version) == packet


@given(versions, st.integers(0, 255), st.binary(max_size=80))
@settings(max_examples=500, deadline=None)
def test_what_decodes_encodes_to_something_that_decodes_to_the_same(version: int, first: int, body: bytes) -> None:
    try:
        check_first_byte(first, version)
        packet = decode_body(first, body, version)
    except MqttError:
        return
    spoken = packet.version if isinstance(packet, Connect) else version
    assert decode(encode(packet, spoken), spoken) == packet


@given(st.lists(publishes(V5, sane=False), max_size=12))
@settings(max_examples=300, deadline=None)
def test_the_shortcut_takes_a_publish_exactly_as_the_checks_do(sent: list[Publish]) -> None:
    """The hot loop against the general decoder, packet by packet: same messages, same error at the same place."""
    data = b"".join(encode(packet, V5) for packet in sent)
    fast = ServerConnection(LIMITS)
    slow = ServerConnection(LIMITS)
    slow._take_plain = lambda d, i, messages, acked: i  # type: ignore[method-assign]
    told = []
    for conn in (fast, slow):
        conn.receive(encode(Connect(V5, "c"), V5), 0.0)
        conn.accept(False)
        events = conn.receive(data, 0.0)
        taken = [message for event in events if isinstance(event, Publishes) for message in event.messages]
        errors = [event.error.reason for event in events if isinstance(event, Failed)]
        told.append((taken, errors, conn.unacknowledged, conn._aliases, conn.state))
    assert told[0] == told[1]


@given(damaged_traffic())
@settings(max_examples=300, deadline=None)
def test_the_shortcut_takes_damaged_traffic_exactly_as_the_checks_do(traffic: tuple[int, bytes]) -> None:
    version, data = traffic
    told = []
    for shortcut in (True, False):
        conn = ServerConnection(LIMITS)
        if not shortcut:
            conn._take_plain = lambda d, i, messages, acked: i  # type: ignore[method-assign]
        conn.receive(encode(Connect(version, "c"), version), 0.0)
        conn.accept(False)
        events = conn.receive(data, 0.0)
        taken = [message for event in events if isinstance(event, Publishes) for message in event.messages]
        told.append((taken, any(isinstance(event, Failed) for event in events), conn.state))
    assert told[0] == told[1]


@given(topics, filters)
@settings(max_examples=500, deadline=None)
def test_matching_agrees_with_the_standard_s_own_words(topic: str, filter: str) -> None:
    """A second way to decide: level by level from the left, recursively."""
    check_topic(topic)
    check_filter(filter)

    def takes(wanted: list[str], have: list[str]) -> bool:
        if not wanted:
            return not have
        if wanted[0] == "#":
            return True
        if not have:
            return False
        return wanted[0] in ("+", have[0]) and takes(wanted[1:], have[1:])

    assert filter_matches(filter, topic) == takes(filter.split("/"), topic.split("/"))


@given(topics)
def test_a_topic_is_taken_by_itself_and_by_everything(topic: str) -> None:
    assert filter_matches(topic, topic)
    assert filter_matches("#", topic)
    assert filter_matches("/".join("+" for _ in topic.split("/")), topic)


# ------------------------------------------------------------------------------------------------- QoS 2, both ways

ack_kinds = st.sampled_from([Puback, Pubrec, Pubrel, Pubcomp])


@st.composite
def answers(draw: st.DrawFn, version: int) -> Ack:
    """With reasons that the packet may carry, and now and then for an id that is nobody's."""
    kind = draw(ack_kinds)
    reason = 0
    if version == V5 and draw(st.booleans()):
        reason = draw(st.sampled_from([0, 0x92] if kind in (Pubrel, Pubcomp) else [0, 0x10, 0x80, 0x97]))
    return kind(draw(st.integers(1, 12)), reason)


@st.composite
def exchanges(draw: st.DrawFn) -> tuple[int, int, int, list[tuple[str, object]]]:
    """(version, receive maximum, alias maximum, what the two sides do), the client within or beside the protocol."""
    version = draw(versions)
    qos_2 = st.builds(
        lambda topic, payload, number, dup: Publish(topic, payload, 2, False, dup, number),
        topics,
        st.binary(max_size=20),
        st.integers(1, 12),
        st.booleans(),
    )
    step = st.one_of(
        st.tuples(st.just("client"), answers(version) | answers(version) | qos_2 | publishes(version)),
        st.tuples(st.just("publish"), st.tuples(topics, st.integers(0, 2))),
        st.tuples(st.just("encoded"), st.tuples(topics, st.integers(0, 2))),
        st.tuples(st.just("again"), st.integers(1, 12)),
        st.tuples(st.just("in use"), st.integers(1, 12)),
        st.tuples(st.just("answer"), st.sampled_from([0, 0x97])),
    )
    steps = draw(st.lists(step, max_size=30))
    return version, draw(st.integers(1, 5)), draw(st.integers(0, 3)), steps


class Ours:
    """What a client that reads all that we write knows of it."""

    def __init__(self, version: int, receive_maximum: int, alias_maximum: int) -> None:
        self.version = version
        self.receive_maximum = receive_maximum
        self.alias_maximum = alias_maximum
        self.aliases: dict[int, str] = {}
        self.unfinished: dict[int, type[Ack]] = {}
        self.topics: list[str] = []

    def read(self, data: bytes) -> None:
        at = 0
        while at < len(data):
            framed = remaining_length(data, at)
            assert framed is not None
            size, begin = framed
            packet = decode_body(data[at], data[begin : begin + size], self.version)
            at = begin + size
            if isinstance(packet, Publish):
                self._publish(packet)

    def _publish(self, packet: Publish) -> None:
        alias = packet.properties.topic_alias
        if alias is not None:
            assert 1 <= alias <= self.alias_maximum
            if packet.topic:
                self.aliases[alias] = packet.topic
        self.topics.append(packet.topic or self.aliases[alias or 0])
        if packet.qos:
            assert packet.packet_id not in self.unfinished, "a packet id in flight"
            self.unfinished[packet.packet_id] = Puback if packet.qos == 1 else Pubrec
            assert self.version == V3 or len(self.unfinished) <= self.receive_maximum

    def told(self, packet: Ack) -> None:
        """The client answers, if that is what is waited for."""
        number, awaited = packet.packet_id, self.unfinished.get(packet.packet_id)
        if awaited is not type(packet):
            return
        if isinstance(packet, Pubrec) and packet.reason < 0x80:
            self.unfinished[number] = Pubcomp
        else:
            del self.unfinished[number]


@given(exchanges(), st.booleans())
@settings(max_examples=600, deadline=None)
def test_no_answer_of_a_client_raises_or_makes_us_break_its_limits(
    exchange: tuple[int, int, int, list[tuple[str, object]]], small: bool
) -> None:
    version, receive_maximum, alias_maximum, steps = exchange
    properties = ConnectProperties()
    if version == V5:
        properties = ConnectProperties(
            receive_maximum=receive_maximum,
            topic_alias_maximum=alias_maximum,
            maximum_packet_size=100 if small else None,
        )
    conn = ServerConnection(LIMITS)
    conn.receive(encode(Connect(version, "c", properties=properties), version), 0.0)
    conn.accept(False)
    conn.data_to_send()
    ours = Ours(version, receive_maximum, alias_maximum)
    said: list[str] = []
    wanted: list[tuple[int, bytes]] = []  # QoS and id, to be answered
    released: list[int] = []
    for what, argument in steps:
        if conn.state is not State.OPEN:
            break
        match what:
            case "client":
                assert isinstance(argument, Publish | Ack)
                if isinstance(argument, Ack):
                    ours.told(argument)
                for event in conn.receive(encode(argument, version), 0.0):
                    match event:
                        case Publishes():
                            wanted += [(m[1], m[4]) for m in event.messages if m[1]]
                        case Released():
                            released += event.packet_ids
                        case Received():
                            conn.pubrel(event.packet_ids)
            case "publish" | "encoded":
                assert isinstance(argument, tuple)
                topic, qos = argument
                if what == "encoded" and conn.plain:
                    head, tail = Delivery(topic, b"x", qos, False, None, None, None).packet(version, qos, False, ())
                    number = conn.publish_encoded(head, tail, qos)
                else:
                    try:
                        number = conn.publish(topic, b"x", qos)
                    except TooLargeForPeer:
                        number = None
                if number is not None:
                    said.append(topic)
            case "again":
                assert isinstance(argument, int)
                if argument not in conn._in_flight and conn.reserve(2, argument) is not None:
                    conn.publish("again", b"", 2, dup=True, packet_id=argument)
                    said.append("again")
            case "in use":
                assert isinstance(argument, int)
                if argument not in conn._in_flight:
                    conn.in_use([argument])
            case _:
                assert isinstance(argument, int)
                for qos, number in wanted:
                    (conn.pubrec if qos == 2 else conn.puback)([number], argument)
                wanted.clear()
                conn.pubcomp(released)
                released.clear()
        ours.read(conn.data_to_send())
        assert len(conn._in_flight) <= LIMITS.send_window_max
        assert len(conn._aliases_set) <= alias_maximum
        assert version == V3 or conn.unacknowledged <= LIMITS.receive_maximum
        assert conn.state is not State.OPEN or set(ours.unfinished) == set(conn._in_flight)
    assert ours.topics == said
    assert not conn._buffer


@given(exchanges(), st.lists(st.integers(0, 2000), max_size=6))
@settings(max_examples=200, deadline=None)
def test_an_exchange_of_qos_2_means_the_same_in_any_split(
    exchange: tuple[int, int, int, list[tuple[str, object]]], cuts: list[int]
) -> None:
    version, _, _, steps = exchange
    data = b"".join(encode(a, version) for what, a in steps if what == "client" and isinstance(a, Publish | Ack))
    told = []
    for pieces in ([data], split(data, cuts)):
        conn = ServerConnection(LIMITS)
        conn.receive(encode(Connect(version, "c"), version), 0.0)
        conn.accept(False)
        for qos in (2, 1, 2, 2, 1):
            conn.publish("out", b"", qos)
        conn.data_to_send()
        flat: dict[str, list[object]] = {}
        for piece in pieces:
            for event in conn.receive(piece, 0.0):
                match event:
                    case Publishes():
                        flat.setdefault("messages", []).extend(event.messages)
                    case Failed():
                        flat.setdefault("failed", []).append(event.error.reason)
                    case Acked() | Received():
                        flat.setdefault(type(event).__name__, []).extend([*event.packet_ids, *event.refused])
                    case Released() | Completed():
                        flat.setdefault(type(event).__name__, []).extend(event.packet_ids)
        for refusable in (
            "Acked",
            "Received",
        ):  # ids and refusals are told together, so their order depends on the split
            flat[refusable] = sorted(flat.get(refusable, []), key=repr)
        told.append((flat, conn.data_to_send(), conn.state, conn._in_flight, conn.unacknowledged))
    assert told[0] == told[1]
