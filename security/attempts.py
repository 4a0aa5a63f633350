"""How long the answer to a failed login is held back: longer with each failure from one address, and bounded.

Only failed logins wait: whoever has the right password is let in at once, also from the same address, so nobody locks
out others. Time is an argument. Knows no socket; forgets the longest silent address when its table is full.
"""

from __future__ import annotations

import ipaddress
from typing import Final

from security.rules import Identity

FIRST_DELAY_S: Final = 0.25
DELAY_S_MAX: Final = 4.0
FORGOTTEN_S: Final = 60.0
ADDRESSES_MAX: Final = 1024


class FailedLogins:
    """Counts failures by address; see `source`."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[int, float]] = {}  # failures, when the last one was; the latest one last

    def __len__(self) -> int:
        return len(self._seen)

    def failed(self, source: str, now: float) -> float:
        """Note a failure; return the seconds to wait before saying so."""
        count, last = self._seen.pop(source, (0, now))
        count = 1 if now - last >= FORGOTTEN_S else count + 1
        if len(self._seen) >= ADDRESSES_MAX:
            del self._seen[next(iter(self._seen))]
        self._seen[source] = count, now
        return min(FIRST_DELAY_S * 2.0 ** min(count - 1, 16), DELAY_S_MAX)


def source(identity: Identity) -> str:
    """Whom failures are counted for: an address (of IPv6 the /64, which is one host's to choose from) or a uid."""
    address = identity.address
    if address is None:
        return f"uid:{identity.uid}"
    if isinstance(address, ipaddress.IPv6Address) and not address.is_loopback:
        return str(ipaddress.ip_network((int(address) >> 64 << 64, 64)))
    return str(address)
