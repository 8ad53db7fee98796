"""Build the model chunks of this rank. megatron-core's globals must be set (`mswift.parallel.megatron.world`).

Shapes: s sequence, b batch, v vocabulary columns of this rank.
"""

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from mswift.config.loss import LossFusion, is_fused
from mswift.converters.spec import ModelSpec
from mswift.parallel.fused_loss import OutputLayer, fused_linear_cross_entropy
from mswift.parallel.loss import vocab_parallel_cross_entropy
from mswift.parallel.megatron.ends import scale_ends
from mswift.parallel.megatron.moe import keep_tokens_local, mark_experts
from mswift.parallel.megatron.prediction import hold_untrained, prediction_spec
from mswift.parallel.megatron.spec import block_spec, rotary_tables
from mswift.parallel.megatron.weight_gradients import IS_ADDED
from mswift.parallel.rotary import RotaryTable
from mswift.refusals import check_computed
from mswift.topology import ParallelDims

Ahead = tuple[Tensor, Tensor, Tensor]
"""Tokens, labels and loss weights [b, s] of one multi-token-prediction layer."""
Channels = tuple[Tensor, int]
"""The number of each position's channel [b, s], and how many channels there are."""


class DenseModel(GPTModel):
    """GPTModel whose loss leaves the padded vocabulary out.

    Called with labels it returns losses [b, s]; where the loss is fused with the output layer (`loss_fusion`), their
    sum weighted by `loss_mask` [b, s] instead, a scalar. Called with `ahead`, the (tokens, labels, loss weights) of
    each multi-token-prediction layer, or with `channels`, it returns weighted sums [1 + depths + channels]: its own,
    one of each of these layers, and the parts of its own by channel, which carry no gradient.
    """

    num_real_rows: int
    loss_fusion: LossFusion = "false"
    logit_divisor: float = 1.0
    logit_softcap: float | None = None
    _ahead: Sequence[Ahead] = ()
    _channels: Channels | None = None

    def forward(
        self, *inputs: Any, ahead: Sequence[Ahead] = (), channels: Channels | None = None, **options: Any
    ) -> Tensor:
        """As GPTModel's, and see above."""
        self._ahead, self._channels = ahead, channels
        return super().forward(*inputs, **options)  # type: ignore[no-any-return]

    def _postprocess(self, hidden_states: Tensor, **options: Any) -> Tensor:
        if not self.post_process:
            return hidden_states
        labels, loss_weights = options["labels"], options["loss_mask"]
        if labels is None:
            return self._logits(hidden_states).transpose(0, 1).contiguous()
        total, losses = self._losses(hidden_states, labels, loss_weights)
        if not self._ahead and self._channels is None:
            return losses if total is None else total
        sums = [_weighted_sum(total, losses, loss_weights)]
        apart = [] if self._channels is None else [_sums_by_channel(losses.detach() * loss_weights, *self._channels)]
        layers = self.mtp.layers if self._ahead else ()
        for layer, (tokens, labels, loss_weights) in zip(layers, self._ahead, strict=True):
            hidden_states = layer(hidden_states, tokens, self.embedding, options["packed_seq_params"])
            sums.append(_weighted_sum(*self._losses(hidden_states, labels, loss_weights), loss_weights))
        self._ahead, self._channels = (), None
        return torch.cat([torch.stack(sums), *apart])

    def _output_weight(self) -> Tensor | None:
        """The embedding's weight where it is the output layer's too."""
        return self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None

    def _logits(self, hidden_states: Tensor) -> Tensor:
        """[s, b, hidden] (under sequence parallelism of this rank's part) -> [s, b, v]."""
        logits, _ = self.output_layer(hidden_states, weight=self._output_weight())
        return logits  # type: ignore[no-any-return]

    def _losses(self, hidden_states: Tensor, labels: Tensor, loss_weights: Tensor) -> tuple[Tensor | None, Tensor]:
        """Losses [b, s]; where fused with the output layer, before them their weighted sum, which has the gradient."""
        fused = is_fused(self.loss_fusion, labels.numel())
        if not fused or hasattr(self.output_layer, "lora"):  # an adapter there adds to logits that must exist
            return None, self.compute_language_model_loss(labels, self._logits(hidden_states))
        weight = self._output_weight()
        weight = self.output_layer.weight if weight is None else weight
        group = self.pg_collection.tp
        layer = OutputLayer(
            vocab_size=self.num_real_rows,
            first_row=group.rank() * weight.shape[0],
            group=group,
            sequence_parallel=self.config.sequence_parallel,
            divisor=self.logit_divisor,
            softcap=self.logit_softcap,
        )
        total, losses = fused_linear_cross_entropy(hidden_states, weight, labels.t(), loss_weights.t(), layer)
        return total, losses.t()

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """labels [b, s] and local logits [s, b, v] -> loss per token [b, s], without a reduction."""
        group = self.pg_collection.tp
        losses = vocab_parallel_cross_entropy(
            logits,
            labels.transpose(0, 1),
            first_row=group.rank() * logits.shape[-1],
            vocab_size=self.num_real_rows,
            group=group,
        )
        return losses.transpose(0, 1)


