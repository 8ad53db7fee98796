"""Checkpoints to convert: random bytes, or sparse files with true headers."""

import json
import os
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from mswift.converters.plan import table_for

DENSE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 32000,
    "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
    "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip

MOE: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_size": 4096,
    "intermediate_size": 12288, "moe_intermediate_size": 1536, "num_hidden_layers": 94, "num_attention_heads": 64,
    "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True,
    "decoder_sparse_step": 1, "mlp_only_layers": [], "vocab_size": 151936, "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "hidden_act": "silu", "attention_bias": False,
    "tie_word_embeddings": False, "use_sliding_window": False, "router_aux_loss_coef": 0.001,
    "torch_dtype": "bfloat16",
}  # fmt: skip
"""Qwen3-235B-A22B."""

SMALL = {"hidden_size": 256, "intermediate_size": 768, "moe_intermediate_size": 64, "vocab_size": 8192, "head_dim": 32,
         "num_attention_heads": 16}  # fmt: skip
"""Widths at which the tensors of a large model fit a small disk; their number stays."""


def dense(gigabytes: float) -> dict[str, Any]:
    """The config of a dense model of at least so many bytes (1e9) of BF16."""
    layers = 1
    while num_bytes(DENSE | {"num_hidden_layers": layers}) < gigabytes * 1e9:
        layers += 1
    return DENSE | {"num_hidden_layers": layers}


def num_bytes(config: Mapping[str, Any]) -> int:
    """Bytes of its weights in BF16."""
    return 2 * sum(map(prod, table_for(dict(config)).hf.values()))


def write_model(path: Path, config: Mapping[str, Any], shards: int, *, sparse: bool = False) -> int:
    """A BF16 checkpoint, random or (sparse) with holes for data; returns its bytes of weights."""
    table = table_for(dict(config))
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    names, weight_map, total = table.hf_order, {}, 0
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = names[shard * len(names) // shards : (shard + 1) * len(names) // shards]
        header, position = {}, 0
        for name in part:
            size = 2 * prod(table.hf[name])
            header[name] = {"dtype": "BF16", "shape": table.hf[name], "data_offsets": [position, position + size]}
            position += size
        text = json.dumps(header).encode()
        with open(path / file, "wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            for start in range(0, 0 if sparse else position, 1 << 20):
                out.write(os.urandom(min(1 << 20, position - start)))
            out.truncate(8 + len(text) + position)
        weight_map |= dict.fromkeys(part, file)
        total += position
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return total
