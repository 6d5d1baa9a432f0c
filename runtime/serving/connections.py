"""Connections of the web server: a stranger holds none for long, costs little, and keeps nobody out.

uvicorn knows no deadline for a request's head and counts silent connections like others, so connections are accepted
here. One is a stranger's until a request on it was let in (see `Guard`); strangers have `PATIENCE_S`, a few places per
address, and make room for whoever comes after them.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import socket
import sys
import time
from base64 import b64decode
from binascii import Error as Base64Error
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from fbclip.errors import UsageError

if sys.platform != "win32":
    import resource

PATIENCE_S = 10.0  # from a connection's start, or its last answer, until a request on it is let in
PER_ADDRESS = 16  # strangers' connections: a browser opens six, and several may share an address
MAX_PLACES = 256  # connections
LEAST_PLACES = 32
RESERVE = 64  # descriptors for all else: the model, the camera, the sinks
GRACE_S = 3.0  # for requests under way when the server stops
SWEEP_S = 0.5
PAUSE_S = 0.1  # before the next try where the system gives no descriptor

LONGEST_HEADER = 8000  # bytes that the WebSocket library takes of one
HANDSHAKE = frozenset(
    b"host connection upgrade sec-websocket-key sec-websocket-version origin cookie authorization user-agent "
    b"x-forwarded-for x-forwarded-proto".split()
)
NO_HTTP = b'{"detail":"this is no HTTP request that can be understood"}'

log = logging.getLogger("fbclip.serve")


class Place:
    """One connection.

    Attributes:
        origin: whose it is: the peer's address, of IPv6 the network.
        trusted: whether a request on it was let in.
        at_work: requests under way that were let in.
        since: seconds of `time.monotonic()` from which on it has waited otherwise.
        transport: None until it has one.
    """

    def __init__(self, connection: socket.socket, address: str, is_busy: Callable[[], bool]) -> None:
        self.origin = origin_of(address)
        self.trusted = False
        self.at_work = 0
        self.since = time.monotonic()
        self.transport: asyncio.Transport | None = None
        self._socket = connection
        self._is_busy = is_busy

    @property
    def is_open(self) -> bool:
        """Whether it holds a descriptor: closing takes as long as something is left to be sent."""
        return self._socket.fileno() >= 0

    @property
    def is_due(self) -> bool:
        return not self.at_work and time.monotonic() - self.since > PATIENCE_S

    @contextmanager
    def work(self) -> Iterator[bool]:
        """For a request that was let in: whether there is room for it. Until it is done, the connection stays."""
        self.trusted = True
        if self._is_busy():
            yield False
            return
        self.at_work += 1
        try:
            yield True
        finally:
            self.at_work -= 1
            self.since = time.monotonic()

    def end(self) -> None:
        """Close it, and drop what is left to be sent to a stranger."""
        if self.transport and self.trusted:
            self.transport.close()
        else:
            self.cut()

    def cut(self) -> None:
        """Close it now, whatever is left to be sent."""
        if self.transport:
            self.transport.abort()
        else:
            self._socket.close()


class Connections:
    """All connections of a server.

    Args:
        places: for how many there is room. A quarter is kept for those that have not been let in yet, so that there
            is always one to take.
    """

    def __init__(self, places: int) -> None:
        self.places = places
        self.at_work_limit = places - places // 4
        self._held: list[Place] = []

    def take(self, connection: socket.socket, address: str) -> Place:
        """A place for a new connection; who has waited longest makes room, strangers first."""
        self._held = [place for place in self._held if place.is_open]
        new = Place(connection, address, self.is_busy)
        strangers = [place for place in self._held if place.origin == new.origin and not place.trusted]
        if len(strangers) >= min(PER_ADDRESS, self.places // 4):
            self._cut_one(strangers)
        elif len(self._held) >= self.places:
            self._cut_one(self._held)
        self._held.append(new)
        return new

    def cut_one(self) -> None:
        """Free a descriptor."""
        self._cut_one(self._held)

    def is_busy(self) -> bool:
        """Whether too many requests that were let in are under way."""
        return sum(place.at_work > 0 for place in self._held) >= self.at_work_limit

    def sweep(self) -> None:
        """End those whose time is up."""
        for place in self._held:
            if place.is_due:
                place.end()

    def cut_all(self) -> None:
        for place in self._held:
            if place.is_open:
                place.cut()

    def _cut_one(self, places: list[Place]) -> None:
        idle = [place for place in places if not place.at_work and place.is_open]
        if idle:
            leaver = min(idle, key=lambda place: (place.trusted, place.since))
            leaver.cut()
            self._held.remove(leaver)


class Http(H11Protocol):
    """uvicorn's protocol, whose own refusals are of the one form too."""

    def send_400_response(self, msg: str) -> None:
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):  # else it has its answer
            headers = [("content-type", "application/json"), ("content-length", str(len(NO_HTTP)))]
            response = h11.Response(status_code=400, headers=[*headers, ("connection", "close")], reason=b"Bad Request")
            for event in (response, h11.Data(data=NO_HTTP), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        if self.cycle:
            self.cycle.disconnected = True  # the application has nothing to say any more
        self.transport.close()

    def _get_upgrade(self) -> bytes | None:
        """`websocket` for a whole handshake (RFC 6455, section 4.2.1), of which only what matters is passed on.

        Everything else is a request like others, which the application refuses in its own words.
        """
        headers = dict(self.headers)
        try:
            key = b64decode(headers.get(b"sec-websocket-key", b""), validate=True)
        except Base64Error:
            return None
        is_whole = (
            super()._get_upgrade() == b"websocket"
            and (self.scope["method"], self.scope["http_version"]) == ("GET", "1.1")
            and (len(key), headers.get(b"sec-websocket-version")) == (16, b"13")
            and not headers.keys() & {b"content-length", b"transfer-encoding"}
            and max(map(len, headers.values())) < LONGEST_HEADER
        )
        if not is_whole:
            return None
        self.headers = [(name, value) for name, value in headers.items() if name in HANDSHAKE]
        return b"websocket"


class WebServer(uvicorn.Server):
    """uvicorn's server behind `Connections`.

    The application finds the `Place` of a request in its scope: `scope["state"]["place"]`.

    Raises:
        UsageError: too few files may be open at once.
    """

    def __init__(self, app: ASGIApp) -> None:
        config = uvicorn.Config(
            app,
            http=Http,
            loop="asyncio",
            lifespan="off",
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            ws_max_size=1024,  # viewers send a word
            ws_per_message_deflate=False,  # pictures don't get smaller
            timeout_graceful_shutdown=int(2 * GRACE_S),  # what was cut ends by itself before
        )
        super().__init__(config)
        self.connections = Connections(room())
        self._doing: list[asyncio.Task[None]] = []

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=[])
        work = [self._sweep(), *map(self._accept, sockets or [])]
        self._doing = [asyncio.create_task(coroutine) for coroutine in work]

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for task in self._doing:
            task.cancel()
        asyncio.get_running_loop().call_later(GRACE_S, self.connections.cut_all)
        await super().shutdown(sockets)

    async def _accept(self, listening: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        listening.setblocking(False)
        while True:
            try:
                connection, address = await loop.sock_accept(listening)
                place = self.connections.take(connection, address[0])
                place.transport, _ = await loop.connect_accepted_socket(partial(self._protocol, place), connection)
            except ConnectionError:
                continue  # it left before it was met
            except Exception as error:  # whatever it is, others come
                log.warning("a connection can't be taken: %s", error)
                self.connections.cut_one()
                await asyncio.sleep(PAUSE_S)

    def _protocol(self, place: Place) -> Http:
        return Http(config=self.config, server_state=self.server_state, app_state={"place": place})

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_S)
            self.connections.sweep()


def room() -> int:
    """Connections that the limit on open files leaves places for; the limit is raised as far as it is needed and may be.

    Raises:
        UsageError: too few.
    """
    if sys.platform == "win32":  # knows no such limit
        return MAX_PLACES
    limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        return MAX_PLACES
    wanted = MAX_PLACES + RESERVE
    if limit < wanted:
        limit = wanted if most == resource.RLIM_INFINITY else min(most, wanted)
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, most))
    if limit - RESERVE < LEAST_PLACES:
        raise UsageError(f"fbclip serve opens {RESERVE + LEAST_PLACES} files at least; ulimit -n is {limit}: raise it")
    return min(MAX_PLACES, limit - RESERVE)


def origin_of(address: str) -> str:
    """Whose an address is: of IPv6 the network of 64 bits, for a host may choose among all addresses in it."""
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return "unknown"
    if ip.version == 4:
        return str(ip)
    return str(ip.ipv4_mapped or ipaddress.ip_network((ip, 64), strict=False))