def _weighted_sum(total: Tensor | None, losses: Tensor, loss_weights: Tensor) -> Tensor:
    """Of losses [b, s], where it is not there already."""
    return (losses * loss_weights).sum() if total is None else total


def _sums_by_channel(values: Tensor, numbers: Tensor, num_channels: int) -> Tensor:
    """[channels]; each a sum of its own, so that it is the same every time on a GPU too."""
    return torch.stack([torch.where(numbers == number, values, 0.0).sum() for number in range(num_channels)])


def padded_vocab_size(vocab_size: int, tp: int) -> int:
    """Rows of the vocabulary at run time: the next multiple of the tensor-parallel size."""
    return -(-vocab_size // tp) * tp


def build_model(
    spec: ModelSpec, dims: ParallelDims, config: TransformerConfig, device: torch.device
) -> list[DenseModel]:
    """The chunks of this pipeline stage (one without virtual stages), weights allocated and not yet set.

    Multi-token-prediction layers of the model are frozen unless the config has `mtp_num_layers`.
    """
    check_computed(spec)
    rotary, stage = rotary_tables(spec, device), parallel_state.get_pipeline_model_parallel_rank()
    return [_build_chunk(spec, dims, config, rotary, stage, chunk) for chunk in range(dims.chunks)]


def _build_chunk(
    spec: ModelSpec,
    dims: ParallelDims,
    config: TransformerConfig,
    rotary: Sequence[RotaryTable],
    stage: int,
    chunk: int,
) -> DenseModel:
    is_last = (stage, chunk) == (dims.pp - 1, dims.chunks - 1)
    vp_stage = chunk if dims.chunks > 1 else None
    model = DenseModel(
        config,
        block_spec(spec, dims.stage_layers(spec.num_layers, stage, chunk), rotary, config),
        vocab_size=padded_vocab_size(spec.vocab_size, dims.tp),
        max_sequence_length=spec.max_position_embeddings,
        pre_process=(stage, chunk) == (0, 0),
        post_process=is_last,
        parallel_output=True,
        share_embeddings_and_output_weights=spec.tied_embeddings,
        position_embedding_type="none",  # the attention layers rotate q and k themselves
        mtp_block_spec=prediction_spec(spec, rotary, config) if is_last and config.mtp_num_layers else None,
        vp_stage=vp_stage,
    )
    if is_last and spec.mtp_layers and not config.mtp_num_layers:
        hold_untrained(model, spec, rotary, config, vp_stage)
    if model.mtp_process and spec.tied_embeddings:
        model.output_layer.weight = None  # the embedding, which is here as well, is the output layer's weight
    model.num_real_rows = spec.vocab_size
    model.logit_divisor, model.logit_softcap = spec.logit_divisor, spec.logit_softcap
    _mark_cut_parameters(model)
    mark_experts(model)
    keep_tokens_local(model)
    _mark_linears(model)
    scale_ends(model, spec)
    return model


def _mark_cut_parameters(model: torch.nn.Module) -> None:
    """Tell the parameters that are cut over tensor-parallel ranks from the replicated ones.

    megatron-core marks weights only while it initialises them; without the mark, the gradient norm would count
    the shard of tensor-parallel rank 0 alone.
    """
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if weight is None or not isinstance(module, (ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding)):
            continue
        dim = 1 if isinstance(module, RowParallelLinear) else 0
        if not hasattr(weight, "tensor_model_parallel"):
            set_tensor_model_parallel_attributes(weight, True, dim, 1)


def _mark_linears(model: torch.nn.Module) -> None:
    """Mark the weights of linears in layers: nothing but their linear differentiates them.

    The output layer is none of them: its weight may be the embedding's, or the fused loss's.
    """
    for layer in (module for module in model.modules() if isinstance(module, TransformerLayer)):
        for module in layer.modules():
            if isinstance(module, (ColumnParallelLinear, RowParallelLinear)):
                setattr(module.weight, IS_ADDED, True)
