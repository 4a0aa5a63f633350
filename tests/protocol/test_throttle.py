"""Reading from a peer that is faster than the disk stops, and goes on with a commit."""

from __future__ import annotations

from pathlib import Path

from gateway.throttle import Throttle
from storeforward.journal import Journal
from storeforward.streams import StreamLimits


class Connection:
    reading = True

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True


def test_reading_goes_on_with_the_commit_that_gathers_whatever_is_held_for_the_hub(tmp_path: Path) -> None:
    """The hub's answer may be among what is not read."""
    journal = Journal.open(tmp_path)
    stream = journal.stream("alarms", "outbound", StreamLimits(linger_s=5.0))
    cursor = journal.cursor(stream, "uplink", "uplink")
    journal.commit_now()
    journal.hold(stream, True, 0.0)
    journal.append(stream, "t", lambda seq, body: body, b"written, and seqs are reserved with it")
    journal.commit_now()
    journal.advance(stream, cursor, stream.next_seq)
    journal.commit_now()
    held = stream.unwritten
    assert held is not None

    journal.append(stream, "t", lambda seq, body: body, b"held, and nobody waits for it")
    assert held.rows == 1
    connection = Connection()
    Throttle(journal, connection).pause()
    assert not connection.reading
    journal.commit_now()
    assert connection.reading
    assert held.rows == 1
    journal.close()
