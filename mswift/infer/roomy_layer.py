"""A layer of transformers' DynamicCache with room at its end: a new token is written there, and nothing is copied."""

# Shapes: B rows, H heads, T tokens, S new tokens, C tokens that there is room for, D dim.

from typing import Any

import torch
from transformers.cache_utils import DynamicLayer

ROOM = 64
"""Tokens of room behind the cached ones; after so many the layer is copied once."""


class RoomyLayer(DynamicLayer):
    """`keys` and `values` are the first T tokens of longer tensors, until somebody puts others in their place."""

    def __init__(self) -> None:
        super().__init__()
        self._spaces: tuple[torch.Tensor, torch.Tensor] | None = None  # [B, H, C, D]
        self._views: tuple[Any, Any] = (None, None)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append [B, H, S, D]; returns all, [B, H, T + S, D]."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        old = self.get_seq_length()
        new = old + key_states.shape[-2]
        mine = self.keys is self._views[0] and self.values is self._views[1]
        if self._spaces is None or not mine or self._spaces[0].shape[-2] < new:
            self._spaces = (_space(key_states, new + ROOM), _space(value_states, new + ROOM))
            if self.keys is not None and self.values is not None and old:
                self._spaces[0][..., :old, :] = self.keys
                self._spaces[1][..., :old, :] = self.values
        keys, values = self._spaces
        keys[..., old:new, :] = key_states
        values[..., old:new, :] = value_states
        self._views = self.keys, self.values = keys[..., :new, :], values[..., :new, :]
        return self.keys, self.values


def _space(states: torch.Tensor, length: int) -> torch.Tensor:
    """Memory for `length` tokens like `states`."""
    return states.new_empty((*states.shape[:-2], length, states.shape[-1]))
