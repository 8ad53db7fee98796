"""Families whose code is not in transformers: their tensors, laid out by hand as that code reads them, compute what an
equivalent model of transformers computes (Llama for InternLM 2 and 3, Qwen2 with one KV head per head for Qwen-7B).
"""

import re
from typing import Any

import numpy as np
import pytest

from mswift.converters.plan import table_for
from tests.support.family_configs import family_config
from tests.support.parity import VOCAB, differences, megatron_run, model_of, random_steps, reference
from tests.support.spaces import Arrays, weights_of

SGD = {"optimizer": "sgd", "lr": 0.05, "weight_decay": 0.1, "clip_grad": 1.0}
HEADS, GROUPS, HEAD_DIM = 8, 4, 4


def internlm2(hf: Arrays) -> Arrays:
    """wqkv: per KV group its query heads, then its key head, then its value head (modeling_internlm2.py)."""
    out = {}
    for name, array in hf.items():
        if ".q_proj" in name:
            q, k, v = (hf[name.replace("q_proj", f"{p}_proj")] for p in "qkv")
            r = HEADS // GROUPS * HEAD_DIM
            parts = [
                np.concatenate([q[g * r : (g + 1) * r], *(x[g * HEAD_DIM : (g + 1) * HEAD_DIM] for x in (k, v))])
                for g in range(GROUPS)
            ]
            out[name.replace("self_attn.q_proj", "attention.wqkv")] = np.concatenate(parts)
        elif not re.search("[kv]_proj", name):
            out[_renamed(name, INTERNLM2)] = array
    return out


def qwen(hf: Arrays) -> Arrays:
    """c_attn: all of q, all of k, all of v; the MLP computes c_proj(w1(x) * silu(w2(x))) (modeling_qwen.py)."""
    out = {}
    for name, array in hf.items():
        if ".q_proj" in name:
            parts = [hf[name.replace("q_proj", f"{p}_proj")] for p in "qkv"]
            out[_renamed(name.replace("self_attn.q_proj", "attn.c_attn"), QWEN)] = np.concatenate(parts)
        elif not re.search("[kv]_proj", name):
            out[_renamed(name, QWEN)] = array
    return out


INTERNLM2 = {
    "embed_tokens": "tok_embeddings", "lm_head": "output", "self_attn.o_proj": "attention.wo",
    "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3", "mlp.down_proj": "feed_forward.w2",
}  # fmt: skip
QWEN = {
    "model.embed_tokens": "transformer.wte", "model.layers": "transformer.h", "model.norm": "transformer.ln_f",
    "input_layernorm": "ln_1", "post_attention_layernorm": "ln_2", "self_attn.o_proj": "attn.c_proj",
    "mlp.gate_proj": "mlp.w2", "mlp.up_proj": "mlp.w1", "mlp.down_proj": "mlp.c_proj",
}  # fmt: skip


def _renamed(name: str, names: dict[str, str]) -> str:
    for theirs, ours in names.items():
        name = name.replace(theirs, ours)
    return name


CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any], Any]] = {
    "internlm2": ("llama", {"rope_theta": 1e6}, {}, internlm2),
    "internlm3": ("llama", {"rope_theta": 1e6, "head_dim": 12}, {}, dict),
    "internlm3, biases": ("llama", {"rope_theta": 1e6, "head_dim": 12, "attention_bias": True, "mlp_bias": True},
                          {"qkv_bias": True, "bias": True}, dict),
    "qwen": ("qwen2", {"num_attention_heads": 4, "num_key_value_heads": 4, "tie_word_embeddings": False}, {}, qwen),
}  # fmt: skip
"""Case -> the model in transformers, its fields, ours, and the layout of the tensors."""


@pytest.mark.parametrize("layout", [{}, {"tp": 2, "sequence_parallel": True}])
@pytest.mark.parametrize("case", CASES)
def test_equals_an_equivalent_model(case: str, layout: dict[str, Any]) -> None:
    equivalent, theirs, ours, layout_of = CASES[case]
    model = model_of(family_config(equivalent, vocab_size=VOCAB, **theirs))
    start = layout_of({n: w.copy() for n, w in weights_of(model).items()})
    config = family_config(case.partition(",")[0], vocab_size=VOCAB, **ours)
    assert dict(table_for(config).hf) == {name: array.shape for name, array in start.items()}
    steps = random_steps(num_steps=2)
    truth = reference(model, steps, SGD)
    for part in ("gradients", "weights"):
        truth[part] = layout_of(truth[part])
    found = megatron_run(config, start, steps, SGD, layout.get("tp", 1), layout)
    apart = differences(found, truth, ("logits", "loss", "grad_norm", "gradients", "weights"))
    assert {n: d for n, d in apart.items() if not d <= 1e-5} == {}
