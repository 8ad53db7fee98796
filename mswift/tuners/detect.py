"""Whether a directory holds an adapter: from names alone, at the price of a listing."""

from collections.abc import Iterable
from pathlib import Path

from mswift.converters.io.dcp_metadata import METADATA, read_metadata
from mswift.converters.io.safetensors import INDEX, SINGLE
from mswift.tuners.export import STORED
from mswift.tuners.peft_config import CONFIG_FILE

HF_FOLDER = "hf"
RUN_CONFIG = "run_config.yaml"
"""Megatron-Bridge's description of a run, in the checkpoint or above it."""
MARK = ".adapter."
"""In keys of Megatron-Bridge's adapters."""


def is_torch_dist(path: Path) -> bool:
    """Whether a directory is a torch_dist checkpoint."""
    return (path / METADATA).exists()


def layout_of(keys: Iterable[str]) -> str | None:
    """ "fused" or "canonical", None where no key is of an adapter of Megatron-Bridge's."""
    marked = [key for key in keys if MARK in key and not key.startswith("optimizer.")]
    if not marked:
        return None
    return "canonical" if any(f"{MARK}adapter_" in key for key in marked) else "fused"


def is_adapter(path: Path) -> bool:
    """Whether a directory holds an adapter and no model.

    A torch_dist directory is looked into only where a file beside the tensors speaks of adapters.
    """
    if is_torch_dist(path):
        hints = (path / HF_FOLDER / CONFIG_FILE, path / RUN_CONFIG, path.parent / RUN_CONFIG)
        if not any(hint.is_file() for hint in hints):
            return False
        names = read_metadata(path).tensors
        return any(name.startswith(STORED) for name in names) or layout_of(names) is not None
    return (path / CONFIG_FILE).is_file() and not (path / SINGLE).exists() and not (path / INDEX).exists()
