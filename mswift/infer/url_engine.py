"""A server that speaks OpenAI's protocol, as an engine: vLLM's, SGLang's, LMDeploy's, mswift deploy. Torch-free."""

import contextlib
import http.client
import json
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, cast

from mswift.errors import ConfigError
from mswift.infer.direct import urlopen
from mswift.infer.prompts import prompt_tokens
from mswift.infer.request import (
    Completion,
    FinishReason,
    Piece,
    Request,
    Sampling,
    Score,
    TokenLogprob,
    TokenPair,
    choose_adapter,
)
from mswift.infer.rows import stream_seed

KEY = "OPENAI_API_KEY"
_SECONDS = 600
_BROKEN = (OSError, ValueError, http.client.HTTPException)
"""What is raised where a server does not answer, breaks off, or speaks something else."""
_DEFAULTS = Sampling()


@dataclass(frozen=True)
class Dialect:
    """In what servers differ."""

    name: str = "this server"
    token_prompts: bool = True
    """/v1/completions takes token ids."""
    own_tokens: bool = False
    """Text and conversations are sent as tokens, made here as for every other engine."""
    scores: bool = True
    """/v1/completions echoes log-probabilities of a prompt."""
    score_requests: int | None = None
    """Scores at once; None: as many as other requests."""
    n_apart: bool = False
    """Several answers to a question are asked for one by one, each with its own seed."""
    all_tokens: int | None = None
    """top_k that keeps every token. None: fields that change nothing are left out, and the server has its defaults."""
    adapter: str = "{adapter}"
    """What `model` is for an adapter; {model} stands for the model's own name."""


