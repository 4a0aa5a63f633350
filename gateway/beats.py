"""Timers that recur fall on the same moments, so that an idle machine is woken once for all of them."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable

EARLY = 0.01  # of a period


def call_at_next(loop: asyncio.AbstractEventLoop, period_s: float, call: Callable[[], None]) -> asyncio.TimerHandle:
    """Call at the next whole multiple of `period_s` of the loop's clock."""
    # A call that comes a little early, as loops may make it, is not made again for the same moment.
    return loop.call_at((math.floor(loop.time() / period_s + EARLY) + 1) * period_s, call)
