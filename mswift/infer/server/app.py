"""The server: OpenAI's routes over an engine that is stepped in a thread."""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from mswift import __version__
from mswift.errors import ConfigError, DataError
from mswift.infer.request import BASE_MODEL, Completion, Piece, TokenLogprob
from mswift.infer.request import Request as EngineRequest
from mswift.infer.server.gate import Gate, disconnected
from mswift.infer.server.metrics import CONTENT_TYPE, Metrics
from mswift.infer.server.replies import ChatReply, TextReply
from mswift.infer.server.schema import (
    ChatCompletion,
    ChatRequest,
    CompletionRequest,
    ErrorDetail,
    ErrorReply,
    Health,
    Model,
    ModelList,
    TextCompletion,
)
from mswift.infer.server.token_texts import TokenTexts
from mswift.infer.server.translate import NoSuchModel, Served, adapter_of, chat, completions
from mswift.infer.server.worker import QueueFull, Worker

T = TypeVar("T")
Pieces = AsyncGenerator[tuple[int, Piece], None]


@dataclass(frozen=True)
class Limits:
    """Of one request."""

    max_body_bytes: int
    body_seconds: float
    """For it to arrive."""
    request_seconds: float
    """For its answer."""
    keys: tuple[str, ...] = ()


_LAST_SECONDS = 2.0
"""For the last events of a stream, which may say that its time is up."""


class ClientLeft(Exception):
    """Nobody waits for the answer."""


_ERRORS: dict[int | str, dict[str, Any]] = {"4XX": {"model": ErrorReply}, "5XX": {"model": ErrorReply}}


