"""The package without a virtual machine: installed, used, upgraded, taken back, removed, in a Debian 12 in a directory.

Both forms go the same way, and have to leave the same files. In there is no network but loopback, no compiler, and no
init, so that units are verified and not started: what systemd makes of them is deploy/boot-test's to show. Then come
the other ways of installing that deploy/examples has, where their tools are here.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import re
import stat
import sys
import time
from abc import ABC, abstractmethod
from pathlib import Path

from debian import NEWER_JOURNAL, ROOT, STATE, Broken, Tree, bootstrap, cannot, expect, say, two_versions
from example_trials import Ansible, CloudInit, Container, Example, NotHere

PACKAGES = ("systemd", "python3")
NEEDED = {"debootstrap": "debootstrap", "unshare": "util-linux", "dpkg-deb": "dpkg"}
UNITS = ("lineside.service", "lineside@.service", "lineside.socket", "lineside@.socket")
EXAMPLES = {"cloud-init": CloudInit, "ansible": Ansible}
PARTS = ("deb", "tarball", *EXAMPLES, "container")
MESSAGES = 500
DEMO_S = 10
# Where a file may come and go without being the package's doing.
NOT_LOOKED_AT = ("dev", "proc", "root", "run", "sys", "tmp", "var/cache", "var/lib/dpkg", "var/log")
# What systemd-sysusers writes; a user stays when a package goes, as its files may.
ACCOUNTS = tuple(f"etc/{name}{old}" for name in ("passwd", "group", "shadow", "gshadow") for old in ("", "-"))
MODES = {
    "etc/lineside": (0o750, "root", "lineside"),
    "etc/lineside/pki": (0o750, "root", "lineside"),
    STATE: (0o700, "lineside", "lineside"),
}
DROP_IN = "etc/systemd/system/lineside.service.d"
SECRETS = ("etc/lineside/pki/loco-4711.key", "etc/lineside/users")

CONFIG = """
[gateway]
id = "loco-4711"
[mqtt]
password_file = "users"
[[hub]]
name = "depot"
urls = ["amqps://hub.example:5671"]
ca = "pki/ca.pem"
cert = "pki/loco-4711.pem"
key = "pki/loco-4711.key"
[[outbound]]
stream = "alarms"
topics = ["alarm/#"]
hub = "depot"
address = "edge.{gateway}.alarms"
[[access]]
who = "user:anna"
publish = ["alarm/#"]
"""

# As deploy/OPERATING.md has it.
CREDENTIALS = """
set -e
lineside pki init /root/fleet-ca
lineside pki issue /root/fleet-ca loco-4711 --kind gateway
cd /root/fleet-ca/issued && cp ../ca.pem .
install -o root -g lineside -m 0640 loco-4711.pem loco-4711.key ca.pem /etc/lineside/pki/
(umask 077 && echo open-sesame > /root/anna)
lineside passwd /etc/lineside/users anna - < /root/anna
chgrp lineside /etc/lineside/users && chmod 640 /etc/lineside/users
"""

AS_LINESIDE = (
    *("setpriv", "--reuid=lineside", "--regid=lineside", "--init-groups"),
    *("--no-new-privs", "--inh-caps=-all", "--bounding-set=-all"),
)
AS_NOBODY = ("setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups")

# What systemd would do: start the daemon, wait until it says that it is ready, and stop it. Commands are run between.
DAEMON = f"""
import os, socket, subprocess, sys
with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notices:
    notices.bind("\\0ready")
    notices.settimeout(60)
    daemon = subprocess.Popen(
        [*{AS_LINESIDE!r}, "lineside", "run", "--config", "/etc/lineside/lineside.toml"],
        env=os.environ | {{"NOTIFY_SOCKET": "@ready"}}, cwd="/{STATE}", umask=0o077,
    )
    while b"READY=1" not in notices.recv(4096):
        pass
