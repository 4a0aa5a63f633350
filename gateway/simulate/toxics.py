"""A small server of Toxiproxy's HTTP interface: proxies whose connections fail as they are told.

For machines where Toxiproxy itself is not installed; `python -m gateway.simulate.toxics -host 127.0.0.1 -port 8474`
takes the same options. It has what a scenario needs: proxies (create, list, show, update, delete), the toxics latency,
bandwidth, timeout, reset_peer, slow_close and limit_data on either stream, /version and /reset. Answers, status codes
and the meaning of each toxic are Toxiproxy 2's; tests/gateway/test_toxics.py holds both against one contract.

"upstream" is what flows from the client towards the proxied server, "downstream" what flows back.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import signal
import socket
import struct
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import h11

BODY_MAX_BYTES = 1 << 20
REQUEST_S_MAX = 10.0
PROXIES_MAX = 200
TOXICS_MAX = 50
CONNECTIONS_MAX = 2000
PIECE_BYTES = 32 * 1024
PIECES_MAX = 1024  # in one direction of one connection; beyond it the sender is not read
CONNECT_S_MAX = 10.0
PACE_S = 0.1  # the longest piece a bandwidth lets through at once
STREAMS = ("upstream", "downstream")
# Each toxic's attributes and what they are without being given. All are whole numbers: ms, kB/s or bytes.
ATTRIBUTES: dict[str, dict[str, int]] = {
    "latency": {"latency": 0, "jitter": 0},
    "bandwidth": {"rate": 0},
    "timeout": {"timeout": 0},
    "reset_peer": {"timeout": 0},
    "slow_close": {"delay": 0},
    "limit_data": {"bytes": 0},
}


class Refused(Exception):
    """The caller's mistake: a status and a text, in the form Toxiproxy gives them."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status
        self.body = {"error": text, "status": status}


@dataclass
class Toxic:
    """One fault on one stream of a proxy. `toxicity` is the share of connections that have it."""

    name: str
    type: str
    stream: str
    toxicity: float
    attributes: dict[str, int]

    def describe(self) -> dict[str, Any]:
        return {
            "attributes": self.attributes,
            "name": self.name,
            "type": self.type,
            "stream": self.stream,
            "toxicity": self.toxicity,
        }


@dataclass
class _Hold:
    """A toxic as one flow has it: since when, and whether the dice say that it has it at all."""

    toxic: Toxic
    since: float
    active: bool


@dataclass
class _Piece:
    arrived: float
    jitter: float  # -1 to 1, drawn once
    data: bytes


