"""What operators are told of hubs that say yes too easily."""

from __future__ import annotations

import pytest

from gateway.uplink.quirks import advice

OLD = {"product": "RabbitMQ", "version": "3.10.8"}


@pytest.mark.parametrize("address", ["/amq/queue/a", "/exchange/e/key", "/topic/key", "plain"])
def test_old_rabbitmq_may_lose_what_goes_to_anything_but_a_queue_that_the_attach_makes(address: str) -> None:
    told = advice(OLD, address)
    assert told is not None
    assert address in told
    assert "3.10.8" in told
    assert "/queue/NAME" in told


@pytest.mark.parametrize(
    ("hub", "address"),
    [
        (OLD, "/queue/a"),
        ({"product": "RabbitMQ", "version": "4.0.1"}, "/exchanges/e/key"),
        ({"product": "RabbitMQ", "version": "10.0"}, "plain"),
        ({"product": "RabbitMQ"}, "plain"),
        ({"product": "apache-activemq-artemis", "version": "2.40.0"}, "plain"),
        ({}, "plain"),
    ],
)
def test_others_need_no_advice(hub: dict[str, object], address: str) -> None:
    assert advice(hub, address) is None
