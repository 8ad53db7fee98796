"""Key-value caches of transformers whose rows come and go: joined, picked and trimmed between forward passes.

Rows are aligned at their last token; what stands before a shorter row is padding that the attention mask hides.
"""

# Shapes: B rows, H heads, T tokens of the longest row, K kept tokens (T; in a sliding layer min(T, window - 1)), D dim.

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
)

from mswift.errors import ConfigError
from mswift.infer.roomy_layer import RoomyLayer

_KNOWN = (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
)


def new_cache(model: PreTrainedModel) -> DynamicCache:
    """An empty cache for the layers of a model. ConfigError for layers whose rows cannot be joined here."""
    supported: Any = model._supports_default_dynamic_cache
    if not supported():
        raise ConfigError(
            f"--model of type {model.config.model_type}: transformers keeps its state in a form of its own, and this "
            "engine serves only those of its DynamicCache; try --infer_backend vllm"
        )
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    unknown = sorted({type(layer).__name__ for layer in cache.layers if type(layer) not in _KNOWN})
    if unknown:
        raise ConfigError(
            f"--model of type {model.config.model_type}: its cache has layers of {', '.join(unknown)}, which this "
            "engine cannot batch; try --infer_backend vllm"
        )
    cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def join(cache: DynamicCache, other: DynamicCache, length: int, other_length: int) -> None:
    """Append the rows of `other` to `cache`; the lengths are those of their longest rows, in tokens."""
    longest = max(length, other_length)
    layer: Any
    added: Any
    for layer, added in zip(cache.layers, other.layers, strict=True):
        if isinstance(layer, RoomyLayer):
            layer.join(added)
        elif hasattr(layer, "keys") and layer.is_initialized:
            kept = max(layer.keys.shape[-2], added.keys.shape[-2])
            layer.keys = torch.cat([_pad(layer.keys, kept), _pad(added.keys, kept)])  # [B, H, K, D]
            layer.values = torch.cat([_pad(layer.values, kept), _pad(added.values, kept)])
            if isinstance(layer, DynamicSlidingWindowLayer):
                layer.cumulative_length = longest
        if isinstance(layer, LinearAttentionLayer):
            for states, more in (
                (layer.conv_states, added.conv_states),
                (layer.recurrent_states, added.recurrent_states),
            ):
                for index, state in states.items():
                    if state is not None:
                        states[index] = torch.cat([state, more[index]])


def _pad(states: torch.Tensor, length: int) -> torch.Tensor:
    """[B, H, K, D] with zeros before, up to `length` tokens."""
    return F.pad(states, (0, 0, length - states.shape[-2], 0))


def pick(cache: DynamicCache, rows: torch.Tensor) -> None:
    """Copies of the rows of these indices (int64), in this order; one may come several times."""
    cache.reorder_cache(rows)  # type: ignore[arg-type]


def keep(cache: DynamicCache, rows: Sequence[int], device: torch.device) -> list[int]:
    """Keep these rows, of which there are fewer than before; returns them in their new order.

    The last ones come in the places of those that go, so that the others need not be copied.
    """
    stay = {row for row in rows if row < len(rows)}
    movers = [row for row in rows if row >= len(rows)]
    order = [place if place in stay else movers.pop() for place in range(len(rows))]
    indices = torch.tensor(order, device=device)
    layer: Any
    for layer in cache.layers:
        if isinstance(layer, RoomyLayer):
            layer.keep(order)
        else:
            layer.reorder_cache(indices)
    return order


def trim(cache: DynamicCache, length: int) -> None:
    """Cut off what is padding in every row; `length`: tokens of the longest row that is left."""
    layer: Any
    for layer in cache.layers:
        if isinstance(layer, RoomyLayer):
            layer.trim(length)
            continue
        if not hasattr(layer, "keys") or not layer.is_initialized:
            continue
        kept = length
        if isinstance(layer, DynamicSlidingWindowLayer):
            layer.cumulative_length = length
            kept = min(length, layer.sliding_window - 1)
        start = layer.keys.shape[-2] - kept
        layer.keys, layer.values = layer.keys[..., start:, :], layer.values[..., start:, :]
