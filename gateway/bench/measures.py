"""The measures of `lineside bench`: each a function that yields rows. In turns: ours, each peer, ours, each peer.

Every round has a fresh broker, except of those that start for seconds, which live for one case. Servers are bound to
all processors but the last, the clients to the last, where there are two or more. Peers run on loopback only, each run
is bounded in time, and all end with this process (gateway/bench/brokers.py).
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gateway.bench import load, peers
from gateway.bench.brokers import Mosquitto, Part, PartError, free_port
from gateway.bench.daemon import ROOT, Certificates, Daemon, exact_cpu_s, group, group_cpu_s, issue, memory_bytes
from gateway.bench.filling import fill
from gateway.bench.peers import OURS, Peer, Unavailable, own_environment
from gateway.bench.resume import alarm, backlog
from gateway.bench.resume import resume as resume_run
from gateway.bench.rows import Row, ratio
from gateway.bench.targets import HEADLINE, SINGLE
from gateway.errors import LinesideError
from storeforward.errors import JournalError

CLIENT_S_MAX = 300.0
DRAINED_S_MAX = 60.0
SETTLE_S = 1.0
IDLE_S = 10.0
SLOW_SYNC_S = 0.02
SOCKETS_SPARE = 64
REASON_MAX = 160
TROUBLE = (load.LoadError, PartError, LinesideError, Unavailable, OSError, subprocess.TimeoutExpired, JournalError)

RULES = """
[[access]]
who = "*"
deny = true
publish = "bench/brake/#"
[[access]]
who = ["client:none", "cn:*.apps.example"]
publish = "other/{client}/#"
[[access]]
who = "*"
publish = ["bench/#", "train/{client}/#"]
[[outbound]]
stream = "alarms"
topics = ["alarm/#", "+/alarm"]
hub = "depot"
address = "edge.alarms"
[[outbound]]
stream = "doors"
topics = ["train/+/doors/#"]
hub = "depot"
address = "edge.doors"
"""
ACL = "topic deny bench/brake/#\ntopic readwrite bench/#\npattern write train/%c/#\n"


@dataclass(frozen=True, slots=True)
class Scale:
    """How much of it."""

    rounds: int = 3
    seconds: float = 2.0
    warm_s: float = 0.5
    drain_messages: int = 100_000
    start_rows: tuple[int, ...] = (0, 100_000, 1_000_000, 10_000_000)
    queued_rows: int = 1_000_000
    sessions: int = 1000
    cuts: int = 20
    idle_s: float = IDLE_S
    wide: bool = True  # all sizes, windows and numbers of clients
    peers: bool = True


QUICK = Scale(
    rounds=1, seconds=1.0, start_rows=(0, 100_000, 1_000_000), queued_rows=200_000, cuts=5, idle_s=4.0, wide=False
)


@dataclass(frozen=True, slots=True)
class Bench:
    """Where, with what, and how much; `say` tells a person what is being done."""

    directory: Path
    pki: Certificates
    scale: Scale
    say: Callable[[str], None]

    def place(self, name: str) -> Path:
        """An empty directory."""
        path = self.directory / name
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        return path


@dataclass(frozen=True, slots=True)
class Case:
    size_bytes: int = 100
    clients: int = 4
    window: int = 200
    version: int = 4
    properties: bool = False
    peers: tuple[str, ...] | None = None  # None: all

    @property
    def name(self) -> str:
        size = f"{self.size_bytes} B" if self.size_bytes < 1024 else f"{self.size_bytes // 1024} KB"
        return f"{size}, {self.clients} × {self.window}"


@dataclass(frozen=True, slots=True)
class Round:
    per_s: float
    cpu_us: float
    p50_ms: float | None
    p99_ms: float | None


# ------------------------------------------------------------------ processes


def processors() -> tuple[set[int], set[int]]:
    """For servers, and for clients."""
    have = sorted(os.sched_getaffinity(0))
    return (set(have[:-1]), {have[-1]}) if len(have) > 1 else (set(have), set(have))


def _bind(pid: int, cpus: set[int]) -> None:
    """All processes of its group, and all threads there are; later ones have it from those that start them."""
    for each in group(pid):
        with contextlib.suppress(ProcessLookupError, FileNotFoundError):
            for task in Path(f"/proc/{each}/task").iterdir():
                os.sched_setaffinity(int(task.name), cpus)


def run_client(module: str, *arguments: object, timeout_s: float = CLIENT_S_MAX) -> dict[str, Any]:
    """A module of this package in a process of its own, that prints one JSON line. Raises LoadError."""
    with _client(module, *arguments) as process:
        return _result(process, timeout_s)


@contextlib.contextmanager
def _client(module: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", f"gateway.bench.{module}", *map(str, arguments)]
    with _process(command, own_environment()) as process:
        yield process


@contextlib.contextmanager
def _process(command: list[str], environment: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    os.sched_setaffinity(process.pid, processors()[1])
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def _result(process: subprocess.Popen[str], timeout_s: float = CLIENT_S_MAX) -> dict[str, Any]:
    out, err = process.communicate(timeout=timeout_s)
    if process.returncode or not out.strip():
        said = err.strip().splitlines()
        raise load.LoadError(said[-1] if said else f"ended with status {process.returncode} and said nothing")
    found: dict[str, Any] = json.loads(out.strip().splitlines()[-1])
    return found


@contextlib.contextmanager
def _running(peer: Peer, directory: Path) -> Iterator[Part]:
    with peer.make(directory) as part:
        _bind(part.pid, processors()[0])
        yield part


def _publish(part: Part, case: Case, scale: Scale, messages: int | None = None) -> Round:
    options = ["--connections", case.clients, "--window", case.window, "--size-bytes", case.size_bytes]
    options += ["--version", case.version, *(["--properties"] if case.properties else [])]
    options += ["--messages", messages] if messages else ["--seconds", scale.seconds, "--warm-s", scale.warm_s]
    return _timed(part, "load", peers.mqtt_port(part), *options)


def _send(part: Part, case: Case, scale: Scale) -> Round:
    port, address = peers.amqp_target(part)
    options = ["--address", address, "--connections", case.clients, "--window", case.window]
    options += ["--size-bytes", case.size_bytes, "--seconds", scale.seconds, "--warm-s", scale.warm_s]
    return _timed(part, "amqp_load", port, *options)


def _timed(part: Part, module: str, *options: object) -> Round:
    before_s = group_cpu_s(part.pid)
    found = run_client(module, *options)
    used_s = group_cpu_s(part.pid) - before_s
    return Round(found["per_s"], used_s / max(1, found["acknowledged_in_all"]) * 1e6, found["p50_ms"], found["p99_ms"])


# ------------------------------------------------------------------ in turns


def in_turns(
    bench: Bench,
    measure: str,
    case: Case,
    contenders: Sequence[Peer],
    drive: Callable[[Part, Case, Scale], Round],
    unit: str = "/s",
) -> Iterator[Row]:
    """Rounds of all contenders in turns, the first of them ours; one row each, with ratios by pairs of rounds."""
    found: dict[str, list[Round]] = {peer.name: [] for peer in contenders}
    skipped = {peer.name: peer.missing for peer in contenders if peer.missing}
    with contextlib.ExitStack() as stack:
        kept: dict[str, Part] = {}
        for number in range(bench.scale.rounds):
            for peer in contenders:
                if peer.name in skipped:
                    continue
                bench.say(f"{measure}: {case.name}, {peer.name}, round {number + 1} of {bench.scale.rounds}")
                try:
                    if peer.name in kept:
                        found[peer.name].append(drive(kept[peer.name], case, bench.scale))
                        continue
                    place = bench.place(f"{measure}-{peer.name.replace(', ', '-').replace(' ', '-')}")
                    if peer.slow:
                        kept[peer.name] = stack.enter_context(_prepared(peer, place))
                        found[peer.name].append(drive(kept[peer.name], case, bench.scale))
                        continue
                    with _prepared(peer, place) as part:
                        found[peer.name].append(drive(part, case, bench.scale))
                    shutil.rmtree(place, ignore_errors=True)
                except TROUBLE as error:
                    skipped[peer.name] = _reason(error)
    ours = [each.per_s for each in found[contenders[0].name]]
    for peer in contenders:
        yield _row(measure, case.name, peer, unit, found[peer.name], ours, skipped.get(peer.name))


@contextlib.contextmanager
def _prepared(peer: Peer, place: Path) -> Iterator[Part]:
    with _running(peer, place) as part:
        if peer.queues:
            load.offline_session("127.0.0.1", peers.mqtt_port(part), "away", "bench/#")
        yield part


def _row(
    measure: str, case: str, peer: Peer, unit: str, rounds: list[Round], ours: list[float], skipped: str | None
) -> Row:
    rates = tuple(each.per_s for each in rounds)
    row = Row(measure, case, peer.name, unit, rates, peer.durability, skipped=skipped)
    if not rounds:
        return row
    middle = sorted(rounds, key=lambda each: each.per_s)[len(rounds) // 2]
    return replace(
        row,
        p50_ms=middle.p50_ms,
        p99_ms=middle.p99_ms,
        cpu_us=middle.cpu_us,
        ratio=ratio(ours, rates) if peer.name != OURS else None,
    )


def _chosen(peers_: list[Peer], case: Case, scale: Scale) -> list[Peer]:
    if not scale.peers:
        return []
    return [peer for peer in peers_ if case.peers is None or peer.name in case.peers]


# ------------------------------------------------------------------ measures


def intake(bench: Bench) -> Iterator[Row]:
    """MQTT QoS 1 messages acknowledged a second, with latencies; nobody drains."""
    few = ("mosquitto",)
    cases = [Case()]
    if bench.scale.wide:
        cases += [Case(clients=n, peers=few) for n in (1, 50, 500)]
        cases += [Case(size_bytes=n, peers=few) for n in (1024, 65536)]
        cases += [Case(clients=n, window=1, peers=few) for n in (1, 4, 50, 500)]
        cases += [Case(size_bytes=n, window=1, peers=few) for n in (1024, 65536)]
    for case in cases:
        ours = peers.lineside(bench.pki)
        yield from in_turns(bench, "intake", case, [ours, *_chosen(peers.mqtt_peers(), case, bench.scale)], _publish)


def amqp_intake(bench: Bench) -> Iterator[Row]:
    """The same for AMQP 1.0: durable messages accepted a second."""
    cases = [Case()]
    if bench.scale.wide:
        cases += [Case(clients=n, peers=()) for n in (1, 50, 500)]
        cases += [Case(size_bytes=n, peers=()) for n in (1024, 65536)]
        cases += [Case(clients=n, window=1, peers=()) for n in (1, 50)]
    for case in cases:
        ours = peers.lineside(bench.pki, amqp=True)
        yield from in_turns(bench, "amqp-intake", case, [ours, *_chosen(peers.amqp_peers(), case, bench.scale)], _send)


def latency(bench: Bench) -> Iterator[Row]:
    """One client, one message at a time, beside the disk's own fdatasync of one block."""
    from gateway.simulate.disk import measure_syncs

    case = Case(clients=1, window=1, peers=("mosquitto",))
    assert case.name == SINGLE
    before = measure_syncs(bench.place("syncs"))
    contenders = [peers.lineside(bench.pki), *_chosen(peers.mqtt_peers(), case, bench.scale)]
    yield from in_turns(bench, "latency", case, contenders, _publish)
    after = measure_syncs(bench.place("syncs"))
    p50, p99 = ((getattr(before, name) + getattr(after, name)) / 2 for name in ("median_s", "p99_s"))
    rate = 1 / p50 if p50 else 0.0
    yield Row("latency", SINGLE, "fdatasync", "/s", (rate,), "the disk itself", p50 * 1000, p99 * 1000)


