"""An engine that was closed leaves nothing behind: neither gloo's threads nor its model."""

import os
from pathlib import Path

from tests.support.ranks import join, run_ranks
from tests.support.tiny import tiny_model


def on_rank(path: str) -> list[int]:
    """Threads of this process after each of three engines, one step each."""
    import torch

    dims, device = join(2, tp=2)
    from mswift.converters.reader import WeightReader
    from mswift.parallel.megatron.engine import EngineConfig, MegatronEngine, Microbatch

    counts = []
    for _ in range(3):
        reader = WeightReader(Path(path))
        engine = MegatronEngine(reader.table, dims, EngineConfig(), device)
        engine.load_weights(reader)
        ids = torch.arange(17)[None]
        engine.train_step([Microbatch(ids[:, :-1], ids[:, 1:].contiguous(), torch.ones(1, 16))], 1e-3)
        engine.close()
        del engine
        counts.append(len(os.listdir("/proc/self/task")))
    return counts


def test_closed_engines_leave_no_threads(tmp_path: Path) -> None:
    tiny_model(tmp_path)
    for first, _, last in run_ranks(2, on_rank, str(tmp_path)):
        assert last <= first < 20
