"""A PEFT LoRA directory as a source of tensors: checked strictly against the model, read region by region."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from mswift.converters.adapters import SAVABLE
from mswift.converters.layout import Region
from mswift.converters.plan import ModelTable
from mswift.errors import CheckpointError, ConfigError
from mswift.tuners.lora import LoraConfig
from mswift.tuners.peft_config import (
    CONFIG_FILE,
    PREFIX,
    WEIGHTS_FILE,
    check_adapter_dir,
    read_peft_config,
)
from mswift.tuners.settings import PeftSettings
from mswift.tuners.shapes import STACKED, adapter_table, in_spelling

_FLOATS = ("F32", "BF16", "F16")


def open_adapter(path: Path) -> tuple[Any, dict[str, tuple[str, tuple[int, ...]]]]:
    """(open safetensors file of a PEFT directory, name -> dtype and shape); CheckpointError for a damaged one."""
    try:
        file: Any = safe_open(path / WEIGHTS_FILE, framework="pt")
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"--adapters {path}: {WEIGHTS_FILE} is damaged: {error}") from None
    return file, {name: (piece.get_dtype(), tuple(piece.get_shape())) for name, piece in slices.items()}


class PeftAdapter:
    """adapter_config.json + adapter_model.safetensors. Names are without the `base_model.model.` prefix.

    Raises ConfigError for a directory that is no adapter or asks for what mswift lacks, CheckpointError for a
    damaged file. Files are memory-mapped; what is not asked for is not read.
    """

    def __init__(self, path: Path):
        self.settings: PeftSettings = read_peft_config(path)
        check_adapter_dir(path)
        self.file = path / WEIGHTS_FILE
        self._open, stored = open_adapter(path)
        for name, (dtype, _) in stored.items():
            if not name.startswith(PREFIX):
                raise CheckpointError(f"{self.file}: tensor {name} does not begin with {PREFIX}")
            if dtype not in _FLOATS:
                raise CheckpointError(f"{self.file}: {name} is {dtype}; known: {' '.join(_FLOATS)}")
        self.shapes: Mapping[str, tuple[int, ...]] = {n.removeprefix(PREFIX): shape for n, (_, shape) in stored.items()}

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """CheckpointError unless the file holds exactly these tensors; names the first offender and both shapes."""
        for name, shape in shapes.items():
            if name not in self.shapes:
                raise CheckpointError(f"{self.file} lacks {PREFIX}{name} {list(shape)}, which {CONFIG_FILE} asks for")
            if self.shapes[name] != shape:
                found = list(self.shapes[name])
                raise CheckpointError(
                    f"{self.file}: {PREFIX}{name} has shape {found}, the model needs {list(shape)}; give the base "
                    "model that it was trained on"
                )
        extra = sorted(self.shapes.keys() - shapes.keys())
        if extra:
            raise CheckpointError(
                f"{self.file}: {PREFIX}{extra[0]} {list(self.shapes[extra[0]])} has no place in this model "
                f"({len(extra)} such tensors); give the base model that it was trained on"
            )

    def lora_config(self, table: ModelTable, seed: int) -> tuple[LoraConfig, tuple[str, ...]]:
        """(LoraConfig, modules_to_save) to train this adapter on; ConfigError for what training cannot continue."""
        settings = self.settings
        if table.spec.tied_embeddings and any(name in SAVABLE for name in settings.modules_to_save):
            self._require_tied()
        own = adapter_table(table, self.shapes)
        per_expert = own.spelling != in_spelling(own, STACKED).spelling
        lora = LoraConfig(settings, seed, per_expert)
        lora.check(f"{settings.path}: ")
        return lora, settings.modules_to_save

    def _require_tied(self) -> None:
        embedding, head = "model.embed_tokens.weight", "lm_head.weight"
        for name in (embedding, head):
            if name not in self.shapes:
                raise ConfigError(
                    f"{self.file} has no {PREFIX}{name}, but the model ties {embedding} and {head}: mswift trains "
                    "them as one; merge the adapter first (mswift merge unties them)"
                )
        if not torch.equal(self.tensor(embedding).float(), self.tensor(head).float()):
            raise ConfigError(
                f"{self.file}: {embedding} and {head} differ, but the model ties them: mswift trains them as one; "
                "merge the adapter first (mswift merge unties them)"
            )

    def tensor(self, name: str) -> torch.Tensor:
        """The whole tensor, in the file's dtype."""
        value: torch.Tensor = self._open.get_tensor(PREFIX + name)
        return value

    def read(self, name: str, region: Region) -> torch.Tensor:
        """That region of a tensor, in the file's dtype."""
        index = tuple(slice(o, o + s) for o, s in zip(region.offsets, region.sizes, strict=True))
        value: torch.Tensor = self._open.get_slice(PREFIX + name)[index]
        return value
