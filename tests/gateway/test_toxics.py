"""One contract for Toxiproxy and for our own small server of its interface, driven by the same client."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import requests
from toxiproxy import Toxiproxy
from toxiproxy.exceptions import InvalidToxic, NotFound, ProxyExists

from gateway.simulate.proxy import FaultyLine, LineState, Server, free_ports, line_state, toxiproxy_binary
from gateway.simulate.scenario import Step
from tests import parts

HOST = "127.0.0.1"
WAIT_S = 40.0


class Echo:
    """Sends back what it gets."""

    def __init__(self) -> None:
        self.sock = socket.create_server((HOST, 0))
        self.address = f"{HOST}:{self.sock.getsockname()[1]}"
        self.connections: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self.sock.accept()
            except OSError:
                return
            self.connections.append(connection)
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection:
            try:
                while data := connection.recv(65536):
                    connection.sendall(data)
            except OSError:
                return  # reset, as some tests want it

    def close(self) -> None:
        self.sock.close()


@pytest.fixture(scope="module", params=["toxiproxy", "built-in"])
def url(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    if request.param == "toxiproxy":
        binary = toxiproxy_binary()
        if binary is None:
            reason = parts.available("toxiproxy")
            pytest.skip(reason or "toxiproxy-server is neither on the PATH nor in .parts")
        command = [str(binary)]
    else:
        command = [sys.executable, "-m", "gateway.simulate.toxics"]
    (port,) = free_ports(1)
    log_path: Path = tmp_path_factory.mktemp("proxy") / "log"
    with log_path.open("wb") as log:
        process = subprocess.Popen([*command, "-host", HOST, "-port", str(port)], stdout=log, stderr=log)
    try:
        end = time.monotonic() + WAIT_S
        while True:
            try:
                requests.get(f"http://{HOST}:{port}/version", timeout=1)
                break
            except requests.ConnectionError:
                assert process.poll() is None, log_path.read_text()
                assert time.monotonic() < end, log_path.read_text()
                time.sleep(0.02)
        yield f"http://{HOST}:{port}"
        assert process.poll() is None, log_path.read_text()
        text = log_path.read_text()
        assert "Traceback" not in text, text
    finally:
        process.terminate()
        process.wait(WAIT_S)


@pytest.fixture
def client(url: str) -> Iterator[Toxiproxy]:
    client = Toxiproxy()
    client.update_api_consumer(HOST, int(url.rpartition(":")[2]))
    yield client
    client.destroy_all()


@pytest.fixture
def echo() -> Iterator[Echo]:
    with closing(Echo()) as server:
        yield server


@pytest.fixture
def proxy(client: Toxiproxy, echo: Echo) -> Any:
    return client.create(upstream=echo.address, name="line", listen=f"{HOST}:0")


def dial(proxy: Any, timeout_s: float = WAIT_S) -> socket.socket:
    host, _, port = proxy.listen.rpartition(":")
    return socket.create_connection((host, int(port)), timeout_s)


def round_trip(sock: socket.socket, data: bytes) -> float:
    began = time.monotonic()
    sock.sendall(data)
    got = bytearray()
    while len(got) < len(data):
        piece = sock.recv(65536)
        assert piece, f"closed after {len(got)} of {len(data)} bytes"
        got += piece
    assert bytes(got) == data
    return time.monotonic() - began


def test_what_is_sent_through_a_proxy_comes_back_whole(proxy: Any) -> None:
    with dial(proxy) as sock:
        round_trip(sock, os.urandom(1 << 20))


def test_a_proxy_is_created_listed_shown_updated_and_deleted(url: str, client: Toxiproxy, echo: Echo) -> None:
    created = client.create(upstream=echo.address, name="one", listen=f"{HOST}:0")
    assert created.enabled
    assert int(created.listen.rpartition(":")[2]) > 0
    assert client.get_proxy("one").upstream == echo.address
    assert requests.get(f"{url}/proxies/one", timeout=5).json()["toxics"] == []
    created.disable()
    assert not client.get_proxy("one").enabled
    created.enable()
    assert client.get_proxy("one").listen == created.listen
    assert created.destroy()
    assert client.proxies() == {}


def test_a_proxy_with_a_taken_name_is_refused(url: str, client: Toxiproxy, proxy: Any, echo: Echo) -> None:
    answer = requests.post(f"{url}/proxies", json={"name": "line", "upstream": echo.address}, timeout=5)
    assert answer.status_code == 409
    with pytest.raises(ProxyExists):
        client.create(upstream=echo.address, name="line")


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "/proxies", '{"name": "x"}', 400),
        ("POST", "/proxies", "{", 400),
        ("GET", "/proxies/none", None, 404),
        ("DELETE", "/proxies/none", None, 404),
        ("GET", "/proxies/line/toxics/none", None, 404),
        ("POST", "/proxies/line/toxics", '{"type": "none"}', 400),
        ("POST", "/proxies/line/toxics", '{"type": "latency", "stream": "sideways"}', 400),
        ("POST", "/proxies/line/toxics", '{"type": "bandwidth", "attributes": {"rate": 1.2}}', 400),
        ("GET", "/nothing", None, 404),
        ("PUT", "/proxies", "{}", 405),
        ("GET", "/version", None, 200),
        ("POST", "/reset", None, 204),
    ],
)
def test_requests_are_answered_with_toxiproxys_status(
    url: str, proxy: Any, method: str, path: str, body: str | None, status: int
) -> None:
    assert requests.request(method, url + path, data=body, timeout=5).status_code == status


def test_toxics_are_added_listed_updated_and_deleted(url: str, proxy: Any) -> None:
    proxy.add_toxic(type="latency", stream="upstream", attributes={"latency": 7})
    toxic = proxy.get_toxic("latency_upstream")
    assert (toxic.type, toxic.stream, toxic.toxicity) == ("latency", "upstream", 1)
    assert toxic.attributes == {"latency": 7, "jitter": 0}
    answer = requests.post(f"{url}/proxies/line/toxics", json={"type": "latency", "stream": "upstream"}, timeout=5)
    assert answer.status_code == 409
    changed = {"attributes": {"latency": 9}}
    answer = requests.post(f"{url}/proxies/line/toxics/latency_upstream", json=changed, timeout=5)
    assert answer.json()["attributes"]["latency"] == 9
    assert proxy.destroy_toxic("latency_upstream")
    assert proxy.toxics() == {}
    with pytest.raises(NotFound):
        proxy.destroy_toxic("latency_upstream")
    with pytest.raises(InvalidToxic):
        proxy.add_toxic(type="none")


def quickest(sock: socket.socket) -> float:
    """Of a few round trips: what another program's turn on the processor adds is not the line's."""
    return min(round_trip(sock, b"%d" % n) for n in range(5))


def test_latency_delays_one_direction_and_goes_with_the_toxic(proxy: Any) -> None:
    with dial(proxy) as sock:
        assert quickest(sock) < 0.25
        proxy.add_toxic(type="latency", stream="downstream", attributes={"latency": 300})
        assert 0.28 < quickest(sock) < 1.0
        proxy.destroy_toxic("latency_downstream")
        assert quickest(sock) < 0.25


def test_a_delayed_connection_is_pipelined_not_slowed(proxy: Any) -> None:
    proxy.add_toxic(type="latency", stream="downstream", attributes={"latency": 300})
    with dial(proxy) as sock:
        assert round_trip(sock, os.urandom(1 << 20)) < 10.0


def test_what_a_stall_held_back_arrives_when_it_ends(proxy: Any) -> None:
    with dial(proxy) as sock:
        proxy.add_toxic(type="latency", stream="upstream", attributes={"latency": 600_000})
        sock.sendall(b"held")
        sock.settimeout(0.3)
        with pytest.raises(TimeoutError):
            sock.recv(1)
        proxy.destroy_toxic("latency_upstream")
        sock.settimeout(WAIT_S)
        assert sock.recv(4) == b"held"


def test_bandwidth_limits_the_rate(proxy: Any) -> None:
    proxy.add_toxic(type="bandwidth", stream="upstream", attributes={"rate": 50})
    with dial(proxy) as sock:
        assert 0.7 < round_trip(sock, os.urandom(50_000)) < 10.0


def test_a_timeout_of_zero_swallows_until_it_is_removed_and_then_closes(proxy: Any) -> None:
    with dial(proxy) as sock:
        round_trip(sock, b"before")
        proxy.add_toxic(type="timeout", stream="upstream", attributes={"timeout": 0})
        sock.sendall(b"lost")
        sock.settimeout(0.3)
        with pytest.raises(TimeoutError):
            sock.recv(1)
        proxy.destroy_toxic("timeout_upstream")
        sock.settimeout(WAIT_S)
        assert gone(sock)
    with dial(proxy) as sock:
        round_trip(sock, b"after")


def gone(sock: socket.socket) -> bool:
    try:
        return sock.recv(1) == b""
    except ConnectionResetError:
        return True


def test_only_the_answers_are_lost_where_the_toxic_is_downstream(proxy: Any, echo: Echo) -> None:
    with dial(proxy) as sock:
        round_trip(sock, b"before")
        proxy.add_toxic(type="timeout", stream="downstream", attributes={"timeout": 0})
        sock.sendall(b"arrives")
        sock.settimeout(0.3)
        with pytest.raises(TimeoutError):
            sock.recv(1)


def test_a_timeout_closes_the_connection_after_its_time(proxy: Any) -> None:
    proxy.add_toxic(type="timeout", stream="downstream", attributes={"timeout": 200})
    with dial(proxy) as sock:
        began = time.monotonic()
        assert gone(sock)
        assert 0.15 < time.monotonic() - began < 10.0


def test_reset_peer_resets_a_new_connection_that_sends(proxy: Any) -> None:
    proxy.add_toxic(type="reset_peer", stream="downstream", attributes={"timeout": 0})
    proxy.add_toxic(type="reset_peer", stream="upstream", attributes={"timeout": 0})
    with dial(proxy) as sock:
        sock.sendall(b"hello")
        with pytest.raises(ConnectionResetError):
            sock.recv(1)


def test_slow_close_delays_the_end(proxy: Any, echo: Echo) -> None:
    proxy.add_toxic(type="slow_close", stream="downstream", attributes={"delay": 400})
    with dial(proxy) as sock:
        round_trip(sock, b"hello")
        began = time.monotonic()
        echo.connections[0].shutdown(socket.SHUT_RDWR)
        assert gone(sock)
        assert 0.3 < time.monotonic() - began < 10.0


def test_limit_data_closes_after_so_many_bytes(proxy: Any) -> None:
    proxy.add_toxic(type="limit_data", stream="downstream", attributes={"bytes": 10})
    with dial(proxy) as sock:
        sock.sendall(b"0123456789abcdef")
        got = bytearray()
        while piece := sock.recv(100):
            got += piece
        assert bytes(got) == b"0123456789"


def received_until_quiet(sock: socket.socket) -> int:
    sock.settimeout(0.5)
    count = 0
    try:
        while piece := sock.recv(65536):
            count += len(piece)
    except TimeoutError:
        return count
    pytest.fail("the connection ended, and a tunnel ends nothing")


def step(**keys: object) -> Step:
    return Step.model_validate({"for": "10s"} | keys)


NARROW = step(link="up", latency="100ms", bandwidth="9.6kbit/s")


@pytest.fixture
def line(url: str, proxy: Any) -> Iterator[FaultyLine]:
    with closing(FaultyLine(Server(HOST, int(url.rpartition(":")[2]), "under test"), proxy.upstream)) as line:
        yield line


def apply_quickly(line: FaultyLine, state: LineState) -> None:
    began = time.monotonic()
    line.apply(state)
    assert time.monotonic() - began < 10.0  # what was queued would take a minute


def test_a_tunnel_after_a_narrow_radio_begins_at_once_and_swallows_what_was_queued(line: FaultyLine) -> None:
    line.apply(line_state(NARROW))
    with socket.create_connection((HOST, line.port), WAIT_S) as sock:
        round_trip(sock, b"before")
        sock.sendall(os.urandom(20_000))
        apply_quickly(line, line_state(step(link="tunnel")))
        assert received_until_quiet(sock) < 5_000
    apply_quickly(line, LineState())
    with socket.create_connection((HOST, line.port), WAIT_S) as sock:
        assert round_trip(sock, os.urandom(20_000)) < 5.0


def test_wi_fi_after_a_narrow_radio_takes_what_was_queued_at_once(line: FaultyLine) -> None:
    line.apply(line_state(NARROW))
    with socket.create_connection((HOST, line.port), WAIT_S) as sock:
        data = os.urandom(60_000)
        sock.sendall(data)
        time.sleep(0.5)  # so that the queue stands in every toxic
        apply_quickly(line, line_state(step(link="up", latency="10ms", bandwidth="54Mbit/s")))
        got = bytearray()
        sock.settimeout(3.0)
        while len(got) < len(data):
            got += sock.recv(65536)
        assert bytes(got) == data


def test_a_disabled_proxy_drops_its_connections_and_refuses_new_ones(proxy: Any) -> None:
    with dial(proxy) as sock:
        round_trip(sock, b"before")
        proxy.disable()
        assert gone(sock)
        with pytest.raises(ConnectionRefusedError):
            dial(proxy)
        proxy.enable()
    with dial(proxy) as sock:
        round_trip(sock, b"after")


def test_reset_takes_every_toxic_and_enables_every_proxy(client: Toxiproxy, proxy: Any) -> None:
    proxy.add_toxic(type="latency", attributes={"latency": 1000})
    proxy.disable()
    assert client.reset()
    assert client.get_proxy("line").enabled
    assert client.get_proxy("line").toxics() == {}


def test_two_proxies_in_a_row_keep_a_half_open_connection(client: Toxiproxy, echo: Echo) -> None:
    """What `half-open` rests on: the far end is gone, the near end is not told, and who dials anew gets through."""
    far = client.create(upstream=echo.address, name="far", listen=f"{HOST}:0")
    near = client.create(upstream=far.listen, name="near", listen=f"{HOST}:0")
    with dial(near) as old:
        round_trip(old, b"before")
        near.add_toxic(type="slow_close", stream="downstream", attributes={"delay": 60_000})
        far.disable()
        far.enable()
        old.sendall(b"into the void")
        old.settimeout(0.5)
        with pytest.raises(TimeoutError):
            old.recv(1)
        with dial(near) as new:
            round_trip(new, b"after")
        old.sendall(b"still not told")
        with pytest.raises(TimeoutError):
            old.recv(1)
