"""Mamba-2's recurrence on PyTorch alone: the chunked form of the state space duality (Dao and Gu 2024, section 6).

Shapes: b batch, s sequence, g groups of heads that share B and C, r heads a group, p head dimension, n state size;
k chunks of l positions (m: a second index over them).
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def causal_convolution(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """silu of a convolution of each channel with its own kernel: x [s, b, c], weight [c, 1, width] -> [b, s, c]."""
    channels, _, width = weight.shape
    out = F.conv1d(x.permute(1, 2, 0), weight, bias, padding=width - 1, groups=channels)
    return F.silu(out[..., : x.shape[0]].transpose(1, 2))


def decay_between(log_decay: Tensor) -> Tensor:
    """log_decay [..., l] of each position -> [..., l, m]: what is left at l of what came in at m, zero where m > l.

    Sums from m + 1 to l are added up for every m by themselves: a difference of two long sums would lose digits.
    """
    length = log_decay.shape[-1]
    ones = torch.ones(length, length, dtype=torch.bool, device=log_decay.device)
    terms = log_decay.unsqueeze(-1).expand(*log_decay.shape, length).masked_fill(~ones.tril(-1), 0)
    return terms.cumsum(-2).masked_fill(~ones.tril(), -torch.inf).exp()


def chunks_of(x: Tensor, length: int) -> Tensor:
    """[b, s, ...] -> [b, k, l, ...], zeros behind the end."""
    short = -x.shape[1] % length
    padded = F.pad(x, (0, 0) * (x.dim() - 2) + (0, short)) if short else x
    return padded.unflatten(1, (-1, length))


def state_space_scan(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, chunk_size: int) -> Tensor:
    """y_t = C_t h_t of the states h_t = exp(dt_t a) h_(t-1) + dt_t x_t B_t, from h = 0; all fp32.

    x [b, s, g, r, p], dt [b, s, g, r] positive, a [g, r] negative, b and c [b, s, g, n] -> [b, s, g, r, p].
    """
    s = x.shape[1]
    log_decay = chunks_of(dt * a, chunk_size).permute(0, 1, 3, 4, 2)  # [b, k, g, r, l]
    x, b, c = (chunks_of(t, chunk_size) for t in (x * dt.unsqueeze(-1), b, c))
    inside = decay_between(log_decay) * torch.einsum("bklgn,bkmgn->bkglm", c, b).unsqueeze(3)
    y = torch.einsum("bkgrlm,bkmgrp->bklgrp", inside, x)
    to_here = log_decay.cumsum(-1)
    to_end = (log_decay.flip(-1).cumsum(-1).flip(-1) - log_decay).exp()
    states = torch.einsum("bklgrp,bklgn->bkgrpn", x * _per_position(to_end), b)
    before = states_before(states, to_here[..., -1].exp()[..., None, None])
    y = y + torch.einsum("bklgn,bkgrpn->bklgrp", c, before) * _per_position(to_here.exp())
    return y.flatten(1, 2)[:, :s]


def _per_position(decay: Tensor) -> Tensor:
    """[b, k, g, r, l] -> [b, k, l, g, r, 1]."""
    return decay.permute(0, 1, 4, 2, 3).unsqueeze(-1)


def states_before(states: Tensor, decay: Tensor) -> Tensor:
    """The state at the start of every chunk: states [b, k, ...] that each chunk adds, decay over each chunk."""
    state, before = torch.zeros_like(states[:, 0]), []
    for added, left in zip(states.unbind(1), decay.unbind(1), strict=True):
        before.append(state)
        state = state * left + added
    return torch.stack(before, 1)
