"""What a tuner trains, in words. No torch."""

from mswift.config.train import TrainConfig
from mswift.refusals.backend import FREEZING
from mswift.tuners.llamapro import within
from mswift.tuners.prompts import PROMPTS


def tuner_line(config: TrainConfig, num_layers: int) -> str | None:
    """Of a tuner whose flags do not say it all; `num_layers`: of the model that is trained."""
    if config.tuner_type == "llamapro":
        blocks = within(num_layers, config.llamapro_num_new_blocks, config.llamapro_num_groups)
        return f"llamapro, new layers {' '.join(map(str, blocks.new))} of {num_layers}, the others frozen"
    if config.tuner_type == "adapter":
        return f"adapter, width {config.adapter_length}, {config.adapter_act}, behind attention and MLP of each layer"
    if config.tuner_type == "reft":
        layers = " ".join(map(str, config.reft_layers)) or "all"
        return f"reft, rank {config.reft_rank}, behind layers {layers}"
    if config.tuner_type in PROMPTS:
        return f"{config.tuner_type} {config.tuner_config or ''}".strip() + ", before every sequence"
    if config.tuner_type == "xlora":
        continued = f"of {' '.join(config.adapters)}" if config.adapters else "0 LoRAs"
        mixed = f"{len(config.xlora_adapters)} LoRAs" if config.xlora_adapters else continued
        return f"xlora {config.tuner_config or ''}".strip() + f", {mixed}, mixed token by token in a second pass"
    if config.lisa_activated_layers:
        active, every = config.lisa_activated_layers, config.lisa_step_interval
        return f"LISA, {active} of {num_layers} layers at a time, drawn anew every {every} steps; all of the ends"
    flags = [f"--{name} {_said(value)}" for name in FREEZING if (value := getattr(config, name))]
    return f"full, a part of the model: {' '.join(flags)}" if flags else None


def _said(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
