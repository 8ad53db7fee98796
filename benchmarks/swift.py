"""Whole commands: `mswift sft` against ms-swift's `swift sft`, the same model, chats, batches and threads.

    python benchmarks/swift.py --swift PATH/TO/bin/swift [--size 10M] [--steps 12] [--rounds 3] [--write FILE]

ms-swift needs an environment of its own: `python -m venv v; v/bin/pip install ms-swift torch`. Full fine-tuning in
fp32 on one thread of the CPU, global batches of 16 chats of uneven length (half have fewer than about 70 tokens), 8 in
a microbatch. Contenders run one after the other, in rotated order; a step counts from the moment at which the line of
the one before is in the command's log, the first step (and all that comes before it) left out. mswift packed: a step
has as many rows of 512 positions as have about the tokens of 16 chats. Tokens are those of the chats, by mswift's
count; ms-swift learns from the same chats, padded.
"""

import argparse
import json
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.measure import cpu_name, publish
from benchmarks.train import SIZES, model_config

NUM_CHATS, GLOBAL, MICRO, LENGTH = 512, 16, 8, 512
ENVIRONMENT = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
OURS = {
    "mswift, packed": ("--packing", "--packing_length", str(LENGTH), "--global_batch_size", "3"),
    "mswift": ("--global_batch_size", str(GLOBAL), "--micro_batch_size", str(MICRO)),
    "mswift --backend ddp, packed": (
        *("--backend", "ddp", "--packing", "--packing_length", str(LENGTH), "--global_batch_size", "3"),
    ),
    "mswift --backend ddp": (
        *("--backend", "ddp", "--global_batch_size", str(GLOBAL), "--micro_batch_size", str(MICRO)),
    ),
}
THEIRS = "ms-swift"


def write_inputs(folder: Path, size: str) -> None:
    """A model with a tokenizer of bytes and ChatML, and chats of words of the licence."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from tests.support.tiny import tiny_tokenizer

    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**model_config(size))).save_pretrained(folder / "model")
    tiny_tokenizer(folder / "model")
    chosen = random.Random(1)
    words = (Path(__file__).resolve().parents[1] / "LICENSE").read_text().split()
    with (folder / "chat.jsonl").open("w") as file:
        for number in range(NUM_CHATS):
            count = max(2, min(60, int(chosen.lognormvariate(1.6, 0.9))))
            first = chosen.randrange(len(words) - count)
            answer = " ".join(words[first : first + count])
            turns = [{"role": "user", "content": f"say {number}"}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": turns}) + "\n")


def command_of(name: str, folder: Path, args: argparse.Namespace) -> list[str]:
    """The command of a contender, which writes into folder/run."""
    data, steps = ("--dataset", str(folder / "chat.jsonl"), "--output_dir", str(folder / "run")), str(args.steps)
    if name == THEIRS:
        return [
            str(args.swift), "sft", "--model", str(folder / "model"), "--model_type", "llama", "--template", "chatml",
            *data, "--tuner_type", "full", "--torch_dtype", "float32", "--attn_impl", "sdpa", "--max_length",
            str(LENGTH), "--per_device_train_batch_size", str(MICRO), "--gradient_accumulation_steps",
            str(GLOBAL // MICRO), "--max_steps", steps, "--learning_rate", "1e-4", "--logging_steps", "1",
            "--save_strategy", "no", "--report_to", "none", "--split_dataset_ratio", "0", "--use_hf", "true",
            "--dataset_num_proc", "1", "--load_from_cache_file", "false", "--gradient_checkpointing", "false",
        ]  # fmt: skip
    return [
        sys.executable, "-m", "mswift.cli.main", "sft", "--model", str(folder / "model"), *data, "--torch_dtype",
        "float32", "--max_length", str(LENGTH), "--train_iters", steps, "--lr", "1e-4", "--tensorboard", "false",
        "--cache_dir", str(folder / "cache"), *OURS[name],
    ]  # fmt: skip


def run(name: str, folder: Path, args: argparse.Namespace) -> tuple[list[float], list[float]]:
    """Seconds and tokens of each step but the first; tokens: nan of ms-swift."""
    shutil.rmtree(folder / "run", ignore_errors=True)
    with (folder / "said.txt").open("w") as said:
        process = subprocess.Popen(
            command_of(name, folder, args), env=ENVIRONMENT, cwd=folder, stdout=said, stderr=subprocess.STDOUT
        )
    seen: list[tuple[float, float]] = []
    while process.poll() is None or not seen:
        if process.poll() not in (None, 0):
            raise SystemExit(f"{name} ended with {process.returncode}: {(folder / 'said.txt').read_text()[-3000:]}")
        paths = [*(folder / "run").glob("metrics.jsonl"), *(folder / "run").glob("*/logging.jsonl")]
        lines = paths[0].read_text().splitlines() if paths else []
        rows = [json.loads(line) for line in lines if re.search('"(tokens|global_step/max_steps)"', line)]
        now = time.perf_counter()
        seen += [(now, row.get("tokens", float("nan"))) for row in rows[len(seen) :]]
        time.sleep(0.01)
    steps = list(pairwise(seen))
    return [after[0] - before[0] for before, after in steps], [after[1] for _, after in steps]


def report(args: argparse.Namespace, folder: Path) -> str:
    """The table."""
    write_inputs(folder, args.size)
    names = [*OURS, THEIRS]
    seconds: dict[str, list[float]] = {name: [] for name in names}
    tokens: dict[str, list[float]] = {name: [] for name in names}
    for number in range(args.rounds):
        for shift in range(len(names)):
            name = names[(number + shift) % len(names)]
            taken, counted = run(name, folder, args)
            seconds[name] += taken
            tokens[name] += counted
            print(f"{name}: {statistics.median(taken):.2f} s a step", file=sys.stderr, flush=True)
    tokens[THEIRS] = [statistics.fmean(tokens["mswift"])] * len(seconds[THEIRS])
    rates = {name: sum(tokens[name]) / sum(seconds[name]) for name in names}
    version = subprocess.run([args.swift.parent / "pip", "list"], capture_output=True, text=True, check=True).stdout
    theirs = ", ".join(" ".join(line.split()) for line in version.splitlines()
                       if line.split()[0] in ("ms_swift", "torch", "transformers"))  # fmt: skip
    lines = [
        f"`python benchmarks/swift.py --swift v/bin/swift --size {args.size} --steps {args.steps} --rounds "
        f"{args.rounds}`",
        "",
        f"{cpu_name()}, load {os.getloadavg()[0]:.0f}; Llama {args.size}, full, fp32, one thread; ms-swift's "
        f"environment: {theirs}.",
        "",
        "| contender | tokens/s | it / ms-swift | median s a step | tokens a step |",
        "|---|---|---|---|---|",
    ]
    for name in names:
        middle, counted = statistics.median(seconds[name]), statistics.fmean(tokens[name])
        ratio = rates[name] / rates[THEIRS]
        lines.append(f"| {name} | {rates[name]:.0f} | {ratio:.2f} | {middle:.2f} | {counted:.0f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Parse, measure, print, perhaps write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--swift", type=Path, help="the command of ms-swift; nothing is measured without it")
    parser.add_argument("--size", choices=list(SIZES), default="10M")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--write", type=Path)
    args = parser.parse_args()
    if args.swift is None:
        print("benchmarks/swift.py needs --swift PATH/TO/bin/swift, ms-swift in an environment of its own")
        return
    with tempfile.TemporaryDirectory() as name:
        publish(report(args, Path(name)), args.write)


if __name__ == "__main__":
    main()
