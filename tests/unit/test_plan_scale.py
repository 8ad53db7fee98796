"""Planning from headers alone at the size of DeepSeek-V3 (671B) and Qwen3-235B-A22B, in seconds and little memory."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mswift.converters.catalog import family_for, spec_for
from mswift.converters.destinations import MegatronDestination
from mswift.converters.plan import ModelTable, table_for
from tests.support.deepseek import FP8, V3, hub_tensors, in_fp8
from tests.support.sparse import write_sparse_model

SHARD_BYTES = 8_450_000_000
LARGEST_TIME = 8.0
"""CPU time, in that of a bare loop of 10 million steps in the same process: hosts differ threefold in seconds.

2.2 to 4.6 of them on a Xeon with other work, where a loop took 2.2 s; on an idle EPYC the longest plan took 2.0 s.
"""
LARGEST_BYTES = 1 << 30

PROGRAM = """
import json, re, sys, time
from pathlib import Path
def loop():
    started, total = time.process_time(), 0
    for step in range(2_500_000):
        total += step * step
    return time.process_time() - started
before, started = loop() + loop(), time.process_time()
{work}
taken = time.process_time() - started
unit = before + loop() + loop()
peak = re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())  # ru_maxrss counts the parent's too
print(json.dumps([taken / unit, int(peak[1]) * 1024, text]))
"""
PLAN = """
from mswift.converters import describe, engine
planned = engine.plan(Path(sys.argv[1]), sys.argv[2])
text = describe.describe(planned, engine.MAX_SHARD_BYTES)
"""
READER = """
from mswift.converters.reader import WeightReader
reader = WeightReader(Path(sys.argv[1]))
text = f"{len(reader.table.hf):,} tensors"
"""


def measured(work: str, model: Path, to: str = "megatron") -> tuple[float, int, str]:
    """(CPU time in loops, peak bytes, text) of a process that does this and nothing else, without torch."""
    program = PROGRAM.format(work=work)
    done = subprocess.run([sys.executable, "-c", program, str(model), to], capture_output=True, text=True, check=True)
    taken, peak, text = json.loads(done.stdout)
    return taken, peak, text


@pytest.fixture(scope="module")
def deepseek_v3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sparse") / "DeepSeek-V3"
    assert write_sparse_model(path, V3, hub_tensors(V3), SHARD_BYTES) == 163
    return path


def test_deepseek_v3_is_planned_in_seconds(deepseek_v3: Path) -> None:
    taken, peak, text = measured(PLAN, deepseek_v3)
    assert "46,181 tensors, 682,636,487,424 elements" in text
    assert "each element moves exactly once" in text
    assert "dropped model.layers.61.embed_tokens.weight: equal to model.embed_tokens.weight" in text
    assert taken < LARGEST_TIME, taken
    assert peak < LARGEST_BYTES, peak


def test_deepseek_v3_in_fp8_is_planned_in_seconds(tmp_path: Path) -> None:
    """As the hub has it: 92,000 tensors, half of them scales."""
    tensors = in_fp8(hub_tensors(V3))
    assert len(tensors) == 91_991
    write_sparse_model(tmp_path / "m", V3 | {"quantization_config": FP8}, tensors, SHARD_BYTES // 2)
    taken, peak, text = measured(PLAN, tmp_path / "m")
    assert "46,181 tensors, 682,636,487,424 elements" in text
    assert "(45,808 tensors): F8_E4M3 times F32 scale of each 128x128 block, rounded to BF16" in text
    assert taken < LARGEST_TIME, taken
    assert peak < LARGEST_BYTES, peak


def test_training_opens_deepseek_v3_in_seconds(deepseek_v3: Path) -> None:
    taken, peak, text = measured(READER, deepseek_v3)
    assert text == "46,181 tensors"
    assert taken < LARGEST_TIME, taken
    assert peak < LARGEST_BYTES, peak


def test_the_way_back_is_planned_in_seconds(tmp_path: Path) -> None:
    """As a conversion would leave it, its 1.3 TB as holes: 318 files with 34,000 chunks."""
    tensors = hub_tensors(V3)
    table = table_for(V3, tensors)
    destination = MegatronDestination(tmp_path, table, {name: dtype for name, (dtype, _) in tensors.items()})
    for file, size in destination.sizes.items():
        with open(tmp_path / file, "wb") as opened:
            opened.truncate(size)
    destination.finish()
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text(json.dumps(V3))
    taken, peak, text = measured(PLAN, tmp_path, "hf")
    assert "46,181 tensors, 682,636,487,424 elements" in text
    assert taken < LARGEST_TIME, taken
    assert peak < LARGEST_BYTES, peak


QWEN3_235B: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "bos_token_id": 151643, "decoder_sparse_step": 1, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu",
    "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 12288, "max_position_embeddings": 40960,
    "max_window_layers": 94, "mlp_only_layers": [], "model_type": "qwen3_moe", "moe_intermediate_size": 1536,
    "norm_topk_prob": True, "num_attention_heads": 64, "num_experts": 128, "num_experts_per_tok": 8,
    "num_hidden_layers": 94, "num_key_value_heads": 4, "output_router_logits": False, "rms_norm_eps": 1e-06,
    "rope_scaling": None, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001, "sliding_window": None,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.51.0", "use_cache": True,
    "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip


@pytest.mark.parametrize(("spelling", "count"), [("experts_each", 36_945), ("experts_stacked", 1_037)])
def test_qwen3_235b_is_planned_in_seconds(spelling: str, count: int, tmp_path: Path) -> None:
    """94 layers with 128 experts each; one tensor an expert, or one for all of a layer."""
    family = family_for(QWEN3_235B)
    table = ModelTable(QWEN3_235B, family, spec_for(QWEN3_235B, family), spelling)
    tensors = {name: ("BF16", table.hf[name]) for name in table.hf_order}
    write_sparse_model(tmp_path / "m", QWEN3_235B, tensors, SHARD_BYTES)
    taken, peak, text = measured(PLAN, tmp_path / "m")
    assert f"{count:,} tensors, 235,093,634,560 elements" in text
    assert taken < LARGEST_TIME, taken
    assert peak < LARGEST_BYTES, peak
