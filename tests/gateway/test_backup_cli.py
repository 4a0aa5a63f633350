"""`backup` and `restore` as a person uses them: beside a running gateway, and to move it to another machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result

from gateway.cli.main import cli
from tests.daemon import CONFIG, HUB_CONFIG, Client, Daemon, Reader, free_port, wait_until

COUNT = 2000


def lineside(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def answer(*arguments: str | Path) -> dict[str, Any]:
    result = lineside(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return dict(json.loads(result.stdout))


def test_a_gateway_moves_to_a_new_box_with_its_backlog_nothing_is_lost_or_sent_by_both(tmp_path: Path) -> None:
    hub_port = free_port()
    for name in ("hub", "old", "new"):
        (tmp_path / name).mkdir()
    old = Daemon(tmp_path / "old", CONFIG, hub_port)
    daemons = [old]
    file = tmp_path / "journal.backup"
    try:
        old.status()
        app = Client(old.port)
        app.publish(COUNT)
        copy = answer("backup", tmp_path / "copy", "--config", old.config)
        assert copy["messages"] == COUNT
        assert not copy["moved"]

        refused = lineside("backup", file, "--move", "--config", old.config)
        assert refused.exit_code == 1
        assert "in use by another lineside" in refused.stderr
        app.close()
        old.process.terminate()
        assert old.process.wait(20) == 0
        assert answer("backup", file, "--move", "--config", old.config)["moved"]
        assert old.start().wait(20) != 0
        assert "handed over" in old.log.read_text()

        assert answer("restore", file, "--check")["messages"] == COUNT
        restored = lineside("restore", file, "--state-dir", tmp_path / "new" / "state")
        assert restored.exit_code == 0
        assert f"{COUNT} messages" in restored.stdout
        hub = Daemon(tmp_path / "hub", HUB_CONFIG, hub_port)
        daemons.append(hub)
        hub.status()
        reader = Reader(hub)
        new = Daemon(tmp_path / "new", CONFIG, hub_port)
        daemons.append(new)
        new.status()
        app = Client(new.port)
        app.client.publish("train/speed", b"%d" % COUNT, qos=1)
        wait_until(lambda: len(reader.got) > COUNT)
        assert reader.got == list(range(COUNT + 1))
        app.close()
        reader.client.close()
    finally:
        for daemon in daemons:
            daemon.end()


def test_what_is_no_backup_is_said_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("not a journal\n" * 100)
    for file, what in (("notes.txt", "not a database"), ("missing", "no such file")):
        result = lineside("restore", tmp_path / file, "--state-dir", tmp_path / "state")
        assert result.exit_code == 1
        assert len(result.stderr.splitlines()) == 1
        assert what in result.stderr
        assert file in result.stderr
    assert not (tmp_path / "state").exists()
