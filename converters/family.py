"""A family: one architecture as a table of rules, and a function from its config.json to the model's numbers."""

from collections.abc import Callable
from dataclasses import dataclass

from mswift.converters.fields import Fields
from mswift.converters.rule import Drop, Rule
from mswift.converters.spec import LayerSpec, ModelSpec


@dataclass(frozen=True)
class Family:
    """`spec` must take every config field that changes the function; what it leaves unread is refused.

    spellings: features of which exactly one holds, depending on how a checkpoint names its tensors
    ("experts_each", "experts_stacked"); the first is written where nothing says otherwise.
    optional_mtp_layers: prediction layers that some checkpoints hold, of which their config.json says nothing.
    """

    model_type: str
    architecture: str
    table: tuple[Rule | Drop, ...]
    spec: Callable[[Fields], ModelSpec]
    spellings: tuple[str, ...] = ()
    optional_mtp_layers: tuple[LayerSpec, ...] = ()


def sizes_of(spec: ModelSpec) -> dict[str, int]:
    """The names that tables use for sizes."""
    sizes = {
        "one": 1,
        "layers": spec.num_layers,
        "hidden": spec.hidden_size,
        "heads": spec.num_attention_heads,
        "groups": spec.num_kv_heads,
        "heads_per_group": spec.num_attention_heads // spec.num_kv_heads,
        "head_dim": spec.head_dim,
        "ffn": spec.ffn_hidden_size,
        "vocab": spec.vocab_size,
    }
    if spec.moe is not None:
        sizes |= {
            "experts": spec.moe.num_experts,
            "moe_ffn": spec.moe.ffn_hidden_size,
            "shared_ffn": spec.moe.shared_ffn_hidden_size,
        }
    if spec.mla is not None:
        mla = spec.mla
        sizes |= {
            "q_rank": mla.q_lora_rank or 0,
            "kv_rank": mla.kv_lora_rank,
            "rope_dim": mla.qk_rope_head_dim,
            "qk_dim": mla.qk_nope_head_dim + mla.qk_rope_head_dim,
            "kv_up_dim": mla.qk_nope_head_dim + mla.v_head_dim,
            "v_dim": mla.v_head_dim,
        }
    if spec.mamba is not None:
        mamba = spec.mamba
        sizes |= {
            "mamba_heads": mamba.num_heads,
            "mamba_head_dim": mamba.head_dim,
            "mamba_inner": mamba.num_heads * mamba.head_dim,
            "mamba_groups": mamba.num_groups,
            "mamba_state": mamba.state_size,
            "mamba_conv": mamba.conv_kernel,
        }
    if spec.delta is not None:
        delta = spec.delta
        sizes |= {
            "delta_key_heads": delta.num_key_heads,
            "delta_value_heads": delta.num_value_heads,
            "delta_values_per_key": delta.num_value_heads // delta.num_key_heads,
            "delta_key_dim": delta.key_head_dim,
            "delta_value_dim": delta.value_head_dim,
            "delta_conv": delta.conv_kernel,
        }
    return sizes


def features_of(spec: ModelSpec, layer: LayerSpec | None = None, spelling: str = "") -> set[str]:
    """The names that tables use in `when`: of the model, and of one layer."""
    flags = {
        spelling: True,
        "tied": spec.tied_embeddings,
        "untied": not spec.tied_embeddings,
        "qkv_bias": spec.qkv_bias,
        "attention_out_bias": spec.attention_out_bias,
        "mlp_bias": spec.mlp_bias,
        "qk_norm": spec.qk_norm == "head",
        "qk_norm_width": spec.qk_norm == "width",
        "layer_norm": spec.norm == "layer",
        "pre_norm": spec.pre_norm,
        "post_norm": spec.post_norm,
        "sinks": spec.attention_sinks,
        "mtp": bool(spec.mtp_layers),
    }
    if spec.moe is not None:
        flags |= {
            "router_bias": spec.moe.router_bias,
            "expert_bias": spec.moe.expert_bias,
            "correction_bias": spec.moe.correction_bias,
            "shared_experts": spec.moe.shared_ffn_hidden_size > 0,
            "shared_gate": spec.moe.shared_gate,
        }
    if spec.mla is not None:
        flags |= {"q_lora": spec.mla.q_lora_rank is not None, "q_direct": spec.mla.q_lora_rank is None}
    if layer is not None:
        flags |= {layer.mixer: layer.mixer != "none", layer.mlp: layer.mlp != "none"}
    return {name for name, on in flags.items() if on}


def holds(when: str, features: set[str]) -> bool:
    """Whether every name of `when` is a feature; a name behind "!" must not be one."""
    return all((name[1:] not in features) if name.startswith("!") else (name in features) for name in when.split())
