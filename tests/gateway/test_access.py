"""Rules and passwords at the MQTT listener: raw clients of a daemon on a loop, and paho against a real one."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import sqlite3
import ssl
import struct
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Literal

import paho.mqtt.client as paho
import pytest
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.subscribeoptions import SubscribeOptions

from gateway import access as access_module
from gateway.access import ANSWERS_MAX, Access, Login, PasswordFile, Permit, identity_of
from gateway.app import App
from gateway.config import load, loads
from gateway.control_client import request
from gateway.mqtt import codec
from gateway.mqtt.packets import (
    V3,
    V5,
    Connack,
    Connect,
    ConnectProperties,
    Disconnect,
    Packet,
    Pingreq,
    Pingresp,
    Puback,
    Publish,
    PublishProperties,
    Suback,
    Subscribe,
    Subscription,
    Will,
    WillProperties,
)
from gateway.notify import Notifier
from security import passwords
from security.attempts import FailedLogins
from security.passwords import Cost, hash_password
from security.rules import Identity, Rules
from security.tls import client_context
from tests.daemon import Daemon, free_port
from tests.mqtt_peer import WAIT_S, MqttPeer
from tests.pki import Pki

CHEAP = Cost(10, 8, 1)

HEAD = """
[gateway]
id = "loco"
state_dir = "{state}"
[mqtt]
listen = ["127.0.0.1:{port}"]
"""
RULES = """
[[access]]
who = "*"
deny = true
publish = "app/brake/#"
subscribe = "app/brake/#"
[[access]]
who = "*"
publish = ["app/#", "{{client}}/#"]
subscribe = ["app/#", "status/+"]
"""
OPEN_WITH_RULES = HEAD + "allow_anonymous = true" + RULES
CLOSED = HEAD + 'password_file = "passwords"'


# ------------------------------------------------------------------------------------------- raw clients, one loop


class Peer(MqttPeer):
    async def subscribe(self, *filters: str) -> tuple[int, ...]:
        self.say(Subscribe(7, tuple(Subscription(each, 1) for each in filters)))
        answer = await self.hear()
        assert isinstance(answer, Suback), answer
        return answer.reasons

    async def publish(self, topic: str, packet_id: int = 1) -> int:
        self.say(Publish(topic, b"x", 1, packet_id=packet_id))
        answer = await self.hear()
        assert isinstance(answer, Puback), answer
        assert answer.packet_id == packet_id
        return answer.reason

    async def alive(self) -> None:
        """Everything said before has been dealt with, and nothing has come for it."""
        self.say(Pingreq())
        answer = await self.hear()
        assert isinstance(answer, Pingresp), answer


class Bench:
    def __init__(self, path: Path, config: str) -> None:
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            self.port = sock.getsockname()[1]
        self.path = path
        self.state = path / "state"
        self.config = path / "lineside.toml"
        self.write(config)

    def write(self, config: str) -> None:
        self.config.write_text(config.format(state=self.state, port=self.port))

    def user(self, name: str, password: bytes) -> None:
        passwords.update(self.path / "passwords", name, hash_password(password, CHEAP))

    async def start(self) -> None:
        self.app = App(self.config, load(self.config), Notifier(None))
        await self.app.start()

    async def stop(self) -> None:
        self.app._stop.set()
        assert await self.app.run() == 0

    async def reload(self, config: str) -> None:
        self.write(config)
        self.app.reload()
        assert self.app._reloading is not None
        await self.app._reloading

    async def connect(
        self,
        name: str = "one",
        version: int = V5,
        user: str | None = None,
        password: bytes | None = None,
        expiry_s: int | None = None,
        clean: bool = True,
        will: str | None = None,
    ) -> tuple[Peer, Packet | None]:
        peer = Peer(*await asyncio.open_connection("127.0.0.1", self.port), version)
        last = None if will is None else Will(will, b"gone")
        properties = ConnectProperties(session_expiry_interval=expiry_s)
        peer.say(Connect(version, name, clean, 0, user, password, last, properties))
        return peer, await peer.hear()

    async def welcome(self, name: str = "one", version: int = V5, **said: Any) -> Peer:
        peer, answer = await self.connect(name, version, **said)
        assert isinstance(answer, Connack), answer
        assert answer.reason == 0
        return peer

    async def refused(self, **said: Any) -> int:
        peer, answer = await self.connect(**said)
        assert isinstance(answer, Connack), answer
        assert await peer.hear() is None
        return answer.reason

    def losses(self) -> list[tuple[str, str, int, str]]:
        with sqlite3.connect(self.state / "journal.db") as db:
            return db.execute("SELECT stream, reason, size, detail FROM loss").fetchall()


def play(tmp_path: Path, config: str, story: Callable[[Bench], Awaitable[None]], **users: bytes) -> Bench:
    bench = Bench(tmp_path, config)
    for name, password in users.items():
        bench.user(name, password)

    async def limited() -> None:
        await bench.start()
        try:
            async with asyncio.timeout(2 * WAIT_S):
                await story(bench)
        finally:
            await bench.stop()

    asyncio.run(limited())
    return bench


def test_a_publish_that_is_not_allowed_is_refused_on_5_in_its_turn_and_the_client_goes_on(tmp_path: Path) -> None:
    async def story(bench: Bench) -> None:
        peer = await bench.welcome()
        for packet_id, topic in enumerate(["app/x", "app/brake/x", "app/y", "other", "one/z", "two/z"], 1):
            peer.say(Publish(topic, b"x", 1, packet_id=packet_id))
        answers = [await peer.hear() for _ in range(6)]
        told = [(each.packet_id, each.reason) for each in answers if isinstance(each, Puback)]
        assert told == [(1, 0), (2, 0x87), (3, 0), (4, 0x87), (5, 0), (6, 0x87)]

    play(tmp_path, OPEN_WITH_RULES, story)


ASKING = """
[[hub]]
name = "depot"
urls = ["amqp://127.0.0.1:1"]
[[outbound]]
stream = "requests"
topics = ["app/ask/#"]
hub = "depot"
address = "edge.requests"
reply_to = "edge.replies"
[[inbound]]
stream = "replies"
hub = "depot"
address = "edge.replies"
topic = "replies"
"""


@pytest.mark.parametrize(
    ("topic", "response_topic", "reason"),
    [
        ("app/ask/x", "one/answers", 0),
        ("app/ask/x", "app/brake/x", 0x87),  # the hub's answer would be published where this client may not publish
        ("app/ask/x", "two/answers", 0x87),
        ("app/ask/x", "$SYS/broker", 0x87),
        ("app/x", "app/brake/x", 0),  # whoever answers this one needs the right himself
    ],
)
def test_a_reply_from_the_hub_is_asked_for_only_where_the_client_may_publish(
    tmp_path: Path, topic: str, response_topic: str, reason: int
) -> None:
    async def story(bench: Bench) -> None:
        peer = await bench.welcome()
        properties = PublishProperties(response_topic=response_topic)
        peer.say(Publish(topic, b"?", 1, packet_id=1, properties=properties))
        answer = await peer.hear()
        assert isinstance(answer, Puback)
        assert answer.reason == reason
        will = Will(topic, b"gone", properties=WillProperties(response_topic=response_topic))
        late = Peer(*await asyncio.open_connection("127.0.0.1", bench.port), V5)
        late.say(Connect(V5, "one", True, 0, None, None, will, ConnectProperties()))
        welcome = await late.hear()
        assert isinstance(welcome, Connack)
        assert welcome.reason == reason

    play(tmp_path, OPEN_WITH_RULES + ASKING, story)


def test_what_was_refused_reaches_nobody(tmp_path: Path) -> None:
    async def story(bench: Bench) -> None:
        reader = await bench.welcome("reader")
        assert await reader.subscribe("status/+") == (1,)
        peer = await bench.welcome("status")
        assert await peer.publish("app/brake/x") == 0x87
        assert await peer.publish("status/x") == 0
        heard = await reader.hear()
        assert isinstance(heard, Publish)
        assert heard.topic == "status/x"

    play(tmp_path, OPEN_WITH_RULES, story)


def test_a_forbidden_publish_of_qos_0_is_dropped_and_in_the_ledger(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def story(bench: Bench) -> None:
        for version in (V3, V5):
            peer = await bench.welcome(f"client-{version}", version)
            peer.say(Publish("app/brake/x", b"12345"))
            peer.say(Publish("app/fine", b"x"))
            await peer.alive()

    with caplog.at_level(logging.WARNING):
        bench = play(tmp_path, OPEN_WITH_RULES, story)
    assert bench.losses() == [("local", "not-allowed", 5, "client-4"), ("local", "not-allowed", 5, "client-5")]
    told = [vars(record) for record in caplog.records if record.getMessage() == "not allowed"]
    assert [each["topic"] for each in told] == ["app/brake/x"] * 2
    assert "access[0] (line 8)" in told[0]["why"]


def test_a_flood_of_forbidden_messages_fills_the_ledger_and_not_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def story(bench: Bench) -> None:
        peer = await bench.welcome()
        for n in range(200):
            peer.say(Publish(f"forbidden/{n}", b"x"))
        await peer.alive()

    with caplog.at_level(logging.WARNING):
        bench = play(tmp_path, OPEN_WITH_RULES, story)
    with sqlite3.connect(bench.state / "journal.db") as db:
        assert db.execute("SELECT messages FROM loss_total WHERE reason = 'not-allowed'").fetchall() == [(200,)]
    assert [r.getMessage() for r in caplog.records].count("not allowed") == access_module.LOGGED_MAX


def test_on_3_1_1_a_forbidden_publish_closes_the_connection_after_what_came_before_is_acknowledged(
    tmp_path: Path,
) -> None:
    async def story(bench: Bench) -> None:
        reader = await bench.welcome("reader")
        assert await reader.subscribe(*(f"app/{n}" for n in range(1, 6))) == (1,) * 5
        peer = await bench.welcome(version=V3)
        for packet_id, topic in enumerate(["app/1", "app/2", "app/brake/3", "app/4"], 1):
            peer.say(Publish(topic, b"x", 1, packet_id=packet_id))
        first, second = await peer.hear(), await peer.hear()
        assert [each.packet_id for each in (first, second) if isinstance(each, Puback)] == [1, 2]
        assert await peer.hear() is None
        assert await (await bench.welcome()).publish("app/5") == 0
        heard = [await reader.hear() for _ in range(3)]
        assert [each.topic for each in heard if isinstance(each, Publish)] == ["app/1", "app/2", "app/5"]

    play(tmp_path, OPEN_WITH_RULES, story)


@pytest.mark.parametrize(("version", "refused"), [(V3, 0x80), (V5, 0x87)])
def test_a_subscription_is_refused_alone_in_its_packet(tmp_path: Path, version: int, refused: int) -> None:
    async def story(bench: Bench) -> None:
        peer = await bench.welcome(version=version)
        filters = ["app/x/#", "app/#", "app/+", "#", "status/+", "$SYS/#", "app/brake/x", "+/x", "app"]
        granted = [1, refused, refused, refused, 1, refused, refused, refused, 1]  # app/brake/# takes app/brake
        assert await peer.subscribe(*filters) == tuple(granted)
        assert await peer.subscribe("$share/g/other/#") == (refused,)

    play(tmp_path, OPEN_WITH_RULES, story)


@pytest.mark.parametrize(("version", "refused"), [(V3, 5), (V5, 0x87)])
def test_a_will_that_may_not_be_published_keeps_its_client_out(tmp_path: Path, version: int, refused: int) -> None:
    async def story(bench: Bench) -> None:
        assert await bench.refused(version=version, will="app/brake/x") == refused
        await bench.welcome(version=version, will="app/x")

    play(tmp_path, OPEN_WITH_RULES, story)


@pytest.mark.parametrize(("version", "bad", "anonymous"), [(V3, 4, 5), (V5, 0x86, 0x87)])
def test_with_a_password_file_only_the_right_password_opens(
    tmp_path: Path, version: int, bad: int, anonymous: int
) -> None:
    async def story(bench: Bench) -> None:
        await bench.welcome(version=version, user="anna", password=b"secret")
        await bench.welcome(version=version, user="anna", password=b"secret")  # known by now
        assert await bench.refused(version=version, user="anna", password=b"Secret") == bad
        assert await bench.refused(version=version, user="bert", password=b"secret") == bad
        assert await bench.refused(version=version, user="anna") == bad
        assert await bench.refused(version=version) == anonymous

    play(tmp_path, CLOSED, story, anna=b"secret")


def test_who_falls_back_to_3_1_after_a_refusal_hears_the_same_reason_and_of_the_version_only_without_one(
    tmp_path: Path,
) -> None:
    """As paho for Go does, which shows its user the second answer."""

    async def story(bench: Bench) -> None:
        async def answer(user: str | None, password: bytes | None) -> tuple[int, Packet | None]:
            peer = Peer(*await asyncio.open_connection("127.0.0.1", bench.port), V3)
            said = bytearray(codec.encode(Connect(V3, "one", True, 0, user, password), V3))
            said[1] += 2
            peer.writer.write(said.replace(b"\x00\x04MQTT\x04", b"\x00\x06MQIsdp\x03"))
            heard = await peer.hear()
            assert isinstance(heard, Connack), heard
            return heard.reason, await peer.hear()

        there = await bench.welcome(version=V3, user="anna", password=b"secret")
        assert await answer("anna", b"wrong") == (4, None)
        assert await answer(None, None) == (5, None)
        assert await answer("anna", b"secret") == (1, None)
        there.say(Publish("app/x", b"x", 1, packet_id=1))
        assert isinstance(await there.hear(), Puback), "whom 3.1 would have taken the place of is still there"

    play(tmp_path, CLOSED, story, anna=b"secret")


def test_what_is_sent_behind_connect_waits_for_the_password_to_be_checked(tmp_path: Path) -> None:
    async def story(bench: Bench) -> None:
        peer = Peer(*await asyncio.open_connection("127.0.0.1", bench.port), V5)
        peer.say(Connect(V5, "", True, 0, "anna", b"secret"))
        for packet_id in range(1, 51):
            peer.say(Publish("app/x", b"x" * 1000, 1, packet_id=packet_id))
        welcome = await peer.hear()
        assert isinstance(welcome, Connack)
        assert (welcome.properties.assigned_client_identifier or "").startswith("lineside-")
        assert [p.packet_id for p in [await peer.hear() for _ in range(50)] if isinstance(p, Puback)] == [*range(1, 51)]

    play(tmp_path, CLOSED, story, anna=b"secret")


def test_a_user_is_believed_only_with_a_password(tmp_path: Path) -> None:
    rules = '\n[[access]]\nwho = "user:anna"\npublish = "secret/#"\n'

    async def story(bench: Bench) -> None:
        anna = await bench.welcome("a", user="anna", password=b"secret")
        assert await anna.publish("secret/x") == 0
        bert = await bench.welcome("b", user="bert", password=b"other")
        assert await bert.publish("secret/x") == 0x87
        nobody = await bench.welcome("c")
        assert await nobody.publish("secret/x") == 0x87
        assert bench.app._clients({})["clients"][0].keys() >= {"user", "suspended"}
        assert {c["user"] for c in bench.app._clients({})["clients"]} == {"anna", "bert", None}

    play(tmp_path, CLOSED + "\nallow_anonymous = true" + rules, story, anna=b"secret", bert=b"other")


def test_while_passwords_are_checked_others_are_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, go_on = threading.Event(), threading.Event()

    def slow(self: passwords.Passwords, user: str, password: bytes) -> bool:
        asked.set()
        assert go_on.wait(WAIT_S)
        return True

    monkeypatch.setattr(passwords.Passwords, "verify", slow)

    async def story(bench: Bench) -> None:
        other = await bench.welcome("other")
        waiting = asyncio.create_task(bench.connect("one", user="anna", password=b"secret"))
        await asyncio.to_thread(asked.wait, WAIT_S)
        for n in range(1, 20):
            assert await other.publish("app/x", n) == 0
        assert not waiting.done()
        go_on.set()
        answer = (await waiting)[1]
        assert isinstance(answer, Connack)
        assert answer.reason == 0

    play(tmp_path, CLOSED + "\nallow_anonymous = true", story, anna=b"secret")


def test_a_client_that_leaves_or_a_daemon_that_stops_while_a_password_is_checked_harms_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held_back = asyncio.Event()

    def failed(self: FailedLogins, source: str, now: float) -> float:
        held_back.set()
        return 60.0

    monkeypatch.setattr(FailedLogins, "failed", failed)

    async def story(bench: Bench) -> None:
        peer = Peer(*await asyncio.open_connection("127.0.0.1", bench.port), V5)
        peer.say(Connect(V5, "one", True, 0, "anna", b"wrong"))
        await held_back.wait()
        held_back.clear()
        other = Peer(*await asyncio.open_connection("127.0.0.1", bench.port), V5)
        other.say(Connect(V5, "two", True, 0, "anna", b"wrong"))
        await held_back.wait()
        other.writer.transport.abort()
        third = await bench.welcome("three", user="anna", password=b"secret")
        await third.alive()

    play(tmp_path, CLOSED, story, anna=b"secret")


def test_failed_logins_are_answered_later_and_later_and_right_ones_at_once(tmp_path: Path) -> None:
    async def story(bench: Bench) -> None:
        took = []
        for _ in range(3):
            began = time.monotonic()
            assert await bench.refused(user="anna", password=b"wrong") == 0x86
            took.append(time.monotonic() - began)
        assert took[0] >= 0.25
        assert took[1] >= 0.5
        assert took[2] >= 1.0
        began = time.monotonic()
        await bench.welcome(user="anna", password=b"secret")
        assert time.monotonic() - began < 1.5  # a fourth failure would take 2 s

    play(tmp_path, CLOSED, story, anna=b"secret")


def test_a_changed_password_counts_from_the_next_login_and_a_damaged_file_changes_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def story(bench: Bench) -> None:
        await bench.welcome(user="anna", password=b"secret")
        bench.user("anna", b"new")
        for _ in range(2):  # the first makes it read the file, the second must not find what was right before
            assert await bench.refused(user="anna", password=b"secret") == 0x86
        await bench.welcome(user="anna", password=b"new")
        (bench.path / "passwords").write_text("nonsense\n")
        await bench.welcome(user="anna", password=b"new")
        assert "passwords:1: no ':'" in str([vars(record).get("error") for record in caplog.records])

    play(tmp_path, CLOSED, story, anna=b"secret")


def test_a_reload_takes_and_gives_back_what_subscribers_get(tmp_path: Path) -> None:
    less = OPEN_WITH_RULES.replace('subscribe = ["app/#", "status/+"]', 'subscribe = "status/+"')

    async def story(bench: Bench) -> None:
        reader = await bench.welcome("reader")
        assert await reader.subscribe("app/x", "status/+") == (1, 1)
        sender = await bench.welcome("status")
        await bench.reload(less)
        assert await sender.publish("app/x", 1) == 0
        assert await sender.publish("status/1", 2) == 0
        heard = await reader.hear()
        assert isinstance(heard, Publish)
        assert heard.topic == "status/1"  # in journal order app/x would have come before
        assert await reader.subscribe("app/x") == (0x87,)
        await bench.reload(OPEN_WITH_RULES)
        assert await sender.publish("app/x", 3) == 0
        heard = await reader.hear()
        assert isinstance(heard, Publish)
        assert heard.topic == "app/x"
        await bench.reload(HEAD + "allow_anonymous = true")
        assert await sender.publish("app/brake/x", 4) == 0

    play(tmp_path, OPEN_WITH_RULES, story)


def test_a_reload_counts_for_publishers_that_are_connected(tmp_path: Path) -> None:
    async def story(bench: Bench) -> None:
        peer = await bench.welcome()
        assert await peer.publish("app/brake/x", 1) == 0
        await bench.reload(OPEN_WITH_RULES)
        assert await peer.publish("app/brake/x", 2) == 0x87
        assert await peer.publish("app/x", 3) == 0

    play(tmp_path, HEAD + "allow_anonymous = true", story)


def test_a_session_gets_nothing_that_who_resumes_it_may_not_read(tmp_path: Path) -> None:
    rules = """
