"""What an operator writes and types about access: [[access]], password_file, `check --who`, `passwd`."""

from __future__ import annotations

import json
import os
import pty
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from gateway.cli.main import cli
from gateway.config import ConfigErrors, loads
from gateway.config_explain import explain
from security import passwords
from security.passwords import Cost, hash_password
from security.rules import parse_who

LINESIDE = [sys.executable, "-c", "from gateway.cli.main import main; main()"]
CHEAP = Cost(10, 8, 1)
GOOD = """\
[gateway]
id = "loco"
[mqtt]
password_file = "passwords"
[[access]]
who = "*"
deny = true
publish = "train/brake/#"
[[access]]
who = ["user:anna", "cn:*.example"]
publish = ["train/{client}/#"]
subscribe = ["commands/{gateway}/#"]
"""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "lineside.toml").write_text(GOOD)
    passwords.update(tmp_path / "passwords", "anna", hash_password(b"secret", CHEAP))
    return tmp_path


def run(*words: object, stdin: str | None = None) -> Result:
    return CliRunner().invoke(cli, [str(word) for word in words], input=stdin)


# ------------------------------------------------------------------------------------------------ the configuration


def test_rules_are_read_with_their_place(home: Path) -> None:
    config = loads(GOOD, base=home)
    first, second = config.access
    assert first.who == (parse_who("*"),)
    assert (first.deny, first.publish, first.subscribe) == (True, ("train/brake/#",), ())
    assert [str(who) for who in second.who] == ["user:anna", "cn:*.example"]
    assert [rule.place(n) for n, rule in enumerate(config.access)] == ["access[0] (line 5)", "access[1] (line 9)"]


@pytest.mark.parametrize(
    ("old", "new", "line", "key", "write"),
    [
        ('who = "*"', 'who = "anna"', 6, "access[0].who[0]", '"user:anna"'),
        ('who = "*"', 'who = "address:10.0.0.1/8"', 6, "access[0].who[0]", '"address:10.0.0.0/8"'),
        ('who = "*"', "who = []", 6, "access[0].who", 'who = ["user:anna"]'),
        ('who = "*"', "", 5, "access[0].who", 'who = ["user:anna"]'),
        ('who = "*"', "who = 7", 6, "access[0].who", 'who = ["user:anna"]'),
        ("deny = true", 'deny = "true"', 7, "access[0].deny", "deny = true"),
        ("deny = true", "allow = true", 7, "access[0].allow", ""),
        ('publish = "train/brake/#"', "", 5, "access[0].publish", "publish = ["),
        ('publish = "train/brake/#"', "publish = []", 8, "access[0].publish", "publish = ["),
        ("train/{client}/#", "train/{clinet}/#", 11, "access[1].publish[0]", '"train/{client}/#"'),
        ("train/{client}/#", "train/#/x", 11, "access[1].publish[0]", '"train/#"'),
        ("train/{client}/#", "$SYS/#", 11, "access[1].publish[0]", ""),
        ("commands/{gateway}/#", "$share/g/commands/#", 12, "access[1].subscribe[0]", '"commands/#"'),
        ('password_file = "passwords"', 'password_file = "none"', 4, "mqtt.password_file", "lineside passwd"),
        ('password_file = "passwords"', "allow_anonymous = 1", 4, "mqtt.allow_anonymous", "allow_anonymous = true"),
        ("[[access]]", "[[acess]]", 5, "acess", "[[access]]"),
    ],
)
def test_each_mistake_is_told_with_its_line_and_key(
    home: Path, old: str, new: str, line: int, key: str, write: str
) -> None:
    assert old in GOOD
    with pytest.raises(ConfigErrors) as caught:
        loads(GOOD.replace(old, new, 1), base=home)
    assert (line, key) in [(problem.line, problem.key) for problem in caught.value.problems]
    found = next(problem for problem in caught.value.problems if problem.key == key)
    assert write in found.write
    assert found.expected


def test_a_word_without_brackets_is_quoted_whole(home: Path) -> None:
    with pytest.raises(ConfigErrors, match=r'found "train/\{x\}/#", expected only the placeholders'):
        loads(GOOD.replace("train/brake/#", "train/{x}/#"), base=home)


def test_a_rule_about_users_needs_a_password_file(home: Path) -> None:
    text = GOOD.replace('password_file = "passwords"', "allow_anonymous = true").replace(', "cn:*.example"', "")
    with pytest.raises(ConfigErrors) as caught:
        loads(text, base=home)
    (problem,) = caught.value.problems
    assert (problem.line, problem.key) == (10, "access[1].who")
    assert problem.write == 'password_file = "/etc/lineside/passwords" under [mqtt]'


