"""Short samples of uneven length: packed rows against Trainer's padded ones, and mswift's own padded ones.

    python benchmarks/packing.py [--tuner full|lora] [--size 10M] [--samples 64] [--batch 8] [--length 512] [--rounds 7]
        [--threads 1] [--write benchmarks/results/packing.md]

A step of every contender learns from the same samples: `samples` of them, log-normal in length (half are below 64
tokens, `length` at most), drawn by a seed. Trainer pads `batch` samples to the longest of them, in random order, as it
comes; mswift packs all by best fit into rows of `length` positions, or pads `batch` of like length at a time. The loss
of the first step is the same, which is checked. Tokens are those of the samples, padding left out. Contenders, rounds,
columns: as in train.py.
"""

import argparse
import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from measure import cpu_name, peak_bytes, publish, resident_bytes, training_table
from train import SEED, SIZES, mswift_engine, transformers_model

NAMES = ("mswift", "mswift, ddp", "mswift, padded", "mswift, ddp, padded", "Trainer")


def samples_of(args: argparse.Namespace) -> list[Any]:
    """int64 [n + 1] each: n positions with a target."""
    chosen = np.random.default_rng(SEED)
    lengths = np.clip(np.exp(chosen.normal(np.log(64), 0.9, args.samples)).astype(int), 8, args.length)
    return [chosen.integers(0, SIZES[args.size]["vocab_size"], n + 1) for n in lengths]


def packed(samples: list[Any], length: int) -> Iterator[Any]:
    """Microbatches of one row of several samples, [1, length]."""
    import torch

    from mswift.data.packing import pack
    from mswift.parallel.batch import Microbatch

    lengths = np.array([len(sample) - 1 for sample in samples])
    packs = pack(lengths, length, "bestfit")
    for number in range(len(packs)):
        members = [samples[i] for i in packs[number]]
        rest = length - sum(len(member) - 1 for member in members)
        tokens, labels = (
            torch.from_numpy(np.concatenate([*parts, np.zeros(rest, dtype=np.int64)]))[None]
            for parts in ([m[:-1] for m in members], [m[1:] for m in members])
        )
        weights = (torch.arange(length) < length - rest).float()[None]
        documents = [len(member) - 1 for member in members]
        yield Microbatch(tokens, labels, weights, (*documents, rest) if rest else tuple(documents))


def padded(samples: list[Any], size: int) -> Iterator[Any]:
    """Microbatches of `size` samples of like length, [size, s], as mswift.train.batches deals and pads them."""
    import torch

    from mswift.parallel.batch import Microbatch

    samples = sorted(samples, key=len, reverse=True)
    for at in range(0, len(samples), size):
        longest = -(-(len(samples[at]) - 1) // 8) * 8
        rows = np.zeros((3, size, longest), dtype=np.int64)
        for row, sample in enumerate(samples[at : at + size]):
            rows[:, row, : len(sample) - 1] = sample[:-1], sample[1:], np.ones(len(sample) - 1)
        tokens, labels, weights = (torch.from_numpy(part) for part in rows)
        yield Microbatch(tokens, labels, weights.float())


def run_trainer(args: argparse.Namespace, pipe: Connection) -> None:
    """Let Trainer train; each of its steps waits for a message and is answered for."""
    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments

    model, before = transformers_model(args), [0.0, 0.0]
    losses: list[float] = []
    rows = [{"input_ids": torch.from_numpy(sample)} for sample in samples_of(args)]

    def collate(members: list[dict[str, Any]]) -> dict[str, Any]:
        ids = [member["input_ids"] for member in members]
        inputs = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
        labels = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=-100)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
        return {"input_ids": inputs, "labels": labels, "attention_mask": mask}

    class Waits(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, arguments: Any, state: Any, control: Any, **_: Any) -> None:
            if pipe.recv() is None:
                os._exit(0)
            losses.clear()
            before[:] = time.perf_counter(), time.process_time()

        def on_step_end(self, arguments: Any, state: Any, control: Any, **_: Any) -> None:
            taken = time.perf_counter() - before[0], time.process_time() - before[1]
            pipe.send((*taken, peak_bytes(), sum(losses)))

    class Told(Trainer):  # type: ignore[misc]
        def training_step(self, *given: Any, **named: Any) -> Any:
            loss = super().training_step(*given, **named)
            losses.append(loss.item())
            return loss

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, per_device_train_batch_size=args.batch, gradient_accumulation_steps=args.samples // args.batch,
            max_steps=10**6, learning_rate=1e-4, weight_decay=0.1, max_grad_norm=1.0, save_strategy="no",
            report_to=[], logging_strategy="no", disable_tqdm=True, use_cpu=True, dataloader_drop_last=True,
        )  # fmt: skip
        Told(model=model, args=arguments, train_dataset=rows, data_collator=collate, callbacks=[Waits()]).train()


