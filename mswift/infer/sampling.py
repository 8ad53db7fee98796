"""The sampling of a command: its flags first, then the model's generation_config.json. Torch-free."""

import json
import sys
from pathlib import Path
from typing import Any, Protocol

from mswift.errors import ConfigError
from mswift.infer.request import Sampling

_DRAWN = ("top_p", "top_k", "min_p")
_NOT_FOLLOWED = (
    "no_repeat_ngram_size", "bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "forced_bos_token_id",
    "forced_eos_token_id", "sequence_bias", "typical_p", "epsilon_cutoff", "eta_cutoff", "encoder_repetition_penalty",
    "exponential_decay_length_penalty", "guidance_scale", "num_beams",
)  # fmt: skip
_NEUTRAL: tuple[Any, ...] = (None, 0, 1, 1.0, 0.0, [], {})


class SamplingFlags(Protocol):
    """The options of a command that samples (mswift.config.infer)."""

    @property
    def model(self) -> str: ...
    @property
    def max_new_tokens(self) -> int: ...
    @property
    def temperature(self) -> float | None: ...
    @property
    def top_p(self) -> float | None: ...
    @property
    def top_k(self) -> int | None: ...
    @property
    def min_p(self) -> float | None: ...
    @property
    def repetition_penalty(self) -> float | None: ...
    @property
    def stop(self) -> tuple[str, ...]: ...
    @property
    def seed(self) -> int: ...


def chosen_sampling(flags: SamplingFlags) -> Sampling:
    """Flags first, then the model's defaults. ConfigError for flags that would have no effect."""
    own = default_sampling(Path(flags.model))
    temperature = flags.temperature if flags.temperature is not None else own.temperature
    for name in _DRAWN:
        if getattr(flags, name) is not None and temperature == 0:
            raise ConfigError(f"--{name} {getattr(flags, name)} has no effect on greedy answers; add --temperature 1")
    given = {name: getattr(flags, name) for name in (*_DRAWN, "repetition_penalty")}
    chosen = {name: getattr(own, name) if value is None else value for name, value in given.items()}
    return Sampling(
        max_new_tokens=flags.max_new_tokens, temperature=temperature, seed=flags.seed, stop=flags.stop, **chosen
    )


def default_sampling(model_dir: Path) -> Sampling:
    """What generation_config.json asks for; a model that does not ask for sampling is greedy.

    Says on stderr which of its wishes no engine here follows.
    """
    path = model_dir / "generation_config.json"
    try:
        fields: Any = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise ConfigError(f"{path}: not JSON ({error})") from None
    if not isinstance(fields, dict):
        raise ConfigError(f"{path}: it holds no JSON object")
    ignored = [name for name in _NOT_FOLLOWED if fields.get(name) not in _NEUTRAL]
    if ignored:
        print(f"{path}: {', '.join(ignored)} not followed", file=sys.stderr)
    wishes: dict[str, Any] = {"repetition_penalty": float(fields.get("repetition_penalty") or 1.0)}
    if fields.get("do_sample"):
        wishes["temperature"] = float(1.0 if fields.get("temperature") is None else fields["temperature"])
        wishes["top_p"] = float(1.0 if fields.get("top_p") is None else fields["top_p"])
        wishes["top_k"] = int(fields.get("top_k") or 0)
        wishes["min_p"] = float(fields.get("min_p") or 0.0)
    return Sampling(**wishes)
