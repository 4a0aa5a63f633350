"""AES-256-GCM at rest: what is sealed opens in its place only, and no nonce comes twice."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest

from security.atrest import HEAD_BYTES, KeyFileError, Keyring, key_id, read_key

OLD, NEW = bytes(range(32)), bytes(range(32, 64))


def test_a_row_opens_in_its_own_place_only_and_keeps_its_length() -> None:
    ring = Keyring([NEW])
    topic, body = ring.seal_row(b"row 1", "alarm/door", b"open" * 25)
    assert len(body) == 100
    assert b"door" not in topic
    assert b"open" not in body
    assert ring.open_row(b"row 1", topic, body) == ("alarm/door", b"open" * 25)
    with pytest.raises(ValueError, match="belongs to another row"):
        ring.open_row(b"row 2", topic, body)
    for at in (HEAD_BYTES - 1, HEAD_BYTES, len(topic) - 1):
        changed = topic[:at] + bytes([topic[at] ^ 1]) + topic[at + 1 :]
        with pytest.raises(ValueError, match="was changed"):
            ring.open_row(b"row 1", changed, body)


def test_the_same_row_sealed_again_never_meets_an_old_nonce() -> None:
    # As after a batch that failed, and after a start on a restored copy, where even the counter begins anew.
    rings = [Keyring([NEW]) for _ in range(50)]
    heads = [ring.seal_row(b"row 1", "t", b"body")[0][:HEAD_BYTES] for ring in rings for _ in range(20)]
    assert len(set(heads)) == len(heads)
    assert len({head[:-8] for head in heads}) == len(rings)  # each start derives a key of its own


def test_an_older_key_still_opens_and_a_missing_one_is_no_damage() -> None:
    sealed = Keyring([OLD]).seal_row(b"row", "t", b"body")
    assert Keyring([NEW, OLD]).open_row(b"row", *sealed) == ("t", b"body")
    with pytest.raises(LookupError, match=key_id(OLD)):
        Keyring([NEW]).open_row(b"row", *sealed)


def test_a_name_is_the_same_after_a_restart_and_differs_by_key() -> None:
    first, old = Keyring([NEW, OLD]).name("a/b")
    assert Keyring([NEW]).name("a/b") == [first]
    assert Keyring([OLD]).name("a/b") == [old]
    assert Keyring([NEW]).name("a/c") != [first]


@pytest.mark.parametrize("text", [NEW, NEW.hex().encode() + b"\n", base64.b64encode(NEW) + b"\n"])
def test_a_key_file_is_hexadecimal_base64_or_the_bytes_themselves(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "key").write_bytes(text)
    assert read_key(tmp_path / "key") == NEW


@pytest.mark.parametrize("text", [b"", b"secret", NEW.hex().encode()[:-2], base64.b64encode(NEW[:31])])
def test_anything_else_is_refused_by_name_and_never_shown(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "key").write_bytes(text)
    with pytest.raises(KeyFileError) as caught:
        read_key(tmp_path / "key")
    assert str(tmp_path / "key") in str(caught.value)
    assert not text or text.decode() not in str(caught.value)
    assert NEW.hex() not in repr(Keyring([NEW]))
    with pytest.raises(KeyFileError, match="twice"):
        Keyring([NEW, NEW])
