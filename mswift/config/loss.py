"""When the output layer and its loss are computed in pieces, and how large a piece is. No torch."""

from typing import Literal

LossFusion = Literal["auto", "true", "false"]

FUSED_FROM_TOKENS = 8192
"""`auto` fuses from so many tokens of a microbatch on one rank."""

PIECE_ELEMENTS = 2**26
"""Logits of one piece on one rank: 256 MiB in fp32."""

_PIECE_STEP = 64  # a matrix product with a ragged number of rows is slower


def is_fused(fusion: LossFusion, num_tokens: int) -> bool:
    """Whether the loss of a microbatch of `num_tokens` on this rank is computed without its whole logits."""
    return fusion == "true" or (fusion == "auto" and num_tokens >= FUSED_FROM_TOKENS)


def piece_tokens(vocab_columns: int) -> int:
    """Tokens whose logits (`vocab_columns` of this rank each) exist at one time."""
    return max(PIECE_ELEMENTS // max(vocab_columns, 1) // _PIECE_STEP, 1) * _PIECE_STEP
