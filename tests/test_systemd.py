"""The units: accepted by systemd, with little to gain for who takes the daemon over, and one like the other."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import missing

UNITS = Path(__file__).resolve().parent.parent / "systemd"
EXPOSURE_MAX = 1.5
NAMES = ["lineside.service", "lineside@.service", "lineside.socket", "lineside@.socket"]


@pytest.fixture(scope="module")
def analyze() -> str:
    found = shutil.which("systemd-analyze")
    if found is None:
        missing("systemd-analyze is not on the PATH: apt install systemd")
    return found


@pytest.mark.parametrize("name", NAMES)
def test_systemd_has_nothing_to_say_against_the_unit(name: str, analyze: str, tmp_path: Path) -> None:
    for unit in NAMES:
        text = (UNITS / unit).read_text().replace("/opt/lineside/bin/lineside", sys.executable)
        (tmp_path / unit).write_text(text)
    done = subprocess.run(
        [analyze, "verify", "--man=no", str(tmp_path / name.replace("@", "@depot"))]
        if "@" not in name
        else [analyze, "verify", "--man=no", str(tmp_path / name)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    ours = [line for line in (done.stdout + done.stderr).splitlines() if "lineside" in line]
    assert (done.returncode, ours) == (0, [])


@pytest.mark.parametrize("name", ["lineside.service", "lineside@.service"])
def test_there_is_little_to_gain_for_who_takes_the_daemon_over(name: str, analyze: str) -> None:
    done = subprocess.run(
        [analyze, "security", "--offline=true", str(UNITS / name)],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    exposure = re.search(r"Overall exposure level for \S+: ([\d.]+)", done.stdout)
    assert exposure is not None, done.stdout
    assert float(exposure[1]) <= EXPOSURE_MAX


def test_a_gateway_of_several_is_set_up_as_the_only_one_is() -> None:
    def settings(name: str) -> list[str]:
        lines = (UNITS / name).read_text().splitlines()
        return [line for line in lines if line and not line.startswith("#")]

    single = settings("lineside.service")
    several = settings("lineside@.service")
    different = [(a, b) for a, b in zip(single, several, strict=True) if a != b]
    assert len(different) == 7
    for one, other in different:
        assert "%i" in other
        assert other.replace("-%i", "").replace(" %i", "").replace("%i", "lineside") == one
