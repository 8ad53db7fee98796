"""The vocabulary-parallel loss against torch's cross_entropy, padding included, in fp32 and bf16."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.support.ranks import join, run_ranks

SIZES = [(1, 7), (2, 7), (4, 5), (4, 1003)]  # at 4 ranks a vocabulary of 5 leaves the last rank without a real row


def on_rank(payload: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and local logit gradient of this rank; logits beyond the vocabulary are huge, so a leak shows."""
    world_size, vocab, dtype = payload["world_size"], payload["vocab"], payload["dtype"]
    join(world_size, tp=world_size)
    import torch.distributed as dist

    from mswift.parallel.loss import vocab_parallel_cross_entropy

    width = -(-vocab // world_size)
    first = dist.get_rank() * width
    full = F.pad(payload["logits"], (0, width * world_size - vocab), value=payload["padding"])
    local = full[..., first : first + width].clone().to(dtype).requires_grad_()
    group = dist.group.WORLD
    losses = vocab_parallel_cross_entropy(local, payload["labels"], first_row=first, vocab_size=vocab, group=group)
    (losses * payload["weights"]).sum().backward()
    assert local.grad is not None
    return losses.detach(), local.grad


def expected(payload: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """torch's own."""
    logits = payload["logits"].to(payload["dtype"]).float().clone().requires_grad_()
    losses = F.cross_entropy(logits.flatten(0, 1), payload["labels"].flatten(), reduction="none")
    losses = losses.view(payload["labels"].shape)
    (losses * payload["weights"]).sum().backward()
    assert logits.grad is not None
    return losses.detach(), logits.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("world_size", "vocab"), SIZES)
def test_equals_cross_entropy(world_size: int, vocab: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    payload = {
        "world_size": world_size, "vocab": vocab, "dtype": dtype, "padding": 50.0,
        "logits": 5 * torch.randn(6, 2, vocab), "labels": torch.randint(0, vocab, (6, 2)), "weights": torch.rand(6, 2),
    }  # fmt: skip
    truth, truth_grad = expected(payload)
    ranks = run_ranks(world_size, on_rank, payload)
    gradient = torch.cat([grad for _, grad in ranks], dim=-1).float()
    for losses, _ in ranks:
        assert (losses - truth).abs().max() <= 1e-6 * truth.abs().max()
    tolerance = 1e-6 if dtype == torch.float32 else 8e-3  # one rounding to bf16
    assert (gradient[..., :vocab] - truth_grad).abs().max() <= tolerance * truth_grad.abs().max()
    assert not gradient[..., vocab:].any()


def test_a_label_outside_the_vocabulary_with_weight_zero_does_no_harm() -> None:
    payload: dict[str, Any] = {
        "world_size": 2, "vocab": 7, "dtype": torch.float32, "padding": 50.0, "logits": torch.randn(2, 2, 7),
        "labels": torch.tensor([[1, -100], [6, 3]]), "weights": torch.tensor([[1.0, 0.0], [1.0, 1.0]]),
    }  # fmt: skip
    ranks = run_ranks(2, on_rank, payload)
    gradient = torch.cat([grad for _, grad in ranks], dim=-1)
    assert torch.isfinite(ranks[0][0]).all()
    assert not gradient[0, 1].any()
    payload["labels"][0, 1] = 0
    _, truth_grad = expected(payload)
    assert torch.allclose(gradient[..., :7], truth_grad, atol=1e-6)
