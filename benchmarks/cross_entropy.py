"""The fused linear cross-entropy against the plain one: peak memory and time of forward and backward on one CPU core.

    python benchmarks/cross_entropy.py [--vocab 151936] [--hidden 1024] [--rounds 3] [--threads 1] [--dtype F32]
        [--write benchmarks/results/cross_entropy.md]

From hidden states and the weight of the output layer to the loss and both gradients. Plain: one logit matrix
[tokens, vocabulary], as the runtime has it below 8,192 tokens. Every measurement is a process of its own, one at a
time, in rotated order; memory is the highest resident set of the process above the one before the call, with inputs
and nothing else allocated. Limits: at 8,192 tokens at least 5 times less memory and at most 1.2 times the CPU seconds;
from there on memory grows by the hidden states' gradient and no more.
"""

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from measure import cpu_name, peak_bytes, resident_bytes

CONTENDERS = (("plain", 8192), ("fused", 8192), ("fused", 16384), ("fused", 32768))
_GIB = 2**30


def loss_of(kind: str, vocab: int) -> Callable[[Any, Any, Any, Any], Any]:
    """A function of hidden states, weight, labels and loss weights."""
    import torch.distributed as dist

    from mswift.launchers.environment import RankInfo
    from mswift.parallel import device, groups
    from mswift.topology import ParallelDims

    groups.init(ParallelDims(), device.prepare("cpu"), RankInfo.single())
    from mswift.parallel.fused_loss import OutputLayer, fused_linear_cross_entropy
    from mswift.parallel.loss import vocab_parallel_cross_entropy
    from mswift.parallel.megatron.cpu_linear import CpuLinear

    group = dist.group.WORLD
    layer = OutputLayer(vocab_size=vocab, first_row=0, group=group)

    def plain(hidden: Any, weight: Any, labels: Any, weights: Any) -> Any:
        logits = CpuLinear.apply(hidden, weight, None, False, False, False, None, None, group)
        losses = vocab_parallel_cross_entropy(logits, labels, first_row=0, vocab_size=vocab, group=group)
        return (losses * weights).sum()

    def fused(hidden: Any, weight: Any, labels: Any, weights: Any) -> Any:
        return fused_linear_cross_entropy(hidden, weight, labels, weights, layer)[0]

    return plain if kind == "plain" else fused


def measure(kind: str, tokens: int, args: argparse.Namespace, pipe: Connection) -> None:
    """Send (peak bytes above the start, seconds, CPU seconds, loss) of one forward and backward."""
    import torch

    torch.set_num_threads(args.threads)
    compute = loss_of(kind, args.vocab)
    torch.manual_seed(0)
    dtype = {"F32": torch.float32, "BF16": torch.bfloat16}[args.dtype]
    hidden = torch.randn(tokens, 1, args.hidden).to(dtype).requires_grad_()
    weight = (torch.randn(args.vocab, args.hidden) * args.hidden**-0.5).to(dtype).requires_grad_()
    labels, weights = torch.randint(0, args.vocab, (tokens, 1)), torch.ones(tokens, 1)
    compute(hidden[:64], weight, labels[:64], weights[:64]).backward()  # libraries are loaded, kernels made
    hidden.grad = weight.grad = None
    resident = resident_bytes()
    started = time.perf_counter(), time.process_time()
    loss = compute(hidden, weight, labels, weights)
    loss.backward()
    seconds = time.perf_counter() - started[0], time.process_time() - started[1]
    pipe.send((peak_bytes() - resident, *seconds, float(loss.detach())))


def run(args: argparse.Namespace) -> dict[tuple[str, int], list[tuple[float, ...]]]:
    """All measurements."""
    context = multiprocessing.get_context("spawn")
    results: dict[tuple[str, int], list[tuple[float, ...]]] = {contender: [] for contender in CONTENDERS}
    for number in range(args.rounds):
        for shift in range(len(CONTENDERS)):
            contender = CONTENDERS[(number + shift) % len(CONTENDERS)]
            ours, theirs = context.Pipe()
            process = context.Process(target=measure, args=(*contender, args, theirs))
            process.start()
            theirs.close()
            results[contender].append(ours.recv())
            process.join()
    return results


def report(args: argparse.Namespace, results: dict[tuple[str, int], list[tuple[float, ...]]]) -> str:
    """The table and whether the limits hold."""
    import torch

    command = f"python benchmarks/cross_entropy.py --vocab {args.vocab} --hidden {args.hidden} --dtype {args.dtype}"
    medians = {key: [statistics.median(column) for column in zip(*rows, strict=True)] for key, rows in results.items()}
    memory, _, cpu, loss = medians["plain", 8192]
    lines = [
        f"`{command} --rounds {args.rounds} --threads {args.threads}`",
        "",
        f"{cpu_name()}; torch {torch.__version__}; medians of {args.rounds} rounds.",
        "",
        "| | tokens | peak memory | plain at 8,192 / it | seconds | CPU seconds | per 8,192 tokens / plain |",
        "|---|---|---|---|---|---|---|",
    ]
    for (kind, tokens), (peak, wall, seconds, _) in medians.items():
        lines.append(
            f"| {kind} | {tokens:,} | {peak / _GIB:.2f} GiB | {memory / peak:.1f} | {wall:.1f} | {seconds:.1f} "
            f"| {seconds * 8192 / tokens / cpu:.2f} |"
        )
    at_8k, _, fused_cpu, fused_loss = medians["fused", 8192]
    lines += ["", f"Loss at 8,192 tokens: plain {loss:.4f}, fused {fused_loss:.4f}. Limits: memory "
              f"{memory / at_8k:.1f}x less (at least 5), time {fused_cpu / cpu:.2f}x (at most 1.2)."]  # fmt: skip
    return "\n".join(lines) + "\n"


def main() -> None:
    """Parse, measure, print, perhaps write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=("F32", "BF16"), default="F32")
    parser.add_argument("--write", type=Path)
    args = parser.parse_args()
    text = report(args, run(args))
    print(text)
    if args.write:
        args.write.parent.mkdir(parents=True, exist_ok=True)
        args.write.write_text("# The fused linear cross-entropy: memory and time against the plain one\n\n" + text)


if __name__ == "__main__":
    main()
