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
    """Source: Hugging Face directory, converted directory, run directory or checkpoint-N; or an adapter."""
    to: Literal["megatron", "hf"]
    """Format of the destination."""
    output_dir: str
    """Destination directory; must not exist, or be empty."""
    max_shard_size: str = "5GB"
    """Largest safetensors file (--to hf): bytes, or a number with KB, MB, GB, KiB, MiB or GiB."""
    num_workers: int | None = None
    """Threads that copy. Default: one more than the processors, at most 8."""
    hash_source: bool = True
    """Take the BLAKE3 of every tensor while it is read. false is faster, but `mswift verify DIR` needs hashes."""
    hash_output: bool = False
    """Read the result again before it is published: prove its hashes, count infinities and NaNs."""
    restart: bool = False
    """Begin anew where a conversion was interrupted; without it the same command continues. With --part: what all parts
    have copied is removed, so give it to one part, before the others start."""
    part: str | None = None
    """Copy only part I of N, as I/N (1/4 ... 4/4), on as many nodes as there are parts; then run --finish."""
    finish: bool = False
    """Prove that all parts are there and publish the destination."""
    optimizer: bool = False
    """Carry the optimizer's state (and a run's position) too: of a checkpoint, or of a directory made with this."""
    base_model: str | None = None
    """Of an adapter: directory of its base, of which only config.json is read. Default: what the adapter names."""
    adapter_layout: Literal["mswift", "fused", "canonical"] = "mswift"
    """Of an adapter (--to megatron): mswift's own names, or Megatron-Bridge's LoRA (fused) or CanonicalLoRA."""
    fuse_adapters: Literal["equal", "stack"] = "equal"
    """With --adapter_layout fused: refuse linears that do not share one A (equal), or stack their ranks (stack)."""
    dry_run: bool = False
    """Print the plan as a table, write nothing."""
    model_config: str | None = None
    """config.json, or the Hugging Face directory it lies in, of a checkpoint that other programs wrote without one
    (megatron-core, Megatron-LM, torch.distributed.checkpoint)."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Cast the weights, rounding to nearest even; an overflow is refused. Default: as stored (quantised: bfloat16)."""
    ignore_config_fields: str = ""
    """Fields of config.json, separated by commas, that mswift does not know and that do not change the model."""
    complete_config: bool = False
    """Add to config.json the fields that vLLM needs and that transformers does not write."""


@dataclass(frozen=True, kw_only=True)
class VerifyConfig:
    """Prove that two checkpoints hold the same model, bit for bit, whatever their formats.

    With one checkpoint: prove that it is what was recorded when mswift wrote it (mswift_manifest.json or COMMIT).
    The first differences are named when they do not agree (exit status 1).
    """

    a: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="A")]
    """Checkpoint: Hugging Face directory, converted directory, run directory or checkpoint-N."""
    b: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="B")] = None
    """The other one."""
    num_workers: int | None = None
    """Threads that compare. Default: one more than the processors, at most 8."""
    base_model: str | None = None
    """Of an adapter: directory of its base model, of which only config.json is read."""
    model_config: str | None = None
    """config.json, or its directory, of checkpoints without one."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Compare both after a cast to this dtype. Default: other dtypes are a difference."""
    ignore_config_fields: str = ""
    """Fields of config.json, separated by commas, that need not be known."""
