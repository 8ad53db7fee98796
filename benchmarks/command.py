"""What `mswift sft` costs around the computation: the way to the first step, and what a step spends beside the model.

    python benchmarks/command.py [--rounds 7] [--overhead_steps 8] [--write benchmarks/results/command.md]

Start: seconds from the start of `mswift sft` (one process, a tiny model, tokens cached) until its first step is in
metrics.jsonl, beside two plain imports, in rotated order.
Overhead: on a 100M model, the share of wall time between steps that is not forward, backward or optimizer.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.measure import cpu_name
from benchmarks.train import model_config

IMPORTS = {
    "import torch": "import torch",
    "import torch, megatron-core, transformers": (
        "from mswift.parallel.device import prepare; prepare('cpu'); import megatron.core.models.gpt; "
        "from transformers import AutoTokenizer"
    ),
}
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--overhead_steps", type=int, default=8)
    parser.add_argument("--write", type=Path, default=None)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write_inputs(folder)
        lines = [*_start(folder, args.rounds), "", *_overhead(folder, args.overhead_steps)]
    text = "\n".join([f"Machine: {cpu_name()}. Command: `python {' '.join(sys.argv)}`", "", *lines]) + "\n"
    print(text)
    if args.write:
        args.write.write_text("# What the command costs around the computation\n\n" + text)


def _write_inputs(folder: Path) -> None:
    """A tiny and a 100M model with a tokenizer, and chat rows of about 256 tokens."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from tests.support.tiny import tiny_model, tiny_tokenizer

    tiny_model(folder / "tiny")
    torch.manual_seed(0)
    config = AutoConfig.for_model(**model_config("100M"))
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "100M")
    for model in ("tiny", "100M"):
        tiny_tokenizer(folder / model)
    rows = [{"query": f"say {i}", "response": "word " * 42} for i in range(64)]
    (folder / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _sft(folder: Path, model: str, steps: int, batch: int) -> tuple[float, list[tuple[float, dict[str, float]]]]:
    """Run a training; (start, [(when the line was seen, its object)]), times from the same clock."""
    output = folder / "run"
    shutil.rmtree(output, ignore_errors=True)
    argv = [
        sys.executable, "-m", "mswift.cli.main", "sft", "--model", str(folder / model), "--dataset",
        str(folder / "chat.jsonl"), "--output_dir", str(output), "--cache_dir", str(folder / "cache"),
        "--train_iters", str(steps), "--global_batch_size", str(batch), "--micro_batch_size", str(batch),
        "--max_length", "512", "--torch_dtype", "float32",
    ]  # fmt: skip
    started = time.perf_counter()
    seen: list[tuple[float, dict[str, float]]] = []
    metrics = output / "metrics.jsonl"
    with subprocess.Popen(argv, env=ENVIRONMENT, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            lines = metrics.read_text().splitlines() if metrics.exists() else []
            now = time.perf_counter()
            seen += [(now, json.loads(line)) for line in lines[len(seen) :]]
            time.sleep(0.01)
    if process.returncode != 0:
        raise SystemExit(f"{' '.join(argv)} ended with status {process.returncode}")
    return started, seen


def _start(folder: Path, rounds: int) -> list[str]:
    """Table of starts."""
    _sft(folder, "tiny", 1, 4)  # fills the token cache and the page cache

    def first_step() -> float:
        started, seen = _sft(folder, "tiny", 1, 4)
        return seen[0][0] - started

    def imports(code: str) -> Callable[[], float]:
        def run() -> float:
            started = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, check=True)
            return time.perf_counter() - started

        return run

    contenders = {name: imports(code) for name, code in IMPORTS.items()} | {"mswift sft, first step": first_step}
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds):
        names = list(contenders)
        for shift in range(len(names)):
            name = names[(number + shift) % len(names)]
            seconds[name].append(contenders[name]())
    lines = ["| from process start | median s | least | most |", "|---|---|---|---|"]
    for name, values in seconds.items():
        lines.append(f"| {name} | {statistics.median(values):.2f} | {min(values):.2f} | {max(values):.2f} |")
    beyond = statistics.median(seconds["mswift sft, first step"]) - statistics.median(seconds["import torch"])
    return [*lines, "", f"First step beyond `import torch`: {beyond:.2f} s ({rounds} rounds, rotated order)."]


def _overhead(folder: Path, steps: int) -> list[str]:
    """Share of wall time outside forward, backward and optimizer, from the second step on."""
    _, seen = _sft(folder, "100M", steps, 1)
    wall = seen[-1][0] - seen[0][0]
    computing = sum(row["seconds"]["forward_backward"] + row["seconds"]["optimizer"] for _, row in seen[1:])  # type: ignore[index]
    share = 1 - computing / wall  # the last step is seen before its checkpoint is written
    return [
        f"100M model, {steps - 1} steps of 1 sample: {wall:.2f} s, of which {computing:.2f} s are forward, "
        f"backward and optimizer: {share:.1%} outside (the last step's checkpoint left out)."
    ]


if __name__ == "__main__":
    main()