def rules(bench: Bench) -> Iterator[Row]:
    """MQTT 5.0 with properties, three access rules and three routes, beside Mosquitto with a file of rules."""
    case = Case(version=5, properties=True, peers=("mosquitto",))

    def mosquitto(directory: Path) -> Part:
        (directory / "acl").write_text(ACL)
        return Mosquitto(f"{peers.MOSQUITTO}acl_file {{directory}}/acl\n", directory=directory)

    theirs = [replace(each, make=mosquitto) for each in _chosen(peers.mqtt_peers(), case, bench.scale)]
    yield from in_turns(
        bench, "rules", case, [peers.lineside(bench.pki, mqtt="allow_anonymous = true", more=RULES), *theirs], _publish
    )


def sealed(bench: Bench) -> Iterator[Row]:
    """Intake into a journal that is encrypted, beside one that is not. Ours are both."""
    key = bench.directory / "journal-key"
    key.touch(0o600)
    key.write_text(f"{secrets.token_hex(32)}\n")
    option = f'encryption_keys = ["{key}"]'
    contenders = [
        Peer(OURS, "after fsync, AES-256-GCM", lambda d: Daemon(bench.pki, 1, d, gateway=option), queues=False),
        replace(peers.lineside(bench.pki), name="not encrypted"),
    ]
    for case in [Case(), Case(size_bytes=1024)]:
        yield from in_turns(bench, "sealed", case, contenders, _publish)


