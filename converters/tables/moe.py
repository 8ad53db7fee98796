"""What mixtures of experts share: the rules of a MoE layer in both on-disk spellings, and their config fields.

The expert axis lies before the rows, where megatron-core's SequentialMLP and grouped experts have it alike. The norm
before the MLP has the key of a dense layer's, as megatron-core's local layer has it; its Transformer Engine layer
asks for `pre_mlp_layernorm.weight` instead, under which name the same bytes are indexed (`io.torch_dist`).
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

from mswift.converters.fields import Fields
from mswift.converters.rule import LAYERS, Drop, Rule
from mswift.converters.rules import columns, experts, fused_gate_up, gate_up, interleaved_gate_up, same
from mswift.converters.spec import LayerSpec, MoeSpec
from mswift.converters.tables.dense import DECODER

EACH, STACKED = "experts_each", "experts_stacked"
SPELLINGS = (EACH, STACKED)
"""One tensor an expert, as the hub has it; one tensor for all, as transformers has it in memory."""

M = LAYERS
H = "model.layers.{l}."
FC1, FC2 = (M + f"mlp.experts.experts.linear_fc{n}.weight" for n in (1, 2))


def without_dense_mlp(rules: Sequence[Rule | Drop]) -> tuple[Rule | Drop, ...]:
    """The table of a dense decoder, in which the rules of the MLP hold in dense layers only."""
    return tuple(
        replace(rule, when=f"{rule.when} dense".strip())
        if isinstance(rule, Rule) and rule.megatron.startswith(M + "mlp.") and "norm" not in rule.megatron
        else rule
        for rule in rules
    )


def router(hf: str, *, when: str = "moe") -> tuple[Rule, ...]:
    """The linear that scores experts; `hf` without `.weight`. Its bias exists with `router_bias`."""
    return (
        same(M + "mlp.router.weight", f"{hf}.weight", ("experts", "hidden"), when=when),
        same(M + "mlp.router.bias", f"{hf}.bias", ("experts",), when=f"{when} router_bias"),
        same(
            M + "mlp.router.expert_bias",
            f"{hf}.e_score_correction_bias",
            ("experts",),
            when=f"{when} correction_bias",
            own_dtype=True,
        ),
    )


def experts_each(gate: str, up: str, down: str, *, when: str = f"moe {EACH}") -> tuple[Rule, ...]:
    """gate_proj, up_proj, down_proj of every expert (`{e}` in their names)."""
    first = gate_up(FC1, gate, up, width=("hidden",), when=when, ffn="moe_ffn")
    second = same(FC2, down, ("hidden", "moe_ffn"), cut=columns("moe_ffn"), when=when)
    return experts(first, "each"), experts(second, "each")


def experts_stacked(gate_up_name: str, down: str, *, when: str = f"moe {STACKED}") -> tuple[Rule, ...]:
    """gate_up_proj [experts, 2 * moe_ffn, hidden] and down_proj [experts, hidden, moe_ffn]."""
    first = fused_gate_up(FC1, gate_up_name, width=("hidden",), when=when, ffn="moe_ffn")
    second = same(FC2, down, ("hidden", "moe_ffn"), cut=columns("moe_ffn"), when=when)
    return experts(first, "stacked"), experts(second, "stacked")


def experts_with_biases(hf: str) -> tuple[Rule, ...]:
    """gate_up_proj [experts, hidden, 2 * moe_ffn], gate and up in turn; down_proj [experts, moe_ffn, hidden]."""
    bias1, bias2 = (key.removesuffix("weight") + "bias" for key in (FC1, FC2))
    up, up_bias = (
        interleaved_gate_up(key, hf + name, width=width, when="moe", ffn="moe_ffn")
        for key, name, width in ((FC1, "gate_up_proj", ("hidden",)), (bias1, "gate_up_proj_bias", ()))
    )
    down = same(FC2, hf + "down_proj", ("hidden", "moe_ffn"), cut=columns("moe_ffn"), when="moe")
    down_bias = same(bias2, hf + "down_proj_bias", ("hidden",), when="moe")
    matrices = (experts(rule, "stacked", transposed=True) for rule in (up, down))
    return (*matrices, *(experts(rule, "stacked") for rule in (up_bias, down_bias)))


def shared_expert(hf: str, gate: str = "") -> tuple[Rule, ...]:
    """The expert of every token: `hf` + gate_proj, up_proj, down_proj; `gate`: name of its sigmoid gate."""
    shared = M + "mlp.shared_experts."
    rules = (
        gate_up(
            shared + "linear_fc1.weight",
            hf + "gate_proj.weight",
            hf + "up_proj.weight",
            width=("hidden",),
            when="moe shared_experts",
            ffn="shared_ffn",
        ),
        same(
            shared + "linear_fc2.weight",
            hf + "down_proj.weight",
            ("hidden", "shared_ffn"),
            cut=columns("shared_ffn"),
            when="moe shared_experts",
        ),
    )
    return (*rules, same(shared + "gate_weight", gate, ("one", "hidden"), when="moe shared_gate")) if gate else rules


MOE_MLP: tuple[Rule, ...] = (
    *router(H + "mlp.gate"),
    *experts_each(*(H + f"mlp.experts.{{e}}.{name}_proj.weight" for name in ("gate", "up", "down"))),
    *experts_stacked(H + "mlp.experts.gate_up_proj", H + "mlp.experts.down_proj"),
)
"""`mlp.gate` and `mlp.experts`, the names of most families."""

MOE_DECODER: tuple[Rule | Drop, ...] = (*without_dense_mlp(DECODER), *MOE_MLP)
"""A decoder with such layers, and dense ones among them where the model has them."""


def with_experts(
    config: Fields, layers: Sequence[LayerSpec] = (), sparse: Callable[[int], bool] = lambda _layer: True
) -> tuple[LayerSpec, ...]:
    """The layers (none given: default ones), those that are `sparse` with experts in place of the MLP."""
    default = layers or (LayerSpec(),) * config.integer("num_hidden_layers")
    return tuple(replace(layer, mlp="moe") if sparse(n) else layer for n, layer in enumerate(default))


def sparse_steps(config: Fields, layers: Sequence[LayerSpec] = ()) -> tuple[LayerSpec, ...]:
    """The same as `decoder_sparse_step` and `mlp_only_layers` say (Qwen2-MoE, Qwen3-MoE)."""
    step, dense = config.integer("decoder_sparse_step", 1), config.take("mlp_only_layers", [])
    return with_experts(config, layers, lambda layer: layer not in dense and (layer + 1) % step == 0)


def no_router_loss(config: Fields) -> None:
    """Fields of the auxiliary loss, which transformers adds only with output_router_logits: refused when on."""
    config.require("output_router_logits", False)
    for name in ("router_aux_loss_coef", "router_z_loss_coef", "aux_loss_alpha"):
        config.take(name)


def moe_spec(
    config: Fields,
    *,
    num_experts: tuple[str, ...] = ("num_experts", "num_local_experts"),
    ffn: str = "moe_intermediate_size",
    score: Literal["softmax", "topk_softmax", "sigmoid"] = "softmax",
    normalize: bool | None = None,
    defaults: tuple[int | None, ...] = (),
    **features: object,
) -> MoeSpec:
    """Reads the fields that every mixture has; `num_experts` (the spellings), `ffn`: their names; `defaults`: of
    (experts, top k, width).

    normalize None: the field norm_topk_prob, false if absent.
    """
    no_router_loss(config)
    number, top_k, width = (*defaults, None, None, None)[:3]
    name = next((name for name in num_experts if config.take(name) is not None), num_experts[0])
    count, k = config.integer(name, number), config.integer("num_experts_per_tok", top_k)
    if k > count:
        raise config.refused("num_experts_per_tok", f"is {k}; there are {count} experts")
    moe = MoeSpec(
        num_experts=count,
        top_k=k,
        ffn_hidden_size=config.integer(ffn, width),
        score=score,
        normalize=config.flag("norm_topk_prob", False) if normalize is None else normalize,
        **features,  # type: ignore[arg-type]
    )
    _check_groups(config, moe)
    return moe


def _check_groups(config: Fields, moe: MoeSpec) -> None:
    """Groups of one size, in which there are as many experts as a token is sent to."""
    count, groups, best = moe.num_experts, moe.num_groups, moe.topk_groups
    if count % groups:
        raise config.refused("n_group", f"is {groups}, which does not divide the {count} experts")
    if best > groups:
        raise config.refused("topk_group", f"is {best}; there are {groups} groups")
    if groups > 1 and moe.group_score == "top2" and count // groups < 2:
        raise config.refused("n_group", f"is {groups}, but a group of {count} experts is worth its best two")
    if moe.top_k > best * (count // groups):
        raise config.refused(
            "num_experts_per_tok", f"is {moe.top_k}, but {best} groups of {count // groups} experts are chosen"
        )
