"""Token buckets for connections, and a bound on what a flood writes into the log."""

from __future__ import annotations

from security.admission import REPORT_S, REPORTS_MAX, SOURCES_MAX, Admission, Rate, Reports

SLOW, WIDE = Rate(1.0, 3.0), Rate(1000.0, 10_000.0)


def test_a_source_has_its_burst_and_then_its_rate() -> None:
    admission = Admission(0.0, SLOW, SLOW, WIDE)
    assert [admission.admit("a", False, 0.0) for _ in range(5)] == [True] * 3 + [False] * 2
    assert [admission.admit("a", False, t / 2) for t in range(1, 9)] == [False, True] * 4
    assert [admission.admit("a", False, 100.0) for _ in range(5)] == [True] * 3 + [False] * 2  # no more than the burst


def test_a_flood_from_one_source_takes_nothing_from_another() -> None:
    admission = Admission(0.0, SLOW, SLOW, Rate(10.0, 10.0))
    for n in range(10_000):
        admission.admit("flood", False, n / 1e4)
    assert admission.admit("app", False, 1.0)


def test_all_together_are_bounded_and_so_is_what_is_remembered() -> None:
    admission = Admission(0.0, SLOW, SLOW, Rate(1.0, 50.0))
    let_in = sum(admission.admit(f"host {n}", False, 0.0) for n in range(2 * SOURCES_MAX))
    assert let_in == 50
    assert len(admission) == SOURCES_MAX


def test_a_clock_that_stands_or_goes_back_gives_nothing_away() -> None:
    admission = Admission(10.0, SLOW, SLOW, WIDE)
    assert sum(admission.admit("a", False, 10.0 - n) for n in range(9)) == 3


def test_of_a_peers_log_lines_a_few_are_written_at_a_time_and_the_next_tells_how_many_were_not() -> None:
    reports = Reports()
    assert [reports.due("refused", "a", 0.0) for _ in range(REPORTS_MAX)] == [0] * REPORTS_MAX
    assert [reports.due("refused", "a", 1.0) for _ in range(500)] == [None] * 500
    assert reports.due("refused", "b", 1.0) == 0
    assert reports.due("failed", "a", 1.0) == 0
    assert reports.due("refused", "a", REPORT_S) == 500
    for n in range(2 * SOURCES_MAX):
        reports.due("refused", str(n), 2.0)
    assert len(reports) == SOURCES_MAX
