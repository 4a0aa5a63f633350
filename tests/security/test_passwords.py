"""Password files: what they hold, what checking costs, how they are written."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from security import passwords
from security.attempts import ADDRESSES_MAX, DELAY_S_MAX, FIRST_DELAY_S, FORGOTTEN_S, FailedLogins, source
from security.passwords import Cost, Entry, PasswordFileError, hash_password, parse, read, update
from security.rules import Identity, peer_address

CHEAP = Cost(10, 8, 1)
FILE = Path("passwords")
GOOD = str(hash_password(b"secret", CHEAP))


def test_a_password_is_right_or_wrong() -> None:
    users = passwords.Passwords({"anna": hash_password(b"secret", CHEAP), "bert": hash_password(b"secret", CHEAP)})
    assert users.verify("anna", b"secret")
    assert not users.verify("anna", b"Secret")
    assert not users.verify("anna", b"")
    assert not users.verify("carl", b"secret")
    assert not passwords.Passwords({}).verify("anna", b"secret")
    assert users.entries["anna"].hash != users.entries["bert"].hash


def test_a_line_written_by_another_scrypt_is_understood() -> None:
    """RFC 7914 §12, third vector; its hash cut to 32 bytes, which come first whatever the length asked for."""
    hashed = "cCO9yzr9c0hGHAbNgf046/2o+7qQT44+qbVD9lRdofI"
    users = parse(f"app:$scrypt$ln=14,r=8,p=1$U29kaXVtQ2hsb3JpZGU${hashed}\n".encode(), FILE)
    assert users.verify("app", b"pleaseletmein")
    assert not users.verify("app", b"pleaseletmeout")


def test_an_unknown_user_costs_what_a_wrong_password_costs() -> None:
    users = passwords.Passwords({"anna": hash_password(b"secret")})

    def least_s(user: str) -> float:
        times = []
        for _ in range(3):
            began = time.thread_time()
            assert not users.verify(user, b"wrong")
            times.append(time.thread_time() - began)
        return min(times)

    assert 0.5 < least_s("nobody") / least_s("anna") < 2


def test_a_password_longer_than_any_is_wrong_even_if_it_begins_like_the_right_one() -> None:
    users = passwords.Passwords({"anna": hash_password(b"x" * 1024, CHEAP)})
    assert users.verify("anna", b"x" * 1024)
    assert not users.verify("anna", b"x" * 1025)
    with pytest.raises(ValueError, match="1 to 1024 bytes"):
        hash_password(b"x" * 1025)
    with pytest.raises(ValueError, match="1 to 1024 bytes"):
        hash_password(b"")


def test_nothing_of_a_hash_is_in_a_repr() -> None:
    entry = hash_password(b"secret", CHEAP)
    assert repr(entry.hash) not in repr(entry)
    assert repr(entry.salt) not in repr(entry)


def test_the_file_is_read_with_its_comments_and_blank_lines() -> None:
    text = f"# local apps\n\nanna:{GOOD}\r\nbe rt:{GOOD}"
    assert list(parse(text.encode(), FILE).entries) == ["anna", "be rt"]


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("anna", "no ':'"),
        ("anna:secret", "no $scrypt$"),
        ("anna:$2b$12$xxxxxxxxxxxxxxxxxxxxxx", "no $scrypt$"),
        (f":{GOOD}", "1 to 255 bytes"),
        (f" anna:{GOOD}", "no blank"),
        (f"an\tna:{GOOD}", "no control character"),
        (f"{'x' * 256}:{GOOD}", "1 to 255 bytes"),
        (f"anna:{GOOD} ", "no $scrypt$"),
        (f"first:{GOOD}", "the user of line 1 again"),
        (f"anna:{GOOD.replace('ln=10', 'ln=30')}", "ln=30 is not within 10 to 17"),
        (f"anna:{GOOD.replace('ln=10', 'ln=1')}", "ln=1 is not within"),
        (f"anna:{GOOD.replace('r=8', 'r=99')}", "r=99"),
        (f"anna:{GOOD.replace('ln=10', 'ln=17')}", "128 MiB of memory"),
        (f"anna:{GOOD.replace('ln=10,r=8,p=1', 'ln=16,r=8,p=8')}", "too much work"),
        (f"anna:{GOOD[:-4]}", "the hash 32"),
        (f"anna:{GOOD}AA", "no base64"),
    ],
)
def test_a_wrong_line_is_told_with_its_number_and_without_the_hash(line: str, word: str) -> None:
    with pytest.raises(PasswordFileError) as caught:
        parse(f"first:{GOOD}\n{line}\nlast:{GOOD}\n".encode(), FILE)
    assert caught.value.line == 2
    assert str(caught.value).startswith("passwords:2: ")
    assert word in str(caught.value)
    assert GOOD.rpartition("$")[2][:8] not in str(caught.value)


def test_a_file_that_is_no_text_or_too_large_or_none_is_told(tmp_path: Path) -> None:
    with pytest.raises(PasswordFileError, match="passwords:2: not UTF-8"):
        parse(b"# x\n\xff", FILE)
    with pytest.raises(PasswordFileError, match="larger than 4 MiB"):
        parse(b"#" * (passwords.FILE_BYTES_MAX + 1), FILE)
    with pytest.raises(PasswordFileError, match="No such file"):
        read(tmp_path / "nothing")
    with pytest.raises(PasswordFileError, match="not a regular file"):
        read(tmp_path)


@given(st.binary(max_size=200) | st.text(max_size=200).map(lambda text: f"a:{text}".encode("utf-8", "replace")))
def test_no_content_raises_anything_but_the_complaint(data: bytes) -> None:
    try:
        parse(data, FILE)
    except PasswordFileError as error:
        assert error.path == FILE  # noqa: PT017


@given(st.binary(min_size=8, max_size=64), st.binary(min_size=32, max_size=32), st.sampled_from([CHEAP, Cost()]))
def test_an_entry_reads_as_it_was_written(salt: bytes, hashed: bytes, cost: Cost) -> None:
    entry = Entry(cost, salt, hashed)
    assert parse(f"anna:{entry}".encode(), FILE).entries == {"anna": entry}


@settings(max_examples=50)
@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 40))
def test_no_cost_within_bounds_takes_more_than_the_bounds(ln: int, r: int, p: int) -> None:
    cost = Cost(ln, r, p)
    if not cost.fault():
        assert 128 * r * 2**ln <= 64 << 20
        assert r * p * 2**ln <= 16 * 2**17


# ------------------------------------------------------------------------------------------------------ writing it


def test_users_are_added_changed_and_removed_and_other_lines_stay(tmp_path: Path) -> None:
    file = tmp_path / "passwords"
    assert not update(file, "anna", hash_password(b"one", CHEAP))
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    file.write_text(f"# kept\n\n{file.read_text()}")
    assert not update(file, "ann", hash_password(b"two", CHEAP))
    assert update(file, "anna", hash_password(b"three", CHEAP))
    assert read(file).verify("anna", b"three")
    assert read(file).verify("ann", b"two")
    assert not read(file).verify("anna", b"one")
    assert update(file, "anna", None)
    assert not update(file, "anna", None)
    assert list(read(file).entries) == ["ann"]
    assert file.read_text().startswith("# kept\n\n")
    assert os.listdir(tmp_path) == ["passwords"]


def test_a_file_that_the_daemon_reads_by_its_group_stays_so_and_others_lose_their_right(tmp_path: Path) -> None:
    file = tmp_path / "passwords"
    file.write_text("")
    file.chmod(0o644)
    update(file, "anna", hash_password(b"one", CHEAP))
    assert stat.S_IMODE(file.stat().st_mode) == 0o640


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("")
    (tmp_path / "link").symlink_to("real")
    update(tmp_path / "link", "anna", hash_password(b"one", CHEAP))
    assert (tmp_path / "link").is_symlink()
    assert "anna" in read(tmp_path / "real").entries


def test_a_damaged_file_is_left_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "passwords"
    file.write_text("nonsense\n")
    with pytest.raises(PasswordFileError, match=":1: "):
        update(file, "anna", hash_password(b"one", CHEAP))
    assert file.read_text() == "nonsense\n"
    assert os.listdir(tmp_path) == ["passwords"]


def test_two_writers_at_once_lose_nothing(tmp_path: Path) -> None:
    file = tmp_path / "passwords"
    code = (
        "import sys; from pathlib import Path; from security.passwords import *\n"
        "for n in range(10): update(Path(sys.argv[1]), f'{sys.argv[2]}{n}', hash_password(b'x', Cost(10, 1, 1)))"
    )
    writers = [subprocess.Popen([sys.executable, "-c", code, str(file), name]) for name in "ab"]
    assert [writer.wait(60) for writer in writers] == [0, 0]
    assert sorted(read(file).entries) == [f"{name}{n}" for name in "ab" for n in range(10)]


# ------------------------------------------------------------------------------------------------- failed attempts


def test_failures_of_one_address_wait_longer_and_longer_up_to_a_bound_and_are_forgotten() -> None:
    failed = FailedLogins()
    delays = [failed.failed("10.0.0.1", now) for now in range(10)]
    assert delays[:3] == [FIRST_DELAY_S, 2 * FIRST_DELAY_S, 4 * FIRST_DELAY_S]
    assert delays == sorted(delays)
    assert delays[-1] == DELAY_S_MAX
    assert failed.failed("10.0.0.2", 10) == FIRST_DELAY_S
    assert failed.failed("10.0.0.1", 9 + FORGOTTEN_S) == FIRST_DELAY_S


def test_failures_from_any_number_of_addresses_take_bounded_memory_and_the_latest_are_kept() -> None:
    failed = FailedLogins()
    for n in range(3 * ADDRESSES_MAX):
        failed.failed(str(n), 0.0)
    assert len(failed) == ADDRESSES_MAX
    assert failed.failed(str(3 * ADDRESSES_MAX - 1), 1.0) == 2 * FIRST_DELAY_S
    assert failed.failed("0", 1.0) == FIRST_DELAY_S


def test_a_host_cannot_escape_by_another_of_its_ipv6_addresses() -> None:
    def of(address: str) -> str:
        return source(Identity("mqtt", address=peer_address(address)))

    assert of("fd00::1") == of("fd00::ffff:1")
    assert of("fd00::1") != of("fd00:0:0:1::1")
    assert of("::ffff:10.0.0.1") == of("10.0.0.1") != of("10.0.0.2")
    assert source(Identity("mqtt", uid=7)) == "uid:7"
