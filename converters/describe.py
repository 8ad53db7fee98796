"""A conversion in words, before any byte moves: what `mswift convert --dry_run` prints."""

import json
from collections.abc import Mapping
from math import prod

from mswift.converters.engine import Plan
from mswift.converters.plan import DTYPE_BYTES


def describe(planned: Plan, max_shard_bytes: int) -> str:
    """The plan as a table: one line for each Megatron tensor, then totals and what is dropped."""
    source, table = planned.source, planned.source.table
    rows = [("rule", "Megatron tensor", "shape", "Hugging Face tensors", "bytes")]
    for key, tensor in table.megatron.items():
        parts = " ".join(part.hf.replace("{l}", "*") for part in tensor.rule.parts)
        dtype = source.dtype_of(table.pieces(key, range(1), range(1))[0].names[0])
        size = prod(tensor.shape) * DTYPE_BYTES[dtype]
        rows.append((tensor.rule.kind, key, str(list(tensor.shape)), parts, f"{size:,}"))
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    total = planned.total_bytes
    if planned.to == "hf":
        where = f"safetensors files of at most {max_shard_bytes:,} bytes"
    else:
        where = "torch_dist"
    elements = sum(prod(table.hf[name]) for name in source.order)
    lines.append(f"{source.format} ({source.dtype}) -> {where}")
    lines.append(
        f"{len(source.order):,} tensors, {elements:,} elements, {total:,} bytes: each element moves exactly once"
    )
    compared = {name: " (compared when it is converted)" for name, d in planned.dropped.items() if d.same_as}
    reasons = {name: record.reason + compared.get(name, "") for name, record in planned.dropped.items()}
    lines += [f"dropped {names}: {reason}" for reason, names in grouped(reasons).items()]
    lines += [f"decoded {names}: {rule}" for rule, names in grouped(source.decoded).items()]
    for name, value in source.config_edits.items():
        lines.append(f"config.json: {name} " + ("is left out" if value is None else f"becomes {json.dumps(value)}"))
    if source.ignored:
        lines.append(f"config.json: ignored as asked: {', '.join(source.ignored)}")
    return "\n".join(lines)


def grouped(said: Mapping[str, str]) -> dict[str, str]:
    """What is said of names -> the names, in short."""
    groups: dict[str, list[str]] = {}
    for name, text in said.items():
        groups.setdefault(text, []).append(name)
    return {
        text: names[0] if len(names) == 1 else f"{names[0]}, ... ({len(names):,} tensors)"
        for text, names in groups.items()
    }
