"""Checkpoints that GPTQModel quantises, read here: its own weights bit for bit, where an environment of its own has it.

MSWIFT_GPTQMODEL=PYTHON names its interpreter.
"""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mswift.cli.main import main
from tests.support import gptqmodel_script
from tests.support.adapters import random_adapter, short_name
from tests.support.engines import make_engine
from tests.support.ranks import join, run_ranks
from tests.support.spaces import assemble, gather
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


def theirs(base: Path, home: Path, how: dict[str, Any], adapter: Path | None = None) -> dict[str, torch.Tensor]:
    """What GPTQModel says of `home`/q, which it makes if it is not there."""
    own = {"GPTQMODEL_CPU_WORKERS": "2", "OMP_NUM_THREADS": "1"}
    argv = [os.environ["MSWIFT_GPTQMODEL"], gptqmodel_script.__file__, str(base), str(home / "q")]
    argv += [str(home / "theirs.safetensors"), json.dumps(how), *([str(adapter)] if adapter else [])]
    ran = subprocess.run(argv, env=os.environ | own, capture_output=True, text=True, cwd=home, timeout=300)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return load_file(home / "theirs.safetensors")


@pytest.mark.parametrize("kind", KINDS)
def test_its_weights_are_ours(kind: str, base: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    found = theirs(base, tmp_path, KINDS[kind])
    logits = found.pop("logits")
    convert = ["convert", "--model", str(tmp_path / "q"), "--to", "hf", "--output_dir", str(tmp_path / "hf")]
    assert main([*convert, "--dtype", "float16"]) == 0
    ours = load_file(tmp_path / "hf" / "model.safetensors")
    assert len(found) == 14
    assert [name for name in found if not torch.equal(found[name], ours[name])] == []
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float16)
    with torch.no_grad():
        own_logits = model(input_ids=torch.arange(1, 33)[None]).logits.float()
    torch.testing.assert_close(own_logits, logits, rtol=0, atol=2e-3 * float(logits.abs().max()))


@pytest.mark.parametrize("kind", ["gptq", "awq-zeros"])
def test_lora_on_its_codes_is_pefts_on_its_linears(kind: str, base: Path, tmp_path: Path) -> None:
    """On an F16 model, in which they compute; the codes held here compute in fp32."""
    how = KINDS[kind] | {"dtype": "float16"}
    theirs(base, tmp_path, how)
    convert = ["convert", "--model", str(tmp_path / "q"), "--to", "hf", "--output_dir", str(tmp_path / "hf")]
    assert main(convert) == 0
    random_adapter(tmp_path / "adapter", tmp_path / "hf", ("all-linear",))
    found = theirs(base, tmp_path, how, tmp_path / "adapter")
    for backend in ("megatron", "fsdp"):
        (rank,) = run_ranks(1, "tests/system/test_gptqmodel.py:one_step", {"home": tmp_path, "backend": backend})
        assert abs(rank["loss"] - float(found["loss"])) < 1e-3
        gradients = {n.removeprefix("gradient.adapter."): a for n, a in assemble([rank["gradients"]]).items()}
        wanted = {short_name(name): tensor.numpy() for name, tensor in found.items() if "lora_" in name}
        assert gradients.keys() == wanted.keys()
        apart = {name: np.abs(gradients[name] - t).max() / np.abs(t).max() for name, t in wanted.items()}
        assert max(apart.values()) < 0.01, apart


def one_step(payload: dict[str, Any]) -> dict[str, Any]:
    """On a rank: loss and gradients of the adapter on the codes."""
    dims, device = join(1)
    from mswift.converters.reader import WeightReader
    from mswift.parallel.batch import Microbatch
    from mswift.parallel.held_codes import held_codes
    from mswift.tuners.adapter import PeftAdapter

    reader, adapter = WeightReader(payload["home"] / "q"), PeftAdapter(payload["home"] / "adapter")
    lora, _ = adapter.lora_config(reader.table, seed=7)
    settings = {"lora": lora, "dtype": "F32", "four_bit_base": held_codes(reader), "clip_grad": 0.0}
    settings |= {"backend": "fsdp"} if payload["backend"] == "fsdp" else {}
    engine = make_engine(reader.table, dims, settings, device)
    engine.load_weights(reader)
    engine.load_adapter(adapter)
    tokens = torch.arange(1, 33)[None]
    result = engine.train_step([Microbatch(tokens[:, :-1], tokens[:, 1:], torch.ones(1, 31))], 0.0)
    gradients = gather(engine.gradients())
    engine.close()
    return {"loss": result.loss, "gradients": gradients}
