"""Attention of transformers models over packed documents and over the ranks that share a sequence.

transformers asks its registry for the attention function by the name in a model's config: no class is changed. The
function computes with `mswift.parallel.attention`, kernels and exchanges of the Megatron engine. What is attended to
is noted once a forward pass (`attending`) and holds until the next one, since layers may be computed again in backward.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from mswift.errors import LayoutError
from mswift.parallel.attention.core import SdpaAttention
from mswift.parallel.attention.share import Share, positions
from mswift.parallel.shifted import shifted_attention

NAME = "mswift"
"""`attn_implementation` of models that are to use it."""


@dataclass
class _Now:
    """What this process attends to. lengths: of the documents, over all ranks; None: a row is one.

    keys: (number of a layer, key, value) -> those in their place, for prefixes.
    """

    lengths: tuple[int, ...] | None = None
    shifted: bool = False
    keys: Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
    kind: str = "p2p"
    groups: Any = None
    size: int = 1
    rank: int = 0


_now = _Now()


def register(*, compiled: bool = False) -> None:
    """Make `NAME` known to transformers; a second call changes nothing. compiled: torch.compile passes it by."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(NAME, torch.compiler.disable(attend) if compiled else attend)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, _no_mask)


def share_with(kind: str, groups: Any, size: int) -> None:
    """How sequences lie over ranks: a `cp_comm_type`, groups with `cp` (and `hcp`), their number of ranks."""
    _now.kind, _now.groups, _now.size = kind, groups, size


def attending(documents: tuple[int, ...] | None, *, shifted: bool = False) -> None:
    """What the coming forward pass and its backward pass compute: fields of `RankBatch`; `mswift.parallel.shifted`."""
    _now.lengths, _now.shifted, _now.keys = documents, shifted, None


def attending_to(keys: Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]) -> None:
    """Change keys and values [b, g, s, d] of every layer of this forward pass, after `attending`."""
    _now.keys = keys


def document_positions(documents: tuple[int, ...] | None, seq_length: int, rank: int, device: torch.device) -> Tensor:
    """int64 [1, rows]: the position of each of this rank's rows in its document."""
    _now.rank = rank
    share = Share(documents or (seq_length,), (rank,), _now.size)
    return positions(share, device).unsqueeze(0)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    dropout: float = 0.0,
    **_unused: Any,
) -> tuple[Tensor, None]:
    """As transformers calls it: query [b, h, s, d], key [b, g, s, d], value [b, g, s, v] -> [b, s, h, v].

    Causal. LayoutError for what it does not compute: a mask, dropout, attention in both directions.
    """
    if attention_mask is not None or dropout or not getattr(module, "is_causal", True):
        what = "a mask of its own" if attention_mask is not None else "dropout" if dropout else "no causal order"
        raise LayoutError(f"--backend fsdp: {type(module).__name__} attends with {what}: use --backend megatron")
    config = SimpleNamespace(context_parallel_size=_now.size, cp_comm_type=_now.kind)
    core = SdpaAttention(
        config, softmax_scale=scaling, window=sliding_window, softcap=softcap, pg_collection=_now.groups,
        cp_comm_type=_now.kind,
    )  # fmt: skip
    core.sinks = s_aux
    if _now.keys is not None:
        key, value = _now.keys(int(module.layer_idx), key, value)  # type: ignore[arg-type]
    rows = [x.permute(2, 0, 1, 3) for x in (query, key, value)]
    if _now.shifted:
        return shifted_attention(core, *rows).transpose(0, 1), None
    packed = None if _now.lengths is None else SimpleNamespace(lengths=_now.lengths)
    out: Tensor = core(*rows, packed_seq_params=packed)  # [s, b, h * v]
    return out.transpose(0, 1).unflatten(-1, (query.shape[1], -1)), None


def _no_mask(*_args: Any, **_options: Any) -> None:
    """transformers makes no mask: what a position sees is known here."""
