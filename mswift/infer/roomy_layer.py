"""A layer of transformers' DynamicCache with room for tokens behind and rows below: what comes is written there.

Nothing else is copied when a token is added, a row comes, or a row goes.
"""

# Shapes: B rows, H heads, T tokens, S new tokens, R rows and C tokens that there is room for, D dim.

from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import DynamicLayer

ROOM = 64
"""Tokens of room behind the cached ones, and before them where longer rows come; then the layer is copied once."""
ROWS = 8
"""Rows come in rooms of so many; when one is full the layer is copied once."""


class RoomyLayer(DynamicLayer):
    """`keys` and `values` are a part of larger tensors, until somebody puts others in their place."""

    def __init__(self) -> None:
        super().__init__()
        self._spaces: tuple[torch.Tensor, torch.Tensor] | None = None  # [R, H, C, D]
        self._start = self._end = 0  # the tokens of the views among C
        self._views: tuple[Any, Any] = (None, None)  # [B, H, T, D]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append [B, H, S, D]; returns all, [B, H, T + S, D]."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        rows, _, new, _ = key_states.shape
        spaces = self._room_for((key_states, value_states), rows, behind=new)
        end = self._end + new
        for space, states in zip(spaces, (key_states, value_states), strict=True):
            space[:rows, :, self._end : end] = states
        return self._show(rows, self._start, end)

    def join(self, other: DynamicLayer) -> None:
        """Append the rows of `other`; all end at their last token, and zeros stand before the shorter ones."""
        assert other.keys is not None
        assert other.values is not None
        states = (other.keys, other.values)
        more, _, length, _ = other.keys.shape
        rows = self._num_rows
        before = max(length - self.get_seq_length(), 0)
        spaces = self._room_for(states, rows + more, before=before)
        start, end = self._start - before, self._end
        for space, added in zip(spaces, states, strict=True):
            space[:rows, :, start : self._start] = 0
            space[rows : rows + more, :, start : end - length] = 0
            space[rows : rows + more, :, end - length : end] = added
        self._show(rows + more, start, end)

    def keep(self, rows: Sequence[int]) -> None:
        """Row `rows[i]` becomes row i: the same one, or one behind all that are kept."""
        spaces = self._own_spaces()
        for place, row in enumerate(rows):
            if row == place:
                continue
            assert row >= len(rows), "it would be written over"
            for space in spaces:
                space[place, :, self._start : self._end] = space[row, :, self._start : self._end]
        self._show(len(rows), self._start, self._end)

    def trim(self, length: int) -> None:
        """Forget all but the last tokens of every row."""
        self._own_spaces()
        self._show(self._num_rows, self._end - length, self._end)

    @property
    def _num_rows(self) -> int:
        assert self.keys is not None
        return self.keys.shape[0]

    def _own_spaces(self) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.keys is not None
        assert self.values is not None
        return self._room_for((self.keys, self.values), self._num_rows)

    def _room_for(
        self, like: tuple[torch.Tensor, torch.Tensor], rows: int, before: int = 0, behind: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Spaces that hold the layer and have room for so many rows, and tokens before and behind (like `like`)."""
        mine = self.keys is self._views[0] and self.values is self._views[1]
        if (
            self._spaces is not None
            and mine
            and rows <= self._spaces[0].shape[0]
            and before <= self._start
            and self._end + behind <= self._spaces[0].shape[-2]
        ):
            return self._spaces
        length = self.get_seq_length()
        old = (self.keys, self.values) if length else None
        if old is not None and rows > self._num_rows:
            rows = -(-rows // ROWS) * ROWS
        if before:
            before += ROOM
        room = before + length + max(behind, 1) + ROOM - 1
        spaces = (_space(like[0], rows, room), _space(like[1], rows, room))
        for space, states in zip(spaces, old or (), strict=False):
            if states is not None:
                space[: states.shape[0], :, before : before + length] = states
        self._spaces, self._start, self._end = spaces, before, before + length
        if old is not None:
            self._show(self._num_rows, self._start, self._end)
        return spaces

    def _show(self, rows: int, start: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Let the layer be this part of its spaces."""
        assert self._spaces is not None
        self._start, self._end = start, end
        keys, values = (space[:rows, :, start:end] for space in self._spaces)
        self._views = self.keys, self.values = keys, values
        return keys, values


def _space(states: torch.Tensor, rows: int, length: int) -> torch.Tensor:
    """Memory for so many rows and tokens like `states`."""
    return states.new_empty((rows, states.shape[1], length, states.shape[-1]))
