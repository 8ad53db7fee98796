"""Scores of sampled answers: by the label, by a function of the user's, by a model that judges. Torch-free."""

import hashlib
import importlib.util
import json
import math
import os
import re
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mswift.agent.format import split_thinking
from mswift.config.sample import SampleConfig
from mswift.errors import ConfigError, DataError, MswiftError
from mswift.infer.direct import urlopen

Reward = Callable[[str, Sequence[str], str | None], list[float]]
"""(question, answers, label) -> a score for each answer."""

JUDGE_KEY = "MSWIFT_JUDGE_API_KEY"
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
_FIELD = re.compile(r"\{(prompt|label|completion)\}")
_JUDGE_SECONDS = 600


def find_reward(config: SampleConfig) -> Reward:
    """What --reward names. Raises ConfigError."""
    kind = config.reward
    if kind != "judge" and config.judge_url is not None:
        raise ConfigError(f"--judge_url is for --reward judge, and --reward is {kind}")
    if kind == "exact_match":
        return lambda _, answers, label: [float(answer.strip() == _needed(label).strip()) for answer in answers]
    if kind.startswith("regex:"):
        return _by_pattern(kind.removeprefix("regex:"))
    if kind.endswith(".py"):
        return _by_function(Path(kind))
    if kind == "judge":
        if config.judge_url is None or config.judge_model is None:
            raise ConfigError("--reward judge needs --judge_url and --judge_model")
        return _by_judge(config.judge_url, config.judge_model, config.judge_prompt)
    raise ConfigError(f"--reward {kind}: exact_match, regex:PATTERN, judge, or a file that ends with .py")


def reward_identity(config: SampleConfig) -> str:
    """What tells this reward from others: its name; of a file its content, of a judge the model and what it is asked.

    Not the judge's address, which may change, nor modules that the file imports.
    """
    if config.reward.endswith(".py"):
        return f"{config.reward} {hashlib.sha256(Path(config.reward).read_bytes()).hexdigest()}"
    return f"judge {config.judge_model} {config.judge_prompt}" if config.reward == "judge" else config.reward


def _needed(label: str | None) -> str:
    if label is None:
        raise DataError("a row without an answer of the assistant has no label to compare with; use --reward FILE.py")
    return label


def _by_pattern(pattern: str) -> Reward:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"--reward regex:{pattern}: {error}") from None

    def found(answer: str) -> str | None:
        matches = list(compiled.finditer(answer))
        return matches[-1][1 if compiled.groups else 0] if matches else None

    def score(_: str, answers: Sequence[str], label: str | None) -> list[float]:
        wanted = _needed(label).strip()
        return [float((text := found(answer)) is not None and text.strip() == wanted) for answer in answers]

    return score


def _by_function(path: Path) -> Reward:
    if not path.is_file():
        raise ConfigError(f"--reward {path}: no such file")
    spec = importlib.util.spec_from_file_location("mswift_reward", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    function = getattr(module, "reward", None)
    if not callable(function):
        raise ConfigError(f"--reward {path}: it has no function reward(prompts, completions, label)")

    def score(question: str, answers: Sequence[str], label: str | None) -> list[float]:
        size = len(answers)
        scores = [float(one) for one in function([question] * size, list(answers), [label] * size)]
        if len(scores) != size:
            raise DataError(f"--reward {path}: {len(scores)} scores for {size} answers; return one for each")
        if any(map(math.isnan, scores)):
            raise DataError(f"--reward {path}: a score is nan, which is neither better nor worse; return a number")
        return scores

    return score


def _by_judge(url: str, model: str, prompt: str) -> Reward:
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get(JUDGE_KEY):
        headers["Authorization"] = f"Bearer {key}"

    def ask(text: str) -> float:
        body = {"model": model, "temperature": 0, "messages": [{"role": "user", "content": text}]}
        address = f"{url.rstrip('/')}/chat/completions"
        request = urllib.request.Request(address, json.dumps(body).encode(), headers)
        try:
            with urlopen(request, timeout=_JUDGE_SECONDS) as answer:
                content: Any = json.loads(answer.read())["choices"][0]["message"]["content"]
        except urllib.error.HTTPError as error:
            raise MswiftError(f"--judge_url {url}: status {error.code}: {error.read().decode()[:300]}") from None
        except OSError as error:
            raise MswiftError(f"--judge_url {url}: {error}") from None
        words = split_thinking(str(content))[1]
        number = _NUMBER.search(words)
        if number is None:
            raise MswiftError(f"--judge_url {url}: no number in its reply {(words or str(content))[:100]!r}")
        return float(number[0])

    def score(question: str, answers: Sequence[str], label: str | None) -> list[float]:
        return [ask(_filled(prompt, prompt=question, label=label or "", completion=answer)) for answer in answers]

    return score


def _filled(template: str, **fields: str) -> str:
    """The template with its fields, which may themselves hold such a name in braces."""
    return _FIELD.sub(lambda found: fields[found[1]], template)
