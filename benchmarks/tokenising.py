"""Tokenising in numbers: against `datasets.map` with a bare tokenizer call, memory, a second start.

    python benchmarks/tokenising.py [--model DIR] [--rows 1000] [--megabytes 4] [--write FILE.md]

Rows are conversations of one to three turns. Speeds are by CPU seconds of one thread, so that they hold on a machine
that does other work too; peaks are those of the process above what it holds before it reads. Prints Markdown.
"""

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ |= {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.measure import cpu_name, peak_bytes, resident_bytes
from mswift.data.dataset import DataOptions, TokenDataset, build_dataset
from mswift.data.tokenizer import load_tokenizer
from tests.support.tiny import tiny_tokenizer

WORDS = ("the", "model", "reads", "a", "question", "and", "writes", "its", "answer,", "short,", "clear.", "1234", "5")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="whose tokenizer is used (default: a tiny one of single bytes)")
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--megabytes", type=int, default=4, help="of the files whose peak is measured")
    parser.add_argument("--write", type=Path, default=None)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mswift-benchmark-") as name:
        folder = Path(name)
        if args.model is None:
            tiny_tokenizer(folder / "tiny")
        tokenizer = load_tokenizer(args.model or folder / "tiny")
        tokenizer(["warm"])
        held = memory(folder, tokenizer, args.megabytes)  # first: nothing is kept from before
        parts = [speed(folder, tokenizer, args.rows), held]
    load = f"load average {os.getloadavg()[0]:.0f}"
    head = f"Machine: {cpu_name()}, {load}. Command: `python {' '.join(sys.argv)}`"
    text = "\n\n".join([head, *parts]) + "\n"
    print(text)
    if args.write:
        args.write.write_text("# Tokenising\n\n" + text)


def write_rows(path: Path, enough: Callable[[int, int], bool]) -> None:
    """Conversations until `enough(rows, bytes)`."""
    chosen, rows, size = random.Random(0), 0, 0
    with path.open("w") as stream:
        while not enough(rows, size):
            roles = ("user", "assistant") * chosen.randint(1, 3)
            said = [" ".join(chosen.choices(WORDS, k=chosen.randint(5, 120))) for _ in roles]
            messages = [{"role": role, "content": text} for role, text in zip(roles, said, strict=True)]
            size += stream.write(json.dumps({"messages": messages}) + "\n")
            rows += 1


def build(kind: Any, path: Path, cache: Path, tokenizer: Any) -> TokenDataset:
    options = DataOptions(max_length=4096, cache_dir=cache, num_proc=1)
    return build_dataset(kind, [str(path)], tokenizer, options, is_writer=True, barrier=lambda: None, progress=False)


def speed(folder: Path, tokenizer: Any, rows: int) -> str:
    """CPU seconds of one thread: tokens with masks, the part of it inside the tokenizer, and the bare call."""
    from datasets import Dataset, disable_progress_bars

    disable_progress_bars()
    path = folder / "speed.jsonl"
    write_rows(path, lambda count, _: count == rows)
    inside, original = [0.0], tokenizer._encode_plus

    def timed(*positional: Any, **options: Any) -> Any:
        started = time.process_time()
        try:
            return original(*positional, **options)
        finally:
            inside[0] += time.process_time() - started

    tokenizer._encode_plus = timed
    started = time.process_time()
    data = build("sft", path, folder / "cache", tokenizer)
    whole = time.process_time() - started
    tokenizer._encode_plus = original
    texts = [tokenizer.apply_chat_template(json.loads(line)["messages"], tokenize=False) for line in path.open()]
    bare = Dataset.from_dict({"text": texts})
    started = time.process_time()
    bare.map(lambda batch: {"ids": tokenizer(batch["text"], add_special_tokens=False)["input_ids"]}, batched=True,
             remove_columns=["text"], load_from_cache_file=False)  # fmt: skip
    peer = time.process_time() - started
    started, wall = time.process_time(), time.perf_counter()
    build("sft", path, folder / "cache", tokenizer)
    again = time.process_time() - started, time.perf_counter() - wall
    tokens = data.num_tokens
    lines = [
        "| one thread | CPU s | tokens/s | against the bare call |",
        "|---|---|---|---|",
        f"| rows to tokens with proved masks, cached | {whole:.2f} | {tokens / whole:,.0f} | {whole / peer:.2f} |",
        f"| of it inside the tokenizer | {inside[0]:.2f} | | {inside[0] / whole:.0%} of the whole |",
        f"| `datasets.map` with a bare tokenizer call on the rendered texts | {peer:.2f} | {tokens / peer:,.0f} | 1 |",
        "",
        f"{rows:,} conversations, {tokens:,} tokens. Opening them again: {again[0]:.3f} CPU s, {again[1]:.3f} s.",
        "",
        f"What is outside the tokenizer is Python, so threads inside it (rayon) could make the whole at most "
        f"{whole / (whole - inside[0]):.1f} times as fast on any number of cores; processes share out both.",
    ]
    return "\n".join(["## Speed", "", *lines])


def memory(folder: Path, tokenizer: Any, megabytes: int) -> str:
    """Peak above the start."""
    lines = ["| file | size | peak above the start |", "|---|---|---|"]
    for name, kind in (("rows.jsonl", "sft"), ("book.txt", "pt")):
        path = folder / name
        if kind == "sft":
            write_rows(path, lambda _, size: size >= megabytes << 20)
        else:
            with path.open("w") as stream:
                while stream.tell() < megabytes << 20:
                    stream.write(" ".join(WORDS) + "\n" * 2)
        before = resident_bytes()
        build(kind, path, folder / "cache", tokenizer)
        size = path.stat().st_size
        lines.append(f"| {name} ({kind}) | {size / 2**20:,.0f} MiB | {(peak_bytes() - before) / 2**20:,.0f} MiB |")
        path.unlink()
    return "\n".join(["## Memory", "", *lines])


if __name__ == "__main__":
    main()
