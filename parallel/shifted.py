"""Shifted sparse attention of LongLoRA (Chen et al. 2023, arXiv 2309.12307, section 3.2), for training.

A row of s positions is cut into groups of s / 4. The first half of the heads attends within groups; so does the second
half, its groups cut half a group further on, so that neighbouring groups meet. The paper rolls rows by half a group and
back: its last group then joins the end of the row to the beginning, which sees the end. Here these are two groups.

Shapes: s rows, b batch, h query heads, g KV heads, d head dimension (v: of values).
"""

from types import SimpleNamespace

import torch
from torch import Tensor

from mswift.errors import LayoutError
from mswift.parallel.attention.core import SdpaAttention

GROUPS = 4
"""Groups of a row; the paper's ratio of a group to the row is a quarter."""


def shifted_attention(core: SdpaAttention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """query [s, b, h, d], key [s, b, g, d], value [s, b, g, v] -> [s, b, h, v]. LayoutError for an odd cut."""
    s, _, h, _ = query.shape
    size = s // GROUPS
    if s % GROUPS or size % 2 or h % 2:
        raise LayoutError(
            f"--tuner_type longlora: {s} positions and {h} heads are not cut into {GROUPS} even groups and two halves: "
            "use a model with an even number of heads, and rows of a multiple of 8 positions"
        )
    if key.shape[2] % 2:
        key, value = (x.repeat_interleave(h // x.shape[2], dim=2) for x in (key, value))
    cuts = ((size,) * GROUPS, (size // 2, *(size,) * (GROUPS - 1), size // 2))
    sinks = (None, None) if core.sinks is None else core.sinks.chunk(2)
    halves = zip(*(x.chunk(2, dim=2) for x in (query, key, value)), strict=True)
    out = []
    for heads, lengths, own_sinks in zip(halves, cuts, sinks, strict=True):
        core.sinks = own_sinks
        out.append(core(*heads, packed_seq_params=SimpleNamespace(lengths=lengths)).unflatten(-1, (h // 2, -1)))
    return torch.cat(out, dim=2)
