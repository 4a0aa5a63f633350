"""Starts real brokers for tests and benchmarks: Artemis, RabbitMQ, Mosquitto, NATS.

Each part is a context manager. It listens on loopback ports of its own, keeps its data in its own directory,
returns from `start` when it answers, and ends with the test process, even where that is killed: the leader of
the part's process group waits on a pipe from here. `kill` is the power cut, `stop` the polite way, `restart`
uses the same ports and data. Knows nothing of Lineside.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

HOST = "127.0.0.1"
START_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 30.0
PROBE_INTERVAL_S = 0.05
PROBE_TIMEOUT_S = 1.0
AMQP_SASL_HEADER = b"AMQP\x03\x01\x00\x00"
# Below Linux's ephemeral range, so that no outgoing connection takes the port of a part that is down.
PORTS = range(20_000, 32_000)

# $0 is the pid file, the rest is the command. The inner shell becomes the command; whatever ends first, the
# command or the pipe on standard input, the whole group ends with it.
LEADER = """
{ sh -c 'echo $$ >"$0"; exec "$@"' "$0" "$@" </dev/null; kill -KILL 0; } &
while read -r _; do :; done
kill -KILL 0
"""


def program(name: str) -> str | None:
    """The path of an installed program; looks in the system directories too, which a user's PATH may lack."""
    path = os.pathsep.join((os.environ.get("PATH", ""), "/usr/local/sbin", "/usr/sbin", "/sbin"))
    return shutil.which(name, path=path)


def parts_dir() -> Path:
    """Where deploy/parts.py puts what it fetches; in an installed Lineside only $LINESIDE_PARTS may be there."""
    named = os.environ.get("LINESIDE_PARTS")
    return Path(named) if named else Path(__file__).resolve().parent.parent.parent / ".parts"


def artemis_home() -> Path | None:
    """$ARTEMIS_HOME, or the newest one fetched."""
    named = os.environ.get("ARTEMIS_HOME")
    found = [Path(named)] if named else sorted(parts_dir().glob("apache-artemis-*"), reverse=True)
    return next((path for path in found if (path / "lib" / "artemis-boot.jar").exists()), None)


def rabbitmq_script() -> Path | None:
    """RabbitMQ's own start script, past the distribution's wrapper that insists on a system user."""
    for found in (Path("/usr/lib/rabbitmq/bin/rabbitmq-server"), program("rabbitmq-server")):
        if found and Path(found).exists():
            return Path(found)
    return None


def nats_server() -> str | None:
    """On PATH, beside this Python (where pip puts it), or the newest one fetched."""
    beside = Path(sys.executable).parent / "nats-server"
    fetched = sorted(parts_dir().glob("nats-server-*/bin/nats-server"), reverse=True)
    return program("nats-server") or next((str(path) for path in (beside, *fetched) if path.exists()), None)


class Certificate(Protocol):
    """Where a certificate is, its key, both in one file, and the common name in it."""

    @property
    def name(self) -> str: ...
    @property
    def cert(self) -> Path: ...
    @property
    def key(self) -> Path: ...
    @property
    def bundle(self) -> Path: ...


class PartError(Exception):
    """A part did not start or stop in time. The text ends with its last log lines."""


def free_port() -> int:
    """A loopback port that nobody listens on just now."""
    while True:
        port = random.choice(PORTS)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind((HOST, port))
            return port


