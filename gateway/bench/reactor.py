"""`proton.reactor` as a peer: `python -m gateway.bench.reactor send|receive PORT COUNT SIZE_BYTES`.

A sender and a receiver as proton's own examples have them: messages by the public API, at least once, nothing stored.
The receiver listens, and prints one JSON line when it has COUNT.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from proton import Message
from proton.handlers import MessagingHandler
from proton.reactor import Container

CREDIT = 2000


class Sending(MessagingHandler):
    def __init__(self, port: int, count: int, size_bytes: int) -> None:
        super().__init__()
        self._url, self._count, self._body = f"127.0.0.1:{port}/bench", count, b"." * size_bytes
        self._sent = self._settled = 0

    def on_start(self, event: Any) -> None:
        event.container.create_sender(self._url)

    def on_sendable(self, event: Any) -> None:
        while event.sender.credit and self._sent < self._count:
            event.sender.send(Message(body=self._body, durable=True))
            self._sent += 1

    def on_accepted(self, event: Any) -> None:
        self._settled += 1
        if self._settled == self._count:
            event.connection.close()


class Receiving(MessagingHandler):
    def __init__(self, port: int, count: int) -> None:
        super().__init__(prefetch=CREDIT)
        self._url, self._count, self._had, self._began = f"127.0.0.1:{port}", count, 0, 0.0
        self._acceptor: Any = None

    def on_start(self, event: Any) -> None:
        self._acceptor = event.container.listen(self._url)

    def on_message(self, event: Any) -> None:
        if not self._had:
            self._began = time.perf_counter()
        self._had += 1
        if self._had == self._count:
            elapsed = time.perf_counter() - self._began
            print(json.dumps({"messages": self._had, "per_s": (self._had - 1) / elapsed}), flush=True)
            self._acceptor.close()


def main() -> None:
    what, port, count, size_bytes = sys.argv[1], *map(int, sys.argv[2:5])
    Container(Sending(port, count, size_bytes) if what == "send" else Receiving(port, count)).run()


if __name__ == "__main__":
    main()
