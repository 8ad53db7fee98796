"""Multi-token-prediction layers (DeepSeek-V3, GLM-4.5): what they have beside the decoder layer inside them."""

from collections.abc import Sequence

from mswift.converters.rule import MTP_LAYERS, Drop, Rule
from mswift.converters.rules import drop, in_mtp, rows, same

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
P = MTP_LAYERS
H = "model.layers.{l}."

MTP: tuple[Rule | Drop, ...] = (
    same(P + "enorm.weight", H + "enorm.weight", ("hidden",)),
    same(P + "hnorm.weight", H + "hnorm.weight", ("hidden",)),
    same(P + "eh_proj.weight", H + "eh_proj.weight", ("hidden", "2*hidden"), cut=rows("hidden")),
    same(P + "final_layernorm.weight", H + "shared_head.norm.weight", ("hidden",)),
    drop(H + "embed_tokens.weight", f"equal to {EMBEDDING}", same_as=EMBEDDING, when="mtp_layer"),
    drop(H + "shared_head.head.weight", f"equal to {HEAD}", same_as=HEAD, when="mtp_layer"),
)
"""Joining the hidden state with the next token's embedding; embedding and head are those of the model."""


def with_mtp(table: Sequence[Rule | Drop]) -> tuple[Rule | Drop, ...]:
    """The table of a decoder whose multi-token-prediction layers hold a layer like its own."""
    inside = (in_mtp(rule) for rule in table if isinstance(rule, Rule) and rule.in_layer)
    return (*table, *inside, *MTP)
