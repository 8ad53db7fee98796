"""PEFT's adapters in a loop of one's own: starts that take data, and those that change the base.

What PiSSA, OLoRA and LoRA-GA start from is kept beside the model, so that what is saved is for the untouched base.
"""

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from mswift.errors import ConfigError
from mswift.tuners.peft_config import CONFIG_FILE
from mswift.tuners.settings import FROM_DATA

Batches = Sequence[Mapping[str, Tensor]]
"""Of each what the model takes, `labels` among them."""
UNPREPARED = ("corda", "loftq")
"""Values of init_lora_weights whose preparation is not made here."""


def check_start(fields: Mapping[str, Any], batches: Batches | None) -> None:
    """ConfigError for a start that would silently be another one."""
    init = fields.get("init_lora_weights")
    if init in UNPREPARED:
        raise ConfigError(
            f"init_lora_weights={init!r} is plain LoRA without a pass over data before, which PEFT's own preparation "
            "makes: use eva, lora_ga, pissa or olora"
        )
    if init in FROM_DATA and not batches:
        raise ConfigError(
            f"init_lora_weights={init!r} starts from data, and is plain LoRA without: give prepare_model some batches"
        )
    if batches and init not in FROM_DATA:
        raise ConfigError(f"batches have no effect with init_lora_weights={init!r}: use eva or lora_ga")


def gradients_before(model: nn.Module, config: Any, batches: Batches | None) -> None:
    """LoRA-GA: PEFT's estimate of the gradients of the linears, the mean over the batches, which the adapter takes."""
    if getattr(config, "init_lora_weights", None) != "lora_ga":
        return
    from peft import LoraGAConfig
    from peft.tuners.lora import preprocess_loraga

    if config.lora_ga_config is None:
        config.lora_ga_config = LoraGAConfig()

    def passes() -> None:
        for batch in batches or ():
            model(**batch).loss.backward()

    preprocess_loraga(model, config, passes)


def inputs_behind(peft: Any, config: Any, batches: Batches | None, name: str) -> None:
    """EVA: PEFT's directions of what the linears are given."""
    if getattr(config, "init_lora_weights", None) == "eva":
        from peft import initialize_lora_eva_weights

        initialize_lora_eva_weights(peft, list(batches or ()), adapter_name=name, show_progress_bar=False)


class Initial:
    """How an adapter began that took its start off the base: a directory of its own, gone with this."""

    def __init__(self, peft: Any, name: str) -> None:
        self._folder = TemporaryDirectory(prefix="mswift-start-")
        self.path = Path(self._folder.name)
        write(peft, self.path, name)


def changes_base(config: Any) -> bool:
    """Whether the start of an adapter is taken off the weights of the base."""
    init = getattr(config, "init_lora_weights", True)
    return isinstance(init, str) and (init.startswith("pissa") or init in ("olora", "lora_ga"))


def write(peft: Any, folder: Path, name: str, initial: Initial | None = None) -> None:
    """One adapter as a PEFT directory; with `initial` as the plain LoRA of twice the rank that it is."""
    options = {} if initial is None else {"path_initial_model_for_weight_conversion": str(initial.path)}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # that the base's config.json is not at hand
        peft.save_pretrained(folder, selected_adapters=[name], **options)
    nested = folder / name
    for file in nested.iterdir() if nested.is_dir() else ():
        file.rename(folder / file.name)
    if nested.is_dir():
        nested.rmdir()
    if initial is not None:
        _forget_start(folder / CONFIG_FILE)


def _forget_start(file: Path) -> None:
    """A plain LoRA has no gradients to start from; PEFT leaves their settings there."""
    content = json.loads(file.read_text(encoding="utf-8"))
    content["lora_ga_config"] = None
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
