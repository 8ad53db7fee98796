"""The agent templates that there are (`mswift.agent`). Torch-free."""

from typing import Literal

AgentTemplate = Literal[
    "react_en",
    "react_zh",
    "toolbench",
    "qwen_en",
    "qwen_zh",
    "qwen_en_parallel",
    "qwen_zh_parallel",
    "hermes",
    "llama3",
    "glm4",
    "deepseek_v3_1",
    "mistral",
]
