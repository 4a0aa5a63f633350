"""AES-256-GCM for what lies on the disk: keys, their ids, and rows sealed under them. Values in, values out.

Knows no journal and no file but the key's.

A nonce is never used twice under a key, whatever happens to the file that the result is written to:

- each process draws 96 random bits and derives a key of its own from them and the master key (HKDF, RFC 5869); they
  stand in front of everything sealed. They would have to repeat, which is as good as ruled out below 2^40 starts;
- under that key the nonce is a counter in memory, so neither a retried batch, nor a row id that comes a second time
  after a journal was restored, nor a dead letter that goes back to its stream meets an old nonce. The limit of 2^32
  messages for random nonces (NIST SP 800-38D, 8.3) does not apply; that of the counter is 2^64.

What does break it: resuming one snapshot of a running virtual machine twice. Don't.

Layout of a sealed topic: format (1), key id (4), the process' random bits (12), counter (8), tag (16), the topic. The
body is sealed in the same breath and keeps its length. Additional data: format, key id and what the row is bound to.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import os
import re
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

KEY_BYTES: Final = 32
KEYS_MAX: Final = 16
FORMAT: Final = b"\x01"
ID_BYTES: Final = 4
SALT_BYTES: Final = 12
COUNTER_BYTES: Final = 8
TAG_BYTES: Final = 16
NAME_BYTES: Final = 16
HEAD_BYTES: Final = 1 + ID_BYTES + SALT_BYTES + COUNTER_BYTES
DERIVED_MAX: Final = 256  # ciphers of earlier processes that are kept at hand
FILE_BYTES_MAX: Final = 4096


class KeyFileError(ValueError):
    """A key file can't be used. The text names it and says what to do."""


def read_key(path: Path) -> bytes:
    """The 32 bytes that a key file holds in hexadecimal, base64, or as they are. Raises KeyFileError."""
    try:
        with path.open("rb") as file:
            data = file.read(FILE_BYTES_MAX)
    except OSError as error:
        raise KeyFileError(f"{path}: {error.strerror}") from error
    if len(data) == KEY_BYTES:
        return data
    text = data.strip()
    if re.fullmatch(rb"[0-9A-Fa-f]{64}", text):
        return bytes.fromhex(text.decode())
    try:
        key = base64.b64decode(text, validate=True)
    except binascii.Error:
        key = b""
    if len(key) != KEY_BYTES:
        raise KeyFileError(f"{path}: not a key of 32 bytes in hexadecimal or base64; `openssl rand -hex 32` makes one")
    return key


def key_id(key: bytes) -> str:
    """By which a key is told: a digest, of which nobody gets back to it."""
    return hashlib.sha256(b"lineside at rest\0" + key).digest()[:ID_BYTES].hex()


class Keyring:
    """The keys of a journal: the first one seals, all of them open. Raises KeyFileError where two can't be told apart.

    To be used by one thread at a time.
    """

    def __init__(self, keys: Sequence[bytes]) -> None:
        if not 1 <= len(keys) <= KEYS_MAX or any(len(key) != KEY_BYTES for key in keys):
            raise KeyFileError(f"1 to {KEYS_MAX} keys of {KEY_BYTES} bytes are needed")
        self._keys = {bytes.fromhex(key_id(key)): key for key in keys}
        if len(self._keys) != len(keys):
            raise KeyFileError("a key is named twice")
        first = next(iter(self._keys))
        salt = os.urandom(SALT_BYTES)
        self._head = FORMAT + first + salt
        self._bound = FORMAT + first
        self._counter = count()
        self._derived: dict[bytes, AESGCM] = {}
        self._encrypt = self._cipher(self._head).encrypt
        self._names = [(FORMAT + id_, _derive(key, b"", b"names")) for id_, key in self._keys.items()]

    def __repr__(self) -> str:
        return f"Keyring({', '.join(self.ids)})"

    @property
    def ids(self) -> Sequence[str]:
        return [id_.hex() for id_ in self._keys]

    def seal_row(self, about: bytes, topic: str, body: bytes) -> tuple[bytes, bytes]:
        """The sealed topic, with all that opening needs, and the body, as long as it was."""
        plain = topic.encode()  # HOT: once a message
        size = len(plain)
        counter = next(self._counter).to_bytes(COUNTER_BYTES, "big")
        sealed = self._encrypt(b"\0\0\0\0" + counter, plain + body, self._bound + about)
        return self._head + counter + sealed[-TAG_BYTES:] + sealed[:size], sealed[size:-TAG_BYTES]

    def open_row(self, about: bytes, topic: bytes, body: bytes) -> tuple[str, bytes]:
        """What was sealed. Raises ValueError where it was changed or belongs elsewhere, LookupError without its key."""
        size = len(topic) - HEAD_BYTES - TAG_BYTES
        if size < 0 or topic[:1] != FORMAT:
            raise ValueError("not sealed by this version")
        cipher = self._derived.get(topic[: HEAD_BYTES - COUNTER_BYTES]) or self._cipher(topic)
        nonce = b"\0\0\0\0" + topic[HEAD_BYTES - COUNTER_BYTES : HEAD_BYTES]
        text = topic[HEAD_BYTES + TAG_BYTES :] + body + topic[HEAD_BYTES : HEAD_BYTES + TAG_BYTES]
        try:
            plain = cipher.decrypt(nonce, text, topic[: 1 + ID_BYTES] + about)
        except InvalidTag:
            raise ValueError("does not open under its key: it was changed, or belongs to another row") from None
        return plain[:size].decode(), plain[size:]

    def name(self, topic: str) -> list[bytes]:
        """The topic as the key of a row, under each key: equal for equal topics, and nobody reads it back."""
        plain = topic.encode()
        return [head + hmac.digest(key, plain, "sha256")[:NAME_BYTES] for head, key in self._names]

    def _cipher(self, head: bytes) -> AESGCM:
        head = head[: HEAD_BYTES - COUNTER_BYTES]
        key = self._keys.get(head[1 : 1 + ID_BYTES])
        if key is None:
            raise LookupError(f"there is no key {head[1 : 1 + ID_BYTES].hex()}")
        if len(self._derived) >= DERIVED_MAX:
            del self._derived[next(iter(self._derived))]
        cipher = self._derived[head] = AESGCM(_derive(key, head[1 + ID_BYTES :], b"rows"))
        return cipher


def _derive(key: bytes, salt: bytes, purpose: bytes) -> bytes:
    return HKDF(SHA256(), KEY_BYTES, salt, b"lineside at rest: " + purpose).derive(key)
