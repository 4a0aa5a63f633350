"""The configuration is read in a child process: same answer, same errors, and nothing of pydantic in the daemon."""

from __future__ import annotations

import asyncio
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gateway import config_reading
from gateway.child import Child, ChildError, ask
from gateway.config import Config, ConfigErrors, load, loads
from gateway.config_reading import Reading, read
from gateway.control_client import ControlError, request
from tests.daemon import WAIT_S, Client, Daemon, wait_until

EXAMPLES = sorted((Path(__file__).parents[2] / "deploy" / "examples").glob("*.toml"))
LINESIDE = [sys.executable, "-m", "gateway"]

# A relative path, a credential, rules with their lines, and a value of every class of ours.
TEXT = """\
[gateway]
id = "loco"
state_dir = "state"
[mqtt]
listen = ["ws://127.0.0.1:8080/mqtt", "unix:/run/lineside/mqtt"]
password_file = "credential:passwords"
[bridge]
url = "mqtt://127.0.0.1:1884"
[[hub]]
name = "depot"
urls = ["amqps://hub.example"]
rate = "9.6kbit/s"
shares = { urgent = 60, normal = 30 }
[[outbound]]
stream = "alarms"
topics = ["alarm/#"]
hub = "depot"
address = "edge.{gateway}"
[[access]]
who = ["user:anna", "address:10.0.0.0/8"]
publish = "alarm/#"
"""
HASH = "$scrypt$ln=14,r=8,p=1$" + "A" * 22 + "$" + "A" * 43


def answers(reading: Reading) -> Config | str:
    try:
        return reading.config()
    except ConfigErrors as errors:
        return str(errors)


# ------------------------------------------------------------------------------------------------- what comes back


def test_paths_credentials_and_every_kind_of_value_come_back_as_from_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc" / "lineside.toml").write_text(TEXT)
    (tmp_path / "credentials").mkdir()
    (tmp_path / "credentials" / "passwords").write_text(f"anna:{HASH}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path / "credentials"))
    path = Path("etc/lineside.toml")
    config = Reading(path).config()
    assert config == load(path) == asyncio.run(read(path))
    assert config.gateway.state_dir == tmp_path / "etc" / "state"
    assert config.mqtt is not None
    assert config.mqtt.password_file == tmp_path / "credentials" / "passwords"
    assert config.access[0].place(0) == "access[0] (line 19)"


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_no_example_is_changed_by_the_way(path: Path) -> None:
    config = loads(path.read_text(), base=path.parent, check_files=False)
    assert pickle.loads(pickle.dumps(config)) == config


def test_every_problem_comes_back_in_the_same_words(tmp_path: Path) -> None:
    path = tmp_path / "lineside.toml"
    path.write_text(TEXT.replace("depot", "de pot", 1).replace("topics", "topcis") + 'deny = "x"\n')
    with pytest.raises(ConfigErrors) as found:
        load(path)
    assert len(found.value.problems) > 3
    with pytest.raises(ConfigErrors) as told:
        Reading(path).config()
    assert told.value.problems == found.value.problems
    assert str(told.value) == str(found.value)


@pytest.mark.parametrize("name", ["missing.toml", "-m", "."])
def test_a_file_that_cannot_be_read_is_told_as_ever(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigErrors) as found:
        load(Path(name))
    assert answers(Reading(Path(name))) == str(found.value)


def test_run_says_what_check_says_and_ends_with_its_status(tmp_path: Path) -> None:
    path = tmp_path / "lineside.toml"
    path.write_text(TEXT.replace("topics", "topcis"))
    done = [
        subprocess.run(
            [*LINESIDE, command, "--config", str(path)], capture_output=True, text=True, timeout=60, check=False
        )
        for command in ("check", "run")
    ]
    assert "topcis" in done[0].stderr
    assert (done[1].returncode, done[1].stderr) == (done[0].returncode, done[0].stderr)
    assert done[1].returncode == 2


def test_what_a_library_prints_is_no_part_of_the_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import tomllib\nold = tomllib.loads\n"
        "def loads(text):\n    print('printed', flush=True)\n    return old(text)\n"
        "tomllib.loads = loads\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    path = tmp_path / "lineside.toml"
    path.write_text('[gateway]\nid = "loco"\n')
    assert Reading(path).config().gateway.id == "loco"


# ------------------------------------------------------------------------------------------------- a child that fails


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module `childs_part` that a child can be asked to run."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path / "childs_part.py"


def both(timeout_s: float = WAIT_S, *arguments: str) -> list[bytes | str]:
    """What the two ways of asking make of it."""
    found: list[bytes | str] = []
    for way in (
        lambda: Child("childs_part", *arguments).answer(timeout_s),
        lambda: asyncio.run(ask("childs_part", *arguments, timeout_s=timeout_s)),
    ):
        try:
            found.append(way())
        except ChildError as error:
            found.append(str(error))
    return found


def test_arguments_go_in_and_output_comes_back(module: Path) -> None:
    module.write_text("import sys\nprint(sys.argv[1:], len(sys.stdin.read()))")
    assert both(WAIT_S, "-c", "ö") == [b"['-c', '\xc3\xb6'] 0\n"] * 2


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import os\nos.kill(os.getpid(), 9)", "was ended by SIGKILL; is there memory enough?"),
        ("import os\nos.kill(os.getpid(), 15)", "was ended by SIGTERM"),
        ("import os\nos.kill(os.getpid(), 40)", "was ended by signal 40"),
        ("print('half an answer', flush=True)\nraise SystemExit(3)", "failed with exit status 3"),
    ],
)
def test_a_child_without_an_answer_is_one_clear_error(module: Path, code: str, said: str) -> None:
    module.write_text(code)
    assert both() == [f"the child process childs_part {said}"] * 2


