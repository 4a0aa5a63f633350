"""Password files: one `user:$scrypt$ln=14,r=8,p=1$SALT$HASH` a line, salt and hash in base64 without padding.

A line's own parameters say what checking it costs, within the bounds below, so that a file can neither ask for a
gigabyte nor be worth nothing. Blank lines and lines that begin with `#` are kept as they are. Checking a password takes
tens of milliseconds by design (it lets other threads run meanwhile): callers on an event loop use an executor.

Knows nothing of protocols, nor of who may do what.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import fcntl
import hashlib
import hmac
import os
import re
import secrets
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

FILE_BYTES_MAX: Final = 4 << 20
USERS_MAX: Final = 10_000
USER_BYTES_MAX: Final = 255
PASSWORD_BYTES_MAX: Final = 1024
SALT_BYTES: Final = 16
HASH_BYTES: Final = 32
# RFC 7914 §2 for the parameters. ln 14, r 8: 16 MiB and some 50 ms; at most 64 MiB and about a second on small boxes.
LN_RANGE: Final = range(10, 18)
R_RANGE: Final = range(1, 17)
P_RANGE: Final = range(1, 9)
MEMORY_BYTES_MAX: Final = 64 << 20
WORK_MAX: Final = 1 << 21  # N * r * p; the default is 2**17
_LINE: Final = re.compile(r"\$scrypt\$ln=(\d{1,2}),r=(\d{1,2}),p=(\d{1,2})\$([A-Za-z0-9+/]+)\$([A-Za-z0-9+/]+)")


class PasswordFileError(ValueError):
    """A password file can't be used. `line` is 0 where it is about the whole file; nothing of a hash is quoted."""

    def __init__(self, path: Path, line: int, reason: str) -> None:
        super().__init__(f"{path}:{line}: {reason}" if line else f"{path}: {reason}")
        self.path = path
        self.line = line
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Cost:
    """scrypt's parameters: N is 2**ln."""

    ln: int = 14
    r: int = 8
    p: int = 1

    def fault(self) -> str:
        """What is wrong with them; empty if nothing is."""
        for name, value, allowed in (("ln", self.ln, LN_RANGE), ("r", self.r, R_RANGE), ("p", self.p, P_RANGE)):
            if value not in allowed:
                return f"{name}={value} is not within {allowed.start} to {allowed.stop - 1}"
        if self.memory_bytes > MEMORY_BYTES_MAX:
            return f"it asks for {self.memory_bytes >> 20} MiB of memory, more than {MEMORY_BYTES_MAX >> 20}"
        if (self.r * self.p) << self.ln > WORK_MAX:
            return "ln, r and p together ask for too much work"
        return ""

    @property
    def memory_bytes(self) -> int:
        return 128 * self.r << self.ln


@dataclass(frozen=True, slots=True)
class Entry:
    """What a file holds of one user."""

    cost: Cost
    salt: bytes = field(repr=False)
    hash: bytes = field(repr=False)

    def __str__(self) -> str:
        """As it stands in the file, behind the colon."""
        cost = self.cost
        return f"$scrypt$ln={cost.ln},r={cost.r},p={cost.p}${_base64(self.salt)}${_base64(self.hash)}"


# Whoever is not in a file is checked against this: no password has this hash, but finding that out takes as long.
_NOBODY_SALT: Final = secrets.token_bytes(SALT_BYTES)


@dataclass(frozen=True, slots=True)
class Passwords:
    """The users of one file."""

    entries: dict[str, Entry]

    def verify(self, user: str, password: bytes) -> bool:
        """Whether this is the user's password. SLOW; as slow for users that do not exist.

        The costs of one file should be alike (those of `hash_password` are): an unknown user costs as much as the
        dearest of them.
        """
        entry = self.entries.get(user)
        known = entry is not None and len(password) <= PASSWORD_BYTES_MAX
        if entry is None or not known:
            entry = self._nobody()
        found = _scrypt(password[:PASSWORD_BYTES_MAX], entry.salt, entry.cost)
        return hmac.compare_digest(found, entry.hash) and known

    def _nobody(self) -> Entry:
        costs = {entry.cost for entry in self.entries.values()}
        dearest = max(costs, key=lambda cost: (cost.r * cost.p) << cost.ln, default=Cost())
        return Entry(dearest, _NOBODY_SALT, bytes(HASH_BYTES))


def hash_password(password: bytes, cost: Cost | None = None) -> Entry:
    """A new entry, with a salt of its own. Raises ValueError for what can't be a password."""
    cost = cost or Cost()
    if not 0 < len(password) <= PASSWORD_BYTES_MAX:
        raise ValueError(f"a password has 1 to {PASSWORD_BYTES_MAX} bytes")
    if fault := cost.fault():
        raise ValueError(fault)
    salt = secrets.token_bytes(SALT_BYTES)
    return Entry(cost, salt, _scrypt(password, salt, cost))


