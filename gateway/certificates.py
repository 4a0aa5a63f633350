"""Watches how long the configured certificates and revocation lists last: for `status`, and in the log in good time.

Reads the files in a child process (security/expiry.py), when the daemon starts and when they have changed; judges them
by the wall clock, and says so where that clock is not set. Knows nothing of connections.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from gateway.child import ChildError, ask
from gateway.config import Config
from security.expiry import Judgement, Validity, clock_not_set, iso, judge, notice
from security.tls_faults import Stamp, file_stamp
from storeforward.age import clock_synchronised

log = logging.getLogger("lineside.certificates")

LOOK_S: Final = 10.0
READ_S_MAX: Final = 30.0


def files_of(config: Config) -> dict[Path, str]:
    """Each file, and whose it is; the first mention counts."""
    found: dict[Path, str] = {}
    tables: list[tuple[str, Any]] = [(f"hub {hub.name}", hub) for hub in config.hubs]
    tables += [(f"[{name}]", getattr(config, name)) for name in ("mqtt", "amqp", "bridge")]
    for whose, table in tables:
        for key in ("cert", "ca", "client_ca", "crl"):
            path = getattr(table, key, None)
            if path is not None:
                found.setdefault(path, f"{whose} {key}")
    return found


class Certificates:
    """`start`, then `status` whenever asked; `reload` with a new configuration. `wall` and `synchronised` are clocks.

    `on_news` is called when a clock that was not set is, or files have changed: what failed may succeed now.
    """

    def __init__(
        self,
        config: Config,
        on_news: Callable[[], None] = lambda: None,
        wall: Callable[[], float] = time.time,
        synchronised: Callable[[], bool] = clock_synchronised,
    ) -> None:
        self._files = files_of(config)
        self._on_news = on_news
        self._wall = wall
        self._synchronised = synchronised
        self._loop = asyncio.get_running_loop()
        self._stamps: Stamp | None = None
        self._validities: dict[Path, Validity] = {}
        self._errors: dict[Path, str] = {}
        self._told: dict[Path, tuple[Judgement, int | None, float]] = {}
        self._clock_set = True
        self._timer: asyncio.TimerHandle | None = None
        self._reading: asyncio.Task[None] | None = None
        self._fault = ""  # why the last reading failed

    def start(self) -> None:
        self._look()

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._reading is not None:
            self._reading.cancel()

    def reload(self, config: Config) -> None:
        self._files = files_of(config)
        self._stamps = None

    @property
    def clock_set(self) -> bool:
        return self._clock_set

    def clock_doubt(self) -> str | None:
        """Why no certificate can be judged, if so: to be said where a handshake failed by it."""
        if self._clock_set:
            return None
        return f"clock not set: it says {iso(self._wall())}"

    def status(self) -> dict[str, Any]:
        """For people and programs: the clock, and each file by its place."""
        now_s = self._wall()
        return {
            "clock": {"set": self._clock_set, "wall": iso(now_s), "synchronised": self._synchronised()},
            "certificates": [
                {
                    "file": str(path),
                    "for": whose,
                    "state": "unreadable" if found is None else judge(found, now_s, self._clock_set).value,
                    "error": self._errors.get(path),
                    "subject": None if found is None else found.subject,
                    "not_before": None if found is None else iso(found.not_before_s),
                    "not_after": None if found is None else iso(found.not_after_s),
                    "days_left": None if found is None else round((found.not_after_s - now_s) / 86400, 2),
                }
                for path, whose in self._files.items()
                if (found := self._validities.get(path)) is not None or path in self._errors
            ],
        }

    # ------------------------------------------------------------------ within

    def _look(self) -> None:
        stamps = file_stamp(*self._files)
        if (stamps != self._stamps or self._fault) and self._reading is None:
            before, self._stamps = self._stamps, stamps
            if before not in (None, stamps):
                self._on_news()
            if self._files:
                self._reading = self._loop.create_task(self._read())
        self._judge()
        self._timer = self._loop.call_later(LOOK_S, self._look)

    async def _read(self) -> None:
        paths = list(self._files)
        try:
            answer = await ask("security.expiry", *map(str, paths), timeout_s=READ_S_MAX)
            answers = [json.loads(line) for line in answer.splitlines()]
        except (ChildError, ValueError) as error:
            # What is known stays; the next look tries again, and says no more of it.
            if str(error) != self._fault:
                self._fault = str(error)
                log.error("the ends of the certificates could not be read", extra={"error": str(error)})
            return
        finally:
            self._reading = None
        self._fault = ""
        self._validities = {Path(a["path"]): Validity(**a) for a in answers if "error" not in a}
        self._errors = {Path(a["path"]): a["error"] for a in answers if "error" in a}
        self._judge()

    def _judge(self) -> None:
        now_s = self._wall()
        begins = [found.not_before_s for path, found in self._validities.items() if not found.is_list]
        was, self._clock_set = self._clock_set, not clock_not_set(now_s, self._synchronised(), begins)
        if was and not self._clock_set:
            log.warning("clock not set: no certificate can be judged by it", extra={"wall": iso(now_s)})
        elif self._clock_set and not was:
            log.info("clock set", extra={"wall": iso(now_s)})
            self._on_news()
        if not self._clock_set:
            return
        for path, found in self._validities.items():
            self._tell(path, found, now_s)

    def _tell(self, path: Path, found: Validity, now_s: float) -> None:
        judged, within = judge(found, now_s, True), notice(found, now_s)
        now = judged, within, found.not_after_s
        if self._told.get(path) == now:
            return
        before = self._told.get(path)
        self._told[path] = now
        what = "revocation list" if found.is_list else "certificate"
        facts = {"file": str(path), "for": self._files.get(path, ""), "not_after": iso(found.not_after_s)}
        match judged:
            case Judgement.EXPIRED:
                log.error(f"{what} expired", extra=facts)
            case Judgement.NOT_YET:
                log.error(f"{what} not yet valid", extra=facts | {"not_before": iso(found.not_before_s)})
            case Judgement.ENDS_SOON:
                log.warning(f"{what} ends within {within} day{'s' if within != 1 else ''}", extra=facts)
            case _ if before is not None and before[0] is not Judgement.GOOD:
                log.info(f"{what} renewed", extra=facts)
