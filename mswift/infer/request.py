"""What every generation engine takes and gives: requests, pieces of text, completions. Torch-free."""

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from mswift.errors import ConfigError

Message = Mapping[str, Any]
FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen and when an answer ends."""

    max_new_tokens: int = 512
    temperature: float = 0.0
    """0 is greedy: the likeliest token."""
    top_p: float = 1.0
    top_k: int = 0
    """0 keeps every token."""
    seed: int = 0
    stop: tuple[str, ...] = ()
    """Texts that end the answer and are not part of it."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ConfigError(f"--max_new_tokens {self.max_new_tokens}: at least 1 token; try 512")
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError(f"--temperature {self.temperature}: at least 0 (0 is greedy); try 0.7")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"--top_p {self.top_p}: above 0 and at most 1; try 0.9")
        if self.top_k < 0:
            raise ConfigError(f"--top_k {self.top_k}: at least 0 (0 keeps every token); try 20")
        if "" in self.stop:
            raise ConfigError('--stop "": an empty text would end every answer at once; leave it out')


@dataclass(frozen=True)
class Request:
    """One thing to answer: a conversation (`messages`), or text to continue (`prompt`); exactly one of them."""

    messages: tuple[Message, ...] | None = None
    prompt: str | None = None
    tools: tuple[dict[str, Any], ...] | None = None
    """Function descriptions for the chat template."""
    opening: str = ""
    """With messages: what the answer, of which it is no part, goes on from (an agent template's call and result)."""
    sampling: Sampling = field(default_factory=Sampling)

    def __post_init__(self) -> None:
        if (self.messages is None) == (self.prompt is None):
            raise ConfigError("a request has either messages or a prompt, exactly one of them")


@dataclass(frozen=True)
class Completion:
    """An answer: `stop` is an end token or a stop text, `length` the limit of new tokens or of the model."""

    text: str
    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class Piece:
    """Text to show now; the last piece of an answer carries its completion."""

    text: str
    completion: Completion | None = None


class Engine(Protocol):
    """A generation backend."""

    def stream(self, request: Request) -> Generator[Piece, None, None]:
        """Answer piece by piece: each is handed over before the next token is computed; closing it stops the work."""

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """Answer a batch, in the order of the requests; an answer does not depend on its neighbours."""
