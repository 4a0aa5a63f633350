"""What one app keeps of its rate while others ask for as much as they can; `python -m tests.bench.abuse [NAME...]`.

The ordinary app publishes at QoS 1 with a window of 50, all the time. Around it, in turns: nothing; an attack of
`tests.attacks` at the same daemon; nothing; the same attack at a process that only swallows it, held to the pace that
the daemon let it have. Each share is the app's rate in such a turn by its rates just before and after, so that what
else the machine does matters little; `fair` is the first share by the second, median of all turns: what of the app's
loss is the daemon's doing. 1.00 is nothing at all.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple, Self

from gateway.bench.daemon import cpu_s
from tests.attacks import ATTACKS, Attacker, Ports, Swallower
from tests.daemon import Daemon, free_port
from tests.pki import Pki

WARM_S = 0.4  # a process to start, and what an attack has to do first
QUIET_S = 0.5
ATTACK_S = 1.0

CONFIG = """
[gateway]
id = "loco"
state_dir = "{state}"
log_level = "warning"
[mqtt]
listen = ["127.0.0.1:{port}", "mqtts://127.0.0.1:@TLS@", "ws://127.0.0.1:@WS@/mqtt"]
cert = "@CERT@"
key = "@KEY@"
retained_max = 1000
[amqp]
listen = ["127.0.0.1:@AMQP@"]
[[hub]]
name = "depot"
urls = ["amqp://127.0.0.1:{hub_port}"]
[[outbound]]
stream = "telemetry"
topics = ["train/#"]
hub = "depot"
address = "edge"
max_bytes = "8GiB"
max_messages = 50000000
"""


class Yard(Daemon):
    """A daemon that listens in every way."""

    def __init__(self, directory: Path, pki: Pki) -> None:
        self.tls, self.ws, self.amqp = free_port(), free_port(), free_port()
        text = CONFIG.replace("@CERT@", str(pki.server.cert)).replace("@KEY@", str(pki.server.key))
        for name, value in {"TLS": self.tls, "WS": self.ws, "AMQP": self.amqp}.items():
            text = text.replace(f"@{name}@", str(value))
        super().__init__(directory, text)
        self.status()

    @property
    def ports(self) -> Ports:
        return Ports(self.port, self.tls, self.ws, self.amqp)

    def cpu_s(self) -> float:
        return cpu_s(self.process.pid)

    def rss_bytes(self) -> int:
        pages = Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]
        return int(pages) * 4096


class App:
    """The ordinary app, in a process of its own that says how far it is whenever it is asked."""

    def __init__(self, port: int) -> None:
        command = [sys.executable, "-m", "tests.bench.abuse", "--app", str(port)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.acknowledged()

    def acknowledged(self) -> tuple[float, int]:
        """When, on the monotonic clock, and how many messages were acknowledged until then."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        at, count = json.loads(self._process.stdout.readline())
        return at, count

    def rate(self, seconds: float) -> float:
        began, before = self.acknowledged()
        time.sleep(seconds)
        ended, after = self.acknowledged()
        return (after - before) / (ended - began)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate(timeout=30)


