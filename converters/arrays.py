"""Whole models as numpy arrays, moved between Hugging Face space and Megatron space by the family's table."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided

from mswift.converters.layout import Piece
from mswift.converters.plan import ModelTable

Arrays = dict[str, np.ndarray[Any, Any]]


def to_megatron(hf: Mapping[str, np.ndarray[Any, Any]], table: ModelTable) -> Arrays:
    """Every Megatron tensor of the table from the tensors of the HF model."""
    some = next(iter(hf.values()))
    out: Arrays = {key: np.zeros(tensor.shape, some.dtype) for key, tensor in table.megatron.items()}
    for key in table.megatron:
        for piece in table.pieces(key):
            _view(out[key], piece, 1)[...] = _view(hf[piece.names[0]], piece, 0)
    return out


def to_hf(megatron: Mapping[str, np.ndarray[Any, Any]], table: ModelTable) -> Arrays:
    """The inverse of `to_megatron`, of the tensors that are there."""
    some = next(iter(megatron.values()))
    out: Arrays = {}
    for key in megatron:
        for piece in table.pieces(key):
            out.setdefault(piece.names[0], np.zeros(table.hf[piece.names[0]], some.dtype))
            _view(out[piece.names[0]], piece, 0)[...] = _view(megatron[key], piece, 1)
    return out


def _view(array: np.ndarray[Any, Any], piece: Piece, side: int) -> np.ndarray[Any, Any]:
    start = array[tuple(slice(i, None) for i in piece.starts[side])]
    strides = [array.strides[dim.axis[side]] * dim.step[side] for dim in piece.dims]
    return as_strided(start, [dim.size for dim in piece.dims], strides)
