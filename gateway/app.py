"""The daemon: puts journal, broker, listeners and hub links together, and takes them down in order.

The composition root: the only module that knows everything, and decides nothing but who gets what.
"""

from __future__ import annotations

import asyncio
import ctypes
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
from gateway.accepting import Server, open_server
from gateway.access import Access
from gateway.activation import PassedSockets, stored_name
from gateway.amqp.listener import AmqpListener
from gateway.beats import call_at_next
from gateway.bridge_flow import release
from gateway.broker import Broker
from gateway.certificates import Certificates
from gateway.child import ChildError
from gateway.committer import Committer
from gateway.config import Amqp, Config, Listen, Mqtt
from gateway.config_reading import Reading, read
from gateway.control import ControlServer
from gateway.descriptors import exhausted, raise_limit, tell_exhaustion
from gateway.errors import ConfigError, LinesideError
from gateway.mqtt.connection import Limits
from gateway.mqtt.listener import MqttListener
from gateway.notify import Notifier, set_up_logging
from gateway.transports import Handshakes, ServerTls, TlsFiles
from gateway.turns import Turns
from gateway.uplink import netlink
from gateway.uplink.hub import HubLink
from security.admission import REMOTE, Admission, Rate
from security.tls_faults import TLSFileError
from storeforward import maintenance
from storeforward.batch import Batch
from storeforward.durable import make_directories
from storeforward.errors import JournalError, JournalFull
from storeforward.journal import Journal

if TYPE_CHECKING:
    from gateway.bridge import Bridge
    from storeforward.sealing import Seal

log = logging.getLogger("lineside")

STOP_S_MAX = 4.0
HOUSEKEEPING_S = 5.0
CURSORS_S = 0.25
RECLAIM_TICKS = 4  # of CURSORS_S: so often what nobody needs is deleted, few as it may be
RATE_S = 1.0


