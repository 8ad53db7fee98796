"""Continuous batching: answers of different length and age grow together, one token each at a time."""

# Shapes: B rows, S tokens of a prompt, T tokens of the longest row, V vocabulary.

import contextlib
import inspect
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from transformers import DynamicCache, PreTrainedModel

from mswift.errors import ConfigError
from mswift.infer.answer import Answer
from mswift.infer.batch_cache import join, keep, new_cache, pick, trim
from mswift.infer.request import TokenLogprob
from mswift.infer.rows import stream_seed
from mswift.infer.sampler import RowSampler, choose_tokens, token_logprobs
from mswift.infer.virtual import NOTHING, Front
from mswift.tuners.xlora_modules import doubled, mixer_of

PREFILL_TOKENS = 2048
"""Prompts are taken in until they have this many tokens (at least one prompt), then every answer grows by a token."""


class Scheduler:
    """Answers in a model's batch. Nothing runs by itself, but only in a `step`.

    A prompt is computed alone, so that nothing of its answer is padded by its neighbours' prompts. Answers by different
    adapters are batches of their own. `add` may be called by any thread at any time, the rest by one at a time.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        use_adapter: Callable[[str | None], None],
        max_rows: int,
        front_of: Callable[[str | None], Front] = lambda _: NOTHING,
    ) -> None:
        """front_of: what stands before a prompt with that adapter."""
        self._use_adapter, self._front_of = use_adapter, front_of
        self._max_rows = max_rows
        self._forward = _Forward(model)
        self._added: deque[tuple[list[Answer], str | None]] = deque()  # appending is atomic
        self._waiting: deque[tuple[list[Answer], str | None]] = deque()
        self._batches: dict[str | None, _Batch] = {}
        self._num_taken_in = 0

    @property
    def num_running(self) -> int:
        """Answers that grow."""
        return sum(len(batch.answers) for batch in list(self._batches.values()))

    @property
    def num_waiting(self) -> int:
        """Answers that have not begun."""
        return sum(len(answers) for answers, _ in [*list(self._added), *list(self._waiting)])

    @property
    def busy(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._added or self._waiting or self._batches)

    def add(self, answers: list[Answer], adapter: str | None) -> None:
        """Let the answers to one prompt, which they hold, begin when there is room."""
        self._added.append((answers, adapter))

    @torch.inference_mode()  # rows of caches that were made so are moved; whoever drops answers is outside of a step
    def sweep(self) -> None:
        """Forget answers that have ended, by themselves or because nobody wants them."""
        while self._added:
            self._waiting.append(self._added.popleft())
        left = (([answer for answer in answers if not answer.ended], adapter) for answers, adapter in self._waiting)
        self._waiting = deque(entry for entry in left if entry[0])
        for batch in self._batches.values():
            batch.keep([row for row, answer in enumerate(batch.answers) if not answer.ended])
        self._batches = {adapter: batch for adapter, batch in self._batches.items() if batch.answers}

    def step(self) -> None:
        """The answers to one prompt begin, with their first token, if there is room; or every running one grows by one.

        What a forward pass or a draw raises becomes the `error` of the answers in it; the others go on.
        """
        with torch.inference_mode():
            self.sweep()
            if self._waiting and self._num_taken_in < PREFILL_TOKENS and self._has_room(len(self._waiting[0][0])):
                answers, adapter = self._waiting.popleft()
                self._num_taken_in += len(answers[0].tokens)
                self._begin(answers, adapter)
            else:
                self._num_taken_in = 0
                for adapter, batch in self._batches.items():
                    with _errors_of(batch.answers):
                        self._use_adapter(adapter)
                        batch.grow()
            self.sweep()

    def _has_room(self, count: int) -> bool:
        running = self.num_running
        return running == 0 or running + count <= self._max_rows

    def _begin(self, answers: list[Answer], adapter: str | None) -> None:
        with _errors_of(answers):
            self._use_adapter(adapter)
            batch = _Batch(self._forward, answers, self._front_of(adapter))
        if (running := [row for row, answer in enumerate(answers) if not answer.ended]) == []:
            return
        batch.keep(running)
        others = self._batches.setdefault(adapter, batch)
        if others is not batch:
            with _errors_of([*others.answers, *batch.answers]):  # half joined, neither can go on
                others.append(batch)


@contextlib.contextmanager
def _errors_of(answers: Sequence[Answer]) -> Iterator[None]:
    """What is raised inside ends these answers; what stops the program goes on."""
    answers = list(answers)
    try:
        yield
    except BaseException as error:
        for answer in answers:
            answer.error = error
        if not isinstance(error, Exception):
            raise


class _Forward:
    """The model's forward pass, told only what it takes."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        base: Any = getattr(model, "get_base_model", lambda: model)()  # PEFT's wrapper takes anything
        self._takes = frozenset(inspect.signature(base.forward).parameters)
        self._cache_name = "past_key_values" if "past_key_values" in self._takes else "cache_params"
        if self._cache_name not in self._takes:
            raise ConfigError(f"--model of type {model.config.model_type}: it takes no cache; try --infer_backend vllm")
        self._base = base

    def new_cache(self) -> DynamicCache:
        """An empty cache, with a half for the first pass of X-LoRA where it is in use."""
        cache, mixer = new_cache(self._base), mixer_of(self._base)
        if mixer is None or mixer.disabled:
            return cache
        return doubled(cache, new_cache(self._base))

    def __call__(self, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, cache: Any) -> torch.Tensor:
        """Logits [B, V] float32 behind the last tokens; ids and positions [B, S], mask [B, T + S]."""
        given = {"position_ids": positions, "logits_to_keep": 1, self._cache_name: cache}
        output = self._model(
            input_ids=ids,
            attention_mask=mask,
            use_cache=True,
            **{name: value for name, value in given.items() if name in self._takes},
        )
        logits: torch.Tensor = output.logits[:, -1].float()
        return logits

    @property
    def device(self) -> torch.device:
        """Where the ids are to be."""
        return torch.device(self._base.device)


