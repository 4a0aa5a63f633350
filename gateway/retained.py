"""Retained messages: the last one of each topic, in the journal; in memory only what a subscription has to look at.

A retained message is stored with the commit that holds the message itself, and known here once that commit is on disk.
Knows no session and no socket.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from gateway.mqtt.topics import filter_matches
from storeforward.errors import JournalFull
from storeforward.journal import Journal
from storeforward.sealed_tables import open_retained, seal_retained

TELL_FULL_US = 10_000_000
LOOKED_AT_ONCE = 256


@dataclass(frozen=True, slots=True)
class Retained:
    """`stream`, `seq`: where the same message stands for those who were subscribed; seq None if nowhere."""

    topic: str
    qos: int
    expires_age_us: int | None
    stream: str
    seq: int | None
    size: int


class RetainedStore:
    """Bounded by `messages_max`: a topic beyond it is not retained, which the caller enters in the ledger."""

    def __init__(self, journal: Journal, messages_max: int) -> None:
        self.journal = journal
        self.messages_max = messages_max
        self._by_topic: dict[str, Retained] = {}
        self._told_us: int | None = None
        # As `_by_topic` will be when all that is staged is on disk.
        self._staged: dict[str, Retained | None] = {}
        for topic, qos, expires, stream, seq, size, crc, sealed in journal.query(
            "SELECT topic, qos, expires_age_us, stream, seq, length(body), crc, "
            "CASE typeof(topic) WHEN 'blob' THEN body END FROM retained"
        ):
            if sealed is not None:
                found = open_retained(journal.seal, topic, crc, sealed)
                if found is None:
                    journal.lose("retained", 0, "corrupt", size)
                    journal.execute("DELETE FROM retained WHERE topic = ?", (topic,))
                    continue
                topic, size = found[0], len(found[1])
            self._by_topic[topic] = Retained(topic, qos, expires, stream, seq, size)

    def __len__(self) -> int:
        return len(self._by_topic)

    def full_for(self, topic: str) -> bool:
        return len(self._by_topic) + len(self._staged) >= self.messages_max and topic not in self._by_topic

    def tell_full(self, age_us: int) -> bool:
        """Whether the log is to say so again; the ledger has each of them."""
        if self._told_us is not None and age_us - self._told_us < TELL_FULL_US:
            return False
        self._told_us = age_us
        return True

    def set(self, message: Retained, body: bytes) -> None:
        """Retain `body` with the batch that is pending; an empty payload is the caller's to `clear`."""
        topic, crc, stored = seal_retained(self.journal.seal, message.topic, body)
        if self.journal.seal is not None:  # it may be there in plain text, or under an older key
            self._delete(message.topic)
        self.journal.execute_with_rows(
            "INSERT OR REPLACE INTO retained (topic, qos, time_us, expires_age_us, stream, seq, crc, body) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (
                topic,
                message.qos,
                self.journal.wall_us,
                message.expires_age_us,
                message.stream,
                message.seq,
                crc,
                stored,
            ),
        )
        self._stage(message.topic, message)

    def clear(self, topic: str) -> None:
        """Forget what is retained for a topic (MQTT 5.0 §3.3.1.3)."""
        if topic in self._by_topic or topic in self._staged:
            self._delete(topic)
            self._stage(topic, None)

    def _names(self, topic: str) -> list[str | bytes]:
        """By which names a topic may be in the file."""
        return [topic, *(() if self.journal.seal is None else self.journal.seal.name(topic))]

    def _delete(self, topic: str) -> None:
        for name in self._names(topic):
            self.journal.execute_with_rows("DELETE FROM retained WHERE topic = ?", (name,))

    def _stage(self, topic: str, message: Retained | None) -> None:
        self._staged[topic] = message
        self.journal.wait(self, (topic, message))

    def committed(self, tokens: list[tuple[str, Retained | None]]) -> None:
        for topic, message in tokens:
            if message is None:
                self._by_topic.pop(topic, None)
            else:
                self._by_topic[topic] = message
            if self._staged.get(topic) is message:
                self._staged.pop(topic, None)

    def failed(self, tokens: list[tuple[str, Retained | None]], error: JournalFull) -> None:
        """What was staged with messages that did not come through never was."""
        for topic, message in tokens:
            if self._staged.get(topic) is message:
                self._staged.pop(topic, None)

    def matching(self, filter: str, age_us: int) -> Iterator[list[Retained]]:
        """What a subscription to `filter` is to be given, in the order it was retained first.

        In portions, each of what was found among so many topics: there may be a great many, and others have their turn
        in between.
        """
        if "+" not in filter and "#" not in filter:
            topics = [filter]
        else:
            topics = list(self._by_topic)
        for at in range(0, len(topics), LOOKED_AT_ONCE):
            found = []
            for topic in topics[at : at + LOOKED_AT_ONCE]:
                one = self._by_topic.get(topic)
                if one is None or (one.expires_age_us is not None and one.expires_age_us <= age_us):
                    continue
                if filter_matches(filter, topic):
                    found.append(one)
            yield found

    def get(self, topic: str) -> Retained | None:
        return self._by_topic.get(topic)

    def body(self, topic: str) -> bytes | None:
        """The message as it was encoded; None if it is gone or does not read, which is then in the ledger."""
        for name in self._names(topic):
            for crc, body in self.journal.query("SELECT crc, body FROM retained WHERE topic = ?", (name,)):
                found = open_retained(self.journal.seal, name, crc, body)
                if found is not None:
                    return found[1]
                self.journal.lose("retained", 0, "corrupt", len(body), self.journal.in_ledger(topic))
                self.clear(topic)
                return None
        known = self._by_topic.get(topic)
        if known is not None:
            self.journal.lose("retained", 0, "corrupt", known.size, self.journal.in_ledger(topic))
            self.clear(topic)
        return None

    def expire(self, age_us: int) -> int:
        """Forget what has expired; return how many that were. Its subscribers had it in its time: no loss."""
        over = [t for t, m in self._by_topic.items() if m.expires_age_us is not None and m.expires_age_us <= age_us]
        for topic in over:
            del self._by_topic[topic]
            for name in self._names(topic):
                self.journal.execute("DELETE FROM retained WHERE topic = ? AND expires_age_us <= ?", (name, age_us))
        return len(over)
