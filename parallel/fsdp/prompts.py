"""Prompt learning on the engine of transformers models: the encoder whole and fp32 on every rank.

Rows get their virtual tokens before they are padded and cut, as token ids below 0 (`mswift.tuners.prompt_modules`), so
that packing and ranks that share sequences need nothing more. Shapes: b rows, s positions, n virtual tokens.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mswift.converters.layout import Region
from mswift.converters.plan import ModelTable
from mswift.parallel import sequence
from mswift.parallel.batch import Microbatch
from mswift.parallel.engine import Read, StateShard, bytes_of
from mswift.parallel.fsdp.methods import MethodAdapters
from mswift.parallel.mapped import shards, whole
from mswift.tuners.prompt_modules import (
    ATTRIBUTE,
    PrefixKeys,
    PromptEmbeddings,
    made_by,
    make_encoder,
    stored_names,
    virtual_ids,
)
from mswift.tuners.prompts import EMBEDDINGS, PromptConfig

_STORED = "adapter."


class PromptAdapters(MethodAdapters):
    """As adapters of PEFT's methods are: no module is replaced, and what a network makes is kept beside it."""

    def __init__(self, model: nn.Module, table: ModelTable, config: PromptConfig) -> None:
        self.base_names = {name: name for name, _ in model.named_parameters()}
        model.requires_grad_(False)
        self._config, self._encoder = config, make_encoder(config)
        setattr(model, ATTRIBUTE, self._encoder)
        names = stored_names(config, self._encoder)
        parameters = dict(self._encoder.named_parameters())
        self.replicated = {f"{ATTRIBUTE}.{name}": parameters[name] for name in names}
        shapes = {stored: tuple(parameters[name].shape) for name, stored in names.items()}
        assert shapes == config.trained_shapes(), (shapes, config.trained_shapes())
        self.saved = {
            f"{ATTRIBUTE}.{name}": whole(stored, _STORED + stored, shapes[stored]) for name, stored in names.items()
        }
        self.drops, self._constants, self._budget = False, {}, None
        hooks = PromptEmbeddings(self._made)
        if config.kind == "prefix":
            hooks = PrefixKeys(self._made, config.num_layers, sequence.attending_to)
        hooks.attach(model.get_input_embeddings())  # type: ignore[operator]

    def _made(self) -> Tensor:
        return made_by(self._encoder, self._config.num_virtual_tokens)

    @property
    def num_virtual_tokens(self) -> int:
        """n."""
        return self._config.num_virtual_tokens

    def extended(self, batch: Microbatch) -> Microbatch:
        """With virtual tokens in front of every row, packed: of every document."""
        return with_virtual_tokens(batch, self._config.num_virtual_tokens)

    @torch.no_grad()
    def shards(self) -> Iterator[StateShard]:
        """What a network makes now, for PEFT's file; from one rank."""
        if self._config.has_network:
            made = self._made().contiguous()
            shape = tuple(made.shape)
            yield from shards(whole(EMBEDDINGS, _STORED + EMBEDDINGS, shape), Region.full(shape), made.float().cpu())

    def load(self, read: Read) -> None:
        """That is read too, as a strict reader wants, and made anew."""
        if self._config.has_network:
            shape = self._config.shapes()[EMBEDDINGS]
            read(_STORED + EMBEDDINGS, Region.full(shape), bytes_of(torch.empty(shape)))


def with_virtual_tokens(batch: Microbatch, count: int) -> Microbatch:
    """The batch with `count` virtual tokens in front of every row or document, of which nothing is learned.

    Rows of several documents become as long as the longest; what is added at their end is a document of its own.
    """
    if batch.documents is None:
        front = virtual_ids(count).to(batch.tokens.device).expand(len(batch.tokens), -1)
        tokens = torch.cat([front, batch.tokens], dim=1)
        channels = None if batch.channels is None else F.pad(batch.channels, (count, 0))
        labels, weights = (F.pad(x, (count, 0)) for x in (batch.labels, batch.loss_weights))
        lengths = None if batch.lengths is None else tuple(length + count for length in batch.lengths)
        return replace(batch, tokens=tokens, labels=labels, loss_weights=weights, channels=channels, lengths=lengths)
    rows = _documents_by_row(batch.documents, batch.tokens.shape[1])
    width = max(sum(lengths) + count * len(lengths) for lengths in rows)
    longer = tuple(length for lengths in rows for length in _longer(lengths, count, width))

    def spread(x: Tensor, front: Tensor) -> Tensor:
        """[b, s] -> [b, width], `front` [n] before every document."""
        made = []
        for row, lengths in zip(x, rows, strict=True):
            parts = [part for document in row.split(lengths) for part in (front, document)]
            made.append(F.pad(torch.cat(parts), (0, width - sum(map(len, parts)))))
        return torch.stack(made)

    def blank(x: Tensor) -> Tensor:
        return spread(x, x.new_zeros(count))

    return replace(
        batch,
        tokens=spread(batch.tokens, virtual_ids(count).to(batch.tokens)),
        labels=blank(batch.labels),
        loss_weights=blank(batch.loss_weights),
        documents=longer,
        channels=None if batch.channels is None else blank(batch.channels),
    )


def _documents_by_row(documents: tuple[int, ...], columns: int) -> list[list[int]]:
    rows: list[list[int]] = [[]]
    for length in documents:
        if sum(rows[-1]) == columns:
            rows.append([])
        rows[-1].append(length)
    assert all(sum(lengths) == columns for lengths in rows), (documents, columns)
    return rows


def _longer(lengths: list[int], count: int, width: int) -> list[int]:
    """Of one row, with virtual tokens and what is added at its end."""
    longer = [length + count for length in lengths]
    rest = width - sum(longer)
    return [*longer, rest] if rest else longer
