"""The directory of an adapter beside LoRA as a source of tensors: checked against the model, read region by region."""

from collections.abc import Mapping
from pathlib import Path

import torch

from mswift.converters.layout import Region
from mswift.errors import CheckpointError
from mswift.tuners.adapter import open_adapter
from mswift.tuners.method import full_name, parse_method, short_name
from mswift.tuners.other_adapters import parse_other
from mswift.tuners.peft_config import CONFIG_FILE, WEIGHTS_FILE, check_adapter_dir

_FLOATS = ("F32", "BF16", "F16")


class AdapterFile:
    """adapter_model.safetensors. Names are without the prefix that tensors of single modules have there.

    Raises CheckpointError for a damaged file.
    """

    def __init__(self, path: Path) -> None:
        self.file = path / WEIGHTS_FILE
        self._open, stored = open_adapter(path)
        for name, (dtype, _) in stored.items():
            if dtype not in _FLOATS:
                raise CheckpointError(f"{self.file}: {name} is {dtype}; known: {' '.join(_FLOATS)}")
        self.shapes: Mapping[str, tuple[int, ...]] = {short_name(n): shape for n, (_, shape) in stored.items()}

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """CheckpointError unless the file holds exactly these tensors; names the first offender and both shapes."""
        for name, shape in shapes.items():
            if name not in self.shapes:
                raise CheckpointError(
                    f"{self.file} lacks {full_name(name)} {list(shape)}, which {CONFIG_FILE} asks for"
                )
            if self.shapes[name] != shape:
                found = list(self.shapes[name])
                raise CheckpointError(
                    f"{self.file}: {full_name(name)} has shape {found}, the model needs {list(shape)}; give the base "
                    "model that it was trained on"
                )
        extra = sorted(self.shapes.keys() - shapes.keys())
        if extra:
            raise CheckpointError(
                f"{self.file}: {full_name(extra[0])} {list(self.shapes[extra[0]])} has no place in this model "
                f"({len(extra)} such tensors); give the base model that it was trained on"
            )

    def tensor(self, name: str) -> torch.Tensor:
        """The whole tensor, in the file's dtype."""
        value: torch.Tensor = self._open.get_tensor(full_name(name))
        return value

    def read(self, name: str, region: Region) -> torch.Tensor:
        """That region of a tensor, in the file's dtype."""
        index = tuple(slice(o, o + s) for o, s in zip(region.offsets, region.sizes, strict=True))
        value: torch.Tensor = self._open.get_slice(full_name(name))[index]
        return value


class MethodAdapter(AdapterFile):
    """adapter_config.json of one of PEFT's methods, and its tensors; ConfigError for another directory."""

    def __init__(self, path: Path, seed: int = 0) -> None:
        self.config, self.modules_to_save = parse_method(check_adapter_dir(path), path / CONFIG_FILE, seed)
        super().__init__(path)


class OtherAdapter(AdapterFile):
    """The same of any adapter beside LoRA; num_layers: of the model."""

    def __init__(self, path: Path, num_layers: int, seed: int = 0) -> None:
        self.config, self.modules_to_save = parse_other(check_adapter_dir(path), path / CONFIG_FILE, num_layers, seed)
        super().__init__(path)
