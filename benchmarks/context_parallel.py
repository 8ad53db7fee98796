"""Bytes that autograd holds after a forward pass when 1, 2 or 4 ranks share a sequence, by kind of context parallelism.

    python benchmarks/context_parallel.py [--length 2048] [--write benchmarks/results/context_parallel.md]

One microbatch of one sequence through mswift's engine, fp32, on the CPU; every tensor that a saved-tensor hook sees is
counted once by its storage, parameters left out. The ideal is 1 / CP of what one rank holds for the same sequence.
"""

import argparse
import os
import socket
import tempfile
from pathlib import Path
from typing import Any

LAYER = {
    "num_attention_heads": 8, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "vocab_size": 2048,
    "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": False, "rope_theta": 10000.0,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "GQA": {**LAYER, "model_type": "llama", "num_key_value_heads": 4},
    "MLA": {
        **LAYER, "model_type": "deepseek_v3", "num_key_value_heads": 8, "q_lora_rank": 96, "kv_lora_rank": 64,
        "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32, "first_k_dense_replace": 4,
        "n_routed_experts": 8, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2,
    },
}  # fmt: skip
KINDS = ("p2p", "all_gather", "a2a")


def held_bytes(engine: Any, length: int) -> int:
    """Bytes of the storages that the graph of one forward pass holds on this rank, parameters left out."""
    import torch

    from mswift.parallel.batch import Microbatch, rank_batches
    from mswift.parallel.megatron import schedule

    tokens = torch.arange(length).remainder(engine.table.spec.vocab_size)[None]
    batches = rank_batches([Microbatch(tokens, tokens, torch.ones(1, length))], engine.dims, engine.coordinate.cp)
    known = {p.untyped_storage().data_ptr() for chunk in engine._chunks for p in chunk.parameters()}
    held: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    for chunk in engine._chunks:
        chunk.zero_grad_buffer()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        schedule.run(engine._chunks, batches, engine.device, forward_only=False)
    return sum(held.values())


def rank_main(rank: int, world_size: int, port: int, model: str, length: int, queue: Any) -> None:
    """One rank: the bytes of every kind, or of one rank alone."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    from mswift.launchers.environment import RankInfo, current
    from mswift.parallel import device, groups
    from mswift.topology import ParallelDims

    chosen = device.prepare("cpu")
    import torch

    from mswift.converters.reader import WeightReader
    from mswift.parallel.megatron.engine import EngineConfig, MegatronEngine

    torch.set_num_threads(1)
    dims = ParallelDims(world_size, cp=world_size)
    groups.init(dims, chosen, current() or RankInfo.single())
    for kind in KINDS if world_size > 1 else ("one rank",):
        settings = EngineConfig(cp_comm_type=kind) if world_size > 1 else EngineConfig()  # type: ignore[arg-type]
        reader = WeightReader(Path(model))
        engine = MegatronEngine(reader.table, dims, settings, chosen)
        engine.load_weights(reader)
        queue.put((kind, held_bytes(engine, length)))
        engine.close()
    groups.destroy()


def measure(model: str, world_size: int, length: int) -> dict[str, int]:
    """Kind -> bytes of the rank that holds most."""
    from torch import multiprocessing

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    queue = multiprocessing.get_context("spawn").SimpleQueue()
    multiprocessing.spawn(
        rank_main, (world_size, port, model, length, queue), nprocs=world_size
    )  # raises what one does
    found: dict[str, int] = {}
    while not queue.empty():
        kind, size = queue.get()
        found[kind] = max(size, found.get(kind, 0))
    return found


def report(length: int) -> str:
    """The table."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    lines = [
        f"`python benchmarks/context_parallel.py --length {length}`; torch {torch.__version__}, fp32.",
        "",
        "| attention | ranks | kind | MiB held after forward, of the rank that holds most | times CP / one rank |",
        "|---|---|---|---|---|",
    ]
    for name, fields in MODELS.items():
        with tempfile.TemporaryDirectory() as path:
            config = AutoConfig.for_model(**fields, max_position_embeddings=length, use_cache=False)
            AutoModelForCausalLM.from_config(config).save_pretrained(path)
            alone = 0
            for world_size in (1, 2, 4):
                for kind, size in measure(path, world_size, length).items():
                    alone = alone or size
                    ratio = size * world_size / alone
                    lines.append(f"| {name} | {world_size} | {kind} | {size / 2**20:.1f} | {ratio:.3f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Parse, measure, print, perhaps write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--write", type=Path)
    args = parser.parse_args()
    text = report(args.length)
    print(text)
    if args.write:
        args.write.parent.mkdir(parents=True, exist_ok=True)
        head = "What autograd holds on each rank is 1 / CP of what one rank holds, however keys and values cross ranks."
        args.write.write_text(f"# Memory under context parallelism\n\n{head}\n\n{text}")


if __name__ == "__main__":
    main()
