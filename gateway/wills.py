"""Wills: what is to be published for a client whose connection ends without a DISCONNECT (MQTT 5.0 §3.1.2.5).

A will is in the journal from before its CONNACK on, so that a power cut under a client is told like any other end.
Times are microseconds on the journal's age clock. Knows no socket and does not publish: it says which wills are due.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from gateway.mqtt.codec import decode_publish_properties, encode_properties
from gateway.mqtt.packets import PublishProperties, Will
from storeforward.errors import JournalFull
from storeforward.journal import Journal
from storeforward.sealed_tables import open_will, seal_will

# Who lost its connection because we went down has so long to come back before its will is published.
RESTART_GRACE_S = 3
RETRY_S = 5


@dataclass(frozen=True, slots=True)
class Testament:
    """One client's will. `due_age_us`: None while its client is connected."""

    client_id: str
    topic: str
    payload: bytes
    qos: int
    retain: bool
    properties: PublishProperties | None
    delay_s: int
    due_age_us: int | None


class Wills:
    """At most one a client."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._by_client: dict[str, Testament] = {}
        now = journal.age_us()
        for client_id, topic, payload, qos, retain, section, delay_s, due in journal.query(
            "SELECT client_id, topic, payload, qos, retain, properties, delay_s, due_age_us FROM mqtt_will"
        ):
            try:
                topic, payload, section = open_will(journal.seal, client_id, topic, payload, section)
            except ValueError:
                journal.lose("-", 0, "corrupt", len(payload), f"will of {client_id}")
                journal.execute("DELETE FROM mqtt_will WHERE client_id = ?", (client_id,))
                continue
            properties = None if section is None else decode_publish_properties(bytes(section))
            # Whoever was connected when we went down has lost its connection: the delay runs from now. A server that
            # was down may publish late (MQTT 5.0 §3.1.2.5).
            at = now + max(delay_s, RESTART_GRACE_S) * 1_000_000 if due is None else due
            self._by_client[client_id] = Testament(
                client_id, topic, bytes(payload), qos, bool(retain), properties, delay_s, at
            )

    def __contains__(self, client_id: str) -> bool:
        return client_id in self._by_client

    def set(self, client_id: str, will: Will) -> None:
        p = will.properties
        properties = PublishProperties(
            payload_format_indicator=p.payload_format_indicator,
            message_expiry_interval=p.message_expiry_interval,
            response_topic=p.response_topic,
            correlation_data=p.correlation_data,
            user_property=p.user_property,
            content_type=p.content_type,
        )
        section = None if properties == PublishProperties() else encode_properties(properties)
        delay_s = p.will_delay_interval or 0
        self._by_client[client_id] = Testament(
            client_id,
            will.topic,
            will.payload,
            will.qos,
            will.retain,
            None if section is None else properties,
            delay_s,
            None,
        )
        topic, payload, section = seal_will(self._journal.seal, client_id, will.topic, will.payload, section)
        self._journal.execute(
            "INSERT OR REPLACE INTO mqtt_will "
            "(client_id, topic, payload, qos, retain, properties, delay_s) VALUES (?, ?, ?, ?, ?, ?, ?)",
            (client_id, topic, payload, will.qos, will.retain, section, delay_s),
        )

    def forget(self, client_id: str) -> None:
        if self._by_client.pop(client_id, None) is not None:
            self._journal.execute("DELETE FROM mqtt_will WHERE client_id = ?", (client_id,))

    def get(self, client_id: str) -> Testament | None:
        return self._by_client.get(client_id)

    def published(self, will: Testament) -> None:
        """Its message is staged: it is due again if the commit that holds that fails."""
        del self._by_client[will.client_id]
        self._journal.execute_with_rows("DELETE FROM mqtt_will WHERE client_id = ?", (will.client_id,))
        self._journal.wait(self, will)

    def postpone(self, will: Testament) -> None:
        """The disk is full: the will keeps its place, and is tried again after a while."""
        self._due_in(RETRY_S, will)

    def committed(self, tokens: list[Testament]) -> None:
        """These are published."""

    def failed(self, tokens: list[Testament], error: JournalFull) -> None:
        for will in tokens:
            if will.client_id in self._by_client:  # connected again meanwhile, with another
                self._journal.lose("-", 0, "will-refused", len(will.payload), will.client_id)
            else:
                self.postpone(will)

    def start(self, client_id: str, session_expiry_s: int | None) -> None:
        """The client's connection ended without its goodbye.

        Its will is due after the delay or with the session's end, whichever comes first (MQTT-3.1.3-9, §3.1.3.2.2).
        """
        will = self._by_client.get(client_id)
        if will is not None:
            self._due_in(will.delay_s if session_expiry_s is None else min(will.delay_s, session_expiry_s), will)

    def _due_in(self, seconds: int, will: Testament) -> None:
        due = self._journal.age_us() + seconds * 1_000_000
        self._by_client[will.client_id] = replace(will, due_age_us=due)
        self._journal.execute("UPDATE mqtt_will SET due_age_us = ? WHERE client_id = ?", (due, will.client_id))

    def due(self, age_us: int) -> list[Testament]:
        """Wills whose time has come, in that order."""
        over = [w for w in self._by_client.values() if w.due_age_us is not None and w.due_age_us <= age_us]
        return sorted(over, key=lambda w: w.due_age_us or 0)

    def next_due(self) -> int | None:
        return min((w.due_age_us for w in self._by_client.values() if w.due_age_us is not None), default=None)
