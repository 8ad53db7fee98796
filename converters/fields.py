"""Strict reading of a config.json: a field is mapped, known to have no effect, or refused by name."""

import difflib
from collections.abc import Mapping
from typing import Any

from mswift.converters.spec import RopeSpec
from mswift.errors import ConfigError

# fmt: off
WITHOUT_EFFECT = frozenset(
    {
        "_attn_implementation", "_name_or_path", "architectures", "attn_implementation", "bos_token_id",
        "chunk_size_feed_forward", "cls_token_id", "decoder_start_token_id", "dtype", "eos_token_id",
        "finetuning_task", "gradient_checkpointing", "id2label", "initializer_range", "is_decoder",
        "is_encoder_decoder", "label2id", "model_type", "num_labels", "output_attentions",
        "output_hidden_states", "output_scores", "pad_token_id", "prefix", "pretraining_tp",
        "problem_type", "return_dict", "return_dict_in_generate", "sep_token_id",
        "task_specific_params", "tokenizer_class", "torch_dtype", "torchscript", "transformers_version",
        "unk_token_id", "use_bfloat16", "use_cache", "use_return_dict",
    }
)
# fmt: on
"""Fields that change neither the weights' layout nor the function computed from tokens to logits."""

_ROPE_KEYS = {
    "default": set(),
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
}


class Fields:
    """The fields of one config.json; remembers which were read, so that `finish` refuses the rest."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._config = config
        self._read: set[str] = set()
        self.model_type = str(config.get("model_type"))

    def take(self, name: str, default: Any = None) -> Any:
        """The raw value; null counts as absent."""
        self._read.add(name)
        value = self._config.get(name)
        return default if value is None else value

    def integer(self, name: str, default: int | None = None) -> int:
        """A positive integer; ConfigError if it is absent without a default, or anything else."""
        value = self.take(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self._error(name, f"must be a positive integer, not {value!r}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A positive number."""
        value = self.take(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise self._error(name, f"must be a positive number, not {value!r}")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """true or false."""
        value = self.take(name, default)
        if not isinstance(value, bool):
            raise self._error(name, f"must be true or false, not {value!r}")
        return value

    def require(self, name: str, supported: Any) -> None:
        """Refuses every value but the supported one (or an absent field)."""
        value = self.take(name, supported)
        if value != supported:
            raise self._error(name, f"is {value!r}; only {supported!r} is supported")

    def no_sliding_window(self, *, switch: str | None = None) -> None:
        """Refuses a sliding window that masks anything; `switch` is the field that turns it on, if there is one."""
        window, positions = self.take("sliding_window"), self.take("max_position_embeddings")
        on = self.flag(switch, False) if switch else True
        if on and window is not None and not (isinstance(positions, int) and window >= positions):
            raise self._error(
                "sliding_window", f"is {window}, active within {positions} positions; only full attention is supported"
            )
        for kind in self.take("layer_types", ()):
            if kind != "full_attention":
                raise self._error("layer_types", f"holds {kind!r}; only 'full_attention' is supported")

    def rope(self) -> RopeSpec:
        """Rotary embedding from `rope_theta` + `rope_scaling`, or from `rope_parameters` (transformers 5)."""
        name = "rope_parameters" if self._config.get("rope_parameters") else "rope_scaling"
        values = dict(self.take("rope_parameters") or {}) or dict(self.take("rope_scaling") or {})
        self._read.update({"rope_parameters", "rope_scaling"})
        theta = self.number("rope_theta", values.get("rope_theta", 10000.0))
        if values.pop("rope_theta", theta) != theta:
            raise self._error("rope_theta", f"is {theta}, but {name} has another value")
        kind = values.pop("rope_type", values.pop("type", "default"))
        values.pop("type", None)
        if kind not in _ROPE_KEYS:
            raise self._error(f"{name}.rope_type", f"is {kind!r}; supported: {', '.join(_ROPE_KEYS)}")
        self.require("partial_rotary_factor", 1.0)
        if values.pop("partial_rotary_factor", 1.0) != 1.0:
            raise self._error(f"{name}.partial_rotary_factor", "must be 1.0")
        unknown = sorted(set(values) - _ROPE_KEYS[kind])
        missing = sorted(_ROPE_KEYS[kind] - set(values))
        if unknown or missing:
            what = f"unknown {unknown}" if unknown else f"lacks {missing}"
            raise self._error(name, f"of type {kind!r}: {what}")
        if not all(isinstance(v, int | float) and v > 0 for v in values.values()):
            raise self._error(name, f"must hold positive numbers, not {values}")
        return RopeSpec(theta=theta, kind=kind, **values)

    def finish(self, architecture: str) -> None:
        """Refuses fields that nobody read, and other heads than the causal language model."""
        for name in self._config:
            if name not in self._read and name not in WITHOUT_EFFECT:
                near = difflib.get_close_matches(name, [*self._read, *WITHOUT_EFFECT], 1)
                hint = f" (did you mean {near[0]!r}?)" if near else ""
                raise self._error(name, f"is not known to have no effect on the model{hint}")
        heads = self._config.get("architectures")
        if heads is not None and heads != [architecture]:
            raise self._error("architectures", f"is {heads}; only ['{architecture}'] is supported")

    def _error(self, name: str, what: str) -> ConfigError:
        return ConfigError(f"config.json of model_type {self.model_type!r}: field {name!r} {what}")
