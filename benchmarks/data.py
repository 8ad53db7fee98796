"""The data plane in numbers: every part of it has a section.

    python benchmarks/data.py [--sections memory,packing,order,speed,workers,reading,large] [--model DIR]
        [--text FILE ...] [--megabytes 2048] [--num_proc 2] [--directory DIR] [--write FILE.md]

packing: log-normal lengths (median 403, as of chat sets), cut at --length, packed by mswift.data.packing; fill rate,
CPU seconds, and memory beyond the lengths themselves. The peer is numpy's stable argsort of the same lengths.
order: the first batch of 1,024 samples of a run that goes on at sample 50 million, with nothing kept from before. The
peer is the shuffle of the whole epoch by numpy (Generator.permutation).
speed: tokens with proved masks by one thread. The peer is `datasets.map` with a bare tokenizer call.
workers: how the work is shared out among processes.
memory: peaks of small builds, of rows and of one long document (first, while the process holds nothing from before).
reading: what ranks read from a disk, and a broadcast in place of it.
large: `mswift data build` of a .jsonl of --megabytes: the peak of all its processes, and the start of the next run.

Speeds are by CPU seconds, so that they hold on a machine that does other work too. Conversations are one to three turns
of words that stand together in --text; --model names the tokenizer (default: a tiny one of single bytes).
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

os.environ |= {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.large import large
from benchmarks.measure import cpu_name, peak_bytes, resident_bytes
from benchmarks.reading import reading
from benchmarks.tokenising import memory, speed, workers
from mswift.data.order import sample_ids
from mswift.data.packing import pack
from mswift.data.tokenizer import Tokenizer, load_tokenizer
from tests.support.tiny import tiny_tokenizer

WORDS = ("the", "model", "reads", "a", "question", "and", "writes", "its", "answer,", "short,", "clear.", "1234", "5")

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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", default="memory,packing,order,speed,workers,reading,large")
    parser.add_argument("--samples", type=int, default=10_000_000)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--text", type=Path, nargs="*", default=())
    parser.add_argument("--rows", type=int, default=6000, help="of speed and workers")
    parser.add_argument("--megabytes", type=int, default=2048, help="of large")
    parser.add_argument("--num_proc", type=int, default=2, help="of large")
    parser.add_argument("--directory", help="where files are written, for a disk to be measured")
    parser.add_argument("--write", type=Path)
    args = parser.parse_args()
    words = " ".join(path.read_text(encoding="utf-8") for path in args.text).split() or list(WORDS) * 1000
    texts = []
    with tempfile.TemporaryDirectory(prefix="mswift-benchmark-", dir=args.directory) as name:
        folder = Path(name)
        if args.model is None:
            tiny_tokenizer(folder / "tiny")
        model = args.model or folder / "tiny"

        def warm() -> Tokenizer:
            tokenizer = load_tokenizer(model)
            tokenizer(["warm"])
            return tokenizer

        sections: dict[str, Callable[[], list[str]]] = {
            "packing": lambda: packing(args.samples, args.length),
            "order": order,
            "speed": lambda: speed(folder, warm(), words, args.rows),
            "workers": lambda: workers(folder, warm(), words, args.rows),
            "memory": lambda: memory(folder, warm(), words, 8),
            "reading": lambda: reading(folder, 256, (1, 2, 4)),
            "large": lambda: large(folder, model, words, args.megabytes, args.num_proc),
        }
        for each in args.sections.split(","):
            lines = sections[each]()
            load = f"load {os.getloadavg()[0]:.0f} at the end"
            texts.append("\n".join([f"## {each}", "", f"{cpu_name()}, {load}, numpy {np.__version__}", "", *lines]))
            print(texts[-1], flush=True)
    if args.write:
        command = f"`python benchmarks/data.py {' '.join(sys.argv[1:])}`"
        args.write.write_text(f"# Data\n\n{command}\n\n" + "\n\n".join(texts) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
