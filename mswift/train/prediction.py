"""What becomes of a model's multi-token-prediction layers in a run, in words. No torch."""

from mswift.config.train import TrainConfig

SCALE = "mtp_loss_scaling_factor"
DEFAULT_SCALE = 0.1
"""megatron-core's."""


def prediction_line(config: TrainConfig, num_layers: int) -> str | None:
    """None for a model without such layers; `num_layers`: how many --model has."""
    if not num_layers:
        return None
    what = f"{num_layers} multi-token-prediction layer{'s' if num_layers > 1 else ''}"
    if config.mtp_num_layers:
        return f"{what}, trained: loss + {config.mcore.get(SCALE, DEFAULT_SCALE):g} x mtp_loss is minimised"
    if config.trains_adapter:
        return f"{what} of --model: neither loaded nor adapted, --model keeps what it has"
    return (
        f"{what}, not trained: saved and exported as they came, while the layers before them change "
        f"(--mtp_num_layers {num_layers} trains them)"
    )
