"""Completions of the engine as OpenAI's answers, whole and in chunks."""

import json
import secrets
import time
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from mswift.agent.conversation import read_reply
from mswift.infer.request import Completion, Piece, TokenLogprob
from mswift.infer.server.schema import (
    AnswerMessage,
    ChatChoice,
    ChatChunk,
    ChatCompletion,
    ChunkChoice,
    CompletionChoice,
    Delta,
    Function,
    TextCompletion,
    ToolCall,
    ToolCallDelta,
    Usage,
)
from mswift.infer.server.token_texts import TokenTexts
from mswift.infer.server.translate import Asked

ChatFinish = Literal["stop", "length", "tool_calls"]


def new_id(kind: str) -> str:
    """An id that no other answer has."""
    return f"{kind}-{secrets.token_hex(12)}"


def usage(completions: Sequence[tuple[int, Completion]]) -> Usage:
    """Tokens of answers, each with the number of its request, whose prompt counts once."""
    prompts = {number: completion.prompt_tokens for number, completion in completions}
    new = sum(completion.completion_tokens for _, completion in completions)
    return Usage(prompt_tokens=sum(prompts.values()), completion_tokens=new, total_tokens=sum(prompts.values()) + new)


class ChatReply:
    """The answer to one chat request, whole (`whole`) or piece by piece (`chunks`)."""

    def __init__(self, model: str, asked: Asked, texts: TokenTexts, *, include_usage: bool = False) -> None:
        self._head: dict[str, Any] = {"id": new_id("chatcmpl"), "created": int(time.time()), "model": model}
        self._asked = asked
        self._texts = texts
        self._include_usage = include_usage
        self._begun: set[int] = set()
        self._completions: list[tuple[int, Completion]] = []

    def whole(self, completions: Sequence[Completion]) -> ChatCompletion:
        """All n answers."""
        choices = [self._choice(completion) for completion in sorted(completions, key=lambda one: one.index)]
        return ChatCompletion(**self._head, choices=choices, usage=usage([(0, one) for one in completions]))

    def _choice(self, completion: Completion) -> ChatChoice:
        content, calls, problem, reason = self._read(completion)
        message = AnswerMessage(content=content, tool_calls=calls or None, tool_call_problem=problem)
        logprobs = None if completion.logprobs is None else self._texts.of_chat(completion.logprobs)
        return ChatChoice(index=completion.index, message=message, logprobs=logprobs, finish_reason=reason)

    def _read(self, completion: Completion) -> tuple[str | None, list[ToolCall], str | None, ChatFinish]:
        if self._asked.agent is None:
            return completion.text, [], None, completion.finish_reason
        reply = read_reply(completion.text, self._asked.agent, behind_results=self._asked.behind_results)
        calls = [
            ToolCall(
                id=new_id("call"),
                function=Function(name=call.name, arguments=json.dumps(call.arguments, ensure_ascii=False)),
            )
            for call in reply.calls
        ]
        reason: ChatFinish = "tool_calls" if calls else completion.finish_reason
        return (reply.content or None if calls else reply.content), calls, reply.problem, reason

    def chunks(self, piece: Piece) -> Iterator[ChatChunk]:
        """What a piece adds. Where calls may come, the text waits for the end, which tells what is a call."""
        if piece.index not in self._begun:
            self._begun.add(piece.index)
            yield self._chunk(piece.index, Delta(role="assistant", content=""))
        logprobs = self._texts.of_chat(piece.logprobs) if piece.logprobs else None
        if self._asked.agent is None and (piece.text or logprobs):
            yield self._chunk(piece.index, Delta(content=piece.text), logprobs)
        elif logprobs:
            yield self._chunk(piece.index, Delta(), logprobs)
        if piece.completion is None:
            return
        self._completions.append((0, piece.completion))
        content, calls, problem, reason = self._read(piece.completion)
        if self._asked.agent is not None and (content or problem):
            yield self._chunk(piece.index, Delta(content=content, tool_call_problem=problem))
        if calls:
            deltas = [ToolCallDelta(index=number, **call.model_dump()) for number, call in enumerate(calls)]
            yield self._chunk(piece.index, Delta(tool_calls=deltas))
        yield self._chunk(piece.index, Delta(), finish_reason=reason)

    def _chunk(self, index: int, delta: Delta, logprobs: Any = None, finish_reason: Any = None) -> ChatChunk:
        choice = ChunkChoice(index=index, delta=delta, logprobs=logprobs, finish_reason=finish_reason)
        return ChatChunk(**self._head, choices=[choice])

    def last(self) -> Iterator[ChatChunk]:
        """The chunk of the usage, where it was asked for."""
        if self._include_usage:
            yield ChatChunk(**self._head, choices=[], usage=usage(self._completions))


class TextReply:
    """The answer to a request for completions of one or several prompts, `n` for each."""

    def __init__(self, model: str, n: int, texts: TokenTexts, *, include_usage: bool = False) -> None:
        self._head: dict[str, Any] = {"id": new_id("cmpl"), "created": int(time.time()), "model": model}
        self._n = n
        self._texts = texts
        self._include_usage = include_usage
        self._completions: list[tuple[int, Completion]] = []
        self._offsets: dict[int, int] = {}

    def whole(
        self,
        completions: Sequence[tuple[int, Completion]],
        prompts: Sequence[tuple[str, Sequence[TokenLogprob | int]]] | None,
    ) -> TextCompletion:
        """All answers; `prompts`: text and tokens that stand before them (echo)."""
        choices = []
        for number, completion in sorted(completions, key=lambda entry: (entry[0], entry[1].index)):
            text, before = prompts[number] if prompts is not None else ("", ())
            logprobs = None
            if completion.logprobs is not None:
                logprobs = self._texts.of_completion([*before, *completion.logprobs])
            choices.append(
                CompletionChoice(
                    index=number * self._n + completion.index,
                    text=text + completion.text,
                    logprobs=logprobs,
                    finish_reason=completion.finish_reason,
                )
            )
        return TextCompletion(**self._head, choices=choices, usage=usage(completions))

    def chunks(self, number: int, piece: Piece) -> Iterator[TextCompletion]:
        """What a piece of the answer to prompt `number` adds."""
        index = number * self._n + piece.index
        logprobs = None
        if piece.logprobs:
            logprobs = self._texts.of_completion(piece.logprobs, self._offsets.get(index, 0))
            self._offsets[index] = logprobs.text_offset[-1] + len(logprobs.tokens[-1])
        reason = None
        if piece.completion is not None:
            self._completions.append((number, piece.completion))
            reason = piece.completion.finish_reason
        choice = CompletionChoice(index=index, text=piece.text, logprobs=logprobs, finish_reason=reason)
        yield TextCompletion(**self._head, choices=[choice])

    def last(self) -> Iterator[TextCompletion]:
        """The chunk of the usage, where it was asked for."""
        if self._include_usage:
            yield TextCompletion(**self._head, choices=[], usage=usage(self._completions))