def growth(bench: Bench) -> Iterator[Row]:
    """Intake with a backlog, beside intake into an empty journal. Ours are both."""
    case = Case()
    full = bench.place("full")
    fill(full, bench.scale.queued_rows, bench.say)

    def filled(directory: Path) -> Part:
        return Daemon(bench.pki, 1, directory, state_dir=full)

    contenders = [
        Peer(OURS, f"{bench.scale.queued_rows:,} rows queued", filled, queues=False),
        replace(peers.lineside(bench.pki), name="empty"),
    ]
    for row in in_turns(bench, "growth", case, contenders, _publish):
        yield replace(row, case=f"{row.case}, {bench.scale.queued_rows:,} rows")
    shutil.rmtree(full, ignore_errors=True)


def slow_disk(bench: Bench) -> Iterator[Row]:
    """Intake where syncs take 20 ms longer, beside a raw file behind the same wire that is synced once a batch."""
    case = Case()
    try:
        contenders = peers.on_slow_disk(bench.pki, bench.place("slow"), SLOW_SYNC_S)
    except Unavailable as error:
        yield Row("slow-disk", case.name, OURS, "/s", skipped=str(error))
        return
    for row in in_turns(bench, "slow-disk", case, contenders, _publish):
        if row.p50_ms is not None and row.p50_ms < SLOW_SYNC_S * 1000:
            yield Row("slow-disk", case.name, row.who, "/s", skipped="its syncs could not be made slow")
        else:
            yield row


