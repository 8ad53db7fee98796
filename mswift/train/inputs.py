"""What a launch and a dry run check alike before torch is imported: module names, adapter, dtype, files."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from mswift import rundir
from mswift.config.blend import Blend, parse_blend
from mswift.config.train import PtConfig, SftConfig, TrainConfig
from mswift.converters.catalog import read_config
from mswift.converters.longer import longer
from mswift.converters.plan import ModelTable, table_for
from mswift.converters.quantization import GroupedCodes, quantization_of
from mswift.converters.reader import WeightReader
from mswift.data.chat_template import read_chat_template
from mswift.data.indexed import open_indexed
from mswift.data.loss_scale import parse_loss_scale
from mswift.data.mixture import Mixture, read_mixture
from mswift.data.sources import parse_source
from mswift.errors import ConfigError, MswiftError
from mswift.refusals import train_dtype
from mswift.refusals.deepspeed import check_modules_in_full, check_precision
from mswift.train.continued import check_continued
from mswift.train.new_tokens import GrownReader, new_tokens
from mswift.train.resume import start_of
from mswift.train.trained import saved_modules, trained_parameters, virtual_tokens
from mswift.tuners.llamapro import ExpandedReader, expanded_config, expansion
from mswift.tuners.method import parse_method
from mswift.tuners.methods import METHODS
from mswift.tuners.peft_config import CONFIG_FILE, read_adapter_json


def input_refusals(config: TrainConfig, table: ModelTable, stored_dtype: str) -> list[MswiftError]:
    """Every reason not to start that the model's table and the directories tell. `stored_dtype`: as "BF16"."""
    checks: list[Callable[[], object]] = [
        lambda: _check_dtype(config, train_dtype(config, stored_dtype)),
        lambda: trained_parameters(config, table),
        lambda: _check_virtual_tokens(config, table),
        *(partial(_check_adapter, config, table, Path(path)) for path in config.adapters),
        lambda: check_codes(config, table.config),
        lambda: read_chat_template(config.chat_template),
        lambda: read_mixture(config.dataset, config.dataset_weights),
        *(partial(parse_source, spec, "--dataset") for spec in mixture_of(config).specs),
        *(partial(parse_source, spec, "--val_dataset") for spec in config.val_dataset),
        *(partial(open_indexed, prefix, "--data_path") for prefix in blend_of(config).prefixes),
        *([partial(parse_loss_scale, config.loss_scale)] if isinstance(config, SftConfig) else []),
        partial(_check_rows_of_documents, config),
        lambda: start_of(config),
    ]
    refusals = []
    for check in checks:
        try:
            check()
        except MswiftError as error:
            refusals.append(error)
    return refusals


def _check_virtual_tokens(config: TrainConfig, table: ModelTable) -> None:
    """ConfigError for virtual tokens that leave a sample less than 2 positions: one to predict from, one to predict."""
    virtual, positions = virtual_tokens(config, table), table.spec.max_position_embeddings
    if virtual and virtual + 2 > positions:
        raise ConfigError(
            f"--tuner_config: num_virtual_tokens {virtual} leaves {max(positions - virtual, 0)} of the model's "
            f"{positions} positions to a sample: use fewer; 20 is usual"
        )


def _check_rows_of_documents(config: TrainConfig) -> None:
    """ConfigError for a mixture whose documents are to fill rows in their order; each stream has rows of its own."""
    mixture = mixture_of(config)
    drawn = mixture.weights or mixture.epochs or blend_of(config).weights
    if config.packing and config.packing_strategy == "concat-and-split" and drawn and not config.streaming:
        raise ConfigError(
            "--packing_strategy concat-and-split fills rows with documents in file order, which weights and epochs of "
            "a mixture do not keep: use --packing_strategy bestfit, or leave them out"
        )


def blend_of(config: TrainConfig) -> Blend:
    """--data_path; nothing where it is not given or makes no sense, which is refused elsewhere."""
    try:
        return parse_blend(config.data_path if isinstance(config, PtConfig) else ())
    except ConfigError:
        return Blend(())


