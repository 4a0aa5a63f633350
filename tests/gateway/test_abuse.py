"""One app misbehaves as badly as it can: another one keeps publishing, and the daemon's memory and log stay bounded.

Real processes, sockets and TLS, on a machine that may do much else: a daemon that let itself be stopped would show no
rate at all. What exactly an app keeps is for test_fairness, and for `tests.bench.abuse` on a quiet machine.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.attacks import Attacker
from tests.bench.abuse import App, Yard
from tests.pki import Pki

RATE_MIN = 0.05  # attacker, app and daemon share perhaps two processors with whatever else runs
GROWTH_BYTES_MAX = 192 << 20  # a thousand handshakes of 64 KB buffers, and OpenSSL's own
LOG_BYTES_MAX = 8 << 20
WINDOW_S = 0.5
LOOKS = 8  # how often it is looked at what is left, on a machine that may be busy with others

# Those that need sockets, TLS or much memory; test_fairness has the others.
ATTACKS = [
    "half_open_tls",
    "tls_hellos",
    "connect_and_leave",
    "wills",
    "slowloris",
    "huge_subscribes",
    "retained",
    "pings",
    "websocket_frames",
]


@pytest.fixture
def yard(tmp_path: Path, pki: Pki) -> Iterator[Yard]:
    yard = Yard(tmp_path, pki)
    yield yard
    yard.end()


@pytest.mark.parametrize("attack", ATTACKS)
def test_others_keep_publishing_and_memory_stays_bounded(yard: Yard, attack: str) -> None:
    with App(yard.port) as app:
        time.sleep(0.2)
        alone = app.rate(WINDOW_S)
        memory_bytes = yard.rss_bytes()
        attacker = Attacker(attack, yard.ports)
        try:
            attacker.begun()
            under = [app.rate(WINDOW_S)]
            while len(under) < LOOKS and under[-1] <= RATE_MIN * alone:
                under.append(app.rate(WINDOW_S))
            grown_bytes = yard.rss_bytes() - memory_bytes
        finally:
            done = attacker.end()
        app.acknowledged()  # its connection is still there
    assert done["units"] > 0
    assert yard.process.poll() is None, yard.log.read_text()[-2000:]
    assert under[-1] > RATE_MIN * alone, (alone, under)
    assert grown_bytes < GROWTH_BYTES_MAX
    assert yard.log.stat().st_size < LOG_BYTES_MAX


def test_who_connects_too_fast_is_refused_and_the_log_does_not_grow_with_it(tmp_path: Path) -> None:
    import asyncio
    import logging

    from gateway.accepting import open_server
    from gateway.config_values import Listen
    from gateway.transports import Handshakes
    from security.admission import REPORTS_MAX, Admission, Rate

    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("lineside.listen").addHandler(handler)
    begun = 0

    class Silent(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            nonlocal begun
            begun += 1
            assert isinstance(transport, asyncio.Transport)
            transport.write(b"in")

    async def run(listen: Listen) -> list[bytes]:
        now = asyncio.get_running_loop().time()
        few = Rate(0.001, 3.0)
        handshakes = Handshakes(100, Admission(now, few, few))
        server = await open_server(Silent, listen, handshakes)
        heard = []
        for _ in range(20):
            if listen.path:
                reader, writer = await asyncio.open_unix_connection(listen.path)
            else:
                reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname()[:2])
            try:
                heard.append(await asyncio.wait_for(reader.read(2), 10))
            except ConnectionResetError:
                heard.append(b"")
            writer.close()
        server.close()
        return heard

    try:
        for listen in (Listen("127.0.0.1", 0), Listen("", 0, path=str(tmp_path / "sock"))):
            begun, lines[:] = 0, []
            assert asyncio.run(run(listen)) == [b"in"] * 3 + [b""] * 17
            assert begun == 3
            assert lines == ["connection refused: too many from there in too little time"] * REPORTS_MAX
    finally:
        logging.getLogger("lineside.listen").removeHandler(handler)
