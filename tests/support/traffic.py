"""What one step of a small model sends, counted on every rank, beside what the formulas say."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from tests.support.family_configs import family_config
from tests.support.ranks import join, run_ranks

SIZES: dict[str, Any] = {  # vectors and matrices are multiples of 64 elements, so that buffers have no gaps
    "vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4,
    "intermediate_size": 128,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "dense": family_config("qwen3", **SIZES, head_dim=64, tie_word_embeddings=True, use_sliding_window=False),
    "untied": family_config("llama", **SIZES),
    "moe": family_config(
        "qwen2_moe", **SIZES, num_experts=8, moe_intermediate_size=64, shared_expert_intermediate_size=128
    ),
}
MICROBATCHES, ROWS, LENGTH = 4, 2, 32

Counts = Counter[tuple[str, str, str]]
"""(axis, kind, "calls" or "bytes") -> number."""


def counted(model: str, world_size: int, degrees: Mapping[str, Any], **settings: Any) -> list[tuple[Counts, Counts]]:
    """(counted, said by the formulas) of every rank."""
    payload = {"model": model, "degrees": degrees, "settings": settings, "world_size": world_size}
    return run_ranks(world_size, on_rank, payload, timeout=600.0)


def on_rank(payload: Mapping[str, Any]) -> tuple[Counts, Counts]:
    """One step of one rank."""
    world_size, settings = payload["world_size"], payload["settings"]
    dims, device = join(world_size, **payload["degrees"])
    import torch

    from mswift.converters.plan import table_for
    from mswift.parallel.megatron import world
    from mswift.parallel.megatron.engine import EngineConfig, MegatronEngine, Microbatch
    from mswift.parallel.traffic import StepShape, step_traffic
    from mswift.parallel.traffic_counter import TrafficCounter
    from mswift.train.memory import stage_parameters
    from mswift.train.proof_tensors import RandomWeights

    table = table_for(dict(MODELS[payload["model"]]))
    engine = MegatronEngine(table, dims, EngineConfig(micro_batch_size=ROWS, **settings), device)
    engine.load_weights(RandomWeights(table, 0))  # type: ignore[arg-type]
    tokens = torch.randint(0, 128, (MICROBATCHES, ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(1))
    batches = [Microbatch(t[:, :-1].contiguous(), t[:, 1:].contiguous(), torch.ones(ROWS, LENGTH)) for t in tokens]
    with TrafficCounter(world.axes()) as counter:
        engine.train_step(batches[engine.coordinate.dp :: dims.dp], 1e-3)
    stage = engine.coordinate.pp
    engine.close()
    experts = stage_parameters(table, dims, stage, experts_only=True)
    shape = StepShape(
        MICROBATCHES // dims.dp, ROWS, LENGTH, 4 if settings.get("dtype", "F32") == "F32" else 2,
        settings.get("loss_fusion", "auto"), settings.get("cp_comm_type", "p2p"),
    )  # fmt: skip
    said = step_traffic(table.spec, dims, shape, stage, stage_parameters(table, dims, stage) - experts, experts)
    return _counts(counter.found), _counts(said)


def _counts(traffic: Any) -> Counts:
    found: Counts = Counter()
    for each in traffic:
        if each.axis != "control":
            found[each.axis, each.kind, "calls"] += each.calls
            found[each.axis, each.kind, "bytes"] += each.num_bytes
        else:
            found["control", "", "bytes"] += each.num_bytes
    return found