@dataclass
class _Flow:
    """One direction of one connection: what came in, and when it may go out."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    abort: Callable[[], None]
    holds: dict[str, _Hold] = field(default_factory=dict)
    pieces: deque[_Piece] = field(default_factory=deque)
    ended: float | None = None  # when the sender closed
    closed: bool = False
    free_at: float = 0.0  # when the bandwidth has room again
    passed_bytes: int = 0
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    room: asyncio.Event = field(default_factory=asyncio.Event)

    def hold(self, toxic: Toxic) -> None:
        active = random.random() < toxic.toxicity
        self.holds[toxic.name] = _Hold(toxic, asyncio.get_running_loop().time(), active)
        self.wake.set()

    def release(self, toxic: Toxic) -> None:
        hold = self.holds.pop(toxic.name, None)
        # As Toxiproxy does it: what was swallowed is missing, so the connection ends with the fault.
        if hold is not None and hold.active and toxic.type == "timeout":
            self.closed = True
        self.wake.set()

    def find(self, kind: str) -> list[_Hold]:
        return [hold for hold in self.holds.values() if hold.active and hold.toxic.type == kind]

    async def read(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while data := await self.reader.read(PIECE_BYTES):
                self.pieces.append(_Piece(loop.time(), random.uniform(-1, 1), data))
                self.wake.set()
                while len(self.pieces) >= PIECES_MAX:
                    self.room.clear()
                    await self.room.wait()
        except OSError:
            pass  # a reset ends the flow as a FIN does
        finally:
            self.ended = loop.time()
            self.wake.set()

    async def write(self) -> None:
        try:
            while not self.closed:
                self.wake.clear()
                wait_s = await self._step(asyncio.get_running_loop().time())
                if wait_s is not None and wait_s > 0:
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(self.wake.wait(), None if wait_s == float("inf") else wait_s)
        except OSError:
            pass  # the receiver is gone
        finally:
            self.closed = True
            self.writer.close()

    async def _step(self, now: float) -> float | None:
        """Let through what may go at `now`; return how long nothing more happens, or None at the end."""
        if self.find("timeout"):
            return self._swallow(now)
        if not self.pieces:
            return self._ending(now)
        piece = self.pieces[0]
        resets = self.find("reset_peer")
        if resets:
            due = piece.arrived + min(hold.toxic.attributes["timeout"] for hold in resets) / 1000
            if due <= now:
                self.abort()
                self.closed = True
                return None
            return due - now
        due = piece.arrived
        for hold in self.find("latency"):
            attributes = hold.toxic.attributes
            due += max(0.0, attributes["latency"] + attributes["jitter"] * piece.jitter) / 1000
        size = len(piece.data)
        rates = [hold.toxic.attributes["rate"] for hold in self.find("bandwidth") if hold.toxic.attributes["rate"] > 0]
        if rates:
            bytes_per_s = min(rates) * 1000
            size = min(size, max(1, int(bytes_per_s * PACE_S)))
            due = max(due, self.free_at) + size / bytes_per_s
        if due > now:
            return due - now
        self.free_at = due
        await self._send(piece, size)
        return 0.0

    def _swallow(self, now: float) -> float | None:
        self.pieces.clear()
        self.room.set()
        after_s = [h.since + h.toxic.attributes["timeout"] / 1000 for h in self.find("timeout")]
        limits = [due for due, hold in zip(after_s, self.find("timeout"), strict=True) if due > hold.since]
        if self.ended is not None or (limits and min(limits) <= now):
            self.closed = True
            return None
        return min(limits) - now if limits else float("inf")

    def _ending(self, now: float) -> float | None:
        if self.ended is None:
            return float("inf")
        due = self.ended + max((h.toxic.attributes["delay"] for h in self.find("slow_close")), default=0) / 1000
        if due > now:
            return due - now
        self.closed = True
        return None

    async def _send(self, piece: _Piece, size: int) -> None:
        data, rest = piece.data[:size], piece.data[size:]
        limits = [hold.toxic.attributes["bytes"] for hold in self.find("limit_data")]
        if limits:
            data = data[: max(0, min(limits) - self.passed_bytes)]
        self.passed_bytes += len(data)
        if rest:
            piece.data = rest
        else:
            self.pieces.popleft()
            self.room.set()
        if data:
            self.writer.write(data)
            await self.writer.drain()
        if limits and self.passed_bytes >= min(limits):
            self.closed = True


class Connection:
    """A client's connection and the one to the server behind it."""

    def __init__(self, near: tuple[asyncio.StreamReader, asyncio.StreamWriter], far: Any) -> None:
        self._writers = near[1], far[1]
        self.flows = {
            "upstream": _Flow(near[0], far[1], self.abort),
            "downstream": _Flow(far[0], near[1], self.abort),
        }

    async def run(self) -> None:
        tasks = [asyncio.create_task(flow.read()) for flow in self.flows.values()]
        try:
            await asyncio.gather(*(flow.write() for flow in self.flows.values()))
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def close(self) -> None:
        for flow in self.flows.values():
            flow.closed = True
            flow.wake.set()
            flow.writer.close()

    def abort(self) -> None:
        """Both sides see a reset, as after SO_LINGER with 0."""
        for writer in self._writers:
            sock = writer.get_extra_info("socket")
            if sock is not None and sock.fileno() >= 0:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()


class Proxy:
    """One listener in front of one server."""

    def __init__(self, name: str, upstream: str, listen: str) -> None:
        self.name = name
        self.upstream = upstream
        self.listen = listen
        self.toxics: dict[str, Toxic] = {}
        self._server: asyncio.Server | None = None
        self._connections: set[Connection] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def enabled(self) -> bool:
        return self._server is not None

    def describe(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "listen": self.listen,
            "upstream": self.upstream,
            "enabled": self.enabled,
            "toxics": [toxic.describe() for toxic in self.toxics.values()],
        }

    async def enable(self) -> None:
        if self._server is not None:
            return
        host, port = _address(self.listen)
        try:
            self._server = await asyncio.start_server(self._accept, host, port)
        except OSError as error:
            raise Refused(500, f"listen tcp {self.listen}: {error.strerror}") from None
        self.listen = f"{host}:{self._server.sockets[0].getsockname()[1]}"

    async def disable(self) -> None:
        if self._server is None:
            return
        server, self._server = self._server, None
        server.close()
        for connection in list(self._connections):
            connection.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            await self._serve(reader, writer)
        except asyncio.CancelledError:
            pass  # the proxy was disabled; nobody waits for this task but `disable`
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._connections) >= CONNECTIONS_MAX:
            return
        try:
            async with asyncio.timeout(CONNECT_S_MAX):
                far = await asyncio.open_connection(*_address(self.upstream))
        except (OSError, TimeoutError):
            return
        connection = Connection((reader, writer), far)
        for toxic in self.toxics.values():
            connection.flows[toxic.stream].hold(toxic)
        self._connections.add(connection)
        try:
            await connection.run()
        finally:
            self._connections.discard(connection)
            far[1].close()

    def flows(self, toxic: Toxic) -> list[_Flow]:
        return [connection.flows[toxic.stream] for connection in self._connections]

    def add(self, toxic: Toxic) -> None:
        self.toxics[toxic.name] = toxic
        for flow in self.flows(toxic):
            flow.hold(toxic)

    def remove(self, toxic: Toxic) -> None:
        del self.toxics[toxic.name]
        for flow in self.flows(toxic):
            flow.release(toxic)

    def wake(self, toxic: Toxic) -> None:
        for flow in self.flows(toxic):
            flow.wake.set()


