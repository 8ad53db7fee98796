"""Two ranks with their parameters cut by FSDP2: mswift's engine against the same thing written by hand.

    python benchmarks/fsdp.py [--size 10M] [--rounds 7] [--microbatches 2] [--batch 2] [--length 256] [--write FILE]

By hand: transformers' model (SDPA), `fully_shard` around every layer and the model, its own loss, gradient accumulation
without communication, clipping over the mesh, torch.optim.AdamW (fused). Both have two processes of one thread on this
machine's CPU and gloo; they take a step by turns, fp32. Medians, least and most, and the ratios of the medians (above
1: mswift is faster, or holds less). CPU seconds are those of both ranks and leave out what other processes took. The
loss of the first step is compared as well: it is the same training.
"""

import argparse
import multiprocessing
import statistics
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from measure import cpu_name, peak_bytes, publish, resident_bytes, training_table
from train import SEED, SIZES, batches, model_config

NAMES = ("mswift", "FSDP2 by hand")
RANKS = 2


def by_hand(args: argparse.Namespace, path: Path, rank: int) -> Any:
    """A function that makes one step and returns the loss."""
    import torch
    from torch.distributed.fsdp import fully_shard
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="sdpa", use_cache=False).train()
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1, betas=(0.9, 0.95), fused=True)
    data = batches(args.size, args)[rank::RANKS]

    def step() -> float:
        total = 0.0
        for number, tokens in enumerate(data):
            model.set_requires_gradient_sync(number == len(data) - 1)
            logits = model(input_ids=tokens[:, :-1]).logits
            losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
            (losses / len(data)).backward()
            total += losses.item() / len(data)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total

    return step


def by_mswift(args: argparse.Namespace, path: Path, rank: int) -> Any:
    """The same."""
    import torch

    from mswift.converters.reader import WeightReader
    from mswift.parallel.batch import Microbatch
    from mswift.parallel.fsdp.config import FsdpConfig
    from mswift.parallel.fsdp.engine import FsdpEngine
    from mswift.topology import ParallelDims

    reader = WeightReader(path)
    settings = FsdpConfig(lr=1e-4, weight_decay=0.1, shard_size=RANKS)
    engine = FsdpEngine(reader.table, ParallelDims(world_size=RANKS), settings, torch.device("cpu"))
    engine.load_weights(reader)
    data = [
        Microbatch(t[:, :-1].contiguous(), t[:, 1:].contiguous(), torch.ones(t.shape[0], t.shape[1] - 1))
        for t in batches(args.size, args)[rank::RANKS]
    ]
    return lambda: engine.train_step(data, 1e-4).loss


def rank_of(name: str, args: argparse.Namespace, path: Path, rank: int, store: str, pipe: Connection) -> None:
    """Build, then make one step per message and answer with its seconds."""
    import torch
    import torch.distributed as dist
    import transformers  # noqa: F401  # everybody's libraries are there before memory counts

    import mswift.parallel.fsdp.engine  # noqa: F401

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    pipe.send(resident_bytes())
    step = (by_mswift if name == "mswift" else by_hand)(args, path, rank)
    while pipe.recv() is not None:
        started = time.perf_counter(), time.process_time()
        loss = step()
        pipe.send((time.perf_counter() - started[0], time.process_time() - started[1], peak_bytes(), loss))


def measure(args: argparse.Namespace) -> dict[str, list[tuple[float, float, float, float]]]:
    """(seconds of the slower rank, CPU seconds of both, peak bytes of the larger, loss) of every step."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    context = multiprocessing.get_context("spawn")
    taken: dict[str, list[tuple[float, float, float, float]]] = {name: [] for name in NAMES}
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(SEED)
        config = AutoConfig.for_model(**model_config(args.size))
        AutoModelForCausalLM.from_config(config).save_pretrained(f"{folder}/model")
        pipes: dict[str, list[Connection]] = {}
        before: dict[str, list[int]] = {}
        for name in NAMES:
            pairs = [context.Pipe() for _ in range(RANKS)]
            store = f"{folder}/{name.split()[0]}.store"
            for rank, (_, theirs) in enumerate(pairs):
                arguments = (name, args, Path(folder, "model"), rank, store, theirs)
                context.Process(target=rank_of, args=arguments, daemon=True).start()
            pipes[name] = [ours for ours, _ in pairs]
            before[name] = [pipe.recv() for pipe in pipes[name]]
        for number in range(args.rounds + 2):
            for name in NAMES if number % 2 else NAMES[::-1]:
                for pipe in pipes[name]:
                    pipe.send("step")
                walls, cpus, peaks, losses = zip(*(pipe.recv() for pipe in pipes[name]), strict=True)
                held = max(peak - own for peak, own in zip(peaks, before[name], strict=True))
                loss = losses[0] if name == "mswift" else statistics.fmean(losses)  # mswift's is of the global batch
                taken[name].append((max(walls), sum(cpus), held, loss))
        for pipe in (pipe for some in pipes.values() for pipe in some):
            pipe.send(None)
    return taken


def report(args: argparse.Namespace, taken: dict[str, list[tuple[float, float, float, float]]]) -> str:
    """The table."""
    import torch
    import transformers

    first = [steps[0][3] for steps in taken.values()]
    assert abs(first[0] / first[1] - 1) < 1e-5, f"not the same training: the first losses are {first}"
    tokens = args.microbatches * args.batch * args.length
    flags = f"--rounds {args.rounds} --microbatches {args.microbatches} --batch {args.batch} --length {args.length}"
    lines = [
        f"`python benchmarks/fsdp.py --size {args.size} {flags}`",
        "",
        f"{cpu_name()}; torch {torch.__version__}, transformers {transformers.__version__}; Llama {args.size}, fp32, "
        f"2 ranks of one thread, {args.microbatches} microbatches of {args.batch} x {args.length} tokens, "
        f"{args.rounds} rounds by turns; loss of the first step {first[0]:.6f} and {first[1]:.6f}.",
        "",
        *training_table({name: [step[:3] for step in steps[2:]] for name, steps in taken.items()}, tokens,
                        "memory of a rank"),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def main() -> None:
    """Parse, measure, print, perhaps write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="10M")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--microbatches", type=int, default=2)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--write", type=Path)
    args = parser.parse_args()
    text = report(args, measure(args))
    publish(text, args.write)


if __name__ == "__main__":
    main()
