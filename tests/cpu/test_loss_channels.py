"""Weighted losses, and their parts by channel: transformers' logits summed by hand, at any layout and microbatch size.

fp32, fractional weights; at most 1e-5 apart. The parts sum up to the loss, and asking for them changes no gradient.
"""

from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.support.parity import BASE, MODELS, VOCAB, model_of
from tests.support.ranks import join, run_ranks
from tests.support.spaces import MemoryReader, weights_of

NUM_CHANNELS = 4  # the last has no token
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "dp2": (2, {}),
    "cp2": (2, {"cp": 2}),
    "pp2": (2, {"pp": 2}),
    "tp2-sp": (2, {"tp": 2, "sequence_parallel": True}),
}


def rows() -> tuple[torch.Tensor, ...]:
    """Tokens, labels, loss weights, channels [8, 24]."""
    generator = torch.Generator().manual_seed(7)
    tokens = torch.randint(0, VOCAB, (8, 25), generator=generator)
    weights = torch.rand(8, 24, generator=generator) * 3
    weights[weights < 1] = 0
    channels = torch.randint(0, NUM_CHANNELS - 1, (8, 24), generator=generator, dtype=torch.uint8)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), weights, channels


@cache
def expected() -> tuple[dict[str, Any], Any, list[tuple[float, float]]]:
    """config.json, weights, and by channel the sums of weighted losses and of weights; those of all come first."""
    model = model_of(BASE | MODELS["llama"])
    tokens, labels, weights, channels = rows()
    with torch.no_grad():
        losses = F.cross_entropy(model(tokens).logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(
            weights
        )
    parts = [torch.ones_like(channels, dtype=torch.bool), *(channels == number for number in range(NUM_CHANNELS))]
    sums = [(float((losses * weights)[part].sum()), float(weights[part].sum())) for part in parts]
    return {k: v for k, v in model.config.to_dict().items() if v is not None}, weights_of(model), sums


def on_rank(payload: dict[str, Any]) -> dict[str, Any]:
    """What the engine reports: by kind of the loss, microbatch size, packed or not."""
    dims, device = join(payload["world_size"], **payload["layout"])
    from mswift.parallel.megatron.engine import EngineConfig, MegatronEngine, Microbatch

    reader = MemoryReader(payload["config"], payload["weights"])
    engine = MegatronEngine(reader.table, dims, EngineConfig(optimizer="sgd", lr=0.0), device)
    engine.load_weights(reader)  # type: ignore[arg-type]
    found = {}
    for name, fusion, size, packed in (
        ("plain, 1 row", "false", 1, False),
        ("plain, 4 rows", "false", 4, False),
        ("fused, 2 rows", "true", 2, False),
        ("fused, 2 packed", "true", 2, True),
    ):
        for chunk in engine._chunks:
            chunk.module.loss_fusion = fusion
        documents = (24,) * size if packed else None
        batches = [
            Microbatch(tokens, labels, weights, documents, channels)
            for tokens, labels, weights, channels in zip(*(part.split(size) for part in rows()), strict=True)
        ]
        mine = batches[engine.coordinate.dp :: dims.dp]
        whole, parts = engine.evaluate(mine, NUM_CHANNELS)
        assert engine.evaluate(mine) == (whole, ())
        step, plain = engine.train_step(mine, 0.0, NUM_CHANNELS), engine.train_step(mine, 0.0)
        assert (plain.loss, plain.grad_norm, plain.weight_sum) == (step.loss, step.grad_norm, step.weight_sum)
        found[name] = {
            "evaluated": [tuple(whole), *map(tuple, parts)],
            "trained": [(step.loss * step.weight_sum, step.weight_sum), *map(tuple, step.channels)],
            "num_tokens": step.num_tokens,
        }
    engine.close()
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_transformers(layout: str) -> None:
    config, weights, truth = expected()
    world_size, degrees = LAYOUTS[layout]
    ranks = run_ranks(
        world_size, on_rank, {"world_size": world_size, "layout": degrees, "config": config, "weights": weights}
    )
    assert all(rank == ranks[0] for rank in ranks)
    for name, found in ranks[0].items():
        assert found["num_tokens"] == int(torch.count_nonzero(rows()[2])), name
        for what in ("evaluated", "trained"):
            whole, *parts = found[what]
            assert whole == pytest.approx(truth[0], rel=1e-5), (name, what)
            assert parts == [pytest.approx(part, rel=1e-5) for part in truth[1:]], (name, what)
            assert parts[-1] == (0, 0)
            for column in (0, 1):
                assert sum(part[column] for part in parts) == pytest.approx(whole[column], rel=1e-6)
