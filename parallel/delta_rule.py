"""The gated delta rule on PyTorch alone, in chunks (Yang, Kautz and Hatamizadeh 2024, section 3.3).

Shapes: b batch, s sequence, g key heads, r value heads that share a key head, d key dimension, p value dimension;
k chunks of l positions (m: a second index over them).
"""

import torch
from torch import Tensor

from mswift.parallel.state_space import chunks_of, decay_between

CHUNK = 64


def unit_length(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x / |x| over the last dimension."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + eps)


def gated_delta_rule(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor) -> Tensor:
    """o_t = S_t^T q_t / sqrt(d), S_t = a_t S + beta_t k_t (v_t - a_t S^T k_t)^T with S = S_(t-1), a = exp(log_decay).

    q and k [b, s, g, d] of unit length, v [b, s, g, r, p], log_decay and beta [b, s, g, r]; all fp32; from S = 0.
    The corrected values u_t = beta_t (v_t - ...) of a chunk solve a triangular system, whose right side is linear in
    the state at its start. Returns [b, s, g, r, p].
    """
    s = q.shape[1]
    q = q * q.shape[-1] ** -0.5
    q, k, v, beta = (chunks_of(t, CHUNK) for t in (q, k, v, beta))
    log_decay = chunks_of(log_decay, CHUNK).permute(0, 1, 3, 4, 2)  # [b, k, g, r, l]
    beta = beta.permute(0, 1, 3, 4, 2).unsqueeze(-1)  # [b, k, g, r, l, 1]
    v = v.permute(0, 1, 3, 4, 2, 5)
    between = decay_between(log_decay)  # [b, k, g, r, l, m]
    to_here = log_decay.cumsum(-1).exp().unsqueeze(-1)
    to_end = between[..., -1, :].unsqueeze(-1)
    keys = k.permute(0, 1, 3, 2, 4).unsqueeze(3)  # [b, k, g, 1, l, d]
    queries = q.permute(0, 1, 3, 2, 4).unsqueeze(3)
    system = (beta * between * (keys @ keys.mT)).tril(-1)
    right = torch.cat([beta * v, (beta * to_here) * keys], dim=-1)
    solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    values, reads = solved.split([v.shape[-1], k.shape[-1]], dim=-1)
    scores = between * (queries @ keys.mT)
    parts = (values, reads, scores, queries * to_here, (keys * to_end).mT, to_here[..., -1:, :])
    out, state = [], v.new_zeros(*v.shape[:1], *v.shape[2:4], k.shape[-1], v.shape[-1])
    for value, read, score, query, key, decay in zip(*(t.unbind(1) for t in parts), strict=True):
        corrected = value - read @ state
        out.append(query @ state + score @ corrected)
        state = decay * state + key @ corrected
    return torch.stack(out, 1).permute(0, 1, 4, 2, 3, 5).flatten(1, 2)[:, :s]
