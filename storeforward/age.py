"""A clock that only counts time it has seen pass.

Message expiry is measured on it, so that no wall clock jump, missing RTC or year 1970 ever expires a message. Within
one boot it follows the monotonic boot-time clock, also across restarts of the daemon. Time while the machine was off
is not counted: nobody can say how long it was. Reads no clock itself: callers pass `boottime_us`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def boot_id() -> str:
    """Name of this boot of the machine; empty where the system has none, so that no two boots are taken for one."""
    try:
        return BOOT_ID.read_text().strip()
    except OSError:
        return ""


@dataclass(frozen=True, slots=True)
class AgeClock:
    """`now_us` grows by what the boot-time clock grew since `boottime_us`, never less."""

    age_us: int
    boottime_us: int
    boot: str

    @classmethod
    def resume(cls, saved: str | None, boot: str, boottime_us: int) -> AgeClock:
        """Go on from what `save` wrote; an unreadable value starts again at 0."""
        try:
            age, then, saved_boot = (saved or "").split(" ", 2)
            age_us, then_us = int(age), int(then)
        except ValueError:
            return cls(0, boottime_us, boot)
        if boot and saved_boot == boot and boottime_us >= then_us:
            age_us += boottime_us - then_us
        return cls(age_us, boottime_us, boot)

    def now_us(self, boottime_us: int) -> int:
        return self.age_us + max(0, boottime_us - self.boottime_us)

    def save(self, boottime_us: int) -> str:
        return f"{self.now_us(boottime_us)} {boottime_us} {self.boot}"
