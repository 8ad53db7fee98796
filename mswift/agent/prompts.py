"""The published prompts of formats that are told by keywords; the words are the format, to the letter.

react_en, react_zh: the Qwen documentation's ReAct prompt; qwen_*: Qwen-Agent's `qwen_fncall_prompt`; toolbench: the
system message of ToolBench's data with the format line of its training.
"""

from collections.abc import Sequence

from mswift.agent.calls import to_json
from mswift.agent.format import Tool, function_of

_ARGUMENTS = {"en": "Format the arguments as a JSON object.", "zh": "此工具的输入应为JSON对象。"}


def _names(tools: Sequence[Tool]) -> str:
    return ",".join(function_of(tool)["name"] for tool in tools)


def _described(tools: Sequence[Tool], form: str, language: str) -> str:
    """A paragraph for each tool; `form` has {name}, {description}, {parameters}."""
    functions = [function_of(tool) for tool in tools]
    return "\n\n".join(
        form.replace("{name}", tool["name"])
        .replace("{parameters}", to_json(tool.get("parameters", {})))
        .replace("{description}", tool.get("description") or "")
        + f" {_ARGUMENTS[language]}"
        for tool in functions
    )


def react_en(tools: Sequence[Tool]) -> str:
    """English ReAct."""
    described = _described(
        tools,
        "{name}: Call this tool to interact with the {name} API. What is the {name} API useful for? {description} "
        "Parameters: {parameters}",
        "en",
    )
    return f"""Answer the following questions as best you can. You have access to the following tools:

{described}

Use the following format:

Question: the input question you must answer
Thought: you should always think about what to do
Action: the action to take, should be one of [{_names(tools)}]
Action Input: the input to the action
Observation: the result of the action
... (this Thought/Action/Action Input/Observation can be repeated zero or more times)
Thought: I now know the final answer
Final Answer: the final answer to the original input question

Begin!
"""


def react_zh(tools: Sequence[Tool]) -> str:
    """Chinese ReAct."""
    described = _described(
        tools, "{name}: 调用此工具与 {name} API 进行交互。{name} 有什么用？{description} 输入参数：{parameters}", "zh"
    )
    return f"""尽可能地回答以下问题。你可以使用以下工具:

{described}

请按照以下格式进行:

Question: 需要你回答的输入问题
Thought: 你应该总是思考该做什么
Action: 需要使用的工具，应该是[{_names(tools)}]中的一个
Action Input: 传入工具的内容
Observation: 行动的结果
... (这个Thought/Action/Action Input/Observation可以重复N次)
Thought: 我现在知道最后的答案
Final Answer: 对原始输入问题的最终答案

现在开始！
"""


def _qwen_en(tools: Sequence[Tool], how: str) -> str:
    described = _described(tools, "### {name}\n\n{name}: {description} Parameters: {parameters}", "en")
    return f"# Tools\n\n## You have access to the following tools:\n\n{described}\n\n{how}"


def _qwen_zh(tools: Sequence[Tool], how: str) -> str:
    described = _described(tools, "### {name}\n\n{name}: {description} 输入参数：{parameters}", "zh")
    return f"# 工具\n\n## 你拥有如下工具：\n\n{described}\n\n{how}"


def qwen_en(tools: Sequence[Tool]) -> str:
    """English, one call after the other."""
    return _qwen_en(
        tools,
        "## When you need to call a tool, please insert the following command in your reply, which can be called zero "
        "or multiple times according to your needs:\n\n"
        f"✿FUNCTION✿: The tool to use, should be one of [{_names(tools)}]\n"
        "✿ARGS✿: The input of the tool\n✿RESULT✿: Tool results\n"
        "✿RETURN✿: Reply based on tool results. Images need to be rendered as ![](url)",
    )


def qwen_zh(tools: Sequence[Tool]) -> str:
    """Chinese, one call after the other."""
    return _qwen_zh(
        tools,
        "## 你可以在回复中插入零次、一次或多次以下命令以调用工具：\n\n"
        f"✿FUNCTION✿: 工具名称，必须是[{_names(tools)}]之一。\n"
        "✿ARGS✿: 工具输入\n✿RESULT✿: 工具结果\n✿RETURN✿: 根据工具结果进行回复，需将图片用![](url)渲染出来",
    )


def qwen_en_parallel(tools: Sequence[Tool]) -> str:
    """English, several calls at a time."""
    return _qwen_en(
        tools,
        "## Insert the following command in your reply when you need to call N tools in parallel:\n\n"
        f"✿FUNCTION✿: The name of tool 1, should be one of [{_names(tools)}]\n✿ARGS✿: The input of tool 1\n"
        "✿FUNCTION✿: The name of tool 2\n✿ARGS✿: The input of tool 2\n...\n"
        "✿FUNCTION✿: The name of tool N\n✿ARGS✿: The input of tool N\n"
        "✿RESULT✿: The result of tool 1\n✿RESULT✿: The result of tool 2\n...\n✿RESULT✿: The result of tool N\n"
        "✿RETURN✿: Reply based on tool results. Images need to be rendered as ![](url)",
    )


def qwen_zh_parallel(tools: Sequence[Tool]) -> str:
    """Chinese, several calls at a time."""
    return _qwen_zh(
        tools,
        f"## 你可以在回复中插入以下命令以并行调用N个工具：\n\n✿FUNCTION✿: 工具1的名称，必须是[{_names(tools)}]之一\n"
        "✿ARGS✿: 工具1的输入\n✿FUNCTION✿: 工具2的名称\n✿ARGS✿: 工具2的输入\n...\n"
        "✿FUNCTION✿: 工具N的名称\n✿ARGS✿: 工具N的输入\n"
        "✿RESULT✿: 工具1的结果\n✿RESULT✿: 工具2的结果\n...\n✿RESULT✿: 工具N的结果\n"
        "✿RETURN✿: 根据工具结果进行回复，需将图片用![](url)渲染出来",
    )


def functions_line(tools: Sequence[Tool]) -> str:
    """The end of ToolBench's system message."""
    functions = to_json([function_of(tool) for tool in tools])
    return f"\nSpecifically, you have access to the following APIs: {functions}"


def toolbench(tools: Sequence[Tool]) -> str:
    """ToolBench's system message, for rows that are not its own."""
    return (
        "You are AutoGPT, you can use many tools(functions) to do the following task.\nFirst I will give you the task "
        "description, and your task start.\nAt each step, you need to give your thought to analyze the status now and "
        "what to do next, with a function call to actually excute your step. Your output should follow this format:\n"
        "Thought:\nAction\nAction Input:\n\nAfter the call, you will get the call result, and you are now in a new "
        "state.\nThen you will analyze your status now, then decide what to do next...\nAfter many (Thought-call) "
        "pairs, you finally perform the task, then you can give your finial answer.\nRemember: \n1.the state change is "
        "irreversible, you can't go back to one of the former state, if you want to restart the task, say \"I give up "
        'and restart".\n2.All the thought is short, at most in 5 sentence.\n3.You can do more then one trys, so if '
        "your plan is to continusly try some conditions, you can do one of the conditions per try.\nLet's Begin!\nTask "
        "description: You should use functions to help handle the real time user querys. Remember:\n1.ALWAYS call "
        '"Finish" function at the end of the task. And the final answer should contain enough information to show to '
        "the user,If you can't handle the task, or you find that function calls always fail(the function is not valid "
        "now), use function Finish->give_up_and_restart.\n2.Do not use origin tool names, use only subfunctions' names."
    ) + functions_line(tools)
