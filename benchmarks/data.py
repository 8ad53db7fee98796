"""Packing and order of large data sets: fill rate, time, memory.

    python benchmarks/data.py [--sections packing,order] [--samples 10000000] [--length 4096] [--write FILE.md]

packing: log-normal lengths (median 403, as of chat sets), cut at --length, packed by mswift.data.packing; fill rate,
CPU seconds, and memory beyond the lengths themselves. The peer is numpy's stable argsort of the same lengths.
order: the first batch of 1,024 samples of a run that goes on at sample 50 million, with nothing kept from before. The
peer is the shuffle of the whole epoch by numpy (Generator.permutation).
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
from measure import cpu_name, peak_bytes, resident_bytes

from mswift.data.order import sample_ids
from mswift.data.packing import pack

_MIB = 2**20
_FAR = 50_000_000


def measured(work: Callable[[], object]) -> tuple[object, float, float]:
    """(result, CPU seconds, MiB beyond what was there)."""
    before, started = resident_bytes(), time.process_time()
    result = work()
    return result, time.process_time() - started, (peak_bytes() - before) / _MIB


def packing(num_samples: int, capacity: int) -> list[str]:
    drawn = np.random.default_rng(1).lognormal(6.0, 0.9, num_samples)
    lengths = np.clip(drawn.astype(np.int64), 8, capacity)
    del drawn
    _, sort_seconds, sort_mib = measured(lambda: np.argsort(lengths, kind="stable"))
    lines = [
        f"packing {num_samples:,} samples, {capacity:,} positions a row",
        "",
        "| | fill rate | CPU seconds | of the sort's | MiB |",
        "|---|---|---|---|---|",
        f"| stable argsort | | {sort_seconds:.2f} | 1 | {sort_mib:,.0f} |",
    ]
    for strategy in ("bestfit", "sequential"):
        packs, seconds, mib = measured(lambda strategy=strategy: pack(lengths, capacity, strategy))
        fill = int(lengths.sum()) / (len(packs) * capacity)  # type: ignore[arg-type]
        lines.append(f"| {strategy} | {fill:.3%} | {seconds:.2f} | {seconds / sort_seconds:.2f} | {mib:,.0f} |")
        del packs
    return lines


def order() -> list[str]:
    _, seconds, mib = measured(lambda: sample_ids(2 * _FAR, 42, _FAR, 1024))
    _, peer_seconds, peer_mib = measured(lambda: np.random.default_rng(42).permutation(_FAR))
    return [
        f"the batch at sample {_FAR:,}",
        "",
        "| | CPU seconds | MiB |",
        "|---|---|---|",
        f"| computed from the position | {seconds:.4f} | {mib:,.1f} |",
        f"| the epoch shuffled (half as long) | {peer_seconds:.2f} | {peer_mib:,.0f} |",
    ]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sections", default="packing,order")
    parser.add_argument("--samples", type=int, default=10_000_000)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--write", type=Path)
    args = parser.parse_args()
    sections = {"packing": lambda: packing(args.samples, args.length), "order": order}
    texts = ["\n".join(sections[name]()) for name in args.sections.split(",")]
    load = f"load {os.getloadavg()[0]:.1f}"
    text = "\n\n".join([f"{cpu_name()}, {load} at the end, numpy {np.__version__}", *texts])
    print(text)
    if args.write:
        args.write.write_text(f"# Data\n\n`python benchmarks/data.py`\n\n{text}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
