"""Weak scaling on paper, from formulas that a running job is held to: bytes per collective, axis and step.

    python benchmarks/scaling.py [--write benchmarks/results/scaling.md]

First a small model trains one step on two and four CPU ranks in several layouts; what the runtime's own counter
(`mswift.parallel.traffic_counter`) sees is set against the formulas (`mswift.parallel.traffic`), which must agree to
the byte. Then the formulas say what 8 to 1,024 GPUs would send, and how long that takes at the links' nominal speed.
No GPU has measured the second part.
"""

import argparse
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mswift.config.train import PtConfig
from mswift.converters.plan import table_for
from mswift.parallel.traffic import sent_by_axis
from mswift.refusals import check_train, dims_of
from mswift.topology import DENSE_AXES, EXPERT_AXES, ParallelDims
from mswift.train.flops import step_flops
from mswift.train.sent import stage_traffic

NVLINK, NETWORK, PEAK, MFU, NODE = 450e9, 50e9, 989e12, 0.4, 8
"""H100 SXM: bytes/s a GPU sends to its node over NVLink 4 and to other nodes over its own 400 Gb/s port; bf16 FLOP/s;
the assumed share of them that is model FLOPs where nothing waits; GPUs of a node."""

LLAMA = {
    "model_type": "llama", "vocab_size": 128256, "num_key_value_heads": 8, "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "hidden_act": "silu", "rope_theta": 500000.0,
    "torch_dtype": "bfloat16",
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "Llama-3-8B": {
        **LLAMA, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    },
    "Llama-3-70B": {
        **LLAMA, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
    },
    "Qwen3-30B-A3B": {
        **LLAMA, "model_type": "qwen3_moe", "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144,
        "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
        "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "decoder_sparse_step": 1,
        "norm_topk_prob": True, "mlp_only_layers": [],
    },
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """A model on `gpus` GPUs; the batch of each data-parallel rank stays, however many there are."""

    model: str
    gpus: int
    sequences: int
    """Of each data-parallel rank in a step."""
    flags: Mapping[str, Any]

    @property
    def config(self) -> PtConfig:
        """The flags, with the batch that so many ranks have."""
        given = PtConfig(model=self.model, dataset=("d",), train_iters=1, **{"max_length": 8192} | self.flags)
        dims = dims_of(given, self.gpus, MODELS[self.model]["num_hidden_layers"])
        return replace(given, global_batch_size=self.sequences * dims.dp)


def _flags(tp: int = 1, pp: int = 1, **more: Any) -> dict[str, Any]:
    shared = {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp, "sequence_parallel": tp > 1}
    return shared | more


DENSE, LONG = _flags(), _flags(context_parallel_size=8, max_length=131072)
LARGE = _flags(8, 4, virtual_pipeline_model_parallel_size=5)
RUNS = [
    *(Run("Llama-3-8B", gpus, 8, DENSE) for gpus in (8, 64, 1024)),
    *(Run("Llama-3-8B", gpus, 16, _flags(2)) for gpus in (8, 1024)),
    *(Run("Llama-3-8B", gpus, 1, LONG) for gpus in (8, 1024)),
    *(Run("Llama-3-70B", gpus, 32, LARGE) for gpus in (32, 256, 1024)),
    *(Run("Qwen3-30B-A3B", gpus, 8, _flags(expert_model_parallel_size=8)) for gpus in (8, 1024)),
]
LAYOUTS: dict[str, tuple[str, int, dict[str, Any], dict[str, Any]]] = {
    "TP 2": ("dense", 2, {"tp": 2}, {}),
    "TP 2, sequence parallel": ("dense", 2, {"tp": 2, "sequence_parallel": True}, {}),
    "PP 2": ("dense", 2, {"pp": 2}, {}),
    "CP 2, p2p": ("dense", 2, {"cp": 2}, {}),
    "CP 2, all_gather": ("dense", 2, {"cp": 2}, {"cp_comm_type": "all_gather"}),
    "CP 2, a2a": ("dense", 2, {"cp": 2}, {"cp_comm_type": "a2a"}),
    "DP 2": ("dense", 2, {}, {}),
    "DP 2, bf16": ("dense", 2, {}, {"dtype": "BF16"}),
    "EP 2": ("moe", 2, {"ep": 2}, {}),
    "TP 2 x PP 2, sequence parallel; ETP 1 x EP 2": (
        "moe", 4, {"tp": 2, "pp": 2, "etp": 1, "ep": 2, "sequence_parallel": True}, {},
    ),
}  # fmt: skip


def measured() -> Iterator[str]:
    """Rows of what was counted in a step, all ranks together, beside what the formulas say."""
    from tests.support.traffic import counted

    yield "| layout | axis | collective | calls | bytes counted | bytes said |"
    yield "|---|---|---|---|---|---|"
    for name, (model, world_size, degrees, settings) in LAYOUTS.items():
        ranks = counted(model, world_size, degrees, **settings)
        keys = dict.fromkeys((axis, kind) for found, _ in ranks for axis, kind, _ in found if axis != "control")
        for axis, kind in keys:
            calls, seen = (sum(found[axis, kind, what] for found, _ in ranks) for what in ("calls", "bytes"))
            said = sum(expected[axis, kind, "bytes"] for _, expected in ranks)
            assert seen == said, (name, axis, kind)
            yield f"| {name} | {axis} | {kind} | {calls} | {seen:,} | {said:,} |"


def link(axis: str, dims: ParallelDims) -> float:
    """Bytes/s of the slowest link in a group of the axis: ranks are laid tp, cp, dp, pp (etp, ep, edp, pp)."""
    place = {"embedding": "pp", "cp heads": "cp"}.get(axis, axis)
    mesh = DENSE_AXES if place in DENSE_AXES else EXPERT_AXES
    span = 1
    for each in mesh[: mesh.index(place) + 1]:
        span *= dims.sizes[each]
    return NVLINK if span <= NODE else NETWORK


def on_paper(run: Run) -> str:
    """One row: what the rank that takes longest sends, and the time of it against that of computing."""
    table = table_for(MODELS[run.model])
    config = run.config
    dims = check_train(config, table.spec, run.gpus)
    stages = [sent_by_axis(stage_traffic(config, table, dims, 2, stage), dims) for stage in range(dims.pp)]
    seconds = [{axis: sent / link(axis, dims) for axis, sent in stage.items()} for stage in stages]
    worst = max(range(dims.pp), key=lambda stage: sum(seconds[stage].values()))
    tokens = config.global_batch_size * config.max_length
    flops = step_flops(table.spec, tokens, tokens * config.max_length, frozen_base=False)
    compute = flops / (run.gpus * PEAK * MFU)
    microbatches = config.global_batch_size // (config.micro_batch_size * dims.dp)
    bubble = (dims.pp - 1) / (microbatches * dims.chunks)
    cells = [f"{axis} {num / 1e9:.3g} GB, {seconds[worst][axis]:.2f} s" for axis, num in stages[worst].items()]
    waiting = sum(seconds[worst].values())
    layout = dims.describe().partition(" = ")[2]
    share = compute / (compute * (1 + bubble) + waiting)
    return (
        f"| {run.model} | {run.gpus:,} | {layout} | {tokens:,} | {'; '.join(cells)} | {compute:.2f} | {waiting:.2f} | "
        f"{bubble:.0%} | {share:.0%} |"
    )


def report() -> str:
    """Both tables."""
    lines = [
        "# Weak scaling, on paper and counted",
        "",
        "`python benchmarks/scaling.py`. Two tables: the first is counted, the second is arithmetic.",
        "",
        "## What a step sends, counted",
        "",
        "One step of a model of 4 layers (4 microbatches of 2 x 32 tokens) on CPU ranks: every collective that",
        "torch.distributed dispatches, all ranks together, beside the formulas of `mswift.parallel.traffic`. They",
        "agree to the byte on every rank, but for all-to-all of experts, where they do over all ranks",
        "(`tests/cpu/test_traffic.py`, more layouts). An all-reduce counts its tensor, an all-gather its result, a",
        "reduce-scatter its input. Collectives of at most 64 bytes (loss, norm, counts) are left out.",
        "",
        *measured(),
        "",
        "## What 8 to 1,024 GPUs would send",
        "",
        "The same formulas, bf16, full training, samples of 8,192 tokens (131,072 with CP 8); the batch of a",
        "data-parallel rank stays, so that the work of a GPU does. Of the rank that waits longest: bytes that it sends",
        f"in a step (ring algorithms), and seconds at {NVLINK / 1e9:.0f} GB/s inside a node of {NODE} (NVLink 4) and",
        f"{NETWORK / 1e9:.0f} GB/s between nodes (400 Gb/s for each GPU), nominal speeds. Computing: model FLOPs at",
        f"{MFU:.0%} of {PEAK / 1e12:.0f} TFLOP/s. The last column is the share of a step that computes if nothing",
        "overlaps: a lower bound. `--overlap_grad_reduce` and `--overlap_param_gather` hide dp behind it. Latency",
        "is left out. Not measured: no such machine was at hand.",
        "",
        "| model | GPUs | layout | tokens a step | sent, and time | computing, s | sending, s | bubble | computes |",
        "|---|---|---|---|---|---|---|---|---|",
        *map(on_paper, RUNS),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Count, calculate, print, perhaps write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path)
    args = parser.parse_args()
    text = report()
    print(text)
    if args.write:
        args.write.write_text(text)


if __name__ == "__main__":
    main()
