"""A loop and a processor that a test turns by hand."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(eq=False)
class Handle:
    call: Callable[..., object]
    args: tuple[Any, ...]
    cancelled: bool = False

    def cancel(self) -> None:
        self.cancelled = True


class HandLoop:
    """Time passes by what is waited for, and by what is worked (`work`)."""

    def __init__(self) -> None:
        self.now = 100.0
        self.cpu_s = 0.0
        self._numbers = itertools.count()
        self._due: list[tuple[float, int, Handle]] = []

    def time(self) -> float:
        return self.now

    def work(self, seconds: float) -> None:
        self.now += seconds
        self.cpu_s += seconds

    def call_soon(self, call: Callable[..., object], *args: Any) -> Handle:
        return self.call_later(0.0, call, *args)

    def call_later(self, delay_s: float, call: Callable[..., object], *args: Any) -> Handle:
        handle = Handle(call, args)
        heapq.heappush(self._due, (self.now + delay_s, next(self._numbers), handle))
        return handle

    def live(self, seconds: float) -> None:
        end = self.now + seconds
        while self._due and self._due[0][0] <= end:
            at, _, handle = heapq.heappop(self._due)
            self.now = max(self.now, at)
            if not handle.cancelled:
                handle.call(*handle.args)
        self.now = max(self.now, end)
