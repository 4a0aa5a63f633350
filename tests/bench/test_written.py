"""The measure of bytes written, in small: what it must show whatever the machine does meanwhile."""

from __future__ import annotations

from tests.bench.written import daemon_row, stages


def test_on_a_healthy_link_next_to_nothing_is_written_of_what_the_hub_may_settle_first() -> None:
    (row,) = daemon_row("hub", 1024, 4000)
    assert row.process < 0.05


def test_a_message_is_written_once_by_its_commit_and_once_by_a_checkpoint() -> None:
    measured = stages(1024, batch=400, batches=12)
    assert measured["commits"] < 1.35
    assert measured["checkpoint"] < 1.2
    assert measured["cursor and deletion"] < 1.2
