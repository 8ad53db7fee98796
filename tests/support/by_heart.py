"""A tiny model that knows the answers to some questions by heart: what an evaluation scores 1."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.support.shared import shared_file
from tests.support.tiny import tiny_model

_STEPS = 600


def learn(path: Path, known: Sequence[tuple[Sequence[int], Sequence[int]]], num_positions: int) -> None:
    """Train a Llama with heads of 32 in `path`, beside the tokenizer qwen2-8k, until it answers each prompt greedily.

    known: (prompt, answer with its end token), as token ids.
    """
    import torch
    import torch.nn.functional as F

    shutil.copytree(shared_file("data/tokenizers/qwen2-8k"), path)
    sizes = {"num_hidden_layers": 2, "head_dim": 32, "num_attention_heads": 2, "use_cache": True}
    model: Any = tiny_model(path, "llama", vocab_size=7936, max_position_embeddings=num_positions, **sizes)
    rows = [(torch.tensor([[*prompt, *answer]]), len(answer)) for prompt, answer in known]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    for _ in range(_STEPS):
        certain = True
        for ids, size in rows:
            logits = model(input_ids=ids, logits_to_keep=size + 1).logits[0, :-1]
            loss = F.cross_entropy(logits, ids[0, -size:])
            loss.backward()
            certain &= bool((logits.softmax(-1).gather(1, ids[0, -size:, None]) > 0.9).all())
        if certain:
            break
        optimizer.step()
        optimizer.zero_grad()
    assert certain, "the model did not learn its answers"
    model.save_pretrained(path)
