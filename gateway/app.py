"""The daemon: puts journal, broker, listeners and hub links together, and takes them down in order.

The composition root: the only module that knows everything, and decides nothing but who gets what.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import resource
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gateway
from gateway import sys_topics
from gateway.access import Access
from gateway.amqp.listener import AmqpListener
from gateway.bridge_flow import release
from gateway.broker import Broker
from gateway.committer import Committer
from gateway.config import Amqp, Config, Listen, Mqtt, load
from gateway.control import ControlServer
from gateway.errors import ConfigError, LinesideError
from gateway.mqtt.connection import Limits
from gateway.mqtt.listener import MqttListener
from gateway.notify import Notifier, set_up_logging
from gateway.transports import Handshakes, ServerTls, TlsFiles, open_server
from gateway.uplink import netlink
from gateway.uplink.hub import HubLink
from security.tls_faults import TLSFileError
from storeforward import maintenance
from storeforward.errors import JournalError, JournalFull
from storeforward.journal import Batch, Journal

if TYPE_CHECKING:
    from gateway.bridge import Bridge

log = logging.getLogger("lineside")

STOP_S_MAX = 4.0
HOUSEKEEPING_S = 5.0
CURSORS_S = 0.25
RATE_S = 1.0


class StartError(LinesideError):
    """The daemon can't start as it is configured."""


