"""What benchmarks/convert.py measures, section by section; each returns Markdown."""

import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from conversion import models
from conversion.processes import Samples, command, measure, run_until
from mswift.converters.catalog import family_names
from mswift.converters.reader import WeightReader


def speed(folder: Path, gigabytes: float, shards: int, rounds: int, workers: list[str]) -> str:
    """Every command `rounds` times, each round starting with another one, against `cp -r` + fsync."""
    hf, megatron, out = folder / "hf", folder / "megatron", folder / "out"
    total = models.write_model(hf, models.dense(gigabytes), shards)
    subprocess.run(command(hf, megatron, "megatron"), check=True, stdout=subprocess.DEVNULL)
    shard = ("--max_shard_size", f"{-(-total // shards // 10**6) + 1}MB")
    plain = ("--hash_source", "false")
    commands: dict[str, list[str]] = {
        "cp -r + fsync": ["/bin/sh", "-c", f"cp -r {hf} {out} && sync {out}/* {out}"],
        "hf -> megatron, no hashes": command(hf, out, "megatron", *plain, *workers),
        "megatron -> hf, no hashes": command(megatron, out, "hf", *plain, *shard, *workers),
        "hf -> megatron, hashed": command(hf, out, "megatron", *workers),
        "megatron -> hf, hashed": command(megatron, out, "hf", *shard, *workers),
        "verify": [sys.executable, "-m", "mswift.cli.main", "verify", str(hf), str(megatron), *workers],
    }
    samples = {name: Samples() for name in commands}
    order = list(commands)
    for number in range(rounds):
        for name in order[number % len(order) :] + order[: number % len(order)]:
            shutil.rmtree(out, ignore_errors=True)
            os.sync()
            measure(commands[name], samples[name])
            _say(f"round {number + 1}: {name} {samples[name].seconds[-1]:.2f} s")
    shutil.rmtree(out, ignore_errors=True)
    shutil.rmtree(megatron)
    shutil.rmtree(hf)
    return f"{total / 1e9:.2f} GB BF16 in {shards} shards, {rounds} rounds in rotated order\n\n{_table(samples, total)}"


def _table(samples: dict[str, Samples], total: int) -> str:
    base = statistics.median(samples["cp -r + fsync"].seconds)
    lines = ["| | seconds: median (min, max) | of cp | CPU s per GB |", "|---|---|---|---|"]
    for name, each in samples.items():
        median = statistics.median(each.seconds)
        spread = f"{median:.2f} ({min(each.seconds):.2f}, {max(each.seconds):.2f})"
        cpu = statistics.median(each.cpu_seconds) / (total / 1e9)
        lines.append(f"| {name} | {spread} | {median / base:.2f} | {cpu:.2f} |")
    return "\n".join(lines)


def memory(folder: Path, sizes: list[float], workers: list[str]) -> str:
    """Largest sum of PSS of all processes, for sparse models of several sizes."""
    lines = ["| GB | hf -> megatron MiB | megatron -> hf MiB | verify MiB |", "|---|---|---|---|"]
    hf, megatron, out = folder / "hf", folder / "megatron", folder / "out"
    for gigabytes in sizes:
        total = models.write_model(hf, models.dense(gigabytes), 4, sparse=True)
        cells = []
        for argv in (
            command(hf, megatron, "megatron", *workers),
            command(megatron, out, "hf", *workers),
            [sys.executable, "-m", "mswift.cli.main", "verify", str(hf), str(megatron), *workers],
        ):
            samples = Samples()
            measure(argv, samples, memory=True)
            cells.append(f"{samples.peak_bytes / 2**20:.0f}")
        lines.append(f"| {total / 1e9:.1f} | {' | '.join(cells)} |")
        for path in (hf, megatron, out):
            shutil.rmtree(path)
    return "\n".join(lines)