class _Batch:
    """Answers that grow in one forward pass; the prompt of the first ones is computed when it is made."""

    def __init__(self, forward: _Forward, answers: list[Answer], front: Front) -> None:
        self.answers = answers
        self._forward = forward
        self._cache = forward.new_cache()
        ids = torch.tensor([[*front.ids, *answers[0].tokens]], device=forward.device)  # [1, S]
        front.fill(self._cache, 1)
        self._mask = torch.cat([front.mask(1, forward.device), torch.ones_like(ids)], dim=1)
        positions = torch.arange(self._mask.shape[1], device=forward.device)[None, -ids.shape[1] :]
        logits = forward(ids, self._mask, positions, self._cache)
        self._samplers = [RowSampler(a.sampling, own_seed(a.sampling.seed, a.index)) for a in answers]
        if len(answers) > 1:
            rows = torch.zeros(len(answers), dtype=torch.long, device=forward.device)
            pick(self._cache, rows)
            self._mask, logits = self._mask[rows], logits[rows]
        self._add(logits)

    def grow(self) -> None:
        """One more token of each answer."""
        ids = torch.tensor([[answer.tokens[-1]] for answer in self.answers], device=self._forward.device)  # [B, 1]
        self._mask = F.pad(self._mask, (0, 1), value=1)  # [B, T + 1]
        self._add(self._forward(ids, self._mask, self._mask.sum(-1, keepdim=True) - 1, self._cache))

    def _add(self, logits: torch.Tensor) -> None:
        tokens = choose_tokens(self._samplers, [answer.tokens for answer in self.answers], logits)
        asked = [row for row, answer in enumerate(self.answers) if answer.sampling.logprobs is not None]
        logprobs: dict[int, TokenLogprob] = {}
        if asked:
            most = max(self.answers[row].sampling.logprobs or 0 for row in asked)
            found = token_logprobs([tokens[row] for row in asked], logits[asked], most)
            for row, entry in zip(asked, found, strict=True):
                logprobs[row] = replace(entry, top=entry.top[: self.answers[row].sampling.logprobs])
        for row, (answer, token) in enumerate(zip(self.answers, tokens, strict=True)):
            answer.add(token, logprobs.get(row))

    def append(self, other: "_Batch") -> None:
        """Take in the answers of another batch."""
        length, other_length = self._mask.shape[-1], other._mask.shape[-1]
        join(self._cache, other._cache, length, other_length)
        longest = max(length, other_length)
        self._mask = torch.cat([F.pad(mask, (longest - mask.shape[-1], 0)) for mask in (self._mask, other._mask)])
        self.answers += other.answers
        self._samplers += other._samplers

    def keep(self, rows: list[int]) -> None:
        """Go on with these rows only."""
        if len(rows) == len(self.answers):
            return
        if rows:
            rows = keep(self._cache, rows, self._forward.device)
        self.answers = [self.answers[row] for row in rows]
        self._samplers = [self._samplers[row] for row in rows]
        if not rows:
            return
        self._mask = self._mask[torch.tensor(rows, device=self._forward.device)]
        length = int(self._mask.sum(-1).max())
        if length < self._mask.shape[-1]:
            self._mask = self._mask[:, -length:]
            trim(self._cache, length)


def own_seed(seed: int, index: int) -> int:
    """Seed of the index-th answer to a request: the request's own for the first, then streams apart from it."""
    return stream_seed(seed, index) if index else seed