class App:
    """One gateway. `start`, then `run` until told to stop."""

    def __init__(self, config_path: Path, config: Config, notifier: Notifier) -> None:
        self.config_path = config_path
        self.config = config
        self._notifier = notifier
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        self._error: JournalError | None = None
        self._began = time.monotonic()
        self._servers: list[asyncio.Server] = []
        self._handshakes: list[Handshakes] = []
        self._certificates: list[ServerTls] = []
        self._hubs: list[HubLink] = []
        self._mqtt: MqttListener | None = None
        self._amqp: AmqpListener | None = None
        self._bridge: Bridge | None = None
        self._netlink: socket.socket | None = None
        self._rates = (0.0, 0.0)
        self._counted = (0, 0)
        self.journal: Journal
        self.broker: Broker
        self.committer: Committer
        self.access: Access

    # ------------------------------------------------------------------ up

    async def start(self) -> None:
        config = self.config
        state_dir = config.gateway.state_dir
        try:
            state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise StartError(f"{state_dir}: {error.strerror}; make it, or set state_dir in [gateway]") from error
        self.journal = Journal.open(state_dir, synchronous=config.gateway.synchronous)
        if self.journal.salvaged:
            log.error("journal salvaged", extra={"report": self.journal.salvaged})
        if config.gateway.synchronous != "FULL":
            log.warning("acknowledged messages may be lost in a power cut: synchronous is not FULL")
        self.broker = Broker(config, self.journal)
        self.access = Access(config)
        self.committer = Committer(self.journal, self._loop, self._committed, self._fatal)
        await self._listen()
        self._start_hubs()
        self._start_bridge()
        self._netlink = netlink.open_socket()
        if self._netlink is not None:
            self._loop.add_reader(self._netlink, self._network)
        self._control = ControlServer(
            state_dir,
            {
                "status": self._status,
                "clients": self._clients,
                "reload": self._reload_command,
                "deadletter-requeue": self._requeue,
                "deadletter-drop": self._drop,
            },
        )
        await self._control.start()
        self.committer.kick()
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, self._stop.set)
        self._loop.add_signal_handler(signal.SIGHUP, self.reload)
        self.broker.schedule = self._schedule_due
        self._housekeeping()
        self._write_cursors()
        self._publish_sys()
        self._measure()
        self._beat()
        # What was made until here lives as long as the daemon: the collector need not look at it again.
        gc.collect()
        gc.freeze()
        # A batch holds a few objects a message; at the default threshold the collector walks them all the time
        # (tests/bench, intake: 1.5 to 2 times as fast so, in every pair).
        gc.set_threshold(20_000, 20, 50)

    async def _listen(self) -> None:
        config = self.config
        mqtt = config.mqtt
        if mqtt is not None:
            limits = Limits(
                packet_max_bytes=mqtt.packet_max_bytes,
                receive_maximum=mqtt.receive_maximum,
                keep_alive_max_s=mqtt.keep_alive_max_s,
                topic_alias_max=mqtt.topic_alias_max,
                topic_alias_send_max=mqtt.topic_alias_max,
                send_window_max=mqtt.send_window,
                retain_available=mqtt.retained,
                wildcards_available=mqtt.wildcards,
            )
            self._mqtt = MqttListener(self.broker, self.committer, limits, mqtt.clients_max, mqtt.session_expiry_max_s)
            self._mqtt.figures = lambda: sys_topics.figures(self._status({}))
            self._mqtt.access = self.access
            await self._serve(self._mqtt.protocol, mqtt, mqtt.clients_max, "mqtt")
        amqp = config.amqp
        if amqp is not None:
            self._amqp = AmqpListener(
                self.broker,
                self.committer.kick,
                container=config.gateway.id,
                connections_max=amqp.connections_max,
                message_max_bytes=amqp.message_max_bytes,
                idle_timeout_s=amqp.idle_timeout_s,
                window=amqp.window,
                access=self.access,
            )
            await self._serve(self._amqp.protocol, amqp, amqp.connections_max, "amqp")

    async def _serve(self, factory: Any, table: Mqtt | Amqp, connections_max: int, what: str) -> None:
        """Open every address of a listener's table. Raises StartError."""
        tls: ServerTls | None = None
        if table.cert is not None and table.key is not None:
            try:
                tls = ServerTls(TlsFiles(table.cert, table.key, table.client_ca, table.asks_for, table.crl))
            except TLSFileError as error:
                raise StartError(f"[{what}] {error}") from error
            self._certificates.append(tls)
        handshakes = Handshakes(connections_max)
        self._handshakes.append(handshakes)
        origins = frozenset(table.ws_origins) if isinstance(table, Mqtt) else frozenset()
        for listen in table.listen:
            make = _over_websocket(factory, listen, origins, handshakes) if listen.websocket else factory
            try:
                self._servers.append(await open_server(make, listen, handshakes, tls))
            except OSError as error:
                raise StartError(
                    f"[{what}] listen {listen}: {error.strerror}; another program may use it, choose another address"
                ) from error
            log.info("listening", extra={"protocol": what, "address": str(listen)})

    def _start_hubs(self) -> None:
        config = self.config
        for hub in config.hubs:
            link = HubLink(
                hub,
                config.gateway.id,
                [o for o in config.outbound if o.hub == hub.name],
                [i for i in config.inbound if i.hub == hub.name],
                self.journal,
                self.committer.kick,
                self.broker.retain_received,
                self.broker.requests,
            )
            self._hubs.append(link)
            link.start()

    def _start_bridge(self) -> None:
        self._bridge = None
        if self.config.bridge is None:
            for name in release(self.journal):
                log.info("no bridge any more: it holds no messages", extra={"stream": name})
            return
        from gateway.bridge import Bridge  # paho is memory that a gateway without a bridge need not spend

        self._bridge = Bridge(self.config, self.broker, self.committer.kick)
        self._bridge.start()

    # ------------------------------------------------------------------ running

    def _committed(self, batch: Batch) -> None:
        self.broker.committed(batch)
        for hub in self._hubs:
            hub.committed()
        if self._amqp is not None:
            self._amqp.committed(batch)
        if self._bridge is not None:
            self._bridge.committed()

    def _fatal(self, error: JournalError) -> None:
        log.critical("the journal can't go on", extra={"error": str(error)})
        self._error = error
        self._stop.set()

    def _network(self) -> None:
        assert self._netlink is not None
        if netlink.drain(self._netlink):
            for hub in self._hubs:
                hub.network_changed()
            if self._bridge is not None:
                self._bridge.network_changed()

    def _housekeeping(self) -> None:
        self.broker.run_due()
        self.broker.trim_sessions()
        if self._amqp is not None:
            self._amqp.housekeeping()
        self.broker.retained.expire(self.journal.age_us())
        self.journal.reclaim()
        if self.journal.pending:
            self.committer.kick()
        self._loop.call_later(HOUSEKEEPING_S, self._housekeeping)

    def _schedule_due(self, delay_s: float) -> None:
        if delay_s < HOUSEKEEPING_S:  # later ones are found in time anyway
            self._loop.call_later(delay_s + 0.001, self._run_due)

    def _run_due(self) -> None:
        self.broker.run_due()
        self.committer.kick()

    def _write_cursors(self) -> None:
        """What clients acknowledged is written a few times a second, not each time."""
        self.broker.caught_up()
        self.journal.write_cursors()
        if self.journal.pending:
            self.committer.kick()
        self._loop.call_later(CURSORS_S, self._write_cursors)

    def _publish_sys(self) -> None:
        if self._mqtt is not None and self.config.mqtt is not None:
            self._mqtt.publish_sys()
            self._loop.call_later(self.config.mqtt.sys_interval_s, self._publish_sys)

    def _measure(self) -> None:
        received = sum(each.received for each in (self._mqtt, self._amqp, self._bridge) if each is not None)
        settled = sum(h.settled for h in self._hubs)
        self._rates = (received - self._counted[0]) / RATE_S, (settled - self._counted[1]) / RATE_S
        self._counted = received, settled
        self._loop.call_later(RATE_S, self._measure)

    def _beat(self) -> None:
        """The watchdog hears from the loop itself: a loop that hangs is a daemon that hangs."""
        interval_s = self._notifier.interval_s
        if interval_s is not None:
            self._notifier.alive()
            self._loop.call_later(interval_s, self._beat)

    def reload(self) -> None:
        """SIGHUP: take the file as it is now, or keep what we have and say what is wrong with it."""
        self._notifier.reloading(time.monotonic_ns() // 1000)
        try:
            self._take_over(load(self.config_path))
        except (ConfigError, JournalError, StartError) as error:
            log.error("configuration not taken; the old one stays", extra={"error": str(error)})
        else:
            log.info("configuration reloaded", extra={"file": str(self.config_path)})
        self._notifier.ready()

    def _take_over(self, config: Config) -> None:
        old = self.config
        fixed = {
            "[gateway] id": old.gateway.id != config.gateway.id,
            "[gateway] state_dir": old.gateway.state_dir != config.gateway.state_dir,
            "[gateway] synchronous": old.gateway.synchronous != config.gateway.synchronous,
            "[mqtt]": old.mqtt != config.mqtt,
            "[amqp]": old.amqp != config.amqp,
        }
        changed = [name for name, differs in fixed.items() if differs]
        if changed:
            raise StartError(f"{', '.join(changed)} can only change with a restart")
        self.config = config
        logging.getLogger().setLevel(config.gateway.log_level.upper())
        self.broker.reload(config)
        self.access.reload(config)
        if self._amqp is not None:
            self._amqp.reload()
        if self._mqtt is not None:
            self._mqtt.rules_changed()
        for tls in self._certificates:
            tls.renew()
        if (old.hubs, old.outbound, old.inbound) != (config.hubs, config.outbound, config.inbound):
            for hub in self._hubs:
                hub.stop()
            self._hubs.clear()
            self._start_hubs()
        bridged = (old.bridge, old.bridge_topics, old.inbound) != (config.bridge, config.bridge_topics, config.inbound)
        if bridged:
            if self._bridge is not None:
                self._bridge.stop()
                self._counted = self._counted[0] - self._bridge.received, self._counted[1]
            self._start_bridge()
        self.committer.kick()

    # ------------------------------------------------------------------ down

    async def run(self) -> int:
        await self._stop.wait()
        self._notifier.stopping()
        log.info("stopping")
        for server in self._servers:
            server.close()
        for handshakes in self._handshakes:
            handshakes.stop()
        if self._bridge is not None:
            self._bridge.stop()
        failed = self._error is not None
        if not failed:
            try:
                async with asyncio.timeout(STOP_S_MAX / 2):
                    await self.committer.drain()  # who waits for an acknowledgement gets it
            except TimeoutError:
                log.error("the disk is too slow to finish the last commit in time")
        if self._bridge is not None:
            await self._bridge.stopped()
        if self._mqtt is not None:
            self._mqtt.stop()
        if self._amqp is not None:
            self._amqp.stop()
        for hub in self._hubs:
            hub.stop()
        await asyncio.sleep(0)
        await self._control.stop()
        if self._netlink is not None:
            self._loop.remove_reader(self._netlink)
            self._netlink.close()
        if not failed:
            try:
                async with asyncio.timeout(STOP_S_MAX / 2):
                    await self.committer.drain()
            except TimeoutError:
                log.error("cursors of the last moment were not stored; some messages will be sent again")
        self.committer.stop()
        self.access.stop()
        if failed:
            log.critical("stopped by a journal error; the next start deals with it", extra={"error": str(self._error)})
            return 1
        try:
            self.journal.close()
        except JournalFull as error:
            log.error("the last cursors were not stored; some messages go again", extra={"error": error.reason})
        log.info("stopped")
        return 0

    # ------------------------------------------------------------------ control commands

    def _status(self, _: dict[str, Any]) -> dict[str, Any]:
        journal = self.journal
        in_flight: dict[str, int] = {}
        for hub in self._hubs:
            in_flight |= hub.in_flight()
        durations = sorted(self.committer.durations_s)
        return {
            "gateway": self.config.gateway.id,
            "version": gateway.__version__,
            "pid": os.getpid(),
            "uptime_s": round(time.monotonic() - self._began, 3),
            "epoch": journal.epoch,
            "mqtt": {
                "listen": [str(a) for a in self.config.mqtt.listen] if self.config.mqtt else [],
                "clients": len(self._mqtt.clients) if self._mqtt else 0,
                "sessions": len(self.broker.sessions),
                "subscriptions": sum(len(s.subscriptions) for s in self.broker.sessions.values()),
                "retained": len(self.broker.retained),
                "received": self._mqtt.received if self._mqtt else 0,
                "sent": self._mqtt.sent if self._mqtt else 0,
            },
            "bridge": self._bridge.describe() if self._bridge is not None else None,
            "hubs": [h.describe() for h in self._hubs],
            "streams": [
                {
                    "name": s.name,
                    "direction": s.direction,
                    "rows": s.rows,
                    "waiting": s.waiting,
                    "bytes": s.size_bytes,
                    "next_seq": s.next_seq,
                    "max_bytes": s.limits.bytes_max,
                    "max_messages": s.limits.messages_max,
                    "in_flight": in_flight.get(s.name, 0),
                }
                for s in journal.streams.values()
            ],
            "rates": {"in_per_s": self._rates[0], "out_per_s": self._rates[1]},
            "disk_full": journal.disk_full,
            "losses": journal.loss_count,
            "dead": journal.dead_count,
            "commit_ms": {"p50": _quantile_ms(durations, 0.5), "p99": _quantile_ms(durations, 0.99)},
            "rss_bytes": _rss_bytes(),
        }

    def _clients(self, _: dict[str, Any]) -> dict[str, Any]:
        connected = [c.describe() for c in self._mqtt.clients] if self._mqtt else []
        if self._amqp is not None:
            connected += [p.describe() for p in self._amqp.peers]
        here = {c["client"] for c in connected}
        away = [
            {"client": s.client_id, "durable": True, "subscriptions": sorted(s.subscriptions)}
            for s in self.broker.sessions.values()
            if s.client_id not in here
        ]
        if self._amqp is not None:
            away += self._amqp.away()
        return {"clients": connected, "away": away}

    def _reload_command(self, _: dict[str, Any]) -> dict[str, Any]:
        self._take_over(load(self.config_path))
        return {}

    def _requeue(self, request: dict[str, Any]) -> dict[str, Any]:
        count = maintenance.requeue(self.journal, [int(i) for i in request.get("ids", [])])
        self.committer.kick()
        return {"count": count}

    def _drop(self, request: dict[str, Any]) -> dict[str, Any]:
        count = maintenance.drop(self.journal, [int(i) for i in request.get("ids", [])])
        self.committer.kick()
        return {"count": count}


def _over_websocket(
    factory: Any, listen: Listen, origins: frozenset[str], handshakes: Handshakes
) -> Callable[[], asyncio.Protocol]:
    # Memory that a gateway without a page to serve need not spend.
    from gateway.mqtt.websocket import Rules
    from gateway.mqtt.websocket_driver import WebSocketProtocol

    rules = Rules(listen.url_path, origins, listen.loopback)
    return lambda: WebSocketProtocol(factory, rules, handshakes)


def _quantile_ms(values: list[float], share: float) -> float:
    return round(values[min(len(values) - 1, int(len(values) * share))] * 1000, 3) if values else 0.0


def _rss_bytes() -> int:
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


async def _run(config_path: Path, config: Config, notifier: Notifier) -> int:
    app = App(config_path, config, notifier)
    await app.start()
    notifier.ready(f"{config.gateway.id}: running")
    return await app.run()


def run_daemon(config_path: Path) -> int:
    """Run until SIGTERM or SIGINT; return the exit status. Raises LinesideError where it can't start."""
    config = load(config_path)
    set_up_logging(getattr(logging, config.gateway.log_level.upper()))
    try:
        return asyncio.run(_run(config_path, config, Notifier.from_environment()))
    except JournalError as error:
        raise StartError(str(error)) from error
