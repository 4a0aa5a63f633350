"""`lineside bench` in tiny sizes: that the command works, what it writes, and that ratios and verdicts are right."""

from __future__ import annotations

import json
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from gateway.bench.brokers import Mosquitto, program
from gateway.bench.daemon import ROOT, issue
from gateway.bench.measures import MEASURES, Bench, Case, Scale, fill, in_turns
from gateway.bench.peers import Peer, lineside, mqtt_peers
from gateway.bench.plot import svg
from gateway.bench.rows import Row, ratio
from gateway.bench.targets import HEADLINE, SINGLE, TARGETS, judge
from gateway.cli.bench import NAMES
from storeforward.inspection import Inspection

SVG = "{http://www.w3.org/2000/svg}"
TINY = Scale(rounds=2, seconds=0.2, warm_s=0.05, peers=False, wide=False)


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "gateway", "bench", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)


def test_ratios_are_medians_of_pairs_of_rounds_and_not_ratios_of_medians() -> None:
    assert ratio([100, 10, 300], [50, 10, 100]) == 2
    assert ratio([100], [0]) is None
    assert ratio([], [1]) is None


def test_a_row_is_the_median_of_its_rounds() -> None:
    assert Row("intake", HEADLINE, "lineside", "/s", (1, 100, 3)).value == 3
    assert Row("intake", HEADLINE, "lineside", "/s").value is None


def verdict(rows: list[Row], what: str) -> tuple[float | None, bool | None]:
    each = next(each for each in judge(rows) if each.what == what)
    return each.measured, each.met


@pytest.mark.parametrize(("found", "met"), [(1.6, True), (1.5, True), (1.49, False)])
def test_a_target_for_a_ratio_is_met_from_its_limit_on(found: float, met: bool) -> None:
    rows = [Row("intake", HEADLINE, "mosquitto", "/s", (10.0,), ratio=found)]
    assert verdict(rows, "MQTT intake : Mosquitto, offline session") == (found, met)


@pytest.mark.parametrize(("found", "met"), [(39e6, True), (40e6, True), (41e6, False)])
def test_a_target_for_memory_is_met_up_to_its_limit(found: float, met: bool) -> None:
    rows = [Row("memory", "RSS, idle", "lineside", "B", (found,))]
    assert verdict(rows, "RSS, idle") == (found / 1e6, met)


def test_a_target_for_latency_is_held_against_the_disks_own_syncs() -> None:
    ours = Row("latency", SINGLE, "lineside", "/s", (100.0,), p99_ms=5.0)
    disk = Row("latency", SINGLE, "fdatasync", "/s", (500.0,), p99_ms=2.0)
    assert verdict([ours, disk], "latency, window 1, p99 : the disk's sync p99") == (2.5, True)


def test_the_worse_of_intake_and_drain_decides_what_both_at_once_are_worth() -> None:
    rows = [
        Row("both", f"{what}, of alone", "lineside", "×", (share,)) for what, share in (("intake", 0.9), ("drain", 0.5))
    ]
    assert verdict(rows, "intake and drain at once : each alone") == (0.5, False)


def test_what_was_not_measured_is_neither_met_nor_missed() -> None:
    assert [each.met for each in judge([])] == [None] * len(TARGETS)


def test_the_command_knows_exactly_the_measures_that_there_are() -> None:
    assert tuple(MEASURES) == NAMES


def test_the_picture_is_well_formed_whatever_names_and_reasons_hold() -> None:
    rows = [
        Row("intake", "a < b & c", "lineside", "/s", (1.0, 2.0), "after <fsync>"),
        Row("intake", "a < b & c", "mosquitto", "/s", (0.0,), ratio=0.5),
        Row("drain", "100 B", "C proton", "/s", skipped="no <compiler>"),
    ]
    root = ElementTree.fromstring(svg(rows, judge(rows), "a machine & <more>"))
    assert root.tag == f"{SVG}svg"
    bars = root.findall(f"{SVG}rect")
    assert len(bars) == 1 + 2  # the ground, and one bar for each row with a figure
    assert all(float(bar.get("width", "-1")) > 0 for bar in bars)


def test_contenders_take_turns_and_one_that_fails_does_not_end_the_run(tmp_path: Path) -> None:
    said: list[str] = []
    broken = Peer("broken", "none", lambda d: Mosquitto("no_such_option true\n", directory=d), queues=False)
    absent = Peer("absent", "none", lambda d: Mosquitto(directory=d), "is not installed")
    place = Bench(tmp_path, issue(tmp_path / "pki"), TINY, said.append)
    if program("mosquitto") is None:
        broken = Peer("broken", "none", broken.make, "is not installed")
    from gateway.bench.measures import _publish

    rows = list(in_turns(place, "intake", Case(), [lineside(place.pki), broken, absent], _publish))
    assert [row.who for row in rows] == ["lineside", "broken", "absent"]
    assert len(rows[0].rounds) == TINY.rounds
    assert all(rate > 0 for rate in rows[0].rounds)
    assert rows[0].p50_ms is not None
    assert rows[1].skipped
    assert rows[1].rounds == ()
    assert rows[2].skipped == "is not installed"
    assert [text.split(", ")[2] for text in said if "lineside" in text] == ["lineside"] * 2


def test_a_peer_that_is_slow_to_start_is_kept_for_all_its_rounds(tmp_path: Path) -> None:
    if program("mosquitto") is None:
        pytest.skip("mosquitto is not installed")
    made: list[Path] = []

    def make(directory: Path) -> Mosquitto:
        made.append(directory)
        return Mosquitto(directory=directory)

    slow = Peer("slow", "none", make, slow=True)
    place = Bench(tmp_path, issue(tmp_path / "pki"), TINY, lambda text: None)
    from gateway.bench.measures import _publish

    ours, theirs = in_turns(place, "intake", Case(), [lineside(place.pki), slow], _publish)
    assert (ours.skipped, theirs.skipped) == (None, None)
    assert len(theirs.rounds) == TINY.rounds
    assert len(made) == 1


def test_a_filled_journal_holds_as_many_rows_as_were_asked_for(tmp_path: Path) -> None:
    fill(tmp_path / "state", 2500, lambda text: None)
    fill(tmp_path / "state", 3001, lambda text: None)
    with Inspection(tmp_path / "state") as inspection:
        assert [each.rows for each in inspection.streams()] == [3001]


def test_every_peer_says_what_its_acknowledgement_is_worth() -> None:
    assert all(peer.durability for peer in mqtt_peers())


def test_the_command_prints_json_and_saves_it_beside_a_picture(tmp_path: Path) -> None:
    done = bench(
        "intake", "amqp-intake", "rules", "drain", "--quick", "--seconds", "0.2", "--no-peers", "--json",
        "--directory", str(tmp_path), "--save", str(tmp_path / "results"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert {row["measure"] for row in found["rows"]} == {"intake", "amqp-intake", "rules", "drain"}
    assert all(row["value"] > 0 and row["durability"] for row in found["rows"]), found["rows"]
    assert found["machine"]["cores"] >= 1
    assert len(found["targets"]) == len(TARGETS)
    (data,) = (tmp_path / "results").glob("*.json")
    (picture,) = (tmp_path / "results").glob("*.svg")
    assert json.loads(data.read_text()) == found
    assert ElementTree.fromstring(picture.read_text()).tag == f"{SVG}svg"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results"]


def test_a_measure_that_does_not_exist_is_a_usage_error() -> None:
    done = bench("speed")
    assert done.returncode == 2
    assert "speed" in done.stderr
