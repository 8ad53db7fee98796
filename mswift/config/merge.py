"""Options of `mswift merge`."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class MergeConfig:
    """Fold PEFT adapters into a copy of their base model; the base stays as it is."""

    model: str
    """Base model: Hugging Face directory."""
    adapters: tuple[str, ...]
    """PEFT adapter directories, folded in this order."""
    output_dir: str
    """Destination directory; must not exist, or be empty."""
