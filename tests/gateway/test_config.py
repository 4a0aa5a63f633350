"""What a configuration may say, and that everything wrong with it is told at once, with the line it stands on."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import gateway.config_schema  # noqa: F401  turns the annotations of the tables into types
from gateway.config import Config, ConfigErrors, Listen, Problem, load, loads
from gateway.config_explain import explain
from gateway.config_report import fields_of, table_in
from gateway.config_values import (
    Shares,
    parse_duration,
    parse_hub_url,
    parse_listen,
    parse_origin,
    parse_size,
    topic_filter_fault,
)
from gateway.toml_lines import key_lines
from tests.pki import Pki

EXAMPLES = Path(__file__).parents[2] / "deploy" / "examples"

GOOD = """\
[gateway]
id = "loco-4711"
[mqtt]
listen = ["127.0.0.1:1883"]
[[hub]]
name = "depot"
urls = ["amqps://hub.example:5671"]
[[outbound]]
stream = "alarms"
topics = ["alarm/#"]
hub = "depot"
address = "edge.{gateway}.alarms"
[[inbound]]
stream = "commands"
hub = "depot"
address = "edge.{gateway}.commands"
topic = "commands/{subject}"
"""


def problems(text: str) -> list[Problem]:
    with pytest.raises(ConfigErrors) as caught:
        loads(text)
    return list(caught.value.problems)


def places(text: str) -> list[tuple[int, str]]:
    return [(problem.line, problem.key) for problem in problems(text)]


def test_a_good_file_loads_with_its_units_read() -> None:
    config = loads(GOOD.replace('hub = "depot"\n', 'hub = "depot"\nmax_bytes = "64MiB"\n', 1))
    assert config.gateway.id == "loco-4711"
    assert config.mqtt is not None
    assert config.mqtt.listen == (Listen("127.0.0.1", 1883),)
    assert config.amqp is None
    assert config.hub("depot").idle_timeout_s == 20.0
    assert config.outbound[0].max_bytes == 64 << 20
    assert config.outbound[0].class_ == "normal"
    assert config.outbound[0].address_for(config.gateway.id) == "edge.loco-4711.alarms"
    assert config.inbound[0].address_for("x") == "edge.x.commands"


def test_how_a_line_is_shared_out_is_read_and_explained() -> None:
    shares = "shares = { urgent = 60, normal = 30, bulk = 10, live = 50 }"
    config = loads(GOOD.replace('name = "depot"\n', f'name = "depot"\nrate = "9.6kbit/s"\n{shares}\n', 1))
    [hub] = config.hubs
    assert (hub.rate, hub.shares) == (1200.0, Shares(60, 30, 10, 50))
    told = next(line for line in explain(config) if "at most 9.6kbit/s" in line)
    assert "60 % of the line, normal ones 30 %, bulk 10 %" in told
    [hub] = loads(GOOD).hubs
    assert (hub.rate, hub.shares) == (None, Shares(70, 20, 10, 80))


# Each: a line of GOOD, what to put in its place, the place of every problem, a word of what is told to write.
WRONG = [
    # the gateway
    ('id = "loco-4711"', 'id = "loco 4711"', [(2, "gateway.id")], 'id = "loco-4711"'),
    ('id = "loco-4711"', "id = 4711", [(2, "gateway.id")], 'id = "loco-4711"'),
    ('id = "loco-4711"', "", [(1, "gateway.id")], 'id = "loco-4711"'),
    ('id = "loco-4711"', 'id = "a"\nlog_level = "loud"', [(3, "gateway.log_level")], '"info"'),
    ('id = "loco-4711"', 'id = "a"\nsynchronous = "full"', [(3, "gateway.synchronous")], '"FULL"'),
    ('id = "loco-4711"', 'id = "a"\nsynchronous = "OFF"', [(3, "gateway.synchronous")], "accept_loss ="),
    ('id = "loco-4711"', 'id = "a"\naccept_loss = true', [(3, "gateway.accept_loss")], "acknowledged messages may be"),
    ('id = "loco-4711"', 'id = "a"\nstate-dir = "x"', [(3, "gateway.state-dir")], "state_dir"),
    ('id = "loco-4711"', 'id = "a"\nlisten = []', [(3, "gateway.listen")], "listen under [mqtt] or [amqp]"),
    ("[gateway]", "[gatway]", [(1, "gateway"), (1, "gatway")], "[gateway]"),
    ("[gateway]", "[[gateway]]", [(1, "gateway")], "[gateway]"),
    # how a hub's line is shared out
    ('name = "depot"', 'name = "depot"\nrate = 9600', [(7, "hub[0].rate")], '"9.6kbit/s"'),
    ('name = "depot"', 'name = "depot"\nrate = "9.6kb/s"', [(7, "hub[0].rate")], '"9.6kB/s"'),
    ('name = "depot"', 'name = "depot"\nshares = { urgent = 90 }', [(7, "hub[0].shares")], "{ urgent = 70,"),
    ('name = "depot"', 'name = "depot"\nshares = [70, 20, 10]', [(7, "hub[0].shares")], "{ urgent = 70,"),
    # listeners
    ("[mqtt]", '[amqp]\nlisten = ["localhost:1883"]\n[mqtt]', [(4, "amqp.listen[0]")], ""),
    ('["127.0.0.1:1883"]', '"127.0.0.1:1883"', [(4, "mqtt.listen")], 'listen = ["127.0.0.1:1883"]'),
    ('["127.0.0.1:1883"]', "[]", [(4, "mqtt.listen")], 'listen = ["127.0.0.1:1883"]'),
    ('["127.0.0.1:1883"]', '[\n"127.0.0.1:1",\n":1883"]', [(6, "mqtt.listen[1]")], '"127.0.0.1:1883"'),
    ('["127.0.0.1:1883"]', '["127.0.0.1"]', [(4, "mqtt.listen[0]")], '"127.0.0.1:1883"'),
    ('["127.0.0.1:1883"]', '["127.0.0.1:70000"]', [(4, "mqtt.listen[0]")], '"127.0.0.1:1883"'),
    ('["127.0.0.1:1883"]', '["[::1]1884"]', [(4, "mqtt.listen[0]")], '"[::1]:1884"'),
    ('["127.0.0.1:1883"]', '["::1:1884"]', [(4, "mqtt.listen[0]")], '"[::1]:1884"'),
    ('["127.0.0.1:1883"]', '["fe80::1"]', [(4, "mqtt.listen[0]")], '"[fe80::1]:1883"'),
    ('["127.0.0.1:1883"]', '["unix:x"]', [(4, "mqtt.listen[0]")], ""),
    ('["127.0.0.1:1883"]', f'["unix:/{"x" * 107}"]', [(4, "mqtt.listen[0]")], ""),
    ('["127.0.0.1:1883"]', '["0.0.0.0:1883"]', [(4, "mqtt.listen[0]")], 'allow_plaintext = "yes, without TLS"'),
    ('["127.0.0.1:1883"]', '["box.example:1883"]', [(4, "mqtt.listen[0]")], "127.0.0.1:1883"),
    ('["127.0.0.1:1883"]', '["[::1]:9", "[::1]:9"]', [(4, "mqtt.listen[1]")], ""),
    ('["127.0.0.1:1883"]', '["mqtts://127.0.0.1:8883"]', [(4, "mqtt.listen[0]")], 'cert = "/etc/lineside/'),
    ('["127.0.0.1:1883"]', '["wss://127.0.0.1:8443"]', [(4, "mqtt.listen[0]")], "key ="),
    ('["127.0.0.1:1883"]', '["ws://0.0.0.0:8080/x"]', [(4, "mqtt.listen[0]")], '"wss://0.0.0.0:8080/x"'),
    ('["127.0.0.1:1883"]', '["ws://0.0.0.0:8080/x"]', [(4, "mqtt.listen[0]")], '"ws://127.0.0.1:8080/x"'),
    ('["127.0.0.1:1883"]', '["0.0.0.0:1883"]', [(4, "mqtt.listen[0]")], '"mqtts://0.0.0.0:1883"'),
    ('["127.0.0.1:1883"]', '["ssl://127.0.0.1:8883"]', [(4, "mqtt.listen[0]")], '"wss://127.0.0.1:8883"'),
    ('["127.0.0.1:1883"]', '["MQTT://127.0.0.1:1883"]', [(4, "mqtt.listen[0]")], '"mqtt://127.0.0.1:1883"'),
    ('["127.0.0.1:1883"]', '["amqp://127.0.0.1:1883"]', [(4, "mqtt.listen[0]")], '"mqtt://127.0.0.1:1883"'),
    ('["127.0.0.1:1883"]', '["mqtt://127.0.0.1:1883/x"]', [(4, "mqtt.listen[0]")], '"mqtt://127.0.0.1:1883"'),
    ('["127.0.0.1:1883"]', '["mqtt://u:p@127.0.0.1:1883"]', [(4, "mqtt.listen[0]")], '"mqtt://127.0.0.1:1883"'),
    ('["127.0.0.1:1883"]', '["ws://127.0.0.1"]', [(4, "mqtt.listen[0]")], '"ws://127.0.0.1:8080"'),
    ('["127.0.0.1:1883"]', '["ws://127.0.0.1:80/a b"]', [(4, "mqtt.listen[0]")], '"ws://127.0.0.1:80/mqtt"'),
    ('["127.0.0.1:1883"]', '["ws://127.0.0.1:80/a?b"]', [(4, "mqtt.listen[0]")], '"ws://127.0.0.1:80/mqtt"'),
    ('["127.0.0.1:1883"]', '["ws://127.0.0.1:9/a", "mqtt://127.0.0.1:9"]', [(4, "mqtt.listen[1]")], ""),
    ("[mqtt]", '[amqp]\nlisten = ["mqtt://127.0.0.1:5672"]\n[mqtt]', [(4, "amqp.listen[0]")], '"amqp://127.0.0.1:5672"'),
    ("[mqtt]", '[amqp]\nlisten = ["amqps://0.0.0.0:5671"]\n[mqtt]', [(4, "amqp.listen[0]")], "under [amqp]"),
    ("[mqtt]", '[mqtt]\nclient_cert = "required"', [(4, "mqtt.client_cert")], "client_ca ="),
    ("[mqtt]", '[mqtt]\nclient_cert = "yes"', [(4, "mqtt.client_cert")], 'client_cert = "required"'),
    ("[mqtt]", '[mqtt]\nws_origins = ["hmi.example"]', [(4, "mqtt.ws_origins[0]")], '"https://hmi.example"'),
    ("[mqtt]", '[mqtt]\nws_origins = ["https://hmi.example/"]', [(4, "mqtt.ws_origins[0]")], '"https://hmi.example"'),
    ("[mqtt]", '[mqtt]\nws_origins = ["https://hmi.example:443"]', [(4, "mqtt.ws_origins[0]")], '"https://hmi.example"'),
    ("[mqtt]", '[mqtt]\nws_origins = "*"', [(4, "mqtt.ws_origins")], 'ws_origins = ["*"]'),
    ("[mqtt]", "[mqtt]\nallow_plaintext = true", [(4, "mqtt.allow_plaintext")], '"yes, without TLS"'),
    ("[mqtt]", '[mqtt]\npacket_max = "1mb"', [(4, "mqtt.packet_max")], 'packet_max = "1MB"'),
    ("[mqtt]", '[mqtt]\npacket_max = "1"', [(4, "mqtt.packet_max")], 'packet_max = "1MiB"'),
    ("[mqtt]", "[mqtt]\npacket_max = 1", [(4, "mqtt.packet_max")], 'packet_max = "1MiB"'),
    ("[mqtt]", '[mqtt]\nclients_max = "10"', [(4, "mqtt.clients_max")], "clients_max = 10"),
    ("[mqtt]", "[mqtt]\nclients_max = true", [(4, "mqtt.clients_max")], ""),
    ("[mqtt]", "[mqtt]\nreceive_maximum = 65536", [(4, "mqtt.receive_maximum")], "receive_maximum = 65535"),
    ("[mqtt]", "[mqtt]\nsession_expiry_max = 60", [(4, "mqtt.session_expiry_max")], 'session_expiry_max = "60s"'),
    # addresses
    ("[[hub]]", '[[address]]\nname = "a/#/b"\nkind = "queue"\n[[hub]]', [(6, "address[0].name")], ""),
    ("[[hub]]", '[[address]]\nname = "a"\nkind = "anycast"\n[[hub]]', [(7, "address[0].kind")], '"queue"'),
    ("[[hub]]", '[[address]]\nname = "a"\n[[hub]]', [(5, "address[0].kind")], "kind ="),
    (
        "[[hub]]",
        '[[address]]\nname = "a/#"\nkind = "queue"\n[[address]]\nname = "a/b"\nkind = "topic"\n[[hub]]',
        [(9, "address[1].name")],
        "above that of address[0]",
    ),
    # hubs
    ("[[hub]]", "[hub]", [(5, "hub")], "[[hub]]"),
    ('name = "depot"', 'nam = "depot"', [(5, "hub[0].name"), (6, "hub[0].nam")], "name"),
    ('urls = ["amqps://hub.example:5671"]', "", [(5, "hub[0].urls")], "urls = ["),
    ("amqps://hub.example:5671", "hub.example:5671", [(7, "hub[0].urls[0]")], '"amqps://hub.example:5671"'),
    ("amqps://hub.example:5671", "https://hub.example", [(7, "hub[0].urls[0]")], '"amqps://hub.example"'),
    ("amqps://hub.example:5671", "amqps://a:1/x", [(7, "hub[0].urls[0]")], '"amqps://a:1"'),
    ("amqps://hub.example:5671", "amqps://a:port", [(7, "hub[0].urls[0]")], "amqps://"),
    ("amqps://hub.example:5671", "amqp://hub.example:5672", [(7, "hub[0].urls[0]")], '"amqps://hub.example:5671", or'),
    ('name = "depot"', 'name = "depot"\nkind = "rabbit"', [(7, "hub[0].kind")], 'kind = "rabbitmq"'),
    ('name = "depot"', 'name = "depot"\nsasl = "plain"', [(7, "hub[0].sasl")], 'sasl = "auto"'),
    ('name = "depot"', 'name = "depot"\nsasl = "external"', [(7, "hub[0].sasl")], 'sasl = "auto"'),
    ('name = "depot"', 'name = "depot"\nuser = "u"', [(5, "hub[0].password_file")], "password_file ="),
    ('name = "depot"', 'name = "depot"\nocsp = "yes"', [(7, "hub[0].ocsp")], 'ocsp = "off"'),
    ('name = "depot"', 'name = "depot"\nocsp = true', [(7, "hub[0].ocsp")], 'ocsp = "off"'),
    (
        'name = "depot"\nurls = ["amqps://hub.example:5671"]',
        'name = "depot"\nocsp = "require"\nurls = ["amqps://hub.example:5671", "amqp://127.0.0.1:5672"]',
        [(8, "hub[0].urls[1]")],
        '"amqps://127.0.0.1:5671", or ocsp = "off"',
    ),
    ('name = "depot"', 'name = "depot"\nca = "/nowhere/ca.pem"', [(7, "hub[0].ca")], ""),
    ('name = "depot"', 'name = "depot"\nca = "/"', [(7, "hub[0].ca")], ""),
    ('name = "depot"', 'name = "depot"\nwindow = 0', [(7, "hub[0].window")], "window = 1"),
    ('name = "depot"', 'name = "depot"\nidle_timeout = "20"', [(7, "hub[0].idle_timeout")], 'idle_timeout = "20s"'),
    ('name = "depot"', 'name = "depot"\nidle_timeout = "1ms"', [(7, "hub[0].idle_timeout")], 'idle_timeout = "20s"'),
    ('name = "depot"', 'name = "depot"\nretry_min = "5m"', [(7, "hub[0].retry_min")], ""),
    ("[[outbound]]", '[[hub]]\nname = "depot"\nurls = ["amqps://b"]\n[[outbound]]', [(9, "hub[1].name")], ""),
    # streams
    ('stream = "alarms"', 'stream = "a:b"', [(9, "outbound[0].stream")], 'stream = "a-b"'),
    ('stream = "alarms"', 'stream = "local"', [(9, "outbound[0].stream")], 'stream = "local-1"'),
    ('stream = "alarms"', 'stream = "commands"', [(14, "inbound[0].stream")], 'stream = "commands-2"'),
    ('["alarm/#"]', '"alarm/#"', [(10, "outbound[0].topics")], 'topics = ["alarm/#"]'),
    ('["alarm/#"]', '["alarm/#/x"]', [(10, "outbound[0].topics[0]")], '"alarm/#"'),
    ('["alarm/#"]', '["alarm/a+/x"]', [(10, "outbound[0].topics[0]")], '"alarm/+/x"'),
    ('["alarm/#"]', '["$SYS/x"]', [(10, "outbound[0].topics[0]")], ""),
    ('["alarm/#"]', '["", "b"]', [(10, "outbound[0].topics[0]")], ""),
    ('hub = "depot"\naddress', 'hub = "depo"\naddress', [(11, "outbound[0].hub")], 'hub = "depot"'),
    ("edge.{gateway}.alarms", "edge.{gatway}.alarms", [(12, "outbound[0].address")], '"edge.{gateway}.alarms"'),
    ("edge.{gateway}.alarms", "edge.{gateway", [(12, "outbound[0].address")], ""),
    ("edge.{gateway}.alarms", "", [(12, "outbound[0].address")], "address ="),
    ('hub = "depot"\naddress', 'ttl = "100d"\nhub = "depot"\naddress', [(11, "outbound[0].ttl")], 'ttl = "1h"'),
    ('hub = "depot"\naddress', 'class = "high"\nhub = "depot"\naddress', [(11, "outbound[0].class")], '"normal"'),
    ('hub = "depot"\naddress', 'class_ = "bulk"\nhub = "depot"\naddress', [(11, "outbound[0].class_")], "class"),
    ('hub = "depot"\naddress', 'ttl_s = 3\nhub = "depot"\naddress', [(11, "outbound[0].ttl_s")], "ttl"),
    ('hub = "depot"\naddress', 'max_bytes = "1kB"\nhub = "depot"\naddress', [(11, "outbound[0].max_bytes")], '"64MiB"'),
    (
        'hub = "depot"\naddress',
        'reply_to = "edge.{gateway}.comands"\nhub = "depot"\naddress',
        [(11, "outbound[0].reply_to")],
        'reply_to = "edge.loco-4711.commands"',
    ),
    (
        'hub = "depot"\naddress',
        'reply_to = "edge.{stream}"\nhub = "depot"\naddress',
        [(11, "outbound[0].reply_to")] * 2,
        '"edge.{gateway}"',
    ),
    ("edge.{gateway}.alarms", "edge.{requester}", [(12, "outbound[0].address")], 'address = "{requester}"'),
    (
        'topics = ["alarm/#"]\nhub = "depot"\naddress = "edge.{gateway}.alarms"',
        'topics = ["+/depot/#"]\nhub = "depot"\naddress = "{requester}"',
        [(10, "outbound[0].topics")],
        'topics = ["reply/depot/#"]',
    ),
    (
        'topics = ["alarm/#"]\nhub = "depot"\naddress = "edge.{gateway}.alarms"',
        'topics = ["a/#", "b/#"]\nhub = "depot"\naddress = "{requester}"',
        [(10, "outbound[0].topics")],
        'topics = ["reply/depot/#"]',
    ),
    (
        'topics = ["alarm/#"]\nhub = "depot"\naddress = "edge.{gateway}.alarms"\n',
        'topics = ["a/#"]\nhub = "depot"\naddress = "{requester}"\n'
        '[[outbound]]\nstream = "b"\ntopics = ["b/#"]\nhub = "depot"\naddress = "{requester}"\n',
        [(17, "outbound[1].address")],
        "",
    ),
    (
        'hub = "depot"\naddress',
        'reply_timeout = "5m"\nhub = "depot"\naddress',
        [(8, "outbound[0].reply_to")],
        'reply_to = "edge.{gateway}.replies"',
    ),
    ("commands/{subject}", "commands/#", [(17, "inbound[0].topic")], "topic ="),
    ("commands/{subject}", "commands/{topic}", [(17, "inbound[0].topic")], "commands/{"),
    ('topic = "commands/{subject}"', 'topic = "c"\nttl = "1h"', [(18, "inbound[0].ttl")], "ttl under [[outbound]]"),
    # the whole
    ("[[inbound]]", "[[inbonud]]", [(13, "inbonud")], "[[inbound]]"),
    ("[mqtt]", "[local]\nmax_bytes = -1\n[mqtt]", [(4, "local.max_bytes")], 'max_bytes = "64MiB"'),
    ("[mqtt]", "[mqtt]\n'odd key' = 1", [(4, "mqtt.odd key")], ""),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "where", "write"), WRONG)
def test_each_mistake_is_told_with_its_line_and_key(
    old: str, new: str, where: list[tuple[int, str]], write: str
) -> None:
    assert old in GOOD
    found = problems(GOOD.replace(old, new, 1))
    assert [(problem.line, problem.key) for problem in found] == where
    assert any(write in problem.write for problem in found)
    assert all(problem.expected for problem in found)


def test_all_problems_are_told_at_once_in_the_order_of_their_lines() -> None:
    text = (
        GOOD.replace('id = "loco-4711"', 'id = ""')
        .replace("127.0.0.1:1883", "nonsense")
        .replace('name = "depot"', "name = 1")
        .replace('topics = ["alarm/#"]', "")
        .replace("{subject}", "{sub}")
    )
    keys = ["gateway.id", "mqtt.listen[0]", "hub[0].name", "outbound[0].topics"]
    assert [key for _, key in places(text)] == [*keys, "inbound[0].topic"]


@pytest.mark.parametrize(
    ("text", "line", "word"),
    [
        ("[gateway]\nid = \n", 2, "Invalid value"),
        ("[gateway]\nid = 'a'\nid = 'b'\n", 3, "overwrite"),
        ("[gateway]\nid = 'a'\n[gateway]\n", 3, "twice"),
        ('[gateway]\nid = "a\n', 2, "Illegal character"),
        ("[gateway]\n\nx = [1,\n", 3, ""),
        (f"x = {'[' * 5000}\n", 1, ""),
    ],
)
def test_a_syntax_error_is_told_with_its_line(text: str, line: int, word: str) -> None:
    (problem,) = problems(text)
    assert problem.line == line
    assert word in problem.expected


def test_a_file_that_is_not_text_or_not_there_is_a_problem_too(tmp_path: Path) -> None:
    path = tmp_path / "lineside.toml"
    with pytest.raises(ConfigErrors, match="No such file"):
        load(path)
    path.write_bytes(b"[gateway]\n# \xff\n")
    with pytest.raises(ConfigErrors, match=r"lineside\.toml:2: found byte 0xff"):
        load(path)
    path.write_bytes(b"\xef\xbb\xbf" + GOOD.encode().replace(b"\n", b"\r\n"))
    assert load(path).gateway.id == "loco-4711"


def test_a_secret_in_the_file_is_never_shown() -> None:
    text = GOOD.replace('name = "depot"', 'name = "depot"\npassword = "geheim"').replace(
        "amqps://", "amqps://u:geheim@"
    )
    told = "\n".join(str(problem) for problem in problems(text))
    assert "geheim" not in told
    assert "password_file" in told
    (broken,) = problems('[gateway]\npassword = "geheim\n')
    assert "geheim" not in str(broken)


def test_a_password_never_travels_without_tls(tmp_path: Path) -> None:
    (tmp_path / "p").write_text("x")
    text = GOOD.replace(
        'name = "depot"',
        f'name = "depot"\nuser = "u"\npassword_file = "{tmp_path}/p"\nallow_plaintext = "yes, without TLS"',
    ).replace("amqps://hub.example:5671", "amqp://hub.example")
    assert places(text) == [(10, "hub[0].urls[0]")]
    loads(text.replace("amqp://hub.example", "amqp://127.0.0.1"))


def test_plaintext_is_had_by_asking_in_so_many_words() -> None:
    words = 'allow_plaintext = "yes, without TLS"'
    text = GOOD.replace("[mqtt]", f"[mqtt]\n{words}").replace("127.0.0.1:1883", "0.0.0.0:1883")
    text = text.replace('name = "depot"', f'name = "depot"\n{words}').replace("amqps://", "amqp://")
    notes = [line for line in explain(loads(text)) if line.startswith("note:")]
    assert len(notes) == 2
    weaker = 'id = "a"\nsynchronous = "NORMAL"\naccept_loss = "i accept that acknowledged messages may be lost"'
    config = loads(GOOD.replace('id = "loco-4711"', weaker))
    assert config.gateway.accept_loss
    assert any("power cut" in line for line in explain(config))


def test_what_is_asked_of_a_hub_s_staple_is_explained() -> None:
    def told(ocsp: str) -> list[str]:
        config = loads(GOOD.replace('name = "depot"\n', f'name = "depot"\nocsp = "{ocsp}"\n'))
        return [line for line in explain(config) if "staple" in line]

    assert told("off") == []
    assert [line.startswith("hub depot is refused unless it staples") for line in told("require")] == [True]
    refused, note = told("if-stapled")
    assert refused.startswith("hub depot is refused if it staples")
    assert note.startswith("note: who has stolen hub depot's key need staple nothing")


def test_files_must_be_there_readable_and_of_their_kind(tmp_path: Path) -> None:
    (tmp_path / "cert.pem").write_text("-----BEGIN CERTIFICATE-----\n")
    (tmp_path / "key.pem").write_text("-----BEGIN PRIVATE KEY-----\n")
    (tmp_path / "empty").write_text("\n")
    path = tmp_path / "lineside.toml"

    def keys(cert: str, key: str, password: str) -> list[str]:
        lines = f'cert = "{cert}"\nkey = "{key}"\nuser = "u"\npassword_file = "{password}"\n'
        path.write_text(GOOD.replace('name = "depot"\n', f'name = "depot"\n{lines}'))
        try:
            load(path)
        except ConfigErrors as errors:
            return [problem.key for problem in errors.problems]
        return []

    assert keys("cert.pem", "key.pem", "cert.pem") == []
    assert keys("key.pem", "cert.pem", "empty") == ["hub[0].cert", "hub[0].key", "hub[0].password_file"]
    assert keys("no.pem", "key.pem", "no") == ["hub[0].cert", "hub[0].password_file"]
    assert load(path, check_files=False).hub("depot").cert == tmp_path / "no.pem"
    os.mkfifo(tmp_path / "fifo")
    assert keys("fifo", "key.pem", "key.pem") == ["hub[0].cert"]


@pytest.mark.parametrize(
    ("text", "protocol", "listen"),
    [
        ("mqtt://127.0.0.1:1883", "mqtt", Listen("127.0.0.1", 1883)),
        ("mqtts://[::]:8883", "mqtt", Listen("::", 8883, scheme="mqtts")),
        ("ws://127.0.0.1:80", "mqtt", Listen("127.0.0.1", 80, scheme="ws", url_path="/mqtt")),
        ("wss://a.example:443/", "mqtt", Listen("a.example", 443, scheme="wss", url_path="/")),
        ("amqp://127.0.0.1:5672", "amqp", Listen("127.0.0.1", 5672)),
        ("amqps://0.0.0.0:5671", "amqp", Listen("0.0.0.0", 5671, scheme="amqps")),
        ("unix:/run/x", "amqp", Listen("", 0, "/run/x")),
    ],
)
def test_every_kind_of_address_is_read_and_reads_back(text: str, protocol: str, listen: Listen) -> None:
    assert parse_listen(text, protocol) == listen
    assert parse_listen(str(listen), protocol) == listen
    assert listen.tls == (text.partition(":")[0] in ("mqtts", "wss", "amqps"))
    assert listen.websocket == text.startswith("ws")


def listener(pki: Pki, **changed: str | None) -> str:
    """GOOD with TLS listeners open to everybody; `changed` replaces or, with None, leaves out a key of [mqtt]."""
    keys = {"cert": pki.server.cert, "key": pki.server.key, "client_ca": pki.ca} | changed
    table = "".join(f'{key} = "{value}"\n' for key, value in keys.items() if value is not None)
    return GOOD.replace('["127.0.0.1:1883"]', '["mqtts://0.0.0.0:8883", "wss://0.0.0.0:8443"]\n' + table)


def test_addresses_with_tls_may_be_open_to_all_and_are_explained(pki: Pki) -> None:
    config = loads(listener(pki))
    assert config.mqtt is not None
    assert config.mqtt.asks_for == "required"
    told = explain(config)
    assert not [line for line in told if "without TLS" in line]
    (line,) = [line for line in told if "with TLS on" in line]
    assert "mqtts://0.0.0.0:8883, wss://0.0.0.0:8443/mqtt" in line
    assert str(pki.server.cert) in line
    assert f"must show a certificate that {pki.ca} issued" in line
    assert any("may show" in line for line in explain(loads(listener(pki, client_cert="optional"))))
    assert any("not asked" in line for line in explain(loads(listener(pki, client_ca=None))))


def test_a_listener_s_certificate_files_are_tried_as_tls_will_use_them(pki: Pki, other_pki: Pki) -> None:
    def found(**changed: str | None) -> list[str]:
        return [problem.key for problem in problems(listener(pki, **changed))]

    assert found(key=str(other_pki.server.key)) == ["mqtt.key"]
    assert found(cert=str(pki.directory / "none.pem")) == ["mqtt.cert"]
    assert found(cert=str(pki.server.key)) == ["mqtt.cert"]
    assert found(client_ca=str(pki.server.key)) == ["mqtt.client_ca"]
    assert found(key=None) == ["mqtt.key"]
    assert found(cert=None) == ["mqtt.cert", "mqtt.listen[0]", "mqtt.listen[1]"]
    (told,) = problems(listener(pki, key=str(other_pki.server.key)))
    assert "not the key of the first certificate" in told.expected
    unread = loads(listener(pki, key=str(other_pki.server.key)), check_files=False)
    assert unread.mqtt is not None


def test_a_certificate_without_an_address_to_use_it_on_is_noted(pki: Pki) -> None:
    text = listener(pki).replace('["mqtts://0.0.0.0:8883", "wss://0.0.0.0:8443"]', '["127.0.0.1:1883"]')
    assert any(line.startswith("note: MQTT has a cert") for line in explain(loads(text)))


def test_letting_any_web_page_in_is_noted() -> None:
    text = GOOD.replace('["127.0.0.1:1883"]', '["ws://127.0.0.1:1"]\nws_origins = ["null", "http://[::1]:3000", "*"]')
    assert any("any web page" in line for line in explain(loads(text)))


def test_a_filter_that_an_earlier_stream_covers_is_told() -> None:
    more = '[[outbound]]\nstream = "b"\nhub = "depot"\naddress = "b"\ntopics = [{}]\n'
    for covered in ("alarm", "alarm/x/y", "alarm/+", "alarm/x/#"):
        assert places(GOOD + more.format(f'"{covered}"')) == [(22, "outbound[1].topics[0]")], covered
    loads(GOOD + more.format('"#", "+/x", "+", "alarms/#"'))


def test_at_most_a_thousand_streams() -> None:
    row = '[[outbound]]\nstream = "s{0}"\ntopics = ["t/{0}"]\nhub = "depot"\naddress = "a"\n'
    assert len(loads(GOOD + "".join(row.format(n) for n in range(998))).outbound) == 999
    found = problems(GOOD + "".join(row.format(n) for n in range(1000)))
    assert len(found) == 1
    assert "1000 streams" in found[0].expected


@pytest.mark.parametrize(
    ("value", "size"), [("64MiB", 64 << 20), ("10kB", 10_000), (5, 5), ("1.5 GiB", 3 << 29), ("0B", 0)]
)
def test_sizes_are_read(value: object, size: int) -> None:
    assert parse_size(value) == size


@pytest.mark.parametrize(
    ("value", "seconds"), [("1h", 3600), ("250ms", 0.25), ("1h30m", 5400), ("2min", 120), ("7d", 604800), ("0s", 0)]
)
def test_durations_are_read(value: str, seconds: float) -> None:
    assert parse_duration(value) == pytest.approx(seconds)


@pytest.mark.parametrize("value", ["", "h", "1", "1 hour", "-1s", "1h,", "s1", True, None, 3, "9" * 400 + "s"])
def test_other_durations_are_refused(value: object) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        parse_duration(value)


@given(st.text() | st.integers() | st.booleans() | st.none() | st.floats())
def test_no_value_makes_a_parser_raise_anything_but_its_complaint(value: object) -> None:
    for parse in (parse_size, parse_duration, parse_listen, parse_hub_url, parse_origin, topic_filter_fault):
        if isinstance(value, str) or parse in (parse_size, parse_duration):
            try:
                parse(value)  # type: ignore[arg-type]
            except ValueError as error:
                assert 1 <= len(error.args) <= 2  # noqa: PT017


def test_lines_are_found_for_every_way_to_write_a_key() -> None:
    text = """\
