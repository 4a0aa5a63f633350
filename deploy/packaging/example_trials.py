"""The ways of installing that deploy/examples shows, done as they stand there: cloud-init, Ansible, a container.

Only hosts, digests and what a sandbox can't lend are put in. Each raises NotHere where its tools can't be had or used.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path

from debian import ROOT, Broken, Tree, bootstrap, expect, run, say

EXAMPLES = ROOT / "deploy" / "examples"
# python3-apt is what Ansible's apt module uses; python3-cffi-backend what debootstrap, which knows no virtual packages,
# does not find by itself.
PACKAGES = ("systemd", "python3", "python3-apt", "python3-cffi-backend", "cloud-init")
ANSIBLE = "ansible-core==2.18.19"
FETCH_S_MAX = 600.0
START_S_MAX = 60.0

# cloud-init's own stages, as a boot runs them, beside a server that has the package.
CLOUD_INIT = """
python3 -m http.server --directory /root/served --bind 127.0.0.1 8000 >/dev/null 2>&1 &
cloud-init init --local && cloud-init init && cloud-init modules --mode=config && cloud-init modules --mode=final
cat /run/cloud-init/result.json > /root/result.json
"""
# What else an image has cloud-init do (locales, keys of SSH, file systems) is none of ours.
CLOUD_CONFIG = """
datasource_list: [NoCloud]
network: {config: disabled}
cloud_init_modules: [write-files]
cloud_config_modules: [runcmd]
cloud_final_modules: [scripts-user]
"""


class NotHere(Exception):
    """This machine lacks what the trial needs; the text says what."""


class Example(ABC):
    """One of them. `work` is kept between runs, but for what `end` takes away."""

    name: str

    def __init__(self, work: Path, package: Path, tarball: Path, where: str | None) -> None:
        self.work, self.package, self.tarball, self.where = work, package, tarball, where
        self.results: list[str] = []

    def note(self, result: str) -> None:
        self.results.append(result)
        say(f"{self.name}: {result}")

    @abstractmethod
    def run(self) -> None: ...

    @abstractmethod
    def end(self) -> None: ...


def put_in(text: str, places: dict[str, str]) -> str:
    """The text with this machine's places in it; what is replaced has to be there."""
    for old, new in places.items():
        if old not in text:
            raise Broken(f"the example does not say {old}")
        text = text.replace(old, new)
    return text


class InTree(Example):
    """One that is done in a Debian in a directory."""

    def run(self) -> None:
        base = bootstrap(self.work / "base-examples", PACKAGES, self.where)
        self.tree = Tree(base, self.work / "root")
        self.tree.write("etc/apt/sources.list", "")
        self.do()

    def end(self) -> None:
        if hasattr(self, "tree"):
            self.tree.remove()

    @abstractmethod
    def do(self) -> None: ...


class CloudInit(InTree):
    name = "cloud-init"

    def do(self) -> None:
        seed = "var/lib/cloud/seed/nocloud"
        digest = hashlib.sha256(self.package.read_bytes()).hexdigest()
        self.tree.run("install", "-D", self.tree.put(self.package), "/root/served/lineside_0.1.0_amd64.deb")
        self.tree.write("etc/cloud/cloud.cfg.d/90_trial.cfg", CLOUD_CONFIG)
        self.tree.write(f"{seed}/meta-data", "instance-id: loco-4711\nlocal-hostname: loco-4711\n")
        user_data = (EXAMPLES / "cloud-init.yaml").read_text()
        places = {"https://depot.example": "http://127.0.0.1:8000"}
        # A package that is not the one meant, as the digest tells.
        self.tree.write(f"{seed}/user-data", put_in(user_data, places | {"DIGEST": "0" * 64}))
        self.tree.run("cloud-init", "schema", "--config-file", f"/{seed}/user-data")
        [error] = self.boot()
        if "scripts-user" not in error:
            raise Broken(f"cloud-init: {error}")
        self.tree.run("sh", "-c", "! command -v lineside && test ! -e /etc/lineside")
        self.note("valid by its schema; a package with another digest is not installed, and that is told")
        self.tree.write(f"{seed}/user-data", put_in(user_data, places | {"DIGEST": digest}))
        # A boot begins with an empty /run, and a new machine without what cloud-init remembers of the last.
        self.tree.run("sh", "-ec", "cloud-init clean; rm -rf /run/cloud-init")
        expect(self.boot(), [])
        # What the example leaves to do, as it says.
        self.tree.run(
            *("sh", "-ec"),
            "lineside pki init /root/fleet-ca; "
            "lineside pki issue /root/fleet-ca loco-4711 --kind gateway --csr /etc/lineside/pki/loco-4711.csr; "
            "cd /root/fleet-ca; install -o root -g lineside -m 0640 ca.pem issued/loco-4711.pem /etc/lineside/pki/",
        )
        self.tree.run("setpriv", "--reuid=lineside", "--regid=lineside", "--init-groups", "lineside", "check")
        expect(self.tree.run("stat", "-c", "%a %U %G", "/etc/lineside/pki/loco-4711.key"), "640 root lineside\n")
        self.note("from user-data to a gateway that only its certificate was missing for; the key was made on the box")

    def boot(self) -> list[str]:
        """Errors that cloud-init tells of."""
        self.tree.run("sh", "-c", CLOUD_INIT)
        errors: list[str] = json.loads((self.tree.path / "root/result.json").read_text())["v1"]["errors"]
        return errors


