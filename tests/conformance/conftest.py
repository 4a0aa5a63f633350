"""One daemon for each module of conformance tests, and clients of it that are closed when their test ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.conformance.client import V3, V5, Client
from tests.daemon import Daemon

RECEIVE_MAXIMUM = 20
KEEP_ALIVE_MAX_S = 60
PACKET_MAX_BYTES = 128 << 10

CONFIG = f"""
[gateway]
id = "conformance"
state_dir = "{{state}}"
[mqtt]
listen = ["127.0.0.1:{{port}}"]
receive_maximum = {RECEIVE_MAXIMUM}
keep_alive_max_s = {KEEP_ALIVE_MAX_S}
packet_max = "{PACKET_MAX_BYTES >> 10}KiB"
"""

Connector = Callable[..., Client]
Dial = Callable[[int], Client]


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    daemon = Daemon(tmp_path_factory.mktemp("conformance"), CONFIG)
    try:
        daemon.status()  # it listens
        yield daemon
        assert daemon.process.poll() is None, daemon.log.read_text()  # nothing that a client sent ended it
    finally:
        daemon.end()


@pytest.fixture(params=[V3, V5], ids=["3.1.1", "5.0"])
def version(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture
def dial(daemon: Daemon) -> Iterator[Dial]:
    """A TCP connection that has said nothing yet, for a protocol version."""
    clients: list[Client] = []

    def dial(version: int) -> Client:
        clients.append(Client(daemon.port, version))
        return clients[-1]

    yield dial
    for client in clients:
        client.stream.close()


@pytest.fixture
def join(dial: Dial) -> Connector:
    """A client that is connected: `join(version, client_id, clean=..., props=...)`."""

    def join(version: int, client_id: str | None = None, **options: object) -> Client:
        client = dial(version)
        assert client.connect(client_id, **options).reason == 0
        return client

    return join
