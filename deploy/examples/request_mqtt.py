"""Asks an app at the hub something and prints the answer, over MQTT 5.0 with paho (pip install paho-mqtt).

    python request_mqtt.py "what time is it?" [--port 1883] [--timeout 60]

The answering side is reply_amqp.py. The gateway needs to know where answers come in:

    [[outbound]]
    stream = "requests"
    topics = ["ask/#"]
    hub = "depot"
    address = "edge.requests"
    reply_to = "edge.{gateway}.replies"

    [[inbound]]
    stream = "replies"
    hub = "depot"
    address = "edge.{gateway}.replies"
    topic = "replies/{subject}"             # for what comes too late, or answers nothing

In a tunnel the request waits on the gateway's disk. It is given an expiry: nobody wants to be answered an hour late.
"""

import argparse
import queue
import sys
import uuid

import paho.mqtt.client as mqtt
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("question")
    arguments.add_argument("--host", default="127.0.0.1")
    arguments.add_argument("--port", type=int, default=1883)
    arguments.add_argument("--topic", default="ask/time")
    arguments.add_argument("--timeout", type=int, default=60, help="seconds; through tunnels that may be minutes")
    options = arguments.parse_args()

    name = f"driver-display-{uuid.uuid4().hex[:8]}"
    response_topic = f"answers/{name}"  # nobody else's
    correlation = uuid.uuid4().bytes  # which of our requests an answer is for
    answers: queue.Queue[mqtt.MQTTMessage] = queue.Queue()

    client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2, name, protocol=mqtt.MQTTv5)
    client.on_message = lambda _, __, message: answers.put(message)
    client.on_connect = lambda *_: client.subscribe(response_topic, qos=1)

    def ask(*_):  # only now that the subscription stands
        request = Properties(PacketTypes.PUBLISH)
        request.ResponseTopic = response_topic
        request.CorrelationData = correlation
        request.MessageExpiryInterval = options.timeout
        client.publish(options.topic, options.question, qos=1, properties=request)

    client.on_subscribe = ask
    client.connect(options.host, options.port, clean_start=True)
    client.loop_start()
    try:
        while True:
            answer = answers.get(timeout=options.timeout)
            if getattr(answer.properties, "CorrelationData", None) == correlation:
                print(answer.payload.decode(errors="replace"))
                return 0
    except queue.Empty:
        print(f"no answer within {options.timeout} s", file=sys.stderr)
        return 1
    finally:
        client.disconnect()
        client.loop_stop()


if __name__ == "__main__":
    sys.exit(main())
