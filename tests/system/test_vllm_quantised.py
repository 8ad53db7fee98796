"""GPTQ and AWQ as vLLM's own functions pack them: the weights that they were packed from."""

from typing import Any

import pytest
import torch
from torch import Tensor

from mswift.converters.decode import DecodedBytes
from mswift.converters.dequantise import dequantised
from mswift.converters.quantization import quantization_of
from tests.support.quantised import AWQ, GPTQ
from tests.support.vllm import needs_vllm

pytestmark = needs_vllm


class Stored:
    """A tensor as files hold it."""

    def __init__(self, tensor: Tensor) -> None:
        self.dtype = {torch.int32: "I32", torch.float16: "F16"}[tensor.dtype]
        self.shape = tuple(tensor.shape)
        self.data = memoryview(tensor.contiguous().view(torch.uint8).numpy()).cast("B")


def decoded(parts: dict[str, Tensor], how: dict[str, Any]) -> Tensor:
    """[o, i] F16 as the converter makes it."""
    stored = {f"x.{name}": Stored(tensor) for name, tensor in parts.items()}
    quantization = quantization_of({"quantization_config": how})
    assert quantization is not None
    decoding = dequantised(stored, quantization, "F16")["x.weight"]
    stream = DecodedBytes(decoding, lambda number, low, high: stored[decoding.inputs[number]].data[low:high])
    data = stream.read(0, decoding.nbytes, memoryview(bytearray(decoding.nbytes)))
    return torch.frombuffer(bytearray(data), dtype=torch.float16).reshape(decoding.shape)


@pytest.mark.parametrize(("bits", "group"), [(4, 32), (4, -1), (8, 64)])
def test_gptq(bits: int, group: int) -> None:
    from vllm.model_executor.layers.quantization.utils import quant_utils
    from vllm.scalar_type import scalar_types

    torch.manual_seed(0)
    weight = torch.randn(128, 64, dtype=torch.float16)
    kind = scalar_types.uint4b8 if bits == 4 else scalar_types.uint8b128
    reference, codes, scales = quant_utils.gptq_quantize_weights(weight, kind, group)
    zeros = torch.full(scales.shape, kind.bias - 1)  # of files in the first format: less one
    parts = {
        "qweight": quant_utils.gptq_pack(codes, bits, *codes.shape),
        "qzeros": quant_utils.pack_cols(zeros, bits, *zeros.shape),
        "scales": scales,
    }
    assert torch.equal(decoded(parts, GPTQ | {"bits": bits, "group_size": group}), reference.t())


@pytest.mark.parametrize("group", [32, -1])
def test_awq(group: int) -> None:
    from vllm.model_executor.layers.quantization.utils import quant_utils
    from vllm.scalar_type import scalar_types

    torch.manual_seed(0)
    weight = torch.randn(128, 64, dtype=torch.float16)
    reference, codes, scales, zeros = quant_utils.quantize_weights(weight, scalar_types.uint4, group, zero_points=True)
    assert scales is not None
    assert zeros is not None
    parts = {
        "qweight": quant_utils.awq_pack(codes, 4, *codes.shape),
        "qzeros": quant_utils.awq_pack(zeros, 4, *zeros.shape),
        "scales": scales,
    }
    assert torch.equal(decoded(parts, AWQ | {"group_size": group}), reference.t())
