"""An app on board: publishes telemetry at QoS 1 and obeys commands, over MQTT 5.0 with paho (pip install paho-mqtt).

    python paho_telemetry.py [--port 1883] [--count 100]

What matters to an app that must not lose anything:
- QoS 1: publish() only queues. A message is safe once its PUBACK is here: Lineside sends that when the disk has it.
- A session that outlives the connection (clean_start=False and an expiry): commands wait while the app is away.
- A client id that stays the same: it is the name of that session.
- Nothing is published while paho reconnects: it would overtake what paho then repeats.
"""

import argparse
import json
import threading
import time

import paho.mqtt.client as mqtt
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

SESSION_EXPIRY_S = 24 * 3600
WINDOW = 100  # how many messages may wait for their PUBACK


def on_connect(client, _, flags, reason, __):
    print(f"connected: {reason}{', session resumed' if flags.session_present else ''}", flush=True)
    # After a reconnect the session still has its subscriptions; to subscribe again changes nothing.
    client.subscribe("commands/#", qos=1)


def on_message(_, __, message):
    print(f"command {message.topic}: {message.payload.decode(errors='replace')}", flush=True)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--host", default="127.0.0.1")
    arguments.add_argument("--port", type=int, default=1883)
    arguments.add_argument("--client-id", default="axle-sensor-1")
    arguments.add_argument("--count", type=int, default=0, help="stop after so many messages; 0: never")
    arguments.add_argument("--interval", type=float, default=1.0, help="seconds between two messages")
    options = arguments.parse_args()

    room = threading.Semaphore(WINDOW)
    there = threading.Event()
    safe = 0

    def on_publish(_, __, ___, reason, ____):
        nonlocal safe
        if reason.is_failure:  # 0x97: the stream or the disk is full. A real app keeps the message and tries later.
            print(f"refused: {reason}", flush=True)
        else:
            safe += 1
        room.release()

    client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2, options.client_id, protocol=mqtt.MQTTv5)
    client.on_connect, client.on_message, client.on_publish = on_connect, on_message, on_publish
    client.on_subscribe = lambda *_: there.set()  # asked for in on_connect: answered once paho has begun to repeat
    client.on_disconnect = lambda *_: there.clear()
    session = Properties(PacketTypes.CONNECT)
    session.SessionExpiryInterval = SESSION_EXPIRY_S
    client.connect(options.host, options.port, keepalive=30, clean_start=False, properties=session)
    client.loop_start()  # a thread that also reconnects; unacknowledged messages go again then

    about = Properties(PacketTypes.PUBLISH)
    about.ContentType = "application/json"
    number = 0
    try:
        while not options.count or number < options.count:
            room.acquire()  # never more than WINDOW on their way: what is queued here is in memory only
            reading = {"number": number, "time": time.time(), "temperature": 61.5}
            there.wait()
            client.publish("telemetry/axle/1", json.dumps(reading), qos=1, properties=about)
            number += 1
            time.sleep(options.interval)
    except KeyboardInterrupt:
        pass
    for _ in range(WINDOW):
        room.acquire()  # until the last PUBACK is here
    print(f"{safe} of {number} are on the gateway's disk", flush=True)
    client.disconnect()  # the session stays
    client.loop_stop()


if __name__ == "__main__":
    main()