def test_a_damaged_password_file_is_told_with_its_own_line(home: Path) -> None:
    (home / "passwords").write_text("# x\nanna:secret\n")
    with pytest.raises(ConfigErrors, match=r"passwords:2: no \$scrypt\$"):
        loads(GOOD, base=home)
    assert loads(GOOD, base=home, check_files=False).mqtt


def test_the_explanation_tells_rules_users_and_who_is_locked_out(home: Path) -> None:
    lines = explain(loads(GOOD, base=home))
    assert "access[0] (line 5): anybody may not publish to train/brake/#" in lines
    assert (
        "access[1] (line 9): user:anna or cn:*.example may publish to train/{client}/# and subscribe to "
        "commands/{gateway}/#" in lines
    )
    assert "whatever no rule allows is refused" in lines
    assert f"MQTT users are those of {home / 'passwords'}; anonymous apps are refused" in lines
    locked = loads(GOOD.replace('password_file = "passwords"', "").replace("user:anna", "client:x"))
    assert any(line.startswith("note: MQTT apps without a certificate can't log in") for line in explain(locked))
    (home / "passwords").chmod(0o644)
    assert any("can be read by every user" in line for line in explain(loads(GOOD, base=home)))
    plain = explain(loads('[gateway]\nid = "a"\n[mqtt]\n'))
    assert "every app may do everything: no [[access]]" in plain
    assert "MQTT users are not asked for; anonymous apps are let in from this machine only" in plain


# ---------------------------------------------------------------------------------------------------- check --who


@pytest.mark.parametrize(
    ("words", "status", "text"),
    [
        (["--who", "user:anna", "--who", "client:x", "--publish", "train/x/speed"], 0, "allowed by access[1] (line 9)"),
        (["--who", "anna", "--who", "client:x", "--publish", "train/x/speed"], 0, "here train/x/#"),
        (["--who", "anna", "--publish", "train/x/speed"], 1, "no rule lets"),
        (["--who", "anna", "--publish", "train/brake/x"], 1, "refused by access[0] (line 5), which denies *"),
        (["--who", "cn:cam.example", "--subscribe", "commands/loco/+"], 0, "allowed by access[1] (line 9)"),
        (["--who", "cn:cam.example", "--subscribe", "commands/#"], 1, "allows a part of it, commands/loco/#"),
        (["--who", "anonymous", "--publish", "x"], 1, "anonymous apps are not let in"),
        (["--publish", "x"], 1, "anonymous apps are not let in"),
        (["--who", "uid:0", "--publish", "train/brake/x"], 1, "uid:0, publish to train/brake/x: refused by access[0]"),
    ],
)
def test_check_explains_whether_somebody_may(home: Path, words: list[str], status: int, text: str) -> None:
    config = ["check", "--config", home / "lineside.toml"]
    result = run(*config, *words)
    assert result.exit_code == status, result.output
    assert text in result.stdout
    told: dict[str, Any] = json.loads(run(*config, *words, "--json").stdout)
    assert told["allowed"] is (status == 0)
    assert text.partition(": ")[2] in told["explained"]


@pytest.mark.parametrize("asked", [["--publish", "train/#"], ["--publish", ""], ["--subscribe", "train/#/x"]])
def test_what_nobody_can_do_whatever_the_rules_is_no_question(home: Path, asked: list[str]) -> None:
    result = run("check", "--config", home / "lineside.toml", "--who", "anna", *asked)
    assert (result.exit_code, result.stdout) == (2, "")
    assert f"Invalid value for {asked[0]}: " in result.stderr


def test_asking_needs_no_right_to_read_the_passwords(home: Path) -> None:
    (home / "passwords").unlink()
    asked = ["--who", "anna", "--who", "client:x", "--publish", "train/x/y"]
    assert run("check", "--config", home / "lineside.toml", *asked).exit_code == 0
    assert run("check", "--config", home / "lineside.toml").exit_code == 2


