"""One answer while it grows: tokens in, text and its end out. Torch-free."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Generator, Sequence

from mswift.infer.detokenize import Decoder, Detokenizer, Showing, StopFinder
from mswift.infer.request import Completion, FinishReason, Piece, Request, Sampling, TokenLogprob


class GivenUp(Exception):
    """Why an answer that nobody wants has no end."""


class Answer:
    """The answer number `index` of a request; `room`: how many tokens it may have."""

    def __init__(
        self, request: Request, prompt: Sequence[int], room: int, end: Collection[int], decoder: Decoder, index: int = 0
    ) -> None:
        self.sampling: Sampling = request.sampling
        self.index = index
        self.tokens: list[int] = list(prompt)
        """The prompt's, then the answer's."""
        self.finish_reason: FinishReason | None = None
        self.error: BaseException | None = None
        self._num_prompt = len(prompt)
        self._room = room
        self._end = frozenset(() if self.sampling.ignore_eos else end) | set(self.sampling.stop_token_ids)
        decoder = Showing(decoder, request.shown) if request.shown else decoder
        self._detokenizer = Detokenizer(decoder, prompt if request.messages is None else ())
        self._stops = StopFinder(self.sampling.stop)
        self._pieces: list[str] = []
        self._logprobs: list[TokenLogprob] = []
        self._taken = self._taken_logprobs = 0

    @property
    def ended(self) -> bool:
        """Whether it is complete, or will never be."""
        return self.finish_reason is not None or self.error is not None

    def give_up(self) -> None:
        """Nobody wants it any more; nothing happens to an answer that has ended."""
        if not self.ended:
            self.error = GivenUp()

    def add(self, token: int, logprob: TokenLogprob | None = None) -> None:
        """Take the next token."""
        self.tokens.append(token)
        if logprob is not None:
            self._logprobs.append(logprob)
        if token in self._end:
            self._finish("stop")
            return
        self._pieces.append(self._stops.add(self._detokenizer.add(token)))
        if self._stops.found:
            self.finish_reason = "stop"
        elif len(self.tokens) - self._num_prompt >= self._room:
            self._finish("length")

    def _finish(self, reason: FinishReason) -> None:
        self._pieces.append(self._stops.add(self._detokenizer.finish()))
        if not self._stops.found:
            self._pieces.append(self._stops.finish())
        self.finish_reason = reason if not self._stops.found else "stop"

    def take(self) -> Piece:
        """What was not taken yet; raises what ended the answer early."""
        if self.error is not None:
            raise self.error
        text = "".join(self._pieces[self._taken :])
        logprobs = tuple(self._logprobs[self._taken_logprobs :])
        self._taken, self._taken_logprobs = len(self._pieces), len(self._logprobs)
        return Piece(text, self.completion() if self.finish_reason else None, self.index, logprobs)

    def completion(self) -> Completion:
        """The finished answer; raises what ended it early."""
        if self.error is not None:
            raise self.error
        assert self.finish_reason is not None, "the engine stopped before the answer ended"
        own = tuple(self.tokens[self._num_prompt :])
        return Completion(
            text="".join(self._pieces),
            finish_reason=self.finish_reason,
            prompt_tokens=self._num_prompt,
            completion_tokens=len(own),
            token_ids=own,
            logprobs=tuple(self._logprobs) if self.sampling.logprobs is not None else None,
            index=self.index,
        )


class SteppedEngine(ABC):
    """The part of an Engine that follows from steps, each of which makes a token of every answer that is growing."""

    @abstractmethod
    def submit(self, request: Request) -> list[Answer]:
        """Have the answers of a request grow. Raises DataError."""

    @abstractmethod
    def step(self) -> bool:
        """One token of every answer; False when there is nothing to do."""

    @abstractmethod
    def drop(self, answers: Sequence[Answer]) -> None:
        """Stop work on answers that nobody wants."""

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """Answer a batch (Engine)."""
        answers: list[Answer] = []
        try:
            for request in requests:
                answers += self.submit(request)
            while not all(answer.ended for answer in answers):
                self.step()
            return [answer.completion() for answer in answers]
        finally:
            self.drop(answers)

    def stream(self, request: Request) -> Generator[Piece, None, None]:
        """Answer piece by piece (Engine); the model waits until the next piece is asked for."""
        answers = self.submit(request)
        try:
            growing = list(answers)
            while growing:
                self.step()
                for answer in list(growing):
                    piece = answer.take()
                    if piece.completion is not None:
                        growing.remove(answer)
                    if piece.text or piece.logprobs or piece.completion is not None:
                        yield piece
        finally:
            self.drop(answers)
