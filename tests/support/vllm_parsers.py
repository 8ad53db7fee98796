"""vLLM's own tool parsers on texts: a program for an interpreter that has vLLM, JSON in and out.

stdin: {"tokenizer": folder, "texts": [[parser, text], ...]}; stdout: for each text [content, [[name, arguments], ...]],
or null where it raised. Parsers: hermes, llama3_json, deepseek_v31, mistral.
"""

import json
import sys


def main() -> None:
    """Parse the texts."""
    from transformers import AutoTokenizer
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.tool_parsers import ToolParserManager

    asked = json.load(sys.stdin)
    tokenizer = AutoTokenizer.from_pretrained(asked["tokenizer"])
    # a parser asks for the ids of its own control tokens; every model that is served with it has them
    deepseek = [f"<｜tool▁{name}｜>" for name in ("calls▁begin", "calls▁end", "call▁begin", "call▁end", "sep")]
    tokenizer.add_tokens(["<|python_tag|>", "[TOOL_CALLS]", *deepseek], special_tokens=True)
    request = ChatCompletionRequest(messages=[], model="model")
    found = []
    for name, text in asked["texts"]:
        read = ToolParserManager.get_tool_parser(name)(tokenizer).extract_tool_calls(text, request)
        calls = [[call.function.name, json.loads(call.function.arguments)] for call in read.tool_calls]
        found.append([read.content or "", calls])
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
