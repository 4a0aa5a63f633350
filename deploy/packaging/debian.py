"""A Debian in a directory, and commands in it that see nothing of this machine's network, processes and mounts.

What deploy/boot-test and deploy/package-test share: the two versions to try, debootstrap, and a way in. Needs root,
debootstrap and unshare (util-linux). Runs on the standard library.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
RELEASE = "bookworm"
STATE = "var/lib/lineside"
COMMAND_S_MAX = 300.0
BOOTSTRAP_S_MAX = 1200.0
BUILD_S_MAX = 1200.0
# A journal that some later version wrote. It has to be newer than this package reads, whatever that is.
NEWER_JOURNAL = (
    f"import sqlite3; journal = sqlite3.connect('/{STATE}/journal.db', isolation_level=None); "
    "journal.execute('PRAGMA user_version = 999'); "
    "journal.execute('UPDATE meta SET value = ? WHERE key = ?', ('999', 'schema')); journal.close()"
)

# Inside: a network of its own has a loopback interface that is down, which no machine without network has.
_WITH_LOOPBACK = """
import fcntl, os, socket, struct, sys
SIOCSIFFLAGS, IFF_UP = 0x8914, 1
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
    fcntl.ioctl(sock, SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", IFF_UP))
os.umask(int(sys.argv[1], 8))
os.execvp(sys.argv[2], sys.argv[2:])
"""


class Broken(Exception):
    """A promise did not hold, or a machine did not do what it should."""


def expect(found: object, wanted: object) -> None:
    if found != wanted:
        raise Broken(f"expected {wanted!r}, found {found!r}")


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def run(
    *command: str | Path, within_s: float = COMMAND_S_MAX, fails: bool = False, called: str = "", **more: object
) -> str:
    """What a command prints; raises Broken unless it ends as expected, in time. Nobody is there to be asked.

    `called` is how a complaint names it.
    """
    words = [str(word) for word in command]
    called = (called or " ".join(words))[:300]
    try:
        done = subprocess.run(
            words,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=within_s,
            **more,
        )
    except subprocess.TimeoutExpired as expired:
        said = (expired.stdout or b"")[-3000:]
        raise Broken(f"{called}: not done within {within_s:g} s\n{said!r}") from None
    if bool(done.returncode) != fails:
        raise Broken(f"{called}: status {done.returncode}\n{done.stdout[-3000:]}")
    return done.stdout


def cannot(needed: dict[str, str]) -> str | None:
    """What this machine lacks, of commands and their packages, or of rights; None if nothing."""
    lacking = [package for command, package in needed.items() if shutil.which(command) is None]
    if lacking:
        return f"needs more here: apt install {' '.join(dict.fromkeys(lacking))}"
    if os.geteuid() != 0:
        return "run it as root: it makes a Debian in a directory, and enters it"
    return None


def mirror() -> str:
    """Where this machine gets Debian from."""
    found = run("apt-get", "indextargets", "--format", "$(SITE) $(RELEASE) $(ORIGIN)", "Created-By: Packages")
    for line in found.splitlines():
        site, release, *_ = line.split(" ")
        if release == RELEASE:
            return site
    raise Broken(f"apt knows no source of Debian's {RELEASE}; name one with --mirror")


def bootstrap(base: Path, packages: Sequence[str], where: str | None) -> Path:
    """A Debian with these packages beside the essential ones; made once, and kept in `base`."""
    stamp, wanted = base / "complete", f"{RELEASE} {' '.join(packages)}\n"
    if stamp.exists() and stamp.read_text() == wanted:
        return base
    say(f"debootstrap {RELEASE}: {' '.join(packages)}")
    if base.exists():
        shutil.rmtree(base)
    run(
        *("debootstrap", "--variant=minbase", f"--include={','.join(packages)}", RELEASE, base, where or mirror()),
        within_s=BOOTSTRAP_S_MAX,
    )
    shutil.rmtree(base / "var/cache/apt/archives")
    stamp.write_text(wanted)
    return base


def two_versions(stack: contextlib.ExitStack, work: Path, given: Path | None) -> tuple[Path, Path]:
    """The .deb of this tree and of one that counts as newer; built until `stack` ends, or from the directory given."""
    made = given or Path(stack.enter_context(tempfile.TemporaryDirectory(dir=work)))
    if given is None:
        say("deploy/package, two versions")
        for suffix in ("", "+1"):
            run(ROOT / "deploy" / "package", "--output", made, "--suffix", suffix, within_s=BUILD_S_MAX)
    found = sorted(made.glob("*.deb"), key=lambda path: len(path.name))
    if len(found) != 2:
        raise Broken(f"{made} has {len(found)} packages; it should have two versions, the older with the shorter name")
    return found[0], found[1]


class Tree:
    """A Debian to be changed. It is a copy: `base` stays as it was."""

    def __init__(self, base: Path, path: Path) -> None:
        self.path = path
        self.remove()
        run("cp", "-a", "--reflink=auto", base, path)
        (path / "complete").unlink()
        # No power is cut here: dpkg need not wait for a disk with every file.
        self.write("etc/dpkg/dpkg.cfg.d/unsafe-io", "force-unsafe-io\n")

    def put(self, source: Path) -> str:
        """A file of this machine's, in the tree; returns the name that it has there."""
        shutil.copy(source, self.path / "root" / source.name)
        return f"/root/{source.name}"

    def write(self, name: str, text: str, mode: int = 0o644) -> None:
        path = self.path / name.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(mode)

    def run(self, *command: str, within_s: float = COMMAND_S_MAX, fails: bool = False, umask: str = "022") -> str:
        """What a command prints in there. It and all it began end with it: their namespace has no other process.

        There is no network but its own loopback, no init, and nothing of this machine's environment.
        """
        way_in = ("unshare", "--fork", "--pid", "--kill-child", "--mount", "--net", "--ipc", "--uts")
        start = ("/usr/bin/python3", "-I", "-c", _WITH_LOOPBACK, umask)
        return run(
            *(*way_in, f"--root={self.path}", "--mount-proc", "--wd=/", *start, *command),
            within_s=within_s,
            fails=fails,
            called=f"in the tree: {' '.join(command)}",
            env={"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", "LANG": "C"},
        )

    def remove(self) -> None:
        """Away with it. No command in it is running any more, so nothing of this machine's is mounted there."""
        if self.path.exists():
            shutil.rmtree(self.path)
