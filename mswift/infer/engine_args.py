"""--engine_args NAME=VALUE: a backend's own options, by its names, checked before anything starts. Torch-free."""

from collections.abc import Mapping, Sequence
from typing import Any

from mswift.config.schema import nearest
from mswift.errors import ConfigError

_TYPES: Mapping[str, Mapping[str, type]] = {
    "transformers": {},
    "vllm": {
        "tensor_parallel_size": int, "pipeline_parallel_size": int, "data_parallel_size": int,
        "enable_expert_parallel": bool, "gpu_memory_utilization": float, "max_num_batched_tokens": int,
        "kv_cache_dtype": str, "block_size": int, "quantization": str, "enforce_eager": bool,
        "enable_prefix_caching": bool, "cpu_offload_gb": float, "seed": int,
    },
    "sglang": {
        "tp_size": int, "dp_size": int, "pp_size": int, "ep_size": int, "mem_fraction_static": float,
        "max_total_tokens": int, "chunked_prefill_size": int, "max_prefill_tokens": int, "kv_cache_dtype": str,
        "page_size": int, "attention_backend": str, "quantization": str, "disable_radix_cache": bool,
        "enable_torch_compile": bool, "enable_deterministic_inference": bool, "tool_call_parser": str,
        "reasoning_parser": str, "log_level": str,
    },
    "lmdeploy": {
        "backend": str, "tp": int, "dp": int, "ep": int, "cache_max_entry_count": float, "cache_block_seq_len": int,
        "max_prefill_token_num": int, "quant_policy": int, "model_format": str, "enable_prefix_caching": bool,
        "eager_mode": bool, "tool_call_parser": str, "reasoning_parser": str, "log_level": str,
    },
}  # fmt: skip
_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def engine_args(backend: str, given: Sequence[str]) -> dict[str, Any]:
    """Name -> value of --engine_args. ConfigError for what the backend does not take."""
    types = _TYPES.get(backend, {})  # an unknown backend is refused where it is opened
    found: dict[str, Any] = {}
    for text in given:
        name, equals, value = text.partition("=")
        name = name.strip().lstrip("-").replace("-", "_")
        if not equals:
            raise ConfigError(f"--engine_args {text}: write NAME=VALUE")
        if name not in types:
            takes = f"it takes {', '.join(types)}{nearest(name, types)}" if types else "it takes none"
            raise ConfigError(f"--engine_args {name} is no option of --infer_backend {backend}: {takes}")
        if name in found:
            raise ConfigError(f"--engine_args {name} is given twice")
        found[name] = _typed(name, value.strip(), types[name])
    return found


def _typed(name: str, value: str, kind: type) -> Any:
    if kind is bool and value.lower() in ("true", "false"):
        return value.lower() == "true"
    try:
        if kind is not bool and value:
            return kind(value)
    except ValueError:
        pass
    raise ConfigError(f"--engine_args {name}={value}: it takes {_WORDS[kind]}")
