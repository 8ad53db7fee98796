"""Dropout whose every decision is a function of where an element lies in the job, so that any layout drops the same.

An element is kept or dropped by a hash of (seed, optimizer step, name of the linear, row of the global batch, position
in the sequence, feature): no generator has a state, and a rank needs its own elements only. The mixing function is
`lowbias32` (C. Wellons, "Prospecting for Hash Functions", 2018), on int32 with wrapping products.
Shapes: s sequence of this rank, b batch, i features of this rank.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from mswift.parallel.attention.share import Share, natural_rows, segments
from mswift.parallel.batch import Microbatch, RankBatch, packed_places
from mswift.topology import Coordinate, ParallelDims


@dataclass(frozen=True)
class BatchPlace:
    """Which microbatch a forward pass computes. rows: int64 [b], of the global batch; of packed ones [s, 1], by token.

    positions: int64 [s], of the tokens of this context-parallel rank in the whole sequence (packed: in the row before
    samples were padded); None: all, in order. lengths, for noise: fp32 [1, b], packed [s, 1]: how many positions the
    sample of a token has at every layout: what pads it is not counted.
    """

    seed: int
    step: int
    rows: Tensor
    positions: Tensor | None = None
    lengths: Tensor | None = None

    def of_tokens(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        """(rows, positions) of tokens first .. first + count - 1 of this context-parallel rank."""
        here = slice(first, first + count)
        rows = self.rows if self.rows.dim() == 1 else self.rows[here]
        return rows, torch.arange(first, first + count) if self.positions is None else self.positions[here]


EMBEDDING_NOISE = "embedding"
"""The name of NEFTune's noise, which is the same on every engine."""

_place: ContextVar[BatchPlace | None] = ContextVar("place", default=None)


@contextmanager
def at(place: BatchPlace | None) -> Iterator[None]:
    """Within: forward passes of this microbatch drop."""
    token = _place.set(place)
    try:
        yield
    finally:
        _place.reset(token)


