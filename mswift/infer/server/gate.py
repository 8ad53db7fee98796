"""What stands before every route: the key, the size of a request, the time that it may take to arrive."""

import asyncio
import hmac
import json
from collections.abc import Awaitable, Callable, Collection, MutableMapping, Sequence
from typing import Any

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN_PATHS = ("/health",)
"""Answered without a key."""


class Gate:
    """ASGI middleware: reads the whole body within the limits, then lets the request through with it."""

    def __init__(
        self,
        app: App,
        keys: Sequence[str],
        max_body_bytes: int,
        body_seconds: float,
        seen: Callable[[str, int], None],
        open_paths: Collection[str] = OPEN_PATHS,
    ) -> None:
        self._app = app
        self._keys = [key.encode() for key in keys]
        self._max_body_bytes = max_body_bytes
        self._body_seconds = body_seconds
        self._open_paths = open_paths
        self._seen = seen
        """Told the path and the status of each request."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request, or what is none (lifespan)."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        if (
            self._keys
            and scope["path"] not in self._open_paths
            and not self._has_key(headers.get(b"authorization", b""))
        ):
            await self._refuse(scope, send, 401, "a key is needed: Authorization: Bearer KEY", "invalid_api_key")
            return
        try:
            async with asyncio.timeout(self._body_seconds):
                body = await self._body(headers, receive)
        except TimeoutError:
            await self._refuse(scope, send, 408, f"the request did not arrive within {self._body_seconds:g} s")
            return
        except _TooLarge:
            await self._refuse(scope, send, 413, f"the request is larger than {self._max_body_bytes} bytes")
            return
        if body is None:
            return

        async def told(message: Any) -> None:
            if message["type"] == "http.response.start":
                self._seen(scope["path"], message["status"])
            await send(message)

        await self._app(scope, _replay(body, receive), told)

    def _has_key(self, given: bytes) -> bool:
        scheme, _, key = given.partition(b" ")
        fits = [hmac.compare_digest(key.strip(), known) for known in self._keys]  # all, whichever fits
        return scheme.lower() == b"bearer" and any(fits)

    async def _body(self, headers: dict[bytes, bytes], receive: Receive) -> bytes | None:
        """The whole body; None when the client left. Raises _TooLarge as early as it is known."""
        length = headers.get(b"content-length", b"")
        if length.isdigit() and int(length[:20]) > self._max_body_bytes:
            raise _TooLarge
        parts: list[bytes] = []
        size = 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > self._max_body_bytes:
                raise _TooLarge
            if not message.get("more_body"):
                return b"".join(parts)

    async def _refuse(self, scope: Scope, send: Send, status: int, message: str, code: str | None = None) -> None:
        self._seen(scope["path"], status)
        detail = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
        headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
        if status == 401:
            headers.append((b"www-authenticate", b"Bearer"))
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": json.dumps({"error": detail}).encode()})


async def disconnected(request: Any) -> None:
    """Returns when the client of a request, whose body has been read, has left."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


class _TooLarge(Exception):
    """More bytes than the limit."""


def _replay(body: bytes, receive: Receive) -> Receive:
    given = False

    async def replay() -> Any:
        nonlocal given
        if not given:
            given = True
            return {"type": "http.request", "body": body, "more_body": False}
        return await receive()

    return replay