class Part:
    """One broker process. Subclasses say how it is configured, started and probed."""

    name = "part"

    def __init__(self, directory: Path | None = None) -> None:
        """Keep everything in `directory`; without one, in a temporary directory that `close` removes."""
        self._owned = directory is None
        self.directory = directory or Path(tempfile.mkdtemp(prefix=f"lineside-{self.name}-"))
        self.directory.mkdir(parents=True, exist_ok=True)
        self._leader: subprocess.Popen[bytes] | None = None

    # What a subclass says.

    def configure(self) -> None:
        """Write the configuration; called before every start."""

    def command(self) -> list[str]:
        raise NotImplementedError

    def environment(self) -> dict[str, str]:
        """What the process gets in its environment beside what this process has."""
        return {}

    def ready(self) -> bool:
        """Whether the part answers on all its ports."""
        raise NotImplementedError

    # What tests use.

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def pid(self) -> int:
        return int(self._pid_file.read_text())

    @property
    def running(self) -> bool:
        return self._leader is not None and self._leader.poll() is None

    @property
    def log(self) -> str:
        try:
            return (self.directory / "output.log").read_text(errors="replace")
        except FileNotFoundError:
            return ""

    def start(self, timeout_s: float = START_TIMEOUT_S) -> None:
        """Start, and return when the part answers. Raises PartError at the deadline or if it ends before."""
        assert not self.running, f"{self.name} runs already"
        self.configure()
        self._pid_file.unlink(missing_ok=True)
        with (self.directory / "output.log").open("ab") as log:
            self._leader = subprocess.Popen(
                ["sh", "-c", LEADER, str(self._pid_file), *self.command()],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **self.environment()},
                cwd=self.directory,
                start_new_session=True,
            )
        try:
            self._wait(self.ready, timeout_s, "did not get ready", alive=True)
        except BaseException:
            self.kill()
            raise

    def kill(self) -> None:
        """SIGKILL the whole process group: nothing is flushed, nothing is said to the peers."""
        if self._leader is None:
            return
        leader, self._leader = self._leader, None
        # A leader not yet waited for keeps its process id, so this group is ours.
        if leader.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(leader.pid, signal.SIGKILL)
        assert leader.stdin is not None
        leader.stdin.close()
        leader.wait(STOP_TIMEOUT_S)

    def stop(self, timeout_s: float = STOP_TIMEOUT_S) -> None:
        """SIGTERM, and wait for the orderly end. Raises PartError if it takes longer."""
        if not self.running:
            return
        try:
            os.kill(int(self._pid_file.read_text()), signal.SIGTERM)
            self._wait(lambda: not self.running, timeout_s, "did not stop", alive=False)
        finally:
            self.kill()

    def restart(self, *, gently: bool = False, timeout_s: float = START_TIMEOUT_S) -> None:
        """Stop (by SIGKILL unless `gently`) and start again with the same ports and data."""
        if gently:
            self.stop()
        else:
            self.kill()
        self.start(timeout_s)

    def close(self) -> None:
        self.kill()
        if self._owned:
            shutil.rmtree(self.directory, ignore_errors=True)

    @property
    def _pid_file(self) -> Path:
        return self.directory / "pid"

    def _wait(self, done: Callable[[], bool], timeout_s: float, complaint: str, *, alive: bool) -> None:
        deadline = time.monotonic() + timeout_s
        while not done():
            late = time.monotonic() > deadline
            if late or (alive and not self.running):
                why = f"{complaint} within {timeout_s:.0f} s" if late else "ended at once"
                tail = "\n".join(self.log.splitlines()[-30:])
                raise PartError(f"{self.name} {why}\n{tail}")
            time.sleep(PROBE_INTERVAL_S)


def accepts(port: int) -> bool:
    try:
        socket.create_connection((HOST, port), PROBE_TIMEOUT_S).close()
    except OSError:
        return False
    return True


def _speaks_amqp(port: int) -> bool:
    """Whether the peer answers an AMQP 1.0 SASL header with its own (AMQP 1.0 §5.3.2)."""
    try:
        with socket.create_connection((HOST, port), PROBE_TIMEOUT_S) as connection:
            connection.settimeout(PROBE_TIMEOUT_S)
            connection.sendall(AMQP_SASL_HEADER)
            return connection.recv(8) == AMQP_SASL_HEADER
    except OSError:
        return False


class AmqpBroker(Part):
    """AMQP 1.0 at `url`, and over TLS with a required client certificate at `tls_url`."""

    def __init__(self, directory: Path | None, ca: Path | None, server: Certificate | None) -> None:
        super().__init__(directory)
        self._ca = ca
        self._server = server
        self.port = free_port()
        self.tls_port = free_port() if server else None

    @property
    def url(self) -> str:
        return f"amqp://{HOST}:{self.port}"

    @property
    def tls_url(self) -> str:
        assert self.tls_port is not None, "started without a server certificate"
        return f"amqps://{HOST}:{self.tls_port}"

    def ready(self) -> bool:
        return _speaks_amqp(self.port) and (self.tls_port is None or accepts(self.tls_port))


