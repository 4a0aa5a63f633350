"""Where a run was made: processor, memory, kernel, file system, Python, and the commit of a source tree."""

from __future__ import annotations

import os
import platform
import sqlite3
import subprocess
import time
from pathlib import Path

import gateway
from gateway.bench.daemon import ROOT

GIT_S_MAX = 10.0


def describe(directory: Path) -> dict[str, object]:
    """Facts, for whoever compares two runs."""
    from gateway.simulate.disk import find_mount

    mount = find_mount(directory)
    return {
        "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "lineside": gateway.__version__,
        "commit": commit(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "load": round(os.getloadavg()[0], 2),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "sqlite": sqlite3.sqlite_version,
        "file_system": mount.fs,
    }


def line(facts: dict[str, object]) -> str:
    """The same in one line."""
    memory = int(str(facts["memory_bytes"])) / 2**30
    found = f"{facts['processor']}, {facts['cores']} cores, {memory:.0f} GiB, {facts['file_system']}"
    return f"{found}, Python {facts['python']}, commit {facts['commit'] or '-'}, {facts['when']}"


def commit() -> str | None:
    """Of the source tree, with `+` where it was changed since; None where this is an installed package."""
    if not (ROOT / ".git").exists():
        return None
    try:
        found = _git("rev-parse", "--short=12", "HEAD").strip()
        return found + ("+" if _git("status", "--porcelain", "--untracked-files=no").strip() else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=GIT_S_MAX, check=True).stdout


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.machine()
    names = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    return names[0] if names else platform.machine()
