"""How much may be handed to a line now, so that little stands before what comes next: a token bucket, and a gauge.

`Bucket` keeps to a rate that somebody has set. `Gauge` knows no rate: it watches how fast the kernel gets rid of what
it was handed (measured, not promised) and allows only what the line carries in about TARGET_S. Bytes and the time are
arguments; knows no socket.
"""

from __future__ import annotations

import math
from collections import deque

# A turn of the bucket: what it lets go at once. On a slow line as long as TURN_S_MAX, so that headers do not eat the
# line, but no more than TURN_BYTES; on a fast one TURN_S.
TURN_S, TURN_S_MAX = 0.05, 0.4
TURN_BYTES_MIN, TURN_BYTES = 256, 1024
# What one write costs beyond its payload on the wire: a TLS record, and IP and TCP headers for every segment.
RECORD_BYTES = 29
SEGMENT_BYTES, SEGMENT_HEADER_BYTES = 1400, 52

# How long the line may be busy with what it was handed, its round trip not counted.
TARGET_S = 0.1
LIMIT_BYTES_START = 2 << 10
LIMIT_BYTES_MIN, LIMIT_BYTES_MAX = 1 << 10, 4 << 20
INTERVAL_S_MIN = 0.05
RATES = 3
# Without any acknowledgement for so long, a full line carries nothing.
STILL_S_MIN = 3.0
# When to look again at a line that is full.
LOOK_S_MIN, LOOK_S_MAX = 0.002, 0.1
CHUNK_BYTES_MIN, CHUNK_BYTES_MAX = 256, 256 << 10


def on_the_wire(size: int, writes: int, segments: int | None, tls: bool) -> int:
    """About how many bytes the line carries for `size` bytes in so many writes and TCP segments (None: not known)."""
    if segments is None:
        segments = writes + size // SEGMENT_BYTES
    return size + segments * SEGMENT_HEADER_BYTES + (writes * RECORD_BYTES if tls else 0)


def turn_bytes(rate: float) -> int:
    """What goes at once where so many bytes a second are allowed."""
    return max(TURN_BYTES_MIN, min(TURN_BYTES, int(rate * TURN_S_MAX)), int(rate * TURN_S))


class Bucket:
    """A rate in bytes a second. Whoever sends anyway puts it into debt, and the others wait the longer."""

    def __init__(self, rate: float, now: float) -> None:
        assert rate > 0
        self.rate = rate
        self.burst = turn_bytes(rate)
        self._level = float(self.burst)
        self._at = now

    def level(self, now: float) -> int:
        """What may go now; negative: what went too early."""
        if now > self._at:
            self._level = min(float(self.burst), self._level + (now - self._at) * self.rate)
            self._at = now
        return int(self._level)

    def wrote(self, size: int) -> None:
        """These many bytes went to the wire, headers and all."""
        self._level -= size

    def ready_at(self, now: float, size: int) -> float:
        """When `size` (at most the burst) may go."""
        return now + max(0.0, min(size, self.burst) - self.level(now)) / self.rate


class Gauge:
    """What a line of unknown and changing rate should hold. Call `observe` before asking `room`.

    The limit doubles while the line is found empty though it was filled; while it stays busy, the limit is what was
    really carried, a round trip and TARGET_S long. Only time in which the limit held somebody up says what a line can
    carry at most. `rate_max`: what somebody says it carries at most.
    """

    def __init__(self, limit: int = LIMIT_BYTES_START, rate_max: float = math.inf) -> None:
        self._rate_max = rate_max
        self.limit = max(LIMIT_BYTES_MIN, min(LIMIT_BYTES_START, limit))
        self.rate: float | None = None  # bytes a second, as last measured
        self._rates: deque[float] = deque(maxlen=RATES)
        self._queued = 0
        self._rtt_s = 0.0
        self._full_since: float | None = None
        self._carried = self._carried_then = 0

    def observe(self, now: float, carried: int, queued: int, rtt_s: float) -> None:
        """`carried`: bytes the far end has acknowledged, ever; `queued`: those handed over that it has not."""
        moved = carried > self._carried
        self._queued, self._carried, self._rtt_s = queued, carried, rtt_s
        since = self._full_since
        most = LIMIT_BYTES_MAX
        if self._rate_max < LIMIT_BYTES_MAX:
            most = max(LIMIT_BYTES_MIN, int(self._rate_max * (rtt_s + TARGET_S)) + turn_bytes(self._rate_max))
            self.limit = min(self.limit, most)
        if since is None:
            return
        elapsed = now - since
        target_s = 2 * rtt_s + TARGET_S
        if queued * 8 <= self.limit and elapsed <= target_s:  # filled, and all but carried away at once
            self.limit = min(most, self.limit * 2)
            self._full_since = None
        elif elapsed >= (max(INTERVAL_S_MIN, 1.5 * rtt_s) if moved else max(STILL_S_MIN, 8 * rtt_s)):
            # From one acknowledgement to another: on a slow line they come seconds apart, and each for a whole segment.
            # Even so, one look that catches few of them is no news.
            self._rates.append((carried - self._carried_then) / elapsed)
            self.rate = max(self._rates)
            # More than a round trip: nothing is handed over until a part of a message has room.
            wanted = int(self.rate * target_s)
            self.limit = max(LIMIT_BYTES_MIN, min(most, wanted, self.limit * 2))
            self._full_since, self._carried_then = now, carried

    def room(self) -> int:
        """What may be handed over now; negative: what is there too much."""
        return self.limit - self._queued

    def handed(self, size: int) -> None:
        """So much was handed over since the last look."""
        self._queued += size

    def held_up(self, now: float) -> None:
        """Somebody has more to send than there was room."""
        if self._full_since is None:
            self._full_since, self._carried_then = now, self._carried

    def look_at(self, now: float) -> float:
        """When to look again whether there is room."""
        if not self.rate:
            young = self._full_since is None or now - self._full_since < INTERVAL_S_MIN
            return now + (LOOK_S_MIN if young else LOOK_S_MAX / 4)
        over = self._queued - self.limit // 2
        return now + min(LOOK_S_MAX, max(LOOK_S_MIN, over / self.rate))


def chunk_bytes(limit: int) -> int:
    """How large a part of a large message is where the line should hold `limit` bytes."""
    return max(CHUNK_BYTES_MIN, min(CHUNK_BYTES_MAX, limit // 3))