class Ansible(InTree):
    name = "ansible"

    def do(self) -> None:
        play = self.tree.path / "root" / "play"
        shutil.copytree(EXAMPLES / "ansible", play)
        shutil.copytree(self.ansible(), self.tree.path / "opt" / "ansible")
        for name in ("files", "dist"):
            (play / name).mkdir()
        shutil.copy(self.package, play / "dist" / "lineside_0.1.0_amd64.deb")
        for name in ("ca.pem", "loco-4711.pem", "loco-4711.key"):
            (play / "files" / name).write_text(f"{name}\n")
        config = play / "files" / "loco-4711.toml"
        shutil.copy(EXAMPLES / "minimal.toml", config)
        (play / "inventory").write_text("[gateways]\nloco-4711 ansible_connection=local\n")
        changed = self.play()
        if not changed:
            raise Broken("the first run changed nothing")
        expect(self.tree.run("stat", "-c", "%a %U %G", "/etc/lineside/pki/loco-4711.key"), "640 root lineside\n")
        self.tree.run("setpriv", "--reuid=lineside", "--regid=lineside", "--init-groups", "lineside", "check")
        expect(self.play(), 0)
        self.note(f"the first run changed {changed} things, the second none")
        good = config.read_text()
        config.write_text(good + "[nonsense]\n")
        said = self.play_fails()
        if "nonsense" not in said:
            raise Broken(f"a wrong configuration is not told of:\n{said[-3000:]}")
        expect((self.tree.path / "etc/lineside/lineside.toml").read_text(), good)
        self.note("a wrong configuration fails the play, with its words, and the old one stays")

    def ansible(self) -> Path:
        """ansible-core, to be copied into the tree: the controller is the box itself, over a local connection."""
        home = self.work / ANSIBLE.replace("==", "-")
        if not (home / "complete").exists():
            command = (
                sys.executable,
                "-m",
                "pip",
                "install",
                "-q",
                "--no-input",
                "--upgrade",
                "--target",
                home,
                ANSIBLE,
            )
            try:
                run(*command, within_s=FETCH_S_MAX)
            except Broken as error:
                raise NotHere(f"{ANSIBLE} can't be installed: {str(error).strip().splitlines()[-1]}") from None
            (home / "complete").touch()
        return home

    def play(self) -> int:
        """How much the play changed."""
        said = self.tree.run(*self.command())
        recap = said.rpartition("PLAY RECAP")[2]
        words = dict(word.split("=") for word in recap.split() if "=" in word)
        expect((words["unreachable"], words["failed"]), ("0", "0"))
        return int(words["changed"])

    def play_fails(self) -> str:
        return self.tree.run(*self.command(), fails=True)

    def command(self) -> tuple[str, ...]:
        return (
            *("env", "--chdir=/root/play", "LANG=C.UTF-8", "PYTHONPATH=/opt/ansible"),
            *("ANSIBLE_PYTHON_INTERPRETER=/usr/bin/python3", "ANSIBLE_NOCOLOR=1"),
            *("/usr/bin/python3", "-m", "ansible", "playbook", "-i", "inventory", "site.yml"),
        )


