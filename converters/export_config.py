"""What an exported config.json must say that the source's does not: dtype, no quantisation, what vLLM needs."""

from collections.abc import Mapping
from typing import Any

from mswift.converters.quantization import FIELD

_NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}

_VLLM_NEEDS: Mapping[str, Mapping[str, Any]] = {
    "deepseek_v3": {"topk_method": "noaux_tc", "scoring_func": "sigmoid"},
    "deepseek_v2": {"n_group": 1, "topk_group": 1},
}
"""Fields without which vLLM 0.32 fails (deepseek_v2) or scores experts with softmax, silently (deepseek_v3). The
values are those of the architecture, which transformers does not write."""


def missing_for_vllm(config: Mapping[str, Any]) -> dict[str, Any]:
    """Fields that vLLM reads and this config.json lacks, with the values that it means."""
    needs = _VLLM_NEEDS.get(str(config.get("model_type")), {})
    return {name: value for name, value in needs.items() if config.get(name) is None}


def config_edits(config: Mapping[str, Any], dtype: str | None, *, complete: bool) -> dict[str, Any]:
    """Field -> value (None: left out) in which the exported config.json differs from the source's.

    dtype: of the exported weights if they were cast, else None.
    """
    edits: dict[str, Any] = {}
    if config.get(FIELD) is not None:
        edits[FIELD] = None
    if dtype is not None:
        for name in ("dtype", "torch_dtype"):
            if config.get(name) not in (None, _NAMES[dtype]):
                edits[name] = _NAMES[dtype]
    return edits | (missing_for_vllm(config) if complete else {})