def _receiver(bench: Bench, port: int, messages: int) -> contextlib.AbstractContextManager[subprocess.Popen[str]]:
    pki = bench.pki
    files = ["--cert", pki.server.cert, "--key", pki.server.key, "--ca", pki.ca]
    return _client("receiver", "--port", port, "--expect", messages, *files)


def _one_drain(bench: Bench, name: str) -> Round:
    port, count = free_port(), bench.scale.drain_messages
    with Daemon(bench.pki, port, bench.place(name)) as daemon:
        _bind(daemon.pid, processors()[0])
        _publish(daemon, Case(), bench.scale, messages=count)
        before_s = group_cpu_s(daemon.pid)
        with _receiver(bench, port, count) as receiver:
            report = _result(receiver)
        if report["missing"] or report["repeated"] or report["reordered"]:
            raise load.LoadError(f"a promise broke in the drain: {report}")
        return Round(report["per_s"], (group_cpu_s(daemon.pid) - before_s) / count * 1e6, None, None)


def drain(bench: Bench) -> Iterator[Row]:
    """A full journal to our own receiver over mutual TLS; beside it C proton and proton.reactor, storing nothing."""
    count = bench.scale.drain_messages
    ours: list[Round] = []
    others: dict[str, list[float]] = {"C proton, TLS": [], "proton.reactor": []}
    reasons: dict[str, str] = {}
    binary: Path | None = None
    if bench.scale.peers:
        try:
            binary = peers.cproton(bench.place("cproton"))
        except TROUBLE as error:
            reasons["C proton, TLS"] = str(error)
    for number in range(bench.scale.rounds):
        bench.say(f"drain: round {number + 1} of {bench.scale.rounds}")
        ours.append(_one_drain(bench, "drain"))
        if binary is not None and "C proton, TLS" not in reasons:
            try:
                others["C proton, TLS"].append(_c_proton(bench, binary, count))
            except TROUBLE as error:
                reasons["C proton, TLS"] = str(error)
        if bench.scale.peers and "proton.reactor" not in reasons:
            try:
                others["proton.reactor"].append(_reactor(min(count, 10_000)))
            except TROUBLE as error:
                reasons["proton.reactor"] = str(error)
    rates = [each.per_s for each in ours]
    yield _row("drain", "100 B", peers.lineside(bench.pki), "/s", ours, rates, None)
    if not bench.scale.peers:
        return
    for name, found in others.items():
        how = "none" if "TLS" in name else "none; plain TCP"
        made = ratio(rates, found)
        yield Row("drain", "100 B", name, "/s", tuple(found), how, ratio=made, skipped=reasons.get(name))


