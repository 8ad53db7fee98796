"""Checkpoints that GPTQModel quantises, read here: its own weights bit for bit, where an environment of its own has it.

MSWIFT_GPTQMODEL=PYTHON names its interpreter.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mswift.cli.main import main
from tests.support import gptqmodel_script
from tests.support.tiny import tiny_model, tiny_tokenizer

pytestmark = pytest.mark.skipif("MSWIFT_GPTQMODEL" not in os.environ, reason="MSWIFT_GPTQMODEL names no interpreter")
KINDS: dict[str, dict[str, Any]] = {
    "gptq": {"bits": 4, "group_size": 32, "sym": True, "desc_act": False},
    "act-order": {"bits": 4, "group_size": 32, "sym": False, "desc_act": True},
    "gptq_v2": {"bits": 4, "group_size": 32, "sym": False, "desc_act": False, "format": "gptq_v2"},
    "int8": {"bits": 8, "group_size": -1, "sym": True, "desc_act": False, "act_group_aware": False},
    "awq": {"bits": 4, "group_size": 32, "quant_method": "awq", "format": "gemm"},
    "awq-zeros": {"bits": 4, "group_size": 32, "sym": False, "quant_method": "awq", "format": "gemm"},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base")
    tiny_tokenizer(path)
    tiny_model(path, "qwen2", hidden_size=128, head_dim=32, intermediate_size=256, num_hidden_layers=2, vocab_size=259)
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_its_weights_are_ours(kind: str, base: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    own = {"GPTQMODEL_CPU_WORKERS": "2", "OMP_NUM_THREADS": "1"}
    argv = [os.environ["MSWIFT_GPTQMODEL"], gptqmodel_script.__file__, str(base), str(tmp_path / "q")]
    argv += [str(tmp_path / "theirs.safetensors"), json.dumps(KINDS[kind])]
    ran = subprocess.run(argv, env=os.environ | own, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert ran.returncode == 0, ran.stderr[-3000:]
    theirs = load_file(tmp_path / "theirs.safetensors")
    logits = theirs.pop("logits")
    convert = ["convert", "--model", str(tmp_path / "q"), "--to", "hf", "--output_dir", str(tmp_path / "hf")]
    assert main([*convert, "--dtype", "float16"]) == 0
    ours = load_file(tmp_path / "hf" / "model.safetensors")
    assert len(theirs) == 14
    assert [name for name in theirs if not torch.equal(theirs[name], ours[name])] == []
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float16)
    with torch.no_grad():
        found = model(input_ids=torch.arange(1, 33)[None]).logits.float()
    torch.testing.assert_close(found, logits, rtol=0, atol=2e-3 * float(logits.abs().max()))
    sys.stdout.write(f"{kind}: largest difference of logits {(found - logits).abs().max():.1e}\n")
