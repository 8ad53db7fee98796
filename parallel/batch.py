"""Microbatches, and what one context-parallel rank computes of them: padded, cut, at any layout.

Padding is added here, at run time: which tokens form a step does not depend on the layout. Shapes: b rows, s positions
of a row as it comes, S positions after padding of what is computed as one row, n context-parallel ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from mswift.errors import LayoutError
from mswift.parallel.attention.share import Share, natural_rows, rows_in_order
from mswift.topology import ParallelDims


@dataclass(frozen=True)
class Microbatch:
    """`labels` are shifted already: labels[:, t] is the target of position t. Any device.

    tokens, labels: int64 [b, s]; loss_weights: float32 [b, s], 0 where there is nothing to learn. documents: None, a
    row is one sequence; else the lengths of what is packed in the rows, row by row, padding at a row's end included,
    b * s in all. A document sees itself alone and its positions count from 0. channels: uint8 [b, s], the number
    under which the loss of a position is reported apart, or None. rows: the places of the rows in the global batch,
    which decide what dropout drops. lengths: how many positions of each row are its sample's (None: all), where a row
    is one sequence.
    """

    tokens: Tensor
    labels: Tensor
    loss_weights: Tensor
    documents: tuple[int, ...] | None = None
    channels: Tensor | None = None
    rows: tuple[int, ...] | None = None
    lengths: tuple[int, ...] | None = None


@dataclass(frozen=True)
class RankBatch:
    """One rank's part, [b, S / n] (packed: [1, S / n]); documents: their padded lengths, S in all.

    unpadded: lengths of the documents before (what fills the end is none of them), or of the sample in each row.
    """

    tokens: Tensor
    labels: Tensor
    loss_weights: Tensor
    documents: tuple[int, ...] | None
    seq_length: int
    """S"""
    channels: Tensor | None = None
    ahead: tuple["RankBatch", ...] = ()
    """What multi-token-prediction layers compute at the same positions, by depth."""
    unpadded: tuple[int, ...] = ()


def rank_batches(
    microbatches: Sequence[Microbatch], dims: ParallelDims, cp_rank: int, num_ahead: int = 0
) -> list[RankBatch]:
    """Parts of a context-parallel rank. Between pipeline stages all have one shape: LayoutError for rows of several.

    num_ahead: multi-token-prediction layers, for which each part has as many `ahead`.
    """
    _check_shapes(microbatches, dims)
    lengths = [_padded_length(batch, dims) for batch in microbatches]
    if dims.pp > 1:
        lengths = [max(lengths)] * len(lengths)
    parts = []
    for batch, length in zip(microbatches, lengths, strict=True):
        each = [batch, *(moved(batch, depth + 1) for depth in range(num_ahead))]
        part, *ahead = (_rank_batch(one, dims, cp_rank, length) for one in each)
        parts.append(replace(part, ahead=tuple(ahead)))
    return parts


def packed_places(batch: Microbatch, dims: ParallelDims, cp_rank: int, seq_length: int) -> tuple[Tensor, Tensor]:
    """Of every position of a packed microbatch on this rank its row in the global batch and its place in that row.

    int64 [seq_length / n] each. Places are counted before padding, so that a layout does not change them.
    """
    if batch.rows is None:
        raise ValueError("packed rows that do not say which rows of the global batch they are")
    size, columns = batch.tokens.shape
    rows = torch.tensor(batch.rows)[:, None].expand(size, columns)
    places = torch.arange(columns).expand(size, columns)
    _, (rows, places) = _laid_out(batch, [rows, places], dims, cp_rank, seq_length)
    return rows[0], places[0]


def moved(batch: Microbatch, depth: int) -> Microbatch:
    """Each position with the token, the label and the loss weight that is `depth` further on in its document (row).

    At the last `depth` positions of a document there is none: their weight is 0.
    """
    rows, columns = batch.tokens.shape
    lengths = torch.tensor(batch.documents or (columns,) * rows)
    ends = lengths.cumsum(0).repeat_interleave(lengths).to(batch.tokens.device)
    places = torch.arange(rows * columns, device=ends.device) + depth
    inside = places < ends
    places = places.clamp(max=rows * columns - 1)

    def move(x: Tensor) -> Tensor:
        return torch.where(inside, x.flatten()[places], 0).view(x.shape)

    return Microbatch(move(batch.tokens), move(batch.labels), move(batch.loss_weights), batch.documents)


def whole_rows(parts: Sequence[Tensor], num_positions: int) -> Tensor:
    """[b, S / n, ...] of every context-parallel rank, unpacked -> [b, s, ...]."""
    size, length = len(parts), sum(part.shape[1] for part in parts)
    rows = torch.cat(list(parts), dim=1)
    if size > 1:
        everyone = Share((length,), tuple(range(size)), size)
        rows = rows.index_select(1, rows_in_order(everyone, rows.device))
    return rows[:, :num_positions]


def sequence_multiple(dims: ParallelDims) -> int:
    """What the positions of a row must be a multiple of: 2 chunks a context-parallel rank, and whole parts for

    every tensor-parallel rank under sequence parallelism.
    """
    return document_multiple(dims) * (dims.tp if dims.sequence_parallel else 1)


def document_multiple(dims: ParallelDims) -> int:
    """What the positions of a packed document are padded to a multiple of."""
    return 2 * dims.cp if dims.cp > 1 else 1


def _check_shapes(microbatches: Sequence[Microbatch], dims: ParallelDims) -> None:
    first = microbatches[0]
    for batch in microbatches:
        if (batch.documents is None) != (first.documents is None):
            raise LayoutError("microbatches of one step are packed and not packed")
        if batch.documents is None and dims.pp > 1 and batch.tokens.shape != first.tokens.shape:
            shapes = f"{tuple(batch.tokens.shape)} and {tuple(first.tokens.shape)}"
            raise LayoutError(f"microbatches of one step differ in shape over {dims.pp} pipeline stages: {shapes}")
        if batch.documents is not None and sum(batch.documents) != batch.tokens.numel():
            raise LayoutError(
                f"documents of {sum(batch.documents)} positions in rows of {batch.tokens.numel()}: padding at the end "
                "of a row is a document of its own"
            )


def _padded_documents(batch: Microbatch, dims: ParallelDims) -> tuple[int, ...]:
    assert batch.documents is not None
    unit = document_multiple(dims)
    return tuple(-(-length // unit) * unit for length in batch.documents)


def _padded_length(batch: Microbatch, dims: ParallelDims) -> int:
    length = batch.tokens.shape[1] if batch.documents is None else sum(_padded_documents(batch, dims))
    unit = sequence_multiple(dims)
    return -(-length // unit) * unit


def _rank_batch(batch: Microbatch, dims: ParallelDims, cp_rank: int, length: int) -> RankBatch:
    tensors = [batch.tokens, batch.labels, batch.loss_weights, *([] if batch.channels is None else [batch.channels])]
    documents, tensors = _laid_out(batch, tensors, dims, cp_rank, length)
    tokens, labels, loss_weights, *channels = tensors
    return RankBatch(
        tokens, labels, loss_weights, documents, length, channels[0] if channels else None,
        unpadded=batch.documents or batch.lengths or batch.tokens.shape[1:] * len(batch.tokens),
    )  # fmt: skip


def _laid_out(
    batch: Microbatch, tensors: Sequence[Tensor], dims: ParallelDims, cp_rank: int, length: int
) -> tuple[tuple[int, ...] | None, list[Tensor]]:
    """Padded documents, and this rank's part of `tensors` [b, s]."""
    documents = None
    if batch.documents is None:
        tensors = [F.pad(x, (0, length - x.shape[1])) for x in tensors]
    else:
        documents = _padded_documents(batch, dims)
        places = _places(batch.documents, documents)
        tensors = [_spread(x, places, length) for x in tensors]
        if length > sum(documents):
            documents += (length - sum(documents),)
    if dims.cp > 1:
        share = Share(documents or (length,), (cp_rank,), dims.cp)
        tensors = [x.index_select(1, natural_rows(share, x.device)) for x in tensors]
    return documents, list(tensors)


def _places(lengths: Sequence[int], padded: Sequence[int]) -> Tensor:
    """int64 [b * s]: where every token goes once each document is followed by its padding."""
    shifts = [start - before for start, before in zip(accumulate(padded), accumulate(lengths), strict=True)]
    counts = torch.tensor(lengths)
    return torch.arange(int(counts.sum())) + torch.tensor([0, *shifts[:-1]]).repeat_interleave(counts)


def _spread(x: Tensor, places: Tensor, length: int) -> Tensor:
    """[b, s] -> [1, length], zero where there is padding."""
    out = x.new_zeros(length)
    out[places.to(x.device)] = x.flatten()
    return out.unsqueeze(0)
