"""Addresses of cameras, brokers and web servers: what they say, and what of them may be shown.

Foreign errors may hold the address they are about. What is shown of one is `Address.name`, or its host.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from urllib.parse import quote, unquote

from fbclip.errors import UsageError

ESCAPES = "in a user or password write / ? # [ ] @ : % as %2F %3F %23 %5B %5D %40 %3A %25"
_PARTS = re.compile(r"([a-z][a-z0-9+.-]*)://([^/?#]*)([^?#]*)(\?[^#]*)?(#.*)?", re.IGNORECASE | re.DOTALL)
_PLACE = re.compile(r"(?:\[([0-9a-f:.]+(?:%[\w.~-]+)?)\]|([^\s\[\]:%\\]+))(?::(\d{0,5}))?", re.IGNORECASE)
_SECRET = "(?:user|usr|login|pass|pwd|pw|token|secret|key|auth|cred)[a-z]*"
_PLAIN = "(?:ch|channel|stream|subtype|track|profile)[a-z0-9]*"  # what recorders have in their paths besides
_HIDDEN = re.compile(rf"({_SECRET}(?:=|:|%3d|%3a)).*?(?=[&_;,/](?:{_SECRET}|{_PLAIN})(?:=|:|%3d|%3a)|$)", re.IGNORECASE)


@dataclass(frozen=True, repr=False)
class Address:
    """A URL in parts.

    Attributes:
        scheme: in lower case.
        user, password: as they are meant, decoded; "" for none.
        host: name or number, an IPv6 one without its brackets.
        port: that of the scheme where none is given.
        path: as it is given, "" or from its "/" on.
        bare: the URL without user and password, as HTTP asks for it: blanks and what is no ASCII are escaped.
        name: the URL as results and logs may show it: without user, password and query, and with *** for what a path
            says after `user=`, `password=`, `token=` and the like.
    """

    scheme: str
    user: str
    password: str
    host: str
    port: int
    path: str
    bare: str
    name: str

    def __repr__(self) -> str:
        return f"Address({self.name})"


def parse(text: str, rule: str, ports: Mapping[str, int], option: str = "source") -> Address:
    """The parts of an address.

    A raw @ may stand in a user or password, for the last one ends them; behind the host it may not: there it is the
    rest of a password with a / ? or #, whose beginning would pass for a port.

    Args:
        rule: what it is to be, like "a stream is rtsp://HOST/PATH", for the error.
        ports: the schemes that may be, and the port of each.
        option: the parameter that it was given as.

    Raises:
        UsageError: it is none; nothing of it but its scheme is shown.
    """
    parts = _PARTS.fullmatch(text)
    scheme = parts[1].lower() if parts else ""
    if not parts or scheme not in ports:
        *others, last = ports
        raise UsageError(
            f"{rule}, where the scheme is {', '.join(others)} or {last}; got {scheme or 'none'}", option=option
        )
    login, _, netloc = parts[2].rpartition("@")
    place = _PLACE.fullmatch(netloc)
    port = int((place and place[3]) or ports[scheme])
    behind = parts[3] + (parts[4] or "") + (parts[5] or "")
    host = (place[1] or place[2]) if place else ""
    if not _is_host(host) or not 0 < port < 65536 or "@" in behind or set("[]") & set(login) or not text.isprintable():
        raise UsageError(f"{rule}; this one has no valid host or port: {ESCAPES}", option=option)
    user, _, password = login.partition(":")
    target = re.sub(r"[^!-~]", lambda sign: quote(sign[0]), parts[3] + (parts[4] or ""))
    return Address(
        scheme,
        unquote(user),
        unquote(password),
        host,
        port,
        parts[3],
        f"{scheme}://{netloc}{target}",
        f"{scheme}://{netloc}{_masked(parts[3])}",
    )


def _is_host(name: str) -> bool:
    try:
        return bool(name.encode("idna"))
    except UnicodeError:
        return False


def shown(text: str) -> str:
    """What may be shown of a text that is no file and may be a malformed address: nothing before its last @, no query."""
    login = re.match(r".*:.*(?:@|%40)", text, re.DOTALL)
    rest = f"***@{text[login.end() :]}" if login else text
    return _masked(rest.partition("?")[0] if "://" in text else rest)


def _masked(text: str) -> str:
    return _HIDDEN.sub(r"\1***", text)


def status(code: int) -> str:
    """An answer of HTTP, like "404 Not Found"; in our words, for the server's may hold the address."""
    try:
        return f"{code} {HTTPStatus(code).phrase}"
    except ValueError:
        return str(code)
