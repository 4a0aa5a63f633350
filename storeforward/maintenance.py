"""What people do to dead letters: send them again or give them up. With the daemon stopped, by path; else inside it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from storeforward.journal import Journal
from storeforward.sealing import Seal, about_dead, intact


def requeue(journal: Journal, ids: list[int]) -> int:
    """Append these dead letters to their streams again, as new messages at the end; return how many there were."""
    done = 0
    for id_ in ids:
        for stream_name, seq, topic, crc, body in journal.query(
            "SELECT stream, seq, topic, crc, body FROM dead WHERE id = ?", (id_,)
        ):
            stream = journal.streams.get(stream_name)
            if stream is not None:
                if not intact(seq, topic, crc, body):
                    continue  # damaged: it stays where people can see it
                try:
                    topic, body = journal.opened(about_dead(stream_name, seq), topic, body)
                except ValueError:
                    continue
                done += journal.revive(id_, stream, topic, body)
    return done


def drop(journal: Journal, ids: list[int]) -> int:
    """Give these dead letters up for good, with a ledger row each; return how many there were."""
    done = 0
    for id_ in ids:
        for stream_name, seq, size in journal.query("SELECT stream, seq, length(body) FROM dead WHERE id = ?", (id_,)):
            done += journal.drop_dead(id_, stream_name, seq, size)
    return done


def requeue_dead(state_dir: Path, ids: list[int], seal: Seal | None = None) -> int:
    """`requeue` on the journal of a stopped daemon."""
    return _offline(state_dir, ids, requeue, seal)


def drop_dead(state_dir: Path, ids: list[int], seal: Seal | None = None) -> int:
    """`drop` on the journal of a stopped daemon."""
    return _offline(state_dir, ids, drop, seal)


def _offline(state_dir: Path, ids: list[int], action: Callable[[Journal, list[int]], int], seal: Seal | None) -> int:
    journal = Journal.open(state_dir, seal=seal)
    try:
        return action(journal, ids)
    finally:
        journal.close()
