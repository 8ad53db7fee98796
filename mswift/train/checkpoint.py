"""Training checkpoints: sharded, hashed while written, committed last, at any layout readable.

checkpoint-<step>/
    __<rank>_0.distcp, .metadata, common.pt, metadata.json     tensors in megatron-core's torch_dist format
        <megatron key>                    weights (a full run), model space: no padding, any layout
        adapter.<peft name>               adapters (a LoRA run)
        optimizer.<state>.<key>           fp32, laid out like their parameter
        optimizer.<state>.of.<HF name>    what a rule of whole matrices (adafactor, muon, ...) keeps of one
        rng.<rank>                        generator states, used only at the same layout
    hf/                                   config.json, tokenizer, (LoRA) adapter_config.json
    run.json                              step, data position, configuration, layout
    COMMIT                                sizes and BLAKE3 of all of these; written last
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mswift import rundir
from mswift.config.train import TrainConfig
from mswift.converters.io.torch_dist_reader import TorchDistSource
from mswift.converters.layout import Region
from mswift.data.order import ORDER_VERSION
from mswift.errors import CheckpointError, ConfigError
from mswift.parallel.engine import SOURCE_DTYPES, Engine
from mswift.train.collective import agreed, barrier, gather_objects

_STATE_VERSION = 2


@dataclass(frozen=True)
class RunState:
    """Where a run stands, beside its tensors.

    dtype: "F32" or "BF16", what it computes in; base: fingerprint of the model it was started from;
    skipped_steps: those without an update (--nan_policy skip); order_version: of `mswift.data.order`;
    stream: where each source stands (--streaming, see `mswift.data.stream`); num_samples is 0 then.
    """

    step: int
    consumed_samples: int
    optimizer_step: int
    world_size: int
    layout: Mapping[str, int]
    data_fingerprint: str
    num_samples: int
    config: Mapping[str, Any]
    dtype: str = "F32"
    base: Mapping[str, str] = field(default_factory=dict)
    skipped_steps: int = 0
    order_version: int = 1
    stream: Sequence[Mapping[str, Any]] = ()

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        mappings = {name: dict(value) for name, value in vars(self).items() if isinstance(value, Mapping)}
        return {"version": _STATE_VERSION, **vars(self), **mappings}


def read_state(checkpoint: Path) -> RunState:
    """run.json of a committed checkpoint."""
    path = checkpoint / rundir.STATE
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        version = value.pop("version")
        if version != _STATE_VERSION:
            raise CheckpointError(f"{path}: version {version}; this mswift reads {_STATE_VERSION}")
        return RunState(**value)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); use an older checkpoint of the run") from None


def check_share(checkpoint: Path, rank: int, world_size: int) -> None:
    """Compare this rank's share of the files with COMMIT: its own shard (as long as there are as many), and others."""
    names = sorted(rundir.read_commit(checkpoint))
    rundir.check_files(checkpoint, [name for n, name in enumerate(names) if _owner(name, n) % world_size == rank])


def _owner(name: str, number: int) -> int:
    """The rank that wrote a shard; of other files any."""
    writer = name.removeprefix("__").partition("_")[0]
    return int(writer) if writer.isdecimal() else number


def load(engine: Engine, checkpoint: Path, rank: int, world_size: int) -> RunState:
    """Model, optimizer and generators out of files that `check_share` has proved.

    Strict both ways: CheckpointError for a tensor that is missing, and for one that no rank has a place for.
    """
    with agreed(f"loading {checkpoint}"):
        state = read_state(checkpoint)
        source = TorchDistSource(checkpoint)
        reader = _Asked(source)
        engine.load_state(reader.read, state.optimizer_step)
        if state.world_size == world_size and dict(state.layout) == engine_layout(engine):
            _load_generators(source, rank)
    reader.check_all(checkpoint, ("rng.",))
    barrier()
    return state


def load_weights(engine: Engine, checkpoint: Path) -> None:
    """What a run trains (its adapters) out of a checkpoint whose other contents stay there."""
    with agreed(f"loading {checkpoint}"):
        source = TorchDistSource(checkpoint)
        reader = _Asked(source)
        engine.load_trained(reader.read, lambda key: SOURCE_DTYPES[source.tensors[key].dtype])
    reader.check_all(checkpoint, ("rng.", "optimizer."))
    barrier()


