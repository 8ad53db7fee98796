"""Chat templates of the hard kinds, in the shapes of published models, for a ChatML tokenizer with <think>."""

_TURN = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
_PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"

PLAIN = "{% for m in messages %}" + _TURN + "{% endfor %}" + _PROMPT
"""ChatML without {% generation %} marks."""

STRIPS_THINKING = (
    "{% for m in messages %}{% set text = m.content %}"
    "{% if m.role == 'assistant' %}{% set text = m.content.split('</think>')[-1].lstrip('\\n') %}"
    "{% if loop.last %}{% set text = '<think>\\n' + (m.content.split('</think>')[0].split('<think>')[-1].strip('\\n')"
    " if '</think>' in m.content else '') + '\\n</think>\\n\\n' + text %}{% endif %}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ text }}<|im_end|>\n{% endfor %}" + _PROMPT
)
"""As Qwen3: the last turn has a thinking block, empty if need be; earlier turns lose theirs."""

MERGES_SYSTEM = (
    "{% set system = '' %}{% if messages[0].role == 'system' %}{% set system = messages[0].content | trim + '\n\n' %}"
    "{% set messages = messages[1:] %}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "<|im_start|>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ system if loop.first else '' }}{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>model\n{% endif %}"
)
"""As Gemma: the system text opens the first user turn, every text is trimmed, roles must alternate."""

NO_PREFIX = (
    "{% for m in messages %}" + _TURN + "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
"""As DeepSeek-R1: the prompt opens a thinking block that a finished turn does not have."""

NO_END = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
"""No special token after an answer."""

DROPS_SYSTEM = "{% for m in messages %}{% if m.role != 'system' %}" + _TURN + "{% endif %}{% endfor %}" + _PROMPT
"""The system message is ignored."""

DROPS_THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content.split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
    + _PROMPT
)
"""Thinking is dropped even from the turn that is learned."""

MARKS_USER_TOO = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}\n"
    "{% endfor %}" + _PROMPT
)
"""Marks around every turn, the user's included."""

MARKS_SHORT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content[:3] }}{% endgeneration %}{{ m.content[3:] }}{% else %}{{ m.content }}{% endif %}"
    "<|im_end|>\n{% endfor %}" + _PROMPT
)
"""Marks around the beginning of an answer only."""

_THOUGHT = "(m.content.split('</think>')[0].split('<think>')[-1].strip('\\n') if '</think>' in m.content else '')"
_ANSWER = "m.content.split('</think>')[-1].lstrip('\\n')"
_LAST_USER = (
    "{% set ns = namespace(last=-1, first=-1) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% if ns.first < 0 %}{% set ns.first = loop.index0 %}{% endif %}{% set ns.last = loop.index0 %}{% endif %}"
    "{% endfor %}"
)

QWEN3 = (
    _LAST_USER + "{% if tools or messages[0].role == 'system' %}<|im_start|>system\n"
    "{{ messages[0].content if messages[0].role == 'system' else '' }}"
    "{% for tool in tools or [] %}{{ '\n' if loop.index > 1 else '\n\n# Tools\n' }}{{ tool | tojson }}{% endfor %}"
    "<|im_end|>\n{% endif %}"
    "{% for m in messages %}{% if m.role == 'user' %}<|im_start|>user\n{{ m.content }}<|im_end|>\n"
    "{% elif m.role == 'tool' %}{% if messages[loop.index0 - 1].role != 'tool' %}<|im_start|>user{% endif %}"
    "{{ '\n<tool_response>\n' + m.content + '\n</tool_response>' }}"
    "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}<|im_end|>\n{% endif %}"
    "{% elif m.role == 'assistant' %}<|im_start|>assistant\n"
    "{% if loop.index0 > ns.last and (loop.last or '</think>' in m.content) %}"
    "{{ '<think>\n' + " + _THOUGHT + " + '\n</think>\n\n' }}{% endif %}{{ " + _ANSWER + " }}"
    "{% for call in m.tool_calls or [] %}{{ '\n' if loop.index > 1 or " + _ANSWER + " else '' }}"
    "{{ '<tool_call>\n' + ({'name': call.function.name, 'arguments': call.function.arguments} | tojson) }}"
    "{{ '\n</tool_call>' }}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}" + _PROMPT
)
"""As Qwen3: tools in the system turn; thinking after the user's last message only; the last turn always has some."""

DEEPSEEK_R1 = (
    "{{ messages[0].content if messages[0].role == 'system' else '' }}"
    "{% for m in messages %}{% if m.role == 'user' %}<|im_start|>User: {{ m.content }}"
    "{% elif m.role == 'assistant' %}<|im_start|>Assistant: "
    "{{ '<think>\n' + " + _THOUGHT + " + '\n</think>\n\n' if loop.last else '' }}{{ " + _ANSWER + " }}<|im_end|>"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>Assistant: {{ '<think>\n' }}{% endif %}"
)
"""As DeepSeek-R1: the prompt opens the thinking, earlier turns lose theirs; no tools, no results."""

LLAMA31 = (
    _LAST_USER + "{% for m in messages %}"
    "{% if m.role == 'tool' %}<|im_start|>ipython\n\n{{ m.content | tojson }}<|im_end|>"
    "{% elif m.tool_calls %}{% if m.tool_calls | length > 1 %}{{ raise_exception('only single calls') }}{% endif %}"
    "<|im_start|>assistant\n\n"
    "{% set call = m.tool_calls[0].function %}{{ {'name': call.name, 'parameters': call.arguments} | tojson }}"
    "<|im_end|>"
    "{% else %}<|im_start|>{{ m.role }}{{ '\n\n' }}"
    "{% if tools and loop.index0 == ns.first %}{% for tool in tools %}{{ (tool | tojson(indent=4)) + '\n\n' }}"
    "{% endfor %}{% endif %}{{ m.content | trim }}<|im_end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant{{ '\n\n' }}{% endif %}"
)
"""As Llama 3.1: tools in the user's first turn, results as JSON, one call a turn, without words; texts are trimmed."""

MISTRAL = (
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set messages = messages[1:] %}"
    "{% endif %}" + _LAST_USER + "{% for m in messages %}{% if m.role == 'user' %}"
    "{% if loop.index0 == ns.last and tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}"
    "[INST]{% if loop.index0 == ns.last and system is defined %}{{ system + '\n\n' }}{% endif %}{{ m.content }}[/INST]"
    "{% elif m.role == 'tool' %}[TOOL_RESULTS]{{ {'content': m.content} | tojson }}[/TOOL_RESULTS]"
    "{% elif m.role == 'assistant' %}{{ m.content }}{% if m.tool_calls %}[TOOL_CALLS][{% for call in m.tool_calls %}"
    "{{ {'name': call.function.name, 'arguments': call.function.arguments} | tojson }}{{ '' if loop.last else ', ' }}"
    "{% endfor %}]{% endif %}<|im_end|>{% else %}{{ raise_exception('a system message comes first') }}{% endif %}"
    "{% endfor %}"
)
"""As Mistral: system text and tools before the user's last message, no generation prompt of its own."""
