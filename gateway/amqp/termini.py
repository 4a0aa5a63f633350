"""Sources and targets of links (AMQP 1.0 part 3.5) as values, read from proton's and given to it. Knows no links."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from itertools import islice
from typing import Any, Final

import proton

CAPABILITIES_MAX: Final = 32
FILTERS_MAX: Final = 32


class Durability(Enum):
    """terminus-durability, AMQP 1.0 part 3.5.5."""

    NONE = 0
    CONFIGURATION = 1
    UNSETTLED_STATE = 2


class Expiry(Enum):
    """terminus-expiry-policy, part 3.5.6."""

    LINK_DETACH = "link-detach"
    SESSION_END = "session-end"
    CONNECTION_CLOSE = "connection-close"
    NEVER = "never"


_EXPIRY_NUMBER = {
    Expiry.LINK_DETACH: proton.Terminus.EXPIRE_WITH_LINK,
    Expiry.SESSION_END: proton.Terminus.EXPIRE_WITH_SESSION,
    Expiry.CONNECTION_CLOSE: proton.Terminus.EXPIRE_WITH_CONNECTION,
    Expiry.NEVER: proton.Terminus.EXPIRE_NEVER,
}
_EXPIRY_BY_NUMBER = {number: policy for policy, number in _EXPIRY_NUMBER.items()}


@dataclass(frozen=True, slots=True)
class Terminus:
    """A source or a target (part 3.5.3, 3.5.4).

    coordinator: the target is a transaction coordinator. copy: the source's distribution-mode leaves messages there.
    filters: the names of a source's filters, not what they say. They are read and never written: we have none.
    """

    address: str | None = None
    durability: Durability = Durability.NONE
    expiry: Expiry = Expiry.SESSION_END
    timeout_s: int = 0
    dynamic: bool = False
    capabilities: tuple[str, ...] = ()
    coordinator: bool = False
    copy: bool = False
    filters: tuple[str, ...] = ()


def _symbols(data: Any) -> tuple[str, ...]:
    value = data.get_object() if data is not None and data.next() is not None else None
    if value is None:
        return ()
    if isinstance(value, str):
        return (str(value),)
    return tuple(str(item) for item in islice(getattr(value, "elements", value), CAPABILITIES_MAX))


def _keys(data: Any) -> tuple[str, ...]:
    """Of a map, without its values, which may be anything; of what is no map, nothing."""
    data.rewind()
    if data.next() != proton.Data.MAP:
        return ()
    count = min(data.get_map() // 2, FILTERS_MAX)
    data.enter()
    keys = []
    for _ in range(count):
        kind = data.next()
        keys.append(str(data.get_symbol()) if kind == proton.Data.SYMBOL else "?")
        data.next()
    return tuple(keys)


def terminus(remote: Any) -> Terminus | None:
    """A peer's source or target; what reading it raises is the peer's fault (engine, _PEER_DATA_ERRORS)."""
    kind = remote.type
    if kind == proton.Terminus.UNSPECIFIED:
        return None
    capabilities = remote.capabilities
    capabilities.rewind()
    return Terminus(
        address=remote.address,
        durability=Durability(remote.durability),
        expiry=_EXPIRY_BY_NUMBER.get(remote.expiry_policy, Expiry.SESSION_END),
        timeout_s=remote.timeout,
        dynamic=remote.dynamic,
        capabilities=_symbols(capabilities),
        coordinator=kind == proton.Terminus.COORDINATOR,
        copy=remote.distribution_mode == proton.Terminus.DIST_MODE_COPY,
        filters=_keys(remote.filter),
    )


def set_terminus(local: Any, wanted: Terminus | None) -> None:
    """Make proton's `local` source or target say what is wanted; None: that there is none."""
    if wanted is None:
        local.type = proton.Terminus.UNSPECIFIED
        return
    local.address = wanted.address
    local.durability = wanted.durability.value
    local.expiry_policy = _EXPIRY_NUMBER[wanted.expiry]
    local.timeout = wanted.timeout_s
    local.dynamic = wanted.dynamic
    if wanted.copy:
        local.distribution_mode = proton.Terminus.DIST_MODE_COPY
    if wanted.capabilities:
        data = local.capabilities
        data.clear()
        data.put_array(False, proton.Data.SYMBOL)
        data.enter()
        for name in wanted.capabilities:
            data.put_symbol(proton.symbol(name))
        data.exit()
