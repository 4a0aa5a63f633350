"""Time, processes and a network that exist only in one thread: an asyncio loop whose clock jumps to what is due next.

Code that runs on it is the real one, drivers included. A process may be killed: nothing that it has planned happens any
more. A line between two hosts can be slow, silent, refuse, lose what is in flight each way, or leave one end believing.
"""

from __future__ import annotations

import asyncio
import heapq
import socket
import traceback
from collections import deque
from collections.abc import Callable
from contextvars import Context, ContextVar, copy_context
from dataclasses import dataclass, field
from random import Random
from typing import Any

from gateway.uplink import tcp

WRITE_HIGH_BYTES = 64 << 10
WRITE_LOW_BYTES = 16 << 10
KERNEL_BYTES = 64 << 10  # of what is on its way, so much is in the sender's kernel, and the rest in its transport
SEGMENT_BYTES = 1400
EPOCH_S = 1000.0
RESOLUTION_S = 1e-9  # what is due within it is due now, as for asyncio: a timer may find that its time has not come
EARLY_S = 0.5e-9
CALLED_OFF_MAX = 200  # timers that were called off are found when their time comes, or when there are so many


class Process:
    """Whose code runs. What is begun in `run` belongs to it, with all that follows from it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.alive = True
        self._context = copy_context()
        self._context.run(PROCESS.set, self)

    def context(self) -> Context:
        return self._context.copy()

    def run(self, call: Callable[..., Any], *args: Any) -> Any:
        return self.context().run(call, *args) if self.alive else None


PROCESS: ContextVar[Process | None] = ContextVar("process", default=None)


class VirtualLoop(asyncio.BaseEventLoop):
    """An event loop that waits by moving its clock: no selector, and two thirds of what a turn costs asyncio."""

    _ready: deque[asyncio.Handle]

    def __init__(self) -> None:
        super().__init__()
        self.now = EPOCH_S
        self._timers: list[tuple[float, int, asyncio.TimerHandle]] = []  # a heap; of one time the first comes first
        self._timer_count = self._called_off = 0
        self.net: Net
        self.troubles: list[str] = []
        self.set_exception_handler(self._trouble)

    def _trouble(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        if "was destroyed" not in context["message"]:  # a killed process leaves its tasks where they are
            error = context.get("exception")
            self.troubles.append(f"{context['message']}: {''.join(traceback.format_exception(error))}")

    def time(self) -> float:
        return self.now

    def call_soon(self, callback: Any, *args: Any, context: Context | None = None) -> asyncio.Handle:
        handle = asyncio.Handle(callback, args, self, context)
        if self._may_run(handle):
            self._ready.append(handle)
        return handle

    def call_soon_threadsafe(self, callback: Any, *args: Any, context: Context | None = None) -> asyncio.Handle:
        return self.call_soon(callback, *args, context=context)

    def call_at(self, when: float, callback: Any, *args: Any, context: Context | None = None) -> asyncio.TimerHandle:
        handle = asyncio.TimerHandle(when, callback, args, self, context)
        if self._may_run(handle):
            self._timer_count += 1
            heapq.heappush(self._timers, (when, self._timer_count, handle))
            handle._scheduled = True
        return handle

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        self._called_off += handle._scheduled

    @staticmethod
    def _may_run(handle: asyncio.Handle) -> bool:
        process = handle._context.get(PROCESS)
        if process is None or process.alive:
            return True
        handle.cancel()
        return False

    def _run_once(self) -> None:
        """One turn, as asyncio's: what is due by now, then all that was ready before it, each once."""
        ready, timers = self._ready, self._timers
        if self._called_off > CALLED_OFF_MAX:
            timers[:] = [each for each in timers if not each[2]._cancelled]
            heapq.heapify(timers)
            self._called_off = 0
        while timers and timers[0][2]._cancelled:
            heapq.heappop(timers)
        if not ready:
            assert timers, "nothing is left that could ever happen"
            due = timers[0][0]
            self.now = due - EARLY_S if due - EARLY_S > self.now else max(self.now, due)
        end = self.now + RESOLUTION_S
        while timers and timers[0][0] < end:
            ready.append(heapq.heappop(timers)[2])
        for _ in range(len(ready)):
            handle = ready.popleft()
            if not handle._cancelled:
                handle._run()

    def kill(self, process: Process) -> None:
        process.alive = False
        for handle in [*self._ready, *(timer for _, _, timer in self._timers)]:
            if handle._context is not None and handle._context.get(PROCESS) is process:
                handle.cancel()

    async def create_connection(self, protocol_factory: Any, host: Any = None, port: Any = None, **_: Any) -> Any:
        return await self.net.connect(protocol_factory, str(host), int(port))


