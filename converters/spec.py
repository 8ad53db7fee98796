"""What a model computes, in numbers: the torch-free description from which a Megatron model is built."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from mswift.topology import ExpertLayout

RopeKind = Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope"]
Activation = Literal["silu", "gelu", "gelu_tanh", "relu2", "quick_gelu"]


@dataclass(frozen=True)
class RopeSpec:
    """Rotary position embedding; kinds as transformers.modeling_rope_utils defines them.

    rotary_dim: how many of a head's first dimensions are rotated (None: all). interleaved: neighbours (0, 1), (2, 3)
    ... are pairs, otherwise the two halves. attention_factor scales cos and sin (None: what the kind defines).
    """

    theta: float
    kind: RopeKind = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    rotary_dim: int | None = None
    interleaved: bool = False
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()


@dataclass(frozen=True)
class MoeSpec:
    """A mixture of experts in place of the dense MLP (`LayerSpec.mlp` "moe").

    score: how router logits become weights. "softmax": over all experts, then the top k; "topk_softmax": over the
    chosen ones only; "sigmoid": each by itself. normalize: chosen weights are divided by their sum; scale: and
    multiplied by this. correction_bias: a vector that is added for the choice only (DeepSeek-V3).
    num_groups, topk_groups, group_score: the choice is limited to the best groups of experts, a group being worth
    its best expert ("max") or the sum of its best two ("top2"). router_bias: the router is a linear with bias.
    shared_ffn_hidden_size: width of the expert that sees every token (0: none), shared_gate: times a sigmoid gate.
    """

    num_experts: int
    top_k: int
    ffn_hidden_size: int
    score: Literal["softmax", "topk_softmax", "sigmoid"] = "softmax"
    normalize: bool = False
    scale: float = 1.0
    correction_bias: bool = False
    num_groups: int = 1
    topk_groups: int = 1
    group_score: Literal["max", "top2"] = "max"
    router_bias: bool = False
    expert_bias: bool = False
    shared_ffn_hidden_size: int = 0
    shared_gate: bool = False


@dataclass(frozen=True)
class MlaSpec:
    """Multi-head latent attention (DeepSeek-V2): keys and values are projected up from a latent vector.

    q_lora_rank None: queries are projected directly. norm_eps: of the norms of the latent vectors, which is not
    the model's (transformers' and DeepSeek's classes leave it at its default).
    """

    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    norm_eps: float = 1e-6

    @property
    def qk_head_dim(self) -> int:
        """Width of a query or key head: what has no position, then what is rotated."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim


@dataclass(frozen=True)
class MambaSpec:
    """A Mamba-2 mixer (`LayerSpec.mixer` "mamba"); its convolution has a bias, its projections have none.

    num_groups: of heads that share B and C; norm_groups: in how many equal parts the gated output is normalised.
    """

    num_heads: int
    head_dim: int
    state_size: int
    num_groups: int
    norm_groups: int
    conv_kernel: int
    chunk_size: int
    time_step_limit: tuple[float, float] = (0.0, float("inf"))


@dataclass(frozen=True)
class DeltaSpec:
    """A gated delta net mixer (`LayerSpec.mixer` "delta", Qwen3-Next)."""

    num_key_heads: int
    num_value_heads: int
    key_head_dim: int
    value_head_dim: int
    conv_kernel: int


@dataclass(frozen=True)
class LayerSpec:
    """One layer. window: position t sees t - window + 1 .. t (None: all before it); rope: index into
    `ModelSpec.ropes`, None without positions.
    """

    mixer: Literal["attention", "mamba", "delta", "none"] = "attention"
    mlp: Literal["dense", "moe", "none"] = "dense"
    window: int | None = None
    rope: int | None = 0


