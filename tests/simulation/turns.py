"""Who got how much of a crowded line, and how long who waited for it: the checker of classes, shares and rate.

It knows when apps sent and when the hub got it, and nothing of how the gateway chooses. Only calm spans are judged, in
which the line stood and the hub took everything.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

from tests.simulation.history import History
from tests.simulation.setting import CLASSES, Setting

# From an app's sending until the gateway could send: the app's line, and a commit.
GRACE_S = 0.05
# How much of its share a class must really have had; the rest is what headers, answers and turns cost.
SHARE_MIN = 0.6
# While anybody waits the line must be used: this much of it by messages.
USED_MIN = 0.5
# What of a line may be under way before an alarm, in seconds of it, beyond its round trip: DESIGN says about 0.1.
UNDER_WAY_S = 0.3
FRAME_BYTES = 100  # what a message costs beyond its own bytes, in frames and headers
WRITES_BYTES = 4096  # what is said on a connection that is no message: its opening, above all


@dataclass(frozen=True, slots=True)
class Wait:
    """A stream's next message waited from begin to end. fresh: it came when nothing else of its stream waited."""

    stream: str
    size_bytes: int
    begin: float
    end: float
    fresh: bool


@dataclass(slots=True)
class Turns:
    """calms: spans in which nothing was wrong, calm_s long each. written: when the gateway wrote how many bytes."""

    setting: Setting
    delay_s: tuple[float, float]
    calm_s: float
    calms: list[tuple[float, float]] = field(default_factory=list)
    written: list[tuple[float, int]] = field(default_factory=list)

    @property
    def rtt_s(self) -> float:
        return 2 * self.delay_s[1]

    @property
    def rate(self) -> float:
        """What messages may have of the line, in bytes a second."""
        return min(each for each in (self.setting.rate, self.setting.line_rate) if each is not None)

    @property
    def quantum(self) -> float:
        """What may be under way, in bytes: all that is not this waits for its turn."""
        return self.rate * (UNDER_WAY_S + 2 * self.rtt_s) + 2048

    def share(self, stream: str) -> float:
        """The least part of the line that a stream has while it has something to send."""
        class_, setting = CLASSES[stream], self.setting
        of_class = setting.shares[("urgent", "normal", "bulk").index(class_)] / 100
        if list(CLASSES.values()).count(class_) == 1:
            return of_class
        return of_class * min(setting.live, 100 - setting.live, 50) / 100

    def check(self, history: History) -> None:
        assert self.calms, "no span was calm"
        for calm in self.calms:
            self._check_waits(history, calm)
            self._check_shares(history, calm)
        if self.setting.rate is not None:
            self._check_rate(self.setting.rate)

    def waits(self, history: History, calm: tuple[float, float]) -> Iterator[Wait]:
        """Of each stream's messages, in order, how long each was the next and could have gone, the way not counted."""
        start, end = calm
        latest: dict[str, float] = defaultdict(float)
        over: set[str] = set()
        for arrival in sorted(history.hub, key=lambda each: each.at):  # what comes again had to wait again
            sent = history.sent[arrival.payload]
            at = arrival.at - self.delay_s[0]
            begin = max(sent.at + GRACE_S, latest[sent.stream], start)
            latest[sent.stream] = at
            if sent.stream in over or begin >= end:
                continue
            if at >= end:
                over.add(sent.stream)
            if at > start:
                yield Wait(sent.stream, sent.size_bytes, begin, min(at, end), begin == sent.at + GRACE_S)

    def _check_waits(self, history: History, calm: tuple[float, float]) -> None:
        """An alarm waits for what is under way only; and nobody waits until others have had more than their share."""
        for wait in self.waits(history, calm):
            need = wait.size_bytes + self.quantum
            if wait.stream == "alarms" and wait.fresh:
                most = need / self.rate
            else:
                most = 2 * need / (self.share(wait.stream) * self.rate)
            most += 2 * self.rtt_s
            waited = wait.end - wait.begin
            assert waited <= most, (
                f"{wait.stream}: {wait.size_bytes} bytes waited {waited:.3f} s from {wait.begin - 1000:.3f} on, "
                f"at most {most:.3f} s at {self.rate:.0f} bytes a second"
            )

    def _check_shares(self, history: History, calm: tuple[float, float]) -> None:
        """The line is used, and each class that had enough to send had its share."""
        start, end = calm
        arrived: dict[str, float] = {}
        for arrival in history.hub:
            arrived.setdefault(arrival.payload, arrival.at)
        waiting: dict[str, int] = defaultdict(int)  # at the beginning, in bytes
        for payload, sent in history.sent.items():
            if sent.at < start <= arrived.get(payload, end):
                waiting[CLASSES[sent.stream]] += sent.size_bytes
        got: dict[str, int] = defaultdict(int)
        count = 0
        for arrival in history.hub:  # what comes again takes its room, too
            if start <= arrival.at < end:
                count += 1
                sent = history.sent[arrival.payload]
                got[CLASSES[sent.stream]] += sent.size_bytes
        whole = self.rate * (end - start)
        if sum(waiting.values()) < whole:
            return
        largest = max(sent.size_bytes for sent in history.sent.values())
        used = sum(got.values())
        least = USED_MIN * whole - largest - count * FRAME_BYTES
        assert used >= least, f"{used} bytes in {count} messages on a line for {whole:.0f}"
        for class_, percent in zip(("urgent", "normal", "bulk"), self.setting.shares, strict=True):
            if waiting[class_] >= whole * percent / 100:
                least = SHARE_MIN * percent / 100 * used - largest - self.quantum
                assert got[class_] >= least, f"{class_} had {got[class_]} of {used} bytes, and its share is {percent} %"

    def _check_rate(self, rate: int) -> None:
        """Never more than the rate allows, but for what may go at once."""
        level, before = 0.0, 0.0
        most = max(rate * 0.4, 2048) + WRITES_BYTES
        for at, size in self.written:
            level = max(0.0, level - (at - before) * rate) + size
            before = at
            assert level <= most, f"{level:.0f} bytes too many at {at - 1000:.3f}, the rate is {rate}"
