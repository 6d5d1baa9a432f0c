"""Who may talk to the server: checks before anything else of every HTTP request and WebSocket."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import logging
import secrets
import time
from collections import OrderedDict
from contextlib import nullcontext
from hashlib import sha256
from urllib.parse import urlsplit

from starlette.datastructures import MutableHeaders
from starlette.requests import HTTPConnection
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fbclip.errors import UsageError
from fbclip.runtime.serving.connections import Place, origin_of

MIN_TOKEN = 16  # characters; guessing is hopeless then
SESSIONS = 256  # logins that are remembered; the one used longest ago is forgotten for another
SESSION_S = 7 * 24 * 3600.0  # unused, a login ends
FREE_TRIES = 5  # wrong tokens of one address in a row that are answered at once
FREE_TRIES_OF_ALL = 100  # those of all addresses
HOLD_S = 1.0  # that the answers to further ones take
FORGET_S = 60.0  # without a wrong token, and the next is the first again
GUESSERS = 1024  # addresses remembered for it
HELD = 512  # answers held back at once; more would cost memory
SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
LOGIN = "/login"  # needs no token
PROBES = ("/healthz", "/readyz")  # nor do these, by any name of this machine: their answer is one of a few words
HEADERS = {
    # all that a page may load comes from here: no script or picture of others, no frame around it
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}

log = logging.getLogger("fbclip.serve")


class Access:
    """The rules of one running server.

    Args:
        address: IP address that the server listens on.
        port: the one it listens on; cookies are shared between ports, so it is in the cookie's name.
        token: what a client must present; None where only this machine can connect.

    Raises:
        UsageError: an address that others reach without a token, or a token that won't do.
    """

    def __init__(self, address: str, port: int, token: str | None) -> None:
        if token is None and not ipaddress.ip_address(address).is_loopback:
            raise UsageError(
                f"{address} is an address that other machines reach, which needs a token of {MIN_TOKEN} characters or more; "
                f"127.0.0.1 is for this machine alone",
                option="token",
            )
        if token is not None and (len(token) < MIN_TOKEN or not token.isascii()):
            raise UsageError(
                f"a token has {MIN_TOKEN} characters or more, of ASCII; got {len(token)}: "
                f"python3 -c 'import secrets; print(secrets.token_urlsafe())' prints one",
                option="token",
            )
        self.cookie = f"fbclip_{port}"
        self._token = None if token is None else _digest(token)
        self._sessions: OrderedDict[bytes, float] = OrderedDict()  # cookie's digest to its last use, oldest use first
        self._guesses = Guesses()

    @property
    def needs_token(self) -> bool:
        return self._token is not None

    def knows_host(self, connection: HTTPConnection) -> bool:
        """Whether a request names this machine as its address; any name will do where a token is needed.

        A page elsewhere can let its own name point here (DNS rebinding) and would then read what we answer. It has
        no token, and the browser keeps our cookie from that name; without a token the name itself must be right.
        """
        if self.needs_token:
            return True
        try:
            name = urlsplit(f"//{connection.headers.get('host', '')}").hostname or ""
            return name == "localhost" or ipaddress.ip_address(name).is_loopback
        except ValueError:
            return False

    @staticmethod
    def is_same_origin(connection: HTTPConnection) -> bool:
        """Whether a browser sends this for a page of ours; other programs send no Origin."""
        origin = connection.headers.get("origin")
        try:
            return origin is None or urlsplit(origin).netloc == connection.headers.get("host")
        except ValueError:
            return False

    async def accepts(self, token: str, connection: HTTPConnection) -> bool:
        """Whether this is the token. One who guesses is told later and later; the right one is never made to wait."""
        if self._is_token(token):
            return True
        await self._guesses.hold(origin_of(connection.client.host if connection.client else ""))
        return False

    def may_enter(self, connection: HTTPConnection) -> bool:
        """Whether it carries the token (Authorization: Bearer) or the cookie of a login."""
        if self._token is None or self._is_token(bearer(connection)):
            return True
        session = _digest(connection.cookies.get(self.cookie, ""))
        last_use = self._sessions.pop(session, None)
        if last_use is None or time.monotonic() - last_use > SESSION_S:
            return False
        self._sessions[session] = time.monotonic()
        return True

    def admit(self, response: Response, connection: HTTPConnection) -> None:
        """Give a browser the cookie; no script can read it and no other site can make the browser send it."""
        cookie = secrets.token_urlsafe(32)
        self._sessions[_digest(cookie)] = time.monotonic()
        if len(self._sessions) > SESSIONS:
            self._sessions.popitem(last=False)
        secure = connection.scope["scheme"] == "https"
        response.set_cookie(self.cookie, cookie, httponly=True, samesite="strict", secure=secure)

    def dismiss(self, response: Response, connection: HTTPConnection) -> None:
        """End the login that a request carries the cookie of."""
        self._sessions.pop(_digest(connection.cookies.get(self.cookie, "")), None)
        response.delete_cookie(self.cookie, httponly=True, samesite="strict")

    def _is_token(self, token: str) -> bool:
        """Compare in constant time."""
        return self._token is not None and hmac.compare_digest(_digest(token), self._token)


class Guesses:
    """Wrong tokens by address: after some in a row each is answered late, so that guessing takes long.

    No request is refused for those of others: who has the token comes in at once, from the same address too.
    """

    def __init__(self) -> None:
        self._tries: OrderedDict[str, tuple[int, float]] = OrderedDict()  # how many, and when the last was
        self._of_all = (0, 0.0)
        self._held = 0

    async def hold(self, address: str) -> None:
        """Count a wrong token, and return when it may be answered."""
        tries = self._tries[address] = _one_more(self._tries.pop(address, (0, 0.0)))
        self._of_all = _one_more(self._of_all)
        if len(self._tries) > GUESSERS:
            self._tries.popitem(last=False)
        if tries[0] == FREE_TRIES + 1:
            log.warning("more than %d wrong tokens from %s: answers take %g s now", FREE_TRIES, address, HOLD_S)
        is_slow = tries[0] > FREE_TRIES or self._of_all[0] > FREE_TRIES_OF_ALL
        if is_slow and self._held < HELD:
            self._held += 1
            try:
                await asyncio.sleep(HOLD_S)
            finally:
                self._held -= 1


class Guard:
    """ASGI middleware: turns away what `Access` forbids, and adds the headers that bind browsers."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self.app = app
        self.access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            return await self.app(scope, receive, send)
        is_accepted = False

        async def send_guarded(message: Message) -> None:
            nonlocal is_accepted
            if message["type"] in ("http.response.start", "websocket.http.response.start"):
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            elif message["type"] == "websocket.close" and not is_accepted:
                return await problem(404, "there is no WebSocket here")(scope, receive, send_guarded)
            is_accepted |= message["type"] == "websocket.accept"
            return await send(message)

        refusal = await self._refusal(HTTPConnection(scope))
        if refusal is not None:
            if scope["type"] == "websocket":
                refusal.status_code = 403  # whatever the reason: what the page and other viewers know
            return await refusal(scope, receive, send_guarded)
        place: Place | None = scope.get("state", {}).get("place")
        # who asks without a token stays a stranger
        with place.work() if place and not _is_open(scope) else nullcontext(True) as has_room:
            answer = (
                self.app if has_room else problem(503, "too many requests at once: try again", {"Retry-After": "1"})
            )
            return await answer(scope, receive, send_guarded)

    async def _refusal(self, connection: HTTPConnection) -> Response | None:
        """The answer to a request that goes no further."""
        if _is_probe(connection.scope):
            return None
        if not self.access.knows_host(connection):
            return problem(400, "without a token this server goes by localhost and 127.0.0.1 alone")
        method = connection.scope.get("method")  # a WebSocket has none, and acts
        if method not in SAFE_METHODS and not self.access.is_same_origin(connection):
            return problem(403, "requests of other sites are refused")
        if _is_open(connection.scope) or self.access.may_enter(connection):
            return None
        if token := bearer(connection):
            await self.access.accepts(token, connection)
        if "text/html" in connection.headers.get("accept", ""):
            return RedirectResponse(LOGIN, 303)
        return problem(401, "send the token: Authorization: Bearer TOKEN", {"WWW-Authenticate": "Bearer"})


def problem(status: int, detail: str, headers: dict[str, str] | None = None) -> JSONResponse:
    """An error as every client of the server gets it: {"detail": one line}."""
    return JSONResponse({"detail": " ".join(detail.split())}, status, headers)


def bearer(connection: HTTPConnection) -> str:
    """The token of a request's Authorization; empty where it has none."""
    scheme, _, token = connection.headers.get("authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""


def _is_open(scope: Scope) -> bool:
    return scope["path"] == LOGIN or _is_probe(scope)


def _is_probe(scope: Scope) -> bool:
    return scope["path"] in PROBES and scope.get("method") in SAFE_METHODS


def _one_more(tries: tuple[int, float]) -> tuple[int, float]:
    number, last = tries
    now = time.monotonic()
    return (number + 1 if now - last < FORGET_S else 1), now


def _digest(text: str) -> bytes:
    return sha256(text.encode()).digest()
