"""How a simulated gateway is configured: the file as text, from the few values that a life chooses."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache

from gateway.config import Config, loads

GATEWAY = "127.0.0.1:5672"
HUBS = ("127.0.0.1:7001", "127.0.0.1:7002")
CONFIG = """
[gateway]
id = "loco"
[amqp]
window = {local_window}
[[hub]]
name = "depot"
urls = {urls}
window = {window}
settle_timeout = "{settle_timeout_s}s"
retry_max = "5s"
{rate}
shares = {{ urgent = {shares[0]}, normal = {shares[1]}, bulk = {shares[2]}, live = {live} }}
{outbound}
[[inbound]]
stream = "cmd"
hub = "depot"
address = "edge.cmd"
topic = "cmd/{{subject}}"
credit = {credit}
{queue}
"""
QUEUE = """
[[address]]
name = "cmd/x"
kind = "queue"
"""
OUTBOUND = """
[[outbound]]
stream = "{stream}"
topics = ["{stream}/#"]
hub = "depot"
address = "edge.{stream}"
class = "{class_}"
ack = "{ack}"
linger = "{linger_ms}ms"
"""
CLASSES = {"alarms": "urgent", "up": "normal", "state": "normal", "logs": "bulk"}


@dataclass(frozen=True, slots=True)
class Setting:
    """How a world's gateway is configured. `linger_ms`: of streams that the hub may acknowledge instead of the disk.

    `shares` of urgent, normal and bulk, and of live streams. `rate`: bytes a second that are allowed; `line_rate`: that
    the lines carry. `hubs`: how many addresses there are. `streams`: the outbound ones, of CLASSES. `queue`: whether
    what the hub sends goes into a queue of that name, too.
    """

    window: int
    local_window: int
    settle_timeout_s: float = 10
    credit: int = 10
    shares: tuple[int, int, int] = (70, 20, 10)
    live: int = 80
    rate: int | None = None
    line_rate: int | None = None
    shows: bool = False
    hubs: int = len(HUBS)
    linger_ms: tuple[tuple[str, int], ...] = ()
    streams: tuple[str, ...] = tuple(CLASSES)
    queue: bool = True

    @property
    def text(self) -> str:
        lingers = dict(self.linger_ms)
        return CONFIG.format(
            urls=json.dumps([f"amqp://{each}" for each in HUBS[: self.hubs]]),
            window=self.window,
            local_window=self.local_window,
            settle_timeout_s=self.settle_timeout_s,
            credit=self.credit,
            shares=self.shares,
            live=self.live,
            rate="" if self.rate is None else f'rate = "{self.rate * 8}bit/s"',
            outbound="".join(
                OUTBOUND.format(
                    stream=stream,
                    class_=CLASSES[stream],
                    ack="disk-or-hub" if stream in lingers else "disk",
                    linger_ms=lingers.get(stream, 250),
                )
                for stream in self.streams
            ),
            queue=QUEUE if self.queue else "",
        )


@lru_cache(maxsize=1024)
def configured(setting: Setting) -> Config:
    """Remembered, for reading it costs a tenth of what a brief life does, and many of those have the same."""
    return loads(setting.text)
