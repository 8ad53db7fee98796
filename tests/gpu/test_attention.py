"""Attention on a GPU in bf16 against the same function in fp64 on the CPU; forward and backward."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mswift.parallel.attention.core import SdpaAttention

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
LENGTHS = (700, 1, 1347)
KINDS: dict[str, dict[str, Any]] = {
    "documents": {},
    "windows": {"window": 300},
    "soft-caps": {"softcap": 3.0},
    "sinks": {"sinks": True},
    "sinks, windows": {"sinks": True, "window": 300},
    "latent": {"key": 48},
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", KINDS)
def test_equals_fp64_on_the_cpu(name: str, packed: bool) -> None:
    kind = dict(KINDS[name])
    with_sinks, width = kind.pop("sinks", False), kind.pop("key", 32)
    generator = torch.Generator().manual_seed(1)
    shapes = ((2048, 1, 4, width), (2048, 1, 2, width), (2048, 1, 2, 32), (2048, 1, 4 * 32))
    tensors = [torch.randn(shape, generator=generator).bfloat16() for shape in shapes]
    tensors.append(torch.linspace(-1, 1, 4).bfloat16())
    options: dict[str, Any] = {"packed_seq_params": SimpleNamespace(lengths=LENGTHS)} if packed else {}
    results = []
    for device, dtype in (("cuda", torch.bfloat16), ("cpu", torch.float64)):
        q, k, v, gradient, sinks = (t.to(device, dtype, copy=True).requires_grad_() for t in tensors)
        module = SdpaAttention(SimpleNamespace(context_parallel_size=1), **kind)
        module.sinks = sinks if with_sinks else None
        out = module(q, k, v, **options)
        leaves = [q, k, v, sinks] if with_sinks else [q, k, v]
        results.append([out, *torch.autograd.grad(out, leaves, gradient.view_as(out))])
    for found, expected in zip(*results, strict=True):
        assert (found.cpu().double() - expected).abs().max() <= 2e-2 * expected.abs().max()
