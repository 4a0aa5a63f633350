"""The pages in deploy/hubs: what they say is what runs.

Every file comes out of its page; only hosts, ports and paths of the machine are put in.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from cryptography import x509

from gateway.amqp.message import encode
from gateway.config import loads
from security.pki import truststore
from tests import parts
from tests.conftest import require
from tests.interop import harness
from tests.pki import PASSWORD, Certificate, Pki

PAGES = Path(__file__).resolve().parent.parent.parent / "deploy" / "hubs"
HUBS = ("artemis", "rabbitmq", "lineside", "dispatch", "activemq-classic", "servicebus", "qpid-broker-j")
MESSAGES, FLOOD = 500, 20_000
CENTRE = ("centre", "change-me")
_FENCE = re.compile(r"^```\w+ (\S+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def page(hub: str) -> dict[str, str]:
    """The files on a page, by name."""
    return dict(_FENCE.findall((PAGES / f"{hub}.md").read_text()))


def put_in(text: str, places: dict[str, object]) -> str:
    """The text with this machine's places in it; what is replaced has to be there."""
    for old, new in places.items():
        assert old in text, f"the page does not say {old}"
        text = text.replace(old, str(new))
    return text


@pytest.mark.parametrize("hub", HUBS)
def test_every_configuration_on_a_page_is_valid(hub: str) -> None:
    files = {name: text for name, text in page(hub).items() if name.endswith(".toml")}
    assert files
    for name, text in files.items():
        loads(text, file=f"{hub}.md: {name}", check_files=False)


@pytest.mark.parametrize("hub", HUBS)
def test_every_page_says_what_to_expect(hub: str) -> None:
    _, _, expect = (PAGES / f"{hub}.md").read_text().partition("## What to expect")
    for subject in ("**Durability**", "**Sent twice**", "**A pair", "ull"):
        assert subject in expect, subject
    assert f"({hub}.md)" in (PAGES / "README.md").read_text()


class Gateway(harness.Daemon):
    """One daemon with a file of a page."""

    def __init__(self, directory: Path, text: str, places: dict[str, object], mqtt_port: int | None = None) -> None:
        self.mqtt_port = mqtt_port or parts.free_port()
        places = {"[gateway]\n": f'[gateway]\nstate_dir = "{directory}/state"\n', "127.0.0.1:1883": self.local} | places
        super().__init__(directory, put_in(text, places))

    @property
    def local(self) -> str:
        return f"127.0.0.1:{self.mqtt_port}"

    def is_up(self) -> None:
        harness.wait_until(lambda: self.hub_state() == "up", 30, "the link to the hub")


def _files(name: str, certificate: Certificate) -> dict[str, object]:
    where = f"/etc/lineside/pki/{name}"
    return {f"{where}.pem": certificate.cert, f"{where}.key": certificate.key}


def _pki(pki: Pki) -> dict[str, object]:
    return {"/etc/lineside/pki/ca.pem": pki.ca} | _files("loco-4711", pki.client)


def _pair(name: str, port: int | None) -> dict[str, object]:
    """The first of a pair is there, the second is not."""
    return {f"{name}-a.example:5671": f"127.0.0.1:{port}", f"{name}-b.example:5671": f"127.0.0.1:{parts.free_port()}"}


@pytest.fixture
def loop() -> Iterator[harness.Loop]:
    loop = harness.Loop()
    yield loop
    loop.close()


@contextmanager
def running(daemon: harness.Daemon) -> Iterator[None]:
    try:
        daemon.start()
        yield
    finally:
        daemon.stop()


def publish(gateway: Gateway, count: int = MESSAGES) -> None:
    publisher = harness.Publisher(gateway.mqtt_port, "alarm/door", count)
    with harness.closing(publisher):
        publisher.start()
        publisher.finish()


def commands(subject: str, count: int = 20) -> list[bytes]:
    return [encode(b"%d" % n, message_id=f"c-{n}", subject=subject) for n in range(count)]


def takes_alarms_and_gives_commands(
    gateway: Gateway,
    loop: harness.Loop,
    port: int,
    alarms: str,
    to_gateway: str,
    *,
    topics: str = "commands/#",
    durable: bool = False,
) -> None:
    """What every page promises; the addresses are the hub's, `topics` the gateway's."""
    subscriber = harness.Subscriber(gateway.mqtt_port, topics)
    with harness.closing(subscriber):
        publish(gateway)
        got = loop.run(harness.consume(port, alarms, MESSAGES, durable=durable, login=CENTRE))
        assert got == list(range(MESSAGES))
        loop.run(harness.put(port, to_gateway, commands("go"), durable=durable, login=CENTRE))
        harness.wait_until(lambda: len(subscriber.arrived) >= 20, 20, "all commands")
    assert subscriber.arrived == list(range(20))


