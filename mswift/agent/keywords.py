"""Calls and results told by keywords, in one turn of the assistant: react_en, react_zh, toolbench, qwen_*.

The model writes up to the keyword of the result; the result and what leads on from it are given to it, and the same
turn goes on. Only what the model writes is learned.
"""

import re
from collections.abc import Callable, Sequence

from mswift.agent.calls import Call, NotACall, Reply, read_object, skip_space, to_json
from mswift.agent.format import AgentFormat, Tool, below
from mswift.agent.prompts import functions_line

Prompt = Callable[[Sequence[Tool]], str]


class _Keywords(AgentFormat):
    """NAME_KEY name, a line break, ARGUMENTS_KEY arguments, a line break, RESULT_KEY."""

    inline = True
    name_key = ""
    arguments_key = ""
    result_key = ""
    end_of_words = re.compile("")
    """Where the first call begins, or something that must not come before it."""

    def __init__(self, name: str, prompt: Prompt) -> None:
        super().__init__(name)
        self._prompt = prompt

    def tool_prompt(self, tools: Sequence[Tool]) -> str:
        """By the prompt of this kind and language."""
        return self._prompt(tools)

    def write(self, reply: Reply, where: str) -> str:
        """Content, the calls below it, and the keyword of the result."""
        self.check_words(reply.content, where)
        for call in reply.calls:
            self.check_name(call.name, where)
        if not reply.calls:
            return reply.content
        parts = [reply.content] if reply.content else []
        parts += [f"{self.name_key} {c.name}\n{self.arguments_key} {to_json(c.arguments)}" for c in reply.calls]
        return "\n".join([*parts, self.result_key])

    def parse(self, text: str) -> Reply:
        """Calls one after the other; behind them at most the keyword of the result."""
        found = self.end_of_words.search(text)
        if found is None:
            return Reply(text)
        calls, place = [], found.start()
        while text.startswith(self.name_key, place):
            line, _, _ = text[place + len(self.name_key) :].partition("\n")
            name, place = line.strip(), skip_space(text, place + len(self.name_key) + len(line))
            if not name or not text.startswith(self.arguments_key, place):
                raise NotACall(f"{self.name_key} without a name and {self.arguments_key} on the line below")
            arguments, place = read_object(text, place + len(self.arguments_key), f"what {name} is called with")
            calls.append(Call(name, arguments))
            place = skip_space(text, place)
        if text[place:].removeprefix(self.result_key).strip() or not calls:
            raise NotACall("text behind a call" if calls else f"{found[0].strip()} without {self.name_key}")
        return Reply(text[: found.start()].removesuffix("\n"), tuple(calls))


class React(_Keywords):
    """Thought, Action, Action Input, Observation; a keyword stands at the beginning of a line."""

    name_key, arguments_key, result_key = "Action:", "Action Input:", "Observation:"
    stop = ("Observation:",)
    marks = end_of_words = re.compile(r"^(Action|Action Input|Observation):", re.MULTILINE)

    def results(self, texts: Sequence[str]) -> list[str]:
        """What is given behind the first "Observation:"; the next words follow on a line of their own."""
        return [f"\n{self.result_key}".join(f" {text}" for text in texts) + "\n"]


class Toolbench(React):
    """ToolBench's ReAct; its own system messages are completed as its training does, others precede its prompt."""

    _OWN = "You are AutoGPT, you can use many tools(functions) to do the following task."
    _STEP = "with a function call to actually excute your step."
    _FORMAT = " Your output should follow this format:\nThought:\nAction\nAction Input:\n"

    def system(self, tools: Sequence[Tool], system: str | None) -> str | None:
        """The row's own system message where it is ToolBench's."""
        if not (system or "").startswith(self._OWN):
            return below(system, self.tool_prompt(tools))
        return str(system).replace(self._STEP, self._STEP + self._FORMAT) + functions_line(tools)


class Qwen(_Keywords):
    """The flower keywords of Qwen 2 (Qwen-Agent); behind results the model goes on with ": "."""

    name_key, arguments_key, result_key = "✿FUNCTION✿:", "✿ARGS✿:", "✿RESULT✿"
    stop = ("✿RESULT✿", "✿RETURN✿")
    marks = end_of_words = re.compile("✿(FUNCTION|ARGS|RESULT|RETURN)✿:?")

    def lead(self, content: str) -> str:
        """The rest of "✿RETURN✿: ", which a model may join with the next word in one token."""
        return ": " if content else ": \n"

    def without_lead(self, text: str) -> str:
        """Words alone."""
        return text.removeprefix(":").removeprefix(" ")

    def results(self, texts: Sequence[str]) -> list[str]:
        """What is given behind the first keyword, up to that of the reply."""
        return [f"\n{self.result_key}".join(f": {text}" for text in texts) + "\n✿RETURN✿"]
