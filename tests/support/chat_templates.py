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
