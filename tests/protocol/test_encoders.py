"""Which messages with properties are encoded alike, and that no more is kept of them than is said."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gateway.mqtt.mapping import Encoders, template_with
from gateway.mqtt.packets import PublishProperties
from gateway.routing import Route
from storeforward.streams import Stream

IDENTITY = "loco", "1"
TEXT = PublishProperties(content_type="text/plain", user_property=(("line", "S5"), ("line", "S6")))


def route(topic: str = "train/speed", ttl_us: int | None = None) -> Route:
    stream = Stream(1, "telemetry", "outbound", next_seq=1, first_seq=1, rows=0, size_bytes=0, committed=1)
    return Route(stream, topic, lambda seq, payload: b"", ttl_us, "edge", "_AMQ_DUPL_ID", True)


def test_the_same_properties_on_the_same_route_are_laid_out_once_and_as_each_message_alone_would_be() -> None:
    encoders, way = Encoders(IDENTITY), route()
    encode = encoders.of(way, 1, TEXT)
    assert encode is not None
    assert encoders.of(way, 1, TEXT) is encode
    assert encode(7, b"x") == template_with(IDENTITY, way, 1, TEXT, 0)[0].encode(7, b"x")
    other = encoders.of(route("train/doors"), 1, TEXT)
    assert other is not None
    assert other(7, b"x") == template_with(IDENTITY, route("train/doors"), 1, TEXT, 0)[0].encode(7, b"x")


@pytest.mark.parametrize(
    "own",
    [
        {"message_expiry_interval": 0},
        {"message_expiry_interval": 5},
        {"response_topic": "back"},
        {"correlation_data": b""},
        {"payload_format_indicator": 1},
    ],
    ids=str,
)
def test_a_message_that_expires_asks_or_has_to_be_looked_at_goes_its_own_way(own: dict[str, object]) -> None:
    encoders = Encoders(IDENTITY)
    assert encoders.of(route(), 1, replace(TEXT, **own)) is None  # type: ignore[arg-type]
    assert encoders.of(route(), 1, replace(TEXT, payload_format_indicator=0)) is not None


def test_where_messages_expire_by_configuration_each_goes_its_own_way() -> None:
    assert Encoders(IDENTITY).of(route(ttl_us=1_000_000), 1, TEXT) is None


def test_properties_that_are_new_with_each_message_do_not_pile_up_nor_are_they_mistaken_for_others() -> None:
    encoders, way = Encoders(IDENTITY, entries_max=8), route()
    for n in range(100):
        properties = PublishProperties(user_property=(("at", str(n)),))
        encode = encoders.of(way, 1, properties)
        assert encode is not None
        assert str(n).encode() in encode(0, b"")
        assert len(encoders) <= 8
