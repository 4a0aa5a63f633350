"""How much a line is handed: a bucket against the clock, and a gauge against lines that carry what they carry."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.config_values import parse_rate, show_rate
from gateway.uplink.pace import (
    LIMIT_BYTES_MAX,
    LIMIT_BYTES_MIN,
    LIMIT_BYTES_START,
    TARGET_S,
    Bucket,
    Gauge,
    chunk_bytes,
    on_the_wire,
    turn_bytes,
)


@given(st.floats(100, 1e7), st.lists(st.floats(0.0, 3.0), min_size=1, max_size=50))
@settings(max_examples=100, deadline=None)
def test_over_any_time_no_more_goes_than_the_rate_and_one_turn(rate: float, waits: list[float]) -> None:
    bucket, now, gone = Bucket(rate, 0.0), 0.0, 0
    for wait in waits:
        now += wait
        may = max(0, bucket.level(now))
        bucket.wrote(may)
        gone += may
        assert gone <= rate * now + turn_bytes(rate)
        later = bucket.ready_at(now, turn_bytes(rate))
        assert later - now <= turn_bytes(rate) / rate + 1e-6
        assert bucket.level(later + 1e-6) >= turn_bytes(rate) - 1
        now = later


def test_what_was_sent_in_spite_of_the_bucket_delays_what_comes_after() -> None:
    bucket = Bucket(1200.0, 0.0)
    bucket.wrote(bucket.level(0.0) + 1200)
    assert bucket.level(0.0) == -1200
    assert bucket.ready_at(0.0, 120) == pytest.approx(1.1)


@dataclass
class Line:
    """Carries `rate` bytes a second, acknowledged `rtt_s` later."""

    rate: float
    rtt_s: float
    now: float = 0.0
    queued: float = 0.0
    carried: float = 0.0

    def run(self, gauge: Gauge, seconds: float, *, wanted: float = float("inf"), step_s: float = 0.0) -> float:
        """Offer `wanted` bytes a second: the most that stood before a new byte, in the second half."""
        step_s = step_s or max(0.01, self.rtt_s / 10)
        most, until, half = 0.0, self.now + seconds, self.now + seconds / 2
        on_its_way: list[tuple[float, float]] = []
        while self.now < until:
            self.now += step_s
            moved = min(self.queued - sum(size for _, size in on_its_way), self.rate * step_s)
            on_its_way.append((self.now + self.rtt_s, moved))
            while on_its_way and on_its_way[0][0] <= self.now:
                size = on_its_way.pop(0)[1]
                self.queued -= size
                self.carried += size
            gauge.observe(self.now, int(self.carried), int(self.queued), self.rtt_s)
            room = gauge.room()
            if room >= chunk_bytes(gauge.limit):
                give = min(room, wanted * step_s)
                gauge.handed(int(give))
                self.queued += give
            if wanted == float("inf"):
                gauge.held_up(self.now)
            if self.now > half:
                most = max(most, self.queued)
        return most


@given(st.floats(1000, 5e6), st.floats(0.001, 0.8))
@settings(max_examples=60, deadline=None)
def test_a_full_line_holds_about_a_tenth_of_a_second_more_than_it_needs_and_is_kept_busy(
    rate: float, rtt_s: float
) -> None:
    line, gauge = Line(rate, rtt_s), Gauge()
    line.run(gauge, 40 * (rtt_s + TARGET_S))
    carried = line.carried
    seconds = 20 * (rtt_s + TARGET_S)
    most = line.run(gauge, seconds)
    assert most <= max(2 * LIMIT_BYTES_MIN, 2.6 * rate * (rtt_s + TARGET_S))
    busy = (line.carried - carried) / seconds
    assert busy >= 0.6 * min(rate, LIMIT_BYTES_MAX / (rtt_s + TARGET_S))


def test_a_line_that_becomes_narrow_holds_little_again_within_seconds() -> None:
    line, gauge = Line(1e6, 0.02), Gauge()
    line.run(gauge, 5)
    wide = gauge.limit
    line.rate = 1200.0
    line.run(gauge, wide / 1200.0 + 5)
    assert gauge.limit <= 2 * LIMIT_BYTES_MIN
    line.rate = 1e6
    line.run(gauge, 5)
    assert gauge.limit > wide / 3, "and as much as before once it is wide"


def test_little_traffic_says_nothing_about_what_a_line_can_carry() -> None:
    line, gauge = Line(1e6, 0.02), Gauge()
    line.run(gauge, 5)
    before = gauge.limit
    line.run(gauge, 30, wanted=5000.0)
    assert gauge.limit >= before


def test_a_new_connection_begins_with_little_and_with_less_where_the_line_was_narrow() -> None:
    assert Gauge(LIMIT_BYTES_MAX).limit == LIMIT_BYTES_START
    assert Gauge(1500).limit == 1500
    assert Gauge(1).limit == LIMIT_BYTES_MIN


def test_a_rate_that_was_set_bounds_what_a_line_may_hold_before_anything_is_measured() -> None:
    gauge = Gauge(rate_max=1200.0)
    gauge.observe(0.0, 0, 0, 0.3)
    assert gauge.limit == LIMIT_BYTES_MIN
    fast = Gauge(rate_max=1e6)
    Line(1e7, 0.02).run(fast, 5)
    assert fast.limit <= 1e6 * (0.02 + TARGET_S) + turn_bytes(1e6)


def test_headers_count() -> None:
    assert on_the_wire(100, 1, None, False) == 152
    assert on_the_wire(100, 1, None, True) == 181
    assert on_the_wire(0, 0, 3, False) == 156, "segments that only acknowledge"
    assert on_the_wire(14_000, 1, None, False) == 14_000 + 11 * 52


@pytest.mark.parametrize(
    ("text", "bytes_s", "shown"),
    [
        ("9.6kbit/s", 1200.0, "9.6kbit/s"),
        ("2 Mbit/s", 250e3, "2Mbit/s"),
        ("1200B/s", 1200.0, "9.6kbit/s"),
        ("1Gbit/s", 125e6, "1Gbit/s"),
        ("800bit/s", 100.0, "800bit/s"),
    ],
)
def test_a_rate_is_read_and_shown(text: str, bytes_s: float, shown: str) -> None:
    assert parse_rate(text) == bytes_s
    assert show_rate(bytes_s) == shown


@pytest.mark.parametrize(
    ("text", "write"), [("9600", None), ("9.6kbits", None), ("9.6KBIT/s", "9.6kbit/s"), ("1bit/s", None), (9600, None)]
)
def test_a_rate_without_its_unit_is_refused(text: object, write: str | None) -> None:
    with pytest.raises(ValueError, match=r"rate|units") as caught:
        parse_rate(text)
    if write is not None:
        assert caught.value.args[1] == write
