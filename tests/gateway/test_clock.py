"""A wall clock that lies, by fifty years either way or before 1970: nothing expires, nothing is reordered."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from gateway.cli.main import cli
from storeforward.inspection import Inspection
from storeforward.journal import Journal
from tests.storeforward.test_journal import encode, fill, outbound

YEAR_S = 365 * 86400.0
COMMANDS = [
    ["backlog"],
    ["backlog", "alarms"],
    ["show", "alarms", "3"],
    ["deadletter", "list"],
    ["deadletter", "show", "1"],
    ["losses"],
    ["status"],
]
TTL_US = 60_000_000
WALLS = {
    "fifty years on": 1.8e9 + 50 * YEAR_S,
    "fifty years back": 1.8e9 - 50 * YEAR_S,
    "1970": 0.0,
    "1900": -70 * YEAR_S,
    "year 9999": 253_402_300_799.0,
    "beyond what a date can be": 9.2e12,
    "before what a date can be": -9.2e12,
}


@pytest.mark.parametrize("there", WALLS.values(), ids=WALLS.keys())
def test_a_jump_of_the_wall_clock_expires_nothing_and_reorders_nothing(tmp_path: Path, there: float) -> None:
    boottime, wall = [1000.0], [1.8e9]
    journal = Journal.open(tmp_path, clock=lambda: boottime[0], wall=lambda: wall[0])
    stream = outbound(journal)
    expires = journal.age_us() + TTL_US
    for jump in (1.8e9, there, 1.8e9):
        wall[0] = jump
        for _ in range(10):
            journal.append(stream, "a/b", encode, b"x", expires_age_us=expires)
        journal.commit_now()
        boottime[0] += 1
    journal.close()
    wall[0] = there
    boottime[0] += 10
    journal = Journal.open(tmp_path, clock=lambda: boottime[0], wall=lambda: wall[0])
    stream = journal.streams["alarms"]
    rows = journal.read(stream, 1, 100)
    assert [r.seq for r in rows] == list(range(1, 31))
    assert all(
        r.expires_age_us is not None and r.expires_age_us - journal.age_us() == TTL_US - 13_000_000 for r in rows
    )
    boottime[0] += 47
    assert (rows[0].expires_age_us or 0) <= journal.age_us(), "time that passed counts"
    journal.close()


@pytest.mark.parametrize("there", WALLS.values(), ids=WALLS.keys())
def test_everything_that_shows_a_time_shows_such_a_one_too(tmp_path: Path, there: float) -> None:
    journal = Journal.open(tmp_path, wall=lambda: there)
    stream = outbound(journal)
    fill(journal, stream, 3)
    fill(journal, stream, 1)
    journal.bury(stream, journal.read(stream, 1, 1)[0], "no", "no")
    journal.lose("alarms", 2, "expired", 1)
    journal.commit_now()
    journal.close()
    with Inspection(tmp_path) as seen:
        assert seen.streams()[0].oldest_us is not None
    for command in COMMANDS:
        for extra in ([], ["--json"]):
            result = CliRunner().invoke(cli, [*command, *extra, "--state-dir", str(tmp_path)])
            assert result.exit_code == 0, (command, result.output, result.exception)
            if extra:
                json.loads(result.stdout)
