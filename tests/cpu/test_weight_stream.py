"""The stream of Hugging Face tensors out of a live engine: the model's own bits, at layouts that cut every axis."""

from typing import Any

import numpy as np
import pytest

from tests.support.parity import BASE, MODELS, model_of, random_model
from tests.support.ranks import join, run_ranks
from tests.support.spaces import MemoryReader, weights_of

MOE = BASE | {
    "model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
    "norm_topk_prob": True, "head_dim": 16, "decoder_sparse_step": 1, "mlp_only_layers": [],
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "layout"),
    [("qwen3-tied", {"tp": 2, "pp": 2}), ("llama-biases", {"tp": 2}), ("qwen3_moe", {"ep": 2, "pp": 2})],
    ids=str,
)
def test_the_stream_is_the_model(name: str, layout: dict[str, int]) -> None:
    model = model_of(MOE) if name == "qwen3_moe" else random_model(name)
    config = {**model.config.to_dict(), **(MODELS.get(name) or {"model_type": name})}  # type: ignore[union-attr]
    weights = weights_of(model)
    ranks = run_ranks(4, stream, {"config": config, "weights": weights, "layout": layout})
    assert [len(rank) for rank in ranks[1:]] == [0, 0, 0]
    found = dict(ranks[0])
    assert len(found) == len(ranks[0])
    assert found.keys() == MemoryReader(config, weights).table.hf.keys()
    for tensor_name, values in found.items():
        np.testing.assert_array_equal(values, weights[tensor_name])


def stream(payload: dict[str, Any]) -> list[tuple[str, Any]]:
    """One rank: what it gets of the stream."""
    dims, device = join(4, **payload["layout"])
    from mswift.parallel.megatron.engine import EngineConfig, MegatronEngine
    from mswift.train.weight_stream import hf_tensors

    reader = MemoryReader(payload["config"], payload["weights"])
    engine = MegatronEngine(reader.table, dims, EngineConfig(), device)
    engine.load_weights(reader)  # type: ignore[arg-type]
    got = [(name, tensor.numpy().copy()) for name, tensor in hf_tensors(engine)]
    engine.close()
    return got
