"""The kernel's word that the line is back, heard in a network namespace of the test's own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

SCRIPT = """
import select, subprocess, sys
from gateway.uplink import netlink

sock = netlink.open_socket()
assert sock is not None
assert not netlink.drain(sock), "nothing has happened yet"
for state, news in (("up", True), ("down", False), ("up", True)):
    subprocess.run(["ip", "link", "set", "lo", state], check=True)
    heard = False
    while select.select([sock], [], [], 5.0 if news and not heard else 0.3)[0]:
        heard = netlink.drain(sock) or heard
    assert heard is news, (state, heard)
print("heard")
"""


def test_a_line_that_comes_is_news_and_one_that_goes_is_not() -> None:
    if os.geteuid() != 0 or not shutil.which("unshare") or not shutil.which("ip"):
        pytest.skip("needs root, unshare and ip to make a network namespace of its own")
    result = subprocess.run(
        ["unshare", "--net", sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=30, check=False
    )
    if "unshare failed" in result.stderr or "Operation not permitted" in result.stderr:
        pytest.skip(f"no network namespace to be had: {result.stderr.strip()}")
    assert result.stdout == "heard\n", result.stderr