def mixture_of(config: TrainConfig) -> Mixture:
    """--dataset and its weights; nothing where a mixture file is wrong, which is refused elsewhere."""
    try:
        return read_mixture(config.dataset, config.dataset_weights)
    except ConfigError:
        return Mixture(())


def open_model(config: TrainConfig, model: Path) -> WeightReader:
    """The weights in `model`; those of --model with the positions and the rows that the flags give them.

    A checkpoint of the run itself has them already. A LoRA run does without multi-token-prediction layers, which
    neither its checkpoints nor transformers have. Raises ConfigError, CheckpointError.
    """
    reader = _open_model(config, model)
    if config.trains_adapter:
        reader.leave_out_mtp()
    return reader


def _open_model(config: TrainConfig, model: Path) -> WeightReader:
    if model != Path(config.model):
        return WeightReader(model)
    changes, tokens = _longer(config, model), new_tokens(_hf_files(model), config.new_special_tokens)
    reader = WeightReader(model, changes) if tokens is None else GrownReader(model, changes, tokens)
    if config.tuner_type == "llamapro":
        return ExpandedReader(reader, config.llamapro_num_new_blocks, config.llamapro_num_groups)
    return reader


def model_config(config: TrainConfig, model: Path) -> dict[str, Any]:
    """The config.json of `open_model` where there are no weights; `model` may be such a file itself."""
    raw = read_config(_hf_files(model), or_file=True)
    if model != Path(config.model):
        return raw
    raw |= _longer(config, model)
    tokens = new_tokens(_hf_files(model), config.new_special_tokens)
    raw = raw if tokens is None else raw | {"vocab_size": max(raw["vocab_size"], tokens.end)}
    if config.tuner_type == "llamapro":
        table = table_for(raw)
        blocks = (config.llamapro_num_new_blocks, config.llamapro_num_groups)
        return expanded_config(raw, table, expansion(table.spec.num_layers, *blocks))
    return raw


def _longer(config: TrainConfig, model: Path) -> dict[str, Any]:
    if config.rope_scaling is None and config.max_model_len is None:
        return {}
    return longer(read_config(_hf_files(model), or_file=True), config.rope_scaling, config.max_model_len)


def _hf_files(model: Path) -> Path:
    """Where config.json and tokenizer lie: converted directories and checkpoints have them in a folder."""
    return model / rundir.HF_FILES if (model / rundir.HF_FILES).is_dir() else model


def _check_adapter(config: TrainConfig, table: ModelTable, path: Path) -> None:
    """ConfigError where the flags ask for another adapter than one to continue is."""
    grows = new_tokens(_hf_files(Path(config.model)), config.new_special_tokens) is not None
    check_continued(config, table, path, grows=grows)


def _check_dtype(config: TrainConfig, dtype: str) -> None:
    check_precision(config, dtype)
    modules = saved_modules(config)
    for path in map(Path, config.adapters if config.tuner_type in METHODS else ()):
        modules += parse_method(read_adapter_json(path), path / CONFIG_FILE)[1]
    check_modules_in_full(config, dtype, modules)


def check_codes(config: TrainConfig, model: Mapping[str, Any]) -> None:
    """ConfigError unless --quant_method gptq or awq keeps codes that --model, with this config.json, has."""
    method = config.quant_method
    if method not in ("gptq", "awq"):
        return
    how = quantization_of(model)
    if how is None or how.method != method:
        there = "none (no quantization_config)" if how is None else f"those of {how.method}"
        remedy = (
            f"--quant_method {how.method}" if isinstance(how, GroupedCodes) else "--quant_method bnb --quant_bits 4"
        )
        raise ConfigError(
            f"--quant_method {method} keeps the codes of the checkpoint, and --model {config.model} has {there}: use "
            f"{remedy}, or a checkpoint of {method}"
        )
    assert isinstance(how, GroupedCodes)
    if how.bits != 4 or how.act_order:
        what = f"{how.bits} bits" if how.bits != 4 else "act-order (desc_act)"
        raise ConfigError(
            f"--quant_method {method}: --model {config.model} has codes with {what}, which are not kept: leave "
            "--quant_method out, which trains on the dequantised base, or use a checkpoint of 4 bits without act-order"
        )
