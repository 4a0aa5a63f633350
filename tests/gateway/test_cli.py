"""What a person types: the answer on standard output, the complaint on standard error, and the exit status."""

from __future__ import annotations

import errno
import json
import os
import pty
import re
import socketserver
import sqlite3
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from gateway.cli.main import COMMANDS, cli
from gateway.cli.output import safe
from gateway.control_client import ControlError, DaemonStopped, request
from storeforward import schema
from tests.parts import Mosquitto

LINESIDE = [sys.executable, "-c", "from gateway.cli.main import main; main()"]
DATA = b"\x00\x53\x75\xa0"
HELP_MAX_S = 0.3

STATUS: dict[str, Any] = {
    "ok": True,
    "gateway": "loco-4711",
    "version": "0.1.0",
    "pid": 42,
    "uptime_s": 93784.5,
    "epoch": 3,
    "mqtt": {"listen": ["127.0.0.1:1883"], "clients": 2},
    "hubs": [
        {"name": "depot", "state": "up", "url": "amqps://a:5671", "since_s": 5.0, "error": None, "retry_in_s": None},
        {"name": "yard", "state": "backoff", "url": "", "since_s": 1.0, "error": "refused", "retry_in_s": 2.5},
    ],
    "streams": [
        {
            "name": "alarms",
            "direction": "outbound",
            "rows": 500,
            "bytes": 1000,
            "next_seq": 501,
            "max_bytes": 10000,
            "max_messages": 1000,
            "in_flight": 7,
        }
    ],
    "rates": {"in_per_s": 1.5, "out_per_s": 2.5},
    "losses": 1,
    "dead": 2,
    "commit_ms": {"p50": 1.0, "p99": None},
    "rss_bytes": 50 << 20,
}


def body_of(payload: bytes) -> bytes:
    return DATA + bytes([len(payload)]) + payload


def run(*words: object, stdin: str | None = None) -> Result:
    return CliRunner().invoke(cli, [str(word) for word in words], input=stdin)


