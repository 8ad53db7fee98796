"""The application: the page's files, read once, and the two routes of OpenAI's that it uses, handed on to a server."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import httpx2
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException

from mswift import __version__
from mswift.infer.app.guard import Guard
from mswift.infer.server.gate import Gate, disconnected

HOME = Path(__file__).parent / "page"
FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    **{f"/page/{name}.js": (f"{name}.js", "text/javascript; charset=utf-8")
       for name in ("main", "chat", "stream", "markdown")},
    "/page/style.css": ("style.css", "text/css; charset=utf-8"),
}  # fmt: skip
ROUTES = (("GET", "models"), ("POST", "chat/completions"))
"""Below /v1: what the page needs, and nothing more of the server."""
_MAX_BODY_BYTES = 8 * 2**20
_BODY_SECONDS = 30.0
_CONNECT_SECONDS = 10.0
_ANSWER_SECONDS = 3600.0
"""The longest silence of the server: long prompts take their time."""
_KEPT = ("content-type", "retry-after")


@dataclass(frozen=True)
class Upstream:
    """The server behind the page."""

    url: str
    """Ends with /v1."""
    key: str | None = field(default=None, repr=False)

    @property
    def headers(self) -> dict[str, str]:
        """What it is sent besides the request."""
        return {} if self.key is None else {"authorization": f"Bearer {self.key}"}


@dataclass(frozen=True)
class Settings:
    """Of the page."""

    system: str = ""
    """System message that a conversation begins with."""
    keys: tuple[str, ...] = field(default=(), repr=False)
    """Each opens the page; none: it is open."""
    names: tuple[str, ...] = ()
    """Names of this server besides localhost."""
    only_own: bool = True
    """It is reached from this machine only."""


def create_app(upstream: Upstream, settings: Settings) -> FastAPI:
    """The application. Its files hold no secret and need no key; everything else does, where there is one."""
    client = httpx2.AsyncClient(
        timeout=httpx2.Timeout(_ANSWER_SECONDS, connect=_CONNECT_SECONDS),
        limits=httpx2.Limits(max_connections=None, max_keepalive_connections=20),
        follow_redirects=False,
        trust_env=False,
        headers={"user-agent": f"mswift/{__version__}"},
    )

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with client:
            yield

    app = FastAPI(title="mswift app", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    for path, (name, kind) in FILES.items():
        _route(app, "GET", path, _file((HOME / name).read_bytes(), kind))
    _route(app, "GET", "/settings", _file(JSONResponse({"system": settings.system}).body, "application/json"))
    for method, path in ROUTES:
        _route(app, method, f"/v1/{path}", _forwarder(client, upstream, method, path))
    app.add_exception_handler(HTTPException, _refused)
    app.add_middleware(
        Gate, keys=settings.keys, max_body_bytes=_MAX_BODY_BYTES, body_seconds=_BODY_SECONDS,
        seen=lambda path, status: None, open_paths=tuple(FILES),
    )  # fmt: skip
    app.add_middleware(Guard, names=settings.names, only_own=settings.only_own)
    return app


def _route(app: FastAPI, method: str, path: str, function: Callable[..., Awaitable[Response]]) -> None:
    app.add_api_route(path, cast(Callable[..., Any], function), methods=[method], response_model=None)


def _file(data: bytes | memoryview, kind: str) -> Callable[[], Awaitable[Response]]:
    async def give() -> Response:
        return Response(bytes(data), media_type=kind)

    return give


def _error(status: int, message: str) -> Response:
    detail = {"message": message, "type": "server_error" if status >= 500 else "invalid_request_error"}
    return JSONResponse({"error": {**detail, "param": None, "code": None}}, status_code=status)


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _error(error.status_code, str(error.detail))


def _forwarder(
    client: httpx2.AsyncClient, upstream: Upstream, method: str, path: str
) -> Callable[[Request], Awaitable[Response]]:
    async def forward(request: Request) -> Response:
        headers = {**upstream.headers, "accept-encoding": "identity"}
        if method == "POST":
            headers["content-type"] = "application/json"
        asked = client.build_request(method, f"{upstream.url}/{path}", content=await request.body(), headers=headers)
        try:
            answer = await _unless_left(request, client.send(asked, stream=True))
        except httpx2.HTTPError as error:
            return _error(502, f"the server at {upstream.url} does not answer: {type(error).__name__}")
        return Response(status_code=499) if answer is None else _Forwarded(answer)

    return forward


async def _unless_left(request: Request, work: Awaitable[httpx2.Response]) -> httpx2.Response | None:
    """What `work` returns; None, and the work is stopped, when nobody waits any more."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        for one in (task, gone):
            one.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


class _Forwarded(StreamingResponse):
    """The server's answer while it comes. When its reader leaves, the server is left as well, and so is told."""

    def __init__(self, answer: httpx2.Response) -> None:
        headers = {name: answer.headers[name] for name in _KEPT if name in answer.headers}
        super().__init__(self._pieces(), answer.status_code, headers)
        self._answer = answer

    async def _pieces(self) -> AsyncIterator[bytes]:
        try:
            async for piece in self._answer.aiter_raw():
                yield piece
        except httpx2.HTTPError:  # the status is sent: what went wrong is an event
            error = {"error": {"message": "the server broke off its answer", "type": "server_error"}}
            yield b"\n\ndata: " + json.dumps(error).encode() + b"\n\n"

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            with contextlib.suppress(httpx2.HTTPError):
                await self._answer.aclose()


async def models_of(upstream: Upstream) -> Sequence[str]:
    """Names of the models that the server has. Raises httpx2.HTTPError and ValueError."""
    async with httpx2.AsyncClient(timeout=_CONNECT_SECONDS, trust_env=False) as client:
        answer = (await client.get(f"{upstream.url}/models", headers=upstream.headers)).raise_for_status()
    try:
        return [str(model["id"]) for model in answer.json()["data"]]
    except (KeyError, TypeError) as error:
        raise ValueError("its answer is no list of models") from error
