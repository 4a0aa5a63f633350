"""The measures behind the numbers in the README, each with its method; `python -m tests.bench.run [NAME] [--json]`.

intake   QoS 1 messages a second into the daemon, acknowledged after fsync, and into Mosquitto queueing for an offline
         durable session, in turns in one run on one file system; the ratio of each pair, and their median.
amqp-intake
         the same for local AMQP apps: durable messages a second into the daemon, accepted after fsync, and into a
         durable queue of Artemis and of RabbitMQ, with the same client, in turns in one run.
drain    messages a second out of the daemon's journal to our own AMQP receiver over mutual TLS, from the first batch
         to the last message; the journal is filled while the receiver is not there.
memory   resident bytes of the daemon with a million messages queued, again after a restart, and how long opening took.
fanout   1,000 connected subscribers, 50 messages a second to all of them at QoS 1: latency from publish to delivery,
         memory at the start and at the end; Mosquitto in the same run. `--seconds 300` for the long one.
resume   seconds from a line's return to the next message settled at the far end, over many short tunnels.
alarm    the same for an alarm said in the tunnel, with a million messages of another stream queued.
backlog  seconds from the end of a tunnel to the last of 100,000 messages that were published in it.

The daemon is the real one, `python -m gateway run`, in its own process, with the defaults of its configuration except
for limits. It ends with this process.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from gateway.bench import load
from gateway.bench.brokers import FullArtemis
from gateway.bench.daemon import Daemon, cpu_s
from gateway.bench.resume import alarm, backlog, resume
from tests import parts
from tests.pki import Pki

ROOT = Path(__file__).resolve().parent.parent.parent
MOSQUITTO = """\
allow_anonymous true
persistence true
max_queued_messages 0
max_queued_bytes 0
log_type error
"""


def _publish(want: load.Load) -> dict[str, float]:
    """Run load.py as a process of its own, so that it shares nothing with what is measured here."""
    options = ["--connections", want.connections, "--window", want.window, "--size-bytes", want.size_bytes]
    options += ["--version", want.version, "--topic", want.topic]
    if want.messages is not None:
        options += ["--messages", want.messages]
    else:
        options += ["--seconds", want.seconds, "--warm-s", want.warm_s]
    command = [sys.executable, "-m", "gateway.bench.load", str(want.port), *map(str, options)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode:
        raise load.LoadError(done.stderr.strip().rsplit("\n", 1)[-1])
    result: dict[str, float] = json.loads(done.stdout)
    return result


# ------------------------------------------------------------------ intake


def intake(
    directory: Path, *, pairs: int = 3, pairs_max: int = 0, seconds: float = 4.0, version: int = 4
) -> dict[str, Any]:
    """Rates in turns A B A B, each round with a fresh broker and an empty queue. Without Mosquitto, ours alone.

    While the median ratio is below 1, pairs are added up to `pairs_max`: other work on the machine for a few seconds
    must not decide.
    """
    pki = Pki(directory / "pki")
    rival = parts.available("mosquitto") is None
    ours: list[_Round] = []
    theirs: list[_Round] = []
    ratios: list[float] = []
    for number in range(max(pairs, pairs_max)):
        if number >= pairs and (not rival or statistics.median(ratios) >= 1):
            break
        with Daemon(pki, parts.free_port(), directory / f"ours-{number}") as daemon:
            ours.append(_round(daemon, daemon.port, seconds, version))
        if rival:
            with parts.Mosquitto(MOSQUITTO, directory=directory / f"mosquitto-{number}") as broker:
                load.offline_session("127.0.0.1", broker.port, "away", "bench/#", version)
                theirs.append(_round(broker, broker.port, seconds, version))
            ratios.append(ours[-1].per_s / theirs[-1].per_s)
    return {
        "mqtt": "5.0" if version == 5 else "3.1.1",
        "lineside_per_s": [round(r.per_s) for r in ours],
        "mosquitto_per_s": [round(r.per_s) for r in theirs],
        "ratios": [round(r, 2) for r in ratios],
        "ratio_median": round(statistics.median(ratios), 2) if ratios else None,
        # What other work on the machine disturbs least.
        "lineside_cpu_us": [round(r.cpu_us, 2) for r in ours],
        "mosquitto_cpu_us": [round(r.cpu_us, 2) for r in theirs],
    }


class _Round(NamedTuple):
    per_s: float
    cpu_us: float  # the broker's, for each message


def _round(broker: parts.Part, port: int, seconds: float, version: int) -> _Round:
    pid = int((broker.directory / "pid").read_text())
    before_s = cpu_s(pid)
    result = _publish(load.Load(port, seconds=seconds, version=version))
    return _Round(result["per_s"], (cpu_s(pid) - before_s) / result["acknowledged_in_all"] * 1e6)


def amqp_intake(directory: Path, *, rounds: int = 3, rounds_max: int = 0, seconds: float = 4.0) -> dict[str, Any]:
    """Rates in turns Lineside, Artemis, RabbitMQ, each with a fresh broker; the brokers that are not here are left out.

    While a median ratio is below 1, rounds are added up to `rounds_max`.
    """
    pki = Pki(directory / "pki")
    rates: dict[str, list[float]] = {"lineside": []}
    ratios: dict[str, list[float]] = {n: [] for n in ("artemis", "rabbitmq") if parts.available(n) is None}
    for number in range(max(rounds, rounds_max)):
        if number >= rounds and all(statistics.median(each) >= 1 for each in ratios.values()):
            break
        with Daemon(pki, parts.free_port(), directory / f"ours-{number}", amqp=True) as daemon:
            ours = _send(daemon.amqp_port, "bench/0", seconds)
        rates["lineside"].append(ours)
        for name in ratios:
            with _amqp_rival(name, directory / f"{name}-{number}") as broker:
                theirs = _send(broker.port, "/queue/bench" if name == "rabbitmq" else "bench", seconds)
            rates.setdefault(name, []).append(theirs)
            ratios[name].append(ours / theirs)
    report: dict[str, Any] = {f"{name}_per_s": [round(r) for r in each] for name, each in rates.items()}
    for name, each in ratios.items():
        report[f"ratios_{name}"] = [round(r, 2) for r in each]
        report[f"ratio_median_{name}"] = round(statistics.median(each), 2)
    return report


def _amqp_rival(name: str, directory: Path) -> parts.Artemis | parts.RabbitMQ:
    return FullArtemis(directory=directory) if name == "artemis" else parts.RabbitMQ(directory=directory)


def _send(port: int | None, address: str, seconds: float) -> float:
    """Run amqp_load.py as a process of its own; messages accepted a second."""
    options = ["--address", address, "--seconds", str(seconds), "--warm-s", "3"]
    command = [sys.executable, "-m", "gateway.bench.amqp_load", str(port), *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode:
        raise load.LoadError(done.stderr.strip().rsplit("\n", 1)[-1])
    return float(json.loads(done.stdout)["per_s"])


# ------------------------------------------------------------------ drain


def drain(directory: Path, *, rounds: int = 3, messages: int = 100_000) -> dict[str, Any]:
    """Rates of emptying a full journal, best and all; raises if anything was lost, repeated or reordered."""
    pki = Pki(directory / "pki")
    reports: list[dict[str, float]] = []
    for number in range(rounds):
        port = parts.free_port()
        with Daemon(pki, port, directory / f"drain-{number}") as daemon:
            _publish(load.Load(daemon.port, messages=messages))
            cpu = daemon.cpu_s()
            report = _receive(pki, port, messages)
            until = time.monotonic() + 5
            while (left := daemon.waiting()) and time.monotonic() < until:
                time.sleep(0.05)
            report["gateway_cores"] = (daemon.cpu_s() - cpu) / report["seconds"]
            if left or report["missing"] or report["repeated"] or report["reordered"]:
                raise AssertionError(f"a promise broke in the drain: {left} left, {report}")
            reports.append(report)
    rates = [round(r["per_s"]) for r in reports]
    return {
        "messages": messages,
        "per_s": rates,
        "per_s_best": max(rates),
        "gateway_cores": [round(r["gateway_cores"], 2) for r in reports],
        "receiver_cores": [round(r["receiver_cores"], 2) for r in reports],
    }


def _receive(pki: Pki, port: int, messages: int) -> dict[str, float]:
    files = ["--cert", pki.server.cert, "--key", pki.server.key, "--ca", pki.ca]
    command = [sys.executable, "-m", "gateway.bench.receiver", "--port", port, "--expect", messages, *files]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode:
        raise AssertionError(f"the receiver failed: {done.stderr.strip()}")
    report: dict[str, float] = json.loads(done.stdout)
    return report


# ------------------------------------------------------------------ memory

OPEN = """
import sys, time
from pathlib import Path
from storeforward.journal import Journal
began = time.perf_counter()
journal = Journal.open(Path(sys.argv[1]))
print(time.perf_counter() - began)
journal.close()
"""


def memory(directory: Path, *, messages: int = 1_000_000) -> dict[str, Any]:
    """Resident bytes before, while `messages` wait, and after a restart with them; seconds to open that journal."""
    with Daemon(Pki(directory / "pki"), parts.free_port(), directory / "memory") as daemon:
        empty = daemon.memory_bytes()
        _publish(load.Load(daemon.port, messages=messages))
        time.sleep(1.0)
        queued, most, rows = daemon.memory_bytes(), daemon.memory_bytes("VmHWM"), daemon.waiting()
        daemon.kill()
        began = time.perf_counter()
        daemon.start()
        start_s = time.perf_counter() - began
        restarted, rows_after = daemon.memory_bytes(), daemon.waiting()
        daemon.stop()
        command = [sys.executable, "-c", OPEN, str(daemon.state_dir)]
        opening = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    return {
        "messages": messages,
        "rows": [rows, rows_after],
        "rss_bytes_empty": empty,
        "rss_bytes": queued,
        "rss_bytes_most": most,
        "rss_bytes_after_restart": restarted,
        "restart_s": round(start_s, 3),
        "open_s": round(float(opening.stdout), 3),
    }


# ------------------------------------------------------------------ fan-out


def fanout(
    directory: Path, *, seconds: float = 10.0, sessions: int = 1000, version: int = 5, rival: bool = True
) -> dict[str, Any]:
    """Everything to everybody: durable sessions here, clean ones at Mosquitto, which keeps neither on the disk."""
    want = ["--seconds", str(seconds), "--sessions", str(sessions), "--version", str(version)]
    with Daemon(Pki(directory / "pki"), parts.free_port(), directory / "fanout", 2 * sessions) as daemon:
        warm = _fan(daemon.port, [*want, "--seconds", "2", "--durable"])
        before = daemon.memory_bytes()
        ours = _fan(daemon.port, [*want, "--durable"])
        after = daemon.memory_bytes()
    report: dict[str, Any] = {"sessions": sessions, "mqtt": "5.0" if version == 5 else "3.1.1"}
    report |= {f"lineside_{key}": value for key, value in ours.items()}
    report |= {"lineside_rss_bytes_before": before, "lineside_rss_bytes_after": after, "warm_p99_ms": warm["p99_ms"]}
    if rival and parts.available("mosquitto") is None:
        with parts.Mosquitto(MOSQUITTO, directory=directory / "mosquitto") as broker:
            report |= {f"mosquitto_{key}": value for key, value in _fan(broker.port, want).items()}
    return report


def _fan(port: int, options: list[str]) -> dict[str, float]:
    command = [sys.executable, "-m", "gateway.bench.fanout", str(port), *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)
    if done.returncode:
        raise load.LoadError(done.stderr.strip().rsplit("\n", 1)[-1])
    result: dict[str, float] = json.loads(done.stdout)
    return result


# ------------------------------------------------------------------ command line

MEASURES: dict[str, Callable[[Path], dict[str, Any]]] = {
    "intake": intake,
    "amqp-intake": amqp_intake,
    "drain": drain,
    "memory": memory,
    "fanout": fanout,
    "resume": resume,
    "alarm": alarm,
    "backlog": backlog,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="python -m tests.bench.run"
    )
    parser.add_argument("measure", nargs="*", help="which ones (default: all)", metavar="NAME")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--seconds", type=float, help="of the fan-out")
    parser.add_argument("--directory", type=Path, help="measure on the file system of this directory")
    arguments = parser.parse_args()
    unknown = set(arguments.measure) - set(MEASURES)
    if unknown:
        parser.error(f"no measure {', '.join(sorted(unknown))}; there are {', '.join(MEASURES)}")
    results: dict[str, dict[str, Any]] = {}
    for name in arguments.measure or MEASURES:
        with tempfile.TemporaryDirectory(prefix="lineside-bench-", dir=arguments.directory) as directory:
            if name == "fanout" and arguments.seconds is not None:
                results[name] = fanout(Path(directory), seconds=arguments.seconds)
            else:
                results[name] = MEASURES[name](Path(directory))
        if not arguments.json:
            print(name)
            for key, value in results[name].items():
                print(f"  {key:24} {value}", flush=True)
    if arguments.json:
        print(json.dumps(results))


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
