"""Options of `mswift export`."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Write a run's model as a Hugging Face directory, or its LoRA as a PEFT adapter."""

    model: str
    """Run directory (its newest committed checkpoint is taken) or checkpoint-N."""
    output_dir: str
    """Destination directory; must not exist, or be empty."""
