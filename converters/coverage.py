"""The proof that a table moves every element exactly once, before any byte moves: on boxes, never on elements."""

from collections.abc import Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING

from mswift.converters.layout import Piece, tiling_fault
from mswift.errors import CheckpointError

if TYPE_CHECKING:
    from mswift.converters.megatron_tensor import MegatronTensor
    from mswift.converters.plan import ModelTable


def prove_coverage(table: "ModelTable") -> None:
    """CheckpointError unless the rules consume every HF element and write every Megatron element once.

    Where experts have a tensor each, the first one's elements are, and the others are moved alike: 45,000 of the
    46,000 tensors of DeepSeek-V3 cost one comparison each. Tensors of layers that are moved alike are proved once.
    """
    covering: tuple[dict[str, list[Piece]], dict[str, list[Piece]]] = ({}, {})
    shapes: tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]
    shapes = ({name: shape for name, shape in table.hf.items() if table.expert_of[name] < 1}, {})
    for key, tensor in table.megatron.items():
        pieces, shapes[1][key] = table.pieces(key), tensor.shape
        if tensor.rule.experts == "each":
            axis = tensor.num_lead_axes - 1
            shapes[1][key] = (*tensor.shape[:axis], 1, *tensor.shape[axis + 1 :])
            pieces = _of_first_expert(table, tensor, pieces)
        for piece in pieces:
            for side in (0, 1):
                covering[side].setdefault(piece.names[side], []).append(piece)
    proved = set()
    for side, what in ((0, "Hugging Face"), (1, "Megatron")):
        for name, shape in shapes[side].items():
            mine = covering[side].get(name, [])
            alike = (shape, tuple(piece.footprint(side) for piece in mine))
            if alike not in proved:
                fault = tiling_fault([box for piece in mine for box in piece.boxes(side)], shape)
                if fault is not None:
                    raise _not_once(table, what, name, shape, fault)
                proved.add(alike)


def _of_first_expert(table: "ModelTable", tensor: "MegatronTensor", pieces: Sequence[Piece]) -> list[Piece]:
    """The maps of expert 0; CheckpointError unless every other expert has the same, further on the expert axis."""
    axis, count = tensor.num_lead_axes - 1, table.sizes["experts"]
    of_expert: list[list[Piece]] = [[] for _ in range(count)]
    for piece in pieces:
        of_expert[table.expert_of[piece.names[0]]].append(piece)
    for expert in range(1, count):
        for first, piece in zip_longest(of_expert[0], of_expert[expert]):
            if first is None or piece is None or not _is_moved(first, piece, axis, expert):
                name, fault = (piece or first).names[0], f"expert {expert} is moved otherwise than expert 0"
                raise _not_once(table, "Hugging Face", name, table.hf[name], fault)
    names = {piece.names[0] for piece in pieces}
    if len(names) != count * len({piece.names[0] for piece in of_expert[0]}):
        raise _not_once(table, "Megatron", tensor.key, tensor.shape, f"{count} experts come from {len(names)} tensors")
    return of_expert[0]


def _is_moved(first: Piece, piece: Piece, axis: int, by: int) -> bool:
    """Whether a piece is the first expert's, for the expert that is `by` further on that axis on Megatron's side."""
    start = first.starts[1]
    moved = (*start[:axis], start[axis] + by, *start[axis + 1 :])
    return piece.dims == first.dims and piece.starts == (first.starts[0], moved) and piece.names[1] == first.names[1]


def _not_once(table: "ModelTable", what: str, name: str, shape: Sequence[int], fault: str) -> CheckpointError:
    return CheckpointError(
        f"the table of {table.family.model_type} does not move {what} tensor {name} of shape {list(shape)} "
        f"exactly once: {fault}"
    )