def run_json(*words: object) -> Any:
    """The answer with --json, which must be all that is on standard output."""
    result = run(*words, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """A journal with a stream, a loss and three dead letters."""
    payloads = [b"hello", b"\xff\x00", "grün \x1b[31m\n".encode(), b"x" * 200]
    connection = sqlite3.connect(tmp_path / "journal.db")
    connection.execute("PRAGMA journal_mode = WAL")
    schema.migrate(connection)
    connection.execute(
        "INSERT INTO stream (id, name, direction, next_seq, rows, bytes) VALUES (1, 'alarms', 'outbound', 5, 4, 400)"
    )
    connection.execute("INSERT INTO cursor VALUES (1, 1, 'uplink', 'uplink', 1)")
    for seq, payload in enumerate(payloads, 1):
        body = body_of(payload)
        row = (1 << schema.SEQ_BITS | seq, seq, f"alarm/{seq}\x1b[2J", zlib.crc32(body), body)
        connection.execute("INSERT INTO message VALUES (?, ?, NULL, ?, ?, ?)", row)
        if seq < 4:
            dead = (seq, seq, "alarms", seq, "amqp:not-allowed", "no", "alarm/1", zlib.crc32(body), body)
            connection.execute("INSERT INTO dead VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", dead)
    connection.execute("INSERT INTO loss VALUES (1, 1, 'alarms', 9, 'expired', 5, '')")
    connection.execute("INSERT INTO loss_total VALUES ('alarms', 'expired', 70, 350)")
    connection.execute("INSERT INTO mqtt_session VALUES ('panel', 60, NULL)")
    connection.commit()
    connection.close()
    return tmp_path


class Daemon(socketserver.ThreadingUnixStreamServer):
    """Answers at the control socket as it is told to, and remembers what it was asked."""

    daemon_threads = True
    answer: Callable[[dict[str, Any]], bytes] = staticmethod(lambda asked: b"")

    def __init__(self, state_dir: Path) -> None:
        self.asked: list[dict[str, Any]] = []
        super().__init__(str(state_dir / "control.sock"), _Handler)

    def handle_error(self, *of: object) -> None:
        """A client that went away early is what some tests are about."""


class _Handler(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        assert isinstance(self.server, Daemon)
        asked = json.loads(self.rfile.readline())
        self.server.asked.append(asked)
        self.wfile.write(self.server.answer(asked))


@pytest.fixture
def daemon(state: Path) -> Iterator[Daemon]:
    server = Daemon(state)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def says(value: object) -> Callable[[dict[str, Any]], bytes]:
    line = json.dumps(value).encode() + b"\n"
    return lambda asked: line


# ------------------------------------------------------------------------------------------------- the command


def test_every_command_has_help_and_the_list_of_them_loads_none() -> None:
    for name in COMMANDS:
        result = run(name, "--help")
        assert result.exit_code == 0, name
        assert "--" in result.stdout
    code = (
        "import sys\nfrom gateway.cli.main import cli\n"
        "try: cli(['--help'])\nexcept SystemExit: pass\n"
        "print([m for m in ('pydantic', 'paho', 'rich', 'sqlite_utils', 'proton', 'asyncio') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.endswith("[]\n")
    assert all(name in out for name in COMMANDS)


def test_help_is_there_at_once() -> None:
    times = []
    for _ in range(3):
        begun = time.monotonic()
        subprocess.run([*LINESIDE, "--help"], stdout=subprocess.DEVNULL, check=True)
        times.append(time.monotonic() - begun)
    assert min(times) < HELP_MAX_S


def test_what_is_mistyped_is_a_usage_error() -> None:
    for words in (["bakclog"], ["show", "alarms"], ["show", "alarms", "x"], ["publish", "t"], ["backlog", "a", "b"]):
        assert run(*words).exit_code == 2, words
    assert "lineside show alarms 5" in run("backlog", "show", "alarms", "5").stderr
    assert run("subscribe", "t", "--durable").exit_code == 2
    assert run("deadletter", "drop").exit_code == 2
    assert run("deadletter", "drop", "1", "--all").exit_code == 2


def test_the_state_directory_comes_from_the_configuration_and_nothing_else_of_it_matters(
    state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "lineside.toml"
    config.write_text('[gateway]\nstate_dir = "."\n[[hub]]\nkey = "/unreadable"\n')
    assert run_json("backlog", "--config", config)["streams"][0]["name"] == "alarms"
    monkeypatch.setenv("LINESIDE_CONFIG", str(config))
    assert run_json("backlog")["streams"][0]["name"] == "alarms"
    monkeypatch.setenv("LINESIDE_CONFIG", str(tmp_path / "none.toml"))
    result = run("backlog")
    assert result.exit_code == 2
    assert "--state-dir" in result.stderr
    config.write_text("[gateway\n")
    assert run("backlog", "--config", config).exit_code == 2


def test_a_journal_that_cannot_be_read_is_one_line_and_status_1(tmp_path: Path) -> None:
    for command in (["backlog"], ["show", "a", "1"], ["export", "a"], ["losses"], ["deadletter", "list"], ["status"]):
        result = run(*command, "--state-dir", tmp_path)
        assert result.exit_code == 1
        assert result.stdout == ""
        assert re.fullmatch(r"lineside: .*there is no journal.*\n", result.stderr)


# --------------------------------------------------------------------------------------------------------- check


def test_check_explains_a_good_file_and_lists_what_is_wrong_with_another(tmp_path: Path) -> None:
    config = tmp_path / "lineside.toml"
    config.write_text('[gateway]\nid = "a"\n[mqtt]\n')
    result = run("check", "--config", config)
    assert result.exit_code == 0
    assert "no problem found" in result.stdout
    assert run_json("check", "--config", config)["ok"] is True
    config.write_text('[gateway]\nid = "a b"\n[mqt]\n')
    result = run("check", "--config", config)
    assert (result.exit_code, result.stdout) == (2, "")
    assert [line.split(": ")[1].split(":")[-1] for line in result.stderr.splitlines()] == ["2", "3"]
    result = run("check", "--config", config, "--json")
    assert result.exit_code == 2
    told = json.loads(result.stdout)
    assert [(problem["line"], problem["key"]) for problem in told["problems"]] == [(2, "gateway.id"), (3, "mqt")]


# --------------------------------------------------------------------------------------------- reading the journal


def test_backlog_lists_streams_or_the_messages_of_one(state: Path) -> None:
    told = run_json("backlog", "--state-dir", state)
    assert told["streams"][0]["rows"] == 4
    assert told["cursors"][0]["behind"] == 4
    messages = run_json("backlog", "alarms", "--limit", 2, "--state-dir", state)["messages"]
    assert [message["seq"] for message in messages] == [1, 2]
    result = run("backlog", "alarms", "--limit", 2, "--state-dir", state)
    assert result.stdout.splitlines()[1].split()[0] == "1"
    assert "--from 3" in result.stderr


def test_show_prints_properties_and_payload(state: Path) -> None:
    told = run_json("show", "alarms", 1, "--state-dir", state)
    assert told["message"]["body"] == {"text": "hello"}
    assert told["intact"] is True
    assert run_json("show", "alarms", 2, "--state-dir", state)["message"]["body"] == {"base64": "/wA="}
    assert run("show", "alarms", 1, "--state-dir", state).stdout.endswith("\n\nhello\n")
    assert run("show", "alarms", 2, "--state-dir", state).stdout.endswith("\n\n0xff00\n")
    assert run("show", "alarms", 9, "--state-dir", state).exit_code == 1


def test_bytes_that_are_no_message_are_shown_all_the_same(state: Path) -> None:
    connection = sqlite3.connect(state / "journal.db")
    connection.execute("UPDATE message SET body = x'00ff' WHERE topic LIKE 'alarm/1%'")
    connection.commit()
    connection.close()
    told = run_json("show", "alarms", 1, "--state-dir", state)
    assert told["intact"] is False
    assert told["body_base64"] == "AP8="
    assert "error" in told["message"]
    result = run("show", "alarms", 1, "--state-dir", state)
    assert result.exit_code == 0
    assert "do not match" in result.stdout


def test_what_a_stranger_sent_cannot_move_the_terminal(state: Path) -> None:
    for words in (["backlog", "alarms"], ["show", "alarms", 3], ["deadletter", "show", 3]):
        result = run(*words, "--state-dir", state)
        assert result.exit_code == 0
        assert "\x1b" not in result.stdout
    assert safe("a\x1b[2J\r\n\u202e\ud800") == "a\\x1b[2J\\r\\n\\u202e\ufffd"


def test_export_writes_json_lines_and_never_over_a_file(state: Path, tmp_path: Path) -> None:
    lines = run("export", "alarms", "--state-dir", state).stdout.splitlines()
    assert [json.loads(line)["seq"] for line in lines] == [1, 2, 3, 4]
    output = tmp_path / "out.jsonl"
    told = run_json("export", "alarms", "--output", output, "--state-dir", state)
    assert told["messages"] == 4
    assert output.read_text().splitlines() == lines
    assert run("export", "alarms", "--output", output, "--state-dir", state).exit_code == 1
    assert run("export", "nothing", "--output", tmp_path / "other", "--state-dir", state).exit_code == 1
    assert not (tmp_path / "other").exists()


def test_losses_are_totals_and_rows(state: Path) -> None:
    told = run_json("losses", "--state-dir", state)
    assert told["totals"] == [{"stream": "alarms", "reason": "expired", "messages": 70, "bytes": 350}]
    assert told["losses"][0]["seq"] == 9
    assert "expired" in run("losses", "--state-dir", state).stdout


def test_losses_of_a_stream_are_none_only_where_there_is_such_a_stream(state: Path) -> None:
    with closing(sqlite3.connect(state / "journal.db")) as connection:
        connection.execute("INSERT INTO stream (id, name, direction) VALUES (99, 'telemetry', 'outbound')")
        connection.commit()
    assert run("losses", "--stream", "telemetry", "--state-dir", state).stdout == "nothing was lost\n"
    mistyped = run("losses", "--stream", "other", "--state-dir", state)
    assert mistyped.exit_code == 1
    assert "there is no stream 'other'" in mistyped.stderr


def test_a_piped_table_is_never_shortened(state: Path) -> None:
    long = "t/" + "x" * 3000
    connection = sqlite3.connect(state / "journal.db")
    connection.execute("UPDATE message SET topic = ? WHERE topic LIKE 'alarm/1%'", (long,))
    connection.commit()
    connection.close()
    out = subprocess.run(
        [*LINESIDE, "backlog", "alarms", "--state-dir", str(state)], capture_output=True, text=True, check=True
    ).stdout
    assert long in out
    assert len(out.splitlines()) == 5


def test_on_a_terminal_long_cells_are_folded_and_nothing_is_left_out(state: Path) -> None:
    ours, theirs = pty.openpty()
    command = [*LINESIDE, "backlog", "alarms", "--state-dir", str(state)]
    child = subprocess.Popen(command, stdout=theirs, env={**os.environ, "COLUMNS": "50", "TERM": "xterm"})
    os.close(theirs)
    out = b""
    while True:
        try:
            data = os.read(ours, 65536)
        except OSError:
            break
        out += data
    os.close(ours)
    assert child.wait() == 0
    assert "…".encode() not in out
    assert "─".encode() in out


@pytest.mark.parametrize("words", [["backlog", "alarms"], ["export", "alarms"], ["backlog", "--json"], ["--help"]])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_an_output_on_a_full_disk_is_said_in_one_line(state: Path, words: list[str], unbuffered: str) -> None:
    where = [] if words == ["--help"] else ["--state-dir", str(state)]
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            [*LINESIDE, *words, *where],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
            check=False,
        )
    assert result.returncode == 1
    assert result.stderr == "lineside: the output can't be written: No space left on device\n"


def test_a_file_that_may_not_be_looked_at_is_said_in_one_line(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/closed/journal.db")

    monkeypatch.setattr("storeforward.backup.hand_over", closed)
    result = run("backup", "--move", "/tmp/anywhere.db", "--state-dir", state)
    assert (result.exit_code, result.stderr) == (1, "lineside: /closed/journal.db: Permission denied\n")


def test_a_reader_that_has_gone_is_no_news(state: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [*LINESIDE, "backlog", "--state-dir", str(state)]
    result = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert (result.returncode, result.stderr) == (1, "")


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_standard_streams_that_are_closed_are_no_fault(state: Path, closed: str) -> None:
    command = [*LINESIDE, "backlog", "--state-dir", str(state)]
    result = subprocess.run(
        ["sh", "-c", f'exec "$@" {closed}', "sh", *command], capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stderr) == (0, "")


# --------------------------------------------------------------------------------------------------- dead letters


def test_dead_letters_are_listed_and_shown(state: Path) -> None:
    told = run_json("deadletter", "list", "--state-dir", state)
    assert [letter["id"] for letter in told["dead"]] == [3, 2, 1]
    assert run_json("deadletter", "list", "--limit", 1, "--state-dir", state)["count"] == 3
    assert run_json("deadletter", "show", 1, "--state-dir", state)["condition"] == "amqp:not-allowed"
    assert run("deadletter", "show", 7, "--state-dir", state).exit_code == 1


def test_with_the_daemon_stopped_dead_letters_are_requeued_and_dropped_in_the_journal(state: Path) -> None:
    assert run_json("deadletter", "requeue", 1, "--state-dir", state) == {"requeued": 1, "asked": 1}
    assert run_json("backlog", "--state-dir", state)["streams"][0]["rows"] == 5
    result = run("deadletter", "drop", 2, 9, "--state-dir", state)
    assert result.exit_code == 1
    assert "dropped 1 of 2" in result.stdout
    result = run("deadletter", "drop", "--all", "--state-dir", state, stdin="n\n")
    assert result.exit_code == 1
    assert run_json("deadletter", "drop", "--all", "--yes", "--state-dir", state)["dropped"] == 1
    assert run_json("deadletter", "list", "--state-dir", state)["count"] == 0
    reasons = [loss["reason"] for loss in run_json("losses", "--state-dir", state)["losses"]]
    assert len(reasons) == 3


def test_with_the_daemon_running_it_is_asked_to(state: Path, daemon: Daemon) -> None:
    daemon.answer = says({"ok": True, "count": 3})
    assert run_json("deadletter", "requeue", "--all", "--state-dir", state)["requeued"] == 3
    assert daemon.asked == [{"do": "deadletter-requeue", "ids": [1, 2, 3]}]
    daemon.answer = says({"ok": False, "error": "the disk is full"})
    result = run("deadletter", "drop", 1, "--state-dir", state)
    assert result.exit_code == 1
    assert result.stderr == "lineside: the disk is full\n"
    assert run_json("deadletter", "list", "--state-dir", state)["count"] == 3


def test_very_many_dead_letters_are_asked_for_in_parts(state: Path, daemon: Daemon) -> None:
    daemon.answer = lambda asked: json.dumps({"ok": True, "count": len(asked["ids"])}).encode() + b"\n"
    assert run_json("deadletter", "requeue", *range(25_000), "--state-dir", state)["requeued"] == 25_000
    assert [len(asked["ids"]) for asked in daemon.asked] == [10_000, 10_000, 5_000]


def test_a_mistyped_state_directory_is_not_made_into_a_journal(tmp_path: Path) -> None:
    assert run("deadletter", "drop", 1, "--state-dir", tmp_path).exit_code == 1
    assert list(tmp_path.iterdir()) == []


# --------------------------------------------------------------------------------------------- asking the daemon


def test_status_shows_what_the_daemon_says(state: Path, daemon: Daemon) -> None:
    daemon.answer = says(STATUS)
    told = run_json("status", "--state-dir", state)
    assert told["daemon"] == "running"
    assert "ok" not in told
    out = run("status", "--state-dir", state).stdout
    for word in ("loco-4711", "pid 42", "1 d 2 h 3 min 4 s", "depot", "refused", "2.5 s", "50 %", "50.0 MiB"):
        assert word in out, word


def test_status_shows_a_hubs_notes_where_nothing_is_wrong(state: Path, daemon: Daemon) -> None:
    hub = STATUS["hubs"][0] | {"notes": ["edge: sent again", "yard: may be lost"]}
    daemon.answer = says(STATUS | {"hubs": [hub]})
    out = " ".join(run("status", "--state-dir", state).stdout.split())
    assert "edge: sent again; yard: may be lost" in out


def test_status_and_clients_answer_with_the_daemon_stopped(state: Path) -> None:
    told = run_json("status", "--state-dir", state)
    assert (told["daemon"], told["losses"], told["dead"]) == ("stopped", 70, 3)
    assert re.search(r"daemon: +stopped", run("status", "--state-dir", state).stdout)
    assert run_json("clients", "--state-dir", state)["away"][0]["client"] == "panel"
    assert "stopped" in run("clients", "--state-dir", state).stdout


@pytest.mark.parametrize("more", [[], ["--json"]])
def test_a_health_check_is_not_content_with_the_journal(state: Path, more: list[str]) -> None:
    result = run("status", "--running", *more, "--state-dir", state)
    assert result.exit_code == 1
    assert "stopped" in result.stdout, "what the journal says is told all the same"


def test_a_health_check_is_content_with_a_daemon_that_answers(state: Path, daemon: Daemon) -> None:
    daemon.answer = says(STATUS)
    assert run("status", "--running", "--state-dir", state).exit_code == 0
    daemon.answer = lambda asked: b""
    assert run("status", "--running", "--state-dir", state).exit_code == 1


def test_clients_shows_whatever_the_daemon_tells_of_those_here_and_away(state: Path, daemon: Daemon) -> None:
    away = [{"client": "b", "durable": True, "subscriptions": ["x/#", "y"]}]
    daemon.answer = says({"ok": True, "clients": [{"client": "a", "in_flight": 1}], "away": away})
    lines = run("clients", "--state-dir", state).stdout.splitlines()
    assert [re.split("  +", line) for line in lines] == [
        ["client", "connected", "in flight", "durable", "subscriptions"],
        ["a", "yes", "1", "-", "-"],
        ["b", "no", "-", "yes", "x/#, y"],
    ]


@pytest.mark.parametrize("answer", [b"", b"\n", b"[1]\n", b"nonsense\n", b"{}\n", b'{"ok": true', b"\xff\n"])
def test_an_answer_that_is_none_is_an_error_of_one_line(state: Path, daemon: Daemon, answer: bytes) -> None:
    daemon.answer = lambda asked: answer
    with pytest.raises(ControlError):
        request(state, "status")
    result = run("status", "--state-dir", state)
    assert result.exit_code == 1
    assert len(result.stderr.splitlines()) == 1


def test_a_daemon_that_does_not_answer_is_not_waited_for(state: Path, daemon: Daemon) -> None:
    daemon.answer = lambda asked: time.sleep(8) or b""  # type: ignore[func-returns-value]
    begun = time.monotonic()
    with pytest.raises(ControlError, match="did not answer"):
        request(state, "status", timeout_s=0.2)
    assert time.monotonic() - begun < 6


def test_a_socket_that_a_dead_daemon_left_is_no_daemon(state: Path) -> None:
    server = Daemon(state)
    server.server_close()
    assert (state / "control.sock").exists()
    with pytest.raises(DaemonStopped):
        request(state, "status")


def test_the_control_socket_is_reached_by_a_path_longer_than_an_address(tmp_path: Path) -> None:
    long = tmp_path / ("x" * 120)
    long.mkdir()
    with pytest.raises(DaemonStopped):
        request(long, "status")
    (tmp_path / "s").symlink_to(long)
    server = Daemon(tmp_path / "s")
    server.answer = says({"ok": True, "pid": 1})
    thread = threading.Thread(target=server.handle_request)
    thread.start()
    assert request(long, "status") == {"pid": 1}
    thread.join()
    server.server_close()


# ------------------------------------------------------------------------------------------ publish and subscribe


def to(mosquitto: Mosquitto) -> list[str]:
    return ["--to", mosquitto.url.partition("://")[2]]


def test_what_is_published_is_received(mosquitto: Mosquitto) -> None:
    result = run("publish", "cli/kept", "-m", "grün", "-r", *to(mosquitto))
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "1 acknowledged\n")
    result = run("subscribe", "cli/#", "-n", "1", *to(mosquitto))
    assert (result.exit_code, result.stdout) == (0, "cli/kept grün\n")
    told = json.loads(run("subscribe", "cli/#", "-n", "1", "--json", *to(mosquitto)).stdout)
    assert told == {"topic": "cli/kept", "text": "grün", "qos": 1, "retain": True}


@pytest.mark.parametrize("qos", [1, 2])
def test_each_line_of_standard_input_is_a_message_and_a_durable_subscriber_misses_none(
    mosquitto: Mosquitto, qos: int
) -> None:
    durable = ["--durable", "--client-id", f"cli-{qos}", *to(mosquitto)]
    topic = f"lines/{qos}"
    assert run("subscribe", topic, "--timeout", "0.3", *durable).exit_code == 0
    lines = [f"line {n}" for n in range(700)]
    result = run("publish", topic, "--stdin-line", "-q", qos, *to(mosquitto), stdin="\n".join(lines) + "\n")
    assert (result.exit_code, result.stderr) == (0, "700 acknowledged\n")
    first = run("subscribe", topic, "-n", "10", *durable).stdout.splitlines()
    assert first == [f"{topic} {line}" for line in lines[:10]]
    rest = run("subscribe", topic, "-n", "690", "--timeout", "20", *durable)
    assert rest.exit_code == 0
    assert rest.stdout.splitlines() == [f"{topic} {line}" for line in lines[10:]]


def test_too_few_messages_are_status_1(mosquitto: Mosquitto) -> None:
    result = run("subscribe", "nothing/here", "-n", "1", "--timeout", "0.3", *to(mosquitto))
    assert result.exit_code == 1
    assert "0 of 1" in result.stderr


def test_what_cannot_be_is_said_in_one_line(mosquitto: Mosquitto, tmp_path: Path) -> None:
    for words in (
        ["publish", "a", "-m", "x", "--to", "127.0.0.1:1"],
        ["publish", "a", "-m", "x", "--to", f"unix:{tmp_path}/none"],
        ["publish", "a", "-m", "x", "--user", "u", "--password-file", tmp_path / "none", *to(mosquitto)],
    ):
        result = run(*words)
        assert result.exit_code == 1, words
        assert re.fullmatch(r"lineside: .+\n", result.stderr), words


def connack(*properties: int) -> bytes:
    return bytes([0x20, 3 + len(properties), 0, 0, len(properties), *properties])


@pytest.mark.parametrize(
    ("answers", "words", "complaint"),
    [
        ([connack(0x24, 1)], ["-q", "2"], "the gateway takes no QoS 2, only up to 1"),
        ([connack(0x25, 0)], ["-r"], "the gateway keeps no messages"),
        ([b"\x20\x03\x00\x87\x00"], [], "refused to connect: Not authorized"),
        ([connack(), b"\xe0\x02\x9b\x00"], [], "the gateway ended the connection: QoS not supported; 0 ack"),
        ([connack(), b"\x40\x04\x00\x01\x97\x00"], [], "1 of 1 refused: Quota exceeded"),
        ([connack()], ["--timeout", "0.3"], "1 of 1 not acknowledged within 0.3 s; 0 acknowledged before"),
        ([b""], [], "the connection to the gateway was lost"),
    ],
)
def test_what_the_gateway_refuses_is_said_in_its_own_words(
    answers: list[bytes], words: list[str], complaint: str
) -> None:
    """A peer that answers each packet with the next of `answers`, and hangs up at an empty one."""

    class Peer(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            for answer in answers:
                if not self.request.recv(4096) or not answer:
                    return
                self.request.sendall(answer)
            while self.request.recv(4096):
                pass

    with socketserver.TCPServer(("127.0.0.1", 0), Peer) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        result = run("publish", "t", "-m", "x", *words, "--to", f"127.0.0.1:{server.server_address[1]}")
        thread.join()
    assert result.exit_code == 1
    assert complaint in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("command", "what"),
    [
        (["publish", "a/#", "-m", "x"], "TOPIC: a/#: a topic name holds no wildcard"),
        (["publish", "", "-m", "x"], "TOPIC"),
        (["subscribe", "a/#/b"], "FILTER: a/#/b"),
    ],
)
def test_a_topic_that_cannot_be_is_a_usage_error_before_anything_is_dialled(command: list[str], what: str) -> None:
    result = CliRunner().invoke(cli, [*command, "--to", "127.0.0.1:1"])
    assert result.exit_code == 2
    assert what in " ".join(result.stderr.split())