[[access]]
who = "user:anna"
publish = "#"
subscribe = "#"
[[access]]
who = "user:bert"
subscribe = "public/#"
"""

    async def story(bench: Bench) -> None:
        anna = await bench.welcome("shared", user="anna", password=b"secret", expiry_s=60)
        assert await anna.subscribe("private/#", "public/#") == (1, 1)
        anna.say(Disconnect())
        assert await anna.hear() is None
        sender = await bench.welcome("sender", user="anna", password=b"secret")
        assert await sender.publish("private/x", 1) == 0
        assert await sender.publish("public/x", 2) == 0
        bert = await bench.welcome("shared", user="bert", password=b"other", expiry_s=60, clean=False)
        heard = await bert.hear()
        assert isinstance(heard, Publish)
        assert heard.topic == "public/x"
        assert await bert.publish("public/x") == 0x87

    play(tmp_path, CLOSED + rules, story, anna=b"secret", bert=b"other")


# ------------------------------------------------------------------------------------------------- Access by itself


def on_loop(story: Callable[[], Awaitable[None]]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(WAIT_S):
            await story()

    asyncio.run(limited())


LOCAL = Identity("mqtt", "app", address=ip_address("127.0.0.1"))
FAR = Identity("mqtt", "app", address=ip_address("10.0.0.1"))


def test_without_rules_there_is_no_permit_to_ask() -> None:
    async def story() -> None:
        access = Access(loads('[gateway]\nid = "a"\n[mqtt]\n'))
        assert access.permit(LOCAL) is None

    on_loop(story)


@pytest.mark.parametrize(
    ("keys", "rules", "local", "far"),
    [
        ("", False, True, False),
        ("", True, False, False),
        ("allow_anonymous = true", False, True, True),
        ("allow_anonymous = true", True, True, True),
        ("allow_anonymous = false", False, False, False),
        ('password_file = "p"', False, False, False),
        ('password_file = "p"\nallow_anonymous = true', True, True, True),
    ],
)
def test_whom_nothing_vouches_for_is_let_in_on_this_machine_until_a_rule_or_password_exists(
    tmp_path: Path, keys: str, rules: bool, local: bool, far: bool
) -> None:
    (tmp_path / "p").write_text("")
    table = '[[access]]\nwho = "*"\npublish = "a"\n' if rules else ""
    config = loads(f'[gateway]\nid = "a"\n[mqtt]\n{keys}\n[amqp]\n{keys}\n{table}', base=tmp_path)

    async def story() -> None:
        access = Access(config)
        for protocol in ("mqtt", "amqp"):
            for who, expected in ((LOCAL, local), (FAR, far)):
                answer = await access.authenticate(replace(who, protocol=protocol), None)
                assert answer.login is (Login.OK if expected else Login.ANONYMOUS)
            known = replace(FAR, protocol=protocol, cn="x", names=("x",))
            assert (await access.authenticate(known, None)).ok

    on_loop(story)


def test_without_a_password_file_no_user_is_believed(tmp_path: Path) -> None:
    async def story() -> None:
        access = Access(loads('[gateway]\nid = "a"\n[mqtt]\n'))
        answer = access.admit(replace(LOCAL, user="root"), b"x")
        assert answer is not None
        assert answer.ok
        assert answer.identity.user is None
        refused = access.admit(replace(FAR, user="root"), b"x")
        assert refused is not None
        assert refused.login is Login.BAD_CREDENTIALS

    on_loop(story)


def test_the_queue_of_logins_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passwords.update(tmp_path / "p", "anna", hash_password(b"secret", CHEAP))
    monkeypatch.setattr(access_module, "CHECKS_WAITING_MAX", 2)
    busy, verify = threading.Event(), PasswordFile.verify

    def verify_later(file: PasswordFile, user: str, password: bytes) -> bool:
        assert busy.wait(10)
        return verify(file, user, password)

    monkeypatch.setattr(PasswordFile, "verify", verify_later)
    config = loads('[gateway]\nid = "a"\n[amqp]\npassword_file = "p"\n', base=tmp_path)

    async def story() -> None:
        access = Access(config)
        claim = replace(LOCAL, protocol="amqp", user="anna")
        waiting = [asyncio.create_task(access.authenticate(claim, b"secret")) for _ in range(2)]
        await asyncio.sleep(0)  # both ask for the thread
        assert (await access.authenticate(claim, b"secret")).login is Login.BUSY
        busy.set()
        assert [(await each).login for each in waiting] == [Login.OK, Login.OK]
        assert (await access.authenticate(claim, b"secret")).identity == claim
        access.stop()

    on_loop(story)


def test_a_permit_remembers_no_more_than_its_bound() -> None:
    config = loads('[gateway]\nid = "a"\n[[access]]\nwho = "*"\npublish = "a/#"\nsubscribe = "a/#"\n')
    permit = Permit(access_module.rules_of(config), LOCAL)
    for n in range(3 * ANSWERS_MAX):
        assert permit.publish(f"a/{n}")
        assert not permit.subscribe(f"b/{n}")
        assert permit.send(f"a/{n}")
        assert permit.receive(f"a/{n}/#")
    assert max(len(permit._publish), len(permit._subscribe)) <= ANSWERS_MAX
    long = Permit(access_module.rules_of(config), LOCAL)
    assert long.publish("a/" + "x" * 60_000)
    assert not long._publish
    assert not Permit(Rules(access_module.rules_of(config).rules, "a"), FAR).publish("b")


class Transport:
    def __init__(self, **info: Any) -> None:
        self.get_extra_info = info.get


def test_an_identity_is_what_the_connection_shows() -> None:
    certificate = {
        "subject": ((("organizationName", "x"),), (("commonName", "cam.example"),)),
        "subjectAltName": (("DNS", "cam.example"), ("DNS", "cam-2.example"), ("IP Address", "10.0.0.1")),
    }
    tls = identity_of(Transport(peername=("::ffff:10.0.0.1", 5, 0, 0), peercert=certificate), "amqp")  # type: ignore[arg-type]
    assert tls == Identity(
        "amqp", cn="cam.example", names=("cam.example", "cam-2.example"), address=ip_address("10.0.0.1")
    )
    two = {"subject": ((("commonName", "a"),), (("commonName", "b"),))}
    assert identity_of(Transport(peername=("10.0.0.1", 5), peercert=two), "mqtt").cn is None  # type: ignore[arg-type]
    ours, theirs = socket.socketpair(socket.AF_UNIX)
    with ours, theirs:
        assert identity_of(Transport(peername="", socket=ours), "mqtt") == Identity("mqtt", uid=os.getuid())  # type: ignore[arg-type]
    assert struct.calcsize("3i") == 12


# ----------------------------------------------------------------------------------------- paho and a real daemon


DAEMON = (
    CLOSED
    + """
