"""DeepSpeed's configuration: named ones, or a JSON file in which what a flag of mswift decides may only say the same.

Unknown keys, and those of what this engine does not have, are errors; "auto" leaves a value to mswift.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mswift.config.schema import nearest
from mswift.errors import ConfigError

Offload = Literal["none", "optimizer", "all"]

_ZERO = "zero_optimization"
_SIZES = (
    *("reduce_bucket_size", "allgather_bucket_size", "sub_group_size", "stage3_prefetch_bucket_size"),
    *("stage3_param_persistence_threshold", "stage3_model_persistence_threshold", "stage3_max_live_parameters"),
    *("stage3_max_reuse_distance", "stage3_module_granularity_threshold"),
)
_SWITCHES = (
    *("overlap_comm", "contiguous_gradients", "reduce_scatter", "use_multi_rank_bucket_allreduce"),
    *("allgather_partitions", "stage3_allgather_sequential", "stage3_use_all_reduce_for_fetch_params"),
)
_OF_ITS_OWN_FILES = ("stage3_gather_16bit_weights_on_model_save", "stage3_gather_fp16_weights_on_model_save")
_OFF: Mapping[str, Any] = {
    **dict.fromkeys(("zero_quantized_weights", "zero_quantized_gradients", "round_robin_gradients"), False),
    **dict.fromkeys(("zero_quantized_nontrainable_weights", "elastic_checkpoint"), False),
    "zero_hpz_partition_size": 1,
}
"""Of zero_optimization what may only have the value with which it does nothing."""
_OFFLOADS = ("offload_optimizer", "offload_param")
_ALWAYS: Mapping[str, Any] = {
    "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False, "prescale_gradients": False,
    "gradient_predivide_factor": 1.0, "communication_data_type": "fp32",
}  # fmt: skip
"""What it is here, whatever the flags: torch's update rules, gradients that are summed in fp32."""
_OTHERWISE = {
    "scheduler": "the learning rate follows --lr_decay_style, --lr_warmup_iters and --min_lr",
    "activation_checkpointing": "use --recompute_granularity",
    "tensorboard": "use --tensorboard",
}
"""Keys in whose place there are flags of another meaning."""
_PASSED_ON = ("steps_per_print", "wall_clock_breakdown")
_COMPARED = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
_OPTIMIZER = ("lr", "betas", "eps", "weight_decay", "momentum", "torch_adam", "adam_w_mode")


@dataclass(frozen=True)
class Zero:
    """stage of ZeRO, 1 to 3; offload: what lies in host memory, the optimizer's state or parameters as well.

    options: further fields of zero_optimization; passed_on: others that DeepSpeed gets as they are. says: what the file
    says of things that flags decide, by the key's whole name (bf16.enabled).
    """

    stage: int
    offload: Offload = "none"
    options: Mapping[str, Any] = field(default_factory=dict)
    passed_on: Mapping[str, Any] = field(default_factory=dict)
    says: Mapping[str, Any] = field(default_factory=dict)


NAMED: Mapping[str, Zero] = {
    "zero1": Zero(1),
    "zero2": Zero(2),
    "zero3": Zero(3),
    "zero2_offload": Zero(2, "optimizer"),
    "zero3_offload": Zero(3, "all"),
}


def read_zero(given: str | None) -> Zero:
    """What `--deepspeed` means, None: zero2; ConfigError for an unknown name and a file that cannot be done."""
    if given is None:
        return NAMED["zero2"]
    if given in NAMED:
        return NAMED[given]
    if not given.endswith(".json"):
        raise ConfigError(f"--deepspeed {given}: none of {', '.join(NAMED)}, and no FILE.json{nearest(given, NAMED)}")
    where, content = f"--deepspeed {given}", _content(Path(given).expanduser(), f"--deepspeed {given}")
    says: dict[str, Any] = {}
    for name, value in content.items():
        _check_key(where, name, value)
        if name in _COMPARED:
            says[name] = value
    for name in ("bf16", "fp16", "optimizer"):
        says |= _section(where, name, content.get(name, "auto"))
    passed_on = {name: content[name] for name in _PASSED_ON if content.get(name, "auto") != "auto"}
    zero = content.get(_ZERO)
    if not isinstance(zero, dict) or zero.get("stage") not in (1, 2, 3):
        stage = zero.get("stage") if isinstance(zero, dict) else None
        raise ConfigError(
            f"{where}: {_ZERO}.stage {json.dumps(stage)}: 1, 2 or 3; without ZeRO use --backend ddp in its place"
        )
    says = {name: value for name, value in says.items() if value != "auto"}
    return Zero(zero["stage"], _offload(where, zero), _options(where, zero), passed_on, says)