def _c_proton(bench: Bench, binary: Path, count: int) -> float:
    port = free_port()
    server, client = bench.pki.server, bench.pki.client
    receive = [binary, "receive", port, count, 100, server.cert, server.key, bench.pki.ca]
    send = [binary, "send", port, count, 100, client.cert, client.key, bench.pki.ca]
    return _pair(list(map(str, receive)), list(map(str, send)), port)


def _reactor(count: int) -> float:
    port = free_port()
    base = [sys.executable, "-m", "gateway.bench.reactor"]
    return _pair([*base, "receive", str(port), str(count), "100"], [*base, "send", str(port), str(count), "100"], port)


def _pair(receive: list[str], send: list[str], port: int) -> float:
    """A receiver that listens and a sender that dials; the sender is bound like a server, for it is what we are."""
    environment = own_environment()
    with _process(receive, environment) as receiver:
        _listening(port, receiver)
        with _process(send, environment) as sender:
            os.sched_setaffinity(sender.pid, processors()[0])
            return float(_result(receiver, DRAINED_S_MAX)["per_s"])


def _listening(port: int, process: subprocess.Popen[str]) -> None:
    """By the kernel's table: a connection to try it would be one that the receiver counts as a sender."""
    end = time.monotonic() + 15
    wanted = f":{port:04X} "
    while time.monotonic() < end and process.poll() is None:
        for line in Path("/proc/net/tcp").read_text().splitlines():
            if wanted in line.split(" 00000000:0000 ")[0] + " " and " 0A " in line:
                return
        time.sleep(0.02)
    raise load.LoadError("a receiver did not listen")