@dataclass(frozen=True)
class ModelSpec:
    """A decoder, read from one config.json.

    layers: empty means that all `num_layers` are the default `LayerSpec`. pre_norm/post_norm: a norm before/behind
    attention and MLP, inside the residual. qk_norm: none, one over each head, or one over the whole width of q
    (of k). zero_centered_norm: weights w stand for 1 + w. attention_scale None: head_dim ** -0.5.
    embedding_multiplier scales embeddings, residual_multiplier what is added to the residual stream, logits are
    divided by logit_divisor, then logit_softcap c makes c * tanh(x / c) of them; attention_softcap does so with
    attention scores. attention_sinks: one learnt logit a head that takes part in the softmax. attention_gate: the
    output of attention times a sigmoid gate that is projected beside q. swiglu_limit: clamp of gate and up.
    rounded_embedding_multiplier: it is rounded to the model's dtype first, as Gemma's code does. dropout: the largest
    probability in the config.json; it counts in training only. glu_offset is added to up.
    """

    model_type: str
    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_hidden_size: int
    vocab_size: int
    max_position_embeddings: int
    norm_eps: float
    rope: RopeSpec
    tied_embeddings: bool
    qkv_bias: bool = False
    attention_out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: Literal["none", "head", "width"] = "none"
    activation: Activation = "silu"
    gated: bool = True
    norm: Literal["rms", "layer"] = "rms"
    zero_centered_norm: bool = False
    pre_norm: bool = True
    post_norm: bool = False
    other_ropes: tuple[RopeSpec, ...] = ()
    attention_scale: float | None = None
    attention_softcap: float | None = None
    attention_sinks: bool = False
    attention_gate: bool = False
    swiglu_limit: float | None = None
    glu_offset: float = 0.0
    embedding_multiplier: float = 1.0
    rounded_embedding_multiplier: bool = False
    residual_multiplier: float = 1.0
    logit_divisor: float = 1.0
    logit_softcap: float | None = None
    dropout: float = 0.0
    layers: tuple[LayerSpec, ...] = ()
    mtp_layers: tuple[LayerSpec, ...] = ()
    moe: MoeSpec | None = None
    mla: MlaSpec | None = None
    mamba: MambaSpec | None = None
    delta: DeltaSpec | None = None

    def __post_init__(self) -> None:
        if self.layers and len(self.layers) != self.num_layers:
            raise ValueError(f"{len(self.layers)} layer descriptions for {self.num_layers} layers")

    @property
    def ropes(self) -> tuple[RopeSpec, ...]:
        """What `LayerSpec.rope` indexes."""
        return (self.rope, *self.other_ropes)

    def layer(self, number: int) -> LayerSpec:
        """One layer, counted from 0; the multi-token-prediction layers follow the last."""
        if number >= self.num_layers:
            return self.mtp_layers[number - self.num_layers]
        return self.layers[number] if self.layers else LayerSpec()

    @property
    def stacked(self) -> bool:
        """Whether megatron-core keeps all layers in one tensor: attention layers with the same parameters."""
        kinds = {(layer.mixer, layer.mlp) for layer in self.layers}
        return len(kinds) <= 1 and not any(layer.mixer != "attention" for layer in self.layers)

    @property
    def expert_layout(self) -> ExpertLayout | None:
        """What a layout must respect of the experts; None: there are none."""
        moe = self.moe
        return None if moe is None else ExpertLayout(moe.num_experts, moe.ffn_hidden_size, moe.expert_bias)

    @property
    def tensor_parallel_units(self) -> Mapping[str, int]:
        """What tensor parallelism must divide, by its name in messages."""
        layers = [self.layer(n) for n in range(self.num_layers)] + list(self.mtp_layers)
        mixers, mlps = {layer.mixer for layer in layers}, {layer.mlp for layer in layers}
        units = {}
        if "attention" in mixers and self.mla is None:
            units["key/value heads (KV groups)"] = self.num_kv_heads
        if "attention" in mixers:
            units["attention heads"] = self.num_attention_heads
        if "dense" in mlps:
            units["MLP columns"] = self.ffn_hidden_size
        if self.moe is not None and self.moe.shared_ffn_hidden_size:
            units["shared expert columns"] = self.moe.shared_ffn_hidden_size
        if self.mamba is not None:
            units |= {"Mamba heads": self.mamba.num_heads, "Mamba groups": self.mamba.num_groups}
        if self.delta is not None:
            units |= {"linear key heads": self.delta.num_key_heads, "linear value heads": self.delta.num_value_heads}
        return units
