"""Tokenising in numbers: against `datasets.map` with a bare tokenizer call, by workers, and its memory.

Speeds are by CPU seconds, so that they hold on a machine that does other work too; peaks are those of the process above
what it holds before it reads.
"""

import json
import os
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import conversations, peak_bytes, resident_bytes
from mswift.data.dataset import DataOptions, TokenDataset, build_dataset


def write_rows(path: Path, words: Sequence[str], enough: Callable[[int, int], bool]) -> int:
    """Conversations until `enough(rows, bytes)`; their number."""
    rows, size = 0, 0
    with path.open("w", encoding="utf-8") as stream:
        for line in conversations(random.Random(0), words):
            if enough(rows, size):
                break
            size += stream.write(line)
            rows += 1
    return rows


def build(kind: Any, path: Path, cache: Path, tokenizer: Any, num_proc: int = 1) -> TokenDataset:
    options = DataOptions(max_length=4096, cache_dir=cache, num_proc=num_proc)
    return build_dataset(kind, [str(path)], tokenizer, options, is_writer=True, barrier=lambda: None, progress=False)


def speed(folder: Path, tokenizer: Any, words: Sequence[str], rows: int) -> list[str]:
    """CPU seconds of one thread: tokens with masks, the part of it inside the tokenizer, and the bare call."""
    from datasets import Dataset, disable_progress_bars

    disable_progress_bars()
    path = folder / "speed.jsonl"
    write_rows(path, words, lambda count, _: count == rows)
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
    return lines


def workers(folder: Path, tokenizer: Any, words: Sequence[str], rows: int) -> list[str]:
    """CPU seconds of the process that reads and writes, and of each tokenising process; the larger bounds the speed."""
    path, small = folder / "workers.jsonl", folder / "small.jsonl"
    write_rows(path, words, lambda count, _: count == rows)
    write_rows(small, words, lambda count, _: count == 1)
    _, start = _shared_out(small, folder / "small", tokenizer, 1 + 1)
    lines = [
        "| tokenising processes | reading, writing: CPU s | tokenising: CPU s of each, started | shared out |",
        "|---|---|---|---|",
    ]
    for number in (1, 2, 4):
        mine, each = _shared_out(path, folder / f"cache-{number}", tokenizer, number)
        work = 0.0 if number == 1 else each - start
        share = (mine + number * work) / max(mine, work)
        lines.append(f"| {number} | {mine:.2f} | {work:.2f} | {share:.2f} times as fast as one |")
    return [*lines, "", f"{rows:,} conversations. The start of a tokenising process takes {start:.1f} CPU s."]


def _shared_out(path: Path, cache: Path, tokenizer: Any, number: int) -> tuple[float, float]:
    """CPU seconds of this process, and of each other one (`number` of them, none for 1)."""
    before, started = os.times(), time.process_time()
    build("sft", path, cache, tokenizer, number)
    mine, after = time.process_time() - started, os.times()
    others = after.children_user + after.children_system - before.children_user - before.children_system
    return mine, others / number


def memory(folder: Path, tokenizer: Any, words: Sequence[str], megabytes: int) -> list[str]:
    """Peak above the start."""
    lines = ["| file | size | peak above the start |", "|---|---|---|"]
    for name, kind in (("rows.jsonl", "sft"), ("book.txt", "pt")):
        path = folder / name
        if kind == "sft":
            write_rows(path, words, lambda _, size: size >= megabytes << 20)
        else:
            with path.open("w") as stream:
                while stream.tell() < megabytes << 20:
                    stream.write(" ".join(words[:5000]) + "\n" * 2)
        before = resident_bytes()
        build(kind, path, folder / "cache", tokenizer)
        size = path.stat().st_size
        lines.append(f"| {name} ({kind}) | {size / 2**20:,.0f} MiB | {(peak_bytes() - before) / 2**20:,.0f} MiB |")
        path.unlink()
    return lines