class UrlEngine:
    """Answers and scores by /v1/chat/completions and /v1/completions, `num_requests` at once."""

    adapters: tuple[str, ...] = ()
    score_beyond = -1
    """All tokens are input, and one is written behind them."""

    def __init__(
        self,
        url: str,
        model: str | None,
        tokenizer: Any,
        num_requests: int,
        *,
        key: str | None = None,
        flag: str = "--eval_url",
        dialect: Dialect | None = None,
    ) -> None:
        """`url` ends with /v1; model: a name there, None for its only one; key: None reads OPENAI_API_KEY; flag: where
        the address comes from, for errors. Raises ConfigError.
        """
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"{flag} {url}: an address such as http://127.0.0.1:8000/v1")
        self.url = url.rstrip("/").removesuffix("/chat/completions").removesuffix("/completions")
        self.tokenizer = tokenizer
        self._num_requests = num_requests
        self._key = key if key is not None else os.environ.get(KEY)
        self._flag = flag
        self._dialect = dialect or Dialect()
        self.model = model or self._only_model()

    def prompt_tokens(self, request: Request) -> list[int]:
        """By the tokenizer that is known here. NotImplementedError without one: a server tells no tokens."""
        if self.tokenizer is None:
            raise NotImplementedError("a server tells no tokens of a request")
        return prompt_tokens(self.tokenizer, request)

    def stream(self, request: Request) -> Generator[Piece, None, None]:
        """Answer piece by piece, several answers one after the other; closing it hangs up, and the server stops."""
        for index, one in enumerate(_apart(request)):
            yield from self._stream(one, index)

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """Answer the requests, in their order, the n answers of one together."""
        if not self._dialect.n_apart:
            return [completion for answers in self._all(self._answer, requests) for completion in answers]
        ones = [(index, one) for request in requests for index, one in enumerate(_apart(request))]
        answers = self._all(lambda entry: self._answer(entry[1])[0], ones)
        return [replace(answer, index=index) for (index, _), answer in zip(ones, answers, strict=True)]

    def score(self, pairs: Sequence[TokenPair], adapter: str | None = None) -> list[Score]:
        """Log-probabilities of continuations: the server is asked to echo the prompt with them."""
        if not self._dialect.scores:
            raise ConfigError(
                f"{self._dialect.name} echoes no log-probabilities of prompts, so it cannot score choices"
            )
        model = self._name(adapter)
        return self._all(lambda pair: self._score(pair, model), pairs, self._dialect.score_requests)

    def close(self) -> None:
        """Nothing is held."""

    def _all(self, work: Callable[[Any], Any], items: Sequence[Any], num_requests: int | None = None) -> list[Any]:
        with ThreadPoolExecutor(num_requests or self._num_requests) as pool:
            return list(pool.map(work, items))

    def _name(self, adapter: str | None) -> str:
        """`model` of a request."""
        chosen = choose_adapter(adapter, self.adapters)
        return self.model if chosen is None else self._dialect.adapter.format(model=self.model, adapter=chosen)

    def _body(self, request: Request) -> tuple[str, dict[str, Any]]:
        """Route and body. Raises ConfigError and DataError."""
        sampling = request.sampling
        if sampling.logprobs is not None:
            raise ConfigError("answers over a server come without log-probabilities")
        body: dict[str, Any] = {"model": self._name(request.adapter), "max_tokens": sampling.max_new_tokens}
        body |= {"temperature": sampling.temperature, "top_p": sampling.top_p, "seed": sampling.seed % 2**31}
        body |= self._further(sampling)
        if request.shown and self._dialect.own_tokens:  # these servers show all control tokens or none
            body["skip_special_tokens"] = False
        if self._dialect.own_tokens or request.messages is None or (request.opening and self.tokenizer is not None):
            body["prompt"] = self._prompt(request)
            return "completions", body
        body["messages"] = [dict(message) for message in request.messages]
        if request.opening:
            body["messages"].append({"role": "assistant", "content": request.opening})
            body |= {"continue_final_message": True, "add_generation_prompt": False}
        if request.tools:
            body["tools"] = list(request.tools)
        return "chat/completions", body

    def _further(self, sampling: Sampling) -> dict[str, Any]:
        """Fields that are not OpenAI's, or not always there."""
        told = self._dialect.all_tokens
        fields = {name: value for name in ("top_k", "min_p", "repetition_penalty")
                  if (value := getattr(sampling, name)) != getattr(_DEFAULTS, name) or told is not None}  # fmt: skip
        if fields.get("top_k") == 0 and told is not None:
            fields["top_k"] = told
        fields |= {"n": sampling.n} if not self._dialect.n_apart else {}
        fields |= {"stop": list(sampling.stop)} if sampling.stop else {}
        fields |= {"stop_token_ids": list(sampling.stop_token_ids)} if sampling.stop_token_ids else {}
        fields |= {"ignore_eos": True} if sampling.ignore_eos else {}
        return fields

    def _prompt(self, request: Request) -> str | list[int]:
        if request.prompt is not None and not self._dialect.own_tokens:
            return request.prompt
        if not self._dialect.token_prompts:
            raise ConfigError(
                f"{self._dialect.name} takes text and conversations, not tokens: leave out --agent_template, or take "
                "another --infer_backend"
            )
        return prompt_tokens(self.tokenizer, request)

    def _answer(self, request: Request) -> list[Completion]:
        route, body = self._body(request)
        answer = self._call(route, body)
        usage = answer.get("usage") or {}
        counts = int(usage.get("prompt_tokens", 0)), int(usage.get("completion_tokens", 0))
        found = []
        for choice in sorted(answer["choices"], key=lambda choice: int(choice["index"])):
            text = choice["message"].get("content") if "message" in choice else choice["text"]
            found.append(Completion(text or "", _reason(choice), *counts, index=int(choice["index"])))
        wanted = 1 if self._dialect.n_apart else request.sampling.n
        if len(found) != wanted:
            raise ConfigError(f"{self.url}: {len(found)} answers where {wanted} were asked for")
        return found

    def _stream(self, request: Request, index: int) -> Generator[Piece, None, None]:
        route, body = self._body(request)
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        text, reason = "", None
        usage: dict[str, Any] = {}
        with contextlib.closing(self._open(route, body)) as response:
            for event in _whole(_events(response), f"{self.url}/{route}"):
                if "error" in event:
                    raise ConfigError(f"{self.url}/{route}: {str(event['error'])[:300]}")
                usage = event.get("usage") or usage
                for choice in event.get("choices") or ():
                    new = (choice["delta"].get("content") if "delta" in choice else choice.get("text")) or ""
                    reason = _reason(choice) if choice.get("finish_reason") else reason
                    text += new
                    if new:
                        yield Piece(new, None, index)
        if reason is None:
            raise ConfigError(f"{self.url}/{route}: the server broke off its answer")
        counts = int(usage.get("prompt_tokens", 0)), int(usage.get("completion_tokens", 0))
        yield Piece("", Completion(text, reason, *counts, index=index), index)

    def _score(self, pair: TokenPair, model: str) -> Score:
        prompt, continuation = pair
        body = {"model": model, "prompt": [*prompt, *continuation], "echo": True, "logprobs": 1}
        answer = self._call("completions", {**body, "max_tokens": 1, "temperature": 0})
        told = answer["choices"][0].get("logprobs") or {}
        own, top = told.get("token_logprobs") or [], told.get("top_logprobs") or []
        start, end = len(prompt), len(prompt) + len(continuation)
        if len(own) < end or len(top) < end or None in own[start:end]:
            raise ConfigError(
                f"{self.url}/completions: no log-probabilities of the prompt's {end} tokens, only {len(own)}: this "
                "server does not echo them (echo and logprobs of /v1/completions), so it cannot score choices"
            )
        tokens = []
        for token, logprob, likeliest in zip(continuation, own[start:end], top[start:end], strict=True):
            best = max([*likeliest.values(), logprob])
            tokens.append(TokenLogprob(token, logprob, ((token if logprob == best else -1, best),)))
        return Score(tuple(tokens))

    def _only_model(self) -> str:
        names = [str(model["id"]) for model in self._call("models", None)["data"]]
        if len(names) != 1:
            raise ConfigError(
                f"{self.url} serves {', '.join(names) or 'no model'}: choose one with --served_model_name"
            )
        return names[0]

    def _call(self, route: str, body: dict[str, Any] | None) -> dict[str, Any]:
        with contextlib.closing(self._open(route, body)) as response:
            try:
                return cast(dict[str, Any], json.load(response))
            except _BROKEN as error:
                raise ConfigError(f"{self._flag} {self.url}: no answer from {route} ({error})") from None

    def _open(self, route: str, body: dict[str, Any] | None) -> Any:
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}/{route}", data=data, headers=headers)
        try:
            return urlopen(request, timeout=_SECONDS)
        except urllib.error.HTTPError as error:
            said = error.read(2000).decode(errors="replace")
            hint = f"; its key goes into the variable {KEY}" if error.code == 401 else ""
            raise ConfigError(f"{self.url}/{route}: {error.code} {' '.join(said.split())[:300]}{hint}") from None
        except _BROKEN as error:
            raise ConfigError(f"{self._flag} {self.url}: no answer from {route} ({error})") from None


def _apart(request: Request) -> list[Request]:
    """A request for each of its n answers, seeded as every engine does it."""
    own = request.sampling
    seeds = [stream_seed(own.seed, index) if index else own.seed for index in range(own.n)]
    return [replace(request, sampling=replace(own, n=1, seed=seed)) for seed in seeds]


def _reason(choice: Any) -> FinishReason:
    return "length" if choice.get("finish_reason") == "length" else "stop"


def _events(lines: Any) -> Iterator[dict[str, Any]]:
    """The JSON of server-sent events, up to [DONE]."""
    for line in lines:
        field, _, data = line.decode("utf-8").strip().partition(":")
        if field == "data":
            if data.strip() == "[DONE]":
                return
            yield json.loads(data)


def _whole(events: Iterator[dict[str, Any]], where: str) -> Iterator[dict[str, Any]]:
    """The events; ConfigError where one cannot be read."""
    while True:
        try:
            event = next(events, None)
        except _BROKEN as error:
            raise ConfigError(f"{where}: the server broke off its answer ({error})") from None
        if event is None:
            return
        yield event
