"""What is known of hubs that say yes too easily: advice for the operator, by what a hub says it is. Pure.

RabbitMQ before 4 accepts, and then drops, what it can not route; nothing on the wire tells. So an address whose form
does not make sure that there is a queue behind it is pointed out in status and log.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

_MAJOR = re.compile(r"\d+")


def advice(hub: Mapping[str, object], address: str) -> str | None:
    """A sentence about sending to `address` of a hub with these properties in its open, None where all is well."""
    if hub.get("product") != "RabbitMQ":
        return None
    major = _MAJOR.match(str(hub.get("version", "")))
    if major is None or int(major[0]) >= 4:
        return None  # from 4 on what can not be routed is released, and stays here
    if address.startswith("/queue/"):
        return None  # the queue is declared by our attach
    return (
        f"{address}: RabbitMQ {hub.get('version')} accepts and loses what it can not route there; "
        "use /queue/NAME, which makes sure of the queue"
    )
