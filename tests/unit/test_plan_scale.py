"""Planning from headers alone at the size of DeepSeek-V3 (671B) and Qwen3-235B-A22B, in seconds and little memory."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.deepseek import V3, hub_tensors
from tests.support.sparse import write_sparse_model

SHARD_BYTES = 8_450_000_000
LARGEST_SECONDS = 10.0
LARGEST_BYTES = 1 << 30

PROGRAM = """
import json, resource, sys, time
from pathlib import Path
{work}
used = resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps([used.ru_utime + used.ru_stime, used.ru_maxrss * 1024, text]))
"""
PLAN = """
from mswift.converters import engine
planned = engine.plan(Path(sys.argv[1]), "megatron")
text = engine.describe(planned, engine.MAX_SHARD_BYTES)
"""
READER = """
from mswift.converters.reader import WeightReader
reader = WeightReader(Path(sys.argv[1]))
text = f"{len(reader.table.hf):,} tensors"
"""


def measured(work: str, model: Path) -> tuple[float, int, str]:
    """(CPU seconds, peak bytes, text) of a process that does this and nothing else, without torch."""
    program = PROGRAM.format(work=work)
    done = subprocess.run([sys.executable, "-c", program, str(model)], capture_output=True, text=True, check=True)
    seconds, peak, text = json.loads(done.stdout)
    return seconds, peak, text


@pytest.fixture(scope="module")
def deepseek_v3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sparse") / "DeepSeek-V3"
    assert write_sparse_model(path, V3, hub_tensors(V3), SHARD_BYTES) == 163
    return path


def test_deepseek_v3_is_planned_in_seconds(deepseek_v3: Path) -> None:
    seconds, peak, text = measured(PLAN, deepseek_v3)
    assert "46,181 tensors, 682,636,487,424 elements" in text
    assert "each element moves exactly once" in text
    assert "dropped model.layers.61.embed_tokens.weight: equal to model.embed_tokens.weight" in text
    assert seconds < LARGEST_SECONDS, seconds
    assert peak < LARGEST_BYTES, peak


def test_training_opens_deepseek_v3_in_seconds(deepseek_v3: Path) -> None:
    seconds, peak, text = measured(READER, deepseek_v3)
    assert text == "46,181 tensors"
    assert seconds < LARGEST_SECONDS, seconds
    assert peak < LARGEST_BYTES, peak