def _give_back() -> None:
    """What starting took and freed goes back to the system (glibc's malloc_trim(3)): 2 MB that would stay resident."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # other C libraries have no such call, and some need none
        trim(0)


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
        self._passed = PassedSockets.from_environment()
        self._servers: list[Server] = []
        self._handshakes: list[Handshakes] = []
        self._turns = Turns(self._loop)
        self._certificates: list[ServerTls] = []
        self._hubs: list[HubLink] = []
        self._mqtt: MqttListener | None = None
        self._amqp: AmqpListener | None = None
        self._bridge: Bridge | None = None
        self._netlink: socket.socket | None = None
        self._rates = (0.0, 0.0)
        self._counted = (0, 0)
        self._until_reclaim = RECLAIM_TICKS
        self._reading = asyncio.Lock()  # what is read last is what counts
        self._reload_asked = False
        self._reloading: asyncio.Task[None] | None = None
        self.journal: Journal
        self.broker: Broker
        self.committer: Committer
        self.access: Access
        self.certificates = Certificates(config, self._dial_now)

    # ------------------------------------------------------------------ up

    async def start(self) -> None:
        config = self.config
        state_dir = config.gateway.state_dir
        try:
            make_directories(state_dir)
        except OSError as error:
            raise StartError(f"{state_dir}: {error.strerror}; make it, or set state_dir in [gateway]") from error
        with self._notifier.starting():
            self.journal = Journal.open(
                state_dir, synchronous=config.gateway.synchronous, seal=_keyring(config.gateway.encryption_keys)
            )
        if self.journal.seal is not None:
            log.info("journal encrypted", extra={"keys": list(self.journal.seal.ids)})
        if self.journal.salvaged:
            log.error("journal salvaged", extra={"report": self.journal.salvaged})
        if config.gateway.synchronous != "FULL":
            log.warning("acknowledged messages may be lost in a power cut: synchronous is not FULL")
        self.broker = Broker(config, self.journal)
        self.access = Access(config)
        self.committer = Committer(self.journal, self._loop, self._committed, self._fatal)
        self.committer.on_offered = self._offered
        self._turns.helpings.journal = self.journal
        self.certificates.start()
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
                "network-changed": self._network_command,
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
        _give_back()
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
            self._mqtt = MqttListener(
                self.broker, self.committer, limits, mqtt.clients_max, mqtt.session_expiry_max_s, self._turns
            )
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
                turns=self._turns,
            )
            await self._serve(self._amqp.protocol, amqp, amqp.connections_max, "amqp")
        self._passed.close_rest(self._notifier.forget)

    async def _serve(self, factory: Any, table: Mqtt | Amqp, connections_max: int, what: str) -> None:
        """Open every address of a listener's table. Raises StartError."""
        tls: ServerTls | None = None
        if table.cert is not None and table.key is not None:
            try:
                files = TlsFiles(
                    table.cert, table.key, table.client_ca, table.asks_for, table.crl, table.key_password_file
                )
                tls = ServerTls(files)
            except TLSFileError as error:
                raise StartError(f"[{what}] {error}") from error
            self._certificates.append(tls)
        share = table.connect_rate / REMOTE.per_s
        remote = Rate(table.connect_rate, max(1.0, REMOTE.burst * share))
        handshakes = Handshakes(connections_max, Admission(self._loop.time(), remote), self._turns)
        self._handshakes.append(handshakes)
        origins = frozenset(table.ws_origins) if isinstance(table, Mqtt) else frozenset()
        for listen in table.listen:
            make = _over_websocket(factory, listen, origins, handshakes) if listen.websocket else factory
            passed = self._passed.take(listen)
            try:
                self._servers.append(await open_server(make, listen, handshakes, tls, passed))
            except OSError as error:
                raise StartError(
                    f"[{what}] listen {listen}: {error.strerror}; another program may use it, choose another address"
                ) from error
            for sock in self._servers[-1].sockets:
                self._notifier.store(sock.fileno(), stored_name(listen))
            fact = {"protocol": what, "address": str(listen)} | ({"from": "systemd"} if passed else {})
            log.info("listening", extra=fact)

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
                self.certificates.clock_doubt,
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
        turns = self._turns
        began_s = turns.cpu()
        turns.helpings.committed(self.committer.durations_s[-1])
        self.broker.committed(batch)
        for hub in self._hubs:
            hub.committed()
        if self._amqp is not None:
            self._amqp.committed(batch)
        if self._bridge is not None:
            self._bridge.committed()
        if batch.appended:
            turns.messages(turns.cpu() - began_s, staged=False)

    def _offered(self) -> None:
        for hub in self._hubs:
            hub.committed()

    def _fatal(self, error: JournalError) -> None:
        if self._error is None:  # each reader that comes by a damaged page tells
            log.critical("the journal can't go on", extra={"error": str(error)})
            self._error = error
        self._stop.set()

    def _network(self) -> None:
        assert self._netlink is not None
        if netlink.drain(self._netlink):
            self._dial_now()

    def _dial_now(self) -> None:
        """Whatever was waited for: something has changed, and what failed may succeed."""
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
        self._until_reclaim -= 1
        if not self._until_reclaim:
            self._until_reclaim = RECLAIM_TICKS
            off_s = self.journal.count_time_off()
            if off_s:
                log.info("clock right: the time off counts for what was here before", extra={"off_s": off_s})
            self.journal.reclaim()
        if self.journal.pending:
            self.committer.kick()
        call_at_next(self._loop, CURSORS_S, self._write_cursors)

    def _publish_sys(self) -> None:
        if self._mqtt is not None and self.config.mqtt is not None:
            self._mqtt.publish_sys()
            self._loop.call_later(self.config.mqtt.sys_interval_s, self._publish_sys)

    def _measure(self) -> None:
        received = sum(each.received for each in (self._mqtt, self._amqp, self._bridge) if each is not None)
        settled = sum(h.settled for h in self._hubs)
        self._rates = (received - self._counted[0]) / RATE_S, (settled - self._counted[1]) / RATE_S
        self._counted = received, settled
        call_at_next(self._loop, RATE_S, self._measure)

    def _beat(self) -> None:
        """The watchdog hears from the loop itself: a loop that hangs is a daemon that hangs."""
        interval_s = self._notifier.interval_s
        if interval_s is not None:
            self._notifier.alive()
            self._loop.call_later(interval_s, self._beat)

    def reload(self) -> None:
        """SIGHUP: take the file as it is now, or keep what we have and say what is wrong with it."""
        self._notifier.reloading(time.monotonic_ns() // 1000)
        self._reload_asked = True
        if self._reloading is None or self._reloading.done():
            self._reloading = self._loop.create_task(self._reload())

    async def _reload(self) -> None:
        while self._reload_asked:  # once more if it was asked for while the file was being read
            self._reload_asked = False
            try:
                await self._read_and_take_over()
            except (ConfigError, ChildError, JournalError, StartError) as error:
                log.error("configuration not taken; the old one stays", extra={"error": str(error)})
            else:
                log.info("configuration reloaded", extra={"file": str(self.config_path)})
        self._notifier.ready()

    async def _read_and_take_over(self) -> None:
        async with self._reading:
            config = await read(self.config_path)
            if self._stop.is_set():
                raise StartError("the gateway is stopping")
            self._take_over(config)

    def _take_over(self, config: Config) -> None:
        old = self.config
        fixed = {
            "[gateway] encryption_keys": old.gateway.encryption_keys != config.gateway.encryption_keys,
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
        self.certificates.reload(config)
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
            self.journal.stop_holding()
            try:
                async with asyncio.timeout(STOP_S_MAX / 2):
                    await self.committer.flush()  # who waits for an acknowledgement now gets it
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
        self._turns.stop()
        self.committer.stop()
        self.access.stop()
        self.certificates.stop()
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
        outbound: dict[str, dict[str, Any]] = {}
        for hub in self._hubs:
            outbound |= hub.streams()
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
                    "in_flight": 0,
                    "unwritten": 0 if s.unwritten is None else s.unwritten.rows,
                    "never_written": 0 if s.unwritten is None else s.unwritten.spared,
                    **outbound.get(s.name, {}),
                }
                for s in journal.streams.values()
            ],
            "rates": {"in_per_s": self._rates[0], "out_per_s": self._rates[1]},
            "disk_full": journal.disk_full,
            "losses": journal.loss_count,
            "dead": journal.dead_count,
            "commit_ms": {"p50": _quantile_ms(durations, 0.5), "p99": _quantile_ms(durations, 0.99)},
            "rss_bytes": _rss_bytes(),
            "written_bytes": _written_bytes(),
        } | self.certificates.status()

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

    async def _reload_command(self, _: dict[str, Any]) -> dict[str, Any]:
        await self._read_and_take_over()
        return {}

    def _network_command(self, _: dict[str, Any]) -> dict[str, Any]:
        """From who knows of the line what this machine's kernel does not: a router's hook, a simulation."""
        self._dial_now()
        return {}

    def _requeue(self, request: dict[str, Any]) -> dict[str, Any]:
        count = maintenance.requeue(self.journal, [int(i) for i in request.get("ids", [])])
        self.committer.kick()
        return {"count": count}

    def _drop(self, request: dict[str, Any]) -> dict[str, Any]:
        count = maintenance.drop(self.journal, [int(i) for i in request.get("ids", [])])
        self.committer.kick()
        return {"count": count}


