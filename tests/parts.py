"""Starts real brokers for tests: those of gateway/bench/brokers.py, and Toxiproxy.

Knows where parts are, and which are missing, from deploy/parts.py.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from gateway.bench.brokers import (
    HOST,
    Artemis,
    Mosquitto,
    Nats,
    Part,
    PartError,
    RabbitMQ,
    _speaks_amqp,
    accepts,
    free_port,
)

if TYPE_CHECKING:
    from toxiproxy import Toxiproxy as ToxiproxyClient

__all__ = [
    "HOST", "Artemis", "Mosquitto", "Nats", "Part", "PartError", "RabbitMQ", "Toxiproxy", "_speaks_amqp", "accepts",
    "activemq_home", "available", "browser", "free_port", "mqttjs", "qpid_jms_lib", "rhea_modules",
]  # fmt: skip


def _deploy_parts() -> ModuleType:
    path = Path(__file__).resolve().parent.parent / "deploy" / "parts.py"
    spec = importlib.util.spec_from_file_location("lineside_deploy_parts", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


_deployed = _deploy_parts()


def available(name: str) -> str | None:
    """None where the part can be started here, otherwise the reason why it can't."""
    reason = _deployed.missing(name)
    return None if reason is None else str(reason)


def activemq_home() -> Path:
    """ActiveMQ Classic's own directory."""
    return Path(_deployed.activemq_home())


def mqttjs() -> Path:
    """mqtt.js as a browser loads it."""
    return Path(_deployed.mqttjs())


def browser() -> str:
    """The path of a Chromium."""
    found = _deployed.browser()
    assert found is not None
    return str(found)


def qpid_jms_lib() -> Path:
    return Path(_deployed.qpid_jms_lib())


def rhea_modules() -> Path:
    return Path(_deployed.rhea_modules())


class Toxiproxy(Part):
    """Links that fail on command. `link` makes one; `client` is the client library's own object.

    That library keeps the server's address in a global, so one Toxiproxy a process.
    """

    name = "toxiproxy"

    def __init__(self, directory: Path | None = None) -> None:
        super().__init__(directory)
        self.port = free_port()

    def ready(self) -> bool:
        return accepts(self.port)

    def command(self) -> list[str]:
        return [str(_deployed.toxiproxy_server()), "-host", HOST, "-port", str(self.port)]

    def environment(self) -> dict[str, str]:
        return {"LOG_LEVEL": "warn"}

    @property
    def client(self) -> ToxiproxyClient:
        from toxiproxy import Toxiproxy as ToxiproxyClient

        client = ToxiproxyClient()
        client.update_api_consumer(HOST, self.port)
        return client
