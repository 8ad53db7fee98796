"""The tokenizer as this package sees it, and what its chat template asks of the model."""

import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from mswift.data.late_tokenizer import Facts, LateTokenizer, facts_path, read_facts, write_facts
from mswift.errors import ConfigError
from mswift.startup import importing

UNTRAINED_NORM_RATIO = 1 / 3
"""A row counts as untrained below this share of the median norm. The weakest trained rows measured have 0.54 of it
(stories260K) and 0.44 (a tied Qwen3 of 0.6M parameters after 600 steps); reserved tokens of released models have about
0. Rows that training only pushed away, as wrong answers of a tied head, have large norms and are not told by this."""

_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
_PROBE_QUESTION, _PROBE_ANSWER = "Question?", "Answer."


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that is used here."""

    chat_template: Any
    eos_token_id: int | None
    pad_token_id: int | None
    name_or_path: str
    special_tokens_map: dict[str, Any]
    added_tokens_decoder: dict[int, Any]

    is_fast: bool

    def __len__(self) -> int: ...
    def get_vocab(self) -> dict[str, int]: ...
    def __call__(self, text: list[str], **options: Any) -> Any: ...
    def apply_chat_template(self, conversation: list[dict[str, Any]], **options: Any) -> Any: ...
    def get_chat_template(self, chat_template: str | None = None, tools: list[Any] | None = None) -> str: ...
    def decode(self, token_ids: Sequence[int], **options: Any) -> Any: ...
    def convert_ids_to_tokens(self, ids: int) -> Any: ...
    def convert_tokens_to_ids(self, tokens: str) -> Any: ...
    def add_tokens(self, new_tokens: Any, special_tokens: bool = False) -> int: ...
    def save_pretrained(self, save_directory: str) -> Any: ...


def check_tokenizer_files(directory: Path, flag: str = "--model") -> None:
    """ConfigError where there is no tokenizer: transformers would make an empty one of nothing but config.json."""
    if not any((directory / name).is_file() for name in _FILES):
        raise ConfigError(
            f"{flag} {directory}: no tokenizer (none of {', '.join(_FILES)}); copy tokenizer.json and "
            "tokenizer_config.json there from the model that it was trained from"
        )


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Tokenizer of a local Hugging Face directory: no download, no remote code; ConfigError when it has none."""
    with importing("transformers.models.auto", without="sklearn"):  # a second, for speculative decoding
        from transformers import AutoTokenizer

    directory = Path(path)
    if not directory.is_dir():
        raise ConfigError(f"--model {path}: there is no such folder; the tokenizer is read from local files only")
    check_tokenizer_files(directory)
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, json.JSONDecodeError) as error:
        found = sorted(entry.name for entry in directory.iterdir())
        raise ConfigError(
            f"--model {path}: the tokenizer cannot be loaded ({str(error).strip().splitlines()[0]}). The folder holds "
            f"{', '.join(found) or 'nothing'}; copy tokenizer.json and tokenizer_config.json of the model there"
        ) from error
    return cast(Tokenizer, tokenizer)


def late_tokenizer(path: str | Path, cache_dir: Path) -> Tokenizer:
    """The same, loaded when it is needed where the cache folder knows the tokenizer; else it learns to know it."""
    try:
        kept = facts_path(cache_dir, Path(path))
    except OSError:
        return load_tokenizer(path)
    if (facts := read_facts(kept)) is not None:
        return cast(Tokenizer, LateTokenizer(lambda: load_tokenizer(path), facts))
    tokenizer = load_tokenizer(path)
    with suppress(ConfigError):  # without an end token; who needs one says so
        write_facts(kept, Facts(tokenizer_identity(tokenizer), pad_token_id(tokenizer)))
    return tokenizer


def _facts(tokenizer: Tokenizer) -> Facts | None:
    return tokenizer.facts if isinstance(tokenizer, LateTokenizer) else None


def add_special_tokens(tokenizer: Tokenizer, names: Sequence[str], first_id: int) -> None:
    """Give the tokenizer control tokens with the ids from `first_id` on. ConfigError if it gives them others."""
    tokenizer.add_tokens(list(names), special_tokens=True)
    found = [tokenizer.convert_tokens_to_ids(name) for name in names]
    if found != list(range(first_id, first_id + len(names))):
        raise ConfigError(
            f"--new_special_tokens {' '.join(names)}: the tokenizer of {tokenizer.name_or_path} gives them the ids "
            f"{found}, not {first_id} and following: its tokenizer.json has gaps; add them there by hand"
        )