def check_user(user: str) -> None:
    """Raise ValueError with a sentence unless `user` can stand in a password file."""
    try:
        size = len(user.encode())
    except UnicodeEncodeError:
        size = 0
    if not 0 < size <= USER_BYTES_MAX:
        raise ValueError(f"a user name has 1 to {USER_BYTES_MAX} bytes")
    if ":" in user or not user.isprintable() or user != user.strip() or user[0] == "#":
        raise ValueError("a user name has no ':', no control character, no blank at its ends and no '#' in front")


def read(path: Path) -> Passwords:
    """The users of a file. Raises PasswordFileError naming the file, and the line at fault."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise PasswordFileError(path, 0, "not a regular file")
        with path.open("rb") as file:
            data = file.read(FILE_BYTES_MAX + 1)
    except OSError as error:
        who = f"not for user {os.geteuid()} to read" if isinstance(error, PermissionError) else error.strerror
        raise PasswordFileError(path, 0, f"{who}") from None
    return parse(data, path)


def parse(data: bytes, path: Path) -> Passwords:
    """As `read`, from the content itself."""
    entries: dict[str, Entry] = {}
    lines: dict[str, int] = {}
    for number, user, entry in _users(_lines(data, path), path):
        if user in entries:
            raise PasswordFileError(path, number, f"the user of line {lines[user]} again; keep one of the lines")
        if len(entries) >= USERS_MAX:
            raise PasswordFileError(path, number, f"more than {USERS_MAX} users")
        entries[user] = entry
        lines[user] = number
    return Passwords(entries)


def update(path: Path, user: str, entry: Entry | None) -> bool:
    """Set a user's entry, or remove it; return whether the user was there before. Other lines stay as they are.

    Readers see the old file or the new one, and so does whoever comes after a power cut; two writers wait for each
    other. A new file can be read by its owner alone; a file that exists keeps its owner and group, and the group its
    right to read, because it is the daemon's way to it. Raises PasswordFileError.
    """
    path = path.resolve()  # a link stays a link
    try:
        with _directory_locked(path.parent) as directory:
            before = path.stat() if path.exists() else None
            data = path.read_bytes() if before is not None else b""
            parse(data, path)
            kept, had = _without(user, _lines(data, path))
            if entry is not None:
                kept.append(f"{user}:{entry}")
            text = "".join(f"{line}\n" for line in kept).encode()
            parse(text, path)
            if had or entry is not None:
                _replace(path, text, before)
                os.fsync(directory)
    except OSError as error:
        raise PasswordFileError(path, 0, f"{error.strerror}") from None
    return had


def _lines(data: bytes, path: Path) -> list[str]:
    if len(data) > FILE_BYTES_MAX:
        raise PasswordFileError(path, 0, f"larger than {FILE_BYTES_MAX >> 20} MiB")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise PasswordFileError(path, data.count(b"\n", 0, error.start) + 1, "not UTF-8 text") from None
    return [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")] if text else []


def _users(lines: Iterable[str], path: Path) -> Iterator[tuple[int, str, Entry]]:
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        user, colon, rest = line.partition(":")
        if not colon:
            raise PasswordFileError(path, number, "no ':' behind a user name; `lineside passwd FILE USER` writes lines")
        try:
            check_user(user)
            yield number, user, _parse_entry(rest)
        except ValueError as error:
            raise PasswordFileError(path, number, str(error)) from None


def _parse_entry(text: str) -> Entry:
    match = _LINE.fullmatch(text)
    if match is None:
        raise ValueError("no $scrypt$ln=..,r=..,p=..$salt$hash behind the user name; set the password again")
    cost = Cost(int(match[1]), int(match[2]), int(match[3]))
    if fault := cost.fault():
        raise ValueError(fault)
    salt, hashed = _unbase64(match[4]), _unbase64(match[5])
    if not 8 <= len(salt) <= 64 or len(hashed) != HASH_BYTES:
        raise ValueError(f"the salt has 8 to 64 bytes and the hash {HASH_BYTES}; set the password again")
    return Entry(cost, salt, hashed)


def _without(user: str, lines: Iterable[str]) -> tuple[list[str], bool]:
    old = list(lines)
    kept = [line for line in old if not line.startswith(f"{user}:")]
    return kept, len(kept) < len(old)


@contextlib.contextmanager
def _directory_locked(directory: Path) -> Iterator[int]:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        os.close(descriptor)


def _replace(path: Path, data: bytes, before: os.stat_result | None) -> None:
    import tempfile  # with shutil and three compressors; a daemon only reads

    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)  # mode 0600
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            if before is not None:
                if (before.st_uid, before.st_gid) != (os.geteuid(), os.getegid()):
                    os.fchown(file.fileno(), before.st_uid, before.st_gid)
                os.fchmod(file.fileno(), 0o600 | (before.st_mode & stat.S_IRGRP))
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def _scrypt(password: bytes, salt: bytes, cost: Cost) -> bytes:
    room = cost.memory_bytes + 128 * cost.r * (cost.p + 2) + (1 << 20)
    return hashlib.scrypt(password, salt=salt, n=1 << cost.ln, r=cost.r, p=cost.p, maxmem=room, dklen=HASH_BYTES)


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode().rstrip("=")


def _unbase64(text: str) -> bytes:
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except binascii.Error:
        raise ValueError("a salt or hash that is no base64; set the password again") from None
