"""The embedded engine: transformers' `generate`, streamed and batched."""

# Shapes: B requests, S longest prompt.

import queue
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from mswift.errors import DataError
from mswift.infer.detokenize import Detokenizer, StopFinder
from mswift.infer.request import Completion, FinishReason, Piece, Request
from mswift.infer.sampler import RowSampler


class TransformersEngine:
    """Answers requests with a transformers model; one answer or batch at a time."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self._end_tokens = end_tokens(model.generation_config, tokenizer)
        self._limit = int(getattr(model.config.get_text_config(), "max_position_embeddings", 0)) or None

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """Answer a batch, in the order of the requests (Engine)."""
        answers = [self._answer(request) for request in requests]
        if answers:
            self._run(answers, lambda: None)
        return [answer.completion() for answer in answers]

    def stream(self, request: Request) -> Generator[Piece, None, None]:
        """Answer piece by piece (Engine); the model waits until the next piece is asked for."""
        answer = self._answer(request)
        handover = _Handover()
        worker = threading.Thread(
            target=handover.produce,
            args=(lambda: self._run([answer], lambda: handover.give(answer.take())),),
            name="generate",
            daemon=True,
        )
        worker.start()
        try:
            for text in handover.pieces():
                if text:
                    yield Piece(text)
            yield Piece(answer.take(), answer.completion())
        finally:
            handover.cancel()
            worker.join()

    def prompt_tokens(self, request: Request) -> list[int]:
        """Token ids that the model is given for a request."""
        if request.prompt is not None:
            return list(self.tokenizer(request.prompt)["input_ids"])
        messages = [dict(message) for message in request.messages or ()]
        try:
            text: Any = self.tokenizer.apply_chat_template(
                messages,
                tools=list(request.tools) if request.tools else None,
                tokenize=False,
                add_generation_prompt=True,
            )
        except Exception as error:  # whatever a template raises: jinja errors and any of Python's
            roles = ", ".join(str(message["role"]) for message in messages)
            raise DataError(
                f"the chat template refuses messages of {roles}: {error}; --use_chat_template false does without"
            ) from error
        return list(self.tokenizer(text + request.opening, add_special_tokens=False)["input_ids"])

    def _answer(self, request: Request) -> "_Answer":
        prompt = self.prompt_tokens(request)
        if not prompt:
            raise DataError("an empty prompt, and the tokenizer adds no start token: nothing to continue")
        embedding: Any = self.model.get_input_embeddings()
        rows = int(embedding.weight.shape[0])
        if max(prompt) >= rows:
            token = self.tokenizer.convert_ids_to_tokens(max(prompt))
            raise DataError(
                f"the tokenizer writes token {token!r} (id {max(prompt)}), the model has {rows} embedding rows: put "
                "the tokenizer files that the model was trained with into the directory of --model"
            )
        room = request.sampling.max_new_tokens
        if self._limit is not None:
            if len(prompt) >= self._limit:
                raise DataError(
                    f"a prompt of {len(prompt)} tokens leaves no room for an answer: "
                    f"the model's max_position_embeddings is {self._limit}; shorten it to {self._limit - 1} or less"
                )
            room = min(room, self._limit - len(prompt))
        return _Answer(request, prompt, room, self._end_tokens, self.tokenizer)

    def _run(self, answers: Sequence["_Answer"], after_step: Callable[[], None]) -> None:
        """Generate until every answer has ended; `after_step` runs between a token and the next forward pass."""
        pad = self.tokenizer.pad_token_id
        pad = next(iter(self._end_tokens), 0) if pad is None else pad
        width = max(len(answer.prompt) for answer in answers)
        tokens = [[pad] * (width - len(answer.prompt)) + answer.prompt for answer in answers]
        mask = [[0] * (width - len(answer.prompt)) + [1] * len(answer.prompt) for answer in answers]
        config = GenerationConfig.from_dict(self.model.generation_config.to_dict())  # keeps e.g. repetition_penalty
        config.update(
            do_sample=False,  # RowSampler draws
            temperature=None,
            top_p=None,
            top_k=None,
            num_beams=1,
            max_length=None,
            max_new_tokens=max(answer.room for answer in answers),
            eos_token_id=sorted(self._end_tokens) or None,
            pad_token_id=pad,
        )
        device = self.model.device
        generate: Any = self.model.generate
        with torch.inference_mode():
            generate(
                input_ids=torch.tensor(tokens, device=device),  # [B, S], padded on the left
                attention_mask=torch.tensor(mask, device=device),
                generation_config=config,
                logits_processor=LogitsProcessorList([RowSampler([a.request.sampling for a in answers])]),
                stopping_criteria=StoppingCriteriaList([_Watcher(answers, after_step)]),
            )


def end_tokens(generation_config: GenerationConfig | None, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids that end an answer: the generation config's and the tokenizer's end token."""
    configured = getattr(generation_config, "eos_token_id", None)
    ids = configured if isinstance(configured, list) else [configured]
    return frozenset(int(i) for i in (*ids, tokenizer.eos_token_id) if i is not None)