def both(bench: Bench) -> Iterator[Row]:
    """Intake and drain at once, each as a share of its rate alone, in the same round."""
    shares: dict[str, list[float]] = {"intake, of alone": [], "drain, of alone": []}
    rates: dict[str, list[float]] = {"intake": [], "drain": []}
    case, count = Case(), bench.scale.drain_messages
    for number in range(bench.scale.rounds):
        bench.say(f"both: round {number + 1} of {bench.scale.rounds}")
        with _running(peers.lineside(bench.pki), bench.place("alone")) as part:
            alone_in = _publish(part, case, bench.scale).per_s
        alone_out = _one_drain(bench, "drain").per_s
        port = free_port()
        with Daemon(bench.pki, port, bench.place("both")) as daemon:
            _bind(daemon.pid, processors()[0])
            _publish(daemon, case, bench.scale, messages=count)
            with _receiver(bench, port, count) as receiver:
                _until(lambda: daemon.waiting() < count, "the drain did not begin")
                # As long as the drain is going to take, so that the one is not measured without the other.
                seconds = max(0.5, min(bench.scale.seconds, count / alone_out))
                at_once = replace(bench.scale, seconds=seconds, warm_s=0.1)
                intake_rate = _publish(daemon, case, at_once).per_s
                drain_rate = _result(receiver)["per_s"]
        shares["intake, of alone"].append(intake_rate / alone_in)
        shares["drain, of alone"].append(drain_rate / alone_out)
        rates["intake"].append(intake_rate)
        rates["drain"].append(drain_rate)
    for name, found in shares.items():
        yield Row("both", name, OURS, "×", tuple(found), peers.OURS_DURABILITY)
    for name, found in rates.items():
        yield Row("both", name, OURS, "/s", tuple(found), peers.OURS_DURABILITY)


def fanout(bench: Bench) -> Iterator[Row]:
    """Latency from publish to delivery, QoS 1: durable sessions at ours, clean ones at Mosquitto."""
    seconds = max(2.0, bench.scale.seconds * 2)
    for sessions in (1, bench.scale.sessions):
        case = f"{sessions:,} subscriber{'s' * (sessions > 1)}, 50 /s"
        want = ["--seconds", seconds, "--sessions", sessions, "--version", 5]
        contenders = [peers.lineside(bench.pki, clients=sessions + SOCKETS_SPARE)]
        contenders += _chosen(peers.mqtt_peers(), Case(peers=("mosquitto",)), bench.scale)
        ours: list[float] = []
        for peer in contenders:
            if peer.missing:
                yield Row("fanout", case, peer.name, "ms p99", skipped=peer.missing)
                continue
            bench.say(f"fanout: {case}, {peer.name}")
            durable = ["--durable"] if peer.name == OURS else []
            with _running(peer, bench.place(f"fanout-{peer.name}")) as part:
                found = run_client("fanout", peers.mqtt_port(part), *want, *durable)
            rate = (found["p99_ms"],)
            ours = ours or list(rate)
            more = {key: found[key] for key in ("delivered", "lost", "repeated", "reordered", "delivered_per_s")}
            yield Row(
                "fanout",
                case,
                peer.name,
                "ms p99",
                rate,
                peer.durability,
                found["p50_ms"],
                found["p99_ms"],
                ratio=None if peer.name == OURS else ratio(ours, rate),
                more=more,
            )


def resume(bench: Bench) -> Iterator[Row]:
    """From a line's return to the next message settled at the far end, and to the last of those that waited."""
    bench.say(f"resume: {bench.scale.cuts} tunnels")
    found = resume_run(bench.place("resume"), cuts=bench.scale.cuts)
    p50, p99 = found["p50_s"], found["p99_s"]
    case = f"{bench.scale.cuts} tunnels"
    yield Row("resume", case, OURS, "s p99", (p99,), peers.OURS_DURABILITY, p50 * 1000, p99 * 1000)
    rows = bench.scale.queued_rows
    bench.say(f"resume: an alarm after each of {bench.scale.cuts} tunnels, {rows:,} rows queued")
    found = alarm(bench.place("alarm"), rows=rows, cuts=bench.scale.cuts)
    p50, p99 = found["p50_s"], found["p99_s"]
    case = f"an alarm before {rows:,} rows"
    yield Row("resume", case, OURS, "s p99", (p99,), peers.OURS_DURABILITY, p50 * 1000, p99 * 1000)
    messages = bench.scale.drain_messages
    taken = []
    for number in range(bench.scale.rounds):
        bench.say(f"resume: {messages:,} messages after a tunnel, round {number + 1} of {bench.scale.rounds}")
        taken.append(backlog(bench.place("backlog"), messages=messages)["drained_s"])
    yield Row("resume", f"{messages:,} after a tunnel", OURS, "s", tuple(taken), peers.OURS_DURABILITY)


