"""What the demo starts from, written on the spot: a tokenizer, a random Qwen3 checkpoint, and its data sets.

The skill is the successor of a four-digit number: a model of half a million parameters learns it in two minutes, and
a held-out number cannot be answered from memory.
"""

import json
import random
from pathlib import Path

QUESTION = "What number comes after {}?"
HELD_OUT = 200  # questions that neither training set contains
DOCUMENTS = 20_000  # of pretraining text, about 300,000 tokens
MOST_TURNS = 3  # questions in a conversation; 1 to 3, so that a chat may go on

CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{%- if message.role == 'assistant' %}"
    "{{- '<|im_start|>assistant\\n' }}"
    "{%- generation %}{{- message.content + '<|im_end|>' }}{%- endgeneration %}{{- '\\n' }}"
    "{%- else %}{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


def write_data(directory: Path, seed: int) -> None:
    """Write pretrain.jsonl (text), chat.jsonl (messages) and held_out.jsonl; no held-out number is in the first two."""
    directory.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    numbers = list(range(1000, 9999))
    rng.shuffle(numbers)
    held_out, known = numbers[:HELD_OUT], numbers[HELD_OUT:]
    documents = [rng.choice(known) for _ in range(DOCUMENTS)]
    _write_rows(directory / "pretrain.jsonl", [{"text": f"{QUESTION.format(n)} {n + 1}"} for n in documents])
    chats = [[n, *rng.sample(known, rng.randrange(MOST_TURNS))] for n in known]
    _write_rows(directory / "chat.jsonl", [_conversation(*numbers) for numbers in chats])
    _write_rows(directory / "held_out.jsonl", [_conversation(n) for n in held_out])


def _conversation(*numbers: int) -> dict[str, object]:
    messages = []
    for number in numbers:
        messages.append({"role": "user", "content": QUESTION.format(number)})
        messages.append({"role": "assistant", "content": str(number + 1)})
    return {"messages": messages}


def _write_rows(path: Path, rows: list[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_model(directory: Path, texts: list[str], seed: int) -> int:
    """Write a Qwen3 checkpoint with random weights and a tokenizer trained on `texts`; return its parameter count."""
    import torch
    from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = _train_tokenizer(texts)
    end, pad = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=384,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=pad,
    )
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=pad)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return int(model.num_parameters())


def _train_tokenizer(texts: list[str]):  # type: ignore[no-untyped-def]  # transformers is imported late
    """Byte-level BPE in which every digit is a token of its own, with ChatML's three marks."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=512,
    )
