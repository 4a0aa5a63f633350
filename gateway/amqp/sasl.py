"""The SASL layer of AMQP 1.0 (part 5.3), both sides, in front of the engine.

Bytes in, bytes out: `feed()` what the peer sent, send what `take_output()` gives, go on with `rest` once `done`.
Knows the mechanisms ANONYMOUS (RFC 4505), PLAIN (RFC 4616) and EXTERNAL (RFC 4422, appendix A). Knows nothing of
TLS, of sockets, or of whether the line is private enough for a password: the caller offers only what may be used.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from enum import IntEnum

from gateway.errors import PeerError

SASL_HEADER = b"AMQP\x03\x01\x00\x00"
AMQP_HEADER = b"AMQP\x00\x01\x00\x00"
HEADER_BYTES = 8

# The standard allows 512 (MIN-MAX-FRAME-SIZE); some hubs list long mechanism arrays, so a little more.
SASL_FRAME_BYTES_MAX = 4096
# What a peer may send ahead while its password is being checked.
AHEAD_BYTES_MAX = 64 << 10
MECHANISMS_MAX = 64
FIELDS_MAX = 16

SUPPORTED = ("EXTERNAL", "PLAIN", "ANONYMOUS")


class SaslError(PeerError):
    """The exchange failed. `auth`: credentials were refused, so trying again soon is useless."""

    def __init__(self, message: str, *, auth: bool = False) -> None:
        super().__init__(message)
        self.auth = auth


class _Code(IntEnum):
    """Descriptors, AMQP 1.0 part 5.3.3."""

    MECHANISMS = 0x40
    INIT = 0x41
    CHALLENGE = 0x42
    RESPONSE = 0x43
    OUTCOME = 0x44


class Outcome(IntEnum):
    """sasl-code, AMQP 1.0 part 5.3.3.6."""

    OK = 0
    AUTH = 1
    SYS = 2
    SYS_PERM = 3
    SYS_TEMP = 4


_Field = bytes | int | list[bytes] | None


def _symbol(name: str) -> bytes:
    raw = name.encode("ascii")
    assert len(raw) < 256
    return b"\xa3" + bytes([len(raw)]) + raw


def _binary(raw: bytes) -> bytes:
    if len(raw) < 256:
        return b"\xa0" + bytes([len(raw)]) + raw
    return b"\xb0" + struct.pack(">I", len(raw)) + raw


def _string(text: str) -> bytes:
    raw = text.encode("utf-8")
    if len(raw) < 256:
        return b"\xa1" + bytes([len(raw)]) + raw
    return b"\xb1" + struct.pack(">I", len(raw)) + raw


def _frame(code: _Code, *fields: bytes) -> bytes:
    body = b"".join(fields)
    performative = b"\x00\x53" + bytes([code]) + b"\xd0" + struct.pack(">II", len(body) + 4, len(fields)) + body
    return struct.pack(">IBBH", len(performative) + 8, 2, 1, 0) + performative


def _sized(frame: bytes, offset: int, width: int) -> tuple[bytes, int]:
    length = frame[offset] if width == 1 else struct.unpack_from(">I", frame, offset)[0]
    start = offset + width
    if start + length > len(frame):
        raise SaslError("sasl frame: a field runs past its end")
    return frame[start : start + length], start + length


def _symbols(frame: bytes, offset: int, width: int) -> tuple[list[bytes], int]:
    """An array of symbols (AMQP 1.0 part 1.6.24), `offset` just after its constructor."""
    raw, end = _sized(frame, offset, width)
    count = raw[0] if width == 1 else struct.unpack_from(">I", raw)[0]
    constructor = raw[width]
    if constructor not in (0xA3, 0xB3) or count > MECHANISMS_MAX:
        raise SaslError("sasl frame: the mechanisms are no array of symbols")
    items, at = [], width + 1
    for _ in range(count):
        item, at = _sized(raw, at, 1 if constructor == 0xA3 else 4)
        items.append(item)
    return items, end


def _field(frame: bytes, offset: int) -> tuple[_Field, int]:
    constructor, offset = frame[offset], offset + 1
    if constructor == 0x40:
        return None, offset
    if constructor == 0x50:
        return frame[offset], offset + 1
    if constructor in (0xA0, 0xA1, 0xA3):
        return _sized(frame, offset, 1)
    if constructor in (0xB0, 0xB1, 0xB3):
        return _sized(frame, offset, 4)
    if constructor == 0xE0:
        return _symbols(frame, offset, 1)
    if constructor == 0xF0:
        return _symbols(frame, offset, 4)
    raise SaslError(f"sasl frame: unexpected type 0x{constructor:02x}")


def _parse(frame: bytes) -> tuple[int, list[_Field]]:
    """The performative of one whole frame: (descriptor, fields). Raises SaslError."""
    try:
        offset = frame[4] * 4
        if frame[5] != 1 or offset < 8:
            raise SaslError("not a sasl frame")
        if frame[offset] != 0:
            raise SaslError("sasl frame: no descriptor")
        if frame[offset + 1] == 0x53:
            code, offset = frame[offset + 2], offset + 3
        elif frame[offset + 1] == 0x80:
            code, offset = struct.unpack_from(">Q", frame, offset + 2)[0], offset + 10
        else:
            raise SaslError("sasl frame: unexpected descriptor")
        constructor, offset = frame[offset], offset + 1
        if constructor == 0x45:
            return code, []
        if constructor == 0xC0:
            count, offset = frame[offset + 1], offset + 2
        elif constructor == 0xD0:
            count, offset = struct.unpack_from(">I", frame, offset + 4)[0], offset + 8
        else:
            raise SaslError("sasl frame: no list of fields")
        if count > FIELDS_MAX:
            raise SaslError("sasl frame: too many fields")
        fields: list[_Field] = []
        for _ in range(count):
            value, offset = _field(frame, offset)
            fields.append(value)
        return code, fields
    except (IndexError, struct.error) as short:
        raise SaslError("sasl frame: truncated") from short


class _Sasl:
    """What both sides share: the header, whole frames out of a bounded buffer, and one verdict.

    done: the layer is over and `rest` holds the bytes that came behind it. error: it failed; send the output, close.
    """

    def __init__(self) -> None:
        self.done = False
        self.rest = b""
        self.outbox = bytearray()
        self.identity: str | None = None
        self.mechanism: str | None = None
        self.error: SaslError | None = None
        self.waiting = False
        self._buffer = bytearray()
        self._header_seen = False

    def take_output(self) -> bytes:
        """Bytes to send now; b"" when there are none."""
        data = bytes(self.outbox)
        self.outbox.clear()
        return data

    def feed(self, data: bytes) -> None:
        """Take what the peer sent. Never raises for what the peer did: look at `done` and `error` afterwards."""
        if self.done or self.error is not None:
            return
        self._buffer += data
        if self.waiting:
            if len(self._buffer) > AHEAD_BYTES_MAX:
                self.error = SaslError("the peer goes on without waiting for the outcome")
                self._buffer.clear()
            return
        try:
            if not self._header_seen and not self._recv_header():
                return
            for code, fields in self._frames():
                self._recv_frame(code, fields)
        except SaslError as error:
            self.error = error
            self._buffer.clear()
            return
        if self.done:
            self._finish()

    def _finish(self) -> None:
        self.done = True
        self.rest = bytes(self._buffer)
        self._buffer.clear()

    def _recv_header(self) -> bool:
        buffer = self._buffer
        if not SASL_HEADER.startswith(buffer[:HEADER_BYTES]):
            return self._recv_other_header(bytes(buffer[:HEADER_BYTES]))
        if len(buffer) < HEADER_BYTES:
            return False
        del buffer[:HEADER_BYTES]
        self._header_seen = True
        self._header_done()
        return True

    def _recv_other_header(self, header: bytes) -> bool:
        raise SaslError(f"the peer sent {header!r} where the SASL header belongs")

    def _header_done(self) -> None:
        pass

    def _frames(self) -> Iterator[tuple[int, list[_Field]]]:
        buffer = self._buffer
        while not self.done and not self.waiting and len(buffer) >= 4:
            size = int.from_bytes(buffer[:4], "big")
            if not 8 <= size <= SASL_FRAME_BYTES_MAX:
                raise SaslError(f"sasl frame of {size} bytes")
            if len(buffer) < size:
                return
            frame = bytes(buffer[:size])
            del buffer[:size]
            yield _parse(frame)

    def _recv_frame(self, code: int, fields: list[_Field]) -> None:
        raise NotImplementedError


class SaslClient(_Sasl):
    """The dialling side. Uses the first of `mechanisms` (in our order of preference) that the peer offers."""

    def __init__(
        self,
        mechanisms: Sequence[str],
        user: str | None = None,
        password: str | None = None,
        hostname: str | None = None,
    ) -> None:
        super().__init__()
        unknown = [name for name in mechanisms if name not in SUPPORTED]
        assert not unknown, f"unsupported mechanisms {unknown}"
        assert "PLAIN" not in mechanisms or (user is not None and password is not None), "PLAIN needs credentials"
        self._mechanisms = tuple(mechanisms)
        self._user, self._password, self._hostname = user, password, hostname
        self.outbox += SASL_HEADER

    def _recv_frame(self, code: int, fields: list[_Field]) -> None:
        if code == _Code.MECHANISMS and self.mechanism is None:
            self._recv_mechanisms(fields)
        elif code == _Code.OUTCOME and self.mechanism is not None:
            self._recv_outcome(fields)
        else:
            raise SaslError(f"unexpected sasl performative 0x{code:02x}")

    def _recv_mechanisms(self, fields: list[_Field]) -> None:
        value = fields[0] if fields else None
        offered = [value] if isinstance(value, bytes) else value if isinstance(value, list) else []
        for name in self._mechanisms:
            if name.encode("ascii") in offered:
                self.mechanism = name
                self.outbox += self._init(name)
                return
        names = ", ".join(item.decode("ascii", "replace") for item in offered[:8]) or "nothing"
        raise SaslError(f"no common sasl mechanism: the peer offers {names}", auth=True)

    def _init(self, name: str) -> bytes:
        response = b""
        if name == "PLAIN":
            response = f"\0{self._user}\0{self._password}".encode()
        elif name == "ANONYMOUS":
            response = b"lineside"
        fields = [_symbol(name), _binary(response)]
        if self._hostname:
            fields.append(_string(self._hostname))
        return _frame(_Code.INIT, *fields)

    def _recv_outcome(self, fields: list[_Field]) -> None:
        code = fields[0] if fields else None
        if code == Outcome.OK:
            self.identity = self._user if self.mechanism == "PLAIN" else None
            self.done = True
            return
        known = isinstance(code, int) and code in Outcome._value2member_map_
        why = Outcome(code).name.lower().replace("_", "-") if isinstance(code, int) and known else repr(code)
        auth = code in (Outcome.AUTH, Outcome.SYS_PERM)
        raise SaslError(f"sasl {self.mechanism} was refused: {why}", auth=auth)


class SaslServer(_Sasl):
    """The listening side.

    mechanisms: what to offer; EXTERNAL is offered only with an `external` identity (from a verified certificate),
    PLAIN only with `verify`. A peer without any SASL layer is taken as ANONYMOUS if that is offered, else refused.
    `verify(user, password)` may answer None, "not yet": then `waiting` is true, and `answer()` has to follow.
    """

    def __init__(
        self,
        mechanisms: Sequence[str],
        verify: Callable[[str, str], bool | None] | None = None,
        external: str | None = None,
    ) -> None:
        super().__init__()
        unknown = [name for name in mechanisms if name not in SUPPORTED]
        assert not unknown, f"unsupported mechanisms {unknown}"
        self._verify = verify
        self._external = external
        able = {"EXTERNAL": external is not None, "PLAIN": verify is not None, "ANONYMOUS": True}
        self._offered = tuple(name for name in mechanisms if able[name])
        self._claimed = ""

    def _header_done(self) -> None:
        symbols = b"".join(_symbol(name)[1:] for name in self._offered)
        array = b"\xe0" + bytes([len(symbols) + 2, len(self._offered)]) + b"\xa3" + symbols
        self.outbox += SASL_HEADER + _frame(_Code.MECHANISMS, array)

    def _recv_other_header(self, header: bytes) -> bool:
        if AMQP_HEADER.startswith(header) and "ANONYMOUS" in self._offered:
            if len(header) < HEADER_BYTES:
                return False
            self.mechanism = None
            self._finish()
            return False
        # AMQP 1.0 part 2.2: answer with a header we do support, then close.
        self.outbox += SASL_HEADER
        if AMQP_HEADER.startswith(header):
            raise SaslError("the peer skipped SASL, but anonymous clients are not allowed", auth=True)
        return super()._recv_other_header(header)

    def _recv_frame(self, code: int, fields: list[_Field]) -> None:
        if code != _Code.INIT:
            raise SaslError(f"unexpected sasl performative 0x{code:02x}")
        raw = fields[0] if fields else None
        response = fields[1] if len(fields) > 1 else b""
        if not isinstance(raw, bytes) or not isinstance(response, bytes | None):
            raise SaslError("sasl init without a mechanism")
        name = raw.decode("ascii", "replace")
        granted, identity = self._check(name, response or b"")
        if granted is None:
            self.waiting, self._claimed = True, identity or ""
        else:
            self._decide(name, granted, identity)

    def _decide(self, name: str, granted: bool, identity: str | None, refusal: Outcome = Outcome.AUTH) -> None:
        if not granted:
            self.outbox += _frame(_Code.OUTCOME, bytes([0x50, refusal]))
            raise SaslError(f"sasl {name[:32]} refused", auth=True)
        self.mechanism, self.identity = name, identity
        self.outbox += _frame(_Code.OUTCOME, bytes([0x50, Outcome.OK]))
        self.done = True

    def answer(self, granted: bool, refusal: Outcome = Outcome.AUTH) -> None:
        """Whether the password was right that `verify` could not judge at once."""
        assert self.waiting
        self.waiting = False
        try:
            self._decide("PLAIN", granted, self._claimed, refusal)
        except SaslError as error:
            self.error = error
            self._buffer.clear()
            return
        self._finish()

    def _check(self, name: str, response: bytes) -> tuple[bool | None, str | None]:
        if name not in self._offered:
            return False, None
        if name == "ANONYMOUS":
            return True, None
        if name == "EXTERNAL":
            # Acting for somebody else (an authzid of its own) is nothing we grant.
            own = response in (b"", (self._external or "").encode())
            return own, self._external if own else None
        return self._check_plain(response)

    def _check_plain(self, response: bytes) -> tuple[bool | None, str | None]:
        try:
            authzid, user, password = response.decode("utf-8").split("\0")
        except ValueError:  # not three parts, or not UTF-8
            return False, None
        assert self._verify is not None
        if not user or authzid not in ("", user):
            return False, None
        granted = self._verify(user, password)
        return granted, None if granted is False else user
