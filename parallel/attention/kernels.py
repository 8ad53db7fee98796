"""One tile of attention and its gradient, each with the log-sum-exp of its scores: PyTorch's flash kernels, or plain.

A softmax over many tiles is put together from the outputs and log-sum-exps of each; the backward pass of a tile takes
those of the whole softmax (Dao 2023, arXiv 2307.08691, section 3.1). Shapes: b batch, h query heads, g KV heads, d head
dimension of queries and keys, v of values, t queries and u keys of the tile.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mswift.parallel.attention.tiles import BLOCK, Tile

_flash_ops = torch.ops.aten
LARGEST_FLASH_HEAD = 256
"""Head dimension of CUDA's flash kernels."""


@dataclass(frozen=True)
class Scores:
    """How scores come about: scale * q . k, then c * tanh(x / c) with a soft-cap; a window hides older keys."""

    scale: float
    window: int | None = None
    softcap: float | None = None

    def block(self, query: Tensor, value: Tensor) -> int | None:
        """Largest tile side where all scores are written out; None where a flash kernel takes tiles of any size."""
        return None if self.softcap is None and has_flash(query, value) else BLOCK


def has_flash(query: Tensor, value: Tensor) -> bool:
    """Whether PyTorch has a flash kernel with log-sum-exp for such queries and values."""
    if query.device.type == "cpu":
        return True
    half = query.dtype in (torch.float16, torch.bfloat16)
    return query.device.type == "cuda" and half and max(query.shape[-1], value.shape[-1]) <= LARGEST_FLASH_HEAD


def tile_forward(q: Tensor, k: Tensor, v: Tensor, tile: Tile, scores: Scores) -> tuple[Tensor, Tensor]:
    """q [b, h, t, d], k [b, g, u, d], v [b, g, u, v] -> (out [b, h, t, v], log-sum-exp [b, h, t])."""
    if not _by_flash(q, v, tile, scores):
        return _plain_forward(q, k, v, tile, scores)
    width = v.shape[-1]
    q, k, v = _one_width(q, k, v)
    causal = tile.is_causal(scores.window)
    if q.device.type == "cpu":
        mask = _flash_mask(tile, scores, q)
        out, lse = _flash_ops._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, causal, attn_mask=mask, scale=scores.scale
        )
    else:
        out, lse, *_ = _flash_ops._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, scale=scores.scale)
    return out[..., :width], lse


def tile_backward(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, tile: Tile, scores: Scores
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v; `out` and `lse` are those of the whole softmax, at the queries of the tile."""
    if not _by_flash(q, v, tile, scores):
        return _plain_backward(gradient, q, k, v, out, lse, tile, scores)
    d, width = q.shape[-1], v.shape[-1]
    q, k, v, out, gradient = _one_width(q, k, v, out, gradient)
    causal = tile.is_causal(scores.window)
    if q.device.type == "cpu":
        mask = _flash_mask(tile, scores, q)
        dq, dk, dv = _flash_ops._scaled_dot_product_flash_attention_for_cpu_backward(
            gradient, q, k, v, out, lse, 0.0, causal, attn_mask=mask, scale=scores.scale
        )
    else:
        seed, offset = (
            torch.zeros(2, dtype=torch.uint64, device=q.device),
            torch.empty(0, device=q.device),
        )  # no dropout
        dq, dk, dv = _flash_ops._scaled_dot_product_flash_attention_backward(
            gradient, q, k, v, out, lse, None, None, q.shape[2], k.shape[2], 0.0, causal, seed, offset,
            scale=scores.scale,
        )  # fmt: skip
    return dq[..., :d], dk[..., :d], dv[..., :width]


def visible(tile: Tile, window: int | None, device: torch.device) -> Tensor | None:
    """[t, u] bool: which keys each query sees; None: all."""
    if tile.is_full(window):
        return None
    behind = torch.arange(tile.behind, tile.behind + tile.num_queries, device=device)[:, None]
    behind = behind - torch.arange(tile.num_keys, device=device)
    return behind >= 0 if window is None else (behind >= 0) & (behind < window)


def _by_flash(q: Tensor, v: Tensor, tile: Tile, scores: Scores) -> bool:
    """Whether the flash kernel computes this tile; CUDA's takes no mask."""
    whole = q.device.type == "cpu" or tile.is_full(scores.window) or tile.is_causal(scores.window)
    return scores.softcap is None and whole and has_flash(q, v)


def _flash_mask(tile: Tile, scores: Scores, q: Tensor) -> Tensor | None:
    """[1, 1, t, u], 0 or -inf, where a tile is neither full nor causal."""
    if tile.is_causal(scores.window):
        return None
    seen = visible(tile, scores.window, q.device)
    if seen is None:
        return None
    return torch.zeros(seen.shape, dtype=q.dtype, device=q.device).masked_fill_(~seen, float("-inf"))[None, None]


def _one_width(*tensors: Tensor) -> list[Tensor]:
    """The tensors with head dimensions filled up with zeros to the largest, on CUDA to a multiple of 8."""
    width = max(tensor.shape[-1] for tensor in tensors)
    if tensors[0].device.type == "cuda":
        width = -(-width // 8) * 8
    return [t if t.shape[-1] == width else F.pad(t, (0, width - t.shape[-1])) for t in tensors]


def _plain_scores(q: Tensor, k: Tensor, tile: Tile, scores: Scores) -> tuple[Tensor, Tensor | None]:
    """(scores [b, g, h / g, t, u] in fp32 or more, tanh of them where there is a soft-cap)."""
    b, h, t, d = q.shape
    groups = k.shape[1]
    products = q.reshape(b, groups, h // groups, t, d) @ k.unsqueeze(2).transpose(-1, -2)
    raw = products.to(torch.promote_types(q.dtype, torch.float32)) * scores.scale
    turned = None
    if scores.softcap is not None:
        turned = torch.tanh(raw / scores.softcap)
        raw = turned * scores.softcap
    seen = visible(tile, scores.window, q.device)
    return (raw if seen is None else raw.masked_fill(~seen, float("-inf"))), turned


def _plain_forward(q: Tensor, k: Tensor, v: Tensor, tile: Tile, scores: Scores) -> tuple[Tensor, Tensor]:
    raw, _ = _plain_scores(q, k, tile, scores)
    lse = torch.logsumexp(raw, dim=-1)
    weights = torch.exp(raw - lse.unsqueeze(-1)).to(v.dtype)
    return (weights @ v.unsqueeze(2)).flatten(1, 2), lse.flatten(1, 2)


def _plain_backward(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, tile: Tile, scores: Scores
) -> tuple[Tensor, Tensor, Tensor]:
    groups = (k.shape[1], -1)
    raw, turned = _plain_scores(q, k, tile, scores)
    weights = torch.exp(raw - lse.unflatten(1, groups).unsqueeze(-1))
    grad = gradient.unflatten(1, groups)
    of_values = grad.flatten(2, 3).transpose(-1, -2).to(v.dtype) @ weights.to(v.dtype).flatten(2, 3)
    inner = (grad * out.unflatten(1, groups)).to(raw.dtype).sum(-1, keepdim=True)
    slope = weights * ((grad @ v.unsqueeze(2).transpose(-1, -2)).to(raw.dtype) - inner)
    if turned is not None:
        slope = slope * (1 - turned.square())
    slope = (slope * scores.scale).to(q.dtype)
    of_queries = (slope @ k.unsqueeze(2)).flatten(1, 2)
    of_keys = slope.flatten(2, 3).transpose(-1, -2) @ q.unflatten(1, groups).flatten(2, 3)
    return of_queries, of_keys, of_values.transpose(-1, -2)