# ------------------------------------------------------------------ Artemis


class Artemis(parts.Artemis):
    """With the page's files; `changes` go into its broker.xml."""

    def __init__(self, pki: Pki, changes: dict[str, object] | None = None) -> None:
        super().__init__(ca=pki.ca, server=pki.server)
        self._changes = changes or {}
        self._pki = pki

    def configure(self) -> None:
        super().configure()
        etc, files = self.directory / "etc", page("artemis")
        places: dict[str, object] = {
            "0.0.0.0:5671": f"127.0.0.1:{self.tls_port}",
            "127.0.0.1:5672": f"127.0.0.1:{self.port}",
            "/etc/artemis/hub.pem": self._pki.server.bundle,
            "/etc/artemis/ca.pem": self._pki.ca,
            # Whatever else is on this machine's disk: beyond 90 % of it Artemis would give nobody credit.
            "</persistence-enabled>": "</persistence-enabled><max-disk-usage>-1</max-disk-usage>",
        }
        for name, text in files.items():
            if name != "lineside.toml":
                (etc / name).write_text(put_in(text, places | self._changes) if name == "broker.xml" else text)
        (etc / "bootstrap.xml").write_text(put_in(self._bootstrap(), {'domain="lineside"': 'domain="activemq"'}))


@pytest.fixture
def depot(pki: Pki, request: pytest.FixtureRequest) -> Iterator[Artemis]:
    require("artemis")
    with Artemis(pki, getattr(request, "param", None)) as hub:
        yield hub


@pytest.fixture
def loco(depot: Artemis, pki: Pki, tmp_path: Path) -> Iterator[Gateway]:
    gateway = Gateway(tmp_path, page("artemis")["lineside.toml"], _pki(pki) | _pair("artemis", depot.tls_port))
    with running(gateway):
        gateway.is_up()
        yield gateway


def test_artemis_as_on_its_page_takes_alarms_and_gives_commands(
    depot: Artemis, loco: Gateway, loop: harness.Loop
) -> None:
    takes_alarms_and_gives_commands(loco, loop, depot.port, "edge.alarms", "edge.loco-4711.commands")


@pytest.mark.parametrize("depot", [{"<max-size-bytes>100M": "<max-size-bytes>256K"}], indirect=True)
def test_at_artemis_full_address_the_backlog_grows_and_then_drains_in_order(
    depot: Artemis, loco: Gateway, loop: harness.Loop
) -> None:
    publish(loco, FLOOD)
    backlog: list[int] = []

    def stands_still() -> bool:
        time.sleep(0.5)
        backlog.append(loco.waiting("alarms"))
        return len(backlog) > 2 and backlog[-1] == backlog[-3]

    harness.wait_until(stands_still, 30, "a backlog that no longer changes")
    assert FLOOD // 2 < backlog[-1] < FLOOD, backlog
    assert loco.hub_state() == "up", "no credit is no fault"
    got = loop.run(harness.consume(depot.port, "edge.alarms", FLOOD, durable=False, login=CENTRE))
    assert harness.Tally.of(got, FLOOD) == harness.Tally(0, 0, 0)
    harness.wait_until(lambda: loco.waiting("alarms") == 0, 20, "an empty stream")


@pytest.mark.parametrize("depot", [{'name="edge.alarms"': 'name="edge.others"'}], indirect=True)
def test_an_address_that_artemis_does_not_have_is_told_of(depot: Artemis, loco: Gateway) -> None:
    harness.wait_until(lambda: bool(loco.status()["hubs"][0]["error"]), 20, "an error in the status")
    assert "edge.alarms" in loco.status()["hubs"][0]["error"]
    publish(loco, 10)
    assert loco.waiting("alarms") == 10


# ------------------------------------------------------------------ RabbitMQ


class RabbitMQ(parts.RabbitMQ):
    """With the page's files."""

    def __init__(self, pki: Pki) -> None:
        super().__init__(ca=pki.ca, server=pki.server, client=pki.client)
        self._pki = pki

    def configure(self) -> None:
        super().configure()
        here, files = self.directory, page("rabbitmq")
        places: dict[str, object] = {
            "0.0.0.0:5671": f"127.0.0.1:{self.tls_port}",
            "127.0.0.1:5672": f"127.0.0.1:{self.port}",
            "/etc/rabbitmq/ca.pem": self._pki.ca,
            "/etc/rabbitmq/hub.pem": self._pki.server.cert,
            "/etc/rabbitmq/hub.key": self._pki.server.key,
            "/etc/rabbitmq/definitions.json": here / "definitions.json",
        }
        # What a test's machine may lack, and a log that can be read.
        ours = "disk_free_limit.absolute = 50MB\nlog.console = true\nlog.file = false\n"
        (here / "rabbitmq.conf").write_text(put_in(files["rabbitmq.conf"], places) + ours)
        for name in ("enabled_plugins", "definitions.json"):
            (here / name).write_text(files[name])

    def ready(self) -> bool:
        return parts._speaks_amqp(self.port) and parts.accepts(self.tls_port or 0)


