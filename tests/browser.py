"""A headless Chromium for tests, spoken to over its DevTools pipe: open a page, run a line of script in it.

The browser has a profile directory of its own, talks to nobody of its own accord, and ends with `close`.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any, Self

WAIT_S = 60.0
CLOSE_S = 10.0
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-extensions",
    "--remote-debugging-pipe",
)


class Browser:
    """One page. Messages are JSON, each with a NUL behind it, on the browser's descriptors 3 (in) and 4 (out)."""

    def __init__(self, program: str, profile: Path) -> None:
        in_read, self._in = os.pipe()
        self._out, out_write = os.pipe()
        # The shell puts the two pipes where the browser looks for them.
        script = f'exec "$@" 3<&{in_read} 4>&{out_write}'
        self._log = (profile.parent / "browser.log").open("ab")
        self.process = subprocess.Popen(
            ["bash", "-c", script, "browser", program, *FLAGS, f"--user-data-dir={profile}", "about:blank"],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            pass_fds=(in_read, out_write),
        )
        os.close(in_read)
        os.close(out_write)
        self._unread = b""
        self._last = 0
        self._session: str | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def open(self, url: str) -> None:
        if self._session is None:
            target = self._call("Target.createTarget", url="about:blank")["targetId"]
            self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self._call("Page.navigate", url=url)
        self.wait_for("document.readyState === 'complete' && location.href !== 'about:blank'")

    def run(self, script: str) -> Any:
        """The value of an expression in the page."""
        answer = self._call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def wait_for(self, script: str) -> None:
        """Until the expression is true; navigation may take its page away meanwhile."""
        deadline = time.monotonic() + WAIT_S
        while not self.run(script):
            if time.monotonic() > deadline:
                shown = self.run("document.body.innerText")
                raise AssertionError(f"{script}: not within {WAIT_S:g} s\n{shown}")
            time.sleep(0.05)

    def _call(self, method: str, **params: Any) -> dict[str, Any]:
        self._last += 1
        message: dict[str, Any] = {"id": self._last, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._in, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._last:
                assert "error" not in answer, (method, answer)
                return dict(answer["result"])

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._unread:
            data = os.read(self._out, 65536)
            assert data, f"the browser ended: {Path(self._log.name).read_text(errors='replace')[-2000:]}"
            self._unread += data
        text, _, self._unread = self._unread.partition(b"\0")
        return dict(json.loads(text))

    def close(self) -> None:
        """The browser ends when its pipe does; if it does not, it is killed."""
        os.close(self._in)
        try:
            self.process.wait(CLOSE_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        os.close(self._out)
        self._log.close()
