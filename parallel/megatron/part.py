"""Full tuning of a part of a Megatron model: which parameters stay as they are, and where the others' state lies.

A parameter here may be several of the model's (q, k and v; gate and up), which then stay or learn together. A global
tensor may be trained in a part of it (some layers), so optimizer state goes by the model's own names:
`of.<HF name>`, as on transformers' model.
"""

from collections.abc import Sequence
from math import prod

import torch
from torch import nn

from mswift.converters.layout import Piece
from mswift.converters.plan import ModelTable
from mswift.errors import ConfigError
from mswift.parallel.fsdp.model import empty_model
from mswift.parallel.fsdp.pieces import name_in_files
from mswift.parallel.mapped import Mapped
from mswift.parallel.megatron import placement
from mswift.parallel.megatron.placement import Placed
from mswift.refusals.engine import check_part
from mswift.tuners.part import Part, joined, refuse_torn

_Place = tuple[str, tuple[int, ...]]
"""Key of a global tensor, and the number of the layer where it holds all layers."""


class TrainedPart:
    """What of a model is trained. ConfigError for names that it does not have, or of which Megatron makes one tensor.

    All ranks of a job are told the same.
    """

    def __init__(self, part: Part, table: ModelTable) -> None:
        check_part(table.spec)
        names = _model_order(table) if part.ratio else table.hf_order
        self._table, self._frozen = table, part.frozen({name: prod(table.hf[name]) for name in names})
        refuse_torn(self._frozen, joined(table))
        self._sources: dict[_Place, list[Piece]] = {}
        for pieces in table.hf_pieces.values():
            for piece in pieces:
                self._sources.setdefault(self._place(piece.names[1], piece.starts[1]), []).append(piece.inverse())

    def freeze(self, base: Sequence[Placed]) -> None:
        """Of these parameters what is not trained."""
        for placed in base:
            if isinstance(placed.parameter, nn.Parameter) and all(
                piece.names[1] in self._frozen
                for part in placed.parts
                for piece in self._sources[self._place(part.key, part.region.offsets)]
            ):
                placed.parameter.requires_grad_(False)

    def by_names(self, part: placement.Part) -> Mapped:
        """The global tensor of a part of a parameter as one whose boxes are those of the model's own tensors."""
        maps = [
            Piece((part.key, f"of.{piece.names[1]}"), piece.starts, piece.dims)
            for piece in self._sources[self._place(part.key, part.region.offsets)]
        ]
        return Mapped(
            part.key, part.shape, tuple(maps), {f"of.{name}": shape for name, shape in self._table.hf.items()}
        )

    def _place(self, key: str, offsets: Sequence[int]) -> _Place:
        return key, tuple(offsets[: self._table.megatron[key].num_lead_axes])


def _model_order(table: ModelTable) -> list[str]:
    """Names of the parameters as transformers' model orders them: --freeze_parameters_ratio freezes the first."""
    try:
        model = empty_model(table, torch.float32)
    except ConfigError as error:
        raise ConfigError(
            f"--freeze_parameters_ratio goes by the order of transformers' model, which cannot be made here ({error}): "
            "name what stays with --freeze_parameters"
        ) from error
    names = [name_in_files(name, table) for name, _ in model.named_parameters()]
    assert {*names} == table.hf.keys(), {*names} ^ table.hf.keys()
    return names
