"""Multipliers and caps at both ends of a model: behind the embedding, and on the logits."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mswift.converters.spec import ModelSpec
from mswift.parallel.dropout import EMBEDDING_NOISE, noise
from mswift.parallel.fused_loss import scaled_logits


def scale_ends(model: Any, spec: ModelSpec) -> None:
    """Add what the model has of embedding multiplier, logit divisor and logit soft-cap to a GPTModel, in place."""
    if spec.embedding_multiplier != 1.0 and hasattr(model, "embedding"):
        _multiply_embeddings(model.embedding, spec)
    if (spec.logit_divisor != 1.0 or spec.logit_softcap is not None) and hasattr(model, "output_layer"):
        _scale_logits(model.output_layer, spec.logit_divisor, spec.logit_softcap)


def differentiate_embeddings(chunks: Sequence[Any]) -> None:
    """Let the output of a frozen embedding require a gradient, which nobody keeps.

    megatron-core's recomputation is torch's reentrant kind: where no input of a layer requires a gradient, its
    parameters silently get none.
    """
    for chunk in chunks:
        if hasattr(chunk, "embedding"):
            chunk.embedding.register_forward_hook(_require_gradient)


def add_noise(chunks: Sequence[Any], alpha: float, spec: ModelSpec) -> None:
    """Embeddings [s, b, h] of training batches get noise (`mswift.parallel.dropout.noise`), after `scale_ends`.

    It is on what transformers' embedding gives: Gemma's multiplies by itself, the model multiplies that of others.
    """
    multiplied_before = spec.rounded_embedding_multiplier
    for chunk in chunks:
        if hasattr(chunk, "embedding"):
            group = chunk.pg_collection.tp if chunk.config.sequence_parallel else None
            noisy = partial(_noisy, alpha, 0 if group is None else group.rank())
            chunk.embedding.register_forward_hook(noisy, prepend=not multiplied_before)


def _noisy(alpha: float, part: int, _module: nn.Module, _args: Any, output: Tensor) -> Tensor:
    """part: which of the equal parts of a sequence this rank has."""
    return noise(output, EMBEDDING_NOISE, alpha, first_token=part * len(output))


def _require_gradient(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
    return output if output.requires_grad or not torch.is_grad_enabled() else output.requires_grad_(True)


def _multiply_embeddings(embedding: nn.Module, spec: ModelSpec) -> None:
    def multiply(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        factor = spec.embedding_multiplier
        if spec.rounded_embedding_multiplier:
            factor = float(torch.tensor(factor, dtype=output.dtype))
        return output * factor

    embedding.register_forward_hook(multiply)


def _scale_logits(output_layer: nn.Module, divisor: float, softcap: float | None) -> None:
    def scale(_module: nn.Module, _args: Any, output: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor | None]:
        logits, bias = output
        return scaled_logits(logits, divisor, softcap), bias

    output_layer.register_forward_hook(scale)
