"""`quantization_config` of GPTQ and AWQ: integer codes of 4 or 8 bits, a scale and a zero for each group of inputs."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from mswift.errors import ConfigError

FIELD = "quantization_config"

_HOW_IT_WAS_QUANTISED = {
    *(
        "quant_method",
        "method",
        "meta",
        "true_sequential",
        "damp_percent",
        "damp_auto_increment",
        "static_groups",
        "mse",
    ),
    *("act_group_aware", "lm_head", "offload_to_disk", "offload_to_disk_path", "pack_impl", "device"),
    *("dataset", "tokenizer", "batch_size", "pad_token_id", "model_seqlen", "max_input_length"),
    *("cache_block_outputs", "block_name_to_quantize", "module_name_preceding_first_block"),
    *("modules_in_block_to_quantize", "modules_to_not_convert", "model_name_or_path", "model_file_base_name"),
}
_HOW_IT_IS_RUN = {
    *("use_exllama", "disable_exllama", "exllama_config", "use_cuda_fp16", "backend", "do_fuse"),
    *("fuse_max_seq_len", "modules_to_fuse"),
}
_WITHOUT_EFFECT = _HOW_IT_WAS_QUANTISED | _HOW_IT_IS_RUN
_NOT_BUILT: Mapping[str, tuple[Any, ...]] = {
    "is_marlin_format": (False, None),
    "pack_dtype": ("int32", None),
    "rotation": (None,),
    "adapter": (None,),
}
"""Fields that change what the files hold, and the values with which they do not."""


@dataclass(frozen=True)
class GroupedCodes:
    """weight = scale * (code - zero): codes of `bits`, one scale and one zero for each output and `group` inputs.

    group: -1 for all inputs. zero_plus: what is added to a zero as it is stored (GPTQ's first format stores one less).
    zero_wraps: a zero of 0 less one borrowed from its neighbour in the word, as GPTQModel subtracts, and may be there.
    act_order: inputs of a group need not be neighbours (`g_idx` says which group each is in).
    """

    method: Literal["gptq", "awq"]
    bits: int
    group: int
    zero_plus: int = 0
    zero_wraps: bool = False
    act_order: bool = False


def grouped_codes(value: Mapping[str, Any]) -> GroupedCodes:
    """What a quantization_config of GPTQ or AWQ says; ConfigError naming the field that cannot be read."""
    return _gptq(value) if value["quant_method"] == "gptq" else _awq(value)


def _gptq(value: Mapping[str, Any]) -> GroupedCodes:
    _check_fields(value, {"bits", "group_size", "desc_act", "sym", "checkpoint_format", "format", "dynamic"})
    bits, group = _number(value, "bits", (4, 8)), _group(value)
    act_order = _switch(value, "desc_act", False)
    _switch(value, "sym", True)
    for name in ("checkpoint_format", "format"):
        if value.get(name, "gptq") not in ("gptq", "gptq_v2"):
            raise _refused(name, value[name], "gptq and gptq_v2 are read")
    form = value.get("checkpoint_format") or value.get("format") or "gptq"
    if value.get("format", form) != form:
        raise _refused("format", value["format"], f"checkpoint_format is {form!r}")
    for pattern in value.get("dynamic") or {}:
        if not str(pattern).startswith("-:"):
            raise _refused("dynamic", pattern, "modules with bits or groups of their own are not read")
    return GroupedCodes("gptq", bits, group, 1 if form == "gptq" else 0, "gptqmodel" in _writer(value), act_order)


def _writer(value: Mapping[str, Any]) -> str:
    """The programs that wrote the checkpoint, where it says so."""
    meta = value.get("meta")
    return str(meta.get("quantizer")) if isinstance(meta, dict) else ""


def _awq(value: Mapping[str, Any]) -> GroupedCodes:
    _check_fields(
        value, {"bits", "group_size", "zero_point", "version", "format", "checkpoint_format", "sym"}, "desc_act"
    )
    bits, group = _number(value, "bits", (4,)), _group(value)
    _switch(value, "zero_point", True)
    for name in ("version", "format", "checkpoint_format"):
        if name in value and str(value[name]).lower() != "gemm":
            raise _refused(name, value[name], "gemm is read")
    return GroupedCodes("awq", bits, group)


def _check_fields(value: Mapping[str, Any], own: Collection[str], *unused: str) -> None:
    method = value["quant_method"]
    if value.get("method", method) != method:
        raise _refused("method", value["method"], f"quant_method is {method!r}")
    for name, given in value.items():
        if name in _NOT_BUILT:
            if given not in _NOT_BUILT[name]:
                raise _refused(name, given, f"only {_NOT_BUILT[name][0]!r} is read")
        elif name in unused:
            if given:
                raise _refused(name, given, f"quant_method {method!r} has none")
        elif name not in own and name not in _WITHOUT_EFFECT:
            raise ConfigError(f"config.json: field {FIELD!r}: {name} of quant_method {method!r} is not known")


def _number(value: Mapping[str, Any], name: str, allowed: tuple[int, ...]) -> int:
    found = value.get(name)
    if type(found) is not int or found not in allowed:
        raise _refused(name, found, f"{' and '.join(map(str, allowed))} can be read with {value['quant_method']}")
    return found


def _group(value: Mapping[str, Any]) -> int:
    found = value.get("group_size")
    if type(found) is not int or (found < 1 and found != -1):
        raise _refused("group_size", found, "a positive number is needed, or -1 for all inputs")
    return found


def _switch(value: Mapping[str, Any], name: str, default: bool) -> bool:
    found = value.get(name, default)
    if type(found) is not bool:
        raise _refused(name, found, "true or false is needed")
    return found


def _refused(name: str, value: object, reason: str) -> ConfigError:
    return ConfigError(f"config.json: field {FIELD!r}: {name} is {value!r}; {reason}")