for command in sys.argv[1:]:
    subprocess.run(["/bin/sh", "-c", command], check=True)
daemon.terminate()
sys.exit(daemon.wait(60))
"""


def version_of(package: Path) -> str:
    """lineside_VERSION_ARCH.deb, lineside-VERSION-linux-ARCH-PYTHON.tar.gz."""
    found = re.match(r"lineside[_-](.+?)(?:_[^_]+\.deb|-linux-.+\.tar\.gz)$", package.name)
    if found is None:
        raise Broken(f"{package.name} is not named as a package is")
    return found[1]


class Form(ABC):
    """One of the two forms that the package has, and how it is handled in a tree."""

    name: str

    def __init__(self, tree: Tree, old: Path, new: Path) -> None:
        self.tree = tree
        self.old, self.new = old, new

    @abstractmethod
    def install(self, package: Path, *, fails: bool = False, umask: str = "022") -> str:
        """What the installation says; the same for an upgrade, and for the way back."""

    @abstractmethod
    def remove(self) -> str: ...

    @abstractmethod
    def purge(self) -> str: ...

    @abstractmethod
    def check_records(self, version: str) -> None:
        """What the system keeps of the installation is right."""


class Deb(Form):
    name = "the .deb"

    def install(self, package: Path, *, fails: bool = False, umask: str = "022") -> str:
        return self.tree.run("dpkg", "-i", self.tree.put(package), fails=fails, umask=umask)

    def remove(self) -> str:
        return self.tree.run("dpkg", "-r", "lineside")

    def purge(self) -> str:
        # No frontend is told to be silent: there is no question to be silent about, and nobody to answer.
        return self.tree.run("dpkg", "-P", "lineside")

    def check_records(self, version: str) -> None:
        asked = ("dpkg-query", "-W", "-f", "${Status} ${Version} <${Conffiles}>", "lineside")
        # No conffile, so that no upgrade asks about one: what is in /etc is the operator's alone.
        expect(self.tree.run(*asked), f"install ok installed {version} <>")
        expect(self.tree.run("dpkg", "--verify", "lineside"), "")
        expect(self.tree.run("dpkg", "--audit"), "")


class Tarball(Form):
    name = "the tarball"

    def install(self, package: Path, *, fails: bool = False, umask: str = "022") -> str:
        self.tree.run("rm", "-rf", "/root/unpacked")
        self.tree.run("mkdir", "/root/unpacked")
        self.tree.run("tar", "-xzf", self.tree.put(package), "-C", "/root/unpacked", "--strip-components=1")
        return self.tree.run("/root/unpacked/install", fails=fails, umask=umask)

    def remove(self) -> str:
        return self.tree.run("/root/unpacked/install", "--remove")

    def purge(self) -> str:
        return self.tree.run("/root/unpacked/install", "--purge")

    def check_records(self, version: str) -> None:
        """It keeps none."""


def snapshot(tree: Tree) -> dict[str, str]:
    """Kind, mode, owner and content of everything that a package could touch, by path."""
    found: dict[str, str] = {}
    for path in sorted(tree.path.rglob("*")):
        name = str(path.relative_to(tree.path))
        if name.startswith(tuple(f"{each}/" for each in NOT_LOOKED_AT)):
            continue
        status = path.lstat()
        content = ""
        if path.is_symlink():
            content = str(path.readlink())
        elif path.is_file():
            content = hashlib.sha256(path.read_bytes()).hexdigest()
        found[name] = f"{stat.filemode(status.st_mode)} {status.st_uid}:{status.st_gid} {content}"
    return found


def differences(one: dict[str, str], other: dict[str, str], but: tuple[str, ...] = ACCOUNTS) -> list[str]:
    """The paths that only one has, or that are not the same in both; but for some, and what is in them."""
    different = [name for name in sorted(one.keys() | other.keys()) if one.get(name) != other.get(name)]
    return [name for name in different if not any(name == each or name.startswith(f"{each}/") for each in but)]


class Trial:
    """One form's way from the first installation to the last file gone."""

    def __init__(self, form: Form) -> None:
        self.form, self.tree, self.name = form, form.tree, form.name
        self.old, self.new = version_of(form.old), version_of(form.new)
        self.untouched = snapshot(self.tree)
        self.installed: dict[str, str] = {}
        self.results: list[str] = []

    def note(self, result: str) -> None:
        self.results.append(result)
        say(f"{self.name}: {result}")

    def run(self) -> None:
        self.first_install()
        self.units()
        self.demo()
        self.credentials()
        self.daemon()
        self.upgrade()
        self.way_back()
        self.newer_journal()
        self.removal()

    def is_version(self, version: str) -> None:
        """All that tells the version tells this one. What deploy/package --suffix appends is the package's alone."""
        expect(self.tree.run("lineside", "--version"), f"lineside {re.split('[+~]', version)[0]}\n")
        bill = json.loads((self.tree.path / "usr/share/doc/lineside/sbom.cdx.json").read_text())
        expect(bill["metadata"]["component"]["version"], version)
        self.form.check_records(version)

    def backlog(self) -> int:
        """Messages that wait in the journal, as the operator hears of it."""
        streams = json.loads(self.tree.run("lineside", "backlog", "--json"))["streams"]
        return sum(each["waiting"] for each in streams)

    def state(self) -> dict[str, str]:
        kept = (f"{STATE}/", "etc/lineside/", f"{DROP_IN}/")
        return {name: what for name, what in snapshot(self.tree).items() if name.startswith(kept)}

    def end(self) -> None:
        self.tree.remove()

    def left(self, but: tuple[str, ...] = ACCOUNTS) -> list[str]:
        """What is not as before the first installation. An empty /opt no package owns, and dpkg takes it for ours."""
        return [name for name in differences(self.untouched, snapshot(self.tree), but) if name != "opt"]

    # -------------------------------------------------------------------------------------------- the steps

    def first_install(self) -> None:
        self.tree.run("sh", "-c", "! command -v cc gcc clang tcc pip pip3")
        # A careful root's umask is no reason for files that nobody else can read.
        said = self.form.install(self.form.old, umask="077")
        self.is_version(self.old)
        self.installed = snapshot(self.tree)
        added = differences(self.untouched, self.installed)
        for name in added:
            path = self.tree.path / name
            status = path.lstat()
            if path.is_symlink() or name in MODES:
                continue
            if status.st_uid or status.st_gid or status.st_mode & 0o7022:
                raise Broken(f"/{name} is {self.installed[name]}: only root may change it, and it lends no rights")
            if not status.st_mode & 0o004:
                raise Broken(f"/{name} is {self.installed[name]}: not everybody can read it")
        for name, (mode, user, group) in MODES.items():
            expect(self.tree.run("stat", "-c", "%a %U %G", f"/{name}").split(), [f"{mode:o}", user, group])
        account = self.tree.run("getent", "passwd", "lineside").strip().split(":")
        expect((account[5], account[6]), (f"/{STATE}", "/usr/sbin/nologin"))
        self.tree.run(*AS_LINESIDE, "touch", "/opt/lineside/lib", "/usr/bin/lineside", "/etc/lineside", fails=True)
        self.tree.run("lineside", "check", "--config", "/usr/share/doc/lineside/examples/minimal.toml")
        if "rror" in said:
            raise Broken(f"the installation complains:\n{said}")
        self.note(f"{self.old} installed without network and compiler, {len(added)} files and directories, modes right")

    def units(self) -> None:
        for unit in UNITS:
            expect(self.tree.run("systemd-analyze", "verify", "--man=no", unit), "")
        expect(self.tree.run("systemctl", "is-enabled", "lineside.service").strip(), "enabled")
        expect(self.tree.run("systemctl", "is-enabled", "lineside.socket", fails=True).strip(), "disabled")
        self.note(f"systemd has nothing to say against {len(UNITS)} units; the service is enabled")

    def demo(self) -> None:
        verdict = json.loads(self.tree.run(*AS_LINESIDE, "lineside", "demo", "--seconds", str(DEMO_S), "--json"))
        self.note(
            f"hub, gateway and apps over {verdict['tunnels']} tunnels: "
            f"{verdict['outbound']['delivered'] + verdict['inbound']['delivered']} messages, 0 lost, 0 reordered"
        )

    def credentials(self) -> None:
        self.tree.run("sh", "-c", CREDENTIALS)
        self.tree.write("etc/lineside/lineside.toml", CONFIG)
        for name in SECRETS:
            expect(self.tree.run("stat", "-c", "%a %U %G", f"/{name}").split(), ["640", "root", "lineside"])
            self.tree.run(*AS_LINESIDE, "test", "-r", f"/{name}", "-a", "!", "-w", f"/{name}")
            self.tree.run(*AS_NOBODY, "cat", f"/{name}", fails=True)
        self.tree.run(*AS_LINESIDE, "lineside", "check")
        self.note("key and passwords: the daemon reads them, nobody else does")

    def daemon(self) -> None:
        publish = "lineside publish alarm/door --stdin-line --user anna --password-file /root/anna"
        self.tree.run(
            *("/usr/bin/python3", "-I", "-c", DAEMON),
            "lineside status --json",
            f"seq {MESSAGES} | {publish}",
            # Its file and its rule are heeded: who has no password, and what no rule allows.
            "! lineside publish alarm/door -m 0 --timeout 10",
            "! lineside publish other/door -m 0 --user anna --password-file /root/anna --timeout 10",
        )
        expect(self.backlog(), MESSAGES)
        files = [path for path in (self.tree.path / STATE).rglob("*") if path.is_file()]
        expect([path.name for path in files if path.stat().st_mode & 0o077], [])
        self.note(f"daemon as user lineside: {MESSAGES} messages acknowledged, hub away, all wait in the journal")

    def upgrade(self) -> None:
        """Over everything that an operator may have changed."""
        self.tree.write("etc/lineside/lineside.toml", CONFIG + "# an edit of ours\n", 0o600)
        self.tree.write(f"{DROP_IN}/ours.conf", "[Service]\nMemoryMax=256M\n")
        self.tree.run("systemctl", "disable", "--quiet", "lineside.service")
        before = self.state()
        self.form.install(self.form.new)
        self.is_version(self.new)
        expect(differences(before, self.state()), [])
        expect(self.tree.run("systemctl", "is-enabled", "lineside.service", fails=True).strip(), "disabled")
        expect(self.tree.run("systemd-analyze", "verify", "--man=no", "lineside.service"), "")
        expect(self.backlog(), MESSAGES)
        self.tree.run("chgrp", "lineside", "/etc/lineside/lineside.toml")
        self.tree.run("chmod", "640", "/etc/lineside/lineside.toml")
        self.tree.run("/usr/bin/python3", "-I", "-c", DAEMON, "lineside status --json")
        expect(self.backlog(), MESSAGES)
        self.note(f"upgrade to {self.new}: edits, drop-in, keys, journal and a disabled service stayed as they were")

    def way_back(self) -> None:
        before = self.state()
        self.form.install(self.form.old)
        self.is_version(self.old)
        expect(differences(before, self.state()), [])
        self.form.install(self.form.new)
        self.note(f"back to {self.old}, and on again: the journal is of the same schema")

    def newer_journal(self) -> None:
        """Once with all of it in the file, once with what tells its age still in the write-ahead log beside it."""
        self.tree.run("cp", "-a", f"/{STATE}", "/root/kept")
        for newer in (NEWER_JOURNAL, NEWER_JOURNAL.replace("journal.close()", "import os; os._exit(0)")):
            self.tree.run("/usr/bin/python3", "-I", "-c", newer)
            before = snapshot(self.tree)
            said = self.form.install(self.form.old, fails=True)
            if "newer version" not in said:
                raise Broken(f"a downgrade said nothing of the journal:\n{said}")
            self.is_version(self.new)
            # SQLite's shared memory beside a log holds nothing that lasts, and reading the log writes into it.
            expect(differences(before, snapshot(self.tree), (f"{STATE}/journal.db-shm",)), [])
            self.tree.run("sh", "-c", f"rm -rf /{STATE} && cp -a /root/kept /{STATE}")
        # The tarball of the older version was unpacked over that of the newer one.
        self.form.install(self.form.new)
        self.note(f"{self.old} over a newer journal, with and without a log beside it: refused, nothing changed")

    def removal(self) -> None:
        before = self.state()
        self.form.remove()
        self.tree.run("sh", "-c", "! command -v lineside")
        expect(differences(before, self.state()), [])
        expect(self.left((*ACCOUNTS, *MODES, DROP_IN)), [])
        self.form.install(self.form.new)
        expect(self.backlog(), MESSAGES)
        self.form.remove()
        self.tree.run("rm", "-r", f"/{DROP_IN}")
        said = self.form.purge()
        if "?" in said:
            raise Broken(f"the purge asks:\n{said}")
        expect(self.left(), [])
        self.note("remove: journal and configuration stayed; purge: no file left, nothing asked")


