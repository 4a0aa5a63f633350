"""Classes and shares on real radios: a real daemon, the kernel's own TCP, and a modem that would hold 200 kB."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.radio import Radio, Train, awaited

LARGE = b"x" * (8 << 20)


@pytest.fixture
def radio() -> Iterator[Radio]:
    with Radio() as radio:
        yield radio


@awaited
async def test_after_a_tunnel_the_alarm_is_there_before_a_hundred_thousand_rows_of_telemetry(
    radio: Radio, tmp_path: Path
) -> None:
    radio.rate(20_000_000)
    radio.down()
    delays: list[float] = []
    async with Train(radio, tmp_path, {"telemetry": [b"%200d" % n for n in range(100_000)]}) as train:
        for tunnel in range(2):
            alarm = train.publish("alarms")
            await asyncio.sleep(0.5)
            radio.up()
            back, before = time.monotonic(), len(train.mast.opened)
            arrival = await train.mast.wait_for(lambda each, alarm=alarm: each.payload == alarm)
            # Where the machine is busy, attempts that overlap come through together; one of them is kept.
            delays.append(arrival.at - train.mast.opened[before])
            assert arrival.at - back < 5, "the kernel's word that the radio is back wakes the dialler"
            if not tunnel:
                radio.down()
                # With nothing of ours on its way when the radio went, only the idle time-out tells.
                await train.until(lambda: train.status()["hubs"][0]["state"] != "up", within_s=90)
        telemetry = [each for each in train.mast.arrivals if each.stream == "telemetry"]
        assert len(telemetry) < 100_000, "there was a backlog all the time"
    assert min(delays) < 0.2, delays
    assert max(delays) < 1.0, delays


@pytest.mark.parametrize("rate", ['rate = "9.6kbit/s"', ""])
@awaited
async def test_a_radio_of_nine_kilobits_carries_an_alarm_within_two_seconds_whatever_waits(
    radio: Radio, tmp_path: Path, rate: str
) -> None:
    radio.rate(9600)
    backlog = {"logs": [LARGE] * 2, "telemetry": [b"t" * 200] * 2000}
    async with Train(radio, tmp_path, backlog, rate) as train:
        await train.until(lambda: train.sent_bytes("logs") > 0)
        if not rate:  # what went before the first measurement, TCP's needless repetitions included, has to get through
            await train.delay_s("alarms")
        for _ in range(3):
            await asyncio.sleep(0.6)
            assert await train.delay_s("alarms") < 2.0
        [hub] = train.status()["hubs"]
        assert hub["rate_limit_bytes_s"] == (1200 if rate else None)
        streams = {each["name"]: each for each in train.status()["streams"]}
        assert (streams["alarms"]["class"], streams["alarms"]["share"]) == ("urgent", 70)
        assert streams["logs"]["in_flight_bytes"] > 8 << 20, "a part of a large message was under way"
        assert len(train.mast.opened) == 1


@awaited
async def test_normal_and_bulk_have_their_shares_and_who_keeps_up_is_hardly_kept_waiting(
    radio: Radio, tmp_path: Path
) -> None:
    radio.rate(256_000)
    backlog = {"logs": [b"l" * 900] * 1000, "telemetry": [b"t" * 900] * 1000}
    async with Train(radio, tmp_path, backlog) as train:
        await train.until(lambda: len(train.mast.arrivals) > 20)
        before = {stream: train.sent_bytes(stream) for stream in backlog}
        delays = []
        for _ in range(15):
            delays.append(await train.delay_s("live"))
            await asyncio.sleep(0.1)
        sent = {stream: train.sent_bytes(stream) - before[stream] for stream in backlog}
    assert sorted(delays)[len(delays) // 2] < 0.7, delays
    share = sent["logs"] / sum(sent.values())
    assert 0.2 < share < 0.5, f"a third is the share of bulk beside normal, not {share}"


@awaited
async def test_a_large_message_on_a_slow_line_blocks_no_alarm_and_is_progress_but_a_silent_hub_is_none(
    radio: Radio, tmp_path: Path
) -> None:
    radio.rate(64_000)
    async with Train(radio, tmp_path, {"logs": [LARGE]}, 'settle_timeout = "2s"') as train:
        await train.delay_s("alarms")
        began = time.monotonic()
        while time.monotonic() - began < 5:
            await asyncio.sleep(0.4)
            assert await train.delay_s("alarms") < 1.5
        assert len(train.mast.opened) == 1, "8 MB take a quarter of an hour, and the hub has two seconds to settle"
        train.mast.settles = False
        await train.delay_s("alarms")
        await train.until(lambda: len(train.mast.opened) > 1)
        assert "nothing settled for 2 s" in train.log.read_text()
