"""Multi-token prediction (DeepSeek-AI 2024, arXiv 2412.19437, section 2.2) on megatron-core's own layer.

Depth k (from 1) joins the state that predicts one token less, h of position i, with the embedding of token i + k,
passes both through one decoder layer, and predicts token i + k + 1 with the embedding and the output layer of the
model. h of depth 0 is the state behind the model's last norm, as megatron-core has it.

megatron-core's layer moves the tokens to the left itself, on each rank, with messages between context-parallel ones;
here they come moved (`mswift.parallel.batch`), cut by documents, before they are cut for ranks.
Shapes: s sequence (of this rank), b batch.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.tensor_parallel.random import checkpoint
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlock,
    MultiTokenPredictionBlockSubmodules,
    MultiTokenPredictionLayer,
    MultiTokenPredictionLayerSubmodules,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from mswift.converters.spec import ModelSpec
from mswift.parallel.megatron.spec import layer_spec
from mswift.parallel.norms import norm_class
from mswift.parallel.rotary import RotaryTable


class PredictionLayer(MultiTokenPredictionLayer):
    """megatron-core's layer for tokens that are moved already.

    Full recomputation, method uniform, keeps its two inputs; method block, which counts decoder layers, keeps it whole.
    """

    def forward(self, hidden_states: Tensor, tokens: Tensor, embedding: nn.Module, packed_seq_params: Any) -> Tensor:
        """States [s, b, hidden] of one depth less and tokens [b, s] of this depth -> states of this depth, normed."""
        embedded = embedding(input_ids=tokens, position_ids=None)
        join = partial(self._proj_and_transformer_layer, packed_seq_params=packed_seq_params)
        config = self.config
        if config.recompute_granularity == "full" and config.recompute_method == "uniform":
            return checkpoint(join, config.distribute_saved_activations, hidden_states, embedded)  # type: ignore[no-any-return]
        return join(hidden_states, embedded)  # type: ignore[no-any-return]


def prediction_spec(
    spec: ModelSpec, rotary: Sequence[RotaryTable], config: TransformerConfig
) -> MultiTokenPredictionBlockSubmodules:
    """The multi-token-prediction layers of the model, all on the last pipeline stage."""
    norm = norm_class(spec)
    layers = [
        MultiTokenPredictionLayerSubmodules(
            enorm=norm,
            hnorm=norm,
            eh_proj=ColumnParallelLinear,
            transformer_layer=layer_spec(spec, layer, rotary, config),
            layer_norm=norm,
        )
        for layer in spec.mtp_layers
    ]
    return MultiTokenPredictionBlockSubmodules([ModuleSpec(PredictionLayer, submodules=parts) for parts in layers])


def hold_untrained(
    model: Any, spec: ModelSpec, rotary: Sequence[RotaryTable], config: TransformerConfig, vp_stage: int | None
) -> None:
    """Give a GPTModel these layers, frozen: nothing is computed with them, checkpoints hold them as they came."""
    model.mtp = MultiTokenPredictionBlock(config, prediction_spec(spec, rotary, config), vp_stage=vp_stage)
    model.mtp.requires_grad_(False)
