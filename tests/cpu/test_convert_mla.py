"""DeepSeek checkpoints that transformers wrote, there and back, bit for bit; the router's bias stays fp32."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mswift.converters.engine import convert
from mswift.converters.reader import WeightReader
from mswift.converters.verify import verify
from mswift.train.identity import base_fingerprint
from tests.support.family_configs import family_config


def saved(path: Path, model_type: str, dtype: torch.dtype, **changes: Any) -> dict[str, Tensor]:
    """A tiny random model as save_pretrained writes it; its tensors, read again."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**family_config(model_type, **changes)), dtype=dtype)
    for module in model.modules():
        if hasattr(module, "e_score_correction_bias"):  # from_pretrained keeps it in fp32, from_config does not
            module.e_score_correction_bias = torch.rand(8)
    model.save_pretrained(path, max_shard_size="60KB")
    return tensors_of(path)


def tensors_of(path: Path) -> dict[str, Tensor]:
    """All tensors of all safetensors files."""
    return {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}


CASES = [
    ("deepseek_v2", torch.bfloat16, {}),
    ("deepseek_v2", torch.float32, {"q_lora_rank": None, "topk_method": "greedy", "rope_scaling": None}),
    ("deepseek_v3", torch.float32, {}),
    ("deepseek_v3", torch.bfloat16, {}),
]


@pytest.mark.parametrize(("model_type", "dtype", "changes"), CASES)
def test_what_transformers_wrote_comes_back(
    tmp_path: Path, model_type: str, dtype: torch.dtype, changes: dict[str, Any]
) -> None:
    tensors = saved(tmp_path / "hf", model_type, dtype, **changes)
    biases = {tensor.dtype for name, tensor in tensors.items() if name.endswith("correction_bias")}
    assert biases == ({torch.float32} if model_type == "deepseek_v3" else set())
    assert any(".experts.7.gate_proj.weight" in name for name in tensors)  # one tensor an expert, as the hub has it
    convert(tmp_path / "hf", tmp_path / "m", "megatron")
    convert(tmp_path / "m", tmp_path / "back", "hf")
    back = tensors_of(tmp_path / "back")
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype, name
        assert torch.equal(back[name], tensor), name
    assert verify(tmp_path / "hf", tmp_path / "m").equal
    assert (tmp_path / "back" / "config.json").read_bytes() == (tmp_path / "hf" / "config.json").read_bytes()
    assert WeightReader(tmp_path / "m").table.spec == WeightReader(tmp_path / "hf").table.spec
    assert WeightReader(tmp_path / "hf").table.spec.mtp_layers == ()
    assert base_fingerprint(WeightReader(tmp_path / "m")) == base_fingerprint(WeightReader(tmp_path / "hf"))
