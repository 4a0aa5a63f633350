"""More connections than files may be open: the others wait, the log says so once, and the daemon goes on."""

from __future__ import annotations

import os
import resource
import socket
from contextlib import ExitStack

import pytest

from gateway.descriptors import SPARE, raise_limit
from tests.daemon import WAIT_S, Daemon

CONNECT = b"\x10\x11\0\x04MQTT\x04\x02\0\x3c\0\x05app%02d"


@pytest.mark.parametrize(
    ("limits", "connections", "set_to"),
    [
        ((1024, 4096), 2000, (2000 + SPARE, 4096)),
        ((1024, 1024), 2000, (1024, 1024)),
        ((256, resource.RLIM_INFINITY), 2000, (2000 + SPARE, resource.RLIM_INFINITY)),
        ((resource.RLIM_INFINITY, resource.RLIM_INFINITY), 2000, None),
        ((4096, 4096), 2000, None),
    ],
)
def test_the_soft_limit_is_raised_as_far_as_it_has_to_and_may(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    limits: tuple[int, int],
    connections: int,
    set_to: tuple[int, int] | None,
) -> None:
    was_set: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits)
    monkeypatch.setattr(resource, "setrlimit", lambda _, to: was_set.append(to))
    raise_limit(connections)
    assert was_set == ([] if set_to is None else [set_to])
    assert bool(caplog.records) == (set_to == (1024, 1024))


def test_without_a_free_descriptor_connections_wait_and_the_log_stays_short(daemon: Daemon) -> None:
    pid = daemon.process.pid
    used = len(os.listdir(f"/proc/{pid}/fd"))
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (used + 5, used + 5))
    with ExitStack() as open_now:
        for number in range(20):
            sock = open_now.enter_context(socket.create_connection(("127.0.0.1", daemon.port), WAIT_S))
            sock.sendall(CONNECT % number)
        daemon.wait_for_log("no more files can be opened; new connections wait")
    with socket.create_connection(("127.0.0.1", daemon.port), WAIT_S) as sock:
        sock.settimeout(WAIT_S)
        sock.sendall(CONNECT % 99)
        assert sock.recv(4, socket.MSG_WAITALL) == b"\x20\x02\0\0"
    log = daemon.log.read_text()
    assert "Traceback" not in log
    assert log.count("no more files") == 1
