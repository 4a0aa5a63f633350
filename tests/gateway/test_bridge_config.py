"""What `[bridge]` may say, and what is told where it can't."""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway.config import ConfigErrors, loads
from gateway.config_explain import explain
from gateway.config_values import BrokerUrl, parse_broker_url

GOOD = """\
[gateway]
id = "loco-4711"
[bridge]
url = "mqtt://127.0.0.1"
[[hub]]
name = "depot"
urls = ["amqps://hub.example:5671"]
[[outbound]]
stream = "alarms"
topics = ["alarm/#"]
hub = "depot"
address = "alarms"
[[outbound]]
stream = "telemetry"
topics = ["train/+", "cab/#"]
hub = "depot"
address = "telemetry"
[[inbound]]
stream = "commands"
hub = "depot"
address = "commands"
topic = "commands/{gateway}/{subject}"
"""
URL = 'url = "mqtt://127.0.0.1"'


def test_what_is_not_said_is_the_loopback_port_the_outbound_topics_and_a_session_that_stays() -> None:
    config = loads(GOOD)
    assert config.bridge is not None
    assert config.bridge.url == BrokerUrl(False, "127.0.0.1", 1883)
    assert config.bridge.version == "5.0"
    assert config.bridge.client_id_for(config.gateway.id) == "lineside-loco-4711"
    assert config.bridge.session_expiry_s is None
    assert config.bridge_topics == ("alarm/#", "train/+", "cab/#")
    assert loads(GOOD.replace(URL, f'{URL}\ntopics = ["alarm/+"]')).bridge_topics == ("alarm/+",)


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("mqtt://[::1]:1884", BrokerUrl(False, "::1", 1884)),
        ("mqtts://broker.example", BrokerUrl(True, "broker.example", 8883)),
        ("unix:/run/mosquitto.sock", BrokerUrl(False, "", 0, "/run/mosquitto.sock")),
    ],
)
def test_a_url_is_read_and_shown_the_same(text: str, url: BrokerUrl) -> None:
    assert parse_broker_url(text) == url
    assert parse_broker_url(str(url)) == url


WRONG = [
    ('url = "127.0.0.1"', "bridge.url", 'url = "mqtt://127.0.0.1"'),
    ('url = "http://127.0.0.1"', "bridge.url", 'url = "mqtt://127.0.0.1"'),
    ('url = "mqtt://u:p@127.0.0.1"', "bridge.url", "`user` and `password_file`"),
    ('url = "mqtt://127.0.0.1/x"', "bridge.url", "nothing after host and port"),
    ('url = "mqtt://127.0.0.1:0"', "bridge.url", "a port from 1"),
    ('url = "unix:relative"', "bridge.url", "an absolute path"),
    ("window = 10", "bridge.url", 'url = "mqtt://127.0.0.1:1883"'),
    ('url = "mqtt://broker.example"', "bridge.url", 'allow_plaintext = "yes, without TLS" to [bridge]'),
    ('url = "mqtt://broker.example"\nallow_plaintext = true', "bridge.allow_plaintext", "exactly these words"),
    (f'{URL}\nversion = "3.1"', "bridge.version", '"5.0", "3.1.1"'),
    (f'{URL}\nclient_id = "a-{{name}}"', "bridge.client_id", "{gateway}"),
    (f'{URL}\ntopics = ["a/#/b"]', "bridge.topics[0]", "'#' to stand alone"),
    (f"{URL}\ntopics = []", "bridge.topics", "at least 1"),
    (f"{URL}\nwindow = 0", "bridge.window", "at least 1"),
    (f'{URL}\nkeep_alive = "0s"', "bridge.keep_alive", "a duration from 1s"),
    (f'{URL}\nkey = "k"', "bridge.cert", "it beside `key`"),
    (f'{URL}\nuser = "u"', "bridge.password_file", "it beside `user`"),
    (f'{URL}\nca = "/nowhere/ca.pem"', "bridge.ca", "a file that can be read"),
    (f"{URL}\n[mqtt]", "bridge.url", "not our own mqtt.listen[0]"),
    (f'{URL}\nversion = "3.1.1"\ntopics = ["x", "commands/#"]', "bridge.topics[1]", 'version = "5.0"'),
]


@pytest.mark.parametrize(("lines", "key", "told"), WRONG)
def test_what_is_wrong_is_told_with_its_key_and_what_to_write(lines: str, key: str, told: str) -> None:
    with pytest.raises(ConfigErrors) as caught:
        loads(GOOD.replace(URL, lines))
    assert key in [problem.key for problem in caught.value.problems]
    assert told in str(caught.value)


def test_a_password_never_goes_out_in_clear_text_whatever_words_are_there(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    lines = 'url = "mqtt://broker.example"\nuser = "u"\npassword_file = "secret"\nallow_plaintext = "yes, without TLS"'
    with pytest.raises(ConfigErrors, match="a password would travel in clear text"):
        loads(GOOD.replace(URL, lines), base=tmp_path)


@pytest.mark.parametrize("topic", ["commands/loco-4711/{subject}", "cab/x", "{subject}", "cab"])
def test_over_3_1_1_what_would_come_back_is_refused_where_it_is_read(topic: str) -> None:
    text = GOOD.replace("commands/{gateway}/{subject}", topic)
    three = text.replace(URL, f'{URL}\nversion = "3.1.1"')
    loads(text)
    if topic.startswith("commands"):
        loads(three)
    else:
        with pytest.raises(ConfigErrors, match="it comes back"):
            loads(three)


def test_the_bridge_is_explained() -> None:
    told = "\n".join(explain(loads(GOOD)))
    assert "bridge to the broker at mqtt://127.0.0.1:1883 over MQTT 5.0 anonymously" in told
    assert "client identifier lineside-loco-4711" in told
    assert "reads alarm/#, train/+, cab/#; publishes the inbound streams (commands)" in told
    assert "nothing listens" not in told
    assert "note: the bridge's broker is reached without TLS" not in told
    plain = 'url = "mqtt://broker.example"\nallow_plaintext = "yes, without TLS"'
    assert "note: the bridge's broker is reached without TLS" in explain(loads(GOOD.replace(URL, plain)))
