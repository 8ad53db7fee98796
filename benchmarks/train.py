"""Tokens per second of one-rank Megatron training on the CPU against a plain transformers loop on the same model.

    python benchmarks/train.py [--rounds 7] [--threads 1] [--size 34M] [--write benchmarks/results/train.md]

Three contenders, each in a process of its own, one running at a time, in rotated order: mswift's engine;
transformers (SDPA) with torch.optim.AdamW as it comes; the same with AdamW(fused=True). Same model, batch, clipping,
fp32, threads. A round is one optimizer step; medians, least and most are printed, and the ratios of the medians
(above 1: mswift is faster). CPU seconds leave out the time that other processes took from this one.
"""

import argparse
import multiprocessing
import os
import platform
import statistics
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

SIZES: dict[str, dict[str, Any]] = {
    "10M": {"hidden_size": 320, "intermediate_size": 896, "num_hidden_layers": 6, "vocab_size": 4096},
    "34M": {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "vocab_size": 8192},
    "100M": {"hidden_size": 768, "intermediate_size": 2304, "num_hidden_layers": 12, "vocab_size": 8192},
}
HEADS = {"10M": (5, 5), "34M": (8, 4), "100M": (12, 4)}
SEED = 11


def model_config(size: str) -> dict[str, Any]:
    """config.json of the model."""
    heads, groups = HEADS[size]
    return {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "rms_norm_eps": 1e-5,
        "num_attention_heads": heads, "num_key_value_heads": groups, "max_position_embeddings": 2048,
        "tie_word_embeddings": False, "rope_theta": 10000.0, **SIZES[size],
    }  # fmt: skip


def batches(size: str, args: argparse.Namespace) -> list[Any]:
    """Microbatches [b, s + 1] of one step."""
    import torch

    generator = torch.Generator().manual_seed(SEED)
    shape = (args.microbatches, args.batch, args.length + 1)
    return list(torch.randint(0, SIZES[size]["vocab_size"], shape, generator=generator))


def transformers_step(args: argparse.Namespace, fused: bool) -> Any:
    """A function that makes one step of the plain loop and returns the loss."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(SEED)
    config = AutoConfig.for_model(**model_config(args.size), use_cache=False)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1, fused=fused or None)
    data = batches(args.size, args)

    def step() -> float:
        total = 0.0
        for tokens in data:
            # transformers shifts labels itself and gives the mean over the microbatch
            inputs, labels = tokens[:, :-1], tokens[:, :-1].clone()
            loss = model(input_ids=inputs, labels=labels).loss / len(data)
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total

    return step


def mswift_step(args: argparse.Namespace) -> Any:
    """A function that makes one step of the engine and returns the loss."""
    import torch

    from mswift.launchers.environment import RankInfo
    from mswift.parallel import device, groups
    from mswift.topology import ParallelDims

    chosen = device.prepare("cpu")
    from transformers import AutoConfig, AutoModelForCausalLM

    from mswift.converters.reader import WeightReader
    from mswift.parallel.megatron.engine import EngineConfig, MegatronEngine, Microbatch

    dims = ParallelDims()
    groups.init(dims, chosen, RankInfo.single())
    torch.manual_seed(SEED)
    settings = EngineConfig(lr=1e-4, weight_decay=0.1, micro_batch_size=args.batch)
    with tempfile.TemporaryDirectory() as path:
        AutoModelForCausalLM.from_config(AutoConfig.for_model(**model_config(args.size))).save_pretrained(path)
        reader = WeightReader(Path(path))
        engine = MegatronEngine(reader.table, dims, settings, chosen)
        engine.load_weights(reader)
    data = [
        Microbatch(t[:, :-1].contiguous(), t[:, 1:].contiguous(), torch.ones(t.shape[0], t.shape[1] - 1))
        for t in batches(args.size, args)
    ]

    def step() -> float:
        return engine.train_step(data, 1e-4).loss

    return step


def contender(name: str, args: argparse.Namespace, pipe: Connection) -> None:
    """Build, then make one step per message and answer with its seconds."""
    import torch

    torch.set_num_threads(args.threads)
    step = mswift_step(args) if name == "mswift" else transformers_step(args, fused="fused" in name)
    while pipe.recv() is not None:
        started = time.perf_counter(), time.process_time()
        step()
        pipe.send((time.perf_counter() - started[0], time.process_time() - started[1]))


NAMES = ("mswift", "transformers", "transformers, fused AdamW")


def measure(args: argparse.Namespace) -> dict[str, list[tuple[float, float]]]:
    """(seconds, CPU seconds) per step of every contender, `rounds` of each after two warm-up steps."""
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    for name in NAMES:
        pipes[name], theirs = context.Pipe()
        context.Process(target=contender, args=(name, args, theirs), daemon=True).start()
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in NAMES}
    for number in range(args.rounds + 2):
        for shift in range(len(NAMES)):
            name = NAMES[(number + shift) % len(NAMES)]
            pipes[name].send("step")
            taken = pipes[name].recv()
            if number >= 2:
                seconds[name].append(taken)
    for pipe in pipes.values():
        pipe.send(None)
    return seconds


def cpu_name() -> str:
    """Model name and number of cores."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores"


def report(args: argparse.Namespace, seconds: dict[str, list[tuple[float, float]]]) -> str:
    """The table."""
    import torch
    import transformers

    tokens = args.microbatches * args.batch * args.length
    walls = {name: [wall for wall, _ in values] for name, values in seconds.items()}
    cpus = {name: [cpu for _, cpu in values] for name, values in seconds.items()}
    command = f"python benchmarks/train.py --size {args.size} --rounds {args.rounds} --threads {args.threads}"
    command += f" --microbatches {args.microbatches} --batch {args.batch} --length {args.length}"
    lines = [
        f"`{command}`",
        "",
        f"{cpu_name()}; torch {torch.__version__}, transformers {transformers.__version__}; Llama {args.size}, fp32, "
        f"{args.microbatches} microbatches of {args.batch} x {args.length} tokens, {args.threads} thread(s), "
        f"{args.rounds} rounds in rotated order.",
        "",
        "| contender | tokens/s (median) | least | most | mswift / it | CPU seconds per step (median) | mswift / it |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in seconds:
        rates = sorted(tokens / wall for wall in walls[name])
        wall, cpu = statistics.median(walls[name]), statistics.median(cpus[name])
        ratios = wall / statistics.median(walls["mswift"]), cpu / statistics.median(cpus["mswift"])
        lines.append(
            f"| {name} | {statistics.median(rates):.0f} | {rates[0]:.0f} | {rates[-1]:.0f} | {ratios[0]:.2f} "
            f"| {cpu:.3f} | {ratios[1]:.2f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Parse, measure, print, perhaps write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="34M")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--microbatches", type=int, default=2)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--write", type=Path)
    args = parser.parse_args()
    text = report(args, measure(args))
    print(text)
    if args.write:
        args.write.parent.mkdir(parents=True, exist_ok=True)
        with args.write.open("a") as file:
            file.write("\n" + text)


if __name__ == "__main__":
    main()
