"""A campaign can be believed: a seed is the same life in every process, and one that breaks a promise is told."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from gateway.amqp.engine import Receiver
from storeforward.journal import Journal
from tests.simulation import campaign
from tests.simulation.campaign import LIVES, MIX, life_of, main

ROOT = Path(__file__).resolve().parent.parent.parent
WAIT_S = 120.0


def test_a_seed_is_the_same_life_in_every_process() -> None:
    """Or one that failed could not be lived again: not by the order of sets, nor by what was lived before it."""
    lives = [name for name in LIVES if name not in ("crowded", "hours")]  # these are as others, and longer
    command = [sys.executable, "-m", "tests.simulation.campaign", "--fingerprints"]
    command += [part for name in lives for part in ("--life", name)]

    def begin(first: int, seeds: int, hash_seed: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*command, "--processes", "1", "--first", str(first), "--seeds", str(seeds)],
            cwd=ROOT,
            env=os.environ | {"PYTHONHASHSEED": hash_seed},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def fingerprints(process: subprocess.Popen[str]) -> set[str]:
        told, _ = process.communicate(timeout=WAIT_S)
        assert process.returncode == 0, told
        return set(re.findall(r"^\S+ \d+ [0-9a-f]{16}$", told, re.MULTILINE))

    count = 3 * len(lives)
    processes = [begin(0, count, "1"), begin(count // 2, count - count // 2, "2")]
    every, later = (fingerprints(process) for process in processes)
    assert len(every) == count
    assert len(later) == count - count // 2
    assert later < every


def test_a_seed_that_breaks_a_promise_is_told_with_the_command_that_lives_it_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Journal, "wait", lambda self, waiter, token: waiter.committed([token]))
    assert main(["--life", "brief", "--first", "8", "--seeds", "4", "--processes", "2"]) == 1
    told = capsys.readouterr().out
    assert "family" in told, "the story of the life"
    failures = re.findall(r"^AssertionError: (.*)$", told, re.MULTILINE)
    assert failures[0].startswith("acknowledged, and gone")
    commands = dict.fromkeys(re.findall(r"^    python -m tests.simulation.campaign (.*)$", told, re.MULTILINE))
    for command, failure in zip(commands, failures, strict=True):
        assert main(shlex.split(command)) == 1
        assert f"AssertionError: {failure}\n" in capsys.readouterr().out


def test_a_process_that_dies_is_a_failure_of_the_seed_it_was_at_and_the_others_are_lived(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As when a C library crashes, or memory ends."""
    monkeypatch.setattr(Receiver, "accept", lambda self, handles: os.kill(os.getpid(), signal.SIGTERM))
    assert main(["--life", "brief", "--life", "mqtt-brief", "--first", "0", "--seeds", "8", "--processes", "1"]) == 1
    told = capsys.readouterr().out
    assert told.count("its process ended with -15") == 4
    assert re.findall(r"^FAILED: seed (\d+) of brief;", told, re.MULTILINE) == ["0", "2", "4", "6"]
    assert re.search(r"^mqtt-brief +4 ", told, re.MULTILINE)


def test_a_world_that_does_not_end_is_a_failure_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def endless(seed: int, directory: Path) -> None:
        signal.pause()

    monkeypatch.setitem(LIVES, "brief", endless)
    monkeypatch.setattr(campaign, "HUNG_S", 0.2)
    assert main(["--life", "brief", "--first", "7", "--seeds", "1", "--processes", "1"]) == 1
    assert "its process ended with -9" in capsys.readouterr().out


def test_a_seed_names_its_life_and_all_kinds_come_most_of_them_brief() -> None:
    drawn = Counter(life_of(seed) for seed in range(5000))
    assert drawn.keys() == LIVES.keys() == MIX.keys()
    assert drawn["brief"] + drawn["mqtt-brief"] > 0.9 * drawn.total()
