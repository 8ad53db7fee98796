"""What every generation engine takes and gives: requests, pieces of text, completions, scores. Torch-free."""

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from mswift.errors import ConfigError

Message = Mapping[str, Any]
FinishReason = Literal["stop", "length"]
BASE_MODEL = ""
"""As `Request.adapter`: the model without any adapter."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen, when an answer ends, and what is told of it."""

    max_new_tokens: int = 512
    temperature: float = 0.0
    """0 is greedy: the likeliest token."""
    top_p: float = 1.0
    top_k: int = 0
    """0 keeps every token."""
    min_p: float = 0.0
    """Keeps tokens at least this likely, as a share of the likeliest one's probability; 0 keeps every token."""
    repetition_penalty: float = 1.0
    """Divides (positive) or multiplies (negative) the logits of tokens of the prompt and the answer; 1 changes none."""
    seed: int = 0
    stop: tuple[str, ...] = ()
    """Texts that end the answer and are not part of it."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end the answer besides the model's own."""
    ignore_eos: bool = False
    """Go on to max_new_tokens whatever the model says (to measure speed)."""
    n: int = 1
    """Answers to the same question, each from its own random stream."""
    logprobs: int | None = None
    """Log-probabilities of the tokens, with this many of the likeliest ones beside each; None tells none.

    They are the model's own: before temperature, penalties and the choice of top_k, top_p and min_p.
    """

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ConfigError(f"--max_new_tokens {self.max_new_tokens}: at least 1 token; try 512")
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError(f"--temperature {self.temperature}: at least 0 (0 is greedy); try 0.7")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"--top_p {self.top_p}: above 0 and at most 1; try 0.9")
        if self.top_k < 0:
            raise ConfigError(f"--top_k {self.top_k}: at least 0 (0 keeps every token); try 20")
        if not 0 <= self.min_p <= 1:
            raise ConfigError(f"--min_p {self.min_p}: from 0 (keeps every token) to 1; try 0.05")
        if not 0 < self.repetition_penalty < float("inf"):
            raise ConfigError(f"--repetition_penalty {self.repetition_penalty}: above 0 (1 changes nothing); try 1.05")
        if "" in self.stop:
            raise ConfigError('--stop "": an empty text would end every answer at once; leave it out')
        if self.n < 1:
            raise ConfigError(f"n {self.n}: at least 1 answer")
        if self.logprobs is not None and self.logprobs < 0:
            raise ConfigError(f"logprobs {self.logprobs}: at least 0 (only those of the answer's own tokens)")


@dataclass(frozen=True)
class Request:
    """One thing to answer: a conversation, text to continue, or tokens to continue; exactly one of them."""

    messages: tuple[Message, ...] | None = None
    prompt: str | None = None
    prompt_ids: tuple[int, ...] | None = None
    tools: tuple[dict[str, Any], ...] | None = None
    """Function descriptions for the chat template."""
    opening: str = ""
    """With messages: what the answer, of which it is no part, goes on from (an agent template's call and result)."""
    shown: tuple[str, ...] = ()
    """Control tokens that stay in the text of the answer: an agent template's, which tell of calls."""
    adapter: str | None = None
    """Name of a LoRA of the engine, or BASE_MODEL. None: the engine's only one, or the model where it has none."""
    sampling: Sampling = field(default_factory=Sampling)

    def __post_init__(self) -> None:
        if [self.messages, self.prompt, self.prompt_ids].count(None) != 2:
            raise ConfigError("a request has messages, a prompt or prompt_ids, exactly one of them")


@dataclass(frozen=True)
class TokenLogprob:
    """A token, its log-probability, and the likeliest tokens of its place as (id, log-probability), likeliest first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Completion:
    """An answer: `stop` is an end token or a stop text, `length` the limit of new tokens or of the model."""

    text: str
    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    token_ids: tuple[int, ...] = ()
    """All that were generated, an end token and the tokens of a stop text among them."""
    logprobs: tuple[TokenLogprob, ...] | None = None
    """One for each of token_ids, where the request asked for them."""
    index: int = 0
    """Which of the n answers to its request it is."""


@dataclass(frozen=True)
class Piece:
    """Text to show now; the last piece of an answer carries its completion."""

    text: str
    completion: Completion | None = None
    index: int = 0
    """Which of the n answers to the request it belongs to."""
    logprobs: tuple[TokenLogprob, ...] = ()
    """Of the tokens since the last piece, where the request asked for them."""


@dataclass(frozen=True)
class Score:
    """How likely a continuation is behind its prompt, token by token; `top` of each token holds the likeliest one."""

    tokens: tuple[TokenLogprob, ...]

    @property
    def logprob(self) -> float:
        """Of the whole continuation."""
        return sum(token.logprob for token in self.tokens)

    @property
    def is_greedy(self) -> bool:
        """Whether greedy decoding would have written the continuation."""
        return all(token.top[0][0] == token.token for token in self.tokens)


TokenPair = tuple[Sequence[int], Sequence[int]]
"""Ids of a prompt and of its continuation, neither empty."""


class Engine(Protocol):
    """A generation backend."""

    @property
    def tokenizer(self) -> Any:
        """The Hugging Face tokenizer of the model, with the chat template in use."""

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names that `Request.adapter` may take."""

    @property
    def score_beyond(self) -> int:
        """Tokens beyond the model's longest input that a prompt and its continuation may have together in `score`."""

    def prompt_tokens(self, request: Request) -> list[int]:
        """Token ids that the model is given for a request."""

    def stream(self, request: Request) -> Generator[Piece, None, None]:
        """Answer piece by piece; closing it stops the work."""

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """Answer a batch, in the order of the requests, the n answers of one together.

        An answer does not depend on its neighbours.
        """

    def score(self, pairs: Sequence[TokenPair], adapter: str | None = None) -> list[Score]:
        """Log-probabilities of continuations, teacher-forced, in the order of the pairs."""

    def close(self) -> None:
        """Give back memory and processes; the engine answers no more."""


def choose_adapter(name: str | None, adapters: Sequence[str]) -> str | None:
    """The adapter that `Request.adapter` means among an engine's; None is the model itself. Raises ConfigError."""
    if name == BASE_MODEL or (name is None and not adapters):
        return None
    if name is None:
        if len(adapters) == 1:
            return adapters[0]
        raise ConfigError(f"the engine has the adapters {', '.join(adapters)}: name one of them in the request")
    if name not in adapters:
        known = f"it has {', '.join(adapters)}" if adapters else "it has none"
        raise ConfigError(f"the engine has no adapter {name!r}; {known}")
    return name
