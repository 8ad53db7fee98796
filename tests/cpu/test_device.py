"""prepare: explicit, once, pinned to tested versions, and harmless to what is imported later."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mswift.errors import ConfigError
from mswift.parallel import device
from mswift.parallel.megatron import mends

ROOT = Path(__file__).parents[2]


def python(code: str, status: int = 0) -> str:
    """Output of a fresh interpreter."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == status, done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize("version", ["0.16.0", "0.17.0", "0.19.2", "0.15.3", "nonsense"])
def test_untested_megatron_is_refused_with_a_command_that_installs_a_tested_one(version: str) -> None:
    with pytest.raises(ConfigError) as caught:
        mends.check_version(version)
    assert version in str(caught.value)
    assert "megatron-core>=0.16.1,<0.17" in str(caught.value)
    mends.check_version("0.16.1")  # the remedy
    mends.check_version("0.16.9")


def test_unknown_device_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="--device tpu.*auto, cpu or cuda"):
        device.resolve("tpu")
    assert device.resolve("cpu") == torch.device("cpu")


def test_a_model_built_on_the_meta_device_is_there_after_prepare_as_before() -> None:
    """transformers loads models so; a factory that ignored the device gave it memory with anything in it."""
    python(
        "import torch\n"
        "from mswift.parallel import device\n"
        "device.prepare('cpu')\n"
        "with torch.device('meta'):\n"
        "    made = torch.empty(2), torch.zeros(2), torch.arange(2), torch.nn.Linear(2, 2).weight\n"
        "assert [tensor.device.type for tensor in made] == ['meta'] * 4, made\n"
        "assert torch.empty(2, device='cuda').device.type == 'cpu'\n"
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_cuda_without_a_gpu_is_refused() -> None:
    with pytest.raises(ConfigError, match="--device cuda.*0 GPUs.*--device cpu"):
        device.resolve("cuda")


def test_nothing_happens_at_import_and_prepare_can_be_called_twice() -> None:
    python(
        "import torch, sys\n"
        "before = torch.empty, torch.compile, torch.Tensor.to\n"
        "from mswift.parallel import device\n"
        "assert (torch.empty, torch.compile, torch.Tensor.to) == before\n"
        "assert 'megatron' not in sys.modules\n"
        "chosen = device.prepare('cpu')\n"
        "mended = torch.empty, torch.compile, torch.Tensor.to, torch.cuda.current_device\n"
        "assert mended[0] is not before[0]\n"
        "assert device.prepare('cpu') == chosen == torch.device('cpu')\n"
        "assert (torch.empty, torch.compile, torch.Tensor.to, torch.cuda.current_device) == mended\n"
        "import megatron.core\n"
        "try:\n"
        "    import transformer_engine\n"
        "except ImportError:\n"
        "    pass\n"
        "else:\n"
        "    raise SystemExit('Transformer Engine is not hidden')\n"
    )


def test_megatron_imported_too_early_is_an_error() -> None:
    out = python("import megatron.core\nfrom mswift.parallel import device\ndevice.prepare('cpu')", status=1)
    assert "before mswift.parallel.device.prepare()" in out


def test_transformers_models_still_import_and_run_afterwards() -> None:
    """torch._dynamo, which transformers imports, refuses one function object under two of torch's names."""
    python(
        "from mswift.parallel import device\n"
        "device.prepare('cpu')\n"
        "import torch._dynamo, torch\n"
        "from transformers import AutoModelForCausalLM, LlamaConfig\n"
        "config = LlamaConfig(vocab_size=11, hidden_size=8, intermediate_size=8, num_hidden_layers=1,\n"
        "                     num_attention_heads=2, num_key_value_heads=2)\n"
        "AutoModelForCausalLM.from_config(config)(torch.tensor([[1, 2]]))\n"
    )