class Container(Example):
    """With Podman, in a storage of its own. The base image is a Debian of debootstrap's: no registry is asked."""

    name = "container"
    # What a sandbox may not lend more of than it has.
    LIMITS = ("--ulimit", "nofile=16384:16384", "--ulimit", "nproc=4096:4096")

    def __init__(self, work: Path, package: Path, tarball: Path, where: str | None, base: Callable[[], Path]) -> None:
        super().__init__(work, package, tarball, where)
        self.base = base
        self.home = work / "container"
        self.runtime = ""

    def podman(self, *words: str | Path, fails: bool = False) -> str:
        storage = ("--root", self.home / "storage", "--runroot", self.home / "run", "--cgroup-manager", "cgroupfs")
        runtime = ("--runtime", self.runtime) if self.runtime else ()
        return run(
            "podman", *storage, *runtime, "--events-backend", "none", "--log-level", "fatal", *words, fails=fails
        )

    def run(self) -> None:
        if shutil.which("podman") is None:
            raise NotHere("apt install podman (and runc, where crun does not work)")
        self.end()
        context = self.home / "context"
        context.mkdir(parents=True)
        rootfs = self.home / "rootfs.tar"
        run("tar", "-C", self.base(), "-cf", rootfs, "--exclude=./dev/*", "--exclude=./complete", ".")
        self.podman("import", "-q", rootfs, "docker.io/library/debian:12-slim")
        rootfs.unlink()
        self.runtime = self.usable_runtime()
        shutil.copy(EXAMPLES / "container" / "Containerfile", context)
        shutil.copy(self.tarball, context)
        self.podman(
            *("build", "-q", "--pull-never", "--isolation", "chroot", "--network", "host", "--format", "docker"),
            *("-t", "lineside", context),
        )
        self.note("built, on a Debian 12 made here")
        self.use()

    def usable_runtime(self) -> str:
        reasons = []
        for self.runtime in filter(shutil.which, ("crun", "runc")):
            try:
                self.podman("run", "--rm", "--network", "none", *self.LIMITS, "debian:12-slim", "true")
            except Broken as error:
                reasons.append(str(error).strip().splitlines()[-1])
            else:
                return self.runtime
        raise NotHere(f"no container can be run here: {'; '.join(reasons) or 'neither crun nor runc is installed'}")

    def use(self) -> None:
        etc = self.home / "etc"
        etc.mkdir()
        shutil.copy(EXAMPLES / "minimal.toml", etc / "lineside.toml")
        run("chgrp", "-R", "10470", etc)
        etc.chmod(0o750)
        (etc / "lineside.toml").chmod(0o640)
        start = (
            *("run", "-d", "--name", "lineside", "--read-only", "--cap-drop", "all"),
            *("--security-opt", "no-new-privileges", "--stop-timeout", "30", "--network", "none", *self.LIMITS),
            *("-v", f"{etc}:/etc/lineside:ro", "-v", "lineside:/var/lib/lineside", "lineside"),
        )
        self.podman(*start)
        self.healthy()
        status = self.inside("cat", "/proc/1/status")
        facts = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
        expect((set(facts["Uid"].split()), set(facts["Gid"].split())), ({"10470"}, {"10470"}))
        expect((int(facts["CapEff"], 16), int(facts["CapBnd"], 16), facts["NoNewPrivs"]), (0, 0, "1"))
        for place in ("/", "/opt/lineside", "/etc/lineside", "/usr/bin"):
            self.podman("exec", "lineside", "touch", f"{place}/x", fails=True)
        self.inside("lineside", "publish", "alarm/door", "-m", "open")
        self.note("not root, no capability, root file system read-only; takes messages, and its health check passes")
        self.podman("kill", "--signal", "STOP", "lineside")
        self.podman("healthcheck", "run", "lineside", fails=True)
        self.podman("kill", "--signal", "CONT", "lineside")
        self.healthy()
        self.note("a process that hangs fails the health check")
        self.podman("stop", "lineside")
        expect(self.podman("inspect", "--format", "{{.State.ExitCode}}", "lineside").strip(), "0")
        self.podman("rm", "lineside")
        self.podman(*start)
        self.healthy()
        streams = json.loads(self.inside("lineside", "backlog", "--json"))["streams"]
        expect(sum(each["waiting"] for each in streams), 1)
        self.note("stopped in order, with status 0; a new container on the same volume has what was acknowledged")

    def inside(self, *words: str) -> str:
        return self.podman("exec", "lineside", *words)

    def healthy(self) -> None:
        """Within the time that the daemon takes to start; podman itself asks only where systemd runs its timers."""
        end = time.monotonic() + START_S_MAX
        while True:
            try:
                self.podman("healthcheck", "run", "lineside")
            except Broken:
                if time.monotonic() > end:
                    raise Broken(f"not healthy within {START_S_MAX:g} s:\n{self.podman('logs', 'lineside')}") from None
                time.sleep(0.2)
            else:
                return

    def end(self) -> None:
        if not self.home.exists():
            return
        self.podman("rm", "--all", "--force")
        storage = self.home / "storage" / "overlay"
        if storage.is_mount():
            run("umount", storage)
        shutil.rmtree(self.home)
