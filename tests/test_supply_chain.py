"""What the package is built from: locked whole, by hash, as pyproject.toml wants it; what the audit makes of answers.

Needs no network: what a package needs is read off the one that is installed here, where that is the locked version.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
PACKAGING = ROOT / "deploy" / "packaging"
sys.path.insert(0, str(PACKAGING))
try:
    import lockfile
finally:
    sys.path.remove(str(PACKAGING))

LOCK = (PACKAGING / "lock.txt").read_text()
LOCK_BUILD = (PACKAGING / "lock-build.txt").read_text()
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
WANTED = [Requirement(each) for each in PYPROJECT["project"]["dependencies"]]
# What builds the wheels: Lineside's own backend, and what Qpid Proton is compiled with.
WANTED_BUILD = [
    *(Requirement(each) for each in PYPROJECT["build-system"]["requires"]),
    *(Requirement(each) for each in (PACKAGING / "lock-build.in").read_text().split()),
]
Needs = Callable[[lockfile.Pin], list[Requirement] | None]


def needs(pin: lockfile.Pin) -> list[Requirement] | None:
    """What a locked package needs here; None where another version is installed, or none."""
    try:
        found = metadata.distribution(pin.name)
    except metadata.PackageNotFoundError:
        return None
    if found.version != pin.version:
        return None
    wanted = [Requirement(each) for each in found.requires or []]
    return [each for each in wanted if each.marker is None or each.marker.evaluate({"extra": ""})]


def faults(pins: list[lockfile.Pin], wanted: list[Requirement], needs: Needs) -> list[str]:
    """All that is wrong with a lock, of what can be known."""
    found: list[str] = []
    by_name = {pin.name: pin for pin in pins}
    if len(by_name) != len(pins):
        found.append("a package stands there twice")
    found += [f"{pin.name} has no hash" for pin in pins if not pin.hashes]
    reached: set[str] = set()
    to_do = [("pyproject.toml", each) for each in wanted]
    all_known = True
    while to_do:
        who, requirement = to_do.pop()
        name = lockfile.normal(requirement.name)
        pin = by_name.get(name)
        if pin is None:
            found.append(f"{who} needs {requirement}, which is not locked")
            all_known = False
            continue
        if not requirement.specifier.contains(pin.version, prereleases=True):
            found.append(f"{who} needs {requirement}, locked is {pin.version}")
        if name not in reached:
            reached.add(name)
            further = needs(pin)
            all_known = all_known and further is not None
            to_do += [(name, each) for each in further or []]
    if all_known:
        found += [f"nobody needs {name}" for name in sorted(by_name.keys() - reached)]
    return found


@pytest.mark.parametrize(("text", "wanted"), [(LOCK, WANTED), (LOCK_BUILD, WANTED_BUILD)], ids=["lock", "lock-build"])
def test_the_lock_is_whole_hashed_and_as_pyproject_wants_it(text: str, wanted: list[Requirement]) -> None:
    assert faults(lockfile.read(text), wanted, needs) == []


def test_what_a_locked_package_needs_is_locked() -> None:
    """Read off what is installed here, in the version that is locked; of another version nothing can be said."""
    pins = lockfile.read(LOCK)
    locked = {pin.name: pin.version for pin in pins}
    known = {pin.name: further for pin in pins if (further := needs(pin)) is not None}
    assert known
    for name, further in known.items():
        for each in further:
            assert each.specifier.contains(locked[lockfile.normal(each.name)], prereleases=True), (name, each)


def test_what_is_compiled_is_compiled_with_what_it_will_run_with() -> None:
    run, build = ({pin.name: pin for pin in lockfile.read(text)} for text in (LOCK, LOCK_BUILD))
    assert run["cffi"] == build["cffi"]


A, B = "a" * 64, "b" * 64


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (f"one==1 --hash=sha256:{A}\ntwo==2", "two has no hash"),
        (f"one==1 --hash=sha256:{A}", "one needs two>=2, which is not locked"),
        (f"two==2 --hash=sha256:{A}", "pyproject.toml needs one<2, which is not locked"),
        (f"one==1 --hash=sha256:{A}\ntwo==1.9 --hash=sha256:{B}", "one needs two>=2, locked is 1.9"),
        (f"one==2 --hash=sha256:{A}\ntwo==2 --hash=sha256:{B}", "pyproject.toml needs one<2, locked is 2"),
        (f"one==1 --hash=sha256:{A}\nTwo==2 --hash=sha256:{B}\nsix==6 --hash=sha256:{B}", "nobody needs six"),
        (
            f"one==1 --hash=sha256:{A}\ntwo==2 --hash=sha256:{B}\ntwo==2 --hash=sha256:{B}",
            "a package stands there twice",
        ),
    ],
)
def test_a_fault_of_a_lock_is_found(text: str, fault: str) -> None:
    graph = {"one": [Requirement("two>=2")], "two": [], "six": []}
    assert faults(lockfile.read(text), [Requirement("one<2")], lambda pin: graph[pin.name]) == [fault]


@pytest.mark.parametrize(
    "line",
    [
        "one>=1",
        "one",
        "one @ file:///srv/one.whl",
        "-e .",
        "--extra-index-url=file:///srv",
        f"--hash=sha256:{A}",
        f"one==1 --hash=md5:{A[:32]}",
        f"one==1 --hash=sha256:{A[1:]}",
    ],
)
def test_a_lock_holds_nothing_but_versions_and_hashes(line: str) -> None:
    with pytest.raises(ValueError, match="line 1"):
        lockfile.read(line)


# ------------------------------------------------------------------ the audit

FINE = {"name": "One_A", "version": "1", "vulns": []}
BAD = FINE | {"vulns": [{"id": "PYSEC-1", "fix_versions": ["1.1"], "aliases": ["CVE-1"], "description": ""}]}
SKIPPED = {"name": "two", "skip_reason": "Dependency not found on PyPI and could not be audited: two (2)"}


def audit(directory: Path, reported: list[dict[str, object]] | None) -> subprocess.CompletedProcess[str]:
    """deploy/audit of a lock of two packages, with a pip-audit that reports this; with None, one that cannot."""
    lock = directory / "lock.txt"
    lock.write_text(f"one-a==1 --hash=sha256:{A}\ntwo==2 --hash=sha256:{B}\n")
    tool = directory / "pip-audit"
    # As pip-audit 2.10: its status says nothing of what it skipped, and without its service it writes no report.
    code = "import sys; sys.exit('requests.exceptions.ConnectionError: unreachable')"
    if reported is not None:
        report = json.dumps({"dependencies": reported, "fixes": []})
        code = f"import sys; open(sys.argv[sys.argv.index('--output') + 1], 'w').write({report!r})"
    tool.write_text(f"#!{sys.executable}\n{code}\n")
    tool.chmod(0o755)
    return subprocess.run(
        [sys.executable, str(PACKAGING / "audit.py"), "--pip-audit", str(tool), str(lock)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize(
    ("reported", "status", "said"),
    [
        ([FINE, {"name": "two", "version": "2", "vulns": []}], 0, "2 packages, nothing known"),
        ([BAD, {"name": "two", "version": "2", "vulns": []}], 1, "one-a 1: PYSEC-1 CVE-1; fixed in 1.1"),
        ([FINE, SKIPPED], 3, "NOT CHECKED: 1 of 2 packages"),
        ([FINE], 3, "NOT CHECKED: 1 of 2 packages"),
        ([FINE, {"name": "two", "version": "1.9", "vulns": []}], 3, "NOT CHECKED: 1 of 2 packages"),
        ([BAD, SKIPPED], 1, "NOT CHECKED: 1 of 2 packages"),
        ([], 3, "NOT CHECKED: 2 of 2 packages"),
        (None, 3, "ConnectionError: unreachable"),
    ],
)
def test_the_audit_answers_only_for_what_was_looked_up(
    tmp_path: Path, reported: list[dict[str, object]] | None, status: int, said: str
) -> None:
    done = audit(tmp_path, reported)
    assert done.returncode == status, done.stderr
    assert said in done.stdout


def test_an_audit_without_its_tool_is_another_thing_than_one_without_its_service(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(PACKAGING / "audit.py"), "--pip-audit", str(tmp_path / "nowhere")],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert "nowhere is not there" in done.stderr