class _Answer:
    """One answer while it grows."""

    def __init__(
        self,
        request: Request,
        prompt: list[int],
        room: int,
        end: frozenset[int],
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        self.request, self.prompt, self.room = request, prompt, room
        self.finish_reason: FinishReason | None = None
        self._end = end
        self._detokenizer = Detokenizer(tokenizer, prompt if request.prompt is not None else ())  # type: ignore[arg-type]
        self._stops = StopFinder(request.sampling.stop)
        self._count = 0
        self._pieces: list[str] = []
        self._taken = 0

    def add(self, token: int) -> bool:
        """Take the next token; True when the answer has ended."""
        if self.finish_reason is not None:
            return True
        self._count += 1
        if token in self._end:
            self._finish("stop")
            return True
        self._pieces.append(self._stops.add(self._detokenizer.add(token)))
        if self._stops.found:
            self.finish_reason = "stop"
        elif self._count >= self.room:
            self._finish("length")
        return self.finish_reason is not None

    def _finish(self, reason: FinishReason) -> None:
        self._pieces.append(self._stops.add(self._detokenizer.finish()))
        if not self._stops.found:
            self._pieces.append(self._stops.finish())
        self.finish_reason = reason if not self._stops.found else "stop"

    def take(self) -> str:
        """The text that was not taken yet."""
        text = "".join(self._pieces[self._taken :])
        self._taken = len(self._pieces)
        return text

    def completion(self) -> Completion:
        """The finished answer."""
        assert self.finish_reason is not None, "generate returned before the answer ended"
        return Completion("".join(self._pieces), self.finish_reason, len(self.prompt), self._count)


class _Watcher(StoppingCriteria):
    """Hands each new token to its answer. `generate` calls it after a token is chosen, before the next forward pass."""

    def __init__(self, answers: Sequence[_Answer], after_step: Callable[[], None]) -> None:
        self._answers = answers
        self._after_step = after_step

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Which rows have ended: bool [B]."""
        ended = [answer.add(token) for answer, token in zip(self._answers, input_ids[:, -1].tolist(), strict=True)]
        self._after_step()
        return torch.tensor(ended, device=input_ids.device)


class _Cancelled(Exception):
    """The reader left: unwinds `generate` in the worker thread."""


class _Handover:
    """Two threads take turns: the worker computes a piece only when the reader asks for it."""

    def __init__(self) -> None:
        self._asked = threading.Semaphore(1)  # for the first piece
        self._items: queue.SimpleQueue[str | BaseException | None] = queue.SimpleQueue()
        self._cancelled = False

    def produce(self, work: Callable[[], None]) -> None:
        """Worker: run `work`, whose last word is its end or its error."""
        try:
            self._await_reader()
            work()
            self._items.put(None)
        except _Cancelled:
            self._items.put(None)
        except BaseException as error:  # it is raised in the reader's thread
            self._items.put(error)

    def give(self, text: str) -> None:
        """Worker: hand a piece over and wait until the next is asked for."""
        self._items.put(text)
        self._await_reader()

    def _await_reader(self) -> None:
        self._asked.acquire()
        if self._cancelled:
            raise _Cancelled

    def pieces(self) -> Iterator[str]:
        """Reader: the pieces, one for each token; some are empty. Raises what the worker raised."""
        while True:
            item = self._items.get()
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            yield item
            self._asked.release()

    def cancel(self) -> None:
        """Reader: no more pieces are wanted."""
        self._cancelled = True
        self._asked.release()