class _Asked:
    """Reads regions and notes of which tensors."""

    def __init__(self, source: TorchDistSource) -> None:
        self._source = source
        self._names: set[str] = set()

    def read(self, name: str, region: Region, out: memoryview) -> None:
        """As TorchDistSource.read."""
        self._names.add(name)
        self._source.read(name, region, out)

    def check_all(self, checkpoint: Path, but: tuple[str, ...]) -> None:
        """On all ranks: CheckpointError for a tensor that no rank has asked for; `but`: beginnings of others' names."""
        known = set[str]().union(*gather_objects(sorted(self._names)))
        extra = [name for name in self._source.tensors if name not in known and not name.startswith(but)]
        if extra:
            raise CheckpointError(f"{checkpoint}: {extra[0]} has no place in this run ({len(extra)} such tensors)")


def engine_layout(engine: Engine) -> dict[str, int]:
    """The degrees that decide which rank holds what."""
    dims = engine.dims
    sizes = {"tp": dims.tp, "pp": dims.pp, "dp": dims.dp, "sequence_parallel": int(dims.sequence_parallel)}
    sizes |= {"cp": dims.cp} if dims.cp > 1 else {}
    sizes |= {"ep": dims.ep, "etp": dims.sizes["etp"]} if dims.has_expert_axes else {}
    sizes |= {"vpp": dims.vpp} if dims.vpp else {}
    return sizes | {f"chunk {n}": layers for n, layers in enumerate(dims.chunk_layers or ())}


def _in_words(value: Any) -> str:
    """A flag's value as a command has it; empty for none."""
    words = value if isinstance(value, list) else [] if value is None else [value]
    return " ".join(map(str, words))


def check_same_data(state: RunState, fingerprint: str, num_samples: int, fixed: Mapping[str, Any]) -> None:
    """Refuse to continue on other data or another order: the position would mean other samples."""
    if state.order_version != ORDER_VERSION:
        raise ConfigError(
            f"--resume: the run of this --output_dir has its samples in order {state.order_version}, this mswift draws "
            f"order {ORDER_VERSION}, so that its position would mean other samples; continue it with the version of "
            "mswift that it was started with, or start a new run with another --output_dir and "
            "--resume_from_checkpoint CHECKPOINT --load_weights_only"
        )
    for name, value in fixed.items():
        then = state.config.get(name, TrainConfig.__dataclass_fields__[name].default)  # a flag of later than the run
        then, value = (list(v) if isinstance(v, (list, tuple)) else v for v in (then, value))
        if then != value:
            has, says = _in_words(then), _in_words(value)
            remedy = f"pass {has}" if has else "leave it out"
            raise ConfigError(
                f"--{name}: the run of this --output_dir has {has or 'none'}, the command says {says or 'none'}; "
                f"{remedy}, or start a new run with another --output_dir"
            )
    if state.stream and state.data_fingerprint != fingerprint:
        raise ConfigError(
            f"--dataset: the streamed files (names in their order, sizes, contents) or the tokenizer are not those of "
            f"step {state.step}; pass the same ones, --dataset_weights, --columns and --max_length, or start a new run "
            "with another --output_dir"
        )
    if state.data_fingerprint != fingerprint:
        raise ConfigError(
            f"--dataset: the tokenised data differs from that of step {state.step} ({state.num_samples} samples "
            f"then, {num_samples} now); pass the same --dataset (or --data_path), --max_length and tokenizer, or start "
            "a new run with another --output_dir"
        )


def check_same_dtype(state: RunState, dtype: str) -> None:
    """ConfigError unless the run goes on in the dtype it has had: another one is another run."""
    names = {"F32": "float32", "BF16": "bfloat16"}
    if state.dtype != dtype:
        raise ConfigError(
            f"--torch_dtype: the run of this --output_dir computes in {names[state.dtype]}, the command would in "
            f"{names[dtype]}; pass --torch_dtype {names[state.dtype]}, or start a new run with another --output_dir"
        )


def generators() -> dict[str, torch.Tensor]:
    """States of torch's generators on this rank, uint8."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _load_generators(source: TorchDistSource, rank: int) -> None:
    """Put the generator states of this rank back."""
    for name, current in generators().items():
        key = f"rng.{rank}.{name}"
        if key not in source.tensors:
            continue
        value = torch.empty(source.tensors[key].shape, dtype=torch.uint8)
        if value.shape != current.shape:
            continue  # written by another build of torch; nothing drawn here depends on it
        source.read(key, Region((0,), tuple(value.shape)), memoryview(value.numpy()))
        torch.set_rng_state(value) if name == "cpu" else torch.cuda.set_rng_state(value)