@dataclass(eq=False)
class Line:
    """What is between a process and an address. `held`: nothing arrives (to the server, to the client), none is lost.

    `refuses`: the host answers that nobody listens. `rate`: bytes a second, each way; None: as many as there are.
    `shows`: whether the dialler's kernel tells what becomes of what it was handed.
    """

    delay_s: tuple[float, float] = (0.0, 0.0)
    rate: float | None = None
    shows: bool = True
    to_server_held: bool = False
    to_client_held: bool = False
    refuses: bool = False
    dials: int = 0
    pipes: list[Pipe] = field(default_factory=list)
    free_at: list[float] = field(default_factory=lambda: [0.0, 0.0])  # to the client, to the server
    # Called with the size of what the client writes.
    tap: Callable[[int], None] = lambda size: None


class End(asyncio.Transport):
    """One end of a connection, and what is on its way to it."""

    peer: End

    def __init__(self, pipe: Pipe, process: Process, name: str, *, server: bool) -> None:
        super().__init__({"peername": (name, 1), "socket": self})
        self.pipe = pipe
        self.process = process
        self.server = server
        self.protocol: Any = None
        self.family = socket.AF_UNSPEC
        self.reading = True
        self.closing = False
        self.lost = False
        self._queue: deque[tuple[float, bytes | Exception | None]] = deque()
        self.in_flight_bytes = 0
        self.taken_bytes = self.taken_segments = 0
        self._planned = False
        self._writer_paused = False
        self._stuck_since: float | None = None

    # what the protocol calls

    def set_protocol(self, protocol: Any) -> None:
        self.protocol = protocol

    def get_protocol(self) -> Any:
        return self.protocol

    def is_closing(self) -> bool:
        return self.closing

    def is_reading(self) -> bool:
        return self.reading and not self.closing

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True
        self._plan()

    def get_write_buffer_size(self) -> int:
        return max(0, self.peer.in_flight_bytes - KERNEL_BYTES)

    def write(self, data: Any) -> None:
        assert not self.closing, "written to a transport that closes"
        self.peer._arrives(bytes(data))

    def can_write_eof(self) -> bool:
        return False  # as under TLS

    def close(self) -> None:
        if not self.closing:
            self.closing = True
            self.peer._arrives(None)
            self.lose(None)

    def abort(self) -> None:
        if not self.closing:
            self.closing = True
            self.peer._arrives(ConnectionResetError("reset by peer"))
            self.lose(None)

    def silent_ms(self) -> int:
        """For how long something has been on its way that the other side's kernel has not acknowledged."""
        since = self.peer._stuck_since
        return 0 if since is None else int((self.pipe.net.loop.now - since) * 1000)

    def look(self) -> tcp.Line | None:
        """What the kernel on this side knows of the connection."""
        line, peer = self.pipe.line, self.peer
        if not line.shows:
            return None
        queued = min(peer.in_flight_bytes, KERNEL_BYTES)
        return tcp.Line(peer.taken_bytes, queued, peer.taken_segments + 1, 2 * line.delay_s[0])

    # the way to this end

    @property
    def _held(self) -> bool:
        line = self.pipe.line
        return self.pipe.dead or (line.to_server_held if self.server else line.to_client_held)

    def _arrives(self, what: bytes | Exception | None) -> None:
        net = self.pipe.net
        if self._held and self._stuck_since is None:
            self._stuck_since = net.loop.now
        if isinstance(what, bytes) and self.server:
            self.pipe.line.tap(len(what))
        if self.pipe.dead or self.lost:
            return
        if isinstance(what, bytes) and self.pipe.line.rate is not None:
            for start in range(0, len(what), SEGMENT_BYTES):
                piece = what[start : start + SEGMENT_BYTES]
                self._queue.append((self._arrives_at(piece), piece))
        else:
            self._queue.append((self._arrives_at(what), what))
        if isinstance(what, bytes):
            self.in_flight_bytes += len(what)
            if self.in_flight_bytes > WRITE_HIGH_BYTES and not self._writer_paused:
                self._writer_paused = True
                self.peer.protocol.pause_writing()
        self._plan()

    def _arrives_at(self, what: bytes | Exception | None) -> float:
        net, line = self.pipe.net, self.pipe.line
        at = net.loop.now
        if isinstance(what, bytes) and line.rate is not None:
            at = line.free_at[self.server] = max(at, line.free_at[self.server]) + len(what) / line.rate
        at += net.random.uniform(*line.delay_s)
        return max(at, self._queue[-1][0]) if self._queue else at

    def _plan(self) -> None:
        if self._planned or not self._queue or self._held or not self.reading or self.lost:
            return
        self._planned = True
        self.pipe.net.loop.call_at(self._queue[0][0], self._deliver, context=self.process.context())

    def _deliver(self) -> None:
        self._planned = False
        now = self.pipe.net.loop.now
        while self._queue and self._queue[0][0] <= now and not self._held and self.reading and not self.lost:
            self._take(self._queue.popleft()[1])
        self._plan()

    def _take(self, what: bytes | Exception | None) -> None:
        if isinstance(what, bytes):
            self.in_flight_bytes -= len(what)
            self.taken_bytes += len(what)
            self.taken_segments += 1
            if self._writer_paused and self.in_flight_bytes < WRITE_LOW_BYTES:
                self._writer_paused = False
                if not self.peer.lost:
                    self.peer.process.run(self.peer.protocol.resume_writing)
            if not self.closing:
                self.protocol.data_received(what)
        elif not self.closing:
            self.closing = True
            if what is None:
                self.protocol.eof_received()
            self.lose(what)

    def held_changed(self) -> None:
        if not self._held:
            self._stuck_since = None
            if self.pipe.line.rate is not None and self._queue:
                # What a slow line held up it carries no faster than anything else.
                waiting, self._queue = self._queue, deque()
                self.pipe.line.free_at[self.server] = self.pipe.net.loop.now
                for _, what in waiting:
                    self._queue.append((self._arrives_at(what), what))
            self._plan()
        elif self._queue and self._stuck_since is None:
            self._stuck_since = self.pipe.net.loop.now

    def last_words(self, share: float) -> None:
        """Of what is on its way, this share still arrives, cut where it falls."""
        left = int(self.in_flight_bytes * share)
        while self._queue and left > 0 and not self.lost:
            _, what = self._queue.popleft()
            if isinstance(what, bytes):
                piece = what[:left]
                left -= len(piece)
                if not self.closing:
                    self.process.run(self.protocol.data_received, piece)
        self._queue.clear()

    def lose(self, error: Exception | None) -> None:
        """The connection ends here, and this end's protocol hears of it."""
        self.closing = True
        if not self.lost:
            self.lost = True
            self._queue.clear()
            if self.peer.lost and self.pipe in self.pipe.line.pipes:
                self.pipe.line.pipes.remove(self.pipe)
            if self.process.alive:
                self.pipe.net.loop.call_soon(self.protocol.connection_lost, error, context=self.process.context())


