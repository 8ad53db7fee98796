"""The native backend: local files, any engine or server, offline. Torch-free."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from mswift.eval.catalog import Chosen
from mswift.eval.model import EvalModel
from mswift.eval.results import TaskResult, file_sha256, prompt_sha256
from mswift.eval.task import Choices, Settings, Values, likelihood_scores
from mswift.infer.request import Request
from mswift.infer.rows import stream_seed

Advance = Callable[[int], None]


def check(chosen: Sequence[Chosen], settings: Settings) -> None:
    """Refuse, before a model is loaded, what cannot be scored here. Raises ConfigError and DataError."""
    for one in chosen:
        one.task.check(settings)
        one.task.check_docs(one.docs)
        for doc in one.docs:
            one.examples_for(doc)


def evaluate(chosen: Chosen, model: EvalModel, settings: Settings, advance: Advance) -> TaskResult:
    """Ask every row, score every answer."""
    task = chosen.task
    asked = [task.ask(doc, chosen.examples_for(doc), settings) for doc in chosen.docs]
    choices = [one for one in asked if isinstance(one, Choices)]
    requests = [one for one in asked if isinstance(one, Request)]
    if choices:
        prompts, said, values, num_cut = _choose(chosen, choices, model, settings, advance)
    else:
        prompts, said, values, num_cut = _generate(chosen, requests, model, settings, advance)
    hashes = [prompt_sha256(prompt) for prompt in prompts]
    samples = [
        {"id": _id(doc, index), "prompt_sha256": hashed, **told, "values": value}
        for index, (doc, hashed, told, value) in enumerate(zip(chosen.docs, hashes, said, values, strict=True))
    ]
    return TaskResult(
        name=task.name,
        file=str(chosen.file),
        file_sha256=file_sha256(chosen.file),
        num_fewshot=chosen.num_fewshot,
        prompts_sha256=prompt_sha256(hashes),
        num_cut=num_cut,
        metrics=task.metrics(settings),
        samples=samples,
    )


_Outcome = tuple[list[Any], list[dict[str, Any]], list[Values], int]
"""What was asked, what the model said to it, values, and how many prompts were cut."""


def _choose(
    chosen: Chosen, choices: Sequence[Choices], model: EvalModel, settings: Settings, advance: Advance
) -> _Outcome:
    contexts = [c.context if isinstance(c.context, str) else model.render(c.context) for c in choices]
    pairs = [(text, rest) for text, one in zip(contexts, choices, strict=True) for rest in one.continuations]
    scores = iter(model.score(pairs, advance))
    said, values, num_cut = [], [], 0
    for one in choices:
        own = [next(scores) for _ in one.continuations]
        likelihoods = [score.log_probability for score in own]
        said.append({"log_probabilities": likelihoods, "gold": one.gold})
        values.append(likelihood_scores(chosen.task, one, likelihoods, settings))
        num_cut += any(score.cut for score in own)
    return [[one.context, one.continuations] for one in choices], said, values, num_cut


def _generate(
    chosen: Chosen, requests: Sequence[Request], model: EvalModel, settings: Settings, advance: Advance
) -> _Outcome:
    seeded = [
        replace(request, sampling=replace(request.sampling, seed=stream_seed(request.sampling.seed, index)))
        for index, request in enumerate(requests)
    ]
    answers, cut = model.generate(seeded, advance)
    texts = [[completion.text for completion in given] for given in answers]
    assert chosen.task.score is not None, f"{chosen.task.name} generates, and scores no answers"
    values = chosen.task.score(chosen.docs, texts, settings)
    said = [
        {"answers": given, "finish_reasons": [completion.finish_reason for completion in own]}
        for given, own in zip(texts, answers, strict=True)
    ]
    prompts = [[request.prompt, request.messages, request.tools, request.opening] for request in requests]
    return prompts, said, values, sum(cut)


def num_questions(chosen: Sequence[Chosen], settings: Settings) -> int:
    """What `advance` is told in all: a choice or a prompt each."""
    total = 0
    for one in chosen:
        for doc in one.docs:
            asked = one.task.ask(doc, one.examples_for(doc), settings)
            total += len(asked.continuations) if isinstance(asked, Choices) else 1
    return total


def _id(doc: dict[str, Any], index: int) -> str:
    """The row's own name where it has one."""
    return str(next((doc[name] for name in ("id", "task_id", "key", "where") if name in doc), index))