def start(bench: Bench) -> Iterator[Row]:
    """From exec to the first answer, with so many rows queued; the file's pages are in the cache."""
    state = bench.place("start")
    for rows in bench.scale.start_rows:
        if rows:
            fill(state, rows, bench.say)
        taken = []
        for _ in range(bench.scale.rounds):
            daemon = Daemon(bench.pki, 1, bench.place("start-daemon"), state_dir=state)
            try:
                began = time.perf_counter()
                daemon.start()
                taken.append(time.perf_counter() - began)
            finally:
                _killed(daemon)  # a power cut, so that nothing is prepared for the next start
        yield Row("start", f"{rows:,} rows", OURS, "s", tuple(taken), peers.OURS_DURABILITY)
    shutil.rmtree(state, ignore_errors=True)


def _killed(daemon: Daemon) -> None:
    """Kill, and wait until its lock on the journal is gone."""
    pid = daemon.pid
    daemon.kill()
    _until(lambda: not Path(f"/proc/{pid}").exists(), "a killed daemon did not end")


def memory(bench: Bench) -> Iterator[Row]:
    """Resident bytes and processor time, idle and loaded; idle is after a second start."""
    scale = bench.scale
    contenders = [peers.lineside(bench.pki, clients=scale.sessions + SOCKETS_SPARE)]
    contenders += _chosen(peers.mqtt_peers(), Case(peers=("mosquitto", "nats")), scale)
    for peer in contenders:
        if peer.missing:
            yield Row("memory", "RSS, idle", peer.name, "B", skipped=peer.missing)
            continue
        bench.say(f"memory: {peer.name}")
        try:
            figures = _footprint(bench, peer)
        except TROUBLE as error:
            yield Row("memory", "RSS, idle", peer.name, "B", skipped=_reason(error))
            continue
        for case, (value, unit) in figures.items():
            yield Row("memory", case, peer.name, unit, (float(value),), peer.durability)


def _footprint(bench: Bench, peer: Peer) -> dict[str, tuple[float, str]]:
    scale = bench.scale
    with _running(peer, bench.place("memory")) as part:
        part.restart(gently=True)  # the first start makes the journal
        time.sleep(SETTLE_S)
        idle, before_s, began = _rss(part), exact_cpu_s(part.pid), time.monotonic()
        time.sleep(scale.idle_s)
        cpu = (exact_cpu_s(part.pid) - before_s) / (time.monotonic() - began) * 100
        sessions = _with_sessions(part, scale.sessions)
    with _prepared(peer, bench.place("memory")) as part:
        _publish(part, Case(), scale, messages=scale.queued_rows)
        time.sleep(SETTLE_S)
        queued = _rss(part)
    return {
        "RSS, idle": (idle, "B"),
        f"RSS, {scale.queued_rows:,} rows": (queued, "B"),
        f"RSS, {scale.sessions:,} sessions": (sessions, "B"),
        "idle CPU": (cpu, "%"),
    }


def _rss(part: Part) -> int:
    return memory_bytes(part.pid)