# a comment [x]
title = '''
[not.a.table]
'''  # after
"quoted = key" . 'b]' = \"\"\"
a \\\"\"\" "" \"\"\"
arr = [ # why
  "]", [1,
  2], { x = 1, "y=" = "}" },
]
[a . "b.c"]
k.l = 2020-01-01 00:00:00
[[t]]
n = 1
[[t]]
[t.u]
m = "x#y"
[[t.v]]
[[t.v]]
"\\u0041" = 1
"""
    lines = key_lines(text)
    expected = {
        ("title",): 2,
        ("quoted = key",): 5,
        ("quoted = key", "b]"): 5,
        ("arr",): 7,
        ("arr", 0): 8,
        ("arr", 1): 8,
        ("arr", 1, 1): 9,
        ("arr", 2): 9,
        ("arr", 2, "y="): 9,
        ("a",): 11,
        ("a", "b.c"): 11,
        ("a", "b.c", "k", "l"): 12,
        ("t", 0): 13,
        ("t", 0, "n"): 14,
        ("t", 1): 15,
        ("t", 1, "u", "m"): 17,
        ("t", 1, "v", 1): 19,
        ("t", 1, "v", 1, "A"): 20,
    }
    assert {path: lines.get(path) for path in expected} == expected


_KEYS = st.text(st.characters(codec="utf-8", exclude_categories=["C"]), min_size=1, max_size=4)
_SCALARS = st.sampled_from(["1", "true", "'#]'", '"\\"]}"', "'''\n'x'\n'''", '"""\n\\"""\n"""', "1979-05-27 07:32:00"])