def create_app(worker: Worker, served: Served, limits: Limits) -> FastAPI:
    """The application; the worker starts and stops with it."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        worker.start()
        yield
        worker.stop()

    app = FastAPI(title="mswift", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    routes = _Routes(worker, served, limits)
    known = set()
    for method, path, function, model in (
        ("GET", "/health", routes.health, Health),
        ("GET", "/v1/models", routes.models, ModelList),
        ("GET", "/v1/models/{name:path}", routes.model, Model),
        ("POST", "/v1/chat/completions", routes.chat, ChatCompletion),
        ("POST", "/v1/completions", routes.completions, TextCompletion),
    ):
        app.add_api_route(
            path, cast(Callable[..., Any], function), methods=[method], response_model=model, responses=_ERRORS,
            response_model_exclude_none=path == "/v1/models/{name:path}",
        )  # fmt: skip
        known.add(path)
    app.add_api_route("/metrics", routes.metrics_text, methods=["GET"], response_class=Response, responses=_ERRORS)
    known.add("/metrics")

    def seen(path: str, status: int) -> None:
        routes.metrics.requests.labels(path if path in known else "other", status).inc()

    app.add_middleware(
        Gate, keys=limits.keys, max_body_bytes=limits.max_body_bytes, body_seconds=limits.body_seconds, seen=seen
    )
    for kind in (*_HANDLED, ClientLeft, Exception):
        app.add_exception_handler(kind, _handle)
    return app


class _Routes:
    def __init__(self, worker: Worker, served: Served, limits: Limits) -> None:
        self._worker = worker
        self._served = served
        self._limits = limits
        self._texts = TokenTexts(worker.engine.tokenizer)
        self._started = int(time.time())
        self.metrics = Metrics(lambda: worker.engine.load)

    async def health(self) -> Any:
        """Whether the engine's thread is alive, and what it has to do."""
        if not self._worker.alive:
            reply = ErrorReply(error=ErrorDetail(message="the engine has stopped", type="server_error"))
            return JSONResponse(reply.model_dump(), status_code=503)
        running, waiting = self._worker.engine.load
        return Health(running=running, waiting=waiting)

    async def metrics_text(self) -> Response:
        """In Prometheus' text format."""
        return Response(self.metrics.text(), headers={"content-type": CONTENT_TYPE})

    async def models(self) -> ModelList:
        """The model and its adapters."""
        return ModelList(data=[self._model(name) for name in self._served.names])

    async def model(self, name: str) -> Model:
        """One of them."""
        adapter_of(self._served, name)
        return self._model(name)

    def _model(self, name: str) -> Model:
        own = self._served.model
        length = self._worker.engine.max_length
        return Model(id=name, created=self._started, parent=None if name == own else own, max_model_len=length)

    async def chat(self, request: Request, body: ChatRequest) -> Any:
        """Answer a conversation."""
        asked = chat(body, self._served)
        options = body.stream_options
        reply = ChatReply(body.model, asked, self._texts, include_usage=bool(options and options.include_usage))
        if body.stream:
            return await self._streamed(request, [asked.request], lambda _, piece: reply.chunks(piece), reply.last)
        answers = await self._until_left(request, self._gather([asked.request]))
        return reply.whole([completion for _, completion in answers])

    async def completions(self, request: Request, body: CompletionRequest) -> Any:
        """Continue prompts."""
        asked = completions(body, self._served)
        options = body.stream_options
        reply = TextReply(body.model, body.n or 1, self._texts, include_usage=bool(options and options.include_usage))
        if body.stream:
            return await self._streamed(request, asked, reply.chunks, reply.last)
        return await self._until_left(request, self._complete(body, asked, reply))

    async def _complete(self, body: CompletionRequest, asked: Sequence[EngineRequest], reply: TextReply) -> Any:
        prompts = await self._echo(asked, body.logprobs) if body.echo else None
        if body.max_tokens != 0 or prompts is None:
            return reply.whole(await self._gather(asked), prompts)
        logprobs = None if body.logprobs is None else ()
        return reply.whole(
            [(number, Completion("", "length", len(tokens), 0, (), logprobs, index))
             for number, (_, tokens) in enumerate(prompts) for index in range(body.n or 1)],
            prompts,
        )  # fmt: skip

    async def _echo(
        self, asked: Sequence[EngineRequest], logprobs: int | None
    ) -> list[tuple[str, Sequence[TokenLogprob | int]]]:
        """Text and tokens of the prompts; log-probabilities where they are asked for."""
        engine = self._worker.engine
        if logprobs is not None and logprobs > 1:
            raise DataError("logprobs: with echo at most 1")
        ids = [await asyncio.to_thread(engine.prompt_tokens, request) for request in asked]
        for prompt in ids:
            engine.check(prompt)
        decode = engine.tokenizer.decode
        texts = [decode(own) if one.prompt is None else one.prompt for one, own in zip(asked, ids, strict=True)]
        tokens: list[Sequence[TokenLogprob | int]] = [list(prompt) for prompt in ids]
        if logprobs is not None:
            longer = [number for number, prompt in enumerate(ids) if len(prompt) > 1]
            pairs = [(ids[number][:1], ids[number][1:]) for number in longer]
            scores = await self._worker.score(pairs, asked[0].adapter or BASE_MODEL) if pairs else []
            for number, score in zip(longer, scores, strict=True):
                tokens[number] = [ids[number][0], *score.tokens]
        return list(zip(texts, tokens, strict=True))

    async def _gather(self, asked: Sequence[EngineRequest]) -> list[tuple[int, Completion]]:
        found = []
        async with contextlib.aclosing(self._measured(asked)) as pieces:
            async for number, piece in pieces:
                if piece.completion is not None:
                    found.append((number, piece.completion))
        return found

    async def _measured(self, asked: Sequence[EngineRequest]) -> Pieces:
        """The worker's pieces; what they cost goes to the metrics."""
        start = time.monotonic()
        first = True
        prompts: set[int] = set()
        async with contextlib.aclosing(self._worker.answer(asked)) as pieces:
            async for number, piece in pieces:
                if first:
                    self.metrics.first_token.observe(time.monotonic() - start)
                    first = False
                if (completion := piece.completion) is not None:
                    self.metrics.new_tokens.inc(completion.completion_tokens)
                    if number not in prompts:
                        prompts.add(number)
                        self.metrics.prompt_tokens.inc(completion.prompt_tokens)
                yield number, piece
        self.metrics.whole.observe(time.monotonic() - start)

    async def _streamed(
        self,
        request: Request,
        asked: Sequence[EngineRequest],
        chunks: Callable[[int, Piece], Iterator[BaseModel]],
        last: Callable[[], Iterator[BaseModel]],
    ) -> Response:
        """Server-sent events. The first piece is awaited before the status is sent: refusals have their own."""
        deadline = asyncio.get_running_loop().time() + self._limits.request_seconds
        pieces = self._measured(asked)
        try:
            first = await self._until_left(request, anext(pieces))
        except BaseException:
            await pieces.aclose()
            raise

        async def events() -> AsyncGenerator[bytes, None]:
            try:
                item: tuple[int, Piece] | None = first
                while item is not None:
                    for chunk in chunks(*item):
                        yield _event(chunk)
                    async with asyncio.timeout_at(deadline):
                        item = await anext(pieces, None)
                for chunk in last():
                    yield _event(chunk)
                yield b"data: [DONE]\n\n"
            except Exception as error:  # the status is sent: what went wrong is an event
                status, detail = _told(error)
                yield _event(ErrorReply(error=detail))
                if status == 500:
                    raise
            finally:
                await pieces.aclose()

        return _Stream(events(), self.metrics, deadline + _LAST_SECONDS)

    async def _until_left(self, request: Request, work: Awaitable[T]) -> T:
        """What `work` returns. Raises ClientLeft when nobody waits any more, TimeoutError after request_seconds."""
        task = asyncio.ensure_future(work)
        gone = asyncio.ensure_future(disconnected(request))
        try:
            seconds = self._limits.request_seconds
            await asyncio.wait({task, gone}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            if gone.done():
                self.metrics.left.inc()
                raise ClientLeft
            raise TimeoutError
        finally:
            for one in (task, gone):
                one.cancel()
                with contextlib.suppress(asyncio.CancelledError, Exception):
                    await one


class _Stream(StreamingResponse):
    """Events whose source is closed when they end, in whatever way; by the deadline even where nobody takes them."""

    def __init__(self, events: AsyncGenerator[bytes, None], metrics: Metrics, deadline: float) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"cache-control": "no-cache"})
        self._events = events
        self._metrics = metrics
        self._deadline = deadline
        self._whole = False

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def watched(message: Any) -> None:
            await send(message)
            if message["type"] == "http.response.body" and not message.get("more_body"):
                self._whole = True

        try:
            with contextlib.suppress(TimeoutError):  # the connection is closed, which tells it
                async with asyncio.timeout_at(self._deadline):
                    await super().__call__(scope, receive, watched)
        finally:
            if not self._whole:
                self._metrics.left.inc()
            await self._events.aclose()


