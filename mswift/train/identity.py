"""Is the command that continues a run the one that started it? What its flags alone do not tell: base and adapter."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from math import prod
from pathlib import Path
from typing import Any

from mswift import rundir
from mswift.converters.layout import Piece, Region
from mswift.converters.plan import DTYPE_BYTES, ModelTable
from mswift.converters.reader import WeightReader
from mswift.data.chat_template import TEMPLATE_FILE, read_chat_template
from mswift.data.tokenizer import Tokenizer, load_tokenizer
from mswift.errors import ConfigError
from mswift.tuners.peft_config import CONFIG_FILE

_ANOTHER_RUN = "or start a new run with another --output_dir"
_FLAGS = {  # fields of adapter_config.json that a flag spells otherwise
    **dict.fromkeys(("r", "target_r"), "lora_rank"),
    **dict.fromkeys(("vera_dropout", "vblora_dropout", "miss_dropout"), "lora_dropout"),
    "alpha": "lora_alpha",
    "loras": "xlora_adapters",
    "init_lora_weights": "init_weights",
    "total_step": "train_iters",  # AdaLoRA plans for the length of the run
}
_BOOKKEEPING = ("base_model_name_or_path", "peft_version", "tokenizer_name_or_path")


def base_fingerprint(reader: WeightReader) -> dict[str, str]:
    """What a base model is, in any format: hashes of its configuration and of a sample of every kind of tensor.

    Keys are "config.json" and HF names with * for the layer. The first and the last row of every tensor are read: any
    training moves them, an edit of single rows between them is not seen.
    """
    table = reader.table
    digests: dict[str, Any] = {}
    spec = json.dumps([asdict(table.spec), reader.dtype], sort_keys=True)
    result = {"config.json": hashlib.sha256(spec.encode()).hexdigest()[:32]}
    item_bytes = {key: DTYPE_BYTES[reader.dtype_of(key)] for key in table.megatron}
    for name in table.hf_order:
        kind = ".".join("*" if part.isdecimal() else part for part in name.split("."))
        digest = digests.setdefault(kind, hashlib.sha256())
        for piece in table.hf_pieces[name]:
            for region in _first_and_last(table, piece):
                data = bytearray(region.num_elements * item_bytes[piece.names[1]])
                reader.read(piece.names[1], region, memoryview(data))
                digest.update(data)
    return result | {kind: digest.hexdigest()[:32] for kind, digest in digests.items()}


def _first_and_last(table: ModelTable, piece: Piece) -> Iterator[Region]:
    """The first and the last row of an HF tensor as they lie in its Megatron tensor (of a fused vector: elements)."""
    shape, hull = table.hf[piece.names[0]], piece.hull(1)
    *rows, last = (o + s - 1 for o, s in zip(hull.offsets, hull.sizes, strict=True))
    single = (1,) * len(rows)
    if len(shape) > 1 or hull.num_elements == prod(shape):
        yield Region(hull.offsets, (*single, hull.sizes[-1]))
        yield Region((*rows, hull.offsets[-1]), (*single, hull.sizes[-1]))
    else:
        yield Region(hull.offsets, (*single, 1))
        yield Region((*rows, last), (*single, 1))


def check_base(then: Mapping[str, str], now: Mapping[str, str], model: str, started_from: str) -> None:
    """ConfigError unless `model` is the base that the run was started from; names the first part that differs."""
    different = [name for name in (*then, *now) if then.get(name) != now.get(name)]
    if different:
        raise ConfigError(
            f"--model {model}: its {different[0]} is not that of the model this run was started from "
            f"({started_from}); pass that model as it was then, {_ANOTHER_RUN}"
        )


def check_chat_template(checkpoint: Path, now: str | None, then: str | None, tokenizer: Tokenizer) -> None:
    """ConfigError unless --chat_template means the template that the checkpoint holds, wherever its file lies by now.

    now, then: the flag of the command, and of the run before.
    """
    if now is None and then is None:
        return
    other_name = now not in (None, then) and read_chat_template(now) is None
    if other_name or load_tokenizer(checkpoint / rundir.HF_FILES).chat_template != tokenizer.chat_template:
        there, here = (f"--chat_template {flag}" if flag else "the tokenizer's own" for flag in (then, now))
        raise ConfigError(
            f"--chat_template: the run of this --output_dir has another chat template ({there}) than the command "
            f"means ({here}); pass the one in {checkpoint / rundir.HF_FILES / TEMPLATE_FILE}, {_ANOTHER_RUN}"
        )


def check_adapter(checkpoint: Path, adapter_config: bytes) -> None:
    """ConfigError unless the command means the adapter (rank, scale, modules) that the checkpoint holds."""
    now = json.loads(adapter_config)
    then = json.loads((checkpoint / rundir.HF_FILES / CONFIG_FILE).read_text(encoding="utf-8"))
    for name in sorted(then.keys() | now.keys()):
        if name not in _BOOKKEEPING and then.get(name) != now.get(name):
            there, here = _brief(then.get(name)), _brief(now.get(name))
            raise ConfigError(
                f"--{_FLAGS.get(name, name)}: the run of this --output_dir has {there}, the command means {here}; pass "
                f"the --adapters and LoRA flags that it was started with, {_ANOTHER_RUN}"
            )


def _brief(value: Any) -> str:
    """A field of adapter_config.json; of LoRAs that X-LoRA mixes what is in a name."""
    if not value or not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
        return str(value)
    return f"{len(value)} LoRAs, of ranks {' '.join(str(each.get('r')) for each in value)}"
