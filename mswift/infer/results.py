"""results.jsonl: one object a row, in the order of the data set; a half-written file is continued. Torch-free."""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mswift.agent.conversation import read_reply
from mswift.errors import ConfigError
from mswift.infer.request import Completion, Request
from mswift.infer.rows import Row

_LATER = ("opening", "shown")
"""Fields of a request that decide nothing where they are empty."""


def fingerprint(directories: Iterable[Path]) -> str:
    """Tells models apart without reading their weights: name, size and time of every file in the directories."""
    digest = hashlib.sha256()
    for directory in directories:
        for path in sorted(directory.iterdir()):
            if path.is_file():
                state = path.stat()
                digest.update(f"{path.name}\0{state.st_size}\0{state.st_mtime_ns}\0".encode())
    return digest.hexdigest()


def request_hash(request: Request, model: str) -> str:
    """What an answer depends on: the question, the sampling and the model's fingerprint (16 hex digits)."""
    asked = {name: value for name, value in asdict(request).items() if value or name not in _LATER}
    content = json.dumps({"request": asked, "model": model}, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def answered(path: Path, hashes: Sequence[str], asked_with: str = "model and sampling") -> int:
    """How many rows the file answers already; a torn last line is cut off.

    asked_with: what the hashes depend on beside the data, for the error. ConfigError when the file holds anything but
    answers to these requests, in their order: another data set, sampling, or model.
    """
    if not path.exists():
        return 0
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    lines = whole.splitlines()
    for number, line in enumerate(lines, start=1):
        if number > len(hashes) or _hash_of(line) != hashes[number - 1]:
            raise ConfigError(
                f"--result_path {path}: row {number} is not the answer to row {number} of --val_dataset with this "
                f"{asked_with} ({len(hashes)} rows); give another --result_path, or delete the file"
            )
    if len(whole) < len(content):
        with path.open("r+b") as file:
            file.truncate(len(whole))
    return len(lines)


def _hash_of(line: bytes) -> Any:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value.get("hash") if isinstance(value, dict) else None


def to_json(row: Row, request: Request, completion: Completion, row_hash: str) -> str:
    """The line of one answered row, with its end."""
    question: dict[str, Any] = {"prompt": row.prompt} if row.messages is None else {"messages": list(row.messages)}
    if row.opening:
        question["messages"].append({"role": "assistant", "content": row.opening})
    if row.tools:
        question["tools"] = list(row.tools)
    value = {
        **question,
        "response": completion.text,
        **_read(row, completion.text),
        **({"label": row.label} if row.label is not None else {}),
        "finish_reason": completion.finish_reason,
        "prompt_tokens": completion.prompt_tokens,
        "completion_tokens": completion.completion_tokens,
        "hash": row_hash,
    }
    return json.dumps(value, ensure_ascii=False) + "\n"


def _read(row: Row, text: str) -> dict[str, Any]:
    """Words and calls of an answer to a row with tools, or why what looks like a call is none."""
    if row.agent is None:
        return {}
    reply = read_reply(text, row.agent, behind_results=bool(row.opening))
    calls = [{"name": call.name, "arguments": call.arguments} for call in reply.calls]
    problem = {} if reply.problem is None else {"tool_call_problem": reply.problem}
    return {"content": reply.content, "tool_calls": calls, **problem}


def answer_rows(
    rows: Sequence[Row],
    requests: Sequence[Request],
    generate: Callable[[Sequence[Request]], list[Completion]],
    path: Path,
    model: str,
    batch_size: int,
    advance: Callable[[int], None],
) -> tuple[int, int]:
    """Answer what the file does not answer yet, a batch at a time; returns (rows kept, rows answered now).

    `advance` is told how many rows are done, first those kept. Every batch is in the file before the next one starts.
    """
    hashes = [request_hash(request, model) for request in requests]
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = answered(path, hashes)
    advance(kept)
    with path.open("a", encoding="utf-8") as file:
        for start in range(kept, len(rows), batch_size):
            part = slice(start, start + batch_size)
            completions = generate(requests[part])
            for line in map(to_json, rows[part], requests[part], completions, hashes[part]):
                file.write(line)
            file.flush()
            advance(len(completions))
    return kept, len(rows) - kept
