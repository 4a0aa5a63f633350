"""Who may import whom, read from the source itself: dependencies point one way, and protocol cores stay pure."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NETWORK = {"asyncio", "socket", "socketserver", "selectors", "ssl"}
PURE = [
    "storeforward/batch.py",
    "storeforward/opening.py",
    "storeforward/reading.py",
    "gateway/bridge_flow.py",
    "gateway/mqtt/codec.py",
    "gateway/mqtt/connection.py",
    "gateway/mqtt/events.py",
    "gateway/mqtt/packets.py",
    "gateway/mqtt/subscribing.py",
    "gateway/mqtt/topics.py",
    "gateway/mqtt/websocket.py",
    "gateway/amqp/engine.py",
    "gateway/amqp/frames.py",
    "gateway/amqp/events.py",
    "gateway/amqp/termini.py",
    "gateway/amqp/raw.py",
    "gateway/amqp/sasl.py",
    "gateway/amqp/message.py",
    "gateway/groups.py",
    "gateway/amqp/addresses.py",
    "gateway/amqp/directory.py",
    "gateway/amqp/incoming.py",
    "gateway/amqp/outgoing.py",
    "gateway/uplink/state.py",
    "gateway/uplink/drain.py",
    "gateway/uplink/intake.py",
    "security/rules.py",
    "security/filters.py",
    "security/attempts.py",
    "security/admission.py",
]


def sources(*packages: str) -> list[Path]:
    found = sorted(path for package in packages for path in (ROOT / package).rglob("*.py"))
    assert found
    return found


def imports(path: Path) -> set[str]:
    """Every module a file imports, wherever in it; of `from a import b` both `a` and `a.b`."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            assert node.module is not None
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def packages(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imports(path)}


@pytest.mark.parametrize("path", sources("storeforward", "security"), ids=lambda p: str(p.relative_to(ROOT)))
def test_lower_layers_know_nothing_of_the_gateway_nor_of_one_another(path: Path) -> None:
    own = path.relative_to(ROOT).parts[0]
    assert not packages(path) & ({"gateway", "storeforward", "security"} - {own})


@pytest.mark.parametrize("path", sources("storeforward"), ids=lambda p: str(p.relative_to(ROOT)))
def test_the_journal_knows_no_network(path: Path) -> None:
    assert not packages(path) & NETWORK


@pytest.mark.parametrize("path", sources("security"), ids=lambda p: str(p.relative_to(ROOT)))
def test_only_the_gateway_has_sockets_and_a_loop(path: Path) -> None:
    assert not packages(path) & {"asyncio", "socket", "socketserver", "selectors"}


@pytest.mark.parametrize("name", PURE)
def test_a_protocol_core_has_no_socket_no_loop_and_no_clock(name: str) -> None:
    assert not packages(ROOT / name) & (NETWORK | {"time", "datetime"})


@pytest.mark.parametrize("name", PURE)
def test_a_protocol_core_imports_no_driver(name: str) -> None:
    drivers = {
        "gateway.amqp.driver",
        "gateway.amqp.listener",
        "gateway.bridge",
        "gateway.mqtt.listener",
        "gateway.uplink.attempt",
        "gateway.uplink.hub",
    }
    assert not imports(ROOT / name) & drivers


def test_nobody_below_the_commands_imports_the_commands() -> None:
    for path in sources("gateway"):
        inside = path.relative_to(ROOT)
        if inside.parts[1] != "cli" and inside.name != "__main__.py":
            assert not [name for name in imports(path) if name.startswith("gateway.cli")], inside


def test_listeners_and_uplink_do_not_import_the_app() -> None:
    for path in sources("gateway/mqtt", "gateway/amqp", "gateway/uplink"):
        assert not [name for name in imports(path) if name in ("gateway.app", "gateway.demo")], path


def test_only_those_who_read_a_configuration_import_what_checks_it() -> None:
    """The daemon has it read by `config_reading`, in another process: pydantic is a quarter of what it would hold."""
    checking = {f"gateway.config_{name}" for name in ("schema", "fields", "report", "checks")}
    checking |= {"gateway.config.load", "gateway.config.loads", "pydantic", "pydantic_core"}
    readers = {str(path.relative_to(ROOT)) for path in sources("gateway") if imports(path) & checking}
    own = {f"gateway/config{name}.py" for name in ("", "_schema", "_fields", "_report", "_checks", "_child")}
    commands = {f"gateway/cli/{name}.py" for name in ("check", "client", "output")}
    assert readers == own | commands | {"gateway/simulate/scenario.py"}
