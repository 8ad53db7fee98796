"""Conversations -> text with the spans that are learned, by the tokenizer's own chat template.

The rule. The span of an assistant turn starts where the template's generation prompt ends and goes up to the
end-of-turn token, which is learned too: without it a model never stops. White space that the template writes after that
token is not learned: generation stops at the token, so nothing after it is ever produced.

The proof. With prompt = render(messages before the turn, add_generation_prompt) and turn = render(messages up to the
turn), turn must start with prompt: the model is then trained on exactly what it will see. Where a template writes a
turn differently once others follow (Qwen3 strips the thinking of earlier turns), the row becomes several samples: each
turn is learned once, in a text that starts with its own prompt. A template whose prompt is no prefix is refused.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any, cast

from mswift.data.batch import NO_CHANNEL
from mswift.data.loss_scale import PLAIN, LossScale, Pieces
from mswift.data.messages import Message
from mswift.data.rows import Conversation
from mswift.data.tokenizer import Tokenizer, render, special_tokens, template_end_token_id
from mswift.errors import ConfigError, DataError

_THINK = "<think>"
_GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class Span:
    """Characters [start, end) that are learned, with their loss weights."""

    start: int
    end: int
    pieces: Pieces = ((0, 1.0),)
    """(character counted from `start`, weight from there on)"""


@dataclass(frozen=True)
class Rendering:
    """The text of one sample and what is learned in it."""

    text: str
    spans: tuple[Span, ...]
    outside: float = 0.0
    """Loss weight of what is in no span."""
    channel: str = NO_CHANNEL


@dataclass(frozen=True)
class _Turn:
    index: int
    """Of the assistant message."""
    text: str
    """Rendering of the messages up to it."""
    start: int
    end: int
    """Characters of the turn, from the end of its prompt to the end-of-turn token."""
    spans: tuple[Span, ...]
    """What is learned of them: each part that the assistant writes without being given anything."""


class ChatTemplate:
    """The chat template of one tokenizer; ConfigError when it has none or writes no end-of-turn token."""

    def __init__(self, tokenizer: Tokenizer, loss_scale: LossScale = PLAIN) -> None:
        self._tokenizer, self._loss_scale = tokenizer, loss_scale
        name = tokenizer.name_or_path
        if not tokenizer.chat_template:
            raise ConfigError(
                f"the tokenizer of {name} has no chat_template, which sft needs: put the chat_template.jinja of the "
                "instruct version of the model beside its tokenizer.json, or train on plain text with `mswift pt`"
            )
        if template_end_token_id(tokenizer) is None:
            raise ConfigError(
                f"the chat_template of {name} writes no special token after an assistant turn, so a model trained on "
                "it would never stop: write {{ eos_token }} after the assistant's content in chat_template.jinja"
            )
        self._specials = tuple(special_tokens(tokenizer))

    def render(self, conversation: Conversation, where: str) -> list[Rendering]:
        """One rendering, or several where later messages change how earlier turns are written; DataError names `where`.

        Messages after the last assistant turn that is learned teach nothing and are left out.
        """
        messages, tools = conversation.messages, conversation.tools
        channel = self._loss_scale.channel(conversation.extra, where)
        weights = self._loss_scale.turn_weights(messages)
        if not weights:
            raise DataError(
                f"{where}: no assistant turn after the user's last message, so --loss_scale "
                f"{self._loss_scale.strategy} leaves nothing to learn; remove the row"
            )
        turns = [self._turn(messages, index, weight, tools, where) for index, weight in weights.items()]
        if tools and turns[0].text == self._render(messages[: turns[0].index + 1], None, False, where):
            raise DataError(
                f"{where} has `tools`, which the chat template ignores; remove the field or use a template with tools"
            )
        if self._loss_scale.strategy == "all":
            return [replace(self._whole(messages, turns, tools, where), channel=channel)]
        renderings = []
        while turns:
            last = turns[-1]
            kept = [turn for turn in turns if last.text.startswith(turn.text[: turn.end])]
            self._check_messages(messages[: last.index + 1], last.text, where)
            self._check_marks(messages[: last.index + 1], tools, last.text, kept, where)
            spans = tuple(span for turn in kept for span in turn.spans)
            renderings.append(Rendering(last.text, spans, channel=channel))
            turns = [turn for turn in turns if turn not in kept]
        return renderings[::-1]

    def _whole(
        self, messages: Sequence[Message], turns: Sequence[_Turn], tools: list[Any] | None, where: str
    ) -> Rendering:
        """All messages in one text, every token of which is learned; turns with weights must stand in it as proved."""
        text = self._render(messages, tools, False, where)
        self._check_messages(messages, text, where)
        spans: list[Span] = []
        for turn in turns:
            if text.startswith(turn.text[: turn.end]):
                spans += turn.spans
            elif any(span.pieces != ((0, 1.0),) for span in turn.spans):
                raise DataError(
                    f"{where}, message {turn.index + 1}: --loss_scale all: the chat template writes this turn in "
                    "another way once others follow, so its weights have no place; use --loss_scale default"
                )
        return Rendering(text, tuple(spans), outside=1.0)

    def _turn(
        self, messages: Sequence[Message], index: int, weight: float, tools: list[Any] | None, where: str
    ) -> _Turn:
        where = f"{where}, message {index + 1}"
        prompt = self._render(messages[:index], tools, True, where)
        text = self._render(messages[: index + 1], tools, False, where)
        if not text.startswith(prompt):
            raise DataError(
                f"{where}: the span to learn cannot be found: the chat template writes the prompt as {_end(prompt)} "
                f"but the turn as {_end(text)}, which does not start with it. Use a template whose generation "
                "prompt is the beginning of an assistant turn"
            )
        learned = text[len(prompt) :].rstrip()
        if not learned.endswith(self._specials):
            raise DataError(f"{where}: the chat template ends this turn without a special token: {_end(text)}")
        self._check_answer(messages[index], learned, prompt, where)
        last = len(learned) - len(next(token for token in self._specials if learned.endswith(token)))
        spans = []
        for start, end, own in learned_parts(messages[index], learned, where):
            said = learned[start:end]
            pieces = self._loss_scale.pieces(messages[:index], said, min(last - start, len(said)), weight * own)
            spans.append(Span(len(prompt) + start, len(prompt) + end, pieces))
        return _Turn(index, text, len(prompt), len(prompt) + len(learned), tuple(spans))

    def _render(self, messages: Sequence[Message], tools: list[Any] | None, prompt: bool, where: str) -> str:
        try:
            return render(self._tokenizer, list(messages), prompt=prompt, tools=tools)
        except Exception as error:  # whatever a template raises: jinja errors and any of Python's
            roles = ", ".join(message["role"] for message in messages) or "none"
            raise DataError(
                f"{where}: the chat template refuses the turns before and up to this one (roles: {roles}): {error}. "
                "Most templates want user and assistant in turn, the user first"
            ) from error

    @staticmethod
    def _check_answer(message: Message, learned: str, prompt: str, where: str) -> None:
        """What the row teaches is in the span, but for white space: no template may drop a part of it.

        Thinking that the prompt itself opens (DeepSeek-R1) is not part of it: the model never writes <think>.
        """
        opened = _THINK if prompt.rstrip().endswith(_THINK) and not learned.lstrip().startswith(_THINK) else ""
        wanted = [message["content"], *(call["function"]["name"] for call in message.get("tool_calls", ()))]
        for text in wanted:
            if _squeeze(text) not in _squeeze(opened + learned):
                raise DataError(
                    f"{where}: the chat template does not write all of the turn: {_end(text)} became {_end(learned)}"
                )

    @staticmethod
    def _check_messages(messages: Sequence[Message], text: str, where: str) -> None:
        """A template that leaves out a message is refused (some ignore the system role, or results)."""
        squeezed = _squeeze(text)
        for number, message in enumerate(messages, start=1):
            content = message["content"]
            if message["role"] == "assistant" or _squeeze(content) in squeezed:
                continue
            as_json = [json.dumps(content, ensure_ascii=ascii)[1:-1] for ascii in (False, True)]
            if message["role"] != "tool" or not any(_squeeze(text) in squeezed for text in as_json):
                raise DataError(
                    f"{where}, message {number}: the chat template leaves out this {message['role']} message; remove it"
                )

    def _check_marks(
        self, messages: list[Message], tools: list[Any] | None, text: str, turns: Sequence[_Turn], where: str
    ) -> None:
        """Where the template has {% generation %} marks, they must say the same, but for the end-of-turn token."""
        template = self._tokenizer.get_chat_template(tools=tools)
        if not _GENERATION_MARK.search(template):
            return
        from transformers.utils.chat_template_utils import render_jinja_template

        options: dict[str, Any] = {**self._tokenizer.special_tokens_map, "tools": tools}
        texts, marks = cast(Any, render_jinja_template)(
            conversations=[messages], chat_template=template, return_assistant_tokens_mask=True, **options
        )
        marked = {start: self._core(text[start:end]) for start, end in marks[0]}
        num_answers = sum(message["role"] == "assistant" for message in messages)
        if texts[0] != text or len(marks[0]) != num_answers:
            raise DataError(
                f"{where}: the chat template has {len(marks[0])} pairs of {{% generation %}} marks for {num_answers} "
                "assistant turns; mend the marks, one pair around what the assistant writes"
            )
        for turn in turns:
            learned = text[turn.start : turn.end]
            if marked.get(turn.start) != self._core(learned):
                raise DataError(
                    f"{where}, message {turn.index + 1}: the {{% generation %}} marks of the chat template disagree "
                    f"with its generation prompt about what is learned, {learned!r}; mend the marks"
                )

    def _core(self, learned: str) -> str:
        """A span without its end-of-turn token and the white space around it."""
        learned = learned.rstrip()
        end = next((token for token in self._specials if learned.endswith(token)), "")
        return learned.removesuffix(end).rstrip()


def learned_parts(message: Message, learned: str, where: str) -> list[tuple[int, int, float]]:
    """(first character, end, weight) of the parts of `learned`, the turn of `message`, that are not given to it.

    A message has `parts` where an agent template puts results into the assistant's turn. What the chat template adds to
    the content belongs to the first part and to the last. DataError for a content that it changes.
    """
    if "parts" not in message:
        return [(0, len(learned), 1.0)]
    content = message["content"]
    if (place := learned.find(content.strip())) < 0:
        raise DataError(
            f"{where}: the chat template changes the text of this turn, so that the results in it cannot be found: "
            "use a template that writes it as it is, or an --agent_template with results in turns of their own (hermes)"
        )
    place -= len(content) - len(content.lstrip())
    ends = [place + end for end in accumulate(len(text) for text, _ in message["parts"])]
    edges = [0, *(min(max(end, 0), len(learned)) for end in ends[:-1]), len(learned)]
    parts = zip(pairwise(edges), message["parts"], strict=True)
    return [(start, end, weight) for (start, end), (_, weight) in parts if weight and start < end]


def _squeeze(text: str) -> str:
    return "".join(text.split())


def _end(text: str, length: int = 60) -> str:
    return repr(text if len(text) <= length else "..." + text[-length:])
