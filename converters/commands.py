"""`mswift convert` and `mswift verify`."""

import re
from pathlib import Path

from mswift import rundir
from mswift.config.convert import ConvertConfig, VerifyConfig
from mswift.converters import engine
from mswift.converters import verify as verification
from mswift.converters.io.dcp_metadata import METADATA
from mswift.errors import ConfigError
from mswift.tuners.detect import is_adapter

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def convert(config: ConvertConfig) -> int:
    """Converts and prints the proof; 0 when it is done."""
    max_shard_bytes = parse_size(config.max_shard_size)
    check_workers(config.num_workers)
    source = locate(config.model, "--model")
    if is_adapter(source):
        from mswift.tuners import convert as adapters  # imports numpy

        return adapters.convert(config, source)
    if config.dry_run:
        print(engine.describe(engine.plan(source, config.to), max_shard_bytes))
        return 0
    if (source / rundir.COMMIT).is_file():
        rundir.check_files(source)
    manifest = engine.convert(
        source,
        Path(config.output_dir),
        config.to,
        progress=True,
        max_shard_bytes=max_shard_bytes,
        num_workers=config.num_workers,
    )
    print(f"{config.output_dir}: {manifest}")
    return 0


def verify(config: VerifyConfig) -> int:
    """0 if equal, 1 if not."""
    check_workers(config.num_workers)
    a = locate(config.a, "A")
    if is_adapter(a):
        from mswift.tuners.verify import verify_adapters

        report = verify_adapters(a, None if config.b is None else locate(config.b, "B"), config.base_model)
    elif config.b is None:
        report = verification.verify_record(a, progress=True, num_workers=config.num_workers)
    else:
        report = verification.verify(a, locate(config.b, "B"), progress=True, num_workers=config.num_workers)
    print(report)
    return 0 if report.equal else 1


def locate(name: str, flag: str) -> Path:
    """The directory that holds the weights: itself, or the newest committed checkpoint of a run directory."""
    path = Path(name)
    if not path.is_dir():
        raise ConfigError(f"{flag}: {name} is not a directory")
    if not (path / "config.json").exists() and not (path / METADATA).exists() and rundir.committed_steps(path):
        return rundir.resolve_checkpoint(path)
    return path


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