def _content(path: Path, where: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=lambda pairs: _once(pairs, where))
    except OSError as error:
        raise ConfigError(f"{where}: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"{where}: no JSON: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{where}: an object with {_ZERO} is needed, this is {type(content).__name__}")
    return content


def _once(pairs: list[tuple[str, Any]], where: str) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ConfigError(f"{where}: {twice[0]} stands there twice: leave one out")
    return dict(pairs)


def _check_key(where: str, name: str, value: Any) -> None:
    """ConfigError for a key of the whole that means something else than what is done."""
    if name in _ALWAYS:
        _check_fixed(where, name, value, _ALWAYS[name])
    elif name in _OTHERWISE:
        if value != "auto":
            raise ConfigError(f"{where}: {name}: {_OTHERWISE[name]}; leave it out")
    elif name == "data_types":
        wanted = {"grad_accum_dtype": "fp32"}
        if value not in ("auto", wanted):
            raise ConfigError(f"{where}: {name} {json.dumps(value)}: gradients are summed in fp32: leave it out")
    elif name not in (_ZERO, *_COMPARED, *_PASSED_ON, "bf16", "fp16", "optimizer"):
        known = (_ZERO, *_COMPARED, *_PASSED_ON, "bf16", "fp16", "optimizer")
        raise ConfigError(f"{where}: {name} is not supported: leave it out{nearest(name, known)}")


def _check_fixed(where: str, name: str, value: Any, wanted: Any) -> None:
    if value not in ("auto", wanted):
        raise ConfigError(
            f"{where}: {name} {json.dumps(value)}: it is {json.dumps(wanted)} here and nothing else: leave it out"
        )


def _section(where: str, name: str, value: Any) -> dict[str, Any]:
    """What bf16, fp16 or optimizer say, by whole names."""
    if value == "auto":
        return {}
    if not isinstance(value, dict):
        raise ConfigError(f'{where}: {name} {json.dumps(value)}: an object, or "auto"')
    if name == "fp16":  # its other fields mean nothing where it is off
        return {"fp16.enabled": value.get("enabled", False)}
    parameters = value.get("params", {}) if name == "optimizer" else {}
    if not isinstance(parameters, dict):
        raise ConfigError(f"{where}: optimizer.params {json.dumps(parameters)}: an object")
    known = ("enabled",) if name == "bf16" else ("type", "params")
    for unknown in (n for n in value if n not in known):
        raise ConfigError(f"{where}: {name}.{unknown} is not supported: leave it out{nearest(unknown, known)}")
    for unknown in (n for n in parameters if n not in _OPTIMIZER):
        raise ConfigError(f"{where}: optimizer.params.{unknown} is not supported: leave it out")
    own = {f"{name}.{key}": each for key, each in value.items() if key != "params"}
    return own | {f"optimizer.params.{key}": each for key, each in parameters.items()}


def _offload(where: str, zero: Mapping[str, Any]) -> Offload:
    """What lies in host memory; ConfigError for disks."""
    devices = {}
    for name in _OFFLOADS:
        section = zero.get(name) or {}
        if not isinstance(section, dict):
            raise ConfigError(f"{where}: {_ZERO}.{name} {json.dumps(section)}: an object with device none or cpu")
        for key in section:
            if key not in ("device", "pin_memory"):
                raise ConfigError(f"{where}: {_ZERO}.{name}.{key} is not supported: leave it out")
        devices[name] = section.get("device", "none")
        if devices[name] not in ("none", "cpu"):
            raise ConfigError(f"{where}: {_ZERO}.{name}.device {devices[name]} is not supported: use cpu or none")
    parameters = devices["offload_param"] == "cpu"
    if parameters and (zero["stage"] < 3 or devices["offload_optimizer"] != "cpu"):
        raise ConfigError(
            f"{where}: {_ZERO}.offload_param is for stage 3, together with offload_optimizer; stage is "
            f"{zero['stage']}: add offload_optimizer with device cpu, or leave it out"
        )
    return "all" if parameters else "optimizer" if devices["offload_optimizer"] == "cpu" else "none"


def _options(where: str, zero: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of zero_optimization that DeepSpeed gets."""
    found: dict[str, Any] = {}
    for name, value in zero.items():
        if name in _OFF:
            _check_fixed(where, f"{_ZERO}.{name}", value, _OFF[name])
        elif name in _SIZES and value != "auto":
            if isinstance(value, bool) or not isinstance(value, int | float) or value < 0 or value != int(value):
                raise ConfigError(f"{where}: {_ZERO}.{name} {json.dumps(value)}: a whole number from 0 on")
            found[name] = int(value)
        elif name in _SWITCHES and value != "auto":
            if not isinstance(value, bool):
                raise ConfigError(f"{where}: {_ZERO}.{name} {json.dumps(value)}: true or false")
            found[name] = value
        elif name not in (*_SIZES, *_SWITCHES, *_OF_ITS_OWN_FILES, *_OFFLOADS, "stage"):
            known = (*_SIZES, *_SWITCHES, *_OFFLOADS)
            raise ConfigError(f"{where}: {_ZERO}.{name} is not supported: leave it out{nearest(name, known)}")
    return found
