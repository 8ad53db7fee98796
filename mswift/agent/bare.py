"""Calls that are told by their own form: llama3 and glm4. Results are messages of the role tool."""

import re
from collections.abc import Sequence

from mswift.agent.calls import Call, NotACall, Reply, read_object, skip_space, to_call, to_json
from mswift.agent.format import AgentFormat, Tool, function_of


class Llama3(AgentFormat):
    """A JSON object a line, {"name": ..., "parameters": ...}, as Llama 3.1 writes it."""

    result_role = "tool"
    marks = re.compile(
        r"^[ \t]*(<\|python_tag\|>)?\{\s*\"name\"\s*:\s*\"([^\"\\]|\\.)*\"\s*,\s*\"parameters\"\s*:", re.MULTILINE
    )

    def tool_prompt(self, tools: Sequence[Tool]) -> str:
        """As in the chat template of Llama 3.1, where it stands before the user's first words."""
        return (
            "Given the following functions, please respond with a JSON for a function call with its proper arguments "
            'that best answers the given prompt.\n\nRespond in the format {"name": function name, "parameters": '
            "dictionary of argument name and its value}. Do not use variables.\n\n"
            + "".join(f"{to_json(tool, indent=4)}\n\n" for tool in tools)
        )

    def system(self, tools: Sequence[Tool], system: str | None) -> str | None:
        """The row's own: tools stand in the question."""
        return system

    def question(self, tools: Sequence[Tool], text: str) -> str:
        """Tools, then the question."""
        return self.tool_prompt(tools) + text

    def write(self, reply: Reply, where: str) -> str:
        """Content, then a line for each call."""
        self.check_words(reply.content, where)
        parts = [reply.content] if reply.content or not reply.calls else []
        return "\n".join([*parts, *(to_json({"name": c.name, "parameters": c.arguments}) for c in reply.calls)])

    def results(self, texts: Sequence[str]) -> list[str]:
        """As they are."""
        return list(texts)

    def parse(self, text: str) -> Reply:
        """Objects, apart by white space or `;`; nothing else behind the first."""
        found = self.marks.search(text)
        if found is None:
            return Reply(text)
        calls, place = [], skip_space(text, found.start())
        while place < len(text):
            place += len("<|python_tag|>") if text.startswith("<|python_tag|>", place) else 0
            if not text.startswith("{", place):
                raise NotACall("text behind a call")
            value, place = read_object(text, place, "a call")
            calls.append(to_call(value, "parameters"))
            place = skip_space(text, place)
            place = skip_space(text, place + 1) if text.startswith(";", place) else place
        return Reply(text[: found.start()].removesuffix("\n"), tuple(calls))


class Glm4(AgentFormat):
    """The name on a line and the arguments below it, as GLM-4 writes it; turns of their own for several."""

    result_role = "tool"
    stop = ("<|observation|>",)
    tokens = ("<|assistant|>", "<|observation|>")
    marks = re.compile(r"<\|(assistant|observation)\|>|\A[\w.:/-]+\n\s*\{")
    _TURN = "<|assistant|>"
    _CALL = re.compile(r"([\w.:/-]+)\n\s*(?=\{)")

    def tool_prompt(self, tools: Sequence[Tool]) -> str:
        """As in the chat template of GLM-4-0414."""
        return "# 可用工具" + "".join(
            f"\n\n## {tool['name']}\n\n{to_json(tool, indent=4)}\n在调用上述函数时，请使用 Json 格式表示调用的参数。"
            for tool in map(function_of, tools)
        )

    def write(self, reply: Reply, where: str) -> str:
        """Content and calls, each its own turn."""
        self.check_words(reply.content, where)
        for call in reply.calls:
            self.check_name(call.name, where)
        parts = [reply.content] if reply.content or not reply.calls else []
        return self._TURN.join([*parts, *(f"{call.name}\n{to_json(call.arguments)}" for call in reply.calls)])

    def results(self, texts: Sequence[str]) -> list[str]:
        """As they are."""
        return list(texts)

    def parse(self, text: str) -> Reply:
        """At most one turn of words, before the calls."""
        calls: list[Call] = []
        content, place = "", 0
        if not self._CALL.match(text):
            content, turn, _ = text.partition(self._TURN)
            if not turn:
                return Reply(text)
            place = len(content) + len(turn)
        while found := self._CALL.match(text, place):
            arguments, place = read_object(text, found.end(), f"what {found[1]} is called with")
            calls.append(Call(found[1], arguments))
            place = skip_space(text, place)
            if not text.startswith(self._TURN, place):
                break
            place += len(self._TURN)
        if not calls or text[place:].removesuffix(self.stop[0]).strip():
            raise NotACall("text behind a call" if calls else f"{self._TURN} is not followed by a call")
        return Reply(content, tuple(calls))
