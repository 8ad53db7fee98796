"""Training commands on a tiny model with a few rows of data: as programs, or as forks, which save the imports."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.support.forks import Forge
from tests.support.tiny import tiny_model, tiny_tokenizer

PROGRAM = (sys.executable, "-m", "mswift.cli.main")


def make_home(path: Path) -> Path:
    """A tiny model with a tokenizer, chat rows of uneven length, a few documents."""
    tiny_model(path / "model")
    tiny_tokenizer(path / "model")
    rows = [{"query": f"say {i}", "response": "x" * (1 + i * 7 % 23) + str(i)} for i in range(20)]
    (path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (path / "val.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:7]))
    text = [{"text": f"Document number {i} " + "abc " * (i % 5)} for i in range(60)]
    (path / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in text))
    return path


def command(home: Path, kind: str, output: Path, *flags: str) -> list[str]:
    """A training command; 20 samples at global batch 8, so that six steps cross two epoch ends."""
    data = home / ("chat.jsonl" if kind == "sft" else "text.jsonl")
    return [
        *PROGRAM, kind, "--model", str(home / "model"), "--dataset", str(data),
        "--output_dir", str(output), "--max_length", "64", "--global_batch_size", "8", "--lr", "1e-2",
        "--lr_warmup_iters", "2", "--lr_decay_iters", "6", "--cache_dir", str(home / "cache"), *flags,
    ]  # fmt: skip


def run(argv: list[str], status: int = 0) -> str:
    """Run a command to its end in forks (tests/support/server.py); the output of both streams.

    `--nproc_per_node N` becomes N ranks, without the launcher above them.
    """
    assert argv[:3] == [*PROGRAM], argv
    words, world_size = argv[3:], 1
    if "--nproc_per_node" in words:
        at = words.index("--nproc_per_node")
        world_size = int(words[at + 1])
        del words[at : at + 2]
    forge = Forge()
    try:
        return forge.run(words, world_size, status, environ=os.environ)
    finally:
        forge.close()


def mswift(*words: object) -> str:
    """Run a command that must succeed, in a fork."""
    return run([*PROGRAM, *map(str, words)])


def run_program(argv: list[str], status: int = 0, **kwargs: Any) -> str:
    """Run a command to its end as a user starts it, imports and launcher included; the output of both streams."""
    done = subprocess.run(argv, capture_output=True, text=True, timeout=300, check=False, **kwargs)
    output = done.stdout + done.stderr
    assert done.returncode == status, output
    return output
