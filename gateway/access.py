"""Who is let in, and what each may do: rules and password files of the configuration, made ready for the listeners.

    identity = identity_of(transport, "mqtt")            # when the connection is there
    verdict = access.admit(claim(identity, ...), password) or await access.authenticate(...)
    permit = access.permit(verdict.identity)             # None: everything is allowed; keep it with the connection
    permit.publish(topic), permit.subscribe(filter)      # bool, remembered, for the hot path

After a reload, ask for the permit again. Hashing, and reading a password file again, run in one thread of their own;
the loop only looks at the file's age. Knows no packet.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import os
import secrets
import socket
import struct
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any, Final

from gateway.config import Config
from gateway.errors import ConfigError
from security import passwords, rules
from security.attempts import FailedLogins, source
from security.identity import certificate_identity
from security.passwords import PasswordFileError, Passwords
from security.rules import Action, Clause, Identity, Rules, Verdict

log = logging.getLogger("lineside.access")

ANSWERS_MAX: Final = 1000  # remembered of one connection and kind
NAME_CHARS_MAX: Final = 256  # longer names are judged anew each time, so that nobody fills memory with them
CHECKS_WAITING_MAX: Final = 256  # logins that wait for the hashing thread
DELAYED_MAX: Final = 256  # refusals held back at a time
KNOWN_MAX: Final = 1024  # users whose password was right since the file changed
LOGGED_MAX: Final = 20  # refusals of one connection that the log tells of; the ledger has all of them


class Login(Enum):
    """How a login ended. Each protocol has its own words for the failures."""

    OK = "let in"
    BAD_CREDENTIALS = "user or password are wrong"
    ANONYMOUS = "anonymous clients are not let in; give a user and password"
    BUSY = "too many logins wait to be checked"


@dataclass(frozen=True, slots=True)
class Admission:
    """`identity`: what counts from now on; its user is set only if the password was right."""

    login: Login
    identity: Identity

    @property
    def ok(self) -> bool:
        return self.login is Login.OK


class Permit:
    """What one identity may do, by the rules of now. Remembers its answers, within a bound."""

    __slots__ = ("_publish", "_publishing", "_subscribe", "_subscribing", "identity")

    def __init__(self, rules_: Rules, identity: Identity) -> None:
        self.identity = identity
        self._publishing: tuple[Clause, ...] = rules.clauses(rules_, identity, Action.PUBLISH)
        self._subscribing: tuple[Clause, ...] = rules.clauses(rules_, identity, Action.SUBSCRIBE)
        self._publish: dict[str, bool] = {}
        self._subscribe: dict[str, bool] = {}

    def publish(self, topic: str) -> bool:
        """May it publish to this topic, or send to the AMQP address of this name?"""
        known = self._publish.get(topic)
        if known is None:
            known = rules.judge(self._publishing, Action.PUBLISH, topic).allowed
            _remember(self._publish, topic, known)
        return known

    def subscribe(self, filter_: str) -> bool:
        """May it subscribe to this filter, or receive from the AMQP address of this name?"""
        known = self._subscribe.get(filter_)
        if known is None:
            known = rules.judge(self._subscribing, Action.SUBSCRIBE, filter_).allowed
            _remember(self._subscribe, filter_, known)
        return known

    # An AMQP address is the MQTT topic of the same name (DESIGN section 7).
    send = publish
    receive = subscribe

    def why(self, action: Action, name: str) -> Verdict:
        """The same verdict with its reason, for a log line."""
        publishing = action in (Action.PUBLISH, Action.SEND)
        return rules.judge(self._publishing if publishing else self._subscribing, action, name)


def _remember(answers: dict[str, bool], name: str, answer: bool) -> None:
    if len(name) > NAME_CHARS_MAX:
        return
    if len(answers) >= ANSWERS_MAX:
        answers.clear()
    answers[name] = answer


class Access:
    """Rules and passwords as they are configured now."""

    def __init__(self, config: Config) -> None:
        self._loop = asyncio.get_running_loop()
        self._executor: ThreadPoolExecutor | None = None
        self._waiting = 0
        self._delayed = 0
        self._failed = FailedLogins()
        self._files: dict[str, PasswordFile] = {}
        for protocol, table in (("mqtt", config.mqtt), ("amqp", config.amqp)):
            if table is not None and table.password_file is not None:
                self._files[protocol] = PasswordFile(table.password_file)
        self.reload(config)

    def reload(self, config: Config) -> None:
        """Take over new rules; what was permitted before has to be asked for again. Password files look after
        themselves: a changed one is read at the next login."""
        self.rules = rules_of(config)
        self._anonymous = {protocol: config.allows_anonymous(protocol) for protocol in ("mqtt", "amqp")}

    def permit(self, identity: Identity) -> Permit | None:
        """What this identity may do; None where there is no rule, so that nobody pays for having none."""
        return Permit(self.rules, identity) if self.rules.rules else None

    # -------------------------------------------------------------------------------------------------- logging in

    def admit(self, claim: Identity, password: bytes | None) -> Admission | None:
        """The answer, where it can be given at once; None where `authenticate` has to find out.

        `claim.user` is what the peer says; None if it says nothing. Without a password file nobody can prove to be a
        user, so none is believed: the peer is then what its certificate, uid and address make it.
        """
        nobody = replace(claim, user=None)
        file = self._files.get(claim.protocol)
        if claim.user is None or file is None:
            if nobody.anonymous and not self._lets_anonymous_in(nobody):
                failure = Login.ANONYMOUS if claim.user is None else Login.BAD_CREDENTIALS
                return Admission(failure, nobody)
            return Admission(Login.OK, nobody)
        if password is not None and file.knows(claim.user, password):
            return Admission(Login.OK, claim)
        return None

    async def authenticate(self, claim: Identity, password: bytes | None) -> Admission:
        """Whether the peer is the user it says it is. Does not hold the loop up; answers a failure late."""
        admission = self.admit(claim, password)
        if admission is None:
            admission = await self._check(claim, password or b"")
            if admission.login is Login.BAD_CREDENTIALS:
                await self._hold_back(claim)
        return admission

    async def _check(self, claim: Identity, password: bytes) -> Admission:
        nobody = replace(claim, user=None)
        if self._waiting >= CHECKS_WAITING_MAX:
            return Admission(Login.BUSY, nobody)
        if self._executor is None:
            # One thread: hashing takes a core and megabytes, and lets the loop's thread run meanwhile.
            self._executor = ThreadPoolExecutor(1, "passwords")
        assert claim.user is not None
        self._waiting += 1
        try:
            right = await self._loop.run_in_executor(
                self._executor, self._files[claim.protocol].verify, claim.user, password
            )
        finally:
            self._waiting -= 1
        return Admission(Login.OK, claim) if right else Admission(Login.BAD_CREDENTIALS, nobody)

    async def _hold_back(self, claim: Identity) -> None:
        delay_s = self._failed.failed(source(claim), self._loop.time())
        if self._delayed >= DELAYED_MAX:
            return  # rather answer at once than hold more; the hashing thread's pace is a bound, too
        self._delayed += 1
        try:
            await asyncio.sleep(delay_s)
        finally:
            self._delayed -= 1

    def _lets_anonymous_in(self, identity: Identity) -> bool:
        allowed = self._anonymous[identity.protocol]
        return identity.local if allowed is None else allowed

    def stop(self) -> None:
        if self._executor is not None:
            self._executor.shutdown(wait=False, cancel_futures=True)


class PasswordFile:
    """One file, read again when it changes; a changed one that can't be used is told of, and the old one stays.

    Who logged in is known again without hashing, so that a thousand clients that come back together get in at once:
    of a right password a digest is kept in memory, keyed with a secret of this process, until the file changes.
    """

    def __init__(self, path: Path) -> None:
        """Raises ConfigError."""
        self._path = path
        self._seen = _signature(path)
        try:
            self._passwords: Passwords = passwords.read(path)
        except PasswordFileError as error:
            raise ConfigError(str(error)) from None
        self._key = secrets.token_bytes(32)
        self._known: dict[str, bytes] = {}

    def knows(self, user: str, password: bytes) -> bool:
        """Whether this was right before, and the file has not changed since."""
        known = self._known.get(user)
        return known is not None and hmac.compare_digest(known, self._digest(user, password)) and not self._changed()

    def verify(self, user: str, password: bytes) -> bool:
        """SLOW: for the hashing thread, and only there."""
        if self._changed():
            self._read()
        if not self._passwords.verify(user, password):
            return False
        if len(self._known) >= KNOWN_MAX:
            self._known = {}
        self._known[user] = self._digest(user, password)
        return True

    def _read(self) -> None:
        self._known = {}  # before the file counts as seen: the loop's thread may look at both in between
        self._seen = _signature(self._path)
        try:
            self._passwords = passwords.read(self._path)
        except PasswordFileError as error:
            log.error("password file not taken; the old one stays", extra={"error": str(error)})
        else:
            log.info("password file read", extra={"file": str(self._path), "users": len(self._passwords.entries)})

    def _changed(self) -> bool:
        return _signature(self._path) != self._seen

    def _digest(self, user: str, password: bytes) -> bytes:
        return hashlib.blake2b(user.encode() + b"\0" + password, key=self._key, digest_size=32).digest()


def _signature(path: Path) -> tuple[int, int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


def rules_of(config: Config) -> Rules:
    """The configuration's rules in the form that judges."""
    return Rules(
        tuple(
            rules.Rule(table.who, table.publish, table.subscribe, table.deny, table.place(number))
            for number, table in enumerate(config.access)
        ),
        config.gateway.id,
    )


def identity_of(transport: asyncio.BaseTransport, protocol: str) -> Identity:
    """What the connection itself says of the peer: its address, its uid, its verified certificate."""
    peer = transport.get_extra_info("peername")
    sock = transport.get_extra_info("socket")
    uid = None
    if sock is not None and sock.family == socket.AF_UNIX:
        uid = _peer_uid(sock)
    address = rules.peer_address(peer[0]) if isinstance(peer, tuple) else None
    shown = certificate_identity(transport.get_extra_info("peercert"))
    if shown is None:
        return Identity(protocol, uid=uid, address=address)
    cn = shown.common_name or None
    names = dict.fromkeys([*([cn] if cn else []), *shown.dns_names, *shown.uris, *shown.emails])
    return Identity(protocol, cn=cn, names=tuple(names), uid=uid, address=address)


def _peer_uid(sock: Any) -> int | None:
    try:
        credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    except OSError:
        return None
    _pid, uid, _gid = struct.unpack("3i", credentials)
    return int(uid)
