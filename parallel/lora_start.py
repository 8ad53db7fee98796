"""Adapters that start from the weight of their base: magnitudes of DoRA, PiSSA and OLoRA. After weights are loaded.

The base is not touched: what PEFT subtracts from its weight (scale * B @ A of the start) is kept beside A and B and
taken off in the forward pass (`LoraPair.start_A`). Every rank gets the same bits: one of them computes.
Shapes: o, i features of an HF linear, r rank.
"""

import hashlib
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mswift.parallel.fused_lora import FusedLora
from mswift.parallel.lora import SLOT, LoraPair, Slot
from mswift.tuners.factors import factorised


@torch.no_grad()
def start_from_base(model_chunks: Sequence[nn.Module], seed: int) -> None:
    """Give the adapters of these chunks the values that depend on the weights below them."""
    for chunk in model_chunks:
        for module in chunk.modules():
            lora = getattr(module, "lora", None)
            if isinstance(lora, FusedLora):
                _start(lora, module.weight, seed)  # type: ignore[arg-type]


def _start(lora: FusedLora, weight: Tensor, seed: int) -> None:
    pairs, places = lora.pairs(), _places(lora, weight.device)
    for leaf, pair in pairs.items():
        if pair.adapted.starts_in_weight:
            _start_in_weight(lora, pair, weight[places[leaf]], seed)
    if lora.dora:
        lengths = lora.lengths(weight)
        for leaf, pair in pairs.items():
            assert pair.lora_magnitude_vector is not None
            pair.lora_magnitude_vector.copy_(lengths[places[leaf]])


def _places(lora: FusedLora, device: torch.device) -> dict[str, Tensor]:
    """Leaf -> int64 [o]: the rows of the base in which the rows of that linear lie."""
    sizes = [len(pair.lora_B) for pair in lora.pairs().values()]
    numbers = torch.arange(1, sum(sizes) + 1, device=device)[:, None].split(sizes)  # 0: rows without an adapter
    laid = lora.laid_out(dict(zip(lora.pairs(), numbers, strict=True)))[:, 0]
    found = laid.argsort()[int((laid == 0).sum()) :]
    return dict(zip(lora.pairs(), found.split(sizes), strict=True))


def _start_in_weight(lora: FusedLora, pair: LoraPair, weight: Tensor, seed: int) -> None:
    """A and B, and their starts, from this rank's part [o, i] of the weight of one linear."""
    whole, group, adapted = _gathered(lora, pair, weight), lora.group, pair.adapted
    a = weight.new_empty(adapted.rank, adapted.in_features)
    b = weight.new_empty(adapted.out_features, adapted.rank)
    if group.rank() == 0:
        key = hashlib.sha256(f"{seed}:{adapted.name_a}".encode()).digest()
        factors = factorised(
            whole.float(), adapted.rank, adapted.scale, adapted.init, int.from_bytes(key[:7], "little")
        )
        a, b = (factor.to(weight.dtype).contiguous() for factor in factors)
    if group.size() > 1:
        for matrix in (a, b):
            dist.broadcast(matrix, group_src=0, group=group)
    for parameter, start, full in ((pair.lora_A, pair.start_A, a), (pair.lora_B, pair.start_B, b)):
        slot: Slot = getattr(parameter, SLOT)
        regions = [full[tuple(slice(o, o + s) for o, s in zip(r.offsets, r.sizes, strict=True))] for r in slot.regions]
        parameter.copy_(torch.cat(regions))
        assert start is not None
        start.copy_(parameter)


def _gathered(lora: FusedLora, pair: LoraPair, weight: Tensor) -> Tensor:
    """The whole weight [o, i] of a linear, on every rank of the group."""
    size = lora.group.size()
    if lora.whole or size == 1:
        return weight
    parts = [torch.empty_like(weight) for _ in range(size)]
    dist.all_gather(parts, weight.contiguous(), group=lora.group)
    if lora.row:
        return torch.cat(parts, dim=1)
    blocks = [rows for leaf, rows in lora.blocks if leaf == pair.adapted.leaf]
    slot: Slot = getattr(pair.lora_B, SLOT)
    whole = weight.new_empty(pair.adapted.out_features, weight.shape[1])
    mine = [region.offsets[0] for region in slot.regions]
    for rank, piece in enumerate(parts):
        row = 0
        for first, rows in zip(mine, blocks, strict=True):
            there = first + (rank - lora.group.rank()) * rows
            whole[there : there + rows] = piece[row : row + rows]
            row += rows
    return whole
