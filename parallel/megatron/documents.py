"""Documents of a packed row, in the form in which megatron-core hands them to every attention layer."""

from dataclasses import dataclass
from itertools import accumulate

import torch
from megatron.core.packed_seq_params import PackedSeqParams


@dataclass
class Documents(PackedSeqParams):
    """`lengths`: positions of each document of the whole row, over all context-parallel ranks."""

    lengths: tuple[int, ...] = ()


def documents(lengths: tuple[int, ...], device: torch.device) -> Documents:
    """The documents of a row of sum(lengths) positions."""
    bounds = torch.tensor(list(accumulate(lengths, initial=0)), dtype=torch.int32, device=device)
    return Documents(
        qkv_format="thd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        cu_seqlens_q_padded=bounds,
        cu_seqlens_kv_padded=bounds,
        max_seqlen_q=max(lengths),
        max_seqlen_kv=max(lengths),
        lengths=lengths,
    )
