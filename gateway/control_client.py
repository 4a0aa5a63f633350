"""Asks the running daemon, through the Unix socket in its state directory.

One JSON object a line each way. Blocking, bounded in time and size. Knows nothing of what the answers mean.
"""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path
from typing import Any

from gateway.errors import LinesideError

REPLY_MAX_BYTES = 64 << 20
TIMEOUT_S = 10.0


class DaemonStopped(LinesideError):
    """Nobody answers at the control socket."""


class ControlError(LinesideError):
    """The daemon answered that it could not, or in a way that is no answer."""


def request(state_dir: Path, do: str, *, timeout_s: float = TIMEOUT_S, **fields: Any) -> dict[str, Any]:
    """Send one command; return the daemon's answer without its `ok`.

    Raises DaemonStopped when no daemon listens, ControlError when it refuses or does not answer in time.
    """
    line = json.dumps({"do": do, **fields}).encode() + b"\n"
    deadline = time.monotonic() + timeout_s
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(timeout_s)
        _connect(sock, state_dir)
        try:
            sock.sendall(line)
            reply = _read_line(sock, deadline)
        except TimeoutError:
            raise ControlError(f"the daemon did not answer within {timeout_s:g} s") from None
        except OSError as error:
            raise ControlError(f"the daemon closed the connection: {error.strerror or error}") from None
    return _checked(reply)


def _connect(sock: socket.socket, state_dir: Path) -> None:
    """Connect by way of the directory, so that a path longer than an address may be is no trouble."""
    path = state_dir / "control.sock"
    try:
        directory = os.open(state_dir, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            sock.connect(f"/proc/self/fd/{directory}/control.sock")
        finally:
            os.close(directory)
    except (FileNotFoundError, NotADirectoryError, ConnectionRefusedError):
        raise DaemonStopped(f"no daemon answers at {path}; is it running?") from None
    except TimeoutError:
        raise ControlError("the daemon does not take the connection") from None
    except PermissionError:
        raise ControlError(f"{path}: no permission; try as root or as the user that the daemon runs as") from None
    except OSError as error:
        raise ControlError(f"{path}: {error.strerror or error}") from None


def _read_line(sock: socket.socket, deadline: float) -> bytes:
    reply = bytearray()
    while b"\n" not in reply:
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            raise TimeoutError
        sock.settimeout(left_s)
        data = sock.recv(65536)
        if not data:
            raise ControlError("the daemon closed the connection without an answer")
        reply += data
        if len(reply) > REPLY_MAX_BYTES:
            raise ControlError("the daemon's answer does not end")
    return bytes(reply.partition(b"\n")[0])


def _checked(line: bytes) -> dict[str, Any]:
    try:
        reply = json.loads(line)
    except ValueError:
        reply = None
    if not isinstance(reply, dict) or "ok" not in reply:
        raise ControlError("the daemon's answer cannot be read; do its version and this one agree?")
    if not reply.pop("ok"):
        raise ControlError(str(reply.get("error", "the daemon refused without saying why")))
    return reply