def contender(name: str, args: argparse.Namespace, pipe: Connection) -> None:
    """Build, then make one step per message and answer with its seconds."""
    import torch

    torch.set_num_threads(args.threads)
    import transformers  # noqa: F401  # everybody's libraries are there before memory counts

    if "ddp" not in name and name != "Trainer":
        from mswift.parallel import device

        device.prepare("cpu")
        import mswift.parallel.megatron.engine  # noqa: F401
    pipe.send(resident_bytes())
    if name == "Trainer":
        return run_trainer(args, pipe)
    is_padded = "padded" in name
    engine = mswift_engine(args, "ddp" if "ddp" in name else "megatron", args.batch if is_padded else 1)
    samples = samples_of(args)
    data = list(padded(samples, args.batch) if is_padded else packed(samples, args.length))
    while pipe.recv() is not None:
        started = time.perf_counter(), time.process_time()
        loss = engine.train_step(data, 1e-4).loss
        pipe.send((time.perf_counter() - started[0], time.process_time() - started[1], peak_bytes(), loss))
    return None


def measure(args: argparse.Namespace) -> dict[str, list[tuple[float, float, int, float]]]:
    """(seconds, CPU seconds, bytes beyond those before the model, loss) of each step, two warm-up steps first."""
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    before: dict[str, int] = {}
    for name in NAMES:
        pipes[name], theirs = context.Pipe()
        context.Process(target=contender, args=(name, args, theirs), daemon=True).start()
        before[name] = pipes[name].recv()
    steps: dict[str, list[tuple[float, float, int, float]]] = {name: [] for name in NAMES}
    for number in range(args.rounds + 2):
        for shift in range(len(NAMES)):
            name = NAMES[(number + shift) % len(NAMES)]
            pipes[name].send("step")
            wall, cpu, peak, loss = pipes[name].recv()
            steps[name].append((wall, cpu, peak - before[name], loss))
    for pipe in pipes.values():
        pipe.send(None)
    return steps


def report(args: argparse.Namespace, steps: dict[str, list[tuple[float, float, int, float]]]) -> str:
    """The table."""
    import torch
    import transformers

    first = [taken[0][3] for taken in steps.values()]
    assert max(first) / min(first) - 1 < 1e-5, f"not the same training: the first losses are {first}"
    lengths = [len(sample) - 1 for sample in samples_of(args)]
    flags = " ".join(f"--{name} {getattr(args, name)}"
                     for name in ("tuner", "size", "samples", "batch", "length", "rounds", "threads"))  # fmt: skip
    lines = [
        f"`python benchmarks/packing.py {flags}`",
        "",
        f"{cpu_name()}, load {os.getloadavg()[0]:.0f}; torch {torch.__version__}, transformers "
        f"{transformers.__version__}; Llama {args.size}, {args.tuner}, fp32, {args.samples} samples of {min(lengths)} "
        f"to {max(lengths)} tokens, {sum(lengths)} in all, {args.threads} thread(s), {args.rounds} rounds in rotated "
        f"order; loss of the first step {first[0]:.6f}.",
        "",
        *training_table({name: [step[:3] for step in taken[2:]] for name, taken in steps.items()}, sum(lengths)),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Parse, measure, print, perhaps write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.set_defaults(model="llama")
    parser.add_argument("--tuner", choices=["full", "lora"], default="full")
    parser.add_argument("--size", choices=list(SIZES), default="10M")
    parser.add_argument("--samples", type=int, default=64, help="of a step; a multiple of --batch")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--write", type=Path)
    args = parser.parse_args()
    publish(report(args, measure(args)), args.write)


if __name__ == "__main__":
    main()
