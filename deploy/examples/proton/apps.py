"""Small apps over Qpid Proton's Python client (the package python-qpid-proton).

    python apps.py PORT send    ADDRESS COUNT
    python apps.py PORT receive ADDRESS COUNT
    python apps.py PORT durable ADDRESS COUNT CONTAINER SUBSCRIPTION
    python apps.py PORT request ADDRESS COUNT
    python apps.py PORT answer  ADDRESS COUNT

Each prints what it receives, one message a line, and ends after COUNT of them.
"""

from __future__ import annotations

import sys
from typing import Any

from proton import Message
from proton.reactor import Container, DurableSubscription
from proton.utils import BlockingConnection, BlockingReceiver, SyncRequestResponse

WAIT_S = 15.0


def text(message: Message) -> str:
    body: Any = message.body
    return body if isinstance(body, str) else bytes(body).decode()


def say(line: str) -> None:
    print(line, flush=True)


def send(app: BlockingConnection, address: str, count: int) -> None:
    sender = app.create_sender(address)
    for n in range(count):
        # Returns once the message is on the gateway's disk.
        sender.send(Message(body=f"proton {n}", properties={"number": n}, durable=True), timeout=WAIT_S)


def receive(receiver: BlockingReceiver, count: int) -> None:
    say("attached")
    for _ in range(count):
        say(text(receiver.receive(timeout=WAIT_S)))
        receiver.accept()


def request(app: BlockingConnection, address: str, count: int) -> None:
    requests = SyncRequestResponse(app, address)
    for n in range(count):
        say(text(requests.call(Message(body=f"proton {n}"))))


def answer(app: BlockingConnection, address: str, count: int) -> None:
    receiver, anywhere = app.create_receiver(address), app.create_sender(None)
    say("attached")
    for _ in range(count):
        asked = receiver.receive(timeout=WAIT_S)
        correlation: Any = asked.id if asked.correlation_id is None else asked.correlation_id
        if isinstance(correlation, memoryview):
            correlation = bytes(correlation)
        reply = Message(address=asked.reply_to, correlation_id=correlation, body=text(asked).upper())
        anywhere.send(reply, timeout=WAIT_S)
        receiver.accept()


def main(port: str, what: str, address: str, count: str, *names: str) -> None:
    container = Container()
    if names:
        container.container_id = names[0]
    app = BlockingConnection(f"amqp://127.0.0.1:{port}", timeout=WAIT_S, container=container, allowed_mechs="ANONYMOUS")
    say("connected")
    if what == "receive":
        receive(app.create_receiver(address, credit=10), int(count))
    elif what == "durable":
        # Only one message ahead: what is not accepted when the connection closes comes again.
        receive(app.create_receiver(address, name=names[1], options=[DurableSubscription()]), int(count))
    else:
        {"send": send, "request": request, "answer": answer}[what](app, address, int(count))
    app.create_sender("bye").close()  # the last answer has arrived, too
    app.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