def test_a_question_that_is_none_is_a_usage_error(home: Path) -> None:
    config = ["check", "--config", home / "lineside.toml"]
    for words in (["--who", "anna"], ["--who", "anna", "--publish", "a", "--subscribe", "a"]):
        assert run(*config, *words).exit_code == 2
    result = run(*config, "--who", "usr:anna", "--publish", "a")
    assert result.exit_code == 2
    assert "user:NAME" in result.stderr
    (home / "lineside.toml").write_text(GOOD.replace("publish =", "pubish =", 1))
    result = run(*config, "--who", "anna", "--publish", "a")
    assert result.exit_code == 2
    assert "lineside.toml:8" in result.stderr


# -------------------------------------------------------------------------------------------------------- passwd


def test_passwords_are_set_changed_listed_and_removed(tmp_path: Path) -> None:
    file = tmp_path / "passwords"
    result = run("passwd", file, "bert", "--password-stdin", stdin="one\n")
    assert (result.exit_code, result.stdout) == (0, f"{file}: bert added\n")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert run("passwd", file, "anna", "-", stdin="t w o").stdout == f"{file}: anna added\n"
    assert run("passwd", file, "bert", "-", stdin="three\r\n").stdout == f"{file}: bert changed\n"
    assert passwords.read(file).verify("bert", b"three")
    assert passwords.read(file).verify("anna", b"t w o")
    assert run("passwd", file, "--list").stdout == "anna\nbert\n"
    assert json.loads(run("passwd", file, "--list", "--json").stdout) == {"users": ["anna", "bert"]}
    assert json.loads(run("passwd", file, "anna", "--delete", "--json").stdout)["done"] == "removed"
    assert run("passwd", file, "--list").stdout == "bert\n"
    assert "three" not in file.read_text()


@pytest.mark.parametrize(
    ("words", "stdin", "status", "text"),
    [
        (["anna", "secret"], "", 2, "not given as an argument"),
        (["anna"], "", 2, "--password-stdin"),
        (["anna", "-"], "", 2, "1 to 1024 bytes"),
        (["anna", "-"], "x" * 1025, 2, "1 to 1024 bytes"),
        (["a:b", "-"], "x", 2, "no ':'"),
        ([], "", 2, "Name a USER"),
        (["anna", "--list"], "", 2, "Use one of"),
        (["anna", "-", "--delete"], "", 2, "Use one of"),
        (["anna", "--delete"], "", 1, "has no user anna"),
        (["--list"], "", 1, "No such file"),
    ],
)
def test_what_cannot_be_is_said_and_writes_nothing(
    tmp_path: Path, words: list[str], stdin: str, status: int, text: str
) -> None:
    result = run("passwd", tmp_path / "passwords", *words, stdin=stdin)
    assert result.exit_code == status
    assert text in result.stderr
    assert "secret" not in result.output
    assert os.listdir(tmp_path) == []


def test_a_file_that_cannot_be_used_is_one_line_with_its_place(tmp_path: Path) -> None:
    (tmp_path / "passwords").write_text("nonsense\n")
    for words in (["--list"], ["anna", "-"], ["anna", "--delete"]):
        result = run("passwd", tmp_path / "passwords", *words, stdin="x")
        assert result.exit_code == 1
        assert result.stderr.startswith(f"lineside: {tmp_path}/passwords:1: no ':'")
    assert run("passwd", tmp_path / "no" / "file", "anna", "-", stdin="x").exit_code == 1


def type_twice(file: Path, first: bytes, second: bytes) -> tuple[int | None, bytes]:
    """Run `passwd` on a terminal of its own and answer each question; a third is answered by closing it."""
    ours, theirs = pty.openpty()
    child = subprocess.Popen(
        [*LINESIDE, "passwd", str(file), "anna"], stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
    )
    os.close(theirs)
    answers, shown, asked = [first, second], b"", 0
    while True:
        try:
            data = os.read(ours, 65536)
        except OSError:
            break
        shown += data
        if shown.count(b"anna: ") + shown.count(b"Once more: ") > asked:
            asked += 1
            if not answers:
                os.close(ours)
                child.wait(30)
                return child.returncode, shown
            os.write(ours, answers.pop(0) + b"\n")
    os.close(ours)
    return child.wait(30), shown


def test_on_a_terminal_the_password_is_asked_for_twice_and_never_shown(tmp_path: Path) -> None:
    file = tmp_path / "passwords"
    status, shown = type_twice(file, b"secret", b"secret")
    assert status == 0, shown
    assert b"secret" not in shown
    assert passwords.read(file).verify("anna", b"secret")
    status, shown = type_twice(tmp_path / "other", b"secret", b"Secret")
    assert status != 0
    assert b"do not match" in shown
    assert not (tmp_path / "other").exists()
