"""Fixtures that many tests share: a small PKI, and real brokers, started once a run and only if asked for.

A broker that isn't here skips its tests with the reason; under CI=true, where all are meant to be, it fails them.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import paho.mqtt.client as paho
from paho.mqtt.enums import MQTTErrorCode

from gateway.simulate import cutmount
from gateway.simulate.cutmount import CutMount
from tests import parts
from tests.pki import Pki


def _loop_stop(client: paho.Client) -> MQTTErrorCode:
    """paho's own looks twice at its thread, which forgets itself as it ends: seen to break a test's end."""
    thread = client._thread
    if thread is None:
        return MQTTErrorCode.MQTT_ERR_INVAL
    client._thread_terminate = True
    if threading.current_thread() is not thread:
        thread.join()
    return MQTTErrorCode.MQTT_ERR_SUCCESS


paho.Client.loop_stop = _loop_stop  # type: ignore[method-assign]


def require(name: str) -> None:
    """Skip, or under CI=true fail, where the part `name` can't be started here."""
    reason = parts.available(name)
    if reason is not None:
        missing(reason)


def missing(reason: str) -> NoReturn:
    """Skip, or under CI=true fail."""
    if os.environ.get("CI", "").lower() in ("true", "1"):
        pytest.fail(f"{reason} (and CI is set)")
    pytest.skip(reason)


def require_fuse() -> None:
    """As `require`, for disks that lose power; where the machine itself forbids them, they skip under CI, too."""
    require("fuse")
    reason = cutmount.missing()
    if reason is not None:
        pytest.skip(reason)


@pytest.fixture
def cut_disk(tmp_path: Path) -> Iterator[CutMount]:
    require_fuse()
    with CutMount(tmp_path / "cut") as mounted:
        yield mounted


@pytest.fixture(scope="session")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return Pki(tmp_path_factory.mktemp("pki"))


@pytest.fixture(scope="session")
def other_pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    """An authority that nobody in the other one's world trusts."""
    return Pki(tmp_path_factory.mktemp("other-pki"), name="Somebody else's CA")


@pytest.fixture(scope="session")
def artemis(pki: Pki) -> Iterator[parts.Artemis]:
    require("artemis")
    with parts.Artemis(ca=pki.ca, server=pki.server) as part:
        yield part


@pytest.fixture(scope="session")
def rabbitmq(pki: Pki) -> Iterator[parts.RabbitMQ]:
    require("rabbitmq")
    with parts.RabbitMQ(ca=pki.ca, server=pki.server, client=pki.client) as part:
        yield part


@pytest.fixture(scope="session")
def mosquitto() -> Iterator[parts.Mosquitto]:
    require("mosquitto")
    with parts.Mosquitto() as part:
        yield part


@pytest.fixture(scope="session")
def toxiproxy() -> Iterator[parts.Toxiproxy]:
    require("toxiproxy")
    with parts.Toxiproxy() as part:
        yield part