@contextmanager
def counted(chunks: Sequence[nn.Module], where: Sequence[BatchPlace]) -> Iterator[None]:
    """Within: the n-th forward pass of each model chunk is that of where[n]; none: nothing is dropped."""
    hooks = []
    for chunk in chunks if where else ():
        left = iter(where)
        hooks.append(chunk.register_forward_pre_hook(lambda *_, left=left: _enter(next(left))))
        hooks.append(chunk.register_forward_hook(lambda *_: _enter(None)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        _place.set(None)


def places(
    microbatches: Sequence[Microbatch],
    batches: Sequence[RankBatch],
    dims: ParallelDims,
    here: Coordinate,
    seed: int,
    step: int,
) -> list[BatchPlace]:
    """Of every microbatch of a step on the rank `here`; `batches` are its parts of them."""
    if batches[0].documents is not None:
        where = [
            packed_places(batch, dims, here.cp, part.seq_length)
            for batch, part in zip(microbatches, batches, strict=True)
        ]
        return [
            BatchPlace(seed, step, rows[:, None], of_tokens, _document_lengths(part, here.cp, dims.cp))
            for (rows, of_tokens), part in zip(where, batches, strict=True)
        ]
    found = []
    for number, (batch, part) in enumerate(zip(microbatches, batches, strict=True)):
        size = len(part.tokens)
        first = (number * dims.dp + here.dp) * size  # in order, where nothing else is said
        rows = torch.arange(first, first + size) if batch.rows is None else torch.tensor(batch.rows)
        share = Share((part.seq_length,), (here.cp,), dims.cp)
        positions = natural_rows(share, torch.device("cpu")) if dims.cp > 1 else None
        lengths = torch.tensor([part.unpadded], dtype=torch.float32)
        found.append(BatchPlace(seed, step, rows, positions, lengths))
    return found


def _document_lengths(part: RankBatch, cp_rank: int, cp: int) -> Tensor:
    """fp32 [s, 1]: of every token of a packed part the length of its document."""
    assert part.documents is not None
    own = dict(enumerate(part.unpadded))  # what fills the end is as long as it is
    share = Share(part.documents, (cp_rank,), cp)
    each = [torch.full((s.length,), own.get(s.document, part.documents[s.document])) for s in segments(share)]
    return torch.cat(each).to(torch.float32)[:, None]


def _enter(place: BatchPlace | None) -> None:
    _place.set(place)


def remembered(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function at today's place whenever it is called: for a layer that is computed again in the backward pass."""
    place = _place.get()

    @wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        with at(place):
            return function(*args, **kwargs)

    return called


def remember_places(tensor_parallel: Any) -> None:
    """Have megatron-core's recomputation (megatron.core.tensor_parallel, of which it is a part) use `remembered`."""
    again, without_output = tensor_parallel.checkpoint, tensor_parallel.random.CheckpointWithoutOutput
    original = without_output.checkpoint

    def checkpoint(function: Callable[..., Any], distribute_saved_activations: bool, *args: Any) -> Any:
        return again(remembered(function), distribute_saved_activations, *args)

    def checkpoint_without_output(self: Any, run_function: Callable[..., Any], *args: Any) -> Any:
        return original(self, remembered(run_function), *args)

    tensor_parallel.checkpoint = tensor_parallel.random.checkpoint = checkpoint
    without_output.checkpoint = checkpoint_without_output


def dropped(x: Tensor, name: str, probability: float, *, first_token: int, first_feature: int) -> Tensor:
    """x [s, b, i] with its elements zeroed at `probability`, the others divided by 1 - probability, as torch has it.

    first_token, first_feature: place of element 0 within the sequence of this context-parallel rank and the features.
    Without gradients (an evaluation) and outside of `counted` nothing is dropped.
    """
    place = _place.get()
    if probability == 0 or (place is None and not torch.is_grad_enabled()):
        return x
    if place is None:
        raise RuntimeError(f"{name}: which microbatch is this? a layer that is computed again needs `remembered`")
    s, _, i = x.shape
    device = x.device
    rows, tokens = place.of_tokens(first_token, s)
    features = torch.arange(first_feature, first_feature + i)
    key = f"{place.seed}:{place.step}:{name}"
    kept = keep(key, rows.to(device), tokens.to(device), features.to(device), probability)
    return x * kept * (1 / (1 - probability))


def noise(x: Tensor, name: str, alpha: float, *, first_token: int = 0) -> Tensor:
    """x [s, b, i] with uniform noise in +-alpha / sqrt(positions x i), decided by place and name as above.

    Positions are those of the sample, in a row of its own or packed. first_token: as of `dropped`.
    Outside of `at` and `counted` (an evaluation) nothing is added.
    """
    place = _place.get()
    if place is None:
        return x
    s, _, i = x.shape
    rows, tokens = place.of_tokens(first_token, s)
    assert place.lengths is not None
    lengths = place.lengths if len(place.lengths) == 1 else place.lengths[first_token:][:s]
    key, features = f"{place.seed}:{place.step}:{name}", torch.arange(i, device=x.device)
    magnitude = alpha * (lengths.to(x.device).clamp(min=1) * i) ** -0.5
    words = _words(key, rows.to(x.device), tokens.to(x.device), features)
    return x + (words.to(torch.float32) * (magnitude / 2**31)[:, :, None]).to(x.dtype)


def keep(key: str, rows: Tensor, tokens: Tensor, features: Tensor, probability: float) -> Tensor:
    """bool [tokens, rows, features], true with 1 - probability. rows: [rows], or [tokens, 1]: a row for each token."""
    return _words(key, rows, tokens, features) >= int(probability * 2**32) - 2**31


def _words(key: str, rows: Tensor, tokens: Tensor, features: Tensor) -> Tensor:
    """int32 [tokens, rows, features], each uniform over all of them."""
    digest = hashlib.sha256(key.encode()).digest()
    one, two = (int.from_bytes(digest[at : at + 4], "little", signed=True) for at in (0, 4))
    row = _mixed(rows.to(torch.int32) ^ one)
    token = _mixed(row ^ _mixed(tokens.to(torch.int32))[:, None])
    feature = _mixed(features.to(torch.int32) ^ two)
    return _mixed(token[:, :, None] ^ feature)


def _mixed(x: Tensor) -> Tensor:
    """lowbias32: every bit of the int32 depends on all bits."""
    for shift, mask, factor in ((16, 0xFFFF, 0x7FEB352D), (15, 0x1FFFF, 0x846CA68B - 2**32)):
        x = (x ^ ((x >> shift) & mask)) * factor
    return x ^ ((x >> 16) & 0xFFFF)
