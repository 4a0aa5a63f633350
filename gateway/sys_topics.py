"""The figures under $SYS that an MQTT client may watch: names as other brokers have them, where they have them.

Values are text. Knows no client and no packet; whoever asks passes the daemon's status.
"""

from __future__ import annotations

from typing import Any


def figures(status: dict[str, Any]) -> list[tuple[str, bytes]]:
    """(topic, value) from what `lineside status --json` prints of a running daemon."""
    mqtt = status["mqtt"]
    values: dict[str, object] = {
        "$SYS/broker/version": f"lineside {status['version']}",
        "$SYS/broker/uptime": f"{int(status['uptime_s'])} seconds",
        "$SYS/broker/clients/connected": mqtt["clients"],
        "$SYS/broker/clients/total": mqtt["sessions"],
        "$SYS/broker/subscriptions/count": mqtt["subscriptions"],
        "$SYS/broker/retained messages/count": mqtt["retained"],
        "$SYS/broker/messages/received": mqtt["received"],
        "$SYS/broker/messages/sent": mqtt["sent"],
        "$SYS/lineside/gateway": status["gateway"],
        "$SYS/lineside/epoch": status["epoch"],
        "$SYS/lineside/disk/full": int(status["disk_full"]),
        "$SYS/lineside/losses": status["losses"],
        "$SYS/lineside/deadletters": status["dead"],
        "$SYS/lineside/rate/in": round(status["rates"]["in_per_s"]),
        "$SYS/lineside/rate/out": round(status["rates"]["out_per_s"]),
        "$SYS/lineside/commit/p99_ms": status["commit_ms"]["p99"],
        "$SYS/lineside/rss_bytes": status["rss_bytes"],
    }
    for hub in status["hubs"]:
        values[f"$SYS/lineside/hub/{hub['name']}/state"] = hub["state"]
    for stream in status["streams"]:
        name = f"$SYS/lineside/stream/{stream['name']}"
        values[f"{name}/waiting"] = stream["waiting"]
        values[f"{name}/bytes"] = stream["bytes"]
    return [(topic, str(value).encode()) for topic, value in values.items()]
