"""The agent templates by name."""

from collections.abc import Mapping

from mswift.agent import prompts
from mswift.agent.bare import Glm4, Llama3
from mswift.agent.format import AgentFormat
from mswift.agent.keywords import Qwen, React, Toolbench
from mswift.agent.tagged import DeepseekV31, Hermes, Mistral

FORMATS: Mapping[str, AgentFormat] = {
    format.name: format
    for format in (
        React("react_en", prompts.react_en),
        React("react_zh", prompts.react_zh),
        Toolbench("toolbench", prompts.toolbench),
        Qwen("qwen_en", prompts.qwen_en),
        Qwen("qwen_zh", prompts.qwen_zh),
        Qwen("qwen_en_parallel", prompts.qwen_en_parallel),
        Qwen("qwen_zh_parallel", prompts.qwen_zh_parallel),
        Hermes("hermes"),
        Llama3("llama3"),
        Glm4("glm4"),
        DeepseekV31("deepseek_v3_1"),
        Mistral("mistral"),
    )
}
