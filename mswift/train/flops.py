"""Model FLOPs of a training step: matrix products only, causal attention counted as half of the square.

The recurrences of Mamba-2 and of gated delta nets are not counted, their projections are.
"""

from mswift.converters.spec import ModelSpec


def matmul_parameters(spec: ModelSpec, num_ahead: int = 0) -> int:
    """Elements of the weight matrices that a token passes through: every linear and the output head.

    num_ahead: multi-token-prediction layers that are computed, each with a projection and once more the head.
    Of experts: those that a token is sent to, and the router.
    """
    mixer = {"none": 0, "attention": _attention_parameters(spec), "mamba": 0, "delta": 0}
    if spec.mamba is not None:
        inner, states = spec.mamba.num_heads * spec.mamba.head_dim, spec.mamba.num_groups * spec.mamba.state_size
        mixer["mamba"] = spec.hidden_size * (3 * inner + 2 * states + spec.mamba.num_heads)
    if spec.delta is not None:
        keys, values = spec.delta.num_key_heads * spec.delta.key_head_dim, spec.delta.num_value_heads
        mixer["delta"] = spec.hidden_size * (2 * keys + 3 * values * spec.delta.value_head_dim + 2 * values)
    matrices = (3 if spec.gated else 2) * spec.hidden_size
    mlp = {"none": 0, "dense": matrices * spec.ffn_hidden_size, "moe": 0}
    if spec.moe is not None:
        width = spec.moe.top_k * spec.moe.ffn_hidden_size + spec.moe.shared_ffn_hidden_size
        mlp["moe"] = matrices * width + spec.moe.num_experts * spec.hidden_size
    layers = sum(mixer[spec.layer(n).mixer] + mlp[spec.layer(n).mlp] for n in range(spec.num_layers + num_ahead))
    ends = (1 + num_ahead) * spec.vocab_size + num_ahead * 2 * spec.hidden_size
    return layers + ends * spec.hidden_size


def _attention_parameters(spec: ModelSpec) -> int:
    """Elements of the projections of one attention layer."""
    mla, hidden, heads = spec.mla, spec.hidden_size, spec.num_attention_heads
    if mla is None:
        return hidden * spec.head_dim * ((3 if spec.attention_gate else 2) * heads + 2 * spec.num_kv_heads)
    rank, query = mla.q_lora_rank, heads * mla.qk_head_dim
    from_query = hidden * query if rank is None else rank * (hidden + query)
    latent = hidden * (mla.kv_lora_rank + mla.qk_rope_head_dim)
    up = mla.kv_lora_rank * heads * (mla.qk_nope_head_dim + mla.v_head_dim)
    return from_query + latent + up + heads * mla.v_head_dim * hidden


def step_flops(
    spec: ModelSpec, num_tokens: int, squared_lengths: int, *, frozen_base: bool, num_ahead: int = 0
) -> float:
    """FLOPs of forward and backward for `num_tokens` tokens, the squares of whose sequences' lengths sum up so.

    A product of a token with an [out, in] matrix is 2 x out x in FLOPs; the backward has one such product for
    the input and, unless the base is frozen (LoRA), one for the weight (Kaplan et al. 2020, section 2.1).
    """
    weights = (4 if frozen_base else 6) * matmul_parameters(spec, num_ahead)
    num_attention = sum(spec.layer(n).mixer == "attention" for n in range(spec.num_layers + num_ahead))
    width = spec.head_dim if spec.mla is None else (spec.mla.qk_head_dim + spec.mla.v_head_dim) / 2
    scores = num_attention * spec.num_attention_heads * width  # of a pair of tokens: QK^T and PV, half of each
    return float(num_tokens) * weights + 6 * scores * squared_lengths
