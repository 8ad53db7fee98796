"""`mswift export`: what a run trained, as Hugging Face files. Bytes are moved; no model is built, no torch needed."""

from pathlib import Path

from mswift import rundir
from mswift.config.export import ExportConfig
from mswift.converters.engine import convert
from mswift.converters.source import SourceOptions
from mswift.errors import ConfigError
from mswift.tuners.export import export_adapter, is_adapter_checkpoint


def trained_checkpoint(config: ExportConfig) -> Path:
    """The checkpoint that --model means. Raises ConfigError and CheckpointError."""
    model = Path(config.model)
    if not model.is_dir():
        what = "is a file" if model.exists() else "does not exist"
        raise ConfigError(f"--model {model} {what}; give a run directory or one of its checkpoint-N")
    return rundir.resolve_checkpoint(model)


def export(config: ExportConfig, checkpoint: Path) -> None:
    """A full run becomes a Hugging Face directory, a LoRA run a PEFT adapter; the checkpoint is proved first."""
    rundir.check_files(checkpoint)
    destination = Path(config.output_dir)
    print(f"exporting {checkpoint}")
    if is_adapter_checkpoint(checkpoint):
        print(export_adapter(checkpoint, destination))
    else:
        options = SourceOptions(complete=config.to == "vllm")
        print(f"{destination}: {convert(checkpoint, destination, 'hf', progress=True, source_options=options)}")
