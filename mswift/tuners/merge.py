"""`mswift merge`: one fp32 fold of adapters into a copy of their base, tensor by tensor.

weight' = cast(float32(weight) + sum over adapters of scale * float32(B) @ float32(A)); of a DoRA adapter, whose norms
are those of the base weight, rows are then scaled to the length that its magnitude vector says; adapters of stacked
experts (`target_parameters`) go to each expert's own weight; modules_to_save replace their weight. No model is built;
a few row blocks are in memory at a time. The base is only read.
"""

import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from mswift.config.merge import MergeConfig
from mswift.converters.adapters import EMBED, HEAD, SAVABLE
from mswift.converters.catalog import read_config
from mswift.converters.io.dcp_metadata import METADATA
from mswift.converters.io.files import new_directory, open_read, read_exactly, write_file
from mswift.converters.io.safetensors import INDEX, SAFETENSORS, read_directory
from mswift.converters.io.side_files import carried_files
from mswift.converters.io.stored import StoredTensor
from mswift.converters.io.torch_bin import TORCH_BIN
from mswift.converters.layout import Region
from mswift.converters.plan import DTYPE_BYTES, WEIGHT_DTYPES, ModelTable, table_for
from mswift.converters.quantization import FIELD, quantization_of
from mswift.data.chat_template import own_template, template_of_adapters, with_chat_template
from mswift.errors import CheckpointError, ConfigError
from mswift.tuners.adapter import PeftAdapter
from mswift.tuners.files import row_blocks, write_safetensors
from mswift.tuners.folding import Delta, LinearDelta, parameter_deltas
from mswift.tuners.hidden import is_hidden
from mswift.tuners.merge_method import MethodFold
from mswift.tuners.method_adapter import MethodAdapter
from mswift.tuners.methods import METHOD_TYPES
from mswift.tuners.peft_config import base_note, read_adapter_json
from mswift.tuners.prompts import is_prompt
from mswift.tuners.shapes import adapted_linears, adapter_table, promised_shapes

_TORCH = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_TIE = "tie_word_embeddings"


@dataclass(frozen=True)
class MergeReport:
    """What was written; prints as one sentence."""

    destination: Path
    num_folded: int
    num_replaced: int
    num_tensors: int
    untied: bool
    seconds: float
    kind: str = "a LoRA"

    def __str__(self) -> str:
        untied = f"; the embeddings are untied now ({_TIE}: false)" if self.untied else ""
        return (
            f"merged model written to {self.destination}: {self.num_tensors} tensors, {self.num_folded} with "
            f"{self.kind} folded in, {self.num_replaced} from modules_to_save{untied}; {self.seconds:.1f} s"
        )


def main(config: MergeConfig) -> int:
    """The command; prints the report, and on stderr which adapter names another base."""
    print(merge(Path(config.model), [Path(path) for path in config.adapters], Path(config.output_dir)))
    for path in config.adapters:
        if (note := base_note(Path(path), Path(config.model))) is not None:
            print(note, file=sys.stderr)
    return 0


def merge(base: Path, adapters: Sequence[Path], destination: Path) -> MergeReport:
    """Write base + adapters (folded in this order) to a new HF directory with the base's dtypes and files.

    Raises ConfigError or CheckpointError when base and adapters do not fit, naming the tensor and both shapes;
    nothing is written then.
    """
    start = time.perf_counter()
    _check_form(base)
    table = table_for(read_config(base))
    if not table.mtp_names & read_directory(base).keys():
        table = table.without_mtp()
    stored = _check_base(base, table)
    fold = _Fold(table, stored, *_open(table, stored, adapters))
    with new_directory(destination) as partial:
        for path in sorted({tensor.path for tensor in stored.values()}):
            write_safetensors(partial / path.name, fold.contents(path), fold.blocks)
        for name, data in _side_files(base, adapters, fold).items():
            write_file(partial / name, data)
        if (base / INDEX).is_file():
            write_file(partial / INDEX, fold.index(base / INDEX))
    return MergeReport(
        destination,
        len(fold.deltas) if fold.method is None else fold.method.num_linears,
        len(fold.replaced),
        len(stored) + fold.untied,
        fold.untied,
        time.perf_counter() - start,
        "a LoRA" if fold.method is None else "an adapter",
    )


