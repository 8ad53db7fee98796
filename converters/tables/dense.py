"""What dense decoders share: their table, in parts, and the reading of the config fields they have in common."""

from dataclasses import dataclass
from typing import Any

from mswift.converters.fields import Fields
from mswift.converters.rule import LAYERS, Drop, Rule
from mswift.converters.rules import columns, drop, fused_gate_up, gate_up, qkv, rows, same
from mswift.converters.spec import Activation, ModelSpec

EMBEDDING = "model.embed_tokens.weight"
M = LAYERS
H = "model.layers.{l}."
Q, K, V = (H + f"self_attn.{p}_proj." for p in "qkv")
Table = tuple[Rule | Drop, ...]
ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "relu2": "relu2",
}  # fmt: skip
"""hidden_act, as transformers names it -> `ModelSpec.activation`."""


@dataclass(frozen=True)
class Norms:
    """HF names of a layer's norms, "" where there is none."""

    before_attention: str = "input_layernorm"
    after_attention: str = ""
    before_mlp: str = "post_attention_layernorm"
    after_mlp: str = ""


SANDWICH = Norms(
    "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"
)
"""Norms on both sides, as Gemma names them."""


def norm(megatron: str, hf: str, *, bias: str) -> Table:
    """A norm over the hidden width: its weight and, in models with LayerNorm, its bias."""
    return (
        same(megatron, hf + ".weight", ("hidden",)),
        same(bias, hf + ".bias", ("hidden",), when="layer_norm"),
    )


def layer_norm(module: str, hf: str, *, behind: bool = False) -> Table:
    """The norm before (behind) a sublayer, named as part of the linear that follows (precedes) it."""
    if not hf:
        return ()
    infix = ".post_layernorm." if behind else ".layer_norm_"
    return norm(f"{M}{module}{infix}weight", H + hf, bias=f"{M}{module}{infix}bias")


EMBEDDINGS: Table = (
    same("embedding.word_embeddings.weight", EMBEDDING, ("vocab", "hidden"), cut=rows("vocab", uneven=True)),
)
QKV: Table = (
    qkv(M + "self_attention.linear_qkv.weight", Q + "weight", K + "weight", V + "weight", width=("hidden",)),
    qkv(M + "self_attention.linear_qkv.bias", Q + "bias", K + "bias", V + "bias", width=(), when="qkv_bias"),
)
QK_NORMS: Table = (
    same(M + "self_attention.q_layernorm.weight", H + "self_attn.q_norm.weight", ("head_dim",), when="qk_norm"),
    same(M + "self_attention.k_layernorm.weight", H + "self_attn.k_norm.weight", ("head_dim",), when="qk_norm"),
    same(
        M + "self_attention.q_layernorm.weight",
        H + "self_attn.q_norm.weight",
        ("heads*head_dim",),
        cut=rows("groups"),
        when="qk_norm_width",
    ),
    same(
        M + "self_attention.k_layernorm.weight",
        H + "self_attn.k_norm.weight",
        ("groups*head_dim",),
        cut=rows("groups"),
        when="qk_norm_width",
    ),
)
ATTENTION_OUT: Table = (
    same(
        M + "self_attention.linear_proj.weight",
        H + "self_attn.o_proj.weight",
        ("hidden", "heads*head_dim"),
        cut=columns("groups"),
    ),
    same(
        M + "self_attention.linear_proj.bias",
        H + "self_attn.o_proj.bias",
        ("hidden",),
        when="attention_out_bias",
    ),
)
ATTENTION: Table = (*QKV, *QK_NORMS, *ATTENTION_OUT)
GATED_UP: Table = (
    gate_up(M + "mlp.linear_fc1.weight", H + "mlp.gate_proj.weight", H + "mlp.up_proj.weight", width=("hidden",)),
    gate_up(M + "mlp.linear_fc1.bias", H + "mlp.gate_proj.bias", H + "mlp.up_proj.bias", width=(), when="mlp_bias"),
)
FUSED_UP: Table = (fused_gate_up(M + "mlp.linear_fc1.weight", H + "mlp.gate_up_proj.weight", width=("hidden",)),)
DOWN: Table = (
    same(M + "mlp.linear_fc2.weight", H + "mlp.down_proj.weight", ("hidden", "ffn"), cut=columns("ffn")),
    same(M + "mlp.linear_fc2.bias", H + "mlp.down_proj.bias", ("hidden",), when="mlp_bias"),
)
MLP: Table = (*GATED_UP, *DOWN)
HEAD: Table = (
    *norm("decoder.final_layernorm.weight", "model.norm", bias="decoder.final_layernorm.bias"),
    same("output_layer.weight", "lm_head.weight", ("vocab", "hidden"), cut=rows("vocab", uneven=True), when="untied"),
    drop("lm_head.weight", "equal to model.embed_tokens.weight (tie_word_embeddings)", same_as=EMBEDDING, when="tied"),
    *(
        drop(name, "recomputed from the rope fields of config.json")
        for name in (
            "model.rotary_emb.inv_freq",
            *(H + f"self_attn.rotary_emb.{buffer}" for buffer in ("inv_freq", "cos_cached", "sin_cached")),
        )
    ),
)