@pytest.fixture(scope="module")
def rabbit(pki: Pki) -> Iterator[RabbitMQ]:
    require("rabbitmq")
    with RabbitMQ(pki) as hub:
        yield hub


def _rabbit_gateway(rabbit: RabbitMQ, pki: Pki, directory: Path, address: str | None = None) -> Gateway:
    changes: dict[str, object] = {} if address is None else {'"/queue/edge.alarms"': f'"{address}"'}
    text = page("rabbitmq")["lineside.toml"]
    return Gateway(directory, text, _pki(pki) | _pair("rabbit", rabbit.tls_port) | changes)


def test_rabbitmq_as_on_its_page_takes_alarms_and_gives_commands(
    rabbit: RabbitMQ, pki: Pki, tmp_path: Path, loop: harness.Loop
) -> None:
    gateway = _rabbit_gateway(rabbit, pki, tmp_path)
    with running(gateway):
        gateway.is_up()
        takes_alarms_and_gives_commands(
            gateway, loop, rabbit.port, "/queue/edge.alarms", "/queue/edge.loco-4711.commands", durable=True
        )
        assert gateway.status()["hubs"][0]["notes"] == []


@pytest.mark.parametrize("address", ["/amq/queue/edge.nowhere", "/exchange/amq.topic/edge.nowhere"])
def test_where_rabbitmq_3_would_lose_messages_status_and_log_say_so(
    rabbit: RabbitMQ, pki: Pki, tmp_path: Path, address: str
) -> None:
    gateway = _rabbit_gateway(rabbit, pki, tmp_path, address)
    with running(gateway):
        gateway.is_up()
        [note] = gateway.status()["hubs"][0]["notes"]
        assert address in note
        assert "accepts and loses" in note
        assert "use /queue/NAME" in gateway.log


def test_an_address_of_rabbitmq_4_is_refused_by_3_and_nothing_is_lost(
    rabbit: RabbitMQ, pki: Pki, tmp_path: Path
) -> None:
    gateway = _rabbit_gateway(rabbit, pki, tmp_path, "/queues/edge.alarms")
    with running(gateway):
        publish(gateway, 10)
        harness.wait_until(lambda: bool(gateway.status()["hubs"][0]["error"]), 20, "an error in the status")
        assert "/queues/edge.alarms" in gateway.status()["hubs"][0]["error"]
        assert gateway.waiting("alarms") == 10


# ------------------------------------------------------------------ ActiveMQ Classic


class ActiveMQ(parts.Part):
    """ActiveMQ Classic with the page's elements in an otherwise empty broker; `changes` go into them."""

    name = "activemq"

    def __init__(self, pki: Pki, changes: dict[str, object] | None = None) -> None:
        super().__init__(None)
        self._changes = changes or {}
        self._pki = pki
        self.port, self.tls_port = parts.free_port(), parts.free_port()

    def ready(self) -> bool:
        return parts._speaks_amqp(self.port) and parts.accepts(self.tls_port)

    def command(self) -> list[str]:
        home, here = parts.activemq_home(), self.directory
        places = {"home": home, "base": here, "conf": here / "conf", "data": here / "data"}
        return [
            *("java", "-Xms64m", "-Xmx384m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-XX:-UsePerfData"),
            *(f"-Dactivemq.{name}={place}" for name, place in places.items()),
            *(f"-Djava.io.tmpdir={here / 'tmp'}", f"-Dlog4j.configuration=file:{here / 'conf' / 'log4j.properties'}"),
            *("-jar", str(home / "bin" / "activemq.jar"), "start", f"xbean:file:{here / 'conf' / 'activemq.xml'}"),
        ]

    def environment(self) -> dict[str, str]:
        return {}

    def configure(self) -> None:
        for name in ("conf", "data", "tmp"):
            (self.directory / name).mkdir(exist_ok=True)
        trust = self.directory / "conf" / "truststore.p12"
        trust.write_bytes(truststore(x509.load_pem_x509_certificate(self._pki.ca.read_bytes()), PASSWORD.encode()))
        places: dict[str, object] = {
            "0.0.0.0:5671": f"127.0.0.1:{self.tls_port}",
            "127.0.0.1:5672": f"127.0.0.1:{self.port}",
            "/etc/activemq/hub.p12": self._pki.server.p12,
            "/etc/activemq/truststore.p12": trust,
            "change-this": PASSWORD,
        }
        elements = put_in(page("activemq-classic")["activemq.xml"], places | self._changes)
        (self.directory / "conf" / "activemq.xml").write_text(_ACTIVEMQ.format(elements=elements))
        (self.directory / "conf" / "log4j.properties").write_text(_ACTIVEMQ_LOG)


