"""What the bridge reads at its broker: what it asks for, what it was granted, and what of it the broker remembers."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence

from paho.mqtt.client import Client
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions

from storeforward.journal import Journal

log = logging.getLogger("lineside.bridge")

RETAIN_IF_NEW = 1
# Unspecified, which is all that 3.1.1 knows, and not authorized (MQTT 5.0 §3.9.3).
ACCESS_REASONS = frozenset({0x80, 0x87})
AGAIN_S_MIN, AGAIN_S_MAX = 1.0, 60.0
META_KEY = "bridge"


class BridgeTopics:
    """`topics`: what is to be read. `trouble`: what is wrong with that, for people; None if nothing is."""

    def __init__(self, journal: Journal, topics: Sequence[str], version: str, url: str, client_id: str) -> None:
        self.topics = list(topics)
        self.trouble: str | None = None
        self._journal = journal
        self._five = version == "5.0"
        self._url = url
        self._client_id = client_id
        self._asked: tuple[int, Sequence[str]] | None = None  # the packet id, and for what
        self._refused: list[str] = []
        self._weak: list[str] = []
        self._again_at = 0.0
        self._again_s = AGAIN_S_MIN

    def ask(self, client: Client, before: Sequence[str] | None) -> None:
        """At every connection for all: cheap, and right whatever the broker has restored itself from.

        `before`: what its session there has, None if there is none.
        """
        self._asked = self.trouble = None
        self._refused, self._weak, self._again_s = [], [], AGAIN_S_MIN
        if before is not None and (gone := [topic for topic in before if topic not in self.topics]):
            client.unsubscribe(gone)
        if self.topics:
            self._ask_for(client, self.topics)
        else:
            self._remember()

    def ask_again(self, client: Client, now: float) -> None:
        """For what was refused, if it is time: rules change, and brokers refuse for reasons that pass (mochi has 0x91,
        packet identifier in use, where a message of its own has the same).
        """
        if self._refused and self._asked is None and now >= self._again_at:
            self._ask_for(client, self._refused)

    def _ask_for(self, client: Client, topics: Sequence[str]) -> None:
        if self._five:
            options = SubscribeOptions(qos=1, noLocal=True, retainHandling=RETAIN_IF_NEW)
            _, packet_id = client.subscribe([(topic, options) for topic in topics])
        else:
            _, packet_id = client.subscribe([(topic, 1) for topic in topics])
        self._asked = None if packet_id is None else (packet_id, topics)

    def answered(self, packet_id: int, reasons: Sequence[ReasonCode], now: float) -> None:
        """A SUBACK came."""
        if self._asked is None or packet_id != self._asked[0]:
            return
        answers = list(zip(self._asked[1], reasons, strict=False))
        self._asked = None
        refusals = {topic: code for topic, code in answers if code.is_failure}
        self._refused = list(refusals)
        self._weak += [topic for topic, code in answers if code.value == 0]
        before, self.trouble = self.trouble, None
        if refusals:
            self._again_at = now + self._again_s
            self._again_s = min(AGAIN_S_MAX, 2 * self._again_s)
            self.trouble = f"the broker does not let us read {', '.join(refusals)}: "
            if all(code.value in ACCESS_REASONS for code in refusals.values()):
                self.trouble += "allow it in its access rules"
            else:
                self.trouble += ", ".join(sorted({str(code) for code in refusals.values()}))
        elif self._weak:
            self.trouble = f"the broker hands out {', '.join(self._weak)} at QoS 0 only, which a power cut takes"
        else:
            self._remember()
        if self.trouble is None and before is not None:
            log.info("bridge subscribed", extra={"url": self._url})
        elif self.trouble != before:
            log.warning("bridge subscribed in part", extra={"url": self._url, "error": self.trouble})

    def remembered(self) -> list[str] | None:
        """What our session at this broker is subscribed to, as far as we know; None if we never had one."""
        for (value,) in self._journal.query("SELECT value FROM meta WHERE key = ?", (META_KEY,)):
            url, client_id, topics = json.loads(value)
            if (url, client_id) == (self._url, self._client_id):
                return [str(topic) for topic in topics]
        return None

    def _remember(self) -> None:
        value = json.dumps([self._url, self._client_id, self.topics])
        self._journal.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (META_KEY, value))
