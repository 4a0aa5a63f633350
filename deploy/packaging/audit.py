"""Asks pip-audit whether a vulnerability of anything in the locks is known, and says which it had no answer for.

pip-audit itself ends with 0 where its service knows none of the packages. Exit status here: 0 all were looked up and
nothing is known against any, 1 something is, 2 pip-audit can't be had, 3 the service did not answer for all of them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import lockfile

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
LOCKS = (HERE / "lock.txt", HERE / "lock-build.txt")
PIP_AUDIT = "2.10.1"
AUDIT_S_MAX = 600
CLEAN, KNOWN, UNUSABLE, UNANSWERED = range(4)


class Unusable(Exception):
    """pip-audit can't be had here."""


def pip_audit() -> Path:
    """The tool, in an environment of its own: nothing of it gets near the package."""
    home = ROOT / "build" / f"pip-audit-{PIP_AUDIT}"
    program, stamp = home / "bin" / "pip-audit", home / "complete"
    if not stamp.exists():
        for command in (
            [sys.executable, "-m", "venv", "--clear", str(home)],
            [str(home / "bin" / "pip"), "install", "-q", "--no-input", f"pip-audit=={PIP_AUDIT}"],
        ):
            done = subprocess.run(command, capture_output=True, text=True, timeout=AUDIT_S_MAX, check=False)
            if done.returncode:
                raise Unusable(f"pip-audit {PIP_AUDIT} could not be installed: {last_line(done.stderr)}")
        stamp.touch()
    return program


def ask(program: Path, service: str, locks: list[Path]) -> tuple[list[dict[str, Any]], str]:
    """What the tool reports of each package, and its last words; nothing but words if it could not finish."""
    with tempfile.TemporaryDirectory() as directory:
        report = Path(directory) / "report.json"
        # The locks are complete: neither pip nor an index is asked what else there may be.
        words = ["--require-hashes", "--disable-pip", "--progress-spinner", "off", "--vulnerability-service", service]
        for path in locks:
            words += ["--requirement", str(path)]
        try:
            done = subprocess.run(
                [str(program), *words, "--format", "json", "--output", str(report)],
                capture_output=True,
                text=True,
                timeout=AUDIT_S_MAX,
                check=False,
            )
        except FileNotFoundError:
            raise Unusable(f"{program} is not there") from None
        except subprocess.TimeoutExpired:
            return [], f"no answer within {AUDIT_S_MAX} s"
        if not report.exists() or not (text := report.read_text()):
            return [], last_line(done.stderr)
    return json.loads(text)["dependencies"], last_line(done.stderr)


def last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no reason given"])[-1][:300]


def judge(pins: set[tuple[str, str]], reported: list[dict[str, Any]], words: str) -> tuple[int, list[str]]:
    """The exit status and what to print, from the packages (name, version) to look up and what was reported of them."""
    answered = {(lockfile.normal(each["name"]), each["version"]): each["vulns"] for each in reported if "vulns" in each}
    known = []
    for (name, version), advisories in sorted(answered.items()):
        for advisory in advisories:
            fixed = ", ".join(advisory["fix_versions"]) or "no version"
            called = " ".join([advisory["id"], *advisory.get("aliases", [])])
            known.append(f"{name} {version}: {called}; fixed in {fixed}")
    lines = list(dict.fromkeys(known))
    unanswered = sorted(pins - answered.keys())
    if unanswered:
        reason = next((each["skip_reason"] for each in reported if "skip_reason" in each), words)
        lines.append(
            f"deploy/audit: NOT CHECKED: {len(unanswered)} of {len(pins)} packages, as the advisory service "
            f"did not answer for them ({reason})"
        )
    if known:
        return KNOWN, lines
    if unanswered:
        return UNANSWERED, lines
    return CLEAN, [f"deploy/audit: {len(pins)} packages, nothing known against any"]


def main() -> int:
    parser = argparse.ArgumentParser(prog="deploy/audit", description=__doc__)
    parser.add_argument("--service", choices=("pypi", "osv"), default="pypi", help="whom to ask (default: pypi)")
    parser.add_argument("--pip-audit", type=Path, help="the program, where one is installed already")
    parser.add_argument("locks", nargs="*", type=Path, default=LOCKS, help="default: both in deploy/packaging")
    options = parser.parse_args()
    try:
        pins = {(pin.name, pin.version) for path in options.locks for pin in lockfile.read(path.read_text())}
        reported, words = ask(options.pip_audit or pip_audit(), options.service, options.locks)
    except (OSError, ValueError, Unusable) as error:
        print(f"deploy/audit: {error}", file=sys.stderr)
        return UNUSABLE
    status, lines = judge(pins, reported, words)
    print("\n".join(lines))
    return status


if __name__ == "__main__":
    sys.exit(main())
