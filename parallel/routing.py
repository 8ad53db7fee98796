"""Which experts a token goes to, and with which weights: as transformers' MoE models compute it, in fp32.

Shapes: n tokens, e experts, k experts chosen for a token, g groups of experts.
"""

import torch
from torch import Tensor

from mswift.converters.spec import MoeSpec

_SMALL = 1e-20  # of DeepSeek-V3's code: below fp32's resolution of any sum of scores but one of zeros


def route(logits: Tensor, correction: Tensor | None, moe: MoeSpec) -> tuple[Tensor, Tensor]:
    """fp32 router logits [n, e] -> (weights [n, k], chosen experts [n, k]).

    correction [e] is added to the scores for the choice, not for the weights (DeepSeek-V3, section 2.1.2).
    """
    if moe.score == "topk_softmax":
        best, chosen = logits.topk(moe.top_k, dim=-1)
        return best.softmax(dim=-1) * moe.scale, chosen
    scores = logits.sigmoid() if moe.score == "sigmoid" else logits.softmax(dim=-1)
    wanted = scores.detach() if correction is None else scores.detach() + correction
    if moe.num_groups > 1:
        wanted = _only_best_groups(wanted, moe)
    chosen = wanted.topk(moe.top_k, dim=-1).indices
    weights = scores.gather(1, chosen)
    if moe.normalize:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + _SMALL)
    return (weights if moe.scale == 1.0 else weights * moe.scale), chosen


def _only_best_groups(wanted: Tensor, moe: MoeSpec) -> Tensor:
    """[n, e] with -inf for experts outside the best groups: by best expert, or by the sum of the best two."""
    grouped = wanted.unflatten(-1, (moe.num_groups, -1))  # [n, g, e / g]
    worth = grouped.topk(2, dim=-1).values.sum(dim=-1) if moe.group_score == "top2" else grouped.amax(dim=-1)
    best = worth.topk(moe.topk_groups, dim=-1).indices
    outside = torch.ones_like(worth, dtype=torch.bool).scatter(1, best, False)
    return grouped.masked_fill(outside.unsqueeze(-1), float("-inf")).flatten(1)
