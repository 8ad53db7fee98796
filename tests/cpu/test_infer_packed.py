"""Linears in oneDNN's blocks: the same model, in no more memory."""

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mswift.infer.loading import load_model, load_tokenizer
from mswift.infer.packed_linear import PackedLinear, pack_linears
from mswift.infer.transformers_engine import TransformersEngine
from tests.support.tiny import tiny_model, tiny_tokenizer

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch without oneDNN")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_products_and_the_weight_that_is_read_back(dtype: torch.dtype, bias: bool) -> None:
    """Rows of any number, in any memory order; the weight bit for bit."""
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("no bfloat16 in oneDNN on this CPU")
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(40, 70, bias=bias, dtype=dtype)).requires_grad_(False)
    plain = model[0]
    assert pack_linears(model) == 1
    assert isinstance(model[0], PackedLinear)
    assert torch.equal(model[0].weight, plain.weight)
    assert "0.weight" not in model.state_dict()  # or it would be in memory twice
    inputs = [torch.randn(shape, dtype=dtype) for shape in ((40,), (1, 40), (0, 40), (3, 5, 40), (200, 40))]
    for x in (*inputs, torch.randn(40, 6, dtype=dtype).t(), torch.randn(2, 1, 40, dtype=dtype).expand(2, 7, 40)):
        expected = plain.double()(x.double()).to(dtype)
        plain.to(dtype)
        torch.testing.assert_close(model[0](x), expected)
    other = torch.float64 if dtype == torch.float32 else torch.float32
    with pytest.raises(RuntimeError, match=f"input of {other} for a weight of {dtype}"):
        model(torch.randn(2, 40, dtype=other))


def test_a_tied_head_and_other_kinds_of_linears_stay() -> None:
    class Other(nn.Linear):
        """A quantised one, say."""

    model: Any = nn.ModuleDict({"embed": nn.Embedding(9, 8), "head": nn.Linear(8, 9, bias=False), "other": Other(8, 8)})
    model["sixteen"] = nn.Linear(8, 8, dtype=torch.float16)
    model["head"].weight = model["embed"].weight
    model["one"] = model["two"] = nn.Linear(8, 8)
    model["shared"], model["sharing"] = nn.Linear(8, 8), nn.Linear(8, 8)
    model["sharing"].weight = nn.Parameter(model["shared"].weight.data)
    assert pack_linears(model) == 1
    assert model["one"] is model["two"]
    assert isinstance(model["one"], PackedLinear)
    assert model["head"].weight is model["embed"].weight
    assert model["shared"].weight.data_ptr() == model["sharing"].weight.data_ptr()
    assert [type(model[name]) for name in ("head", "other", "sixteen")] == [nn.Linear, Other, nn.Linear]


def test_an_engine_packs_a_model_and_its_logits_are_those_of_transformers(tmp_path: Path) -> None:
    tiny_model(tmp_path, vocab_size=259)
    tiny_tokenizer(tmp_path)
    plain, ids = load_model(tmp_path, None, torch.device("cpu")), torch.arange(40)[None]
    with torch.inference_mode():
        expected = plain(ids).logits
    engine = TransformersEngine(load_model(tmp_path, None, torch.device("cpu")), load_tokenizer(tmp_path))
    linears = [module for module in engine.model.modules() if isinstance(module, nn.Linear)]
    assert len(linears) == 4 * 7 + 1
    assert all(isinstance(module, PackedLinear) for module in linears)
    with torch.inference_mode():
        logits = engine.model(ids).logits
    assert float((logits - expected).abs().max()) < 2e-6 * float(expected.abs().max())
    maps = Path("/proc/self/maps")
    if maps.exists() and str(tmp_path) in maps.read_text():  # the plain one's
        del plain
        gc.collect()
        assert str(tmp_path) not in maps.read_text(), "the file is in memory beside the packed weights"
