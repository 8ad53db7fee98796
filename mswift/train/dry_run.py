"""`--dry_run`: what a launch would do, and every reason why it would refuse. No torch, no process group, no weights."""

from pathlib import Path

from mswift.config.train import SftConfig, TrainConfig
from mswift.converters.io.dcp_metadata import METADATA
from mswift.converters.io.safetensors import SAFETENSORS
from mswift.converters.io.torch_bin import TORCH_BIN
from mswift.converters.plan import ModelTable, table_for
from mswift.converters.quantization import Quantization, quantization_of
from mswift.data.indexed import open_indexed
from mswift.data.sources import parse_source
from mswift.errors import ConfigError, MswiftError
from mswift.launchers.environment import current
from mswift.refusals import dims_of, train_dtype, train_refusals
from mswift.refusals.backend import with_shared_sequences
from mswift.refusals.data import holds_mixture
from mswift.train.dry_run_rows import DTYPE_BYTES, batch_rows, layout_rows, memory_rows, model_rows, run_rows
from mswift.train.inputs import blend_of, input_refusals, mixture_of, model_config, open_model
from mswift.train.memory import checkpoint_bytes
from mswift.train.resume import start_of
from mswift.train.trained import virtual_tokens

_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


def dry_run(config: TrainConfig) -> int:
    """Print the resolved run on --world_size ranks; returns 0, or 2 when a launch would be refused."""
    info = current()
    world_size = config.world_size or (info.world_size if info else config.nproc_per_node or 1)
    model = _weights_of(config)
    table, stored, left_out = _model(config, model)
    refusals = _refusals(config, table, stored, world_size)
    config = with_shared_sequences(config, table.spec)
    print(f"dry run of {'sft' if isinstance(config, SftConfig) else 'pt'} on {world_size} ranks: nothing is started\n")
    has_weights = _holds_weights(model)
    rows = [*model_rows(config, model, table, left_out, has_weights=has_weights), *run_rows(config)]
    if not refusals:
        dims = dims_of(config, world_size, table.spec.num_layers)
        rows += [
            *layout_rows(config, dims, table.spec.num_layers),
            *batch_rows(config, dims, virtual_tokens(config, table)),
            *memory_rows(config, table, stored, dims),
        ]
    print("\n".join(f"{name:<15}{text}" for name, text in rows))
    for refusal in refusals:
        print(f"\nrefused: {refusal}")
    return ConfigError.exit_status if refusals else 0


def launch_refusals(config: TrainConfig, world_size: int) -> list[MswiftError]:
    """Every reason why a launch of `config` on `world_size` ranks would be refused, as a dry run prints them."""
    table, stored, _ = _model(config, _weights_of(config))
    return _refusals(config, table, stored, world_size)


def needs_of(config: TrainConfig) -> tuple[dict[str, int], int]:
    """What a run reads, as absolute path -> bytes (model and local data), and the bytes of one of its checkpoints."""
    model = _weights_of(config)
    table, stored, _ = _model(config, model)
    sources = [
        *(parse_source(spec) for spec in mixture_of(config).specs),
        *(parse_source(s, "--val_dataset") for s in config.val_dataset),
    ]
    files = [
        *(path for path in model.iterdir() if path.is_file()),
        *(Path(item) for item in config.dataset if holds_mixture(config.dataset)),
        *(path for source in sources for path in source.paths),
        *(path for prefix in blend_of(config).prefixes for path in open_indexed(prefix, "--data_path").paths),
    ]
    sizes = {str(path.absolute()): path.stat().st_size for path in files}
    return sizes, checkpoint_bytes(config, table, DTYPE_BYTES[train_dtype(config, stored)])


def _weights_of(config: TrainConfig) -> Path:
    """The directory that a launch reads; --model where it would not start, which is among the refusals."""
    try:
        return start_of(config)[0]
    except MswiftError:
        return Path(config.model)


def _model(config: TrainConfig, path: Path) -> tuple[ModelTable, str, int]:
    """Table, stored dtype, and how many multi-token-prediction layers the run does without.

    Weights that are here are checked by their headers, as a launch would; else config.json suffices (converted
    directories and checkpoints keep it with the tokenizer).
    """
    if _holds_weights(path):
        reader = open_model(config, path)
        return reader.table, reader.dtype, reader.num_left_out
    raw = model_config(config, path)
    stored = str(raw.get("dtype") or raw.get("torch_dtype") or "float32")
    if isinstance(quantization_of(raw), Quantization):
        stored = "bfloat16"  # what fp8 and mxfp4 become
    table = table_for(raw)
    own = table.without_mtp() if config.trains_adapter else table
    return own, _DTYPES.get(stored, stored), len(table.spec.mtp_layers) - len(own.spec.mtp_layers)


def _holds_weights(path: Path) -> bool:
    megatron = (path / METADATA).exists() or any(path.glob("*.distcp"))
    return megatron or SAFETENSORS.present(path) or TORCH_BIN.present(path)


def _refusals(config: TrainConfig, table: ModelTable, stored: str, world_size: int) -> list[MswiftError]:
    """What a launch would refuse: flags and layout, module names, data files, the output directory."""
    refusals = [*train_refusals(config, table.spec, world_size), *input_refusals(config, table, stored)]
    return list({str(error): error for error in refusals}.values())
