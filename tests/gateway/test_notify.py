"""What systemd and journald get to read, and that neither can hurt the daemon."""

from __future__ import annotations

import io
import logging
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from gateway.notify import (
    EXTEND_S,
    JournalHandler,
    LineFormatter,
    Notifier,
    field_name,
    fields_of,
    journal_field,
    log_handler,
    under_journal,
)

DATAGRAM_BYTES_MAX = 1 << 20


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[tuple[str, socket.socket]]:
    """A datagram socket as systemd or journald has it, and its path."""
    path = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as server:
        server.bind(path)
        server.settimeout(5)
        yield path, server


def heard(server: socket.socket) -> str:
    return server.recv(DATAGRAM_BYTES_MAX).decode()


def record(message: str, level: int = logging.INFO, **fields: object) -> logging.LogRecord:
    made = logging.LogRecord("lineside.uplink", level, __file__, 1, message, None, None)
    made.__dict__.update(fields)
    return made


def test_the_manager_hears_of_every_state_in_its_own_words(manager: tuple[str, socket.socket]) -> None:
    path, server = manager
    notifier = Notifier(path)
    assert notifier.ready("2 hubs")
    assert heard(server) == "READY=1\nSTATUS=2 hubs"
    assert notifier.reloading(monotonic_us=5_000_000)
    assert heard(server) == "RELOADING=1\nMONOTONIC_USEC=5000000"
    assert notifier.alive()
    assert heard(server) == "WATCHDOG=1"
    assert notifier.extend_timeout(1.5)
    assert heard(server) == "EXTEND_TIMEOUT_USEC=1500000"
    assert notifier.stopping()
    assert heard(server) == "STOPPING=1"


def test_a_status_text_cannot_smuggle_in_a_state(manager: tuple[str, socket.socket]) -> None:
    path, server = manager
    Notifier(path).status("hub down\nSTOPPING=1")
    assert heard(server) == "STATUS=hub down STOPPING=1"


def test_an_abstract_address_is_reached() -> None:
    name = f"lineside-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as server:
        server.bind(f"\0{name}")
        server.settimeout(5)
        assert Notifier(f"@{name}").ready()
        assert heard(server) == "READY=1"


def test_without_a_manager_or_with_a_dead_or_deaf_one_nothing_happens(tmp_path: Path) -> None:
    assert not Notifier().ready()
    assert not Notifier(str(tmp_path / "nobody")).alive()
    deaf = str(tmp_path / "deaf")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as server:
        server.bind(deaf)
        answers = [Notifier(deaf).alive("x" * 200) for _ in range(5000)]  # nobody reads: its queue fills up
    assert answers[0]
    assert not answers[-1]


@pytest.mark.parametrize(
    ("environment", "watchdog_s"),
    [
        ({"WATCHDOG_USEC": "30000000"}, 30.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "77"}, 30.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "78"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
        ({}, None),
    ],
)
def test_the_watchdog_counts_only_if_it_is_this_process_s(
    environment: dict[str, str], watchdog_s: float | None
) -> None:
    notifier = Notifier.from_environment({"NOTIFY_SOCKET": "/run/x", **environment}, pid=77)
    assert notifier.watchdog_s == watchdog_s
    assert notifier.interval_s == (None if watchdog_s is None else watchdog_s / 2)


def test_no_socket_means_no_manager_and_no_watchdog() -> None:
    assert Notifier.from_environment({"WATCHDOG_USEC": "1"}) == Notifier(None, None)
    assert Notifier.from_environment({"NOTIFY_SOCKET": "vsock:2:1"}).address is None


def test_a_fact_is_one_line_whose_values_read_back() -> None:
    made = record("hub up", hub="depot", url='amqps://h"x', since_s=0.1234567, error=None, live=True, rows=3)
    made.created = 0.0
    made.msecs = 7.0
    assert LineFormatter().format(made) == (
        '1970-01-01T00:00:00.007Z info lineside.uplink "hub up"'
        ' hub=depot url="amqps://h\\"x" since_s=0.123457 error=- live=true rows=3'
    )


def test_what_a_peer_chose_cannot_forge_a_line_nor_move_the_cursor() -> None:
    line = LineFormatter().format(
        record("client in", client="a\n2026 info x forged\x1b[2J\x9b", topic="Zürich/Gleis 7")
    )
    assert line.isprintable()
    assert 'topic="Zürich/Gleis 7"' in line


def test_a_peer_s_long_name_is_cut_in_a_line_and_its_length_told() -> None:
    line = LineFormatter().format(record("client in", client="x" * 65_000, peer="127.0.0.1:1"))
    assert len(line) < 2200
    assert 'x... (65000 characters)" peer=127.0.0.1:1' in line


