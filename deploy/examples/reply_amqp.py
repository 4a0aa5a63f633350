"""Answers requests at the hub, over AMQP 1.0 with Qpid Proton (pip install python-qpid-proton).

    python reply_amqp.py [--url amqp://127.0.0.1:5672] [--address edge.requests]

The asking side is request_mqtt.py. All there is to know: the answer goes to the request's reply-to, and its
correlation-id is the request's correlation-id, or its message-id where there is none.
"""

import argparse
import contextlib
from datetime import datetime

from proton import Message
from proton.handlers import MessagingHandler
from proton.reactor import Container

SENDERS_MAX = 100  # links kept open, one a reply address


class Responder(MessagingHandler):
    def __init__(self, url: str, address: str) -> None:
        # A request is accepted once the hub has its answer: whatever crashes before that, it comes again. (And may then
        # be answered twice: give a request that must not be obeyed twice a number, and remember it.)
        super().__init__(auto_accept=False)
        self.url, self.address = url, address
        self.senders = {}
        self.waiting = {}  # requests whose answers the hub has not accepted yet

    def on_start(self, event) -> None:
        self.connection = event.container.connect(self.url)
        event.container.create_receiver(self.connection, self.address)

    def on_link_opened(self, event) -> None:
        if event.receiver:
            print(f"answering what comes to {self.address}", flush=True)

    def on_message(self, event) -> None:
        request = event.message
        print(f"{request.subject}: {bytes(request.body).decode(errors='replace')}", flush=True)
        if request.reply_to:
            name = request.correlation_id if request.correlation_id is not None else request.id
            text = f"it is {datetime.now():%H:%M}"
            sender = self.sender(event.container, request.reply_to)
            answer = sender.send(Message(text, correlation_id=name, durable=True))
            self.waiting[sender.name, answer.tag] = event.delivery
        else:
            self.accept(event.delivery)  # it wants no answer

    def on_settled(self, event) -> None:
        if event.sender:
            self.accept(self.waiting.pop((event.link.name, event.delivery.tag)))

    def sender(self, container, address: str):
        if address not in self.senders:
            if len(self.senders) >= SENDERS_MAX:
                self.senders.pop(next(iter(self.senders))).close()
            self.senders[address] = container.create_sender(self.connection, address)
        return self.senders[address]


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--url", default="amqp://127.0.0.1:5672")
    arguments.add_argument("--address", default="edge.requests")
    options = arguments.parse_args()
    with contextlib.suppress(KeyboardInterrupt):
        Container(Responder(options.url, options.address)).run()


if __name__ == "__main__":
    main()
