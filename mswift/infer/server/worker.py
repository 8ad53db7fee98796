"""The thread in which the engine computes, and how a server's event loop is told of it."""

import asyncio
import contextlib
import threading
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any, Protocol, TypeVar

from mswift.errors import MswiftError
from mswift.infer.answer import Answer
from mswift.infer.request import Piece, Request, Score, TokenPair

T = TypeVar("T")


class SteppedEngine(Protocol):
    """An engine that computes one token of every answer when it is told to."""

    tokenizer: Any
    max_length: int | None

    def check(self, prompt: list[int]) -> None: ...
    def prompt_tokens(self, request: Request) -> list[int]: ...
    def submit(self, request: Request) -> list[Answer]: ...
    def step(self) -> bool: ...
    def drop(self, answers: Sequence[Answer]) -> None: ...
    def score(self, pairs: Sequence[TokenPair], adapter: str | None = None) -> list[Score]: ...
    @property
    def load(self) -> tuple[int, int]: ...


class QueueFull(MswiftError):
    """More answers are under way than the server takes."""


class _Reader:
    """Answers under way, each with the number of its request, and the queue of who waits for them."""

    def __init__(self, answers: Sequence[tuple[int, Answer]]) -> None:
        self.answers = list(answers)
        self.items: asyncio.Queue[tuple[int, Piece] | BaseException] = asyncio.Queue()

    def collect(self) -> list[tuple[int, Piece] | BaseException]:
        """What the answers have to say since the last time; one that has ended is forgotten."""
        found: list[tuple[int, Piece] | BaseException] = []
        for entry in list(self.answers):
            try:
                piece = entry[1].take()
            except BaseException as error:
                self.answers.clear()
                return [*found, error]
            if piece.completion is not None:
                self.answers.remove(entry)
            if piece.text or piece.logprobs or piece.completion is not None:
                found.append((entry[0], piece))
        return found


class Worker:
    """Steps the engine while there is work, and hands each token's text to the event loop that asked for it."""

    def __init__(self, engine: SteppedEngine, max_answers: int) -> None:
        self.engine = engine
        self._max_answers = max_answers
        self._num_open = 0
        self._readers: set[_Reader] = set()
        self._calls: list[tuple[Callable[[], Any], asyncio.Future[Any]]] = []
        self._changed = threading.Condition()
        self._stopping = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Begin, for readers in the event loop that runs now."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def stop(self) -> None:
        """End the thread after the token that it is computing."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    async def answer(self, requests: Sequence[Request]) -> AsyncGenerator[tuple[int, Piece], None]:
        """Pieces of the answers, each with the number of its request, until all have ended.

        Closing it early frees their places. Raises QueueFull, DataError and what the engine raises.
        """
        with self._room(sum(request.sampling.n for request in requests)):
            submitted: list[Answer] = []
            reader = None
            try:
                answers = []
                for number, request in enumerate(requests):
                    submitted += (own := await self._submitted(request))
                    answers += [(number, answer) for answer in own]
                reader = _Reader(answers)
                num_left = len(answers)
                with self._changed:
                    self._readers.add(reader)
                    self._changed.notify()
                while num_left:
                    item = await reader.items.get()
                    if isinstance(item, BaseException):
                        raise item
                    num_left -= item[1].completion is not None
                    yield item
            finally:
                if reader is not None:
                    with self._changed:
                        self._readers.discard(reader)
                self.engine.drop(submitted)

    async def _submitted(self, request: Request) -> list[Answer]:
        """What the engine's `submit` returns, from a thread; one that is left goes on, and its answers are dropped."""

        def drop(done: asyncio.Future[list[Answer]]) -> None:
            if not done.cancelled() and done.exception() is None:
                self.engine.drop(done.result())

        work = asyncio.ensure_future(asyncio.to_thread(self.engine.submit, request))
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            work.add_done_callback(drop)
            raise

    @contextlib.contextmanager
    def _room(self, count: int) -> Any:
        if self._num_open + count > self._max_answers:
            raise QueueFull(
                f"{self._num_open} answers are under way and {self._max_answers} is the most; try again later"
            )
        self._num_open += count
        try:
            yield
        finally:
            self._num_open -= count

    async def score(self, pairs: Sequence[TokenPair], adapter: str) -> list[Score]:
        """As the engine's, between two tokens."""
        with self._room(len(pairs)):
            return await self._call(lambda: self.engine.score(pairs, adapter))

    async def _call(self, function: Callable[[], T]) -> T:
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        with self._changed:
            self._calls.append((function, future))
            self._changed.notify()
        return await future

    # -- the thread

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._stopping or self._calls or self._readers)
                if self._stopping:
                    return
                calls, self._calls = self._calls, []
                readers = list(self._readers)
            for function, future in calls:
                if future.cancelled():  # its reader left
                    continue
                self._tell([(_settle, (future, *_result_of(function)))])
            if not readers:
                continue
            try:
                self.engine.step()
                found = [(reader, reader.collect()) for reader in readers]
            except Exception as error:  # no answer's own: all end with it
                for reader in readers:
                    self.engine.drop([answer for _, answer in reader.answers])
                    reader.answers.clear()
                found = [(reader, [error]) for reader in readers]
            with self._changed:
                self._readers.difference_update(reader for reader in readers if not reader.answers)
            self._tell([(reader.items.put_nowait, (item,)) for reader, items in found for item in items])

    def _tell(self, calls: Sequence[tuple[Callable[..., Any], tuple[Any, ...]]]) -> None:
        def run() -> None:
            for function, arguments in calls:
                function(*arguments)

        assert self._loop is not None
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
            self._loop.call_soon_threadsafe(run)


def _result_of(function: Callable[[], Any]) -> tuple[Any, BaseException | None]:
    try:
        return function(), None
    except Exception as error:
        return None, error


def _settle(future: "asyncio.Future[Any]", result: Any, error: BaseException | None) -> None:
    if future.done():  # its reader left
        return
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(result)
