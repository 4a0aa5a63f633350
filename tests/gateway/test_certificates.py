"""Certificates that end, and a clock that is not set: said in time, survived, and over when the cause is."""

from __future__ import annotations

import asyncio
import datetime
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from gateway import certificates
from gateway.certificates import LOOK_S, Certificates
from gateway.child import ChildError
from gateway.cli.main import cli
from gateway.config import loads
from security.expiry import RELEASED_S
from tests.daemon import CONFIG, HUB_CONFIG, Client, Daemon, Reader, free_port, wait_until
from tests.pki import Pki

DAY = datetime.timedelta(days=1)
DAY_S = 86400.0
COUNT = 1000

TLS_HUB = HUB_CONFIG.replace(
    'listen = ["127.0.0.1:{hub_port}"]',
    'listen = ["amqps://127.0.0.1:{hub_port}"]\ncert = "{cert}"\nkey = "{key}"\nclient_ca = "{ca}"',
)
TLS_GATEWAY = CONFIG.replace("amqp://127.0.0.1", "amqps://localhost").replace(
    'kind = "lineside"', 'kind = "lineside"\nca = "{ca}"\ncert = "{cert}"\nkey = "{key}"'
)


class Clock:
    def __init__(self, now_s: float, right: bool = True) -> None:
        self.now_s, self.right = now_s, right


async def settled(watch: Certificates) -> None:
    while watch._reading is not None:
        await asyncio.wait([watch._reading])


def watched(tmp_path: Path, clock: Clock, steps: list[tuple[float, bool]]) -> tuple[list[dict[str, Any]], list[int]]:
    """`status` after each step of the clock; how often something was to be tried again by then."""
    pki = Pki(tmp_path / "pki")
    text = TLS_GATEWAY.format(
        state=tmp_path / "state", port=1, hub_port=1, ca=pki.ca, cert=pki.client.cert, key=pki.client.key
    )
    config = loads(text, check_files=False)
    news: list[int] = [0]

    def count() -> None:
        news[0] += 1

    async def run() -> tuple[list[dict[str, Any]], list[int]]:
        watch = Certificates(config, count, lambda: clock.now_s, lambda: clock.right)
        watch.start()
        await settled(watch)
        found, counts = [watch.status()], [news[0]]
        for now_s, right in steps:
            clock.now_s, clock.right = now_s, right
            watch._judge()
            found.append(watch.status())
            counts.append(news[0])
        watch.stop()
        return found, counts

    return asyncio.run(run())


def states(status: dict[str, Any]) -> dict[str, str]:
    return {each["for"]: each["state"] for each in status["certificates"]}


def test_the_end_is_said_at_thirty_seven_and_one_day_once_each_and_after_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "lineside.certificates")
    now = datetime.datetime.now().timestamp()
    days = [30.1, 50.1, 53.2, 53.3, 59.1, 59.2, 60.1, 90.0]
    found, _ = watched(tmp_path, Clock(now), [(now + d * DAY_S, True) for d in days])
    assert [states(f)["hub depot cert"] for f in found][1:] == ["ends soon"] * 6 + ["expired"] * 2
    assert states(found[0]) == {"hub depot cert": "good", "hub depot ca": "good"}
    said = [r.getMessage() for r in caplog.records if getattr(r, "for", "") == "hub depot cert"]
    assert said == [
        "certificate ends within 30 days",
        "certificate ends within 7 days",
        "certificate ends within 1 day",
        "certificate expired",
    ]


def test_a_clock_that_is_not_set_judges_nothing_and_everything_is_tried_again_once_it_is(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "lineside.certificates")
    now = datetime.datetime.now().timestamp()
    found, news = watched(tmp_path, Clock(0.0, False), [(3600.0, False), (now, True)])
    assert [f["clock"]["set"] for f in found] == [False, False, True]
    assert set(states(found[0]).values()) == {"clock not set"}
    assert states(found[2])["hub depot ca"] == "good"
    assert news == [0, 0, 1]
    assert [r.getMessage() for r in caplog.records][:2] == [
        "clock not set: no certificate can be judged by it",
        "clock set",
    ]


