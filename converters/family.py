"""A family: one architecture as a table of rules, and a function from its config.json to the model's numbers."""

from collections.abc import Callable
from dataclasses import dataclass

from mswift.converters.fields import Fields
from mswift.converters.rules import Drop, Rule
from mswift.converters.spec import ModelSpec


@dataclass(frozen=True)
class Family:
    """`spec` must take every config field that changes the function; what it leaves unread is refused."""

    model_type: str
    architecture: str
    table: tuple[Rule | Drop, ...]
    spec: Callable[[Fields], ModelSpec]


def sizes_of(spec: ModelSpec) -> dict[str, int]:
    """The names that tables use for sizes."""
    return {
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


def features_of(spec: ModelSpec) -> set[str]:
    """The names that tables use in `when`."""
    flags = {
        "": True,
        "untied": not spec.tied_embeddings,
        "qkv_bias": spec.qkv_bias,
        "attention_out_bias": spec.attention_out_bias,
        "mlp_bias": spec.mlp_bias,
        "qk_norm": spec.qk_norm,
    }
    return {name for name, on in flags.items() if on}
