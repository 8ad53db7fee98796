"""The published config.json of DeepSeek-V2 and -V3, and their tensors as the hub has them, in bf16 or FP8."""

from collections.abc import Iterator, Mapping
from math import ceil
from typing import Any

V3: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_deepseek.DeepseekV3Config",
        "AutoModel": "modeling_deepseek.DeepseekV3Model",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM",
    },
    "bos_token_id": 0, "eos_token_id": 1, "ep_size": 1, "first_k_dense_replace": 3, "hidden_act": "silu",
    "hidden_size": 7168, "initializer_range": 0.02, "intermediate_size": 18432, "kv_lora_rank": 512,
    "max_position_embeddings": 163840, "model_type": "deepseek_v3", "moe_intermediate_size": 2048, "moe_layer_freq": 1,
    "n_group": 8, "n_routed_experts": 256, "n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 128,
    "num_experts_per_tok": 8, "num_hidden_layers": 61, "num_key_value_heads": 128, "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096, "type": "yarn",
    },
    "rope_theta": 10000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "tie_word_embeddings": False,
    "topk_group": 4, "topk_method": "noaux_tc", "torch_dtype": "bfloat16", "transformers_version": "4.33.1",
    "use_cache": True, "v_head_dim": 128, "vocab_size": 129280,
}  # fmt: skip

V2: dict[str, Any] = {
    **{key: value for key, value in V3.items() if key not in ("auto_map", "num_nextn_predict_layers")},
    "architectures": ["DeepseekV2ForCausalLM"], "aux_loss_alpha": 0.001, "bos_token_id": 100000,
    "eos_token_id": 100001, "first_k_dense_replace": 1, "hidden_size": 5120, "intermediate_size": 12288,
    "model_type": "deepseek_v2", "moe_intermediate_size": 1536, "n_routed_experts": 160, "n_shared_experts": 2,
    "norm_topk_prob": False, "num_experts_per_tok": 6, "num_hidden_layers": 60, "routed_scaling_factor": 16.0,
    "rope_scaling": V3["rope_scaling"] | {"mscale": 0.707, "mscale_all_dim": 0.707}, "scoring_func": "softmax",
    "seq_aux": True, "topk_group": 3, "topk_method": "group_limited_greedy", "transformers_version": "4.39.3",
    "vocab_size": 102400,
}  # fmt: skip
V2_LITE: dict[str, Any] = V2 | {
    "hidden_size": 2048, "intermediate_size": 10944, "moe_intermediate_size": 1408, "n_group": 1,
    "n_routed_experts": 64, "num_attention_heads": 16, "num_hidden_layers": 27, "num_key_value_heads": 16,
    "q_lora_rank": None, "routed_scaling_factor": 1.0, "topk_group": 1, "topk_method": "greedy",
}  # fmt: skip

Shape = tuple[int, ...]


def hub_tensors(config: Mapping[str, Any], *, mtp: bool = True) -> dict[str, tuple[str, Shape]]:
    """Name -> (dtype, shape), in the order of the layers; the bias of a router's choice is fp32."""
    size, vocab = config["hidden_size"], config["vocab_size"]
    shapes: dict[str, Shape] = {"model.embed_tokens.weight": (vocab, size)}
    layers = config["num_hidden_layers"]
    for number in range(layers + (config.get("num_nextn_predict_layers", 0) if mtp else 0)):
        prefix = f"model.layers.{number}."
        if number >= layers:
            shapes |= {prefix + name: shape for name, shape in _mtp(size, vocab)}
        shapes |= {prefix + name: shape for name, shape in _attention(config)}
        shapes |= {prefix + "mlp." + name: shape for name, shape in _mlp(config, number)}
        shapes |= {f"{prefix}{name}_layernorm.weight": (size,) for name in ("input", "post_attention")}
    shapes |= {"model.norm.weight": (size,), "lm_head.weight": (vocab, size)}
    return {name: ("F32" if name.endswith("correction_bias") else "BF16", shape) for name, shape in shapes.items()}


FP8: dict[str, Any] = {
    "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128],
}  # fmt: skip
"""What the hub's config.json says under quantization_config."""


def in_fp8(tensors: Mapping[str, tuple[str, Shape]]) -> dict[str, tuple[str, Shape]]:
    """Every linear but router and heads in FP8, with a scale for each block of 128 x 128."""
    out: dict[str, tuple[str, Shape]] = {}
    for name, (dtype, shape) in tensors.items():
        leaf = name.split(".")[-2]
        linear = leaf.endswith(("_proj", "_proj_with_mqa")) and leaf != "eh_proj"
        out[name] = ("F8_E4M3" if linear else dtype, shape)
        if linear:
            out[f"{name}_scale_inv"] = ("F32", tuple(ceil(n / 128) for n in shape))
    return out


def _mtp(size: int, vocab: int) -> Iterator[tuple[str, Shape]]:
    yield "embed_tokens.weight", (vocab, size)
    yield from ((f"{name}.weight", (size,)) for name in ("enorm", "hnorm", "shared_head.norm"))
    yield "eh_proj.weight", (size, 2 * size)
    yield "shared_head.head.weight", (vocab, size)


def _attention(config: Mapping[str, Any]) -> Iterator[tuple[str, Shape]]:
    size, heads, q_rank, kv_rank = (
        config[key] for key in ("hidden_size", "num_attention_heads", "q_lora_rank", "kv_lora_rank")
    )
    plain, turning, value = (config[key] for key in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
    if q_rank is None:
        yield "self_attn.q_proj.weight", (heads * (plain + turning), size)
    else:
        yield "self_attn.q_a_proj.weight", (q_rank, size)
        yield "self_attn.q_a_layernorm.weight", (q_rank,)
        yield "self_attn.q_b_proj.weight", (heads * (plain + turning), q_rank)
    yield "self_attn.kv_a_proj_with_mqa.weight", (kv_rank + turning, size)
    yield "self_attn.kv_a_layernorm.weight", (kv_rank,)
    yield "self_attn.kv_b_proj.weight", (heads * (plain + value), kv_rank)
    yield "self_attn.o_proj.weight", (size, heads * value)


def _mlp(config: Mapping[str, Any], layer: int) -> Iterator[tuple[str, Shape]]:
    size, width = config["hidden_size"], config["moe_intermediate_size"]
    if layer < config["first_k_dense_replace"]:
        yield from _gated("", size, config["intermediate_size"])
        return
    yield "gate.weight", (config["n_routed_experts"], size)
    if config["model_type"] == "deepseek_v3":
        yield "gate.e_score_correction_bias", (config["n_routed_experts"],)
    for expert in range(config["n_routed_experts"]):
        yield from _gated(f"experts.{expert}.", size, width)
    yield from _gated("shared_experts.", size, width * config["n_shared_experts"])


def _gated(prefix: str, size: int, width: int) -> Iterator[tuple[str, Shape]]:
    yield prefix + "gate_proj.weight", (width, size)
    yield prefix + "up_proj.weight", (width, size)
    yield prefix + "down_proj.weight", (size, width)
