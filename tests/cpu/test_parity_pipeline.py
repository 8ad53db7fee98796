"""Promise 2 for cuts of the pipeline: interleaved, uneven, explicit, with embedding and logits on stages of their own.

fp32, against the one-rank run: loss, gradient norm, every gradient, and weights after three steps of SGD at most 5e-6
apart (max|a - b| / max|b| per tensor).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import pytest

from mswift.stages import Cut, cut_layers
from mswift.topology import ParallelDims
from tests.cpu import test_state_layouts as states
from tests.support.parity import differences, megatron_run, random_model, random_steps
from tests.support.ranks import run_ranks
from tests.support.spaces import weights_of

TOLERANCE = 5e-6
SGD = {"optimizer": "sgd", "lr": 0.05, "weight_decay": 0.1, "clip_grad": 1.0}
WHAT = ("logits", "loss", "grad_norm", "gradients", "weights", "momentum_buffer")


def layout(world_size: int, cut: Cut, **degrees: Any) -> tuple[int, dict[str, Any]]:
    """(ranks, fields of ParallelDims) of a cut of four layers."""
    chunks = cut_layers(4, cut)
    return world_size, {"pp": cut.pp, "vpp": len(chunks) // cut.pp, "chunk_layers": chunks, **degrees}


LAYOUTS = {
    "vpp2": layout(2, Cut(2, vpp=2)),
    "uneven": layout(2, Cut(2, first=3)),
    "chunks": layout(2, Cut(2, layout="E|tt|tt|L")),
    "tp2-sp-uneven-chunks": layout(4, Cut(2, layout="Et|t|t|tL"), tp=2, sequence_parallel=True),
    "dp2-vpp2": layout(4, Cut(2, vpp=2)),
    "pp4": layout(4, Cut(4, layout="E|tt|tt|L")),
}


@cache
def one_rank(name: str) -> tuple[dict[str, Any], Any, dict[str, Any]]:
    """(config.json, start weights, what one rank computes)."""
    model = random_model(name)
    config = {k: v for k, v in model.config.to_dict().items() if v is not None}
    start = {n: w.copy() for n, w in weights_of(model).items()}
    return config, start, megatron_run(config, start, steps(), SGD, 1, {})


def steps() -> Any:
    return random_steps(num_microbatches=4, batch=1)


def run(name: str, layout: str, broken: str | None = None) -> dict[str, float]:
    """Differences between the layout and one rank."""
    config, start, truth = one_rank(name)
    world_size, degrees = LAYOUTS[layout]
    return differences(megatron_run(config, start, steps(), SGD, world_size, degrees, broken), truth, WHAT)


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("llama-tied", "vpp2"),
        ("qwen3", "uneven"),
        ("llama-tied", "chunks"),
        ("qwen3", "tp2-sp-uneven-chunks"),
        ("llama-tied", "dp2-vpp2"),
        ("llama-tied", "pp4"),
    ],
)
def test_a_cut_computes_the_model_of_one_rank(name: str, layout: str) -> None:
    assert {n: d for n, d in run(name, layout).items() if not d <= TOLERANCE} == {}


@contextmanager
def swapped_chunks() -> Iterator[None]:
    """Every stage takes its chunks' layers in the wrong order."""
    from unittest.mock import patch

    original = ParallelDims.stage_layers

    def swapped(self: ParallelDims, num_layers: int, pp_rank: int, vpp_rank: int = 0) -> range:
        return original(self, num_layers, pp_rank, self.chunks - 1 - vpp_rank)

    with patch.object(ParallelDims, "stage_layers", swapped):
        yield


@pytest.mark.parametrize("broken", ["tests/cpu/test_parity_pipeline.py:swapped_chunks", "tied embedding reduce"])
def test_a_broken_cut_is_seen(broken: str) -> None:
    assert max(run("llama-tied", "vpp2", broken).values()) > 1000 * TOLERANCE


@pytest.mark.parametrize(("writer", "reader"), [("dp2-vpp2", "uneven"), ("chunks", "tp2-sp-uneven-chunks")])
@pytest.mark.parametrize("adapters", [False, True])
def test_state_crosses_cuts(writer: str, reader: str, adapters: bool) -> None:
    """Written under one cut, read under another: the same bits, weights or adapters and their moments."""
    lora = {"rank": 4, "alpha": 8.0, "target_modules": ("q_proj", "v_proj", "down_proj"), "seed": 3}
    more: dict[str, Any] = {"lora": lora} if adapters else {}
    written = states.run("llama-tied", LAYOUTS[writer], None, 2, steps=steps()[:2], **more)
    found = states.run("llama-tied", LAYOUTS[reader], written["last"], 1, steps=steps()[:1], **more)
    states.assert_same_bits(found["first"], written["last"])
    one = states.run("llama-tied", (1, {}), None, 2, steps=steps()[:2], **more)
    assert written["loss"] == pytest.approx(one["loss"], rel=1e-6)
    for key, value in one["last"].items():
        if not key.startswith("optimizer."):
            assert np.allclose(written["last"][key], value, atol=1e-4), key


def layers_of_core(payload: list[tuple[str, int, int]]) -> list[Any]:
    """Layers of every chunk as megatron-core reads the notation."""
    from tests.support.ranks import join

    join(1)
    from megatron.core.transformer.enums import LayerType
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

    result = []
    for notation, pp, num_layers in payload:
        layout = PipelineParallelLayerLayout(notation, pp)
        layout.validate_layer_layout(num_layers, None)
        chunks = [layout.layout[pp_rank][chunk] for chunk in range(len(layout.layout[0])) for pp_rank in range(pp)]
        result.append([chunk.count(LayerType.decoder) for chunk in chunks])
    return result


def test_the_notation_is_megatron_cores() -> None:
    cases = [("Ett|ttL", 2, 4), ("E|(t|)*3,tL", 5, 4), ("Et*3|(tt|)*3,L", 5, 9), ("E(tt|)*2t,t|t*2|L", 5, 8),
             ("E|t|(t|t|)*2L", 7, 5), ("Et|t*10|t*3|(t)*2L", 2, 16)]  # fmt: skip
    found = [list(cut_layers(num_layers, Cut(pp, layout=notation))) for notation, pp, num_layers in cases]
    assert found == run_ranks(1, layers_of_core, cases)[0]
