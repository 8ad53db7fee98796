"""Model FLOPs of a training step: matrix products only, causal attention counted as half of the square."""

from mswift.converters.spec import ModelSpec


def matmul_parameters(spec: ModelSpec) -> int:
    """Elements of the weight matrices that a token passes through: every linear and the output head."""
    attention = spec.hidden_size * spec.head_dim * (2 * spec.num_attention_heads + 2 * spec.num_kv_heads)
    mlp = (3 if spec.gated else 2) * spec.hidden_size * spec.ffn_hidden_size
    return spec.num_layers * (attention + mlp) + spec.vocab_size * spec.hidden_size


def step_flops(spec: ModelSpec, num_tokens: int, seq_length: int, *, frozen_base: bool) -> float:
    """FLOPs of forward and backward for `num_tokens` tokens in sequences of `seq_length`.

    A product of a token with an [out, in] matrix is 2 x out x in FLOPs; the backward has one such product for
    the input and, unless the base is frozen (LoRA), one for the weight (Kaplan et al. 2020, section 2.1).
    """
    weights = (4 if frozen_base else 6) * matmul_parameters(spec)
    scores = spec.num_layers * spec.num_attention_heads * spec.head_dim * seq_length  # QK^T and PV, half of each
    return float(num_tokens) * (weights + 6 * scores)
