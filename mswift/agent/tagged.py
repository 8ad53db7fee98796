"""Calls between tags or special tokens: hermes, deepseek_v3_1, mistral."""

import re
from collections.abc import Sequence

from mswift.agent.calls import Call, NotACall, Reply, read_list, read_object, skip_space, to_call, to_json
from mswift.agent.format import AgentFormat, Tool, function_of


class Hermes(AgentFormat):
    """<tool_call> around one JSON object each, as NousResearch's Hermes 2 Pro and Qwen 2.5 and 3 write them."""

    tokens = ("<tool_call>", "</tool_call>")
    marks = re.compile(r"</?tool_call>")

    def tool_prompt(self, tools: Sequence[Tool]) -> str:
        """As in the chat template of Qwen 2.5 and 3."""
        return (
            "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
            "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
            + "\n".join(to_json(tool) for tool in tools)
            + "\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
            "<tool_call></tool_call> XML tags:\n<tool_call>\n"
            '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
        )

    def write(self, reply: Reply, where: str) -> str:
        """Content, then a tagged object for each call, on lines of their own."""
        self.check_words(reply.content, where)
        calls = [to_json({"name": call.name, "arguments": call.arguments}) for call in reply.calls]
        parts = [reply.content] if reply.content or not calls else []
        return "\n".join([*parts, *(f"<tool_call>\n{call}\n</tool_call>" for call in calls)])

    def results(self, texts: Sequence[str]) -> list[str]:
        """All in one message."""
        return ["\n".join(f"<tool_response>\n{text}\n</tool_response>" for text in texts)]

    def parse(self, text: str) -> Reply:
        """Objects with `name` and `arguments`; nothing but white space between and behind them."""
        start = text.find("<tool_call>")
        if start < 0:
            if "</tool_call>" in text:
                raise NotACall("</tool_call> without <tool_call>")
            return Reply(text)
        calls, place = [], start
        while place < len(text):
            if not text.startswith("<tool_call>", place):
                raise NotACall("text behind a call")
            value, place = read_object(text, place + len("<tool_call>"), "what stands in <tool_call>")
            calls.append(to_call(value, "arguments"))
            place = skip_space(text, place)
            if not text.startswith("</tool_call>", place):
                raise NotACall("<tool_call> without </tool_call> behind its JSON")
            place = skip_space(text, place + len("</tool_call>"))
        return Reply(text[:start].removesuffix("\n"), tuple(calls))


class DeepseekV31(AgentFormat):
    """The tokens of DeepSeek-V3.1; its chat template writes results, messages of the role tool."""

    result_role = "tool"
    marks = re.compile("<｜tool▁(calls|call|sep)")
    _BEGIN, _END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
    _ONE, _SEPARATOR, _ONE_END = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
    tokens = (_BEGIN, _END, _ONE, _SEPARATOR, _ONE_END)

    def tool_prompt(self, tools: Sequence[Tool]) -> str:
        """As in the model card of DeepSeek-V3.1."""
        described = "\n\n".join(
            f"### {tool['name']}\nDescription: {tool.get('description', '')}\n\n"
            f"Parameters: {to_json(tool.get('parameters', {}))}"
            for tool in map(function_of, tools)
        )
        example = (
            f"{self._BEGIN}{self._ONE}tool_call_name{self._SEPARATOR}tool_call_arguments{self._ONE_END}"
            f"{{additional_tool_calls}}{self._END}"
        )
        return (
            f"## Tools\nYou have access to the following tools:\n\n{described}\n\n"
            f"IMPORTANT: ALWAYS adhere to this exact format for tool use:\n{example}\n\nWhere:\n"
            "- `tool_call_name` must be an exact match to one of the available tools\n"
            "- `tool_call_arguments` must be valid JSON that strictly follows the tool's Parameters Schema\n"
            "- For multiple tool calls, chain them directly without separators or spaces"
        )

    def write(self, reply: Reply, where: str) -> str:
        """Content and calls without anything between."""
        self.check_words(reply.content, where)
        if not reply.calls:
            return reply.content
        for call in reply.calls:
            self.check_name(call.name, where)
        calls = [f"{self._ONE}{c.name}{self._SEPARATOR}{to_json(c.arguments)}{self._ONE_END}" for c in reply.calls]
        return f"{reply.content}{self._BEGIN}{''.join(calls)}{self._END}"

    def results(self, texts: Sequence[str]) -> list[str]:
        """As they are."""
        return list(texts)

    def parse(self, text: str) -> Reply:
        """Everything behind the first token of calls must be calls."""
        start = text.find(self._BEGIN)
        if start < 0:
            if found := self.marks.search(text):
                raise NotACall(f"{found[0]} without {self._BEGIN}")
            return Reply(text)
        calls, place = [], start + len(self._BEGIN)
        while text.startswith(self._ONE, place):
            name, separator, _ = text[place + len(self._ONE) :].partition(self._SEPARATOR)
            if not separator or not name.strip():
                raise NotACall(f"a call without name and {self._SEPARATOR}")
            place += len(self._ONE) + len(name) + len(separator)
            arguments, place = read_object(text, place, f"what {name.strip()} is called with")
            place = skip_space(text, place)
            if not text.startswith(self._ONE_END, place):
                raise NotACall(f"the call of {name.strip()} does not end")
            calls.append(Call(name.strip(), arguments))
            place = skip_space(text, place + len(self._ONE_END))
        if not calls or text[place:].strip() != self._END:
            raise NotACall(f"{self._BEGIN} is not followed by calls and {self._END}")
        return Reply(text[:start], tuple(calls))


class Mistral(AgentFormat):
    """[TOOL_CALLS] and a JSON list, as Mistral's tokenizers of version 3 have it."""

    marks = re.compile(r"\[TOOL_CALLS\]")
    _MARK = "[TOOL_CALLS]"
    tokens = (_MARK,)

    def tool_prompt(self, tools: Sequence[Tool]) -> str:
        """A JSON list."""
        return f"[AVAILABLE_TOOLS]{to_json(list(tools))}[/AVAILABLE_TOOLS]"

    def write(self, reply: Reply, where: str) -> str:
        """Content, then the list."""
        self.check_words(reply.content, where)
        calls = [{"name": call.name, "arguments": call.arguments} for call in reply.calls]
        return reply.content + (f"{self._MARK}{to_json(calls)}" if calls else "")

    def results(self, texts: Sequence[str]) -> list[str]:
        """All in one message."""
        return ["".join(f"[TOOL_RESULTS]{to_json({'content': text})}[/TOOL_RESULTS]" for text in texts)]

    def parse(self, text: str) -> Reply:
        """A list of {name, arguments}, which may have an id; nothing behind it."""
        content, mark, rest = text.partition(self._MARK)
        if not mark:
            return Reply(text)
        values, end = read_list(rest, 0, f"what stands behind {self._MARK}")
        if rest[end:].strip():
            raise NotACall("text behind the calls")
        if not values:
            raise NotACall(f"{self._MARK} with an empty list")
        return Reply(content, tuple(to_call(value, "arguments", ("id",)) for value in values))
