"""Hybrids whose layers are one thing each: a Mamba mixer, attention, an MLP or a mixture of experts (Nemotron-H).

megatron-core's MambaModel builds them of Transformer Engine's layers alone: a norm lies inside the linear behind it,
except before experts. Hugging Face calls every layer's content `mixer`.
"""

from collections.abc import Mapping

from mswift.converters.fields import Fields
from mswift.converters.rule import Drop, Rule
from mswift.converters.rules import columns, experts, qkv, rows, same
from mswift.converters.spec import LayerSpec, MoeSpec
from mswift.converters.tables.mamba import AROUND, MAMBA_LAYER, H, M

MIXER = H + "mixer."
EXPERTS, SHARED = "mlp.experts.experts.linear_fc", "mlp.shared_experts.linear_fc"

ATTENTION: tuple[Rule, ...] = (
    same(M + "self_attention.linear_qkv.layer_norm_weight", H + "norm.weight", ("hidden",), when="attention"),
    qkv(
        M + "self_attention.linear_qkv.weight",
        *(MIXER + f"{p}_proj.weight" for p in "qkv"),
        width=("hidden",),
        when="attention",
    ),
    same(
        M + "self_attention.linear_proj.weight",
        MIXER + "o_proj.weight",
        ("hidden", "heads*head_dim"),
        cut=columns("groups"),
        when="attention",
    ),
)


def _up_down(megatron: str, hf: str, ffn: str, when: str) -> tuple[Rule, Rule]:
    """The two weights of an MLP without gate."""
    up = same(f"{M}{megatron}1.weight", f"{hf}up_proj.weight", (ffn, "hidden"), cut=rows(ffn), when=when)
    down = same(f"{M}{megatron}2.weight", f"{hf}down_proj.weight", ("hidden", ffn), cut=columns(ffn), when=when)
    return up, down


DENSE: tuple[Rule, ...] = (
    same(M + "mlp.linear_fc1.layer_norm_weight", H + "norm.weight", ("hidden",), when="dense"),
    *_up_down("mlp.linear_fc", MIXER, "ffn", "dense"),
    same(M + "mlp.linear_fc1.bias", MIXER + "up_proj.bias", ("ffn",), cut=rows("ffn"), when="dense mlp_bias"),
    same(M + "mlp.linear_fc2.bias", MIXER + "down_proj.bias", ("hidden",), when="dense mlp_bias"),
)

MOE: tuple[Rule, ...] = (
    same(M + "pre_mlp_layernorm.weight", H + "norm.weight", ("hidden",), when="moe"),
    same(M + "mlp.router.weight", MIXER + "gate.weight", ("experts", "hidden"), when="moe"),
    same(
        M + "mlp.router.expert_bias", MIXER + "gate.e_score_correction_bias", ("experts",), when="moe", own_dtype=True
    ),
    *(experts(rule, "each") for rule in _up_down(EXPERTS, MIXER + "experts.{e}.", "moe_ffn", "moe")),
    *_up_down(SHARED, MIXER + "shared_experts.", "shared_ffn", "moe"),
)

HYBRID: tuple[Rule | Drop, ...] = (*AROUND[0], *MAMBA_LAYER, *ATTENTION, *DENSE, *MOE, *AROUND[1])

_KINDS: Mapping[str, LayerSpec] = {
    "linear_attention": LayerSpec("mamba", "none", rope=None),
    "full_attention": LayerSpec("attention", "none", rope=None),
    "mlp": LayerSpec("none", "dense", rope=None),
    "moe": LayerSpec("none", "moe", rope=None),
}
_SYMBOLS = {"M": "linear_attention", "*": "full_attention", "-": "mlp", "E": "moe"}
_OLD_NAMES = {"mamba": "linear_attention", "attention": "full_attention"}


def hybrid_layers(config: Fields) -> tuple[LayerSpec, ...]:
    """Layers from `layers_block_type` or, as the hub has it, from the letters of `hybrid_override_pattern`."""
    pattern, names = config.take("hybrid_override_pattern"), config.take("layers_block_type")
    field = "hybrid_override_pattern" if names is None else "layers_block_type"
    kinds = [_SYMBOLS.get(k, k) for k in pattern or ""] if names is None else [_OLD_NAMES.get(k, k) for k in names]
    for kind in kinds:
        config.check(field, kind, _KINDS)
    if names is not None and pattern is not None:
        config.require("hybrid_override_pattern", "".join(s for k in kinds for s, n in _SYMBOLS.items() if n == k))
    config.require("num_hidden_layers", len(kinds))
    return tuple(_KINDS[kind] for kind in kinds)


def hybrid_moe(config: Fields, on: bool) -> MoeSpec | None:
    """The mixture of experts with a router as DeepSeek-V3's; transformers writes its fields for models without, too."""
    config.require("moe_latent_size", None)
    config.require("output_router_logits", False)
    for name in ("n_shared_experts", "moe_shared_expert_overlap"):
        config.take(name)  # there is one, whatever the number; overlap is a matter of speed
    values = MoeSpec(
        num_experts=config.integer("n_routed_experts", 8),
        top_k=config.integer("num_experts_per_tok", 2),
        ffn_hidden_size=config.integer("moe_intermediate_size", 7688),
        score="sigmoid",
        normalize=config.flag("norm_topk_prob", True),
        scale=config.number("routed_scaling_factor", 1.0),
        correction_bias=True,
        num_groups=config.integer("n_group", 1),
        topk_groups=config.integer("topk_group", 1),
        group_score="top2",
        shared_ffn_hidden_size=config.integer("moe_shared_expert_intermediate_size", 7688),
    )
    return values if on else None