def decoder(*, norms: Norms | None = None, attention: Table = ATTENTION, mlp: Table = MLP) -> Table:
    """The table of a decoder whose layers are an attention and an MLP."""
    norms = norms or Norms()
    return (
        *EMBEDDINGS,
        *layer_norm("self_attention.linear_qkv", norms.before_attention),
        *attention,
        *layer_norm("self_attention.linear_proj", norms.after_attention, behind=True),
        *layer_norm("mlp.linear_fc1", norms.before_mlp),
        *mlp,
        *layer_norm("mlp.linear_fc2", norms.after_mlp, behind=True),
        *HEAD,
    )


DECODER: Table = decoder()


def dense_spec(
    config: Fields,
    *,
    max_positions: int,
    num_kv_heads: int | None = None,
    head_dim: int | None = None,
    activation: str = "silu",
    activation_fields: tuple[str, ...] = ("hidden_act",),
    dropouts: tuple[str, ...] = (),
    norm_eps: tuple[str, float] = ("rms_norm_eps", 1e-6),
    partial_rotary: float | None = None,
    interleaved_rotary: bool = False,
    tied: bool = False,
    **features: Any,
) -> ModelSpec:
    """Reads the fields every decoder has; the keywords are the family's defaults, `features` go to the ModelSpec.

    activation: the value of hidden_act (activation_fields) that the family has; norm_eps: name of the field and its
    default; dropouts: fields that hold probabilities, where published models have others than 0.
    """
    for field in activation_fields:
        config.require(field, activation)
    if not dropouts:
        config.require("attention_dropout", 0)
    hidden, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    head_dim = config.integer("head_dim", head_dim or hidden // heads)
    if "rope" not in features:
        features["rope"] = config.rope(head_dim, partial=partial_rotary, interleaved=interleaved_rotary)
    values = {
        "num_layers": config.integer("num_hidden_layers"),
        "num_kv_heads": config.integer("num_key_value_heads", num_kv_heads or heads),
        "ffn_hidden_size": config.integer("intermediate_size"),
        "vocab_size": config.integer("vocab_size"),
        "max_position_embeddings": config.integer("max_position_embeddings", max_positions),
        "norm_eps": config.number(*norm_eps),
        "tied_embeddings": config.flag("tie_word_embeddings", tied),
        "activation": ACTIVATIONS[activation],
        "dropout": max((config.fraction(field, 0.0) for field in dropouts), default=0.0),
    } | features
    return ModelSpec(
        model_type=config.model_type, hidden_size=hidden, num_attention_heads=heads, head_dim=head_dim, **values
    )
