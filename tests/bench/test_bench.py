"""The limits that Lineside promises for its own cost, held side by side with Mosquitto in small rounds.

Method and full figures: `python -m tests.bench.run`.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from storeforward.journal import Journal
from tests.bench import run, yard
from tests.conftest import require

RSS_BYTES_MAX = 64_000_000
DRAIN_PER_S_MIN = 50_000
ALARM_P50_S_MAX = 0.2  # half of it is chance: when the line is tried next
BACKLOG_S_MAX = 5.0
RESUME_S_MAX = 1.0
OPEN_S_MAX = 1.0
# On a machine that does nothing else it is a tenth of that (python -m tests.bench.run fanout); CI does.
FANOUT_P99_MS_MAX = 1000


@pytest.mark.parametrize("version", [4, 5], ids=["3.1.1", "5.0"])
def test_intake_after_fsync_is_at_least_as_fast_as_mosquitto_queueing_in_memory(tmp_path: Path, version: int) -> None:
    require("mosquitto")
    figures = run.intake(tmp_path, pairs=3, pairs_max=9, seconds=1.0, version=version)
    assert figures["ratio_median"] >= 1.0, figures


def test_amqp_intake_after_fsync_is_at_least_as_fast_as_that_of_artemis_and_rabbitmq(tmp_path: Path) -> None:
    require("artemis")
    require("rabbitmq")
    figures = run.amqp_intake(tmp_path, rounds=1, rounds_max=5, seconds=1.5)
    assert figures["ratio_median_artemis"] >= 1.0, figures
    assert figures["ratio_median_rabbitmq"] >= 1.0, figures


def test_a_hundred_thousand_messages_drain_over_mutual_tls_at_fifty_thousand_a_second(tmp_path: Path) -> None:
    figures = run.drain(tmp_path, rounds=2)
    assert figures["per_s_best"] >= DRAIN_PER_S_MIN, figures


def test_a_million_queued_messages_take_less_than_64_mb_of_memory_and_a_second_to_open(tmp_path: Path) -> None:
    figures = run.memory(tmp_path)
    assert figures["rows"] == [1_000_000, 1_000_000], figures
    assert figures["rss_bytes"] < RSS_BYTES_MAX, figures
    assert figures["rss_bytes_after_restart"] < RSS_BYTES_MAX, figures
    assert figures["open_s"] < OPEN_S_MAX, figures


def test_a_thousand_subscribers_get_fifty_messages_a_second_each_in_order_at_no_growing_cost(tmp_path: Path) -> None:
    figures = run.fanout(tmp_path, seconds=5, rival=False)
    assert figures["lineside_delivered"] == 250_000, figures
    assert figures["lineside_lost"] == figures["lineside_reordered"] == figures["lineside_repeated"] == 0, figures
    assert figures["lineside_p99_ms"] < FANOUT_P99_MS_MAX, figures
    assert figures["lineside_rss_bytes_after"] < figures["lineside_rss_bytes_before"] * 1.25, figures


def test_traffic_is_back_within_a_second_of_the_lines_return_over_twenty_cuts(tmp_path: Path) -> None:
    figures = run.resume(tmp_path, cuts=20)
    assert figures["p99_s"] < RESUME_S_MAX, figures


def test_an_alarm_is_through_a_fifth_of_a_second_after_a_tunnel_whatever_is_queued(tmp_path: Path) -> None:
    figures = run.alarm(tmp_path, rows=250_000, cuts=6)
    assert figures["p50_s"] < ALARM_P50_S_MAX, figures
    assert figures["p99_s"] < RESUME_S_MAX, figures


def test_a_hundred_thousand_messages_that_a_tunnel_held_back_are_through_within_five_seconds(tmp_path: Path) -> None:
    figures = run.backlog(tmp_path)
    assert figures["drained_s"] < BACKLOG_S_MAX, figures


def test_gateways_that_come_back_at_once_are_all_served_and_connect_once(tmp_path: Path) -> None:
    require("artemis")
    result = yard.come_back(tmp_path, gateways=4, messages=2000)
    assert not yard.wrong(result), result


def test_a_checkpointed_wal_counts_as_small_again_so_that_not_every_commit_pays_for_a_checkpoint(
    tmp_path: Path,
) -> None:
    journal = Journal.open(tmp_path)
    stream = journal.stream("bench", "outbound")

    def fill(count: int) -> None:
        for _ in range(count):
            journal.append(stream, "bench/0", lambda seq, payload: payload, bytes(200))
        journal.commit_now()

    fill(20_000)
    full = journal.wal_bytes()
    journal.checkpoint()
    fill(1)
    assert full > 3_000_000
    assert journal.wal_bytes() < full // 10
    journal.close()