def test_a_child_that_gives_no_answer_is_asked_again_and_what_is_known_stays(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO, "lineside.certificates")
    pki = Pki(tmp_path / "pki")
    text = TLS_GATEWAY.format(
        state=tmp_path / "state", port=1, hub_port=1, ca=pki.ca, cert=pki.client.cert, key=pki.client.key
    )
    config = loads(text, check_files=False)
    answering = True
    asked = 0
    ask = certificates.ask

    async def perhaps(*arguments: str, timeout_s: float) -> bytes:
        nonlocal asked
        asked += 1
        if not answering:
            raise ChildError("was ended by SIGKILL")
        return await ask(*arguments, timeout_s=timeout_s)

    monkeypatch.setattr(certificates, "ask", perhaps)

    async def run() -> None:
        nonlocal answering
        watch = Certificates(config)

        async def look() -> dict[str, str]:
            watch.stop()
            watch._look()
            await settled(watch)
            return states(watch.status())

        good = {"hub depot cert": "good", "hub depot ca": "good"}
        answering = False
        assert await look() == {}
        answering = True
        assert await look() == good
        assert await look() == good
        assert asked == 2, "once it is known, no child is asked without a reason"
        os.utime(pki.client.cert, (1, 1))
        answering = False
        assert await look() == good
        assert await look() == good
        answering = True
        assert await look() == good
        assert asked == 5
        watch.stop()

    asyncio.run(run())
    said = [r for r in caplog.records if r.getMessage() == "the ends of the certificates could not be read"]
    assert len(said) == 2, "once each time that it fails, however often it is tried"


def test_a_daemon_whose_certificate_ended_a_month_ago_keeps_everything_and_sends_it_once_it_is_renewed(
    tmp_path: Path,
) -> None:
    pki = Pki(tmp_path / "pki")
    server = pki.server
    old = pki.issue("old", begins=-60 * DAY, ends=-30 * DAY)
    mine = {"cert": tmp_path / "loco.pem", "key": tmp_path / "loco.key"}
    shutil.copy(old.cert, mine["cert"])
    shutil.copy(old.key, mine["key"])
    hub_port = free_port()
    for name in ("hub", "gateway"):
        (tmp_path / name).mkdir()
    hub_config = TLS_HUB.replace("{cert}", str(server.cert)).replace("{key}", str(server.key))
    hub = Daemon(tmp_path / "hub", hub_config.replace("{ca}", str(pki.ca)), hub_port)
    daemons = [hub]
    try:
        hub.status()
        reader = Reader(hub)
        config = TLS_GATEWAY.replace("{ca}", str(pki.ca))
        for name, path in mine.items():
            config = config.replace(f"{{{name}}}", str(path))
        gateway = Daemon(tmp_path / "gateway", config, hub_port)
        daemons.append(gateway)
        gateway.status()
        app = Client(gateway.port)
        app.publish(COUNT)
        gateway.wait_for_log("certificate expired")
        shown = CliRunner().invoke(cli, ["status", "--config", str(gateway.config)])
        assert "expired" in shown.output
        assert reader.got == []
        renewed = pki.issue("renewed", ends=20 * DAY)
        shutil.copy(renewed.cert, mine["cert"])
        shutil.copy(renewed.key, mine["key"])
        wait_until(lambda: len(reader.got) >= COUNT, within_s=3 * LOOK_S + 15)
        assert reader.got == list(range(COUNT))
        gateway.wait_for_log("certificate ends within 30 days")
        app.close()
        reader.client.close()
    finally:
        for daemon in daemons:
            daemon.end()


def test_this_software_is_no_newer_than_today() -> None:
    assert datetime.datetime.now().timestamp() > RELEASED_S - 2 * DAY_S