class Pipe:
    def __init__(self, net: Net, line: Line, client: Process, server: Process) -> None:
        self.net = net
        self.line = line
        self.dead = False
        self.client = End(self, client, "127.0.0.1", server=False)
        self.server = End(self, server, "127.0.0.1", server=True)
        self.client.peer, self.server.peer = self.server, self.client
        line.pipes.append(self)


class Net:
    """Who listens where, and the lines. `line(client, address)` may be asked for before anybody dials."""

    def __init__(self, loop: VirtualLoop, random: Random) -> None:
        self.loop = loop
        self.random = random
        loop.net = self
        self._servers: dict[str, tuple[Process, Callable[[], Any]]] = {}
        self._lines: dict[tuple[str, str], Line] = {}

    def line(self, client: str, address: str) -> Line:
        return self._lines.setdefault((client, address), Line())

    def listen(self, address: str, process: Process, factory: Callable[[], Any]) -> None:
        self._servers[address] = process, factory

    async def connect(self, factory: Callable[[], Any], host: str, port: int) -> tuple[End, Any]:
        process = PROCESS.get()
        assert process is not None
        address = f"{host}:{port}"
        line = self.line(process.name, address)
        line.dials += 1
        await asyncio.sleep(2 * self.random.uniform(*line.delay_s) + 0.0001)
        if line.to_server_held or line.to_client_held:
            await self.loop.create_future()  # nobody answers; the dialler's patience ends it
        server, accept = self._servers.get(address, (None, None))
        if server is None or accept is None or not server.alive or line.refuses:
            raise ConnectionRefusedError(111, "Connection refused")
        pipe = Pipe(self, line, process, server)
        pipe.server.protocol = server.run(accept)
        server.run(pipe.server.protocol.connection_made, pipe.server)
        pipe.client.protocol = factory()
        pipe.client.protocol.connection_made(pipe.client)
        return pipe.client, pipe.client.protocol

    # ------------------------------------------------------------------ faults

    def hold(self, line: Line, *, to_server: bool, to_client: bool) -> None:
        """Silence, each way; with neither, what was held goes on."""
        line.to_server_held, line.to_client_held = to_server, to_client
        for pipe in list(line.pipes):
            pipe.client.held_changed()
            pipe.server.held_changed()

    def cut(
        self, line: Line, *, to_server: float, to_client: float, tell_client: bool = True, tell_server: bool = True
    ) -> None:
        """Every connection ends; these shares of what is in flight arrive. Who is not told still believes."""
        for pipe in list(line.pipes):
            pipe.dead = True
            pipe.server.last_words(to_server)
            pipe.client.last_words(to_client)
            for end, told in ((pipe.client, tell_client), (pipe.server, tell_server)):
                if told:
                    end.lose(ConnectionResetError("cut"))
            if pipe in line.pipes:
                line.pipes.remove(pipe)

    def kill(self, process: Process, *, told: bool) -> None:
        """The process is gone. `told`: who it had dialled hears of it; who had dialled it does in any case."""
        self.loop.kill(process)
        for line in self._lines.values():
            for pipe in list(line.pipes):
                for end in (pipe.client, pipe.server):
                    if end.process is process:
                        pipe.dead = True
                        end.lost = end.closing = True
                        share = self.random.choice([0.0, 1.0, self.random.random()])
                        end.peer.last_words(share)
                        if told or end.server:
                            end.peer.lose(ConnectionResetError("the other side died"))
                        if pipe in line.pipes:
                            line.pipes.remove(pipe)
