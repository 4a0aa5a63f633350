#!/bin/sh
# Publishes an alarm from a shell script with Mosquitto's client (Debian: mosquitto-clients):
#
#     mosquitto_pub.sh "axle 3: 104 °C" [HOST [PORT]]
#
# With -q 1 the command ends only once the gateway has it on its disk; a status other than 0 means that it may not have.
# -V 5 lets it say more: a content type, an expiry (an alarm of an hour ago is none any more), whatever else is known.
set -eu

text=${1:?what to publish}
host=${2:-127.0.0.1}
port=${3:-1883}

exec mosquitto_pub -V 5 -h "$host" -p "$port" -q 1 -i "alarm-script-$$" -t alarm/axle/3 -m "$text" \
    -D PUBLISH content-type "text/plain; charset=utf-8" \
    -D PUBLISH message-expiry-interval 3600 \
    -D PUBLISH user-property coach 7
