"""vLLM for tests: whether it is here, and adapters to serve. `make vllm` installs it."""

import os
from pathlib import Path

import pytest

from mswift.infer.vllm_options import vllm_version

needs_vllm = pytest.mark.skipif(vllm_version() is None, reason="vLLM is not installed here (make vllm)")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")


def two_adapters(model: Path, home: Path) -> None:
    """PEFT adapters `first` (rank 4, all linears) and `second` (rank 8, queries and values) with random A and B."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    everything = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    for name, rank, targets in (("first", 4, everything), ("second", 8, ["q_proj", "v_proj"])):
        base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        adapted = get_peft_model(base, LoraConfig(r=rank, lora_alpha=16, target_modules=targets))
        generator = torch.Generator().manual_seed(rank)
        for parameter_name, parameter in adapted.named_parameters():
            if "lora_" in parameter_name:
                parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
        adapted.save_pretrained(home / name)
