"""Sockets that outlive the daemon: found by address, not by luck, and nobody is refused while it restarts."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from gateway.activation import PassedSockets, stored_name
from gateway.config_values import Listen, parse_listen
from tests.daemon import WAIT_S, Client, Daemon

# What systemd does: the sockets as descriptors 3 and up, and the number of the process that is to have them.
AS_SYSTEMD = """
import os, sys
fds = [int(fd) for fd in sys.argv[1].split(",")]
for n, fd in enumerate(fds):
    os.dup2(fd, 100 + n)
for n in range(len(fds)):
    os.dup2(100 + n, 3 + n)
os.environ |= {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": str(len(fds)), "LISTEN_FDNAMES": "a:b"}
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""


def listening(address: tuple[str, int] | str, family: socket.AddressFamily = socket.AF_INET) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX if isinstance(address, str) else family)
    sock.bind(address)
    sock.listen(50)
    return sock


def passed(*sockets: socket.socket) -> PassedSockets:
    first = 500
    for n, sock in enumerate(sockets):
        os.dup2(sock.fileno(), first + n)
    environment = {"LISTEN_PID": "42", "LISTEN_FDS": str(len(sockets)), "LISTEN_FDNAMES": "x"}
    found = PassedSockets.from_environment(environment, pid=42, first_fd=first)
    assert environment == {}, "not for our children"
    return found


def test_each_socket_is_found_by_the_address_it_is_bound_to(tmp_path: Path) -> None:
    path = str(tmp_path / "mqtt.sock")
    sockets = [
        listening(("127.0.0.1", 0)),
        listening(("127.0.0.1", 0)),
        listening(("::1", 0), socket.AF_INET6),
        listening(path),
    ]
    ports = [sock.getsockname()[1] for sock in sockets[:3]]
    found = passed(*sockets)
    wanted = [f"127.0.0.1:{ports[0]}", f"mqtts://localhost:{ports[1]}", f"[::1]:{ports[2]}", f"unix:{path}"]
    for text, sock in reversed(list(zip(wanted, sockets, strict=True))):
        with closing(found.take(parse_listen(text))) as taken:  # type: ignore[type-var]
            assert taken is not None
            assert taken.getsockname() == sock.getsockname()
        assert found.take(parse_listen(text)) is None, "one socket, one owner"
    for sock in sockets:
        sock.close()


def test_what_does_not_listen_there_is_not_taken() -> None:
    not_listening = socket.socket()
    not_listening.bind(("127.0.0.1", 0))
    datagrams = socket.socket(type=socket.SOCK_DGRAM)
    datagrams.bind(("127.0.0.1", 0))
    there = listening(("127.0.0.1", 0))
    found = passed(not_listening, datagrams, there)
    for sock in (not_listening, datagrams):
        assert found.take(Listen("127.0.0.1", sock.getsockname()[1])) is None
    port = there.getsockname()[1]
    assert found.take(Listen("0.0.0.0", port)) is None
    assert found.take(Listen("127.0.0.1", port + 1)) is None
    assert found.take(Listen("box.example", port)) is None
    for sock in (not_listening, datagrams, there):
        sock.close()
    found.close_rest(lambda name: pytest.fail(f"nobody stored {name}"))
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), 2)


@pytest.mark.parametrize(
    "environment", [{}, {"LISTEN_PID": "41", "LISTEN_FDS": "1"}, {"LISTEN_PID": "42", "LISTEN_FDS": "x"}]
)
def test_nothing_is_taken_that_was_not_passed_to_us(environment: dict[str, str]) -> None:
    with closing(listening(("127.0.0.1", 0))) as sock:
        found = PassedSockets.from_environment(environment, pid=42, first_fd=sock.fileno())
        assert found.take(Listen("127.0.0.1", sock.getsockname()[1])) is None


def test_what_an_earlier_run_stored_and_nobody_wants_any_more_is_forgotten_there_too() -> None:
    sock = listening(("127.0.0.1", 0))
    listen = Listen("127.0.0.1", sock.getsockname()[1])
    os.dup2(sock.fileno(), 500)
    name = stored_name(listen)
    assert ":" not in name
    environment = {"LISTEN_PID": "42", "LISTEN_FDS": "1", "LISTEN_FDNAMES": name}
    forgotten: list[str] = []
    PassedSockets.from_environment(environment, pid=42, first_fd=500).close_rest(forgotten.append)
    sock.close()
    assert forgotten == [name]


def test_a_listening_socket_is_left_with_the_service_manager(tmp_path: Path) -> None:
    path = tmp_path / "notify"
    with closing(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) as manager:
        manager.bind(str(path))
        manager.settimeout(WAIT_S)
        daemon = Daemon(tmp_path, NOTIFY_SOCKET=str(path))
        try:
            while True:
                text, fds, _, _ = socket.recv_fds(manager, 4096, 4)
                if text.startswith(b"FDSTORE=1"):
                    break
            assert text.decode().splitlines()[1] == f"FDNAME={stored_name(Listen('127.0.0.1', daemon.port))}"
            with closing(socket.socket(fileno=fds[0])) as kept:
                assert kept.getsockname() == ("127.0.0.1", daemon.port)
                daemon.status()
                daemon.process.kill()
                daemon.process.wait(WAIT_S)
                socket.create_connection(("127.0.0.1", daemon.port), 2).close()  # waits in the queue
        finally:
            daemon.end()


class SocketUnit(Daemon):
    """The daemon as a `.socket` unit starts it; the first socket is that of its configuration."""

    def start(self) -> subprocess.Popen[bytes]:
        if not hasattr(self, "sockets"):
            self.sockets = [listening(("127.0.0.1", self.port)), listening(("127.0.0.1", 0))]
        fds = [sock.fileno() for sock in self.sockets]
        with self.log.open("ab") as log:
            daemon = ["-m", "gateway", "run", "--config", str(self.config)]
            self.process = subprocess.Popen(
                [sys.executable, "-c", AS_SYSTEMD, ",".join(map(str, fds)), *daemon],
                stdin=subprocess.DEVNULL,
                stderr=log,
                pass_fds=fds,
            )
        return self.process


def test_who_connects_while_the_daemon_restarts_waits_and_is_not_refused(tmp_path: Path) -> None:
    daemon = SocketUnit(tmp_path)
    try:
        daemon.status()
        assert "from=systemd" in daemon.log.read_text()
        daemon.wait_for_log("not in the configuration")
        for ending in (signal.SIGTERM, signal.SIGKILL):
            daemon.process.send_signal(ending)
            daemon.process.wait(WAIT_S)
            client = Client(daemon.port)  # waits in the queue: nobody is there
            daemon.start()
            client.publish(100)
            client.close()
        daemon.status()
        assert daemon.rows() == 200
    finally:
        daemon.end()
        for sock in daemon.sockets:
            sock.close()
