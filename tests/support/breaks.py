"""Rules and collectives that a layout rests on, each left out: what a proof of a layout must not let through.

Each is a context manager on one rank, named "tests/support/breaks.py:NAME" (`tests.support.matrix.broken_rule`).
"""

from typing import Any
from unittest.mock import patch


def no_gradient_through_all_to_all() -> Any:
    """Tokens travel to their experts and back; their gradients do not."""
    from megatron.core.transformer.moe import token_dispatcher

    real = token_dispatcher.all_to_all
    return patch.object(token_dispatcher, "all_to_all", lambda *args, **kwargs: real(*args, **kwargs).detach())


def no_sum_over_experts_parts() -> Any:
    """What the ranks that share an expert have computed of it is not added up."""
    from megatron.core.transformer.moe import token_dispatcher

    def own_part(x: Any, group: Any = None, **_: Any) -> Any:
        return x.chunk(group.size())[group.rank()] * group.size()

    return patch.object(token_dispatcher, "reduce_scatter_to_sequence_parallel_region", own_part)


def half_gradients_between_stages() -> Any:
    """The gradient that a stage sends to the one before it is halved, whole stages or interleaved chunks."""
    from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

    real = P2PCommunicator._communicate

    def halved(self: Any, *, tensor_send_prev: Any, **options: Any) -> Any:
        sent = None if tensor_send_prev is None else tensor_send_prev * 0.5
        return real(self, tensor_send_prev=sent, **options)

    return patch.object(P2PCommunicator, "_communicate", halved)


def updated_weights_not_gathered() -> Any:
    """Each data-parallel rank updates its share of the weights and keeps it to itself."""
    from mswift.parallel.megatron.data_parallel import DataParallel

    return patch.object(DataParallel, "start_param_sync", lambda *_, **__: None)


def gradients_of_experts_not_summed() -> Any:
    """Over the replicas of each expert; those of dense layers are."""
    from mswift.parallel.megatron.data_parallel import DataParallel

    def dense_only(self: Any, force_all_reduce: bool | None = False) -> None:
        for group in self.bucket_groups:
            group.finish_grad_sync(force_all_reduce=force_all_reduce)

    return patch.object(DataParallel, "finish_grad_sync", dense_only)


def documents_of_the_first_stage_only() -> Any:
    """All stages but the first take a packed row for one document."""
    from megatron.core import parallel_state

    from mswift.parallel.megatron import schedule

    real = schedule.documents

    def joined(lengths: tuple[int, ...], device: Any) -> Any:
        first = parallel_state.is_pipeline_first_stage(ignore_virtual=True)
        return real(lengths if first else (sum(lengths),), device)

    return patch.object(schedule, "documents", joined)


def documents_cut_as_one() -> Any:
    """A context-parallel rank takes its chunks of the row, not of every document."""
    from mswift.parallel import batch

    def of_the_row(lengths: tuple[int, ...], ranks: tuple[int, ...], size: int) -> Any:
        return Share((sum(lengths),), ranks, size)

    Share = batch.Share
    return patch.object(batch, "Share", of_the_row)