def _event(chunk: BaseModel) -> bytes:
    data = chunk.model_dump(mode="json", exclude_none=True)
    return b"data: " + json.dumps(data, ensure_ascii=False).encode() + b"\n\n"


# -- errors


def _told(error: Exception) -> tuple[int, ErrorDetail]:
    """Status and words for what was raised."""
    kind, code, status = "invalid_request_error", None, 400
    message = str(error)
    if isinstance(error, RequestValidationError):
        message = "; ".join(_place(found) for found in error.errors()[:3])
    elif isinstance(error, NoSuchModel):
        status, code = 404, "model_not_found"
    elif isinstance(error, QueueFull):
        status, kind, code = 503, "server_error", "overloaded"
    elif isinstance(error, TimeoutError):
        status, kind, code, message = 504, "server_error", "timeout", "the answer took longer than this server allows"
    elif isinstance(error, HTTPException):
        status, message = error.status_code, str(error.detail)
    elif not isinstance(error, DataError | ConfigError):
        status, kind, message = 500, "server_error", f"the engine failed: {type(error).__name__}"
    message = message.encode(errors="backslashreplace").decode()[:2000]
    return status, ErrorDetail(message=message, type=kind, code=code)


def _place(found: Any) -> str:
    """Where a field is wrong, and why; never its value."""
    where = ".".join(str(part) for part in found["loc"] if part != "body")
    return f"{where[:200]}: {found['msg']}" if where else str(found["msg"])


async def _handle(request: Request, error: Exception) -> Response:
    if isinstance(error, ClientLeft):
        return Response(status_code=499)
    status, detail = _told(error)
    headers = {"retry-after": "1"} if status == 503 else dict(getattr(error, "headers", None) or {})
    return JSONResponse(ErrorReply(error=detail).model_dump(), status_code=status, headers=headers)


_HANDLED = (RequestValidationError, HTTPException, DataError, ConfigError, NoSuchModel, QueueFull, TimeoutError)