[[access]]
who = "user:anna"
publish = "{{user}}/#"
subscribe = ["{{user}}/#", "commands/+"]
"""
)


class App5:
    """A paho client of either version, and what it was told."""

    def __init__(
        self,
        port: int,
        version: MQTTProtocolVersion,
        user: str | None,
        password: str | None,
        transport: Literal["tcp", "websockets"] = "tcp",
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.version = version
        self.connected, self.gone, self.told = threading.Event(), threading.Event(), threading.Event()
        self.reason = -1
        self.answers: list[int] = []
        client = self.client = paho.Client(
            CallbackAPIVersion.VERSION2, client_id="app", protocol=version, transport=transport
        )
        if user is not None:
            client.username_pw_set(user, password)
        if tls is not None:
            client.tls_set_context(tls)
        client.on_connect = self._connect
        client.on_disconnect = lambda *_: self.gone.set()
        client.on_subscribe = lambda _c, _d, _m, reasons, _p: self._told([r.value for r in reasons])
        client.on_publish = lambda _c, _d, _m, reason, _p: self._told([reason.value])
        client.connect("127.0.0.1", port)
        client.loop_start()
        assert self.connected.wait(WAIT_S)

    def _connect(self, _client: object, _data: object, _flags: object, reason: Any, _properties: object) -> None:
        self.reason = reason.value
        self.connected.set()

    def _told(self, answers: list[int]) -> None:
        self.answers += answers
        self.told.set()

    def wait(self) -> list[int]:
        assert self.told.wait(WAIT_S)
        self.told.clear()
        answers, self.answers = self.answers, []
        return answers

    def close(self) -> None:
        self.client.disconnect()
        self.client.loop_stop()


@pytest.fixture
def daemon(tmp_path: Path) -> Any:
    passwords.update(tmp_path / "passwords", "anna", hash_password(b"secret"))
    found = Daemon(tmp_path, DAEMON)
    found.status()
    yield found
    found.end()


@pytest.mark.parametrize("version", [MQTTProtocolVersion.MQTTv311, MQTTProtocolVersion.MQTTv5])
def test_paho_is_let_in_with_its_password_and_kept_to_its_topics(daemon: Daemon, version: MQTTProtocolVersion) -> None:
    wrong = App5(daemon.port, version, "anna", "wrong")
    assert wrong.reason == 0x86  # paho names 3.1.1's return codes by 5.0's reasons
    wrong.close()
    nobody = App5(daemon.port, version, None, None)
    assert nobody.reason == 0x87
    nobody.close()
    app = App5(daemon.port, version, "anna", "secret")
    assert app.reason == 0
    if version is MQTTProtocolVersion.MQTTv5:
        options = SubscribeOptions(qos=1)
        app.client.subscribe([("anna/#", options), ("#", options), ("commands/x", options)])
        assert app.wait() == [1, 0x87, 1]
    else:
        app.client.subscribe([("anna/#", 1), ("#", 1), ("commands/x", 1)])
        assert app.wait() == [1, 0x80, 1]
    app.client.publish("anna/x", b"x", 1)
    assert app.wait() == [0]
    app.client.publish("bert/x", b"x", 1)
    if version is MQTTProtocolVersion.MQTTv5:
        assert app.wait() == [0x87]
        assert not app.gone.is_set()
    else:
        assert app.gone.wait(WAIT_S)
    daemon.wait_for_log("not allowed")
    app.close()


def test_a_reload_of_the_daemon_with_other_rules_keeps_the_client_and_stops_its_subscription(daemon: Daemon) -> None:
    heard: list[str] = []
    got = threading.Event()
    app = App5(daemon.port, MQTTProtocolVersion.MQTTv5, "anna", "secret")

    def message(_client: object, _data: object, each: paho.MQTTMessage) -> None:
        heard.append(each.topic)
        got.set()

    app.client.on_message = message
    app.client.subscribe([("anna/a", SubscribeOptions(qos=1)), ("anna/b", SubscribeOptions(qos=1))])
    assert app.wait() == [1, 1]
    text = daemon.config.read_text()
    daemon.config.write_text(text.replace('subscribe = ["{user}/#"', 'subscribe = ["anna/b"'))
    assert daemon.config.read_text() != text
    request(daemon.state, "reload")
    for topic in ("anna/a", "anna/b"):
        app.client.publish(topic, b"x", 1)
        assert app.wait() == [0]
    assert got.wait(WAIT_S)
    assert heard == ["anna/b"]
    assert not app.gone.is_set()
    app.close()


def test_a_unix_socket_shows_whose_process_it_is(tmp_path: Path) -> None:
    path = f"/tmp/lineside-test-{os.getpid()}.sock"
    config = DAEMON.replace('"127.0.0.1:{port}"', f'"127.0.0.1:{{port}}", "unix:{path}"')
    passwords.update(tmp_path / "passwords", "anna", hash_password(b"secret"))
    daemon = Daemon(tmp_path, f'{config}\n[[access]]\nwho = "uid:{os.getuid()}"\npublish = "mine"\n')
    try:
        daemon.status()
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(WAIT_S)
            sock.connect(path)
            sock.sendall(codec.encode(Connect(V5, "local"), V5))
            connack = codec.decode(sock.recv(1000), V5)
            assert isinstance(connack, Connack)
            assert connack.reason == 0
            for number, (topic, reason) in enumerate([("mine", 0), ("anna/x", 0x87)], 1):
                sock.sendall(codec.encode(Publish(topic, b"x", 1, packet_id=number), V5))
                puback = codec.decode(sock.recv(1000), V5)
                assert isinstance(puback, Puback)
                assert puback.reason == reason
    finally:
        daemon.end()
        Path(path).unlink(missing_ok=True)


@pytest.mark.parametrize("scheme", ["mqtts", "wss"])
def test_a_certificate_is_an_identity_over_tls_and_websocket(tmp_path: Path, pki: Pki, scheme: str) -> None:
    port = free_port()
    mqtts = f"""
