"""Who may talk to the server: checks before anything else of every HTTP request and WebSocket."""

from __future__ import annotations

import hmac
import ipaddress
import secrets
from hashlib import sha256
from urllib.parse import urlsplit

from starlette.datastructures import MutableHeaders
from starlette.requests import HTTPConnection
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fbclip.errors import UsageError

MIN_TOKEN = 16  # characters; guessing is hopeless then, without a limit on attempts
SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
LOGIN = "/login"  # the one place that needs no token
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
                f"an address that other machines reach needs --token; --host is {address}: pass a secret of "
                f"{MIN_TOKEN} characters or more, or leave --host out for this machine alone"
            )
        if token is not None and (len(token) < MIN_TOKEN or not token.isascii()):
            raise UsageError(
                f"--token has {MIN_TOKEN} characters or more, of ASCII; got {len(token)}: "
                f"python3 -c 'import secrets; print(secrets.token_urlsafe())' prints one"
            )
        self.cookie = f"fbclip_{port}"
        self._token = None if token is None else _digest(token)
        self._session = secrets.token_urlsafe(32)  # new with every start: restarting logs everybody out

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
        return origin is None or urlsplit(origin).netloc == connection.headers.get("host")

    def is_token(self, token: str) -> bool:
        """Compare in constant time."""
        return self._token is not None and hmac.compare_digest(_digest(token), self._token)

    def may_enter(self, connection: HTTPConnection) -> bool:
        """Whether it carries the token (Authorization: Bearer) or the cookie of a login."""
        if self._token is None:
            return True
        scheme, _, token = connection.headers.get("authorization", "").partition(" ")
        cookie = connection.cookies.get(self.cookie, "")
        by_token = scheme.lower() == "bearer" and self.is_token(token.strip())
        return by_token or hmac.compare_digest(_digest(cookie), _digest(self._session))

    def admit(self, response: Response, connection: HTTPConnection) -> None:
        """Give a browser the cookie; no script can read it and no other site can make the browser send it."""
        response.set_cookie(
            self.cookie,
            self._session,
            httponly=True,
            samesite="strict",
            secure=connection.url.scheme == "https",
        )

    def dismiss(self, response: Response) -> None:
        response.delete_cookie(self.cookie, httponly=True, samesite="strict")


class Guard:
    """ASGI middleware: turns away what `Access` forbids, and adds the headers that bind browsers."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self.app = app
        self.access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            return await self.app(scope, receive, send)

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        refusal = self._refusal(HTTPConnection(scope))
        if refusal is None:
            return await self.app(scope, receive, send_guarded)
        if scope["type"] == "websocket":
            return await send({"type": "websocket.close", "code": 1008})  # before it is accepted: an HTTP 403
        return await refusal(scope, receive, send_guarded)

    def _refusal(self, connection: HTTPConnection) -> Response | None:
        """The answer to a request that goes no further."""
        if not self.access.knows_host(connection):
            return problem(400, "without a token this server goes by localhost and 127.0.0.1 alone")
        method = connection.scope.get("method")  # a WebSocket has none, and acts
        if method not in SAFE_METHODS and not self.access.is_same_origin(connection):
            return problem(403, "requests of other sites are refused")
        if connection.scope["path"] == LOGIN or self.access.may_enter(connection):
            return None
        if "text/html" in connection.headers.get("accept", ""):
            return RedirectResponse(LOGIN, 303)
        return problem(401, "send the token: Authorization: Bearer TOKEN", {"WWW-Authenticate": "Bearer"})


def problem(status: int, detail: str, headers: dict[str, str] | None = None) -> JSONResponse:
    """An error as every client of the server gets it: {"detail": one line}."""
    return JSONResponse({"detail": detail}, status, headers)


def _digest(text: str) -> bytes:
    return sha256(text.encode()).digest()
