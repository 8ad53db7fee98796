"""An engine that was closed leaves nothing behind: neither gloo's threads nor its model."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.engines import make_engine
from tests.support.family_configs import family_config
from tests.support.parity import model_of
from tests.support.ranks import RankPool, join


@pytest.fixture(scope="module")
def fresh_ranks() -> Iterator[RankPool]:
    """Processes that no other test has left anything in."""
    pool = RankPool(2)
    yield pool
    pool.close()


def on_rank(given: tuple[str, dict[str, Any], dict[str, Any]]) -> list[int]:
    """Threads of this process after each of three engines, one step each."""
    import torch

    path, layout, settings = given
    dims, device = join(2, **layout)
    from mswift.converters.reader import WeightReader
    from mswift.parallel.batch import Microbatch

    counts = []
    for _ in range(3):
        reader = WeightReader(Path(path))
        engine = make_engine(reader.table, dims, settings, device)
        engine.load_weights(reader)
        ids = torch.arange(17)[None]
        engine.train_step([Microbatch(ids[:, :-1], ids[:, 1:].contiguous(), torch.ones(1, 16))] * 2, 1e-3)
        engine.close()
        del engine
        counts.append(len(os.listdir("/proc/self/task")))
    return counts


@pytest.mark.parametrize(
    ("family", "layout"),
    [
        ("qwen3", {"tp": 2}),
        ("qwen2_moe", {"ep": 2}),
        ("deepseek_v3", {"tp": 2, "sequence_parallel": True}),
        ("nemotron_h", {}),
        ("llama", {"pp": 2, "vpp": 2}),
        ("qwen3", {"cp": 2}),
    ],
)
def test_closed_engines_leave_no_threads(
    fresh_ranks: RankPool, family: str, layout: dict[str, Any], tmp_path: Path
) -> None:
    model_of(family_config(family, num_hidden_layers=4)).save_pretrained(tmp_path)
    for first, _, last in fresh_ranks.run(on_rank, (str(tmp_path), layout, {}), 180):
        assert last <= first < 20


@pytest.mark.parametrize(
    ("layout", "settings"),
    [({}, {"shard_size": 2}), ({}, {"shard_size": 1}), ({"cp": 2}, {"shard_size": 2, "recompute_blocks": 2})],
)
def test_closed_engines_of_transformers_models_leave_no_threads(
    fresh_ranks: RankPool, layout: dict[str, Any], settings: dict[str, Any], tmp_path: Path
) -> None:
    model_of(family_config("qwen3")).save_pretrained(tmp_path)
    for first, _, last in fresh_ranks.run(on_rank, (str(tmp_path), layout, {"backend": "fsdp", **settings}), 180):
        assert last <= first < 20
