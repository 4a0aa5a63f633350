"""How many files and sockets this process may have open, and what is said when there are none left.

Knows nothing of what they are for.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import resource
from typing import Any, Final

log = logging.getLogger("lineside.listen")

SPARE: Final = 128  # journal, control socket, uplinks, children
TOLD_S: Final = 60.0  # from one line to the next
_EXHAUSTED: Final = (errno.EMFILE, errno.ENFILE)


def raise_limit(connections_max: int) -> None:
    """Have room for so many connections: the soft limit, often 1024, goes up to the hard one if it has to."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections_max + SPARE
    unlimited = resource.RLIM_INFINITY
    if soft != unlimited and soft < wanted:
        soft = wanted if hard == unlimited else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        if soft < wanted:
            log.warning(
                "this process may open fewer files than its listeners may have connections: raise `ulimit -n` "
                "(LimitNOFILE= of a unit), or lower clients_max and connections_max",
                extra={"files_max": soft, "wanted": wanted},
            )


def exhausted(error: BaseException | None) -> bool:
    """Whether the error is that no more files can be opened."""
    return isinstance(error, OSError) and error.errno in _EXHAUSTED


def tell_exhaustion(loop: asyncio.AbstractEventLoop) -> None:
    """Say in a line now and then that connections wait for a free descriptor.

    asyncio by itself tells with a traceback, once for every place in the queue of a listening socket, every second.
    """
    silent_until = loop.time()

    def handle(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        nonlocal silent_until
        if not (exhausted(context.get("exception")) and "socket" in context):
            loop.default_exception_handler(context)
        elif loop.time() >= silent_until:
            silent_until = loop.time() + TOLD_S
            files_max = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
            log.error("no more files can be opened; new connections wait", extra={"files_max": files_max})

    loop.set_exception_handler(handle)
