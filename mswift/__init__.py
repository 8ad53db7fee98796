"""mswift trains large language models: HF checkpoints in, Megatron-core layouts, HF checkpoints out."""

__version__ = "0.1.0"