@st.composite
def _documents(draw: st.DrawFn) -> str:
    def value(depth: int) -> str:
        kind = draw(st.integers(0, 3)) if depth < 3 else 0
        if kind < 2:
            return draw(_SCALARS)
        inner = [value(depth + 1) for _ in range(draw(st.integers(0, 3)))]
        if kind == 2:
            return "[" + draw(st.sampled_from(["", "\n", " # ]\n "])) + ",\n".join(inner) + "]"
        return "{" + ", ".join(f"k{n} = {each}" for n, each in enumerate(inner)) + "}"

    lines = []
    for table in range(draw(st.integers(0, 4))):
        lines.append(draw(st.sampled_from([f"[t{table}]", f"[ t{table} . 'x.y' ]", "[[list]]", f"[[t{table}.l]]"])))
        for number, name in enumerate(draw(st.lists(_KEYS, max_size=3))):
            quoted = '"' + name.replace("\\", "\\\\").replace('"', '\\"') + f'{number}"'
            lines.append(f"{quoted}  =  {value(0)}" + draw(st.sampled_from(["", " # x = 1", "\n"])))
    return "\n".join(lines)


@given(_documents())
def test_every_key_and_element_of_any_document_has_a_line_of_its_own_text(text: str) -> None:
    def paths(value: object, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
        inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        return [found for key, each in inner for found in [(*path, key), *paths(each, (*path, key))]]

    lines = key_lines(text)
    wanted = paths(tomllib.loads(text))
    assert set(wanted) == set(lines)
    source = text.split("\n")
    for path in wanted:
        assert 1 <= lines[path] <= len(source)
        if isinstance(path[-1], str) and path[-1][:1] == "k":
            assert path[-1] in source[lines[path] - 1]


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.toml")), ids=lambda path: path.name)
def test_every_example_loads_and_explains_itself(path: Path) -> None:
    config = load(path, check_files=False)
    assert any(config.gateway.id in line for line in explain(config))


def test_the_full_example_names_every_key() -> None:
    text = (EXAMPLES / "gateway.toml").read_text()
    for name, table in fields_of(Config).items():
        keys = fields_of(table_in(table.annotation))
        assert keys, name
        for key in keys:
            assert f"{key} = " in text, (name, key)


def test_replies_come_in_on_an_inbound_stream_of_the_same_hub() -> None:
    asks = GOOD.replace('hub = "depot"\naddress', 'hub = "depot"\nreply_to = "edge.{gateway}.commands"\naddress', 1)
    config = loads(asks)
    assert config.outbound[0].reply_to_for("loco-4711") == "edge.loco-4711.commands"
    assert any("replies to requests on stream alarms come in at edge.loco-4711.commands" in x for x in explain(config))
    assert loads(asks.replace("edge.{gateway}.commands", "edge.loco-4711.commands", 1)).outbound[0].reply_to
    assert loads(asks.replace('address = "edge.{gateway}.commands"', 'address = "edge.{gateway}.{stream}"'))
    elsewhere = asks.replace("[[outbound]]", '[[hub]]\nname = "b"\nurls = ["amqps://b.example"]\n[[outbound]]')
    told = problems(elsewhere.replace('stream = "commands"\nhub = "depot"', 'stream = "commands"\nhub = "b"'))
    assert [each.key for each in told] == ["outbound[0].reply_to"]
    assert "this hub has none" in str(told[0])


def test_answers_go_to_who_asked_and_rabbitmq_is_known_not_to_take_them() -> None:
    answers = '[[outbound]]\nstream = "b"\ntopics = ["reply/#"]\nhub = "depot"\naddress = "{requester}"\n'
    config = loads(GOOD + answers)
    assert [out.answers for out in config.outbound] == [None, "reply/"]
    assert any("response topic below reply/;" in line for line in explain(config))
    assert not any("anonymous terminus" in line for line in explain(config))
    rabbit = loads(GOOD.replace('name = "depot"', 'name = "depot"\nkind = "rabbitmq"') + answers)
    assert any(line.startswith("note: RabbitMQ before 4.0") for line in explain(rabbit))


@pytest.mark.parametrize(
    ("one", "other", "both"),
    [
        ("0.0.0.0:1883", "127.0.0.1:1883", False),
        ("0.0.0.0:1883", "localhost:1883", False),
        ("0.0.0.0:1883", "[::1]:1883", True),
        ("0.0.0.0:1883", "[::]:1883", True),
        ("[::]:1883", "[::1]:1883", False),
        ("[::]:1883", "localhost:1883", False),
        ("[::]:1883", "127.0.0.1:1883", True),
        ("[::1]:1883", "127.0.0.1:1883", True),
        ("127.0.0.1:1883", "localhost:1883", False),
    ],
)
def test_addresses_of_both_families_may_share_a_port(one: str, other: str, both: bool) -> None:
    assert parse_listen(one).overlaps(parse_listen(other)) is not both
    assert parse_listen(other).overlaps(parse_listen(one)) is not both


def test_an_ipv6_address_keeps_its_brackets_in_what_to_write() -> None:
    with pytest.raises(ValueError, match=r"a port") as raised:
        parse_listen("[::1]:99999")
    assert parse_listen(raised.value.args[1]).host == "::1"
