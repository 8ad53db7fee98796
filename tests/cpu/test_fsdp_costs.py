"""What the engine of transformers models computes again, sends and holds, counted."""

import json
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from typing import Any

import pytest

from tests.cpu.test_parity_fsdp import start
from tests.cpu.test_state_memory import MIB, grown
from tests.support.parity import random_model, random_steps
from tests.support.ranks import join, run_ranks
from tests.support.server import ENVIRON
from tests.support.spaces import MemoryReader, weights_of


def counts(payload: tuple[int, int, Mapping[str, Any]]) -> tuple[Counter[str], dict[tuple[str, str], tuple[int, int]]]:
    """Of one step of this rank: operators, and what it sent, as (axis, kind) -> (calls, bytes)."""
    world_size, num_microbatches, settings = payload
    dims, device = join(world_size)
    from torch.utils._python_dispatch import TorchDispatchMode

    from mswift.parallel.batch import Microbatch
    from mswift.parallel.traffic_counter import TrafficCounter
    from tests.support.engines import make_engine

    found: Counter[str] = Counter()

    class Operators(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            found[func._schema.name.partition("::")[2]] += 1
            return func(*args, **(kwargs or {}))

    reader: Any = MemoryReader(*start("llama-4-groups"))
    engine = make_engine(reader.table, dims, {"backend": "fsdp", "shard_size": world_size} | dict(settings), device)
    engine.load_weights(reader)
    (step,) = random_steps(1, num_microbatches=num_microbatches * world_size)
    with TrafficCounter({}) as traffic, Operators():
        engine.train_step([Microbatch(*batch) for batch in step[engine.coordinate.dp :: world_size]], 1e-3)
    engine.close()
    return found, {(each.axis, each.kind): (each.calls, each.num_bytes) for each in traffic.found}


def test_selective_recomputation_keeps_products_and_attention() -> None:
    """4 layers of 7 linears and attention; torch stops computing again before the last linear, as nothing needs it."""
    again = {"recompute_blocks": 4}
    none, full, some = (
        run_ranks(1, counts, (1, 1, settings))[0][0]
        for settings in ({}, again, {**again, "recompute_keeps_products": True})
    )
    attention = "_scaled_dot_product_flash_attention_for_cpu"
    assert none["mm"] > 4 * 7 * 3
    assert full["mm"] == none["mm"] + 4 * 6
    assert some["mm"] == none["mm"]
    assert (none[attention], full[attention], some[attention]) == (4, 8, 4)
    assert some["silu"] == full["silu"] == 2 * none["silu"] == 8


def test_gradients_are_summed_once_a_step() -> None:
    """4 layers and the ends of the model; every microbatch gathers, the last one alone reduces."""
    few, many = (run_ranks(2, counts, (2, number, {}))[0][1] for number in (1, 4))
    assert many["other", "reduce_scatter"] == few["other", "reduce_scatter"]
    assert few["other", "reduce_scatter"][0] == 5
    assert many["other", "all_gather"][0] > 3 * few["other", "all_gather"][0]


def builds(weights: Any) -> tuple[int, int]:
    """Bytes of this rank's rows, and growth of its memory while it builds the model and reads them."""
    dims, device = join(2)
    from tests.support.engines import make_engine

    reader: Any = MemoryReader(*weights)
    made: list[Any] = []

    def build() -> None:
        made.append(make_engine(reader.table, dims, {"backend": "fsdp", "shard_size": 2}, device))
        made[0].load_weights(reader)

    small: Any = MemoryReader(*start("llama"))
    warm = make_engine(small.table, dims, {"backend": "fsdp", "shard_size": 2}, device)
    warm.close()
    peak = grown(build)
    trained = made[0].held_bytes()[1]
    made[0].close()
    return trained.weights, peak


def test_a_rank_builds_its_rows_and_one_layer() -> None:
    """24 layers of 4 MiB: the whole model never lies on a rank."""
    model = random_model("llama", hidden_size=256, intermediate_size=1024, num_hidden_layers=24)
    weights = (model.config.to_dict(), weights_of(model))
    whole = sum(array.nbytes for array in weights[1].values())
    for rows, peak in run_ranks(2, builds, weights):
        assert rows == pytest.approx(whole / 2, rel=0.01)
        assert peak < rows + 5 * MIB + 16 * MIB < 0.85 * whole


COMPILING = """
import json
from torch._dynamo.utils import counters
from mswift.launchers.environment import RankInfo
from mswift.parallel import device, groups
from mswift.parallel.batch import Microbatch
from mswift.topology import ParallelDims
from tests.support.engines import make_engine
from tests.support.parity import random_model, random_steps
from tests.support.spaces import MemoryReader, weights_of

dims, chosen = ParallelDims(world_size=1), device.choose("cpu")
groups.init(dims, chosen, RankInfo.single(), 100)
model = random_model("llama", num_hidden_layers=12)
reader = MemoryReader(model.config.to_dict(), weights_of(model))
losses = []
for on in (False, True):
    settings = {"backend": "fsdp", "optimizer": "sgd", "compile_layers": on}
    engine = make_engine(reader.table, dims, settings, chosen)
    engine.load_weights(reader)
    steps = [random_steps(1, length=length)[0] for length in (24, 17, 30)]
    losses.append([engine.train_step([Microbatch(*batch) for batch in step], 1e-2).loss for step in steps])
    engine.close()
groups.destroy()
print(json.dumps([losses, counters["stats"]["unique_graphs"], list(counters["graph_break"])]))
"""


@pytest.mark.whole
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_layers_are_compiled_once_for_all_of_them_and_all_lengths() -> None:
    """12 layers are more than torch compiles of one function; attention is the only break.

    A process of its own: where megatron-core is made ready for a CPU, torch.compile does nothing.
    """
    argv = [sys.executable, "-c", COMPILING]
    done = subprocess.run(argv, capture_output=True, text=True, env=ENVIRON, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    (plain, found), graphs, breaks = json.loads(done.stdout.splitlines()[-1])
    assert found == pytest.approx(plain, rel=1e-6)
    assert found != plain
    assert graphs == 4
    assert len(breaks) == 1
    assert "function attend" in breaks[0]


def test_compiling_needs_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from mswift.errors import ConfigError
    from mswift.parallel.fsdp import model

    monkeypatch.setattr(model.shutil, "which", lambda _: None)
    with pytest.raises(ConfigError, match="--torch_compile needs a C.. compiler on a CPU"):
        model.compile_layers([], torch.device("cpu"))