def _open(
    table: ModelTable, stored: Mapping[str, StoredTensor], paths: Sequence[Path]
) -> tuple[list[PeftAdapter], MethodFold | None]:
    """LoRA adapters, or one of another method; ConfigError for more with such a one."""
    for path in paths:
        if is_hidden(data := read_adapter_json(path)):
            raise ConfigError(
                f"--adapters {path}: {data['peft_type']} changes hidden states, and no weight of the model: it cannot "
                f"be merged; use it beside its base, with mswift infer --adapters {path}"
            )
        if is_prompt(data):
            raise ConfigError(
                f"--adapters {path}: {data['peft_type']} puts virtual tokens before every sequence, and changes no "
                f"weight of the model: it cannot be merged; use it beside its base, with mswift infer --adapters {path}"
            )
    others = [path for path in paths if read_adapter_json(path).get("peft_type") in METHOD_TYPES]
    if not others:
        return [PeftAdapter(path) for path in paths], None
    if len(paths) > 1:
        raise ConfigError(
            f"--adapters: {others[0]} is no LoRA, and other methods may multiply the weight, so that their order "
            "matters: merge one, and the next one into the result"
        )
    return [], MethodFold(table, stored, MethodAdapter(others[0]))


class _Fold:
    """Which tensors of the base change, and the new bytes of any tensor."""

    def __init__(
        self,
        table: ModelTable,
        stored: Mapping[str, StoredTensor],
        adapters: Sequence[PeftAdapter],
        method: MethodFold | None,
    ):
        """adapters: LoRA, folded in this order; method: an adapter of another method in their place."""
        self.stored, self.copies, self.method = stored, table.mtp_copies, method
        self.deltas: dict[str, list[Delta]] = {}  # by name of the weight
        self.replaced: dict[str, PeftAdapter | MethodAdapter] = dict(method.replaced) if method else {}
        for adapter in adapters:
            own = adapter_table(table, adapter.shapes)
            adapter.check(promised_shapes(own, adapter.settings))
            if adapter.settings.lora_bias:
                raise ConfigError(
                    f"{adapter.settings.path}: lora_bias=True: merge has no bias in the base to fold B's bias into"
                )
            for linear in adapted_linears(own, adapter.settings):
                if f"{linear.name}.weight" not in stored:
                    raise ConfigError(
                        f"{adapter.file}: has a LoRA for {linear.name}, but the base keeps its experts in other "
                        "tensors; save the base with one tensor an expert, as the hub has it"
                    )
                self.deltas.setdefault(f"{linear.name}.weight", []).append(LinearDelta(adapter, linear))
            for name, delta in parameter_deltas(table, own, adapter):
                self.deltas.setdefault(name, []).append(delta)
            whole = (name for name in adapter.shapes if name in stored or name in SAVABLE.values())
            self.replaced |= dict.fromkeys(whole, adapter)
        self.untied = table.spec.tied_embeddings and not method and self._embeddings_differ()
        if table.spec.tied_embeddings and not self.untied:
            self.replaced.pop(SAVABLE[HEAD], None)

    def contents(self, path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Tensors of the merged file that stands for this file of the base, in the base's order."""
        own = sorted((t.offset, name) for name, t in self.stored.items() if t.path == path)
        entries = {name: (self.stored[name].dtype, self.stored[name].shape) for _, name in own}
        if self.untied and SAVABLE[EMBED] in entries:
            entries[SAVABLE[HEAD]] = entries[SAVABLE[EMBED]]
        return entries

    def blocks(self, name: str) -> Iterator[memoryview]:
        """The bytes of one merged tensor, in row blocks."""
        if self.method is not None and self.method.changes(name):
            yield from self.method.blocks(name)
            return
        tensor = self.stored[name if name in self.stored else SAVABLE[EMBED]]  # an untied head starts as the embedding
        fd = open_read(tensor.path)
        with open(fd, "rb"):
            offset = tensor.offset
            for region in row_blocks(tensor.shape, DTYPE_BYTES[tensor.dtype]):
                raw = bytearray(region.num_elements * DTYPE_BYTES[tensor.dtype])
                read_exactly(fd, memoryview(raw), offset, tensor.path)
                rows = torch.frombuffer(raw, dtype=_TORCH[tensor.dtype]).view(region.sizes)
                merged: Any = self._merged(name, region, rows).view(-1).view(torch.uint8).numpy()
                yield memoryview(merged)
                offset += len(raw)

    def _merged(self, name: str, region: Region, rows: Tensor) -> Tensor:
        name = self.copies.get(name, name)
        if name in self.replaced:
            return self.replaced[name].read(name, region).to(rows.dtype).contiguous()
        if name not in self.deltas:
            return rows
        total = base = rows.float()
        for delta in self.deltas[name]:
            total = delta.folded(total, base, region)
        return total.to(rows.dtype)

    def _embeddings_differ(self) -> bool:
        """Whether modules_to_save leave the tied base with two different matrices."""
        embedding, head = (cast(PeftAdapter | None, self.replaced.get(SAVABLE[name])) for name in (EMBED, HEAD))
        if head is None:
            return embedding is not None and not embedding.settings.ensure_weight_tying
        if embedding is None:
            return True
        one, other = embedding.tensor(SAVABLE[EMBED]), head.tensor(SAVABLE[HEAD])
        return not torch.equal(one.float(), other.float())

    def index(self, path: Path) -> bytes:
        """The base's index, with the untied head if there is one."""
        if not self.untied:
            return path.read_bytes()
        index: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        index["weight_map"][SAVABLE[HEAD]] = index["weight_map"][SAVABLE[EMBED]]
        metadata = index.setdefault("metadata", {})
        embedding = self.stored[SAVABLE[EMBED]]
        for name, added in (("total_size", embedding.nbytes), ("total_parameters", prod(embedding.shape))):
            if name in metadata:
                metadata[name] += added
        return (json.dumps(index, indent=2) + "\n").encode()


def _check_form(base: Path) -> None:
    """ConfigError, with the remedy, for weights in another form than plain safetensors."""
    quantization = None if (base / METADATA).is_file() else quantization_of(read_config(base))
    if (base / METADATA).is_file():
        form = "is a Megatron checkpoint"
    elif quantization is not None:
        form = f"holds quantised weights ({FIELD}: {quantization.method})"
    elif TORCH_BIN.present(base) and not SAFETENSORS.present(base):
        form = f"holds {TORCH_BIN.single}"
    else:
        return
    plain = f"{base}-hf"
    raise ConfigError(
        f"--model {base} {form}, and merge reads plain safetensors: mswift convert --model {base} --to hf "
        f"--output_dir {plain}; then merge with --model {plain}"
    )


def _check_base(base: Path, table: ModelTable) -> dict[str, StoredTensor]:
    """Every tensor of the base; CheckpointError unless they are those of its config.json."""
    stored = read_directory(base)
    for name, shape in table.hf.items():
        if name not in stored:
            raise CheckpointError(f"--model {base} lacks tensor {name} {list(shape)}")
        if stored[name].shape != shape:
            raise CheckpointError(f"--model {base}: {name} has shape {list(stored[name].shape)}, not {list(shape)}")
    for name, tensor in stored.items():
        if name not in table.hf and name not in table.dropped:
            raise CheckpointError(f"--model {base}: {name} {list(tensor.shape)} is no tensor of this model")
        if tensor.dtype not in WEIGHT_DTYPES:
            raise CheckpointError(f"--model {base}: {name} is {tensor.dtype}; known: {' '.join(WEIGHT_DTYPES)}")
    return stored


def _side_files(base: Path, adapters: Sequence[Path], fold: _Fold) -> dict[str, bytes]:
    """Those of the base, but for an adapter's chat template and, where the embeddings are untied now, config.json."""
    files = {side.name: side.read_bytes() for side in carried_files(base)}
    if fold.untied:
        config: dict[str, Any] = json.loads(files["config.json"])
        files["config.json"] = (json.dumps(config | {_TIE: False}, indent=2) + "\n").encode()
    template = template_of_adapters(adapters)
    if template is not None and (text := template.read_text(encoding="utf-8")) != own_template(files):
        return with_chat_template(files, text)
    return files