def _with_sessions(part: Part, count: int) -> int:
    """Resident bytes while so many durable sessions are connected, each with a subscription of its own."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, count + 256), hard))
    sessions = [load.subscribed("127.0.0.1", peers.mqtt_port(part), f"s-{n}", f"to/{n}/#") for n in range(count)]
    try:
        time.sleep(SETTLE_S)
        return _rss(part)
    finally:
        for sock in sessions:
            sock.close()


def written(bench: Bench) -> Iterator[Row]:
    """Bytes that reach the storage layer by payload byte (tests/bench/written.py of the source tree)."""
    if not (ROOT / "tests" / "bench" / "written.py").exists():
        yield Row("written", "1 KB", OURS, "×", skipped="needs the source tree (tests/bench/written.py)")
        return
    whats = ("offline", "online", "hub") if bench.scale.wide else ("offline",)
    command = [sys.executable, "-m", "tests.bench.written", "--json"]
    for what in whats:
        bench.say(f"written: {what}")
        with _process([*command, "--what", what], own_environment()) as process:
            out, err = process.communicate(timeout=CLIENT_S_MAX)
        if process.returncode:
            yield Row("written", what, OURS, "×", skipped=(err.strip().splitlines() or ["it failed"])[-1])
            continue
        for each in json.loads(out):
            rate = "full load" if each["rate_per_s"] is None else f"{each['rate_per_s']:g} /s"
            case = f"{each['what']}, {each['size_bytes']} B, {rate}"
            yield Row("written", case, OURS, "×", (each["process"],), "by payload byte")


def store(bench: Bench) -> Iterator[Row]:
    """ThingsBoard gateway's event store without its gateway, beside our journal without the daemon."""
    where = peers.thingsboard_path()
    if where is None:
        reason = "thingsboard-gateway is not installed (pip install --no-deps thingsboard-gateway)"
        yield Row("store", "100 B", "thingsboard", "/s", skipped=reason)
        return
    count = min(bench.scale.drain_messages, 100_000)
    ours, theirs = [], []
    for number in range(bench.scale.rounds):
        bench.say(f"store: round {number + 1} of {bench.scale.rounds}")
        began = time.perf_counter()
        fill(bench.place("store-ours"), count, bench.say)
        ours.append(count / (time.perf_counter() - began))
        place = bench.place("store-theirs")
        command = [sys.executable, "-m", "gateway.bench.thingsboard", str(place), str(count), "100"]
        with _process(command, own_environment(where)) as process:
            theirs.append(float(_result(process)["per_s"]))
    yield Row("store", "100 B", OURS, "/s", tuple(ours), "synced every 20,000; opened and closed")
    how = "WAL, synchronous=NORMAL: not synced"
    yield Row("store", "100 B", "thingsboard", "/s", tuple(theirs), how, ratio=ratio(ours, theirs))


def _until(done: Callable[[], bool], complaint: str) -> None:
    end = time.monotonic() + DRAINED_S_MAX
    while not done():
        if time.monotonic() > end:
            raise load.LoadError(complaint)
        time.sleep(0.005)


MEASURES: dict[str, Callable[[Bench], Iterator[Row]]] = {
    "intake": intake,
    "amqp-intake": amqp_intake,
    "latency": latency,
    "rules": rules,
    "sealed": sealed,
    "growth": growth,
    "slow-disk": slow_disk,
    "drain": drain,
    "both": both,
    "fanout": fanout,
    "resume": resume,
    "start": start,
    "memory": memory,
    "store": store,
    "written": written,
}


def run(names: Sequence[str], directory: Path, scale: Scale, say: Callable[[str], None]) -> Iterator[Row]:
    """The rows of these measures as they come. A measure that fails is a row that says so."""
    bench = Bench(directory, issue(directory / "pki"), scale, say)
    for name in names:
        try:
            yield from MEASURES[name](bench)
        except TROUBLE as error:
            yield Row(name, HEADLINE, OURS, "", skipped=_reason(error))


def _reason(error: Exception) -> str:
    """The first line of it and the last, where a program's own words are."""
    said = str(error).strip().splitlines() or [type(error).__name__]
    return ": ".join(dict.fromkeys((said[0], said[-1])))[:REASON_MAX]
