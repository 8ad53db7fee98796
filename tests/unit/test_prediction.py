"""--mtp_num_layers without torch: what is refused, counted and said."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from mswift.cli.main import main
from mswift.config.train import SftConfig
from mswift.converters.plan import table_for
from mswift.refusals import train_refusals
from mswift.topology import ParallelDims
from mswift.train.flops import matmul_parameters
from mswift.train.memory import stage_memory, stage_parameters
from mswift.train.trained import trained_parameters
from tests.support.family_configs import family_config

CONFIG = family_config("deepseek_v3", num_hidden_layers=4)
TABLE = table_for(CONFIG)
AHEAD = sum(math.prod(tensor.shape) for tensor in TABLE.megatron.values() if tensor.rule.in_mtp)
WHOLE = sum(math.prod(tensor.shape) for tensor in TABLE.megatron.values())


def config(**values: Any) -> SftConfig:
    return SftConfig(model="m", dataset=("d",), train_iters=1, **values)


def refused(**values: Any) -> str:
    return "\n".join(map(str, train_refusals(config(**values), TABLE.spec, 1)))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"mtp_num_layers": 2}, "--mtp_num_layers 2: .* has 1 multi-token-prediction layers .* use --mtp_num_layers 1"),
        ({"mtp_num_layers": -1}, "--mtp_num_layers -1 must be a number from 0 on"),
        ({"mtp_num_layers": 1, "tuner_type": "lora"}, "--mtp_num_layers 1 with --tuner_type lora: .* leave out"),
        ({"mcore": {"mtp_loss_scaling_factor": 0.3}}, "mtp_loss_scaling_factor 0.3 has no effect: .* --mtp_num_layers"),
        ({"mtp_num_layers": 1, "mcore": {"mtp_loss_scaling_factor": -1.0}}, "mtp_loss_scaling_factor -1 must be above"),
    ],
)
def test_what_cannot_be_is_one_clear_refusal(values: dict[str, Any], words: str) -> None:
    assert re.search(words, refused(**values))


def test_a_model_without_such_layers_refuses_to_train_them() -> None:
    found = train_refusals(config(mtp_num_layers=1), TABLE.without_mtp().spec, 1)
    assert "has 0 multi-token-prediction layers" in str(found[0])
    assert "leave out --mtp_num_layers" in str(found[0])


@pytest.mark.parametrize("values", [{}, {"mtp_num_layers": 0}, {"mtp_num_layers": 1}, {"tuner_type": "lora"}])
def test_what_can_be_is_not_refused(values: dict[str, Any]) -> None:
    assert refused(**values) == ""


def test_parameters_and_memory_count_what_is_trained_and_what_is_held() -> None:
    assert trained_parameters(config(), TABLE) == WHOLE - AHEAD
    assert trained_parameters(config(mtp_num_layers=1), TABLE) == WHOLE
    dims = ParallelDims(2, pp=2)
    embedding = math.prod(TABLE.megatron["embedding.word_embeddings.weight"].shape)
    assert stage_parameters(TABLE, dims, 1, num_ahead=1) == stage_parameters(TABLE, dims, 1) + embedding
    kept = stage_memory(config(pipeline_model_parallel_size=2), TABLE, dims, 4, 1)
    trained = stage_memory(config(pipeline_model_parallel_size=2, mtp_num_layers=1), TABLE, dims, 4, 1)
    assert (kept.parameters - kept.trained, trained.parameters - trained.trained) == (AHEAD, 0)
    assert trained.parameters == kept.parameters + embedding
    assert trained.activations_bytes > kept.activations_bytes


def test_flops_count_its_layer_projection_and_head() -> None:
    spec = TABLE.spec
    hidden = spec.hidden_size
    more = matmul_parameters(spec, 1) - matmul_parameters(spec)
    assert spec.mla is not None
    assert spec.moe is not None
    vectors = 5 * hidden + spec.mla.kv_lora_rank + (spec.mla.q_lora_rank or 0) + spec.moe.num_experts
    experts = 3 * hidden * spec.moe.ffn_hidden_size * (spec.moe.num_experts - spec.moe.top_k)
    assert more == spec.vocab_size * hidden + AHEAD - vectors - experts


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "1 multi-token-prediction layer, not trained: saved and exported as they came"),
        (["--mtp_num_layers", "1"], "trained: loss + 0.1 x mtp_loss is minimised"),
        (["--tuner_type", "lora"], "1 multi-token-prediction layer of --model: neither loaded nor adapted"),
    ],
)
def test_a_dry_run_says_what_becomes_of_them(
    flags: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "d.txt").write_text("text")
    files = ["--model", str(tmp_path), "--dataset", str(tmp_path / "d.txt"), "--output_dir", str(tmp_path / "out")]
    assert main(["pt", *files, "--train_iters", "1", "--dry_run", *flags]) == 0
    assert words in capsys.readouterr().out
