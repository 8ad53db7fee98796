"""The fused linear cross-entropy against torch's linear and cross_entropy: value and gradients, over ranks, in pieces.

Shapes: s sequence, b batch, h hidden, V vocabulary. Small pieces are forced: five tokens on each rank.
"""

from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F

from tests.support.ranks import join, run_ranks

S, B, H = 12, 2, 16
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "divisor": {"divisor": 4.0},
    "softcap": {"softcap": 5.0},
    "both": {"divisor": 0.5, "softcap": 2.0},
    "frozen weight": {"frozen": True},
    "bf16": {"dtype": torch.bfloat16},
    "five rows": {"vocab": 5},  # of four ranks the last has none
    "one piece": {"piece": 10**6},
}
LAYOUTS = [(1, False), (2, False), (2, True), (4, True)]
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1.6e-2}  # bf16: logits and their gradient are rounded, as in a linear


def inputs(case: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    """hidden [s, b, h], weight [V, h], labels and loss weights [s, b]; one label means nothing."""
    generator = torch.Generator().manual_seed(3)
    vocab, dtype = case.get("vocab", 103), case.get("dtype", torch.float32)
    hidden, weight = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((S, B, H), (vocab, H)))
    labels = torch.randint(0, vocab, (S, B), generator=generator)
    weights = torch.rand(S, B, generator=generator)
    labels[3, 1], weights[3, 1] = -100, 0.0
    return hidden, weight, labels, weights


def on_rank(payload: dict[str, Any]) -> list[dict[str, torch.Tensor | None]]:
    """Loss and this rank's gradients of every case; the padded rows of the weight are huge, so a leak shows."""
    world_size, parallel = payload["world_size"], payload["sequence_parallel"]
    join(world_size, tp=world_size, sequence_parallel=parallel)
    with patch_all(payload["broken"]):
        return [fused(case, world_size, parallel) for case in CASES.values()]


def patch_all(broken: str | None) -> Any:
    """One collective of the fused loss left out."""
    import torch.distributed as dist

    from mswift.parallel import fused_loss

    def first_part(out: torch.Tensor, whole: torch.Tensor, group: Any = None) -> None:
        out.copy_(whole.chunk(dist.get_world_size())[dist.get_rank()])

    places = {
        "all_reduce": (fused_loss.dist, "all_reduce", lambda *_, **__: None),
        "reduce_scatter": (fused_loss.dist, "reduce_scatter_tensor", first_part),
        None: (fused_loss, "__doc__", ""),
    }
    return patch.object(*places[broken])


def fused(case: dict[str, Any], world_size: int, parallel: bool) -> dict[str, torch.Tensor | None]:
    """One case on this rank."""
    import torch.distributed as dist

    from mswift.parallel import fused_loss

    hidden, weight, labels, weights = inputs(case)
    width, rank = -(-weight.shape[0] // world_size), dist.get_rank()
    padded = F.pad(weight, (0, 0, 0, width * world_size - weight.shape[0]), value=50.0)
    local = padded[rank * width : (rank + 1) * width].clone().requires_grad_(not case.get("frozen", False))
    mine = hidden.chunk(world_size)[rank] if parallel else hidden
    mine = mine.clone().requires_grad_()
    layer = fused_loss.OutputLayer(
        vocab_size=weight.shape[0],
        first_row=rank * width,
        group=dist.group.WORLD,
        sequence_parallel=parallel,
        divisor=case.get("divisor", 1.0),
        softcap=case.get("softcap"),
    )
    with patch.object(fused_loss, "piece_tokens", lambda _: case.get("piece", 5)):
        loss, losses = fused_loss.fused_linear_cross_entropy(mine, local, labels, weights, layer)
        with torch.no_grad():
            evaluated, _ = fused_loss.fused_linear_cross_entropy(mine, local, labels, weights, layer)
    (loss * 0.5).backward()  # a schedule may scale the loss
    losses = torch.where(weights > 0, losses, 0.0)
    return {"loss": loss.detach(), "evaluated": evaluated, "losses": losses, "hidden": mine.grad, "weight": local.grad}


def expected(case: dict[str, Any]) -> dict[str, torch.Tensor | None]:
    """torch's own, in fp32 from the same values."""
    hidden, weight, labels, weights = inputs(case)
    hidden, weight = (x.float().requires_grad_() for x in (hidden, weight))
    logits = F.linear(hidden, weight) / case.get("divisor", 1.0)
    if "softcap" in case:
        logits = case["softcap"] * torch.tanh(logits / case["softcap"])
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    loss = (losses * weights.flatten()).sum()
    (loss * 0.5).backward()
    losses = torch.where(weights > 0, losses.detach().view(weights.shape), 0.0)
    return {"loss": loss.detach(), "losses": losses, "hidden": hidden.grad, "weight": weight.grad}


def differences(world_size: int, parallel: bool, broken: str | None = None) -> dict[str, dict[str, float]]:
    """max|a - b| / max|b| of loss and gradients, by case."""
    payload = {"world_size": world_size, "sequence_parallel": parallel, "broken": broken}
    ranks = run_ranks(world_size, on_rank, payload)
    out = {}
    for number, (name, case) in enumerate(CASES.items()):
        found, truth = [rank[number] for rank in ranks], expected(case)
        rows = truth["weight"].shape[0]  # type: ignore[union-attr]
        hidden = torch.cat([rank["hidden"] for rank in found]) if parallel else found[0]["hidden"]
        parts = {"loss": found[-1]["loss"], "evaluated": found[-1]["evaluated"], "hidden": hidden}
        parts["losses"] = found[-1]["losses"]
        if case.get("frozen"):
            assert all(rank["weight"] is None for rank in found)
        else:
            parts["weight"] = torch.cat([rank["weight"] for rank in found])
            assert not parts["weight"][rows:].any()
            parts["weight"] = parts["weight"][:rows]
        truth["evaluated"] = truth["loss"]
        out[name] = {
            what: float((value.float() - truth[what]).abs().max() / truth[what].abs().max())  # type: ignore[union-attr]
            for what, value in parts.items()
        }
    return out


@pytest.mark.parametrize(("world_size", "parallel"), LAYOUTS)
def test_equals_torch(world_size: int, parallel: bool) -> None:
    for name, apart in differences(world_size, parallel).items():
        assert max(apart.values()) <= TOLERANCE[CASES[name].get("dtype", torch.float32)], (name, apart)


@pytest.mark.parametrize(("parallel", "broken"), [(False, "all_reduce"), (True, "reduce_scatter")])
def test_without_a_collective_it_differs(parallel: bool, broken: str) -> None:
    assert differences(2, parallel, broken)["plain"]["hidden"] > 1e-3