def main() -> int:
    parser = argparse.ArgumentParser(prog="deploy/package-test", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)} (default: what can be done here)")
    parser.add_argument("--packages", type=Path, help="a directory with both versions, instead of building them")
    parser.add_argument("--mirror", help="where to get Debian from (default: as this machine's apt)")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "package-test", help="where the Debian is made")
    options = parser.parse_args()
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    if lacking := cannot(NEEDED):
        print(f"deploy/package-test: {lacking}", file=sys.stderr)
        return 2
    options.work.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    results: list[str] = []
    try:
        not_here = try_all(options, results)
    except Broken as error:
        print(f"\nBROKEN: {error}", flush=True)
        return 1
    finally:
        print(f"\nPackage test, {time.monotonic() - began:.0f} s:")
        print("".join(f"  {result}\n" for result in results))
    if not_here and options.parts:
        print("Not all that was asked for could be tried.")
        return 2
    print("Everything held." if not not_here else "Everything that could be tried here held.")
    return 0


def try_all(options: argparse.Namespace, results: list[str]) -> bool:
    """Add what held to `results`; return whether something could not be tried here."""
    not_here = False
    installed: dict[str, dict[str, str]] = {}
    with contextlib.ExitStack() as stack:
        debs = two_versions(stack, options.work, options.packages)
        tarballs = [next(deb.parent.glob(f"lineside-{version_of(deb)}-linux-*.tar.gz")) for deb in debs]

        def base() -> Path:
            return bootstrap(options.work / "base", PACKAGES, options.mirror)

        for part in options.parts or PARTS:
            trial: Trial | Example
            if part in ("deb", "tarball"):
                kind, (old, new) = (Deb, debs) if part == "deb" else (Tarball, tarballs)
                trial = Trial(kind(Tree(base(), options.work / "root"), old, new))
            elif part == "container":
                trial = Container(options.work, debs[0], tarballs[0], options.mirror, base)
            else:
                trial = EXAMPLES[part](options.work, debs[0], tarballs[0], options.mirror)
            try:
                trial.run()
            except NotHere as reason:
                not_here = True
                trial.note(f"NOT TRIED: {reason}")
            finally:
                trial.end()
                results += [f"{trial.name}: {result}" for result in trial.results]
            if isinstance(trial, Trial):
                installed[part] = trial.installed
    if len(installed) == 2:
        expect(differences(installed["deb"], installed["tarball"]), [])
        results.append("both forms install the same files")
    return not_here


if __name__ == "__main__":
    sys.exit(main())
