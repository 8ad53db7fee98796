"""`mswift convert` and `mswift verify`."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mswift import rundir
from mswift.config.convert import ConvertConfig, VerifyConfig
from mswift.converters import engine
from mswift.converters.catalog import config_path, read_config
from mswift.converters.describe import describe
from mswift.converters.export_config import missing_for_vllm
from mswift.converters.io.dcp_metadata import METADATA
from mswift.converters.io.files import check_absent
from mswift.converters.io.side_files import OPTIMIZER_RECORD
from mswift.converters.source import SourceOptions, dtype_option
from mswift.errors import ConfigError
from mswift.tuners.detect import is_adapter

LARGEST_PARTS = 10_000
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def convert(config: ConvertConfig) -> int:
    """Converts and prints the proof; 0 when it is done."""
    max_shard_bytes = parse_size(config.max_shard_size)
    check_workers(config.num_workers)
    part = _part(config)
    source = locate(config.model, "--model")
    if is_adapter(source):
        from mswift.tuners import convert as adapters  # imports numpy

        return adapters.convert(config, source)
    options = source_options(config.model_config, config.ignore_config_fields, config.dtype, config.complete_config)
    check_adapter_flags(config, source)
    if config.optimizer:
        check_optimizer_flags(config)
    if config.dry_run:
        check_absent(Path(config.output_dir), "--output_dir")
        planned = engine.plan(source, config.to, options)
        print(describe(planned, max_shard_bytes))
        if config.to == "hf":
            print_notes(planned.source.config, planned.source.config_edits)
        return 0
    if (source / rundir.COMMIT).is_file():
        rundir.check_files(source)
    common = engine.Flags(
        progress=True,
        max_shard_bytes=max_shard_bytes,
        num_workers=config.num_workers,
        hash_source=config.hash_source,
        source_options=options,
    )
    target = Path(config.output_dir)
    if config.optimizer:
        from mswift.converters.optimizer_state import convert_with_optimizer  # imports numpy

        with_states = convert_with_optimizer(
            source,
            target,
            config.to,
            lambda place: engine.convert(source, place, config.to, **common),
            options.model_config,
        )
        print(f"{config.output_dir}: {with_states}")
        return 0
    if part is not None:
        size = engine.convert_part(source, target, config.to, *part, restart=config.restart, **common)
        print(f"{config.output_dir}: part {config.part} is copied, {size:,} bytes; when all are: --finish")
        return 0
    if config.finish:
        manifest = engine.finish_parts(source, target, config.to, hash_output=config.hash_output, **common)
    else:
        manifest = engine.convert(
            source, target, config.to, hash_output=config.hash_output, restart=config.restart, **common
        )
    print(f"{config.output_dir}: {manifest}")
    if config.to == "hf":
        print_notes(read_config(target), {})
    return 0


def check_adapter_flags(config: ConvertConfig, source: Path) -> None:
    """ConfigError for flags that mean something for an adapter only."""
    for name in ("base_model", "adapter_layout", "fuse_adapters"):
        if getattr(config, name) != ConvertConfig.__dataclass_fields__[name].default:
            raise ConfigError(f"--{name} is for adapters, and --model {source} is none: leave it out")


def check_optimizer_flags(config: ConvertConfig) -> None:
    """ConfigError for what goes with weights alone."""
    for name in ("part", "finish", "restart", "dry_run", "hash_output", "dtype", "ignore_config_fields"):
        if getattr(config, name):
            raise ConfigError(f"--{name} is for weights alone; leave out --optimizer, or --{name}")
    if not config.hash_source:
        raise ConfigError("--hash_source false: states are proved by their hashes; leave it out, or --optimizer")


def verify(config: VerifyConfig) -> int:
    """0 if equal, 1 if not."""
    from mswift.converters import verify as verification  # imports numpy, which a conversion seldom needs

    check_workers(config.num_workers)
    a = locate(config.a, "A")
    if is_adapter(a):
        from mswift.tuners.verify import verify_adapters

        report = verify_adapters(a, None if config.b is None else locate(config.b, "B"), config.base_model)
        print(report)
        return 0 if report.equal else 1
    options = source_options(config.model_config, config.ignore_config_fields, config.dtype, False)
    if config.b is None:
        report = verification.verify_record(a, progress=True, num_workers=config.num_workers)
    else:
        b = locate(config.b, "B")
        report = verification.verify(a, b, progress=True, num_workers=config.num_workers, options=options)
    both = [a] if config.b is None else [a, locate(config.b, "B")]
    if any((path / OPTIMIZER_RECORD).is_file() for path in both):
        from mswift.converters.optimizer_state import verify_states

        report.differences += verify_states(*both)
    print(report)
    return 0 if report.equal else 1


def source_options(model_config: str | None, ignored: str, dtype: str | None, complete: bool) -> SourceOptions:
    """The flags that say how a source is read; ConfigError for wrong values."""
    home = None if model_config is None else Path(model_config)
    if home is not None and not config_path(home).is_file():
        raise ConfigError(f"--model_config {home}: is neither a config.json nor a directory with one")
    names = tuple(name.strip() for name in ignored.split(",") if name.strip())
    return SourceOptions(home, names, dtype_option(dtype), complete)


def print_notes(config: Mapping[str, Any], edits: Mapping[str, Any]) -> None:
    """What an exported config.json lacks for vLLM."""
    missing = {name: value for name, value in missing_for_vllm(config).items() if name not in edits}
    if missing:
        fields = ", ".join(f"{json.dumps(name)}: {json.dumps(value)}" for name, value in missing.items())
        print(f"note: vLLM needs fields that config.json lacks: {fields}; --complete_config true adds them")


def locate(name: str, flag: str) -> Path:
    """The directory that holds the weights: itself, or the newest committed checkpoint of a run directory."""
    path = Path(name)
    if not path.is_dir():
        raise ConfigError(f"{flag}: {name} is not a directory")
    if not (path / "config.json").exists() and not (path / METADATA).exists() and rundir.committed_steps(path):
        return rundir.resolve_checkpoint(path)
    return path


def _part(config: ConvertConfig) -> tuple[int, int] | None:
    """(part, parts) of --part; ConfigError unless it is I/N, and where other flags contradict it."""
    if config.part is None:
        if config.finish and config.restart:
            raise ConfigError("--finish publishes what the parts have copied, --restart removes it; give one of them")
        return None
    match = re.fullmatch(r"(\d+)/(\d+)", config.part.strip())
    part, parts = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 1 <= part <= parts <= LARGEST_PARTS:
        raise ConfigError(
            f"--part {config.part!r} is not I/N with 1 <= I <= N <= {LARGEST_PARTS:,}; the parts of 4 are 1/4 to 4/4"
        )
    if config.finish:
        raise ConfigError("--part and --finish are two commands: first all parts, then --finish")
    if config.hash_output:
        raise ConfigError("--hash_output reads the whole result; give it to --finish, not to --part")
    return part, parts


def parse_size(text: str) -> int:
    """Bytes of "5GB", "500MiB", "1000000"; ConfigError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-zA-Z]*)", text.strip())
    if not match or match[2].upper() not in _UNITS:
        raise ConfigError(f"--max_shard_size {text!r} is not a size; write 5GB, 500MB or 2GiB")
    size = int(float(match[1]) * _UNITS[match[2].upper()])
    if size < 1:
        raise ConfigError(f"--max_shard_size {text!r} is {size} bytes; at least 1 is needed, 5GB is usual")
    return size


def check_workers(num_workers: int | None) -> None:
    """ConfigError unless there is at least one."""
    if num_workers is not None and num_workers < 1:
        raise ConfigError(f"--num_workers {num_workers}: at least 1 is needed")
