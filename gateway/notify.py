"""Tells systemd how the daemon is, and gives its log to the journal, or to standard error without one.

State goes out by sd_notify(3), the log by journald's native protocol, with every field of a fact a field there:
`log.info("hub up", extra={"hub": "depot"})` becomes MESSAGE=hub up, LINESIDE_HUB=depot. Elsewhere it becomes
one line of key=value. Neither may ever stop or end the daemon: what can't be delivered is let go. Knows nothing
of what the daemon does, and needs no systemd library.
"""

from __future__ import annotations

import array
import contextlib
import errno
import fcntl
import json
import logging
import os
import re
import socket
import struct
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, TextIO

JOURNAL_SOCKET: Final = "/run/systemd/journal/socket"
FIELD_NAME_CHARACTERS_MAX: Final = 64
FIELD_PREFIX: Final = "LINESIDE_"
EXTEND_S: Final = 60.0

# What a LogRecord has of itself; whatever else it carries came as a field.
_RECORD_ATTRIBUTES: Final = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
_TOO_LARGE: Final = (errno.EMSGSIZE, errno.ENOBUFS)
VALUE_CHARS_MAX: Final = 2000  # of one value in a line: client ids and topics may have 65,535 bytes
_PLAIN: Final = re.compile(r'[^\s"=\\]+')
_LEVELS: Final = {
    logging.DEBUG: "debug",
    logging.INFO: "info",
    logging.WARNING: "warning",
    logging.ERROR: "error",
    logging.CRITICAL: "critical",
}


@dataclass(frozen=True, slots=True)
class Notifier:
    """The service manager's end of this process. Without one (`address` None) every call does nothing.

    `watchdog_s` is the longest time that may pass between two calls of `alive`, None if nobody waits for them.
    """

    address: str | None = None
    watchdog_s: float | None = None

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ, pid: int | None = None) -> Notifier:
        """Read NOTIFY_SOCKET, WATCHDOG_USEC and WATCHDOG_PID (sd_notify(3), sd_watchdog_enabled(3))."""
        address = environment.get("NOTIFY_SOCKET") or None
        if address is not None and address[0] not in "/@":
            address = None  # another address family: nothing that a system service gets
        addressee = environment.get("WATCHDOG_PID")
        mine = not addressee or addressee == str(os.getpid() if pid is None else pid)
        interval_us = environment.get("WATCHDOG_USEC", "")
        watchdog_s = None
        if address and mine and interval_us.isdecimal() and int(interval_us) > 0:
            watchdog_s = int(interval_us) / 1e6
        return cls(address, watchdog_s)

    @property
    def interval_s(self) -> float | None:
        """How often to call `alive`: half of what is allowed, as sd_watchdog_enabled(3) advises."""
        return None if self.watchdog_s is None else self.watchdog_s / 2

    def ready(self, status: str = "") -> bool:
        """The listeners are open and the journal is: units ordered after this one may start."""
        return self._send("READY=1", _status(status))

    def reloading(self, monotonic_us: int) -> bool:
        """A reload begins; it ends with `ready`. `monotonic_us` is CLOCK_MONOTONIC."""
        return self._send("RELOADING=1", f"MONOTONIC_USEC={monotonic_us}")

    def stopping(self, status: str = "") -> bool:
        return self._send("STOPPING=1", _status(status))

    def alive(self, status: str = "") -> bool:
        """Keep the watchdog quiet."""
        return self._send("WATCHDOG=1", _status(status))

    def status(self, text: str) -> bool:
        """One line that `systemctl status` shows."""
        return self._send(_status(text))

    def extend_timeout(self, seconds: float) -> bool:
        """Ask for more time to start, reload or stop, counted from now."""
        return self._send(f"EXTEND_TIMEOUT_USEC={int(seconds * 1e6)}")

    @contextlib.contextmanager
    def starting(self, every_s: float = EXTEND_S / 3) -> Iterator[None]:
        """Ask for more time as long as what comes first goes on: a salvage of millions of rows takes minutes."""
        over = threading.Event()

        def ask() -> None:
            while not over.wait(every_s):
                self.extend_timeout(EXTEND_S)

        asking = threading.Thread(target=ask, name="starting", daemon=True)
        asking.start()
        try:
            yield
        finally:
            over.set()
            asking.join()

    def store(self, fd: int, name: str) -> bool:
        """Leave a copy of this descriptor with the service manager, which passes it to our next start.

        Also after a crash. Needs FileDescriptorStoreMax in the unit (sd_notify(3)); without it the copy is dropped.
        """
        return self._send("FDSTORE=1", f"FDNAME={name}", fds=[fd])

    def forget(self, name: str) -> bool:
        """Have what was stored under this name closed."""
        return self._send("FDSTOREREMOVE=1", f"FDNAME={name}")

    def _send(self, *lines: str, fds: Sequence[int] = ()) -> bool:
        """Whether the service manager's socket took it."""
        if self.address is None:
            return False
        text = "\n".join(line for line in lines if line)
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as out:
                out.setblocking(False)
                out.sendmsg([text.encode()], rights, 0, _abstract(self.address))
        except OSError:
            return False
        return True


def _status(text: str) -> str:
    return f"STATUS={' '.join(text.split())}" if text else ""


def _abstract(address: str) -> str:
    return "\0" + address[1:] if address.startswith("@") else address


def fields_of(record: logging.LogRecord) -> dict[str, object]:
    """What the caller passed as `extra`, in its order."""
    return {key: value for key, value in vars(record).items() if key not in _RECORD_ATTRIBUTES}


