"""Windows, soft-caps and sinks, in blocks of queries, against transformers' eager attention; forward and backward."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from mswift.parallel.attention import core, kernels, tiles

S, B, G, R, D = 37, 2, 2, 3, 8
CONFIG = SimpleNamespace(context_parallel_size=1)
CASES: dict[str, dict[str, Any]] = {
    "causal": {},
    "window": {"window": 5},
    "window of one": {"window": 1},
    "window as long as the sequence": {"window": S},
    "soft-cap": {"softcap": 0.7},
    "soft-cap, window": {"softcap": 0.7, "window": 11},
    "scale": {"softmax_scale": 0.3, "window": 7},
    "sinks": {"sinks": True},
    "sinks, window": {"sinks": True, "window": 6},
}


def inputs() -> list[Tensor]:
    """query, key, value as megatron-core has them, and the gradient of the output."""
    generator = torch.Generator().manual_seed(3)
    shapes = ((S, B, G * R, D), (S, B, G, D), (S, B, G, D), (S, B, G * R * D))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


def eager(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, case: dict[str, Any]) -> Tensor:
    """transformers': Gemma 2's code with a soft-cap, GPT-OSS's with sinks."""
    from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward as gemma
    from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward as oss

    behind = torch.arange(S)[:, None] - torch.arange(S)
    mask = torch.where((behind >= 0) & (behind < case.get("window", S)), 0.0, float("-inf")).double()[None, None]
    module = SimpleNamespace(num_key_value_groups=R, sinks=sinks, training=False, head_dim=D)
    heads = (t.permute(1, 2, 0, 3) for t in (q, k, v))
    scale = case.get("softmax_scale", D**-0.5)
    if sinks is not None:
        out, _ = oss(module, *heads, mask, scaling=scale, dropout=0.0)  # type: ignore[arg-type]
    else:
        out, _ = gemma(module, *heads, mask, scaling=scale, softcap=case.get("softcap"))  # type: ignore[arg-type]
    return out.transpose(0, 1).flatten(2)


@pytest.mark.parametrize("block", [8, 36, 1024])
@pytest.mark.parametrize("name", CASES)
def test_equals_transformers(name: str, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "BLOCK", block)
    monkeypatch.setattr(tiles, "BLOCK", block)
    tiles.tiles.cache_clear()
    case = dict(CASES[name])
    sinks = torch.linspace(-1, 2, G * R, dtype=torch.float64, requires_grad=True) if case.pop("sinks", False) else None
    module = core.SdpaAttention(CONFIG, **case)
    module.sinks = sinks
    q, k, v, gradient = inputs()
    leaves = [q, k, v] if sinks is None else [q, k, v, sinks]
    found, truth = module(q, k, v), eager(q, k, v, sinks, case)
    assert torch.allclose(found, truth, atol=1e-6)  # the softmax is in fp32 on both sides
    for mine, theirs in zip(
        torch.autograd.grad(found, leaves, gradient), torch.autograd.grad(truth, leaves, gradient), strict=True
    ):
        assert torch.allclose(mine, theirs, atol=1e-5)


def test_scores_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the backward pass keeps of a soft-capped layer grows with s, not with s * s."""
    monkeypatch.setattr(kernels, "BLOCK", 4)
    q, k, v, _ = inputs()
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        core.SdpaAttention(CONFIG, softcap=1.0)(q, k, v)
    assert max(kept) <= q.numel()


def test_what_it_cannot_do_is_refused() -> None:
    q, k, v, _ = inputs()
    with pytest.raises(NotImplementedError, match="takes no mask"):
        core.SdpaAttention(CONFIG)(q, k, v, torch.ones(1))
