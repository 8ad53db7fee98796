"""What stands before the page: whose name the browser used, from where it was sent, and what pages may do."""

import json
import re
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_HOST = re.compile(r"(\[[0-9a-fA-F:.]+\]|[\w.-]+)(?::\d+)?", re.ASCII)
_POLICY = {
    "default-src": "'none'",
    "script-src": "'self'",
    "style-src": "'self'",
    "connect-src": "'self'",
    "base-uri": "'none'",
    "form-action": "'none'",
    "frame-ancestors": "'none'",
    "require-trusted-types-for": "'script'",
    "trusted-types": "'none'",
}
HEADERS = {
    "content-security-policy": "; ".join(f"{name} {value}" for name, value in _POLICY.items()),
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), microphone=(), geolocation=()",
    "cache-control": "no-store",
}
"""Of every answer: scripts and styles are this server's own files, and nothing else is loaded, framed or sent."""


class Guard:
    """ASGI middleware. A name that is not known could be another site's that was pointed here (DNS rebinding), so the
    Host must be an address in digits or a known name; what changes something must come from this page."""

    def __init__(self, app: App, names: Sequence[str], only_own: bool) -> None:
        """names: besides localhost. only_own: addresses in digits must be this machine's loopback."""
        self._app = app
        self._names = {"localhost", *(name.lower().rstrip(".") for name in names)}
        self._only_own = only_own

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request, or what is none (lifespan)."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return

        async def guarded(message: Any) -> None:
            if message["type"] == "http.response.start":
                own = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                kept = [pair for pair in message.get("headers", ()) if pair[0].lower().decode() not in HEADERS]
                message = {**message, "headers": [*kept, *own]}
            await send(message)

        refusal = self._refusal(scope)
        if refusal is None:
            await self._app(scope, receive, guarded)
            return
        status, words = refusal
        error = {"message": words, "type": "invalid_request_error", "param": None, "code": None}
        headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
        await guarded({"type": "http.response.start", "status": status, "headers": headers})
        await guarded({"type": "http.response.body", "body": json.dumps({"error": error}).encode()})

    def _refusal(self, scope: Scope) -> tuple[int, str] | None:
        """Status and words for a request that is not let through."""
        headers = [(name.lower(), value.decode("latin-1")) for name, value in scope["headers"]]
        hosts = [value for name, value in headers if name == b"host"]
        if len(hosts) != 1 or not self._is_known(hosts[0]):
            return 421, "this name is not the page's own; start mswift app with --allowed_hosts NAME to use it"
        origins = [value for name, value in headers if name == b"origin"]
        if any(urlsplit(origin).netloc.lower() != hosts[0].lower() for origin in origins):
            return 403, "the request was sent by the page of another site"
        told = dict(headers)
        is_link = scope["method"] == "GET" and told.get(b"sec-fetch-mode") == "navigate"
        if not is_link and told.get(b"sec-fetch-site", "none") not in ("same-origin", "none"):
            return 403, "the request was sent by the page of another site"
        if scope["method"] not in ("GET", "HEAD"):
            kinds = [value.partition(";")[0].strip().lower() for name, value in headers if name == b"content-type"]
            if kinds != ["application/json"]:  # other kinds can be sent across sites without asking
                return 415, "the content-type must be application/json"
        return None

    def _is_known(self, host: str) -> bool:
        match = _HOST.fullmatch(host)
        if match is None:
            return False
        name = match[1].strip("[]").lower()
        if name.rstrip(".") in self._names:
            return True
        try:
            return ip_address(name).is_loopback or not self._only_own
        except ValueError:
            return False
