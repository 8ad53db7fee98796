"""What a run trains, by its flags and the table of the model: elements, and bytes of optimizer state. No torch."""

import math
from dataclasses import replace
from pathlib import Path

from mswift.config.optimizers import ELEMENTWISE, LowRank, kept_by, rule_of, state_bytes
from mswift.config.train import TrainConfig
from mswift.converters.adapters import EMBED, HEAD, NORM, expand_modules_to_save, saved_shapes, trained_name
from mswift.converters.io.safetensors import read_header
from mswift.converters.plan import ModelTable
from mswift.tuners.llamapro import new_blocks, trained_elements
from mswift.tuners.lora import LoraConfig
from mswift.tuners.other_adapters import other_config, parse_other
from mswift.tuners.part import Part, joined, refuse_torn
from mswift.tuners.peft_config import CONFIG_FILE, PREFIX, WEIGHTS_FILE, check_adapter_dir, read_peft_config
from mswift.tuners.prompts import PROMPTS, PromptConfig
from mswift.tuners.shapes import adapter_table, promised_shapes


def saved_modules(config: TrainConfig) -> tuple[str, ...]:
    """HF modules that a LoRA run trains in full: of the flag, with the rows of new tokens all others, of longlora."""
    rows = (EMBED, HEAD) if config.new_special_tokens else ()
    return config.modules_to_save + rows + ((EMBED, NORM) if config.tuner_type == "longlora" else ())


def trained_parameters(config: TrainConfig, table: ModelTable) -> int:
    """Elements that the whole run trains; ConfigError for a module name that the model does not have."""
    if config.tuner_type == "llamapro":
        return trained_elements(table, config.llamapro_num_new_blocks, config.llamapro_num_groups)
    if config.tuner_type == "full":
        kept = not config.mtp_num_layers
        whole = sum(math.prod(each.shape) for each in table.megatron.values() if not (kept and each.rule.in_mtp))
        return whole - sum(math.prod(table.hf[name]) for name in frozen_names(config, table))
    return sum(map(math.prod, _adapter_shapes(config, table).values()))


def part_of(config: TrainConfig, table: ModelTable) -> Part | None:
    """What of a run of full weights is trained; None: everything."""
    if config.tuner_type == "llamapro":
        return new_blocks(table, config.llamapro_num_new_blocks, config.llamapro_num_groups)
    part = Part(
        config.freeze_parameters_ratio,
        config.freeze_parameters,
        config.freeze_parameters_regex,
        config.trainable_parameters,
        config.trainable_parameters_regex,
    )
    return part if part != Part() else None


def frozen_names(config: TrainConfig, table: ModelTable) -> set[str]:
    """HF names of a run of full weights. None for a model with experts, whose names transformers alone knows.

    ConfigError for names that the model does not have, or that the backend cannot part.
    """
    part = part_of(config, table)
    if part is None or table.spec.moe is not None:
        return set()
    frozen = part.frozen({name: math.prod(table.hf[name]) for name in table.hf_order})
    if config.backend == "megatron" and not part.ratio:  # a share goes by transformers' order: the engine looks
        refuse_torn(frozen, joined(table))
    return frozen


def virtual_tokens(config: TrainConfig, table: ModelTable) -> int:
    """Positions that the tuner puts before every sample, of a pack too; --max_length does not count them."""
    if config.tuner_type not in PROMPTS:
        return 0
    adapter: object = None
    for path in map(Path, config.adapters):
        adapter, _ = parse_other(check_adapter_dir(path), path / CONFIG_FILE, table.spec.num_layers)
    adapter = adapter or other_config(config, table)
    return adapter.num_virtual_tokens if isinstance(adapter, PromptConfig) else 0


def _adapter_shapes(config: TrainConfig, table: ModelTable) -> dict[str, tuple[int, ...]]:
    """What an adapter run trains, by PEFT's names; modules in full by their own, of tied embeddings once."""
    if config.adapters and config.tuner_type != "xlora":
        shapes = _continued_shapes(Path(config.adapters[0]), table)
    elif config.trains_lora:
        lora = lora_config(config, table)
        settings = replace(lora.settings, modules_to_save=_in_full(config, table))
        shapes = promised_shapes(lora.own_table(table), settings)
    else:
        saved = saved_shapes(table, _in_full(config, table))
        shapes = saved | other_config(config, table).trained_shapes(table)
    return {trained_name(table, name): shape for name, shape in shapes.items()}


def _continued_shapes(path: Path, table: ModelTable) -> dict[str, tuple[int, ...]]:
    """Of an adapter that a run goes on with."""
    data = check_adapter_dir(path)
    if data.get("peft_type", "LORA") != "LORA":
        other, saved = parse_other(data, path / CONFIG_FILE, table.spec.num_layers)
        return saved_shapes(table, expand_modules_to_save(table, saved)) | other.trained_shapes(table)
    settings = read_peft_config(path)
    own = adapter_table(table, {name.removeprefix(PREFIX) for name in read_header(path / WEIGHTS_FILE)})
    return promised_shapes(
        own, replace(settings, modules_to_save=expand_modules_to_save(table, settings.modules_to_save))
    )


def optimizer_bytes(config: TrainConfig, table: ModelTable) -> int:
    """State of the update rules over the whole job, one copy of it; no fp32 masters. Of a part of a model its share."""
    trained = trained_parameters(config, table)
    if config.optimizer in ELEMENTWISE:
        return trained * 4 * len(kept_by(config.optimizer, config.sgd_momentum))
    shapes = _adapter_shapes(config, table) if config.trains_adapter else table.without_mtp().hf
    low_rank, total = LowRank.of(config), 0
    for name, shape in shapes.items():
        is_embedding = name in table.hf_embeddings
        rule = rule_of(
            config.optimizer, shape, in_layer=name in table.hf_in_layers, is_embedding=is_embedding, low_rank=low_rank
        )
        total += state_bytes(rule, shape, low_rank)
    return math.ceil(total * trained / sum(map(math.prod, shapes.values())))


def _in_full(config: TrainConfig, table: ModelTable) -> tuple[str, ...]:
    return expand_modules_to_save(table, saved_modules(config))


def lora_config(config: TrainConfig, table: ModelTable) -> LoraConfig:
    """The adapter that the flags mean; ConfigError for a module name that the model does not have."""
    return LoraConfig.for_table(
        table,
        rank=config.lora_rank,
        alpha=config.lora_alpha,
        target_modules=config.target_modules,
        target_parameters=config.target_parameters,
        rslora=config.use_rslora,
        dora=config.use_dora,
        dropout=config.lora_dropout,
        init=config.init_weights,
        seed=config.seed,
    )