def test_an_exception_s_trace_follows_its_line() -> None:
    made = record("failed", logging.ERROR)
    try:
        raise RuntimeError("boom")
    except RuntimeError as error:
        made.exc_info = (type(error), error, error.__traceback__)
    first, *rest = LineFormatter().format(made).splitlines()
    assert first.endswith("error lineside.uplink failed")
    assert rest[-1] == "RuntimeError: boom"


def test_only_what_the_caller_passed_is_a_field(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        logging.getLogger("lineside.x").info("fact %d", 1, extra={"client": "a", "rows": 2})
    # The capturing handler's own formatter may have added to the record by now.
    assert fields_of(caplog.records[0]) == {"client": "a", "rows": 2}


def parse(datagram: bytes) -> dict[str, str]:
    """A reader of the Native Journal Protocol, from its description."""
    fields = {}
    while datagram:
        head, _, datagram = datagram.partition(b"\n")
        if b"=" in head:
            key, _, value = head.partition(b"=")
        else:
            key = head
            (length,) = struct.unpack_from("<Q", datagram)
            value, datagram = datagram[8 : 8 + length], datagram[8 + length + 1 :]
        fields[key.decode()] = value.decode()
    return fields


def test_the_journal_gets_every_field_and_a_line_feed_stays_inside_its_value(
    manager: tuple[str, socket.socket],
) -> None:
    path, server = manager
    handler = JournalHandler(path)
    handler.emit(record("two\nlines", logging.WARNING, client="a\nPRIORITY=0", since_s=1.5))
    handler.close()
    assert parse(server.recv(DATAGRAM_BYTES_MAX)) == {
        "MESSAGE": "two\nlines",
        "PRIORITY": "4",
        "SYSLOG_IDENTIFIER": "lineside",
        "LOGGER": "lineside.uplink",
        "LINESIDE_CLIENT": "a\nPRIORITY=0",
        "LINESIDE_SINCE_S": "1.5",
    }


def test_an_entry_too_large_for_a_datagram_goes_as_a_sealed_file(manager: tuple[str, socket.socket]) -> None:
    path, server = manager
    handler = JournalHandler(path)
    handler.emit(record("x" * 10_000_000))
    handler.close()
    data, descriptors, _, _ = socket.recv_fds(server, 16, 1)
    assert data == b""
    with open(descriptors[0], "rb") as file:
        file.seek(0)
        assert len(parse(file.read())["MESSAGE"]) == 10_000_000
        with pytest.raises(PermissionError):
            os.pwrite(os.open(f"/proc/self/fd/{descriptors[0]}", os.O_RDWR), b"y", 0)


def test_a_journal_that_is_gone_leaves_the_fact_on_standard_error(tmp_path: Path) -> None:
    out = io.StringIO()
    handler = JournalHandler(str(tmp_path / "gone"), fallback=out)
    handler.emit(record("hub up", hub="depot"))
    handler.close()
    assert out.getvalue().endswith('info lineside.uplink "hub up" hub=depot\n')


def test_field_names_are_what_journald_takes() -> None:
    assert field_name("since_s") == "LINESIDE_SINCE_S"
    assert field_name("straße x") == "LINESIDE_STRASSE_X"
    assert len(field_name("x" * 100)) == 64
    assert journal_field("A", "\udc80") == b"A=\\udc80\n"


def test_the_journal_is_used_only_where_standard_error_leads_there(tmp_path: Path) -> None:
    path = tmp_path / "stderr"
    with path.open("w") as stream:
        found = path.stat()
        here = {"JOURNAL_STREAM": f"{found.st_dev}:{found.st_ino}"}
        assert under_journal(here, stream)
        assert not under_journal({"JOURNAL_STREAM": f"{found.st_dev}:{found.st_ino + 1}"}, stream)
        assert not under_journal({"JOURNAL_STREAM": "x"}, stream)
        assert not under_journal({}, stream)
        assert not under_journal(here, io.StringIO())
        journal = tmp_path / "journal"
        assert type(log_handler(here, stream, str(journal))) is logging.StreamHandler
        journal.touch()
        handler = log_handler(here, stream, str(journal))
        assert isinstance(handler, JournalHandler)
        handler.close()


def test_a_start_that_takes_long_asks_for_more_time_until_it_is_over(manager: tuple[str, socket.socket]) -> None:
    path, server = manager
    notifier = Notifier(path)
    with notifier.starting(every_s=0.01):
        assert heard(server) == f"EXTEND_TIMEOUT_USEC={EXTEND_S * 1_000_000:.0f}"
        heard(server)
    server.setblocking(False)
    with suppress(BlockingIOError):
        while True:
            heard(server)
    with pytest.raises(BlockingIOError):
        heard(server)
    notifier.ready()
    assert heard(server).startswith("READY=1")
