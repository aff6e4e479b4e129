"""Guard: requests from other sites are refused, and every answer says what a browser may do with it."""

import ipaddress
import json
import socket
from collections.abc import Iterable
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

SECURITY_HEADERS = {
    "content-security-policy": "default-src 'self'; media-src 'self' blob:; img-src 'self' data:; "
    "object-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "permissions-policy": "microphone=(self), camera=(), geolocation=()",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}
LOCAL_NAMES = frozenset(("localhost", "127.0.0.1", "::1"))


def is_loopback(host: str) -> bool:
    """Tell whether an address or name that is bound reaches this machine alone."""
    return host == "localhost" or _is_address(host) and ipaddress.ip_address(host).is_loopback


class Hosts:
    """The names under which a server may be asked, so that no other site's name can be pointed at it."""

    def __init__(self, bound: str, allowed: Iterable[str] = ()) -> None:
        """Take the bound address and names beside it."""
        self.names = LOCAL_NAMES | {bound.lower()} | {name.lower() for name in allowed}
        self.any_address = not is_loopback(bound)
        if self.any_address:
            self.names |= {socket.gethostname().lower()}

    def allows(self, host: str) -> bool:
        """Tell whether a Host header is one of ours; numeric addresses are, where others can reach us."""
        try:
            name = (urlsplit(f"//{host}").hostname or "").rstrip(".")
        except ValueError:
            return False
        return name in self.names or self.any_address and _is_address(name)


class Guard:
    """ASGI middleware: checks Host and Origin, adds the security headers."""

    def __init__(self, app: ASGIApp, hosts: Hosts) -> None:
        """Stand before an app."""
        self.app, self.hosts = app, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it with 403."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(SECURITY_HEADERS)
            await send(message)

        sentence = self._object(scope["method"], Headers(scope=scope))
        if not sentence:
            await self.app(scope, receive, send_guarded)
            return
        body = json.dumps({"error": sentence}).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await send_guarded({"type": "http.response.start", "status": 403, "headers": headers})
        await send_guarded({"type": "http.response.body", "body": body})

    def _object(self, method: str, headers: Headers) -> str:
        """Say what speaks against a request; empty where nothing does."""
        host = headers.get("host", "")
        if not self.hosts.allows(host):
            return f"This server isn't called {host[:80]!r}. Start it with --allow-host to allow that name."
        if method in ("GET", "HEAD"):
            return ""
        origin = headers.get("origin")
        is_foreign = origin is not None and origin.partition("://")[2].lower() != host.lower()
        if is_foreign or headers.get("sec-fetch-site") in ("cross-site", "same-site"):
            return "Uploads from other sites' pages are refused. Use this server's own page."
        return ""


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