class Artemis(AmqpBroker):
    """ActiveMQ Artemis: AMQP 1.0 at `url`, and over TLS with a required client certificate at `tls_url`.

    Anonymous clients may do anything, and so may `USER` with `PASSWORD`; a wrong password is refused. Addresses
    are made on first use: anycast queues, or multicast below `topic.`. Below `full.` an address holds 64 KiB
    and then refuses (address-full-policy FAIL); elsewhere it pages, as is Artemis' default.
    """

    name = "artemis"
    USER = "gateway"
    PASSWORD = "correct-horse"

    def __init__(
        self,
        *,
        ca: Path | None = None,
        server: Certificate | None = None,
        directory: Path | None = None,
        acceptor: str = "",
        address_settings: str = "",
    ) -> None:
        """`acceptor` is appended to both acceptors' URLs (";key=value"); `address_settings` is more XML."""
        super().__init__(directory, ca, server)
        self._acceptor = acceptor
        self._address_settings = address_settings

    def command(self) -> list[str]:
        home = artemis_home()
        assert home is not None
        etc = self.directory / "etc"
        java = program("java")
        assert java is not None
        return [
            java,
            "-Xms64m",
            "-Xmx384m",
            "-XX:+UseSerialGC",
            "-XX:TieredStopAtLevel=1",
            "-XX:-UsePerfData",
            "-Dlog4j2.disableJmx=true",
            f"-Dlog4j2.configurationFile={etc / 'log4j2.properties'}",
            f"-Djava.security.auth.login.config={etc / 'login.config'}",
            f"-Djava.io.tmpdir={self.directory / 'tmp'}",
            f"-Dartemis.home={home}",
            f"-Dartemis.instance={self.directory}",
            f"-Dartemis.instance.etc={etc}",
            f"-Ddata.dir={self.directory / 'data'}",
            "-classpath",
            str(home / "lib" / "artemis-boot.jar"),
            "org.apache.activemq.artemis.boot.Artemis",
            "run",
        ]

    def environment(self) -> dict[str, str]:
        return {"ARTEMIS_INSTANCE_ETC": str(self.directory / "etc")}

    def configure(self) -> None:
        for name in ("etc", "data", "tmp", "log", "lib"):
            (self.directory / name).mkdir(exist_ok=True)
        for name, text in {
            "bootstrap.xml": self._bootstrap(),
            "broker.xml": self._broker(),
            "management.xml": '<management-context xmlns="http://activemq.apache.org/schema"/>\n',
            "login.config": _ARTEMIS_LOGIN,
            "users.properties": f"{self.USER}={self.PASSWORD}\n",
            "roles.properties": f"amq={self.USER}\n",
            "log4j2.properties": _ARTEMIS_LOG,
        }.items():
            (self.directory / "etc" / name).write_text(text)

    def _bootstrap(self) -> str:
        return (
            '<broker xmlns="http://activemq.apache.org/schema">\n'
            '  <jaas-security domain="lineside"/>\n'
            f'  <server configuration="{(self.directory / "etc" / "broker.xml").as_uri()}"/>\n'
            "</broker>\n"
        )

    def _broker(self) -> str:
        common = f"protocols=AMQP;amqpCredits=1000;amqpLowCredits=300;anycastPrefix=queue://;multicastPrefix=topic://{self._acceptor}"
        acceptors = f'<acceptor name="amqp">tcp://{HOST}:{self.port}?{common};saslMechanisms=ANONYMOUS,PLAIN</acceptor>'
        if self._server:
            tls = (
                f"sslEnabled=true;needClientAuth=true;keyStoreType=PEM;keyStorePath={self._server.bundle};"
                f"trustStoreType=PEMCA;trustStorePath={self._ca};saslMechanisms=EXTERNAL,ANONYMOUS,PLAIN"
            )
            acceptors += f'\n      <acceptor name="amqps">tcp://{HOST}:{self.tls_port}?{tls};{common}</acceptor>'
        permissions = "".join(
            f'<permission type="{kind}" roles="amq"/>'
            for kind in (
                "createNonDurableQueue",
                "deleteNonDurableQueue",
                "createDurableQueue",
                "deleteDurableQueue",
                "createAddress",
                "deleteAddress",
                "consume",
                "browse",
                "send",
                "manage",
            )
        )
        return _ARTEMIS_BROKER.format(
            acceptors=acceptors, permissions=permissions, address_settings=self._address_settings
        )