def _address(text: str) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    if not colon or not port.isdigit() or int(port) > 65535:
        raise Refused(400, f"bad address: {text}")
    return host.strip("[]") or "127.0.0.1", int(port)


class Toxics:
    """Every proxy, and what a request does to them. `answer` is the whole interface."""

    def __init__(self) -> None:
        self.proxies: dict[str, Proxy] = {}

    async def stop(self) -> None:
        for proxy in self.proxies.values():
            await proxy.disable()

    async def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        """Status and JSON value (None: no body) for one request."""
        try:
            return await self._route(method, [step for step in path.partition("?")[0].split("/") if step], body)
        except Refused as refused:
            return refused.status, refused.body

    async def _route(self, method: str, path: list[str], body: bytes) -> tuple[int, Any]:
        match method, path:
            case "GET", ["version"]:
                return 200, {"version": "lineside"}
            case "POST", ["reset"]:
                return await self._reset()
            case "GET", ["proxies"]:
                return 200, {name: proxy.describe() for name, proxy in self.proxies.items()}
            case "POST", ["proxies"]:
                return await self._create(_object(body))
            case "GET", ["proxies", name]:
                return 200, self._proxy(name).describe()
            case (("POST" | "PATCH"), ["proxies", name]):
                return await self._update(self._proxy(name), _object(body))
            case "DELETE", ["proxies", name]:
                await self._proxy(name).disable()
                del self.proxies[name]
                return 204, None
            case _, ["proxies", name, "toxics", *rest]:
                return self._toxics(method, self._proxy(name), rest, body)
        known = path[:1] in (["version"], ["reset"], ["proxies"])
        raise Refused(405, "method not allowed") if known else Refused(404, "page not found")

    def _proxy(self, name: str) -> Proxy:
        try:
            return self.proxies[name]
        except KeyError:
            raise Refused(404, "proxy not found") from None

    async def _reset(self) -> tuple[int, Any]:
        for proxy in self.proxies.values():
            for toxic in list(proxy.toxics.values()):
                proxy.remove(toxic)
            await proxy.enable()
        return 204, None

    async def _create(self, asked: dict[str, Any]) -> tuple[int, Any]:
        for key in ("name", "upstream"):
            if not isinstance(asked.get(key), str) or not asked[key]:
                raise Refused(400, f"missing required field: {key}")
        name, listen = asked["name"], asked.get("listen") or "127.0.0.1:0"
        if name in self.proxies:
            raise Refused(409, "proxy already exists")
        if len(self.proxies) >= PROXIES_MAX:
            raise Refused(400, f"at most {PROXIES_MAX} proxies")
        _address(asked["upstream"])
        proxy = Proxy(name, asked["upstream"], str(listen))
        if asked.get("enabled", True):
            await proxy.enable()
        self.proxies[name] = proxy
        return 201, proxy.describe()

    async def _update(self, proxy: Proxy, asked: dict[str, Any]) -> tuple[int, Any]:
        for key in ("upstream", "listen"):
            if key in asked and asked[key] != getattr(proxy, key):
                _address(str(asked[key]))
                await proxy.disable()
                setattr(proxy, key, str(asked[key]))
        await (proxy.enable() if asked.get("enabled", True) else proxy.disable())
        return 200, proxy.describe()

    def _toxics(self, method: str, proxy: Proxy, rest: list[str], body: bytes) -> tuple[int, Any]:
        match method, rest:
            case "GET", []:
                return 200, [toxic.describe() for toxic in proxy.toxics.values()]
            case "POST", []:
                return 200, self._add(proxy, _object(body)).describe()
        if len(rest) != 1 or method not in ("GET", "POST", "PATCH", "DELETE"):
            raise Refused(405, "method not allowed")
        toxic = proxy.toxics.get(rest[0])
        if toxic is None:
            raise Refused(404, "toxic not found")
        if method == "DELETE":
            proxy.remove(toxic)
            return 204, None
        if method != "GET":
            asked = _object(body)
            toxic.attributes = toxic.attributes | _attributes(toxic.type, asked.get("attributes"))
            toxic.toxicity = _toxicity(asked, toxic.toxicity)
            proxy.wake(toxic)
        return 200, toxic.describe()

    def _add(self, proxy: Proxy, asked: dict[str, Any]) -> Toxic:
        kind, stream = asked.get("type"), asked.get("stream") or "downstream"
        if stream not in STREAMS:
            raise Refused(400, "stream was invalid, can be either upstream or downstream")
        if not isinstance(kind, str) or kind not in ATTRIBUTES:
            raise Refused(400, "invalid toxic type")
        name = str(asked.get("name") or f"{kind}_{stream}")
        if name in proxy.toxics:
            raise Refused(409, "toxic already exists")
        if len(proxy.toxics) >= TOXICS_MAX:
            raise Refused(400, f"at most {TOXICS_MAX} toxics")
        attributes = ATTRIBUTES[kind] | _attributes(kind, asked.get("attributes"))
        toxic = Toxic(name, kind, stream, _toxicity(asked, 1.0), attributes)
        proxy.add(toxic)
        return toxic


