"""Two addresses of one hub, a daemon behind each: to the second when the first dies, and back when it is there."""

from __future__ import annotations

import socket
from pathlib import Path

from tests.daemon import CONFIG, HUB_CONFIG, Client, Daemon, Reader, free_port, wait_until

WINDOW = 1000
FAIL_BACK_S_MAX = 45.0


def in_order_but_for_repeats(values: list[int]) -> bool:
    """First arrivals ascend."""
    firsts = list(dict.fromkeys(values))
    return firsts == sorted(firsts)


def test_the_second_address_takes_over_and_the_first_gets_the_traffic_back_nothing_lost_or_reordered(
    tmp_path: Path,
) -> None:
    ports = free_port(), free_port()
    for name in ("first", "second", "gateway"):
        (tmp_path / name).mkdir()
    first, second = (Daemon(tmp_path / n, HUB_CONFIG, p) for n, p in zip(("first", "second"), ports, strict=True))
    config = CONFIG.replace(
        'amqp://127.0.0.1:{hub_port}"]', f'amqp://127.0.0.1:{{hub_port}}", "amqp://127.0.0.1:{ports[1]}"]'
    )
    assert config != CONFIG
    daemons = [first, second]
    try:
        for hub in daemons:
            hub.status()
        there, other = Reader(first), Reader(second)
        gateway = Daemon(tmp_path / "gateway", config, ports[0])
        daemons.append(gateway)
        gateway.status()
        app = Client(gateway.port)
        number = 0

        def say(count: int) -> None:
            nonlocal number
            for _ in range(count):
                app.client.publish("train/speed", b"%d" % number, qos=1)
                number += 1

        say(500)
        wait_until(lambda: len(there.got) == 500)
        there.client.close()
        first.end()
        say(500)
        wait_until(lambda: other.got and other.got[-1] == 999)
        assert in_order_but_for_repeats(other.got)
        assert set(range(500, 1000)) <= set(other.got)
        assert len(other.got) <= 500 + WINDOW

        with gateway.paused():  # a topic keeps nothing of what comes before its reader
            first.start()
            first.status()
            back = Reader(first)
        before = len(other.got)

        def returned() -> bool:
            say(5)
            return bool(back.got)

        wait_until(returned, FAIL_BACK_S_MAX)
        wait_until(lambda: not gateway.stream()["waiting"])
        wait_until(lambda: back.got[-1] == number - 1)
        moved = other.got[before:] + back.got
        assert list(dict.fromkeys(moved)) == list(range(1000, number))
        assert len(moved) == number - 1000, "the window was let run empty first, so nothing goes twice"
    finally:
        for daemon in daemons:
            daemon.end()


def test_an_address_where_nobody_answers_is_passed_over_and_tried_again(tmp_path: Path) -> None:
    """A machine that is switched off says nothing, not even no."""
    hub_port = free_port()
    for name in ("hub", "gateway"):
        (tmp_path / name).mkdir()
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections in the kernel, and never reads
        dead_port = silent.getsockname()[1]
        config = CONFIG.replace(
            '"amqp://127.0.0.1:{hub_port}"', f'"amqp://127.0.0.1:{dead_port}", "amqp://127.0.0.1:{hub_port}"'
        )
        hub = Daemon(tmp_path / "hub", HUB_CONFIG, hub_port)
        daemons = [hub]
        try:
            hub.status()
            reader = Reader(hub)
            gateway = Daemon(tmp_path / "gateway", config, hub_port)
            daemons.append(gateway)
            gateway.status()
            app = Client(gateway.port)
            app.publish(100)
            wait_until(lambda: len(reader.got) == 100, within_s=FAIL_BACK_S_MAX)
            assert reader.got == list(range(100))
            app.close()
            reader.client.close()
        finally:
            for daemon in daemons:
                daemon.end()
