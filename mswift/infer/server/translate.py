"""OpenAI's requests to the engine's, and what is refused of them. Nothing here reads a file or runs a template."""

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mswift.agent.conversation import as_text, opening
from mswift.agent.format import AgentFormat
from mswift.errors import DataError
from mswift.infer.request import BASE_MODEL, Request, Sampling
from mswift.infer.rows import stream_seed
from mswift.infer.server.schema import ChatMessage, ChatRequest, CompletionRequest, SamplingFields


@dataclass(frozen=True)
class Served:
    """What the server answers with, and within which limits."""

    model: str
    """Name of the model itself."""
    adapters: tuple[str, ...]
    max_new_tokens: int
    """Longest answer."""
    max_answers: int
    """n, times the number of prompts."""
    defaults: Sampling
    """For what a request does not say."""
    agent: AgentFormat | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Every name that `model` of a request may take."""
        return (self.model, *self.adapters)


class NoSuchModel(Exception):
    """`model` names nothing that is served here."""


@dataclass(frozen=True)
class Asked:
    """A request of the engine, and how its answers are read."""

    request: Request
    agent: AgentFormat | None = None
    """Calls are read by it."""
    behind_results: bool = False


def adapter_of(served: Served, name: str) -> str:
    """`Request.adapter` for a name. Raises NoSuchModel."""
    if name not in served.names:
        raise NoSuchModel(f"no model {name!r} is served here; there is {', '.join(served.names)}")
    return BASE_MODEL if name == served.model else name


def chat(body: ChatRequest, served: Served) -> Asked:
    """A conversation. Raises NoSuchModel and DataError."""
    adapter = adapter_of(served, body.model)
    messages = [to_message(message, number) for number, message in enumerate(body.messages, start=1)]
    tools = [tool.model_dump(exclude_none=True) for tool in body.tools or ()] if body.tool_choice != "none" else []
    has_calls = any(message["role"] == "tool" or "tool_calls" in message for message in messages)
    if messages[-1]["role"] == "assistant":
        raise DataError("messages: the last one is the assistant's; nothing is left to answer")
    agent = served.agent if tools or has_calls else None
    if tools and served.agent is None:
        raise DataError("tools: this server reads no calls; it must be started with --agent_template")
    limit = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    top = body.top_logprobs or 0
    if body.top_logprobs is not None and not body.logprobs:
        raise DataError("top_logprobs needs logprobs: true")
    sampling = _sampling(body, served, limit, top if body.logprobs else None)
    if agent is None:
        return Asked(Request(messages=tuple(messages), adapter=adapter, sampling=sampling))
    written = as_text(messages, tools, agent, "messages")
    begun = opening(written)
    plain = tuple({"role": message["role"], "content": message["content"]} for message in written)
    sampling = replace(sampling, stop=(*sampling.stop, *agent.stop))
    request = Request(messages=plain, opening=begun, shown=agent.tokens, adapter=adapter, sampling=sampling)
    return Asked(request, agent, behind_results=bool(begun))


def to_message(message: ChatMessage, number: int) -> dict[str, Any]:
    """As chat templates and agent templates take it. DataError for what is none."""
    content = message.content
    if isinstance(content, list):
        content = "\n".join(part.text for part in content)
    if content is None and not (message.role == "assistant" and message.tool_calls):
        raise DataError(f"messages: message {number} has no content")
    told: dict[str, Any] = {"role": "system" if message.role == "developer" else message.role, "content": content or ""}
    if message.role == "tool" and message.tool_call_id:
        told["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        if message.role != "assistant":
            raise DataError(
                f"messages: message {number} of the {message.role} has tool_calls, which the assistant makes"
            )
        told["tool_calls"] = [
            {
                "type": "function",
                "function": {"name": call.function.name, "arguments": _arguments(call.function, number)},
                **({"id": call.id} if call.id else {}),
            }
            for call in message.tool_calls
        ]
    return told


def _arguments(function: Any, number: int) -> Mapping[str, Any]:
    try:
        value = json.loads(function.arguments)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise DataError(f"messages: the arguments of {function.name} in message {number} are no JSON object")
    return value


_MAX_TOKENS = 16
"""Of completions that do not say: OpenAI's default."""


def completions(body: CompletionRequest, served: Served) -> list[Request]:
    """A request for each prompt. Raises NoSuchModel and DataError."""
    adapter = adapter_of(served, body.model)
    prompts = _prompts(body.prompt)
    if not prompts:
        raise DataError("prompt: an empty list asks nothing")
    if body.max_tokens == 0 and not body.echo:
        raise DataError("max_tokens: 0 needs echo: true, or nothing would be answered")
    if body.echo and body.stream:
        raise DataError("echo does not go with stream")
    limit = body.max_tokens if body.max_tokens is not None else min(_MAX_TOKENS, served.max_new_tokens)
    sampling = _sampling(body, served, max(limit, 1), body.logprobs, len(prompts))
    others = stream_seed(sampling.seed, 0)  # apart from the streams of the n answers to the first prompt
    return [
        Request(
            prompt=prompt if isinstance(prompt, str) else None,
            prompt_ids=None if isinstance(prompt, str) else tuple(prompt),
            adapter=adapter,
            sampling=replace(sampling, seed=stream_seed(others, index) if index else sampling.seed),
        )
        for index, prompt in enumerate(prompts)
    ]


def _prompts(prompt: str | Sequence[Any]) -> Sequence[str | Sequence[int]]:
    if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
        return [prompt]
    return prompt


def _sampling(
    body: SamplingFields, served: Served, limit: int | None, logprobs: int | None, num_prompts: int = 1
) -> Sampling:
    own = served.defaults
    if limit is not None and limit > served.max_new_tokens:
        raise DataError(f"max_tokens: {limit}, and this server answers with at most {served.max_new_tokens}")
    if limit == 0:
        raise DataError("max_tokens: 0, and an answer has at least 1")
    if (body.n or 1) * num_prompts > served.max_answers:
        raise DataError(f"n: {(body.n or 1) * num_prompts} answers, and this server gives at most {served.max_answers}")
    if body.stream_options is not None and not body.stream:
        raise DataError("stream_options needs stream: true")

    def given(value: Any, default: Any) -> Any:
        return default if value is None else value

    stop = body.stop if body.stop is not None else own.stop
    return Sampling(
        max_new_tokens=given(limit, served.max_new_tokens),
        temperature=given(body.temperature, own.temperature),
        top_p=given(body.top_p, own.top_p),
        top_k=max(given(body.top_k, own.top_k), 0),
        min_p=given(body.min_p, own.min_p),
        repetition_penalty=given(body.repetition_penalty, own.repetition_penalty),
        seed=given(body.seed, secrets.randbits(62)),
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        stop_token_ids=tuple(body.stop_token_ids or ()),
        ignore_eos=bool(body.ignore_eos),
        n=body.n or 1,
        logprobs=logprobs,
    )
