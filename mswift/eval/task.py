"""What a task is: how rows are read, what each asks, and what an answer is worth. Torch-free."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mswift.eval.answers import choice_scores
from mswift.eval.documents import Doc
from mswift.eval.sandbox import Mode
from mswift.eval.statistics import Metric, Value
from mswift.infer.request import Request, Sampling

Values = dict[str, Value]


@dataclass(frozen=True)
class Settings:
    """What the user chose for all tasks."""

    use_chat_template: bool = False
    sampling: Sampling | None = None
    """Over the task's own: temperature, top_p, top_k, n."""
    max_new_tokens: int | None = None
    sandbox: Mode = "strict"
    pass_k: tuple[int, ...] = (1,)
    agent_template: str | None = None


@dataclass(frozen=True)
class Choices:
    """Which of the continuations is likeliest behind the context (text, or a conversation for the chat template)."""

    context: str | tuple[dict[str, Any], ...]
    continuations: tuple[str, ...]
    gold: int


@dataclass(frozen=True)
class Task:
    """One kind of file. `metrics` is a function where they depend on the settings."""

    name: str
    summary: str
    read: Callable[[Path], list[Doc]]
    metrics: Callable[[Settings], tuple[Metric, ...]]
    ask: Callable[[Doc, Sequence[Doc], Settings], Choices | Request]
    score: Callable[[Sequence[Doc], Sequence[Sequence[str]], Settings], list[Values]] | None = None
    """Of all answers (n to each row); None: by likelihood."""
    num_fewshot: int = 0
    check: Callable[[Settings], None] = lambda settings: None
    """Refuses, before a model is loaded, what cannot be scored here."""
    check_docs: Callable[[Sequence[Doc]], None] = lambda docs: None
    """The same, by what the rows need."""
    example_of: Callable[[Doc], Any] = lambda doc: None
    """Rows take examples with the same value."""
    read_examples: Callable[[Path], list[Doc]] | None = None
    """How the file of examples is read, where that differs."""
    wants_chat: bool = False
    """It asks in conversations, whatever --use_chat_template says."""


def user(content: str) -> tuple[dict[str, Any], ...]:
    """A conversation of one question."""
    return ({"role": "user", "content": content},)


def sampled(own: Sampling, settings: Settings) -> Sampling:
    """The task's stops and length with the user's temperature, seed and number of answers."""
    chosen = settings.sampling or Sampling()
    length = settings.max_new_tokens or own.max_new_tokens
    return replace(chosen, stop=(*own.stop, *chosen.stop), max_new_tokens=length)


def likelihood_scores(task: Task, asked: Choices, log_probabilities: Sequence[float], settings: Settings) -> Values:
    """Values of a multiple choice."""
    bare = [text.removeprefix(" ") for text in asked.continuations]
    scores = choice_scores(log_probabilities, bare, asked.gold)
    return {metric.name: scores[metric.name] for metric in task.metrics(settings)}
