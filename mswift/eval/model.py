"""Tasks ask in text; engines take tokens. Prompts are encoded and cut as lm-evaluation-harness does. Torch-free."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mswift.errors import ConfigError
from mswift.infer.prompts import prompt_tokens
from mswift.infer.request import Completion, Engine, Request

SCORES_AT_ONCE = 256


@dataclass(frozen=True)
class Likelihood:
    """Of a continuation: natural logarithm, whether greedy decoding writes it, and whether its context was cut."""

    log_probability: float
    is_greedy: bool
    cut: bool


class EvalModel:
    """An engine (or a server) with what encodes for it."""

    def __init__(self, engine: Engine, max_length: int | None, batch_size: int) -> None:
        """max_length: tokens that the model takes."""
        self.engine = engine
        self.max_length = max_length
        self._score_length = None if max_length is None else max_length + engine.score_beyond
        self._batch_size = batch_size

    @property
    def tokenizer(self) -> Any:
        """The tokenizer. ConfigError where a server's is not known."""
        if self.engine.tokenizer is None:
            raise ConfigError(
                "likelihoods over --eval_url need the tokenizer that the server has: give --model DIR as well (its "
                "tokenizer is read, not its weights)"
            )
        return self.engine.tokenizer

    def render(self, messages: Sequence[dict[str, Any]]) -> str:
        """A conversation by the chat template, up to where the answer begins."""
        if not getattr(self.tokenizer, "chat_template", None):
            raise ConfigError("--use_chat_template: the tokenizer of --model has no chat template; leave it out")
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    def score(self, pairs: Sequence[tuple[str, str]], advance: Callable[[int], None]) -> list[Likelihood]:
        """Likelihood of each continuation behind its context; contexts that are too long lose their beginning."""
        encoded, cut = [], []
        for context, continuation in pairs:
            prompt, rest = encode_pair(self.tokenizer, context, continuation)
            room = None if self._score_length is None else self._score_length - len(rest)
            if room is not None and room < 1:
                raise ConfigError(
                    f"a choice of {len(rest)} tokens is longer than the model's {self.max_length}: {continuation!r:.60}"
                )
            cut.append(room is not None and len(prompt) > room)
            encoded.append((prompt[-room:] if room is not None else prompt, rest))
        found: list[Likelihood] = []
        for start in range(0, len(encoded), SCORES_AT_ONCE):
            scores = self.engine.score(encoded[start : start + SCORES_AT_ONCE])
            for score in scores:
                found.append(Likelihood(score.logprob, score.is_greedy, cut[len(found)]))
            advance(len(scores))
        return found

    def generate(
        self, requests: Sequence[Request], advance: Callable[[int], None]
    ) -> tuple[list[list[Completion]], list[bool]]:
        """The n answers to each request, and whether its prompt was cut to leave room for them."""
        ready, cut = [], []
        self._check_conversations(requests)
        for request in requests:
            shorter, is_cut = self._fit(request)
            ready.append(shorter)
            cut.append(is_cut)
        answers: list[list[Completion]] = []
        for start in range(0, len(ready), self._batch_size):
            part = ready[start : start + self._batch_size]
            left = iter(self.engine.generate(part))
            answers += [[next(left) for _ in range(request.sampling.n)] for request in part]
            advance(len(part))
        return answers, cut

    def _check_conversations(self, requests: Sequence[Request]) -> None:
        """ConfigError where conversations, which cannot be cut, leave no room for their answers."""
        if self.max_length is None or self.engine.tokenizer is None:
            return
        asked = [request for request in requests if request.messages is not None]
        lengths = [len(prompt_tokens(self.tokenizer, one)) + one.sampling.max_new_tokens for one in asked]
        if too_long := [length for length in lengths if length > self.max_length]:
            raise ConfigError(
                f"{len(too_long)} of {len(lengths)} conversations leave no room for --max_new_tokens "
                f"{asked[0].sampling.max_new_tokens}: with it the longest has {max(too_long)} tokens, the model "
                f"{self.max_length}; lower it, or take a model (or --rope_scaling) that reads more"
            )

    def _fit(self, request: Request) -> tuple[Request, bool]:
        """Text as tokens, without the beginning for which there is no room; a conversation as it is."""
        if request.prompt is None or self.engine.tokenizer is None:
            return request, False
        tokens = encode(self.tokenizer, request.prompt)
        if self.max_length is None:
            return replace(request, prompt=None, prompt_ids=tuple(tokens)), False
        room = self.max_length - request.sampling.max_new_tokens
        if room < 1:
            raise ConfigError(
                f"--max_new_tokens {request.sampling.max_new_tokens}: the model's {self.max_length} tokens leave no "
                f"room for a prompt; try {self.max_length // 4}"
            )
        return replace(request, prompt=None, prompt_ids=tuple(tokens[-room:])), len(tokens) > room


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids with the tokenizer's own special tokens, unless the text begins with its start token."""
    start = getattr(tokenizer, "bos_token", None)
    if start and text.startswith(start):
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    return list(tokenizer(text)["input_ids"])


def encode_pair(tokenizer: Any, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Ids of a context and its continuation, encoded together; white space that ends the context goes to the latter.

    Nothing before: the tokenizer's start token, or its end token, stands there.
    """
    words = context.rstrip()
    continuation, context = context[len(words) :] + continuation, words
    if not context:
        first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        tokens = list(tokenizer(continuation, add_special_tokens=False)["input_ids"])
        return ([first], tokens) if tokens[0] != first else (tokens[:1], tokens[1:])
    before, whole = encode(tokenizer, context), encode(tokenizer, context + continuation)
    return before, whole[len(before) :]
