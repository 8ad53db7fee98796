"""Adapters of prompt learning beside a model that answers: virtual tokens before every prompt that asks for them.

Nothing of the model changes: vectors stand for token ids below 0, of which each adapter has its own; keys and values of
a prefix begin the cache. Shapes: B rows, n virtual tokens, S tokens, h hidden.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mswift.converters.plan import table_for
from mswift.errors import ConfigError
from mswift.tuners.method_adapter import OtherAdapter
from mswift.tuners.peft_config import check_adapter_dir
from mswift.tuners.prompt_config import check_fits, prompt_config
from mswift.tuners.prompt_modules import PromptEmbeddings, split_prefix
from mswift.tuners.prompts import EMBEDDINGS, PromptConfig, is_prompt


@dataclass(frozen=True)
class Front:
    """What stands before a prompt. ids: of virtual tokens; prefix: keys and values of each layer, [L, 2, g, n, d]."""

    ids: tuple[int, ...] = ()
    prefix: Tensor | None = None

    @property
    def length(self) -> int:
        """Positions that it takes."""
        return len(self.ids) if self.prefix is None else self.prefix.shape[3]

    def mask(self, rows: int, device: torch.device) -> Tensor:
        """int64 [B, n], ones: of the positions in the cache that `fill` made."""
        return torch.ones(rows, 0 if self.prefix is None else self.length, dtype=torch.long, device=device)

    def fill(self, cache: Any, rows: int) -> None:
        """Put a prefix into an empty cache, for each row."""
        for layer, (keys, values) in enumerate(self.prefix if self.prefix is not None else ()):
            cache.update(*(x.expand(rows, -1, -1, -1).contiguous() for x in (keys, values)), layer)


NOTHING = Front()
"""Of a request without such an adapter."""


class Fronts:
    """Those of a model's adapters (name -> directory) that are of prompt learning.

    Raises ConfigError and CheckpointError for one of another model.
    """

    def __init__(self, model: PreTrainedModel, adapters: Mapping[str, Path]) -> None:
        self._found: dict[str, Front] = {}
        vectors: list[Tensor] = []
        for name, path in adapters.items():
            if not is_prompt(check_adapter_dir(path)):
                continue
            config, made = _read(model, path)
            if config.kind == "prefix":
                heads, width = config.num_heads, config.width // config.num_heads
                split = split_prefix(made, config.num_layers, heads, width)
                self._found[name] = Front(prefix=split.to(model.device, model.dtype))
                continue
            first = sum(map(len, vectors))
            self._found[name] = Front(tuple(-1 - first - number for number in range(len(made))))
            vectors.append(made.to(model.device))
        if vectors:
            table = torch.cat(vectors)
            embedding: Any = model.get_input_embeddings()
            PromptEmbeddings(lambda: table).attach(embedding)

    def __contains__(self, name: str) -> bool:
        return name in self._found

    def of(self, adapter: str | None) -> Front:
        """That of a request."""
        return self._found.get(adapter or "", NOTHING)


def _read(model: PreTrainedModel, path: Path) -> tuple[PromptConfig, Tensor]:
    """(adapter, its tensor fp32) that fit the model."""
    table = table_for(model.config.to_dict())
    adapter = OtherAdapter(path, table.spec.num_layers)
    config = adapter.config
    assert isinstance(config, PromptConfig)
    fitting = prompt_config(table, config.kind, {})
    check_fits(config, fitting, path)
    if config.num_heads != fitting.num_heads and config.kind == "prefix":
        raise ConfigError(
            f"--adapters {path}: keys of {config.num_heads} heads, the model has {fitting.num_heads}: give the base "
            "model that it was trained on"
        )
    adapter.check(config.file_shapes(table, ()))
    return config, adapter.tensor(EMBEDDINGS).float()
