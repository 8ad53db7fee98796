"""Random adapters as PEFT directories, and PEFT models on tiny transformers models: the oracle of the LoRA tests."""

import hashlib
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mswift.converters.adapters import expand_modules_to_save, trained_name
from mswift.converters.catalog import read_config
from mswift.converters.layout import Region
from mswift.converters.plan import ModelTable, table_for
from mswift.tuners.export import write_adapter
from mswift.tuners.lora import LoraConfig
from mswift.tuners.peft_config import adapter_files, read_peft_config
from mswift.tuners.shapes import promised_shapes
from tests.support.tiny import tiny_model

Arrays = Mapping[str, npt.NDArray[np.float32]]


def random_model(path: Path, model_type: str = "qwen3", **sizes: Any) -> Any:
    """A tiny model whose norms and biases are random as well (transformers starts them at one and zero)."""
    import torch

    model = tiny_model(path, model_type, **sizes)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    model.save_pretrained(path)
    return model


def table_of(model: Path) -> ModelTable:
    """The table of a model directory."""
    return table_for(read_config(model))


def adapter_shapes(
    table: ModelTable, config: LoraConfig, modules_to_save: Sequence[str] = ()
) -> dict[str, tuple[int, ...]]:
    """Every tensor of the PEFT file of this adapter: name -> global shape."""
    settings = replace(config.settings, modules_to_save=expand_modules_to_save(table, modules_to_save))
    return promised_shapes(config.own_table(table), settings)


def random_arrays(
    table: ModelTable, config: LoraConfig, modules_to_save: Sequence[str] = (), seed: int = 0
) -> dict[str, npt.NDArray[np.float32]]:
    """Non-zero values for every trained tensor (a tied embedding once), by PEFT name."""
    generator = np.random.default_rng(seed)
    shapes = {trained_name(table, n): s for n, s in adapter_shapes(table, config, modules_to_save).items()}
    return {name: (0.1 * generator.standard_normal(shape)).astype(np.float32) for name, shape in shapes.items()}


def write_arrays(
    path: Path, table: ModelTable, config: LoraConfig, arrays: Arrays, modules_to_save: Sequence[str] = ()
) -> Path:
    """A PEFT directory made of these arrays by the code under test."""

    def read(name: str, region: Region, out: memoryview) -> None:
        index = tuple(slice(o, o + s) for o, s in zip(region.offsets, region.sizes, strict=True))
        out[:] = np.ascontiguousarray(arrays[name][index]).tobytes()

    (content,) = adapter_files(table, config.settings, modules_to_save, None).values()
    settings = path.parent / f"{path.name}-settings"
    settings.mkdir(parents=True)
    (settings / "adapter_config.json").write_bytes(content)
    tensors = {name: ("F32", array.shape) for name, array in arrays.items()}
    write_adapter(path, config.own_table(table), read_peft_config(settings), content, tensors, read, where="arrays")
    return path


def random_adapter(
    path: Path,
    model: Path,
    targets: Sequence[str] = ("all-linear",),
    modules_to_save: Sequence[str] = (),
    seed: int = 0,
    **flags: Any,
) -> Path:
    """A PEFT directory of rank 4 and alpha 8 with random non-zero A and B, for the model in `model`."""
    table = table_of(model)
    config = LoraConfig.for_table(table, rank=4, alpha=8, target_modules=targets, seed=0, **flags)
    return write_arrays(path, table, config, random_arrays(table, config, modules_to_save, seed), modules_to_save)


def load_peft(model: Path, adapter: Path, *, trainable: bool = False, dtype: str = "float32", **base: Any) -> Any:
    """peft.PeftModel on the transformers model; fails on any missing or unexpected key and on PEFT's warnings."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    options = {"attn_implementation": "eager", "experts_implementation": "eager"}
    base = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, **options, **base)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        peft = PeftModel.from_pretrained(base, str(adapter), is_trainable=trainable)
        result = peft.load_adapter(str(adapter), "default", is_trainable=trainable)
    assert result.missing_keys == []
    assert result.unexpected_keys == []
    complaints = [str(w.message) for w in caught if "key" in str(w.message) or "tie" in str(w.message)]
    patterns = "_pattern keys did not match any targeted module"  # said of parameters too, for which they count
    assert [text for text in complaints if patterns not in text] == []
    return peft.train(trainable)


def trained_parameters(peft: Any) -> Iterator[tuple[str, Any]]:
    """(PEFT file name without prefix, parameter) of what PEFT trains."""
    for name, parameter in peft.named_parameters():
        if parameter.requires_grad:
            yield short_name(name), parameter


def short_name(name: str) -> str:
    """Name in an adapter file, without its prefix, of a PeftModel's parameter."""
    short = name.removeprefix("base_model.model.").replace(".default", "").replace(".modules_to_save", "")
    return short.removesuffix(".weight") if "lora_magnitude_vector" in short else short


def edit_config(adapter: Path, **changes: Any) -> None:
    """Change fields of adapter_config.json."""
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def difference(ours: Any, theirs: Any) -> float:
    """max|a-b| / max|b|; 0 for equal tensors."""
    return 0.0 if bool((ours == theirs).all()) else float((ours - theirs).abs().max() / theirs.abs().max())


def hashes(path: Path) -> dict[str, str]:
    """sha256 of every file of a directory."""
    return {
        str(p.relative_to(path)): hashlib.sha256(p.read_bytes()).hexdigest() for p in path.rglob("*") if p.is_file()
    }
