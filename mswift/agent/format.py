"""What an agent template is: how tools, calls and results become text, and calls are read back from text."""

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from mswift.agent.calls import NotACall, Reply
from mswift.errors import DataError

Tool = Mapping[str, Any]
"""A function in OpenAI's form: {"type": "function", "function": {name, description, parameters}}."""


class AgentFormat(ABC):
    """One agent template. `read(write(reply)) == reply` for every reply that `write` does not refuse."""

    inline: ClassVar[bool] = False
    """Whether results stand in the assistant's own turn, which goes on behind them."""
    result_role: ClassVar[Literal["user", "tool"]] = "user"
    """Else: whose message results are."""
    stop: ClassVar[tuple[str, ...]] = ()
    """Texts that end an answer where results follow."""
    tokens: ClassVar[tuple[str, ...]] = ()
    """What it writes that is a control token of its models' tokenizers: it stays in the text of an answer."""
    marks: ClassVar[re.Pattern[str]]
    """What the words of an assistant must not hold, as it would be read as a call."""

    def __init__(self, name: str) -> None:
        self.name = name

    def system(self, tools: Sequence[Tool], system: str | None) -> str | None:
        """The system message; `system`: the one that the row has."""
        return below(system, self.tool_prompt(tools))

    def question(self, tools: Sequence[Tool], text: str) -> str:
        """The first message of the user."""
        return text

    @abstractmethod
    def tool_prompt(self, tools: Sequence[Tool]) -> str:
        """What tells the model of its tools."""

    @abstractmethod
    def write(self, reply: Reply, where: str) -> str:
        """A turn as the model is to write it, up to `stop`. DataError for words that would be read as a call."""

    @abstractmethod
    def results(self, texts: Sequence[str]) -> list[str]:
        """The messages (`inline`: the one text) of the results that come together."""

    def lead(self, content: str) -> str:
        """`inline`: what the model writes behind results before its words (`content`, which may be none) and calls."""
        return ""

    def without_lead(self, text: str) -> str:
        """A generated text without it."""
        return text

    def read(self, text: str) -> Reply:
        """A generated text; where it holds no whole call it is all content, and `problem` says why.

        Thinking is content, whatever it speaks of.
        """
        thinking, words = split_thinking(text)
        try:
            reply = self.parse(words)
        except NotACall as error:
            return Reply(text, problem=str(error))
        return Reply(thinking + reply.content, reply.calls)

    @abstractmethod
    def parse(self, text: str) -> Reply:
        """As `read`; NotACall with the reason."""

    def check_words(self, content: str, where: str) -> None:
        """DataError for words that would be read as a call."""
        thinking, words = split_thinking(content)
        if thinking and "</think>" not in thinking:
            raise DataError(f"{where}: the thinking of the assistant has no end; write </think> behind it")
        if found := self.marks.search(words):
            raise DataError(
                f"{where}: this text of the assistant holds {found[0].strip()!r}, with which a call begins in "
                f"--agent_template {self.name}; take another one, or change the text"
            )

    def check_name(self, name: str, where: str) -> None:
        """DataError for a function name that cannot be told from what stands around it."""
        if not re.fullmatch(r"[\w.:/-]+", name):
            raise DataError(
                f"{where}: a function called {name!r}; --agent_template {self.name} takes letters, digits and _ . : / -"
            )


def split_thinking(text: str) -> tuple[str, str]:
    """What a text begins with in <think>...</think> (all of it where that has no end), and the words behind it."""
    if not text.lstrip().startswith("<think>"):
        return "", text
    thinking, end, words = text.partition("</think>")
    return thinking + end, words


def below(system: str | None, text: str) -> str:
    """A system message with a paragraph below it."""
    return f"{system}\n\n{text}" if system else text


def function_of(tool: Tool) -> dict[str, Any]:
    """Name, description and parameters."""
    found = tool.get("function", tool)
    return dict(found)