[gateway]
id = "loco"
state_dir = "{{state}}"
[mqtt]
listen = ["127.0.0.1:{{port}}", "{scheme}://127.0.0.1:{port}"]
cert = "{pki.server.cert}"
key = "{pki.server.key}"
client_ca = "{pki.ca}"
client_cert = "optional"
[[access]]
who = "cn:loco-*"
publish = "by/{{{{cn}}}}/#"
"""
    daemon = Daemon(tmp_path, mqtts)
    try:
        daemon.status()
        transport: Literal["tcp", "websockets"] = "websockets" if scheme == "wss" else "tcp"
        for certificate, welcome in ((pki.client, 0), (None, 0x87)):
            context = client_context(
                pki.ca, certificate.cert if certificate else None, certificate.key if certificate else None
            )
            app = App5(port, MQTTProtocolVersion.MQTTv5, None, None, transport, context)
            assert app.reason == welcome
            if certificate is not None:
                for topic, reason in (("by/loco-4711/x", 0), ("by/loco-4712/x", 0x87)):
                    app.client.publish(topic, b"x", 1)
                    assert app.wait() == [reason]
            app.close()
    finally:
        daemon.end()


def test_runs_of_one_topic_are_judged_once_and_answered_in_their_turn(tmp_path: Path) -> None:
    async def story(bench: Bench) -> None:
        peer = await bench.welcome()
        run = [topic for topic in ("app/x", "app/brake/x", "app/x", "other") for _ in range(20)]
        peer.writer.write(b"".join(codec.encode(Publish(t, b"x", 1, packet_id=n), V5) for n, t in enumerate(run, 1)))
        answers = [await peer.hear() for _ in run]
        told = [(each.packet_id, each.reason) for each in answers if isinstance(each, Puback)]
        assert told == [(n, 0 if topic == "app/x" else 0x87) for n, topic in enumerate(run, 1)]

    play(tmp_path, OPEN_WITH_RULES, story)
