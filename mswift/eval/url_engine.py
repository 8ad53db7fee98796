"""A server that speaks OpenAI's protocol, as an engine: vLLM's, SGLang's, LMDeploy's, mswift deploy. Torch-free."""

import json
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

from mswift.errors import ConfigError
from mswift.infer.prompts import prompt_tokens
from mswift.infer.request import Completion, FinishReason, Piece, Request, Sampling, Score, TokenLogprob, TokenPair

KEY = "OPENAI_API_KEY"
_SECONDS = 600
_DEFAULTS = Sampling()


class UrlEngine:
    """Answers and scores by /v1/chat/completions and /v1/completions, `num_requests` at once."""

    adapters: tuple[str, ...] = ()

    def __init__(self, url: str, model: str | None, tokenizer: Any, num_requests: int) -> None:
        """`url` ends with /v1; model: a name there, None for its only one. Raises ConfigError."""
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"--eval_url {url}: an address such as http://127.0.0.1:8000/v1")
        self.url = url.rstrip("/").removesuffix("/chat/completions").removesuffix("/completions")
        self.tokenizer = tokenizer
        self._num_requests = num_requests
        self.model = model or self._only_model()

    def prompt_tokens(self, request: Request) -> list[int]:
        """The server's business."""
        raise NotImplementedError("a server tells no tokens of a request")

    def stream(self, request: Request) -> Generator[Piece, None, None]:
        """All of the answer at once: evaluation needs no more."""
        for completion in self.generate([request]):
            yield Piece(completion.text, completion, completion.index)

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """Answer the requests, in their order, the n answers of one together."""
        return [completion for answers in self._all(self._answer, requests) for completion in answers]

    def score(self, pairs: Sequence[TokenPair], adapter: str | None = None) -> list[Score]:
        """Log-probabilities of continuations: the server is asked to echo the prompt with them."""
        return self._all(self._score, pairs)

    def close(self) -> None:
        """Nothing is held."""

    def _all(self, work: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
        with ThreadPoolExecutor(self._num_requests) as pool:
            return list(pool.map(work, items))

    def _answer(self, request: Request) -> list[Completion]:
        sampling = request.sampling
        body: dict[str, Any] = {"model": self.model, "max_tokens": sampling.max_new_tokens, "n": sampling.n}
        body |= {"temperature": sampling.temperature, "top_p": sampling.top_p, "seed": sampling.seed % 2**31}
        body |= {name: value for name in ("top_k", "min_p", "repetition_penalty") if (value := getattr(sampling, name))
                 != getattr(_DEFAULTS, name)}  # fmt: skip
        if sampling.stop:
            body["stop"] = list(sampling.stop)
        if request.messages is not None and request.opening and self.tokenizer is not None:
            body["prompt"] = prompt_tokens(self.tokenizer, request)
            answer = self._post("completions", body)
        elif request.messages is not None:
            body["messages"] = [dict(message) for message in request.messages]
            if request.opening:
                body["messages"].append({"role": "assistant", "content": request.opening})
                body |= {"continue_final_message": True, "add_generation_prompt": False}
            if request.tools:
                body["tools"] = list(request.tools)
            answer = self._post("chat/completions", body)
        else:
            body["prompt"] = request.prompt if request.prompt is not None else list(request.prompt_ids or ())
            answer = self._post("completions", body)
        usage = answer.get("usage") or {}
        found = []
        for choice in sorted(answer["choices"], key=lambda choice: int(choice["index"])):
            text = choice["message"].get("content") if "message" in choice else choice["text"]
            reason: FinishReason = "length" if choice.get("finish_reason") == "length" else "stop"
            counts = int(usage.get("prompt_tokens", 0)), int(usage.get("completion_tokens", 0))
            found.append(Completion(text or "", reason, *counts, index=int(choice["index"])))
        if len(found) != sampling.n:
            raise ConfigError(f"{self.url}: {len(found)} answers where {sampling.n} were asked for")
        return found

    def _score(self, pair: TokenPair) -> Score:
        prompt, continuation = pair
        body = {"model": self.model, "prompt": [*prompt, *continuation], "echo": True, "logprobs": 1}
        answer = self._post("completions", {**body, "max_tokens": 1, "temperature": 0})
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

    def _post(self, route: str, body: dict[str, Any]) -> dict[str, Any]:
        return self._call(route, json.dumps(body).encode())

    def _call(self, route: str, body: bytes | None) -> dict[str, Any]:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(KEY):
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(f"{self.url}/{route}", data=body, headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=_SECONDS) as response:
                return cast(dict[str, Any], json.load(response))
        except urllib.error.HTTPError as error:
            said = error.read(2000).decode(errors="replace")
            hint = f"; its key goes into the variable {KEY}" if error.code == 401 else ""
            raise ConfigError(f"{self.url}/{route}: {error.code} {' '.join(said.split())[:300]}{hint}") from None
        except (OSError, ValueError) as error:
            raise ConfigError(f"--eval_url {self.url}: no answer from {route} ({error})") from None
