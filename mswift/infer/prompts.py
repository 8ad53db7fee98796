"""Requests to the token ids that a model is given, the same for every engine. Torch-free."""

from collections.abc import Iterable
from typing import Any, NamedTuple

from mswift.errors import DataError
from mswift.infer.request import Request


def prompt_tokens(tokenizer: Any, request: Request) -> list[int]:
    """Token ids of a request: by the chat template, or of the text as it stands. Raises DataError."""
    if request.prompt_ids is not None:
        return list(request.prompt_ids)
    if request.prompt is not None:
        return list(tokenizer(request.prompt)["input_ids"])
    messages = [dict(message) for message in request.messages or ()]
    try:
        text: Any = tokenizer.apply_chat_template(
            messages,
            tools=list(request.tools) if request.tools else None,
            tokenize=False,
            add_generation_prompt=True,
        )
    except Exception as error:  # whatever a template raises: jinja errors and any of Python's
        roles = ", ".join(str(message["role"]) for message in messages)
        raise DataError(
            f"the chat template refuses messages of {roles}: {error}; --use_chat_template false does without"
        ) from error
    return list(tokenizer(text + request.opening, add_special_tokens=False)["input_ids"])


class Limit(NamedTuple):
    """Tokens of a prompt and its answer together, None: any number; of: what says so."""

    tokens: int | None
    of: str = "the model's max_position_embeddings"


def check_prompt(prompt: list[int], tokenizer: Any, rows: int, limit: Limit, virtual: int = 0) -> None:
    """DataError for a prompt that is empty, longer than `limit` lets it be or has ids beyond the model's `rows`.

    virtual: tokens that an adapter puts before it.
    """
    if not prompt:
        raise DataError("an empty prompt, and the tokenizer adds no start token: nothing to continue")
    if max(prompt) >= rows or min(prompt) < 0:
        wrong = max(prompt) if max(prompt) >= rows else min(prompt)
        token = tokenizer.convert_ids_to_tokens(wrong) if 0 <= wrong < len(tokenizer) else None
        raise DataError(
            f"the prompt has token {token!r} (id {wrong}), the model has {rows} embedding rows: put "
            "the tokenizer files that the model was trained with into the directory of --model"
        )
    if limit.tokens is not None and virtual + len(prompt) >= limit.tokens:
        behind = f" behind the adapter's {virtual} virtual tokens" if virtual else ""
        longest = limit.tokens - virtual - 1
        remedy = f"shorten it to {longest} or less" if longest > 0 else "no prompt fits: ask without this adapter"
        raise DataError(
            f"a prompt of {len(prompt)} tokens{behind} leaves no room for an answer: "
            f"{limit.of} is {limit.tokens}; {remedy}"
        )


def end_tokens(generation_config: Any, tokenizer: Any) -> frozenset[int]:
    """Ids that end an answer: the generation config's and the tokenizer's end token."""
    configured = getattr(generation_config, "eos_token_id", None)
    ids: Iterable[Any] = configured if isinstance(configured, list) else [configured]
    return frozenset(int(i) for i in (*ids, tokenizer.eos_token_id) if i is not None)