class FullArtemis(Artemis):
    """As its makers have it: all of the compiler, their heap, half of it for messages, a journal that gathers."""

    def __init__(
        self,
        *,
        directory: Path | None = None,
        mqtt: bool = False,
        ca: Path | None = None,
        server: Certificate | None = None,
    ) -> None:
        """`mqtt`: listen for MQTT, too, at `mqtt_port`."""
        super().__init__(directory=directory, ca=ca, server=server)
        self.mqtt_port = free_port() if mqtt else None

    def ready(self) -> bool:
        return super().ready() and (self.mqtt_port is None or accepts(self.mqtt_port))

    def command(self) -> list[str]:
        slow = ("-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC", "-Xms64m", "-Xmx384m")
        java, *options = (option for option in super().command() if option not in slow)
        return [java, "-Xms512m", "-Xmx2g", *options]

    def _broker(self) -> str:
        text = super()._broker()
        for ours in ("<journal-buffer-timeout>0</journal-buffer-timeout>", "<global-max-size>100M</global-max-size>"):
            text = text.replace(ours, "")
        if self.mqtt_port is None:
            return text
        mqtt = f'<acceptor name="mqtt">tcp://{HOST}:{self.mqtt_port}?protocols=MQTT</acceptor>'
        return text.replace("</acceptors>", f"  {mqtt}\n    </acceptors>")


_ARTEMIS_BROKER = """\
<configuration xmlns="urn:activemq">
  <core xmlns="urn:activemq:core">
    <name>hub</name>
    <persistence-enabled>true</persistence-enabled>
    <journal-type>NIO</journal-type>
    <journal-directory>data/journal</journal-directory>
    <bindings-directory>data/bindings</bindings-directory>
    <paging-directory>data/paging</paging-directory>
    <large-messages-directory>data/large</large-messages-directory>
    <journal-datasync>true</journal-datasync>
    <journal-min-files>2</journal-min-files>
    <journal-pool-files>4</journal-pool-files>
    <journal-file-size>4M</journal-file-size>
    <journal-buffer-timeout>0</journal-buffer-timeout>
    <disk-scan-period>5000</disk-scan-period>
    <max-disk-usage>-1</max-disk-usage>
    <critical-analyzer>false</critical-analyzer>
    <global-max-size>100M</global-max-size>
    <jmx-management-enabled>false</jmx-management-enabled>
    <acceptors>
      {acceptors}
    </acceptors>
    <security-settings>
      <security-setting match="#">{permissions}</security-setting>
    </security-settings>
    <address-settings>
      <address-setting match="#">
        <default-address-routing-type>ANYCAST</default-address-routing-type>
        <default-queue-routing-type>ANYCAST</default-queue-routing-type>
        <dead-letter-address>DLQ</dead-letter-address>
        <expiry-address>ExpiryQueue</expiry-address>
        <redelivery-delay>0</redelivery-delay>
        <auto-delete-queues>false</auto-delete-queues>
        <auto-delete-addresses>false</auto-delete-addresses>
      </address-setting>
      <address-setting match="topic.#">
        <default-address-routing-type>MULTICAST</default-address-routing-type>
        <default-queue-routing-type>MULTICAST</default-queue-routing-type>
      </address-setting>
      <address-setting match="full.#">
        <max-size-bytes>64K</max-size-bytes>
        <address-full-policy>FAIL</address-full-policy>
      </address-setting>
      {address_settings}
    </address-settings>
    <addresses>
      <address name="DLQ"><anycast><queue name="DLQ"/></anycast></address>
      <address name="ExpiryQueue"><anycast><queue name="ExpiryQueue"/></anycast></address>
    </addresses>
  </core>
</configuration>
"""

