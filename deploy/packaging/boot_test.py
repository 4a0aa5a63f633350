"""The package in a real boot: systemd as process 1, the plug pulled amid publishing, an upgrade under load, a purge.

The guest is a Debian 12 made by debootstrap and run by QEMU; the apps and the hub run here and reach it over QEMU's own
network. What a guest had synced is in the image when QEMU is killed, what it had not is gone: the image file is written
through the host's cache, which survives, and the guest's own cache does not. Nothing listens beyond this machine.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import paho.mqtt.client as paho
from debian import NEWER_JOURNAL, ROOT, Broken, Tree, bootstrap, cannot, run, say, two_versions
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode, MQTTProtocolVersion

PACKAGES = (
    *("systemd", "systemd-sysv", "dbus", "udev", "kmod", "iproute2", "python3"),
    *("linux-image-cloud-amd64", "initramfs-tools"),
)
NEEDED = {
    "debootstrap": "debootstrap",
    "unshare": "util-linux",
    "qemu-system-x86_64": "qemu-system-x86",
    "mke2fs": "e2fsprogs",
}
IMAGE_BYTES = 2 << 30
BOOT_S = 300.0
WAIT_S = 180.0
WINDOW = 200
BACKLOG = 100_000

CONFIG = """
[gateway]
id = "boot"
[mqtt]
listen = ["0.0.0.0:1883"]
allow_plaintext = "yes, without TLS"
allow_anonymous = true
[[hub]]
name = "depot"
urls = ["amqp://10.0.2.2:{hub}"]
kind = "lineside"
allow_plaintext = "yes, without TLS"
[[outbound]]
stream = "telemetry"
topics = ["train/#"]
hub = "depot"
address = "edge"
"""

HUB = """
[gateway]
id = "depot"
state_dir = "{state}"
[mqtt]
listen = ["127.0.0.1:{mqtt}"]
[amqp]
listen = ["127.0.0.1:{amqp}"]
[local]
when_full = "refuse"
"""

# Inside the guest: runs a command a line, answers with status and output. Reachable from this machine only.
AGENT = """
import json, socketserver, subprocess
class Handler(socketserver.StreamRequestHandler):
    def handle(self):
        command = self.rfile.readline().decode()
        done = subprocess.run(["/bin/sh", "-c", command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self.wfile.write(json.dumps([done.returncode, done.stdout]).encode())
socketserver.ThreadingTCPServer(("0.0.0.0", 2222), Handler).serve_forever()
"""

AGENT_UNIT = """
[Unit]
Description=Runs what the boot test asks for
[Service]
ExecStart=/usr/bin/python3 /root/agent.py
[Install]
WantedBy=multi-user.target
"""


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


# --------------------------------------------------------------------------------------------------- the image


def make_image(work: Path, package: Path, newer: Path, hub_port: int, where: str | None) -> None:
    base = bootstrap(work / "base", PACKAGES, where)
    say("installing the package in the image")
    tree = Tree(base, work / "root")
    for path, name in ((package, "old.deb"), (newer, "new.deb")):
        shutil.copy(path, tree.path / "root" / name)
    tree.write("etc/hostname", "boot\n")
    tree.write("etc/apt/sources.list", "")
    tree.write("etc/fstab", "/dev/vda / ext4 defaults 0 1\n")
    tree.write("etc/systemd/network/20-wired.network", "[Match]\nType=ether\n[Network]\nDHCP=ipv4\n")
    tree.write("etc/systemd/journald.conf", "[Journal]\nForwardToConsole=yes\nTTYPath=/dev/ttyS0\nStorage=volatile\n")
    tree.write("root/agent.py", AGENT)
    tree.write("etc/systemd/system/agent.service", AGENT_UNIT)
    said = tree.run("dpkg", "-i", "/root/old.deb")
    if "lineside" not in said:
        raise Broken(said)
    tree.run("systemctl", "enable", "--quiet", "systemd-networkd", "agent")
    tree.write("etc/lineside/lineside.toml", CONFIG.format(hub=hub_port))
    image = work / "disk.img"
    image.unlink(missing_ok=True)
    with image.open("wb") as file:
        file.truncate(IMAGE_BYTES)
    run("mke2fs", "-q", "-t", "ext4", "-d", tree.path, "-L", "root", image)
    for name, target in (("vmlinuz-*", "kernel"), ("initrd.img-*", "initrd")):
        shutil.copy(next((tree.path / "boot").glob(name)), work / target)
    tree.remove()


# --------------------------------------------------------------------------------------------------- the guest


class Guest:
    """The machine. Its MQTT port and its agent are reached at ports of this machine's loopback address."""

    def __init__(self, work: Path) -> None:
        self.work = work
        self.mqtt = free_port()
        self.agent = free_port()
        self.console = work / "console.log"
        self.process: subprocess.Popen[bytes] | None = None

    def boot(self) -> float:
        """Switch it on; return the seconds until its gateway takes connections."""
        began = time.monotonic()
        forward = f"hostfwd=tcp:127.0.0.1:{self.mqtt}-:1883,hostfwd=tcp:127.0.0.1:{self.agent}-:2222"
        # Not KVM even where it is there: nested in another virtual machine it may stop half-way.
        emulated = ["-accel", "tcg,thread=multi", "-cpu", "max"]
        with self.console.open("ab") as console:
            self.process = subprocess.Popen(
                [
                    *("qemu-system-x86_64", "-nographic", "-no-reboot", "-m", "1024", "-smp", "2", *emulated),
                    *("-kernel", str(self.work / "kernel"), "-initrd", str(self.work / "initrd")),
                    *("-append", "root=/dev/vda rw console=ttyS0 quiet systemd.show_status=no"),
                    *("-drive", f"file={self.work / 'disk.img'},if=virtio,format=raw,cache=writeback"),
                    *("-nic", f"user,model=virtio-net-pci,{forward}"),
                ],
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=console,
            )
        self.wait_for_gateway(BOOT_S)
        return time.monotonic() - began

    def wait_for_gateway(self, within_s: float) -> None:
        end = time.monotonic() + within_s
        while not self.answers():
            if self.process is None or self.process.poll() is not None:
                raise Broken(f"the guest ended by itself; see {self.console}")
            if time.monotonic() > end:
                raise Broken(f"no gateway in the guest within {within_s:g} s; see {self.console}")
            time.sleep(0.5)

    def answers(self) -> bool:
        """Whether an MQTT CONNECT is answered: QEMU itself accepts connections long before."""
        try:
            with socket.create_connection(("127.0.0.1", self.mqtt), 2) as sock:
                sock.settimeout(5)
                sock.sendall(b"\x10\x0e\x00\x04MQTT\x04\x02\x00\x3c\x00\x02hi")
                return sock.recv(4)[:1] == b"\x20"
        except OSError:
            return False

    def pull_the_plug(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def ask(self, command: str, within_s: float = WAIT_S, *, fails: bool = False) -> str:
        """What a command prints in the guest; raises Broken unless it ends as expected."""
        with socket.create_connection(("127.0.0.1", self.agent), 10) as sock:
            sock.settimeout(within_s)
            sock.sendall(command.encode() + b"\n")
            answer = b""
            while part := sock.recv(65536):
                answer += part
        status, output = json.loads(answer)
        if bool(status) != fails:
            raise Broken(f"in the guest: {command}: status {status}\n{output}")
        return str(output)

    def end(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.pull_the_plug()


# --------------------------------------------------------------------------------------------------- the apps


class Publisher:
    """An app that numbers its messages and knows which were acknowledged, and when."""

    def __init__(self, port: int, numbers: Iterator[int]) -> None:
        self.acknowledged: list[int] = []
        self.times: list[float] = []
        self.refused = 0
        self._numbers = numbers
        self._under_way: deque[tuple[int, paho.MQTTMessageInfo]] = deque()
        self._stop = threading.Event()
        client = self._client = paho.Client(
            CallbackAPIVersion.VERSION2, client_id="app", clean_session=False, protocol=MQTTProtocolVersion.MQTTv311
        )
        client.max_inflight_messages_set(WINDOW)
        client.reconnect_delay_set(1, 1)
        client.on_connect_fail = self._on_fail
        client.connect_async("127.0.0.1", port, keepalive=20)
        client.loop_start()
        self._thread = threading.Thread(target=self._publish, daemon=True)
        self._thread.start()

    def _on_fail(self, *_: object) -> None:
        self.refused += 1

    def _publish(self) -> None:
        while not self._stop.is_set():
            self._take_acknowledgements()
            if len(self._under_way) >= WINDOW:
                time.sleep(0.002)
                continue
            number = next(self._numbers)
            info = self._client.publish("train/speed", b"%d" % number, qos=1)
            if info.rc == MQTTErrorCode.MQTT_ERR_NO_CONN:
                info.rc = MQTTErrorCode.MQTT_ERR_SUCCESS  # queued all the same, which paho calls an error
            self._under_way.append((number, info))

    def _take_acknowledgements(self) -> None:
        under_way, now = self._under_way, time.monotonic()
        while under_way and under_way[0][1].is_published():
            self.acknowledged.append(under_way.popleft()[0])
            self.times.append(now)

    def wait_for(self, count: int, within_s: float = WAIT_S) -> None:
        end = time.monotonic() + within_s
        while len(self.acknowledged) < count:
            if time.monotonic() > end:
                raise Broken(f"{len(self.acknowledged)} of {count} acknowledged within {within_s:g} s")
            time.sleep(0.05)

    def longest_gap_s(self, since: float) -> float:
        times = [t for t in self.times if t >= since]
        return max((b - a for a, b in itertools.pairwise([since, *times])), default=0.0)

    def finish(self) -> None:
        """Publish nothing new, and wait for the acknowledgements of the rest."""
        self._stop.set()
        self._thread.join()
        end = time.monotonic() + WAIT_S
        while self._under_way:
            if time.monotonic() > end:
                raise Broken(f"{len(self._under_way)} messages were never acknowledged")
            self._take_acknowledgements()
            time.sleep(0.01)

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        self._client.disconnect()
        self._client.loop_stop()
        self.acknowledged += [number for number, info in self._under_way if info.is_published()]


class HubDaemon:
    """The hub, and a subscriber of it that notes what comes."""

    def __init__(self, work: Path, port: int) -> None:
        self.port, self.mqtt = port, free_port()
        self.got: list[int] = []
        self._config = work / "hub.toml"
        self._config.write_text(HUB.format(state=work / "hub", mqtt=self.mqtt, amqp=port))
        self._log = work / "hub.log"
        self._process: subprocess.Popen[bytes] | None = None
        self._client: paho.Client | None = None

    def start(self) -> None:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "gateway", "run", "--config", str(self._config)], cwd=ROOT, stderr=log
            )
        subscribed = threading.Event()
        client = self._client = paho.Client(CallbackAPIVersion.VERSION2, client_id="depot-app", clean_session=False)
        client.on_message = lambda _c, _d, message: self.got.append(int(message.payload))
        client.on_connect = lambda *_: client.subscribe("edge", qos=1)
        client.on_subscribe = lambda *_: subscribed.set()
        client.reconnect_delay_set(1, 1)
        client.connect_async("127.0.0.1", self.mqtt)
        client.loop_start()
        if not subscribed.wait(60):
            raise Broken(f"the hub did not start; see {self._log}")

    def stop(self) -> None:
        if self._client is not None:
            self._client.disconnect()
            self._client.loop_stop()
            self._client = None
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)
            self._process.wait(30)
            self._process = None

    def wait_for(self, numbers: set[int]) -> None:
        end, known = time.monotonic() + WAIT_S, -1
        while missing := numbers.difference(self.got):
            if len(self.got) > known:
                known, end = len(self.got), time.monotonic() + WAIT_S
            if time.monotonic() > end:
                raise Broken(f"{len(missing)} acknowledged messages did not come, the first {min(missing)}")
            time.sleep(0.2)


# --------------------------------------------------------------------------------------------------- the test


class BootTest:
    def __init__(self, work: Path, package: Path, newer: Path, cycles: int, where: str | None) -> None:
        self.cycles = cycles
        self.results: list[tuple[str, str]] = []
        self.acknowledged: set[int] = set()
        self.numbers = itertools.count()
        hub_port = free_port()
        make_image(work, package, newer, hub_port, where)
        shutil.rmtree(work / "hub", ignore_errors=True)
        (work / "console.log").unlink(missing_ok=True)
        self.hub = HubDaemon(work, hub_port)
        self.guest = Guest(work)

    def note(self, what: str, result: str) -> None:
        self.results.append((what, result))
        say(f"{what}: {result}")

    def run(self) -> None:
        try:
            self.power_cuts()
            self.watchdog()
            self.upgrade()
            self.removal()
        finally:
            self.guest.end()
            self.hub.stop()

    def power_cuts(self) -> None:
        boots = [self.guest.boot()]
        self.note("first boot to MQTT answering", f"{boots[0]:.0f} s")
        for cycle in range(self.cycles):
            if cycle % 2 == 0:
                self.hub.start()
            app = Publisher(self.guest.mqtt, self.numbers)
            app.wait_for(500 + 700 * cycle)
            self.guest.pull_the_plug()
            app.close()
            self.acknowledged.update(app.acknowledged)
            if cycle % 2 == 0:
                self.hub.stop()
            boots.append(self.guest.boot())
            say(f"power cut {cycle + 1} of {self.cycles}, after {len(app.acknowledged)} acknowledged messages")
        self.hub.start()
        self.hub.wait_for(self.acknowledged)
        firsts = list(dict.fromkeys(self.hub.got))
        if firsts != sorted(firsts):
            raise Broken("messages came out of order")
        repeated = len(self.hub.got) - len(firsts)
        if repeated > WINDOW * self.cycles:
            raise Broken(f"{repeated} messages came twice")
        salvaged = self.guest.ask("journalctl -u lineside | grep -c salvaged || true").strip()
        self.note(
            f"{self.cycles} power cuts while publishing",
            f"{len(self.acknowledged)} acknowledged, all arrived, in order, {repeated} repeated, {salvaged} salvages",
        )

    def watchdog(self) -> None:
        before = self._main_pid()
        self.guest.ask(f"kill -STOP {before}")
        began = time.monotonic()
        while (now := self._main_pid()) in (before, "0"):
            if time.monotonic() - began > WAIT_S:
                raise Broken("a stopped process was not replaced")
            time.sleep(1)
        self.guest.wait_for_gateway(WAIT_S)
        result = self.guest.ask("systemctl show -P NRestarts lineside").strip()
        self.note(
            "process stopped with SIGSTOP",
            f"replaced by the watchdog after {time.monotonic() - began:.0f} s, {result} restart, pid {before} to {now}",
        )

    def _main_pid(self) -> str:
        return self.guest.ask("systemctl show -P MainPID lineside").strip()

    def upgrade(self) -> None:
        self.hub.stop()
        app = Publisher(self.guest.mqtt, self.numbers)
        app.wait_for(BACKLOG, 600)
        began = time.monotonic()
        self.guest.ask("dpkg -i /root/new.deb")
        self.guest.wait_for_gateway(WAIT_S)
        app.wait_for(len(app.acknowledged) + 1000)
        gap_s, refused = app.longest_gap_s(began), app.refused
        app.finish()
        app.close()
        self.acknowledged.update(app.acknowledged)
        version = self.guest.ask("dpkg-query -W -f '${Version}' lineside").strip()
        self.hub.start()
        self.hub.wait_for(self.acknowledged)
        self.note(
            f"upgrade to {version} under load, {len(app.acknowledged)} messages, hub away",
            f"none lost; {refused} connections refused; longest time without an acknowledgement {gap_s:.1f} s",
        )
        if refused:
            raise Broken(f"{refused} connections were refused in the upgrade")
        self.guest.ask("systemctl stop lineside")
        self.guest.ask(f'python3 -c "{NEWER_JOURNAL}"')
        said = self.guest.ask("dpkg -i /root/old.deb", fails=True)
        if "newer version" not in said:
            raise Broken(f"a downgrade said nothing of the journal:\n{said}")
        self.guest.ask("lineside --version")
        self.note("older package over a newer journal", "refused, nothing changed")

    def removal(self) -> None:
        self.guest.ask("dpkg -r lineside")
        self.guest.ask("test -s /var/lib/lineside/journal.db -a -s /etc/lineside/lineside.toml")
        self.guest.ask("test ! -e /usr/bin/lineside")
        self.guest.ask("DEBIAN_FRONTEND=noninteractive dpkg -P lineside < /dev/null")
        left = self.guest.ask("ls -d /var/lib/lineside* /etc/lineside* /opt/lineside* 2>/dev/null || true").strip()
        if left:
            raise Broken(f"a purge left {left}")
        self.note("remove, then purge", "state and configuration stayed, then went; nothing asked")


def main() -> int:
    parser = argparse.ArgumentParser(prog="deploy/boot-test", description=__doc__)
    parser.add_argument("--packages", type=Path, help="a directory with both versions, instead of building them")
    parser.add_argument("--cycles", type=int, default=4, help="power cuts (default: 4)")
    parser.add_argument("--mirror", help="where to get Debian from (default: as this machine's apt)")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "boot", help="where images are made")
    options = parser.parse_args()
    if lacking := cannot(NEEDED):
        print(f"deploy/boot-test: {lacking}", file=sys.stderr)
        return 2
    options.work.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        test = None
        began = time.monotonic()
        try:
            old, new = two_versions(stack, options.work, options.packages)
            test = BootTest(options.work, old, new, options.cycles, options.mirror)
            test.run()
        except Broken as error:
            print(f"\nBROKEN: {error}", flush=True)
            return 1
        finally:
            if test is not None and test.results:
                print(f"\nBoot test, {time.monotonic() - began:.0f} s, cycles {options.cycles}:")
                for what, result in test.results:
                    print(f"  {what}: {result}")
    print("\nEverything held.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