def _object(body: bytes) -> dict[str, Any]:
    try:
        value = json.loads(body)
    except ValueError as error:
        raise Refused(400, f"bad request body: {error}") from None
    if not isinstance(value, dict):
        raise Refused(400, "bad request body: not an object")
    return value


def _attributes(kind: str, given: object) -> dict[str, int]:
    if given is None:
        return {}
    if not isinstance(given, dict):
        raise Refused(400, "bad request body: attributes is not an object")
    for key, value in given.items():
        if key in ATTRIBUTES[kind] and (not isinstance(value, int) or isinstance(value, bool)):
            raise Refused(400, f"bad request body: attributes.{key} is not a whole number")
    return {key: value for key, value in given.items() if key in ATTRIBUTES[kind]}


def _toxicity(asked: dict[str, Any], default: float) -> float:
    value = asked.get("toxicity", default)
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise Refused(400, "bad request body: toxicity is not a number")
    return float(value)


# ---------------------------------------------------------------------- HTTP


async def _request(toxics: Toxics, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """One request a connection: clients that keep connections open are told that it is closed."""
    http = h11.Connection(h11.SERVER)
    method, path, body = "", "", bytearray()
    while True:
        event = http.next_event()
        if event is h11.NEED_DATA:
            http.receive_data(await reader.read(65536))
        elif isinstance(event, h11.Request):
            method, path = event.method.decode(), event.target.decode()
            if http.they_are_waiting_for_100_continue:
                go_on = http.send(h11.InformationalResponse(status_code=100, headers=[]))
                writer.write(go_on or b"")
        elif isinstance(event, h11.Data):
            body += event.data
            if len(body) > BODY_MAX_BYTES:
                raise h11.RemoteProtocolError("body too large", error_status_hint=413)
        elif isinstance(event, h11.EndOfMessage):
            break
        else:
            return
    status, value = await toxics.answer(method, path, bytes(body))
    data = b"" if value is None else json.dumps(value).encode()
    headers = [("connection", "close")]
    if value is not None:
        headers += [("content-type", "application/json"), ("content-length", str(len(data)))]
    for part in (h11.Response(status_code=status, headers=headers), h11.Data(data=data), h11.EndOfMessage()):
        writer.write(http.send(part) or b"")
    await writer.drain()


class ToxicServer:
    """The HTTP listener. `await start(host, port)`, `await stop()`."""

    def __init__(self) -> None:
        self.toxics = Toxics()
        self.port = 0
        self._server: asyncio.Server | None = None

    async def start(self, host: str, port: int) -> None:
        self._server = await asyncio.start_server(self._serve, host, port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
        await self.toxics.stop()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(REQUEST_S_MAX):
                await _request(self.toxics, reader, writer)
        except h11.RemoteProtocolError as error:
            writer.write(b"HTTP/1.1 %d Bad Request\r\nconnection: close\r\n\r\n" % error.error_status_hint)
        except (OSError, TimeoutError):
            pass  # whoever asked is gone, or never finished asking
        finally:
            writer.close()


async def _run(host: str, port: int) -> None:
    server = ToxicServer()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await server.start(host, port)
    await stop.wait()
    await server.stop()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m gateway.simulate.toxics", description=__doc__.splitlines()[0])
    parser.add_argument("-host", default="127.0.0.1")
    parser.add_argument("-port", type=int, default=8474)
    options = parser.parse_args()
    asyncio.run(_run(options.host, options.port))


if __name__ == "__main__":
    main()