_ARTEMIS_LOGIN = """\
lineside {
  org.apache.activemq.artemis.spi.core.security.jaas.PropertiesLoginModule sufficient
    org.apache.activemq.jaas.properties.user="users.properties"
    org.apache.activemq.jaas.properties.role="roles.properties";
  org.apache.activemq.artemis.spi.core.security.jaas.GuestLoginModule sufficient
    credentialsInvalidate=true
    org.apache.activemq.jaas.guest.user="guest"
    org.apache.activemq.jaas.guest.role="amq";
};
"""

_ARTEMIS_LOG = """\
rootLogger.level = WARN
rootLogger.appenderRef.console.ref = console
appender.console.type = Console
appender.console.name = console
appender.console.layout.type = PatternLayout
appender.console.layout.pattern = %d{HH:mm:ss.SSS} %level [%logger] %msg%n
"""


class RabbitMQ(AmqpBroker):
    """RabbitMQ with its AMQP 1.0 and MQTT plugins.

    Plain at `url` (anonymous or guest/guest), TLS with a required client certificate at `tls_url` (EXTERNAL for
    the common name of `client`), MQTT at `mqtt_url`. `epmd` is its own, too, so nodes never meet.
    """

    name = "rabbitmq"
    PLUGINS = ("rabbitmq_amqp1_0", "rabbitmq_mqtt", "rabbitmq_auth_mechanism_ssl")

    def __init__(
        self,
        *,
        ca: Path | None = None,
        server: Certificate | None = None,
        client: Certificate | None = None,
        directory: Path | None = None,
        config: str = "",
    ) -> None:
        """`config` is appended to rabbitmq.conf."""
        super().__init__(directory, ca, server)
        self._client = client
        self._config = config
        self._node = f"lineside-{secrets.token_hex(4)}@localhost"
        self._cookie = secrets.token_hex(16)
        self._epmd_port = free_port()
        self._distribution_port = free_port()
        self.mqtt_port = free_port()

    @property
    def mqtt_url(self) -> str:
        return f"mqtt://{HOST}:{self.mqtt_port}"

    def ready(self) -> bool:
        return super().ready() and accepts(self.mqtt_port)

    def command(self) -> list[str]:
        epmd = f'"{program("epmd")}" -port {self._epmd_port} -address {HOST} &'
        return ["sh", "-c", f'{epmd} exec "$0"', str(rabbitmq_script()), str(program("epmd"))]

    def environment(self) -> dict[str, str]:
        here = self.directory
        return {
            "HOME": str(here),
            "ERL_EPMD_PORT": str(self._epmd_port),
            "ERL_EPMD_ADDRESS": HOST,
            "ERL_INETRC": str(here / "inetrc"),
            "RABBITMQ_CONF_ENV_FILE": str(here / "environment.conf"),
            "RABBITMQ_NODENAME": self._node,
            "RABBITMQ_DIST_PORT": str(self._distribution_port),
            "RABBITMQ_CONFIG_FILE": str(here / "rabbitmq.conf"),
            "RABBITMQ_ADVANCED_CONFIG_FILE": str(here / "advanced.config"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(here / "enabled_plugins"),
            "RABBITMQ_MNESIA_BASE": str(here / "mnesia"),
            "RABBITMQ_LOG_BASE": str(here / "log"),
            "RABBITMQ_LOGS": "-",
            "RABBITMQ_PID_FILE": str(here / "rabbitmq.pid"),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": (
                f"-setcookie {self._cookie} -kernel inet_dist_use_interface {{127,0,0,1}} +S 2:2 +A 16"
            ),
        }

    def configure(self) -> None:
        here = self.directory
        (here / "log").mkdir(exist_ok=True)
        (here / "environment.conf").touch()
        (here / "advanced.config").write_text("[].\n")
        # Names come from this file alone: no resolver, no dependence on what the machine is called.
        (here / "inetrc").write_text('{host, {127,0,0,1}, ["localhost"]}.\n{lookup, [file]}.\n')
        (here / "enabled_plugins").write_text(f"[{','.join(self.PLUGINS)}].\n")
        (here / "definitions.json").write_text(json.dumps(self._definitions()))
        (here / "rabbitmq.conf").write_text("\n".join((*self._lines(), self._config, "")))

    def _lines(self) -> list[str]:
        lines = [
            f"listeners.tcp.1 = {HOST}:{self.port}",
            f"mqtt.listeners.tcp.1 = {HOST}:{self.mqtt_port}",
            "mqtt.allow_anonymous = true",
            "mqtt.default_user = guest",
            "mqtt.default_pass = guest",
            "amqp1_0.default_user = guest",
            "auth_mechanisms.1 = EXTERNAL",
            "auth_mechanisms.2 = PLAIN",
            "auth_mechanisms.3 = AMQPLAIN",
            "auth_mechanisms.4 = ANONYMOUS",
            "ssl_cert_login_from = common_name",
            "loopback_users = none",
            f"load_definitions = {self.directory / 'definitions.json'}",
            "disk_free_limit.absolute = 50MB",
            "log.console = true",
            "log.console.level = warning",
            "log.file = false",
        ]
        if self._server:
            lines += [
                f"listeners.ssl.1 = {HOST}:{self.tls_port}",
                f"ssl_options.cacertfile = {self._ca}",
                f"ssl_options.certfile = {self._server.cert}",
                f"ssl_options.keyfile = {self._server.key}",
                "ssl_options.verify = verify_peer",
                "ssl_options.fail_if_no_peer_cert = true",
            ]
        return lines

    def _definitions(self) -> dict[str, object]:
        everything = {"vhost": "/", "configure": ".*", "write": ".*", "read": ".*"}
        users: list[dict[str, object]] = [{"name": "guest", "password": "guest", "tags": "administrator"}]
        if self._client:
            users.append({"name": self._client.name, "password_hash": "", "tags": ""})
        return {
            "users": users,
            "vhosts": [{"name": "/"}],
            "permissions": [{"user": user["name"], **everything} for user in users],
        }


