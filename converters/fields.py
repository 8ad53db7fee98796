"""Strict reading of a config.json: a field is mapped, known to have no effect, or refused by name."""

import difflib
from collections.abc import Collection, Mapping
from typing import Any

from mswift.converters.spec import RopeSpec
from mswift.converters.without_effect import HARMLESS_AT, WITHOUT_EFFECT
from mswift.errors import ConfigError

_LARGEST = 1 << 40

_ROPE_KEYS: Mapping[str, tuple[set[str], set[str]]] = {
    "default": (set(), set()),
    "linear": ({"factor"}, set()),
    "dynamic": ({"factor"}, set()),
    "llama3": ({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}, set()),
    "yarn": (
        {"factor", "original_max_position_embeddings"},
        {"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"},
    ),
    "longrope": (
        {"short_factor", "long_factor", "original_max_position_embeddings"},
        {"factor", "attention_factor"},
    ),
}
"""Keys that a kind of rope must and may have."""


class Fields:
    """The fields of one config.json; remembers which were read, so that `finish` refuses the rest."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._config = config
        self._read: set[str] = set()
        self._last = ""
        self.model_type = str(config.get("model_type"))

    def take(self, name: str, default: Any = None) -> Any:
        """The raw value; null counts as absent."""
        self._read.add(name)
        self._last = name
        value = self._config.get(name)
        return default if value is None else value

    def integer(self, name: str, default: int | None = None) -> int:
        """A positive integer; ConfigError if it is absent without a default, or anything else."""
        value = self.take(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self._error(name, f"must be a positive integer, not {value!r:.100}")
        if value >= _LARGEST:
            raise self._error(name, f"must be a positive integer below 2^40, not {value!r:.100}")
        return value

    def count(self, name: str, default: int) -> int:
        """An integer from 0."""
        value = self.take(name, default)
        return 0 if value == 0 and not isinstance(value, bool) else self.integer(name, default)

    def even_half(self, name: str) -> int:
        """Half of an even integer (a width that a config counts for gate and up together)."""
        value = self.integer(name)
        if value % 2:
            raise self._error(name, f"must be even, not {value}")
        return value // 2

    def number(self, name: str, default: float | None = None) -> float:
        """A positive number; ConfigError if it is absent without a default, or anything else."""
        value = self.take(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise self._error(name, f"must be a positive number, not {value!r:.100}")
        return float(value)

    def check(self, name: str, value: Any, supported: Collection[Any]) -> None:
        """Refuses a value of the field, or an entry of its list, that is not among the supported ones."""
        if value not in supported:
            raise self._error(name, f"holds {value!r}; supported: {', '.join(map(str, supported))}")

    def limits(self, name: str, default: tuple[float, float]) -> tuple[float, float]:
        """Two numbers, the lower one first; infinity as Python's json writes it or as transformers 5 does."""
        value = self.take(name, default)
        ends = [float("inf") if end == {"__float__": "Infinity"} else end for end in value]
        numbers = [end for end in ends if isinstance(end, int | float) and not isinstance(end, bool)]
        if len(numbers) != 2 or len(ends) != 2 or not numbers[0] <= numbers[1]:
            raise self._error(name, f"must be two numbers, the lower one first, not {value!r}")
        return float(numbers[0]), float(numbers[1])

    def optional_number(self, name: str, default: float | None = None) -> float | None:
        """A positive number or null, which turns off what an absent field leaves at its default."""
        if name in self._config and self._config[name] is None:
            self._read.add(name)
            return None
        return default if name not in self._config and default is None else self.number(name, default)

    def optional_integer(self, name: str, default: int) -> int | None:
        """A positive integer or null, which turns off what an absent field leaves at its default."""
        if name in self._config and self._config[name] is None:
            self._read.add(name)
            return None
        return self.integer(name, default)

    def fraction(self, name: str, default: float) -> float:
        """A number from 0 up to, not including, 1."""
        value = self.take(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
            raise self._error(name, f"must be a number from 0 to below 1, not {value!r}")
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

    def one_of(self, name: str, supported: Collection[Any]) -> Any:
        """The value, which must be one of those; the first one if the field is absent."""
        value = self.take(name, next(iter(supported)))
        if value not in supported:
            raise self._error(name, f"is {value!r}; supported: {', '.join(map(repr, supported))}")
        return value

    def rope(
        self,
        head_dim: int,
        *,
        partial: float | None = None,
        interleaved: bool = False,
        default_theta: float = 10000.0,
    ) -> RopeSpec:
        """Rotary embedding from `rope_theta` + `rope_scaling`, or from `rope_parameters` (transformers 5).

        partial: the family's default of partial_rotary_factor, the share of a head's dimensions that is rotated
        (None: the family rotates whole heads and has no such field).
        """
        name = "rope_parameters" if self._config.get("rope_parameters") else "rope_scaling"
        values = dict(self.take("rope_parameters") or {}) or dict(self.take("rope_scaling") or {})
        self._read.update({"rope_parameters", "rope_scaling"})
        self._check_rope_spellings()
        theta = self.number("rope_theta", values.get("rope_theta", default_theta))
        share = self.number("partial_rotary_factor", values.get("partial_rotary_factor", partial or 1.0))
        if partial is None and share != 1.0:
            raise self._error("partial_rotary_factor", f"is {share}; only 1.0 is supported")
        for field, value in (("rope_theta", theta), ("partial_rotary_factor", share)):
            if values.get(field, value) != value:
                raise self._error(field, f"is {value}, but {name} has {values[field]}")
        dim = None if share == 1.0 else int(head_dim * share)
        return self.rope_of(values, name, theta=theta, rotary_dim=dim, interleaved=interleaved, rotated=dim or head_dim)

    def has_read(self, name: str) -> bool:
        """Whether somebody asked for the field."""
        return name in self._read

    def _check_rope_spellings(self) -> None:
        given = (self._config.get(name) for name in ("rope_parameters", "rope_scaling"))
        both = [each for each in given if isinstance(each, dict) and each]
        if len(both) == 2:
            aside = ("rope_theta", "partial_rotary_factor", "type", "rope_type")
            kinds = [each.get("rope_type", each.get("type", "default")) for each in both]
            rest = [{k: v for k, v in each.items() if k not in aside} for each in both]
            if kinds[0] != kinds[1] or rest[0] != rest[1]:
                raise self._error("rope_scaling", "and 'rope_parameters' differ; leave one of them out")

    def rope_of(
        self,
        given: Mapping[str, Any],
        name: str,
        *,
        theta: float,
        rotary_dim: int | None = None,
        interleaved: bool = False,
        rotated: int | None = None,
    ) -> RopeSpec:
        """One rotary embedding from the keys of the dictionary in field `name`; `rotated`: dimensions it has."""
        values = {k: v for k, v in given.items() if k not in ("rope_theta", "partial_rotary_factor", "type")}
        named = values.pop("rope_type", given.get("type", "default"))
        kind: Any = "longrope" if named == "su" else named  # its name before it was published
        if kind not in _ROPE_KEYS:
            raise self._error(f"{name}.rope_type", f"is {kind!r}; supported: {', '.join(_ROPE_KEYS)}")
        needed, optional = _ROPE_KEYS[kind]
        if "original_max_position_embeddings" in needed:
            inside = values.get("original_max_position_embeddings")
            known = self.take("original_max_position_embeddings", inside)
            if inside is not None and known != inside:
                raise self._error("original_max_position_embeddings", f"is {known}, but {name} has {inside}")
            values["original_max_position_embeddings"] = known or self.integer("max_position_embeddings")
        values = {key: value for key, value in values.items() if value is not None or key in needed}
        unknown, missing = sorted(set(values) - needed - optional), sorted(needed - set(values))
        if unknown or missing:
            what = f"unknown {unknown}" if unknown else f"lacks {missing}"
            raise self._error(name, f"of type {kind!r}: {what}")
        for key in ("short_factor", "long_factor"):
            if key in values:
                values[key] = tuple(values[key])
        truncate = values.pop("truncate", True)
        flat = [n for v in values.values() for n in (v if isinstance(v, tuple) else (v,))]
        if not all(isinstance(n, int | float) and not isinstance(n, bool) and n > 0 for n in flat):
            raise self._error(name, f"must hold positive numbers, not {values}")
        if kind == "longrope" and "factor" not in values:
            stretched = self.integer("max_position_embeddings")
            values["factor"] = stretched / values["original_max_position_embeddings"]
        if kind == "dynamic":
            values["original_max_position_embeddings"] = self.integer("max_position_embeddings")
        for key in ("short_factor", "long_factor"):
            if key in values and rotated is not None and len(values[key]) != rotated // 2:
                raise self._error(f"{name}.{key}", f"has {len(values[key])} numbers; {rotated // 2} are needed")
        return RopeSpec(theta, kind, rotary_dim=rotary_dim, interleaved=interleaved, truncate=bool(truncate), **values)

    def finish(self, architecture: str) -> None:
        """Refuses fields that nobody read, and other heads than the causal language model."""
        for name, value in self._config.items():
            if name in self._read or name in WITHOUT_EFFECT:
                continue
            if name in HARMLESS_AT:
                if value not in HARMLESS_AT[name]:
                    raise self._error(name, f"is {value!r}; only {HARMLESS_AT[name][0]!r} is supported")
            else:
                near = difflib.get_close_matches(name, [*self._read, *WITHOUT_EFFECT], 1)
                hint = f" (did you mean {near[0]!r}?)" if near else ""
                raise self._error(
                    name,
                    f"is not known to have no effect on the model{hint}; if it has none, mswift convert "
                    f"--ignore_config_fields {name} leaves it aside",
                )
        heads = self._config.get("architectures")
        if heads is not None and heads != [architecture]:
            raise self._error("architectures", f"is {heads}; only ['{architecture}'] is supported")

    def refused(self, name: str, what: str) -> ConfigError:
        """The error that names the field; to be raised by who reads fields together."""
        return self._error(name, what)

    def wrong_kind(self, error: Exception) -> ConfigError:
        """The error for a value that is no number, list or object where one is needed; names the field read last."""
        what = f"or one read before it, has a value of the wrong kind ({type(error).__name__}: {error})"
        return self._error(self._last, what)

    def _error(self, name: str, what: str) -> ConfigError:
        return ConfigError(f"config.json of model_type {self.model_type!r}: field {name!r} {what}")