def _keyring(files: tuple[Path, ...]) -> Seal | None:
    """What encrypts the journal. Raises StartError."""
    if not files:
        return None
    from security.atrest import KeyFileError, Keyring, read_key  # memory that a plain journal need not spend

    try:
        return Keyring([read_key(file) for file in files])
    except KeyFileError as error:
        raise StartError(
            f"[gateway] encryption_keys: {error}; the journal was not touched, and is not opened without its key"
        ) from error


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


def _written_bytes() -> int | None:
    """What this process has had written to disks since it started, in the kernel's pages; None where it can't tell."""
    try:
        with open("/proc/self/io", encoding="ascii") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("write_bytes:"))
    except (OSError, StopIteration):
        return None


async def _run(config_path: Path, config: Config, notifier: Notifier) -> int:
    tell_exhaustion(asyncio.get_running_loop())
    app = App(config_path, config, notifier)
    await app.start()
    notifier.ready(f"{config.gateway.id}: running")
    return await app.run()


def run_daemon(config_path: Path, reading: Reading) -> int:
    """Run until SIGTERM or SIGINT; return the exit status. Raises LinesideError where it can't start.

    `reading`: that of the same file, which a reload reads again.
    """
    config = reading.config()
    set_up_logging(getattr(logging, config.gateway.log_level.upper()))
    listeners = (config.mqtt and config.mqtt.clients_max, config.amqp and config.amqp.connections_max)
    raise_limit(2 * sum(each or 0 for each in listeners))  # as many again may be in their handshake
    try:
        return asyncio.run(_run(config_path, config, Notifier.from_environment()))
    except JournalError as error:
        raise StartError(str(error)) from error
    except OSError as error:
        if not exhausted(error):
            raise
        raise StartError("no more files can be opened: raise `ulimit -n` (LimitNOFILE= of a unit)") from error
