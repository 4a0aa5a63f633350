"""A daemon and a hub that staples: what it says of its certificate decides whether a message leaves."""

from __future__ import annotations

import datetime
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography.x509 import ocsp

from security.expiry import RELEASED_S, iso
from tests.clocks import Clocks
from tests.daemon import HUB_CONFIG, Client, Daemon, Reader, free_port, wait_until
from tests.gateway.test_certificates import TLS_GATEWAY
from tests.pki import DAY, Pki
from tests.stapling import StaplingServer, answer, authority, read

COUNT = 200
# An attempt that is refused for its certificate is repeated after 5 s, then 10.
RETRY_S_MAX = 30.0
# What a clock that is not set says: a time before this software, at which its certificates were good already.
UNSET_S = RELEASED_S - 86400
BEGINS = datetime.timedelta(seconds=UNSET_S - time.time()) - DAY


class Rig:
    """A hub behind TLS that staples, its reader, and the gateway's configuration."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.pki = Pki(path / "pki", begins=BEGINS)
        server = self.pki.issue("localhost", server=True, begins=BEGINS)
        client = self.pki.issue("loco", begins=BEGINS)
        self.leaf, _ = read(server)
        for name in ("hub", "gateway"):
            (path / name).mkdir()
        hub_port = free_port()
        self.daemons = [Daemon(path / "hub", HUB_CONFIG, hub_port)]
        self.daemons[0].status()
        self.reader = Reader(self.daemons[0])
        self.tls = StaplingServer(server, self.pki, target=hub_port)
        self.config = TLS_GATEWAY.replace("{ca}", str(self.pki.ca))
        self.config = self.config.replace("{cert}", str(client.cert)).replace("{key}", str(client.key))

    def says(self, status: ocsp.OCSPCertStatus = ocsp.OCSPCertStatus.GOOD) -> bytes:
        return answer(self.leaf, self.pki.authority, authority(self.pki), status=status)

    def start(self, setting: str, **environment: str) -> Daemon:
        config = self.config.replace('kind = "lineside"', f'kind = "lineside"\nocsp = "{setting}"')
        gateway = Daemon(self.path / "gateway", config, self.tls.port, **environment)
        self.daemons.append(gateway)
        gateway.status()
        return gateway

    def end(self) -> None:
        self.reader.client.close()
        for daemon in self.daemons:
            daemon.end()


def hub(gateway: Daemon) -> dict[str, object]:
    found = gateway.status()["hubs"]
    assert isinstance(found, list)
    return dict(found[0])


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    rig = Rig(tmp_path)
    with rig.tls:
        yield rig
        rig.end()


def test_a_hub_that_is_revoked_or_staples_nothing_gets_nothing_and_all_in_order_once_it_staples_that_it_is_good(
    rig: Rig,
) -> None:
    rig.tls.staple = rig.says(ocsp.OCSPCertStatus.REVOKED)
    gateway = rig.start("require")
    app = Client(gateway.port)
    app.publish(COUNT)
    gateway.wait_for_log("the hub's certificate: it is revoked since")
    wait_until(lambda: "it is revoked since" in str(hub(gateway)["error"]))
    rig.tls.staple = b""
    wait_until(lambda: "no OCSP response is stapled" in str(hub(gateway)["error"]), RETRY_S_MAX)
    assert (rig.tls.heard, rig.reader.got, hub(gateway)["connected"]) == (b"", [], 0)
    rig.tls.staple = rig.says()
    wait_until(lambda: len(rig.reader.got) == COUNT, 2 * RETRY_S_MAX)
    assert rig.reader.got == list(range(COUNT))
    # One line an error, however often it was dialled.
    assert gateway.log.read_text().count("it is revoked since") == 1
    app.close()


def test_without_require_a_hub_that_staples_nothing_is_believed(rig: Rig) -> None:
    gateway = rig.start("if-stapled")
    app = Client(gateway.port)
    app.publish(COUNT)
    wait_until(lambda: len(rig.reader.got) == COUNT)
    assert rig.reader.got == list(range(COUNT))
    app.close()


def test_a_clock_that_is_not_set_is_said_and_the_hub_is_believed_once_it_is(rig: Rig, tmp_path: Path) -> None:
    rig.tls.staple = rig.says()
    clocks = Clocks(tmp_path)
    clocks.wall(UNSET_S - time.time())
    gateway = rig.start("require", **clocks.environment)
    app = Client(gateway.port)
    app.publish(COUNT)
    wait_until(lambda: "stapled OCSP response is not valid before" in str(hub(gateway)["error"]))
    told = f"clock not set: it says {iso(UNSET_S)[:10]}"
    wait_until(lambda: str(hub(gateway)["error"]).startswith(told), RETRY_S_MAX)
    assert rig.tls.heard == b""
    clocks.wall(0)
    wait_until(lambda: len(rig.reader.got) == COUNT, RETRY_S_MAX)
    assert rig.reader.got == list(range(COUNT))
    app.close()