def test_a_child_that_takes_too_long_is_ended(module: Path, tmp_path: Path) -> None:
    # It would write as soon as something is in the pipe, which is never.
    os.mkfifo(tmp_path / "pipe")
    module.write_text(f"import os\nos.open({str(tmp_path / 'pipe')!r}, os.O_RDONLY)\n")
    assert both(0.3) == ["the child process childs_part gave no answer within 0.3 s"] * 2
    with pytest.raises(OSError, match="No such device or address"):  # ENXIO: nobody waits at the other end any more
        os.open(tmp_path / "pipe", os.O_WRONLY | os.O_NONBLOCK)


def test_a_child_that_cannot_be_started_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    assert both() == ["the child process childs_part could not be started: No such file or directory"] * 2


def test_a_child_imports_nothing_of_the_working_directory(
    module: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module.write_text("import json\nprint('ours')")
    here = tmp_path / "here"
    here.mkdir()
    for name in ("json", "childs_part", "gateway"):
        (here / f"{name}.py").write_text("raise SystemExit(7)")
    monkeypatch.chdir(here)
    assert both() == [b"ours\n"] * 2


# ------------------------------------------------------------------------------------------------- the daemon


def mapped(daemon: Daemon) -> str:
    """The files that the process itself has mapped."""
    return Path(f"/proc/{daemon.process.pid}/maps").read_text()


def readers(pid: int) -> list[int]:
    """The processes in which this one has its configuration read just now."""
    found = []
    for each in Path("/proc").iterdir():
        if each.name.isdecimal():
            try:
                parent = int((each / "stat").read_text().rpartition(")")[2].split()[1])
                command = (each / "cmdline").read_bytes()
            except (FileNotFoundError, ProcessLookupError):
                continue  # it has just ended
            if parent == pid and config_reading._MODULE.encode() in command:
                found.append(int(each.name))
    return found


def a_reader(process: subprocess.Popen[bytes]) -> int:
    """The child that waits at a configuration which does not come."""
    wait_until(lambda: readers(process.pid))
    return readers(process.pid)[0]


def withhold(daemon: Daemon) -> str:
    """Put a pipe in the configuration's place, so that who reads it waits; return what it said."""
    text = daemon.config.read_text()
    daemon.config.unlink()
    os.mkfifo(daemon.config)
    return text


def test_the_daemon_holds_no_pydantic_neither_after_a_reload(daemon: Daemon) -> None:
    assert "_sqlite3" in mapped(daemon)  # what is loaded is seen here
    assert "pydantic" not in mapped(daemon)
    request(daemon.state, "reload")
    daemon.process.send_signal(signal.SIGHUP)
    daemon.wait_for_log("configuration reloaded")
    daemon.config.write_text(daemon.config.read_text().replace("topics", "topcis"))
    with pytest.raises(ControlError, match="topcis"):
        request(daemon.state, "reload")
    assert "pydantic" not in mapped(daemon)
    assert readers(daemon.process.pid) == []


def test_a_reload_whose_child_is_killed_is_one_error_and_meanwhile_the_daemon_works(daemon: Daemon) -> None:
    text = withhold(daemon)
    daemon.process.send_signal(signal.SIGHUP)
    child = a_reader(daemon.process)
    client = Client(daemon.port)
    client.publish(10)
    client.close()
    assert daemon.rows() == 10
    assert "reload" not in daemon.log.read_text()
    os.kill(child, signal.SIGKILL)
    daemon.wait_for_log("SIGKILL")
    lines = [line for line in daemon.log.read_text().splitlines() if "child process" in line]
    assert len(lines) == 1
    assert "configuration not taken; the old one stays" in lines[0]
    daemon.config.unlink()
    daemon.config.write_text(text)
    request(daemon.state, "reload")


def test_what_is_asked_for_during_a_reload_is_one_more_that_reads_the_file_anew(daemon: Daemon) -> None:
    text = withhold(daemon)
    daemon.process.send_signal(signal.SIGHUP)
    first = a_reader(daemon.process)
    for _ in range(5):
        daemon.process.send_signal(signal.SIGHUP)
        daemon.status()  # so that the signal has been dealt with
    assert readers(daemon.process.pid) == [first]
    daemon.config.write_text(text)
    daemon.wait_for_log("configuration reloaded")
    daemon.config.write_text(text.replace("topics", "topcis"))  # the second child's to read
    daemon.wait_for_log("topcis")
    daemon.status()
    assert readers(daemon.process.pid) == []
    assert daemon.log.read_text().count("configuration reloaded") == 1
    assert daemon.log.read_text().count("configuration not taken") == 1


def test_a_stop_waits_for_no_reload(daemon: Daemon) -> None:
    withhold(daemon)
    daemon.process.send_signal(signal.SIGHUP)
    child = a_reader(daemon.process)
    begun = time.monotonic()
    daemon.process.send_signal(signal.SIGTERM)
    assert daemon.process.wait(WAIT_S) == 0
    assert time.monotonic() - begun < 5
    wait_until(lambda: not Path(f"/proc/{child}").exists())
    assert "Traceback" not in daemon.log.read_text()


def test_a_start_whose_child_is_killed_fails_in_one_line_and_may_be_tried_again(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "lineside.toml")
    with subprocess.Popen(
        [*LINESIDE, "run", "--config", str(tmp_path / "lineside.toml")], stderr=subprocess.PIPE
    ) as process:
        os.kill(a_reader(process), signal.SIGKILL)
        assert process.stderr is not None
        said = process.stderr.read().decode()
    assert said == "lineside: the child process gateway.config_child was ended by SIGKILL; is there memory enough?\n"
    assert process.returncode == 1  # 2 would tell systemd never to start it again