class Mosquitto(Part):
    """Mosquitto with the configuration given; without one, a plain listener for anonymous clients."""

    name = "mosquitto"

    def __init__(
        self,
        config: str = "allow_anonymous true\npersistence true\n",
        *,
        directory: Path | None = None,
        tls: str = "",
    ) -> None:
        """`config` may name `{directory}`; with `tls`, the lines of a second listener, there is a `tls_port`."""
        super().__init__(directory)
        self._config = config
        self._tls = tls
        self.port = free_port()
        self.tls_port = free_port() if tls else None

    @property
    def url(self) -> str:
        return f"mqtt://{HOST}:{self.port}"

    def ready(self) -> bool:
        return accepts(self.port) and (self.tls_port is None or accepts(self.tls_port))

    def configure(self) -> None:
        lines = [
            f"listener {self.port} {HOST}",
            f"persistence_location {self.directory}/",
            self._config.format(directory=self.directory),
        ]
        if os.geteuid() == 0:
            lines.insert(0, "user root")
        if self._tls:
            lines += [f"listener {self.tls_port} {HOST}", self._tls]
        (self.directory / "mosquitto.conf").write_text("\n".join((*lines, "")))

    def command(self) -> list[str]:
        mosquitto = program("mosquitto")
        assert mosquitto is not None
        return [mosquitto, "-c", str(self.directory / "mosquitto.conf")]


class Nats(Part):
    """NATS with JetStream and its MQTT listener. `sync_always`: every write is synced before it is acknowledged."""

    name = "nats"

    def __init__(self, *, sync_always: bool = False, directory: Path | None = None) -> None:
        super().__init__(directory)
        self._sync = "always" if sync_always else "2m"
        self.client_port = free_port()
        self.port = free_port()

    def ready(self) -> bool:
        return accepts(self.port)

    def configure(self) -> None:
        (self.directory / "nats.conf").write_text(
            f'server_name: bench\nhost: "{HOST}"\nport: {self.client_port}\n'
            f'jetstream {{ store_dir: "{self.directory}/store", sync_interval: "{self._sync}" }}\n'
            f'mqtt {{ host: "{HOST}", port: {self.port} }}\n'
        )

    def command(self) -> list[str]:
        server = nats_server()
        assert server is not None
        return [server, "-c", str(self.directory / "nats.conf")]
