"""A clock that only counts time that surely passed.

Message expiry is measured on it, so that no wall clock jump, missing RTC or year 1970 ever expires a message. Within
one boot it follows the monotonic boot-time clock, suspend included, also across restarts of the daemon. Time while the
machine was off counts where the wall clock was synchronised before and is again at the start; otherwise the age stands
still: late is better than lost. Where it is synchronised only later, the clock is not put on, for that would take the
night from what came since; how long it was is told, for those who know what was there before. `AgeClock` reads no
clock: callers pass the time.
"""

from __future__ import annotations

import contextlib
import ctypes
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
# What systemd-timesyncd touches once it has the time; the kernel may not be told, or we may not ask it.
TIMESYNC = Path("/run/systemd/timesync/synchronized")
_TIMEX_BYTES: Final = 512  # more than struct timex of any architecture; all zero asks and changes nothing
_TIME_ERROR: Final = 5

# Nobody leaves a machine off for longer and still wants what is in it thrown away: a clock that says so is wrong.
OFF_US_MAX: Final = 400 * 86_400_000_000


def boot_id() -> str:
    """Name of this boot of the machine; empty where the system has none, so that no two boots are taken for one."""
    try:
        return BOOT_ID.read_text().strip()
    except OSError:
        return ""


def clock_synchronised() -> bool:
    """Whether somebody who knows the time keeps the wall clock right: NTP, PTP or GPS, by the kernel's word."""
    with contextlib.suppress(AttributeError, OSError):  # a libc without it, or none to be had
        if ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(_TIMEX_BYTES)) in range(_TIME_ERROR):
            return True
    return TIMESYNC.exists()


@dataclass(frozen=True, slots=True)
class AgeClock:
    """`now_us` grows by what the boot-time clock grew since `boottime_us`, never less.

    `before`: age and synchronised wall clock when the machine was last seen before this boot, until it is known how
    long it was off, or the daemon ends.
    """

    age_us: int
    boottime_us: int
    boot: str
    before: tuple[int, int] | None = None

    @classmethod
    def resume(cls, saved: str | None, boot: str, boottime_us: int, wall_us: int | None = None) -> AgeClock:
        """Go on from what `save` wrote; an unreadable value starts again at 0. `wall_us`: as in `save`."""
        try:
            age, then, saved_boot, *wall = (saved or "").split(" ")
            age_us, then_us = int(age), int(then)
            before = (age_us, int(wall[0])) if wall else None
        except ValueError:
            return cls(0, boottime_us, boot)
        if boot and saved_boot == boot and boottime_us >= then_us:
            # The same boot: what the wall clock says is no news.
            return cls(age_us + boottime_us - then_us, boottime_us, boot)
        clock = cls(age_us, boottime_us, boot, before)
        if wall_us is None:
            return clock
        # Nothing has happened on it yet, so it may be put on.
        return cls(age_us + clock.off_us(wall_us, boottime_us), boottime_us, boot)

    def now_us(self, boottime_us: int) -> int:
        return self.age_us + max(0, boottime_us - self.boottime_us)

    def off_us(self, wall_us: int, boottime_us: int) -> int:
        """How long the machine was off before this boot, as `wall_us`, which is right, tells; 0 where it can't."""
        if self.before is None:
            return 0
        age_us, then_us = self.before
        off_us = wall_us - then_us - (self.now_us(boottime_us) - age_us)
        return off_us if 0 <= off_us <= OFF_US_MAX else 0

    def settled(self) -> AgeClock:
        """The same, and how long the machine was off is no question any more."""
        return replace(self, before=None)

    def save(self, boottime_us: int, wall_us: int | None = None) -> str:
        """As text: age, boot-time clock, boot, and the wall clock if it is synchronised."""
        text = f"{self.now_us(boottime_us)} {boottime_us} {self.boot}"
        return text if wall_us is None else f"{text} {wall_us}"