_ACTIVEMQ = """\
<beans xmlns="http://www.springframework.org/schema/beans" xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance"
    xsi:schemaLocation="http://www.springframework.org/schema/beans
        http://www.springframework.org/schema/beans/spring-beans.xsd
        http://activemq.apache.org/schema/core http://activemq.apache.org/schema/core/activemq-core.xsd">
  <broker xmlns="http://activemq.apache.org/schema/core" brokerName="depot" useJmx="false">
    {elements}
  </broker>
</beans>
"""
_ACTIVEMQ_LOG = """\
log4j.rootLogger=WARN, console
log4j.appender.console=org.apache.log4j.ConsoleAppender
log4j.appender.console.layout=org.apache.log4j.SimpleLayout
"""


@pytest.fixture
def classic(pki: Pki, request: pytest.FixtureRequest) -> Iterator[ActiveMQ]:
    require("activemq")
    with ActiveMQ(pki, getattr(request, "param", None)) as hub:
        yield hub


@pytest.fixture
def behind_classic(classic: ActiveMQ, pki: Pki, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Gateway]:
    password = tmp_path / "depot.password"
    password.write_text("change-me\n")
    password.chmod(0o600)
    places = _pki(pki) | _pair("activemq", classic.tls_port) | {"/etc/lineside/depot.password": password}
    places |= getattr(request, "param", {})
    gateway = Gateway(tmp_path, page("activemq-classic")["lineside.toml"], places)
    with running(gateway):
        gateway.is_up()
        yield gateway


def test_activemq_classic_as_on_its_page_takes_alarms_and_gives_commands(
    classic: ActiveMQ, behind_classic: Gateway, loop: harness.Loop
) -> None:
    takes_alarms_and_gives_commands(
        behind_classic, loop, classic.port, "queue://edge.alarms", "queue://edge.loco-4711.commands"
    )


SMALL_STORE = {
    'storeUsage limit="10 gb"': 'storeUsage limit="512 kb"',
    "<kahaDB ": '<kahaDB journalMaxFileLength="64kb" cleanupInterval="1000" ',
}


@pytest.mark.parametrize("classic", [SMALL_STORE], indirect=True)
def test_at_a_full_activemq_classic_the_backlog_grows_and_then_drains_in_order(
    classic: ActiveMQ, behind_classic: Gateway, loop: harness.Loop
) -> None:
    count = 4000
    publish(behind_classic, count)
    harness.wait_until(lambda: "Persistent store is Full" in classic.log, 30, "a full store")
    assert behind_classic.waiting("alarms") > count // 2
    got = loop.run(harness.consume(classic.port, "queue://edge.alarms", count, durable=False, login=CENTRE))
    assert harness.Tally.of(got, count) == harness.Tally(0, 0, 0)
    harness.wait_until(lambda: behind_classic.waiting("alarms") == 0, 20, "an empty stream")


@pytest.mark.parametrize("classic", [SMALL_STORE], indirect=True)
@pytest.mark.parametrize(
    "behind_classic", [{'kind = "generic"': 'kind = "generic"\nsettle_timeout = "3s"'}], indirect=True
)
def test_activemq_classic_that_is_full_for_long_refuses_its_gateway_until_there_is_room(
    classic: ActiveMQ, behind_classic: Gateway, loop: harness.Loop
) -> None:
    count = 4000
    publish(behind_classic, count)
    # It holds on to the connection that it no longer reads.
    harness.wait_until(
        lambda: "already connected" in str(behind_classic.status()["hubs"][0]["error"]), 60, "its words in the status"
    )
    got = loop.run(harness.consume(classic.port, "queue://edge.alarms", count, durable=False, login=CENTRE))
    tally = harness.Tally.of(got, count)
    assert (tally.lost, tally.reordered) == (0, 0)
    harness.wait_until(lambda: behind_classic.waiting("alarms") == 0, 20, "an empty stream")


# ------------------------------------------------------------------ Lineside


