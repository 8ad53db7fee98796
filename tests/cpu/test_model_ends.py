"""Embedding multipliers in the model's dtype, and norms of 1 + w, have the bits of transformers' Gemma."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from mswift.converters.plan import table_for
from tests.support.family_configs import family_config


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gemma_rounds_its_embedding_normaliser(dtype: torch.dtype) -> None:
    from transformers.models.gemma.modeling_gemma import GemmaTextScaledWordEmbedding

    from mswift.parallel import device

    device.prepare("cpu")
    from mswift.parallel.megatron.ends import scale_ends

    spec = table_for(family_config("gemma", hidden_size=3072)).spec
    theirs = GemmaTextScaledWordEmbedding(11, 3072, 0, embed_scale=3072**0.5)
    nn.init.normal_(theirs.weight)
    theirs = theirs.to(dtype)
    model: Any = SimpleNamespace(embedding=nn.Embedding(11, 3072, _weight=theirs.weight.detach()))
    scale_ends(model, spec)
    tokens = torch.arange(11)
    assert torch.equal(model.embedding(tokens), theirs(tokens))
    unrounded = theirs.weight[tokens] * 3072**0.5
    assert torch.equal(unrounded, theirs(tokens)) == (dtype == torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_centered_norm(dtype: torch.dtype) -> None:
    """To one unit in the last place: torch's kernel multiplies in another order."""
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm

    from mswift.parallel import device
    from mswift.parallel.norms import ZeroCenteredRMSNorm

    device.prepare("cpu")
    theirs = GemmaRMSNorm(64).to(dtype)
    nn.init.normal_(theirs.weight, std=0.1)
    ours = ZeroCenteredRMSNorm(SimpleNamespace(params_dtype=dtype, sequence_parallel=False), 64, 1e-6)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(5, 64).to(dtype)
    assert torch.allclose(ours(x).float(), theirs(x).float(), rtol=2 * torch.finfo(dtype).eps, atol=0)
