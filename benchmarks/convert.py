"""Time and memory of `mswift convert` against `cp -r` + fsync of the same bytes, in one run, in rotated order.

Generates a random BF16 checkpoint, converts it both ways in fresh processes, and deletes everything again. What is
timed is what a user waits for: the whole command, from start to exit. Before each measurement the old output is
deleted and the disk is synced; the source stays in the page cache.
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
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from mswift.converters.plan import table_for
from mswift.converters.workers import default_workers

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 32000,
    "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
    "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip


@dataclass
class Samples:
    """Seconds of each round, CPU seconds of each round, largest resident memory of the process."""

    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0


def generate(path: Path, gigabytes: float, shards: int) -> int:
    """A random checkpoint of about that size; returns its bytes of weights."""
    layers = 1
    while 2 * sum(map(prod, table_for(CONFIG | {"num_hidden_layers": layers}).hf.values())) < gigabytes * 1e9:
        layers += 1
    config = CONFIG | {"num_hidden_layers": layers}
    table = table_for(config)
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    names, weight_map, total = table.hf_order, {}, 0
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = names[shard * len(names) // shards : (shard + 1) * len(names) // shards]
        header, position = {}, 0
        for name in part:
            size = 2 * prod(table.hf[name])
            header[name] = {"dtype": "BF16", "shape": table.hf[name], "data_offsets": [position, position + size]}
            position += size
        text = json.dumps(header).encode()
        with open(path / file, "wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            for start in range(0, position, 1 << 20):
                out.write(os.urandom(min(1 << 20, position - start)))
        weight_map |= dict.fromkeys(part, file)
        total += position
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return total


def measure(command: str, samples: Samples) -> None:
    """Runs a shell command in its own process group of children and adds what it took."""
    start = time.perf_counter()
    process = subprocess.Popen(["/bin/sh", "-c", command], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    samples.seconds.append(time.perf_counter() - start)
    samples.cpu_seconds.append(usage.ru_utime + usage.ru_stime)
    samples.peak_bytes = max(samples.peak_bytes, usage.ru_maxrss * 1024)
    if status:
        raise SystemExit(f"failed with status {status}: {command}")


def run(folder: Path, rounds: int, workers: int | None) -> dict[str, Samples]:
    """Every command `rounds` times, each round starting with another one."""
    mswift = f"exec {sys.executable} -m mswift.cli.main"
    extra = "" if workers is None else f" --num_workers {workers}"
    hf, megatron = folder / "hf", folder / "megatron"
    subprocess.run(
        f"{mswift} convert --model {hf} --to megatron --output_dir {megatron}".split()[1:], check=True, text=True
    )
    out = folder / "out"
    commands: dict[str, str] = {
        "cp -r + fsync": f"cp -r {hf} {out} && sync {out}/* {out}",
        "hf -> megatron": f"{mswift} convert --model {hf} --to megatron --output_dir {out}{extra}",
        "megatron -> hf": f"{mswift} convert --model {megatron} --to hf --output_dir {out}{extra}"
        " --max_shard_size 700MB",
        "verify": f"{mswift} verify {hf} {megatron}{extra}",
    }
    samples = {name: Samples() for name in commands}
    order = list(commands)
    for number in range(rounds):
        for name in order[number % len(order) :] + order[: number % len(order)]:
            shutil.rmtree(out, ignore_errors=True)
            os.sync()
            measure(commands[name], samples[name])
            print(f"round {number + 1}: {name} {samples[name].seconds[-1]:.2f} s", file=sys.stderr)
    return samples


def table(samples: dict[str, Samples], total: int) -> str:
    """Markdown: median (min, max), ratio to cp, CPU seconds per GB, peak memory."""
    base = statistics.median(samples["cp -r + fsync"].seconds)
    column: Callable[[list[float]], str] = lambda xs: f"{statistics.median(xs):.2f} ({min(xs):.2f}, {max(xs):.2f})"  # noqa: E731
    lines = [
        "| | seconds: median (min, max) | of cp | CPU s per GB | peak resident MiB |",
        "|---|---|---|---|---|",
    ]
    for name, each in samples.items():
        ratio = statistics.median(each.seconds) / base
        cpu = statistics.median(each.cpu_seconds) / (total / 1e9)
        lines.append(f"| {name} | {column(each.seconds)} | {ratio:.2f} | {cpu:.2f} | {each.peak_bytes / 2**20:.0f} |")
    return "\n".join(lines)


def main() -> None:
    """Parses arguments, runs, prints the table with the command that made it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--num_workers", type=int)
    parser.add_argument("--dir", type=Path, help="where to write (default: the temporary directory)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.dir, prefix="mswift-benchmark-") as folder:
        total = generate(Path(folder) / "hf", options.gigabytes, options.shards)
        samples = run(Path(folder), options.rounds, options.num_workers)
    workers = options.num_workers or default_workers()
    print(f"`python benchmarks/convert.py {' '.join(sys.argv[1:])}`\n")
    print(
        f"{total / 1e9:.2f} GB BF16 in {options.shards} shards, {options.rounds} rounds in rotated order, "
        f"{workers} workers, source hashed (sha256) on the way, load average {os.getloadavg()[0]:.1f}\n"
    )
    print(table(samples, total))


if __name__ == "__main__":
    main()