class Hub(Gateway):
    """The page's hub; with a `cluster`, the grown one. It keeps its directory and its ports."""

    def __init__(self, pki: Pki, directory: Path) -> None:
        self.tls_port, self.port = parts.free_port(), parts.free_port()
        self._client = pki.issue("hub-a.example")
        self._places: dict[str, object] = {
            "0.0.0.0:5671": f"127.0.0.1:{self.tls_port}",
            "127.0.0.1:5672": f"127.0.0.1:{self.port}",
            "/etc/lineside/pki/ca.pem": pki.ca,
        } | _files("hub", pki.server)
        super().__init__(directory, page("lineside")["hub.toml"], self._places)

    def grow(self, cluster: Artemis) -> None:
        """The other file, and a restart."""
        self.stop()
        places = self._places | _files("hub-a", self._client) | _pair("artemis", cluster.tls_port)
        super().__init__(self.directory, page("lineside")["grown.toml"], places, self.mqtt_port)
        self.start()


@pytest.fixture
def hub(pki: Pki, tmp_path: Path) -> Iterator[Hub]:
    hub = Hub(pki, tmp_path / "hub")
    with running(hub):
        yield hub


@pytest.fixture
def behind(hub: Hub, pki: Pki, tmp_path: Path) -> Iterator[Gateway]:
    """A gateway whose hub is a Lineside."""
    gateway = Gateway(tmp_path / "loco", page("lineside")["gateway.toml"], _pki(pki) | _pair("hub", hub.tls_port))
    with running(gateway):
        gateway.is_up()
        yield gateway


def test_lineside_as_on_its_page_keeps_alarms_for_apps_and_commands_for_a_gateway_that_is_away(
    hub: Hub, behind: Gateway, loop: harness.Loop
) -> None:
    publish(behind)
    got = loop.run(harness.consume(hub.port, "edge/loco-4711/alarms", MESSAGES, durable=False))
    assert got == list(range(MESSAGES))
    behind.stop()
    with harness.closing(centre := harness.Publisher(hub.mqtt_port, "edge/loco-4711/commands", 20)):
        centre.start()
        centre.finish()
    behind.start()
    behind.is_up()
    subscriber = harness.Subscriber(behind.mqtt_port, "commands")
    with harness.closing(subscriber):
        harness.wait_until(lambda: len(subscriber.arrived) >= 20, 20, "all commands")
    assert subscriber.arrived == list(range(20))


def test_a_lineside_hub_grows_to_artemis_and_its_gateways_are_told_nothing(
    hub: Hub, behind: Gateway, depot: Artemis, loop: harness.Loop
) -> None:
    publish(behind)
    loop.run(harness.consume(hub.port, "edge/loco-4711/alarms", MESSAGES, durable=False))
    publisher = harness.Publisher(behind.mqtt_port, "alarm/door", FLOOD, per_s=5000)
    subscriber = harness.Subscriber(behind.mqtt_port, "commands")
    with harness.closing(publisher, subscriber):
        hub.stop()
        publisher.start()
        publisher.reaches(500)
        hub.grow(depot)
        publisher.finish()
        got = loop.run(harness.consume(depot.port, "edge.alarms", FLOOD, durable=False, login=CENTRE))
        assert harness.Tally.of(got, FLOOD) == harness.Tally(0, 0, 0)
        loop.run(harness.put(depot.port, "edge.hub-a.commands", commands("loco-4711"), login=CENTRE))
        harness.wait_until(lambda: len(subscriber.arrived) >= 20, 20, "all commands")
    assert subscriber.arrived == list(range(20))


def test_the_names_may_lead_straight_to_artemis_and_the_gateways_file_stays(
    depot_for_lineside: Artemis, pki: Pki, tmp_path: Path, loop: harness.Loop
) -> None:
    depot = depot_for_lineside
    gateway = Gateway(tmp_path, page("lineside")["gateway.toml"], _pki(pki) | _pair("hub", depot.tls_port))
    with running(gateway):
        gateway.is_up()
        takes_alarms_and_gives_commands(
            gateway, loop, depot.port, "edge/loco-4711/alarms", "edge/loco-4711/commands", topics="commands"
        )


@pytest.fixture
def depot_for_lineside(pki: Pki) -> Iterator[Artemis]:
    """Artemis with the addresses that gateways of a Lineside use already."""
    require("artemis")
    names = {
        'match="edge.alarms"': 'match="edge/loco-4711/alarms"',
        'match="edge.*.commands"': 'match="edge/loco-4711/commands"',
        '"edge.alarms"': '"edge/loco-4711/alarms"',
        '"edge.loco-4711.commands"': '"edge/loco-4711/commands"',
    }
    with Artemis(pki, names) as depot:
        yield depot