def encode(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    """Token ids of each text, with nothing added: the chat template writes its special tokens itself."""
    if not texts:
        return []
    encoded = tokenizer(
        texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
    )
    return cast(list[list[int]], encoded["input_ids"])


def token_starts(tokenizer: Tokenizer, text: str) -> list[tuple[int, int]]:
    """(token, character of `text` where it begins) as `encode`; ConfigError for a tokenizer that cannot say.

    A space that a tokenizer counts out of its offsets belongs to the token after it; bytes of one character all begin
    at the character.
    """
    if not tokenizer.is_fast:
        raise ConfigError(
            f"--loss_scale: the tokenizer of {tokenizer.name_or_path} has no tokenizer.json, and only those tell where "
            "in a text a token begins; save it with transformers (AutoTokenizer.from_pretrained(...).save_pretrained)"
        )
    encoded = tokenizer([text], add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    found, end = [], 0
    for token, (start, stop) in zip(encoded["input_ids"][0], encoded["offset_mapping"][0], strict=True):
        found.append((token, min(start, end)))
        end = stop
    return found


def special_tokens(tokenizer: Tokenizer) -> dict[str, int]:
    """Text and id of the control tokens (not of tokens that were merely added to the vocabulary)."""
    return {token.content: number for number, token in tokenizer.added_tokens_decoder.items() if token.special}


def render(
    tokenizer: Tokenizer, messages: list[dict[str, Any]], *, prompt: bool, tools: list[Any] | None = None
) -> str:
    """Text of the chat template; `prompt` adds the head of the next assistant turn. Raises what the template raises."""
    text: str = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=prompt)
    return text


def template_end_token_id(tokenizer: Tokenizer) -> int | None:
    """The control token that the chat template writes after an assistant's words; None where it writes none."""
    if not tokenizer.chat_template:
        return None
    messages = [{"role": "user", "content": _PROBE_QUESTION}, {"role": "assistant", "content": _PROBE_ANSWER}]
    try:
        text = render(tokenizer, messages, prompt=False)
    except Exception as error:  # whatever a template raises: jinja errors and any of Python's
        raise ConfigError(
            f"the chat template of {tokenizer.name_or_path} cannot render a question and its answer: {error}"
        ) from error
    tail = text[text.rfind(_PROBE_ANSWER) + len(_PROBE_ANSWER) :].rstrip()
    ends = [number for content, number in special_tokens(tokenizer).items() if content and tail.endswith(content)]
    return ends[0] if ends else None


def end_token_id(tokenizer: Tokenizer) -> int:
    """The token that ends a document and an answer: the chat template's own end of turn, else eos_token."""
    found = template_end_token_id(tokenizer)
    end = found if found is not None else tokenizer.eos_token_id
    if end is None:
        raise ConfigError(
            f"the tokenizer of {tokenizer.name_or_path} has no end token: its chat template writes none and there "
            'is no eos_token; name one in tokenizer_config.json: "eos_token": "<|endoftext|>"'
        )
    return end


def pad_token_id(tokenizer: Tokenizer) -> int:
    """Any valid id does for padding, which is never a target: pad_token, else the end token."""
    if (facts := _facts(tokenizer)) is not None:
        return facts.pad_token_id
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else end_token_id(tokenizer)


def tokens_used_by_template(tokenizer: Tokenizer) -> list[int]:
    """Ids that the chat template itself writes around a question and an answer, sorted; empty without a template."""
    if not tokenizer.chat_template:
        return []
    messages = [{"role": "user", "content": _PROBE_QUESTION}, {"role": "assistant", "content": _PROBE_ANSWER}]
    text = render(tokenizer, messages, prompt=False) + render(tokenizer, messages[:1], prompt=True)
    for content in (_PROBE_QUESTION, _PROBE_ANSWER):
        text = text.replace(content, "")
    return sorted(set(encode(tokenizer, [text])[0]))


def untrained_token_warning(embedding_row_norms: NDArray[np.floating[Any]], tokenizer: Tokenizer) -> str | None:
    """Names the tokens of the chat template whose rows were hardly trained; None when all were.

    LoRA does not change embedding rows, so it can teach neither the reading nor the writing of such a token.
    `embedding_row_norms`: [vocab], of the input or the output embedding.
    """
    median = float(np.median(embedding_row_norms))
    weak = [
        f"{tokenizer.convert_ids_to_tokens(number)!r} (id {number}, norm {embedding_row_norms[number]:.3g})"
        for number in tokens_used_by_template(tokenizer)
        if embedding_row_norms[number] < UNTRAINED_NORM_RATIO * median
    ]
    if not weak:
        return None
    return (
        f"the chat template uses tokens whose rows look untrained: {', '.join(weak)}; the median norm is {median:.3g}. "
        "LoRA leaves these rows as they are, so the model may never learn to end a turn: "
        "add --modules_to_save embed_tokens lm_head"
    )


def tokenizer_identity(tokenizer: Tokenizer) -> dict[str, str]:
    """What decides the tokens of a text or a conversation: vocabulary and rules, chat template, library versions."""
    if (facts := _facts(tokenizer)) is not None:
        return facts.identity
    tokenizer = tokenizer.real() if isinstance(tokenizer, LateTokenizer) else tokenizer
    import tokenizers
    import transformers

    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    return {
        "rules": hashlib.sha256(rules.encode()).hexdigest(),
        "class": type(tokenizer).__name__,
        "chat_template": json.dumps(tokenizer.chat_template, sort_keys=True),
        "special_tokens": json.dumps(tokenizer.special_tokens_map, sort_keys=True, default=str),
        "versions": f"transformers {transformers.__version__}, tokenizers {tokenizers.__version__}",
    }