def resume(folder: Path, gigabytes: float, moments: int, workers: list[str]) -> str:
    """kill -9 at random moments, then the same command again: equal bytes, and the share that was written twice."""
    hf, whole, out = folder / "hf", folder / "whole", folder / "out"
    total = models.write_model(hf, models.dense(gigabytes), 4)
    run_until(command(hf, whole, "megatron", *workers), None)
    generator, shares, equal = random.Random(0), [], 0
    for moment in range(moments):
        flags = ("--hash_source", "true" if moment % 2 else "false")
        argv = command(hf, out, "megatron", *flags, *workers)
        limit = generator.randrange(total // 50, total * 49 // 50)
        killed, first = run_until(argv, limit)
        _, second = run_until(argv, None)
        shares.append(max(0, first + second - total) / total)
        difference = ["diff", "-r", "-q", "--exclude=mswift_manifest.json", str(whole), str(out)]
        equal += killed and not subprocess.run(difference).returncode
        _say(f"killed after {first / total:.0%}: {shares[-1]:.1%} written twice")
        shutil.rmtree(out)
    for path in (hf, whole):
        shutil.rmtree(path)
    twice = f"{statistics.median(shares):.1%} (at most {max(shares):.1%})"
    return f"{total / 1e9:.1f} GB, killed at {moments} random moments: {equal} equal afterwards; written twice {twice}"


COUNT = """
import json, os, resource, sys, time
from pathlib import Path
from mswift.converters import describe, engine
from mswift.converters.io import descriptors
calls, pools = dict.fromkeys(("pwrite", "pwritev", "copy_file_range", "preadv", "fdatasync"), 0), []
def counted(name, call):
    def run(*args):
        calls[name] += 1
        return call(*args)
    return run
for name in calls:
    setattr(os, name, counted(name, getattr(os, name)))
first, most = descriptors.Descriptors._take, [0]
def take(self, path):
    found = first(self, path)
    most[0] = max(most[0], found.fd)
    return found
descriptors.Descriptors._take = take
start = time.perf_counter(), time.process_time()
planned = engine.plan(Path(sys.argv[1]), "megatron")
text = describe.describe(planned, engine.MAX_SHARD_BYTES)
planned.source.close()
plan = time.perf_counter() - start[0], time.process_time() - start[1]
result = {"plan": plan, "tensors": len(planned.source.order), "bytes": planned.total_bytes}
del planned, text
if len(sys.argv) > 2:
    start = time.perf_counter(), time.process_time()
    engine.convert(Path(sys.argv[1]), Path(sys.argv[2]), "megatron", hash_source=sys.argv[3] == "true")
    result["convert"] = time.perf_counter() - start[0], time.process_time() - start[1]
result |= {"calls": calls, "descriptors": most[0] + 1, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}
print(json.dumps(result))
"""


def scale(folder: Path) -> str:
    """36,000 tensors: planned at full size from sparse files, converted at small widths."""
    config = models.MOE
    if config["model_type"] not in family_names():
        config = models.DENSE | {"num_hidden_layers": 4000}
    lines = ["| model | tensors | GB | plan s | convert s (CPU ms a tensor) | writes | fdatasync | descriptors | MiB |"]
    lines.append("|---|---|---|---|---|---|---|---|---|")
    small = {key: value for key, value in models.SMALL.items() if key in config}
    cases: list[tuple[str, dict[str, Any], tuple[str, ...]]] = [
        ("full size", {}, ()), ("small", small, ("true",)), ("small", small, ("false",))
    ]  # fmt: skip
    for name, widths, flags in cases:
        path, out = folder / "moe", folder / "out"
        models.write_model(path, config | widths, 118, sparse=True)
        argv = [sys.executable, "-c", COUNT, str(path), *([str(out), *flags] if flags else [])]
        found = json.loads(subprocess.run(argv, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
        lines.append(_scale_line(f"{config['model_type']}, {name}{', hashed' * (flags == ('true',))}", found))
        shutil.rmtree(path)
        shutil.rmtree(out, ignore_errors=True)
    return "\n".join(lines)


def _scale_line(name: str, found: dict[str, Any]) -> str:
    calls = found["calls"]
    writes = calls["pwrite"] + calls["pwritev"] + calls["copy_file_range"]
    converted = "-"
    if "convert" in found:
        converted = f"{found['convert'][0]:.1f} ({found['convert'][1] / found['tensors'] * 1e3:.2f})"
    cells = [
        name, f"{found['tensors']:,}", f"{found['bytes'] / 1e9:.1f}", f"{found['plan'][0]:.1f}", converted,
        f"{writes:,}", f"{calls['fdatasync']:,}", str(found["descriptors"]), f"{found['peak'] / 1024:.0f}",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def read(folder: Path, gigabytes: float) -> str:
    """Bytes that each rank reads when training starts, over the bytes that it holds."""
    hf, megatron = folder / "hf", folder / "megatron"
    models.write_model(hf, models.dense(gigabytes), 4, sparse=True)
    subprocess.run(command(hf, megatron, "megatron", "--hash_source", "false"), check=True, stdout=subprocess.DEVNULL)
    lines = ["| from | TP1 | TP2 | TP8 |", "|---|---|---|---|"]
    for path in (hf, megatron):
        cells = [f"{max(_amplification(path, tp)):.3f}" for tp in (1, 2, 8)]
        lines.append(f"| {path.name} | {' | '.join(cells)} |")
    shutil.rmtree(hf)
    shutil.rmtree(megatron)
    return "\n".join(lines)


def _amplification(path: Path, tp_size: int) -> Iterator[float]:
    """For each rank: bytes of weights read by it, counted by the reader and by the system, over those it holds."""
    for rank in range(tp_size):
        before = _system_bytes()
        reader, held = WeightReader(path), 0
        opened = _system_bytes() - before
        for key, tensor in reader.table.megatron.items():
            for layer in range(tensor.shape[0]) if tensor.stacked else (None,):
                for region in reader.table.shard(key, rank, tp_size, layer):
                    out = memoryview(bytearray(2 * region.num_elements))
                    reader.read(key, region, out)
                    held += len(out)
        yield max(reader.bytes_read, _system_bytes() - before - opened) / held


def _system_bytes() -> int:
    return int(Path("/proc/self/io").read_text().split("rchar:")[1].split()[0])


def _say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr)
