"""Options of `mswift convert` and `mswift verify`."""

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """Move a checkpoint between Hugging Face safetensors and Megatron's torch_dist, byte for byte.

    Nothing is published unless every tensor element of the source was used exactly once and every element of the
    destination written exactly once; the proof is DST/mswift_manifest.json.
    """

    model: str
    """Source: Hugging Face directory, converted directory, run directory or checkpoint-N."""
    to: Literal["megatron", "hf"]
    """Format of the destination."""
    output_dir: str
    """Destination directory; must not exist, or be empty."""


@dataclass(frozen=True, kw_only=True)
class VerifyConfig:
    """Prove that two checkpoints hold the same model, bit for bit, whatever their formats.

    The first differences are named when they do not (exit status 1).
    """

    a: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="A")]
    """Checkpoint: Hugging Face directory, converted directory or checkpoint-N."""
    b: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="B")]
    """The other one."""
