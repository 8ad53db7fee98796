"""`quantization_config` of a config.json: which quantised formats are read, and which numbers they need."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from mswift.converters.group_quantization import FIELD, GroupedCodes, grouped_codes
from mswift.errors import ConfigError

__all__ = ["FIELD", "GroupedCodes", "Quantization", "codes_of", "quantization_of"]
_WITHOUT_EFFECT = {"quant_method", "modules_to_not_convert", "ignored_layers", "dequantize"}
_FP8 = {"fmt": ("e4m3", None), "activation_scheme": ("dynamic", None), "scale_fmt": ("ue8m0", "float", None)}


@dataclass(frozen=True)
class Quantization:
    """fp8: F8_E4M3 weights, one scale (`weight_scale_inv`) for each `block` of [rows, columns], as DeepSeek-V3.
    mxfp4: blocks of 32 e2m1 values with an e8m0 scale, as gpt-oss.
    """

    method: Literal["fp8", "mxfp4"]
    block: tuple[int, int] = (0, 0)


def codes_of(config: Mapping[str, Any]) -> GroupedCodes | None:
    """What a config.json says about codes of GPTQ or AWQ; None for every other model. ConfigError if not read."""
    value = config.get(FIELD)
    if not isinstance(value, dict) or value.get("quant_method") not in ("gptq", "awq"):
        return None
    return grouped_codes(value)


def quantization_of(config: Mapping[str, Any]) -> Quantization | GroupedCodes | None:
    """What a config.json says about quantised weights; ConfigError if it is not a kind that can be dequantised."""
    value = config.get(FIELD)
    if value is None:
        return None
    if not isinstance(value, dict):
        raise ConfigError(f"config.json: field {FIELD!r} is a JSON {type(value).__name__}, not an object")
    method = value.get("quant_method")
    if method in ("gptq", "awq"):
        return grouped_codes(value)
    known = _WITHOUT_EFFECT | ({*_FP8, "weight_block_size"} if method == "fp8" else set())
    if method not in ("fp8", "mxfp4"):
        raise ConfigError(
            f"config.json: field {FIELD!r}: quant_method is {method!r}; fp8 (block-scaled, as DeepSeek-V3), mxfp4, "
            "gptq and awq are dequantised, others are not: give the checkpoint from before quantisation"
        )
    for name in value:
        if name not in known:
            raise ConfigError(f"config.json: field {FIELD!r}: {name} of quant_method {method!r} is not known")
    if method == "mxfp4":
        return Quantization("mxfp4")
    for name, supported in _FP8.items():
        if value.get(name) not in supported:
            raise ConfigError(f"config.json: field {FIELD!r}: {name} is {value[name]!r}; supported: {supported[0]!r}")
    block = value.get("weight_block_size")
    if not isinstance(block, list) or len(block) != 2 or not all(type(n) is int and n > 0 for n in block):
        raise ConfigError(
            f"config.json: field {FIELD!r}: weight_block_size is {block!r}; two positive integers are needed "
            "(DeepSeek-V3 has [128, 128]): only block-scaled fp8 is dequantised"
        )
    return Quantization("fp8", (block[0], block[1]))
