"""LLaMA-Pro: the larger model computes bit for bit what the smaller one does, in every family that transformers has."""

from typing import Any

import numpy as np
import pytest
import torch

from mswift.converters.arrays import to_hf
from mswift.converters.layout import Region
from mswift.tuners.llamapro import ExpandedReader
from tests.support.family_configs import family_config
from tests.support.parity import model_of
from tests.support.spaces import MemoryReader, weights_of

FAMILIES = {
    "llama": {}, "gemma2": {}, "gemma3_text": {}, "olmo2": {}, "starcoder2": {}, "qwen3": {}, "phi3": {}, "mixtral": {},
    "gpt_oss": {"num_hidden_layers": 4}, "granite": {}, "deepseek_v2": {"num_hidden_layers": 4},
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_a_larger_model_computes_the_same(family: str) -> None:
    config: dict[str, Any] = family_config(family, **FAMILIES[family])
    model = model_of(config)
    layers = model.config.num_hidden_layers
    inner: Any = MemoryReader(model.config.to_dict(), weights_of(model))
    reader = ExpandedReader(inner, 2, 1 if layers % 2 else 2)
    larger = model_of(reader.config, seed=1)
    larger.load_state_dict({n: torch.from_numpy(a) for n, a in _weights(reader).items()}, strict=False)
    assert len(larger.base_model.layers) == layers + 2
    tokens = torch.arange(24)[None] % 7 + 3
    with torch.no_grad():
        before, after = (each.eval()(tokens, use_cache=False).logits for each in (model, larger))
    assert torch.equal(after, before)
    new = reader.places.new[0]
    moved = next(p for n, p in larger.named_parameters() if n.endswith(f"layers.{new}.self_attn.o_proj.weight"))
    assert not moved.any()
    with torch.no_grad():
        moved += 0.1
        assert not torch.equal(larger(tokens, use_cache=False).logits, before)


def _weights(reader: ExpandedReader) -> dict[str, np.ndarray[Any, Any]]:
    """In HF space, experts stacked as transformers has them in memory."""
    tensors = {}
    for key, tensor in reader.table.megatron.items():
        tensors[key] = np.full(tensor.shape, np.nan, np.float32)
        reader.read(key, Region.full(tensor.shape), memoryview(tensors[key]).cast("B"))
    return to_hf(tensors, reader.table)