class LineFormatter(logging.Formatter):
    """One line a fact: `2026-01-31T12:00:00.000Z info lineside.uplink "hub up" hub=depot`.

    Control characters are escaped, so nothing a peer chose can forge a line or move a terminal's cursor.
    """

    def __init__(self, *, with_time: bool = True) -> None:
        super().__init__()
        self._with_time = with_time

    def format(self, record: logging.LogRecord) -> str:
        words = [
            _LEVELS.get(record.levelno, record.levelname.lower()),
            record.name,
            _word(record.getMessage()),
        ]
        if self._with_time:
            clock = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            words.insert(0, f"{clock}.{int(record.msecs):03d}Z")
        words += [f"{key}={_word(value)}" for key, value in fields_of(record).items()]
        line = " ".join(words)
        trace = _trace(self, record)
        return f"{line}\n{trace}" if trace else line


def _trace(formatter: logging.Formatter, record: logging.LogRecord) -> str:
    return formatter.formatException(record.exc_info) if record.exc_info else ""


def _word(value: object) -> str:
    """One value so that it reads back as one value."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "true" if value else "false"
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    if len(text) > VALUE_CHARS_MAX:
        text = f"{text[:VALUE_CHARS_MAX]}... ({len(text)} characters)"
    if text.isprintable():
        return text if _PLAIN.fullmatch(text) else json.dumps(text, ensure_ascii=False)
    return json.dumps(text)


class JournalHandler(logging.Handler):
    """Hands records to journald (systemd's Native Journal Protocol), structured, by one datagram each.

    A record too large for a datagram goes as a sealed memfd. One that journald doesn't take at once goes to
    `fallback` as a line.
    """

    def __init__(
        self, path: str = JOURNAL_SOCKET, identifier: str = "lineside", fallback: TextIO | None = None
    ) -> None:
        super().__init__()
        self._path = path
        self._identifier = identifier
        self._fallback = fallback
        self._line = LineFormatter()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        self._socket.setblocking(False)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            entry = b"".join(self._entry(record))
            try:
                self._socket.sendto(entry, self._path)
            except OSError as error:
                if error.errno not in _TOO_LARGE:
                    raise
                self._send_memfd(entry)
        except OSError:
            with contextlib.suppress(OSError, ValueError):
                print(self._line.format(record), file=self._fallback or sys.stderr, flush=True)
        except Exception:  # noqa: BLE001  (a log call must never raise into the code that made it)
            self.handleError(record)

    def close(self) -> None:
        self._socket.close()
        super().close()

    def _entry(self, record: logging.LogRecord) -> Iterator[bytes]:
        trace = _trace(self._line, record)
        message = record.getMessage()
        yield journal_field("MESSAGE", f"{message}\n{trace}" if trace else message)
        yield journal_field("PRIORITY", str(priority(record.levelno)))
        yield journal_field("SYSLOG_IDENTIFIER", self._identifier)
        yield journal_field("LOGGER", record.name)
        for key, value in fields_of(record).items():
            yield journal_field(field_name(key), "" if value is None else str(value))

    def _send_memfd(self, entry: bytes) -> None:
        memory = os.memfd_create("lineside-log", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            with open(memory, "wb", closefd=False) as file:
                file.write(entry)
            seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL
            fcntl.fcntl(memory, fcntl.F_ADD_SEALS, seals)
            rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [memory]))
            self._socket.sendmsg([b""], [rights], 0, self._path)
        finally:
            os.close(memory)


def priority(level: int) -> int:
    """The syslog priority (RFC 5424 §6.2.1) of a logging level."""
    if level >= logging.CRITICAL:
        return 2
    if level >= logging.ERROR:
        return 3
    if level >= logging.WARNING:
        return 4
    return 6 if level >= logging.INFO else 7


def field_name(key: str) -> str:
    """A name that journald takes: capitals, digits and underscores, ours by prefix, 64 characters at most."""
    return (FIELD_PREFIX + re.sub(r"[^A-Z0-9]", "_", key.upper()))[:FIELD_NAME_CHARACTERS_MAX]


def journal_field(name: str, value: str) -> bytes:
    """One field of the native protocol; a value with a line feed goes with its length (64 bit, little endian)."""
    raw = value.encode("utf-8", "backslashreplace")
    if b"\n" not in raw:
        return b"%s=%s\n" % (name.encode(), raw)
    return b"%s\n%s%s\n" % (name.encode(), struct.pack("<Q", len(raw)), raw)


def under_journal(environment: Mapping[str, str] = os.environ, stream: TextIO | None = None) -> bool:
    """Whether `stream` (standard error) leads to journald, as JOURNAL_STREAM says (systemd.exec(5))."""
    device, _, inode = environment.get("JOURNAL_STREAM", "").partition(":")
    if not (device.isdecimal() and inode.isdecimal()):
        return False
    try:
        found = os.fstat((stream or sys.stderr).fileno())
    except (OSError, ValueError):
        return False
    return (found.st_dev, found.st_ino) == (int(device), int(inode))


def log_handler(
    environment: Mapping[str, str] = os.environ, stream: TextIO | None = None, path: str = JOURNAL_SOCKET
) -> logging.Handler:
    """The handler that fits where standard error leads: journald's socket, or lines on `stream`."""
    if under_journal(environment, stream) and os.path.exists(path):
        return JournalHandler(path, fallback=stream)
    handler = logging.StreamHandler(stream)
    handler.setFormatter(LineFormatter())
    return handler


def set_up_logging(level: int = logging.INFO, handler: logging.Handler | None = None) -> None:
    """Make `handler` (by default the one that fits) the only one of the root logger."""
    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
    root.addHandler(log_handler() if handler is None else handler)
    root.setLevel(level)
    logging.captureWarnings(True)
