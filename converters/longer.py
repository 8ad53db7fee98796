"""A model trained at more positions than its config.json gives it: `--rope_scaling` and `--max_model_len`. No torch.

The answer is a set of changes to config.json, in both spellings that transformers and vLLM read; everything else
(the rotary table, the exported config.json) follows from the changed file.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mswift.converters.catalog import family_for, spec_for
from mswift.converters.spec import ModelSpec, RopeSpec
from mswift.errors import ConfigError

_KINDS = ("linear", "yarn", "llama3")
_POSITIONS = "max_position_embeddings"
_ORIGINAL = "original_max_position_embeddings"
_EXAMPLE = """--rope_scaling '{"rope_type": "yarn", "factor": 4}'"""


def longer(config: Mapping[str, Any], rope_scaling: str | None, max_model_len: int | None) -> dict[str, Any]:
    """Changes to config.json that the two flags ask for; {} if they are not given. ConfigError with the numbers."""
    if rope_scaling is None and max_model_len is None:
        return {}
    if not isinstance(config.get(_POSITIONS), int):
        raise ConfigError(f"--max_model_len, --rope_scaling: config.json has no {_POSITIONS} that they could change")
    if rope_scaling is None:
        assert max_model_len is not None
        return _more_positions(config, max_model_len)
    spec = _spec(config)
    if spec.other_ropes:
        raise ConfigError(
            f"--rope_scaling: a model of type {spec.model_type} has {len(spec.ropes)} rotary embeddings, and the flag "
            "means one: change config.json by hand"
        )
    before = spec.rope
    if before.kind not in ("default", "yarn", "llama3"):
        raise ConfigError(
            f"--rope_scaling: the model has a rope_type {before.kind!r} already: change config.json by hand"
        )
    original = before.original_max_position_embeddings if before.kind in ("yarn", "llama3") else config[_POSITIONS]
    scaling = _scaling(rope_scaling, original, max_model_len)
    if scaling["rope_type"] == before.kind:  # the same kind goes on: what the flag does not say stays (mscale, ...)
        stays = config.get("rope_parameters") or config.get("rope_scaling") or {}
        scaling = {name: value for name, value in stays.items() if name != "type"} | scaling
    reach = int(scaling["factor"] * scaling.get(_ORIGINAL, original))
    length = max_model_len or reach
    if length > reach:
        raise ConfigError(
            f"--max_model_len {length} is beyond what --rope_scaling reaches: {original} positions of the model x "
            f"factor {scaling['factor']:g} = {reach}; use factor {-(-length // original)}, or --max_model_len {reach}"
        )
    changes = _both_spellings(config, scaling, before) | {_POSITIONS: length}
    _spec({**config, **changes})  # refuses what the family does not take
    return changes


def _scaling(text: str, original: int, max_model_len: int | None) -> dict[str, Any]:
    """The dictionary that the flag means: JSON, or the name of a kind whose factor follows from max_model_len."""
    if text in _KINDS:
        if max_model_len is None:
            raise ConfigError(
                f"--rope_scaling {text} needs --max_model_len, from which its factor follows; or {_EXAMPLE}"
            )
        scaling: Any = {"rope_type": text, "factor": max_model_len / original}
    else:
        try:
            scaling = json.loads(text)
        except ValueError as error:
            raise ConfigError(f"--rope_scaling {text!r} is not JSON ({error}): use {_EXAMPLE}") from None
    if not isinstance(scaling, dict):
        raise ConfigError(f"--rope_scaling {text!r} is no JSON object: use {_EXAMPLE}")
    kind = scaling.pop("type", None)
    kind = scaling.setdefault("rope_type", kind)
    if kind not in _KINDS:
        raise ConfigError(f"--rope_scaling: rope_type {kind!r} is not one of {', '.join(_KINDS)}: use {_EXAMPLE}")
    factor = scaling.get("factor")
    if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not factor >= 1:
        raise ConfigError(f"--rope_scaling: factor {factor!r} must be a number from 1 on: use {_EXAMPLE}")
    given = scaling.get(_ORIGINAL, original)
    if given != original:
        raise ConfigError(f"--rope_scaling: {_ORIGINAL} {given} is not that of the model, {original}: leave it out")
    return scaling | ({_ORIGINAL: original} if kind != "linear" else {})


def _both_spellings(config: Mapping[str, Any], scaling: Mapping[str, Any], before: RopeSpec) -> dict[str, Any]:
    """`rope_parameters` (transformers 5) and `rope_scaling` with theta beside it (transformers 4, older vLLM)."""
    share = (config.get("rope_parameters") or {}).get("partial_rotary_factor", config.get("partial_rotary_factor"))
    beside = {"rope_theta": before.theta} | ({} if share is None else {"partial_rotary_factor": share})
    return {"rope_parameters": {**scaling, **beside}, "rope_scaling": {**scaling, **beside}, **beside}


def _more_positions(config: Mapping[str, Any], length: int) -> dict[str, Any]:
    """Another number of positions alone, where nothing else of the model depends on it."""
    before, after = _spec(config), _spec({**config, _POSITIONS: length})
    if replace(after, max_position_embeddings=before.max_position_embeddings) != before:
        raise ConfigError(
            f"--max_model_len {length}: the model computes otherwise with other {_POSITIONS} "
            f"({before.max_position_embeddings}) than its own: add {_EXAMPLE}"
        )
    return {_POSITIONS: length}


def _spec(config: Mapping[str, Any]) -> ModelSpec:
    return spec_for(dict(config), family_for(dict(config)))