def publish(port: int, window: int = 50) -> None:
    """The app's own process: publish until standard input ends, say how far at each of its lines."""
    import os
    import select

    from gateway.bench.load import connect
    from tests.attacks import packet, string

    sock, _ = connect("127.0.0.1", port, "ordinary")
    ring = [packet(0x32, string(b"train/speed") + n.to_bytes(2, "big") + bytes(100)) for n in range(1, 65536)]
    size = len(ring[0])
    data = b"".join(ring) * 2
    sent_bytes = heard_bytes = 0
    while True:
        until = (heard_bytes // 4 + window) * size
        if until > sent_bytes:
            at = sent_bytes % (size * 65535)
            sent_bytes += sock.send(data[at : at + until - sent_bytes])
        ready, _, _ = select.select([sock, sys.stdin], [], [], 30)
        if sys.stdin in ready:
            if not os.read(0, 100):
                return
            print(json.dumps((time.monotonic(), heard_bytes // 4)), flush=True)
        if sock in ready:
            got = sock.recv(1 << 16)
            if not got:
                raise ConnectionResetError("the daemon closed the connection")
            heard_bytes += len(got)


class Watched(NamedTuple):
    """Messages a second that the app got acknowledged; and in a second of the daemon's own processor time."""

    rate: float
    effort: float


def watch(app: App, yard: Yard, seconds: float) -> Watched:
    used_s = yard.cpu_s()
    rate = app.rate(seconds)
    return Watched(rate, rate * seconds / max(yard.cpu_s() - used_s, 0.01))


@dataclass(frozen=True, slots=True)
class Turn:
    """One attack and the same traffic swallowed. Shares of the app's rate alone; `per_s` of the attack.

    `effort`: how many of the app's messages the daemon got done in a second of its own processor time, as a share of
    what it does alone. That hardly depends on what else the machine does.
    """

    alone_per_s: float
    share: float
    swallowed: float
    effort: float
    per_s: float
    cut_off: bool

    @property
    def fair(self) -> float:
        return self.share / self.swallowed


def turn(app: App, yard: Yard, name: str) -> Turn:
    quiet = [watch(app, yard, QUIET_S)]

    def under(start: Callable[[], Attacker]) -> tuple[float, float, dict[str, float]]:
        attacker = start()
        time.sleep(WARM_S)
        rate, effort = watch(app, yard, ATTACK_S)
        done = attacker.end()
        time.sleep(WARM_S / 2)
        quiet.append(watch(app, yard, QUIET_S))
        usual = [statistics.mean(each) for each in zip(*quiet[-2:], strict=True)]
        return rate / usual[0], effort / usual[1], done

    share, effort, done = under(lambda: Attacker(name, yard.ports))
    per_s = done["units"] / done["seconds"]
    with Swallower() as swallower:
        swallowed, _, _ = under(lambda: Attacker(name, swallower.ports, max(1.0, per_s)))
    alone = statistics.mean(each.rate for each in quiet)
    return Turn(alone, share, swallowed, effort, per_s, bool(done["cut_off"]))


def measure(directory: Path, name: str, turns: int = 3) -> list[Turn]:
    directory.mkdir(parents=True, exist_ok=True)
    yard = Yard(directory, Pki(directory))
    try:
        with App(yard.port) as app:
            time.sleep(WARM_S)
            return [turn(app, yard, name) for _ in range(turns)]
    finally:
        yard.end()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="python -m tests.bench.abuse"
    )
    parser.add_argument("names", nargs="*", help="of attacks (default: all)", metavar="NAME")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--directory", type=Path, help="measure on the file system of this directory")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--app", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.app is not None:
        publish(arguments.app)
        return
    report = {}
    for name in arguments.names or ATTACKS:
        with tempfile.TemporaryDirectory(prefix="lineside-abuse-", dir=arguments.directory) as directory:
            turns = measure(Path(directory), name, arguments.turns)
        report[name] = [asdict(each) for each in turns]
        if not arguments.json:
            rows = [(t.share, t.swallowed, t.fair, t.effort, t.alone_per_s, t.per_s) for t in turns]
            share, swallowed, fair, effort, alone, per_s = map(statistics.median, zip(*rows, strict=True))
            cut = sum(t.cut_off for t in turns)
            every = " ".join(f"{t.fair:.2f}" for t in turns)
            print(
                f"{name:18} fair {fair:.2f}  share {share:.2f}  swallowed {swallowed:.2f}  effort {effort:.2f}"
                f"  alone {alone:7.0f}/s  attack {per_s:9.0f}/s  cut off {cut}  ({every})",
                flush=True,
            )
    if arguments.json:
        print(json.dumps(report))


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        main()
