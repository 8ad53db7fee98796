"""What the engine needs to know beside the model and the layout, and its translation into megatron-core's configs."""

from dataclasses import dataclass
from typing import Literal

import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer.transformer_config import TransformerConfig

from mswift.config.loss import LossFusion
from mswift.converters.adapters import LoraConfig
from mswift.converters.spec import ModelSpec
from mswift.parallel.megatron.moe import moe_options
from mswift.topology import ParallelDims

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How a MegatronEngine computes and updates; names as in `mswift.config` (loss_fusion: cross_entropy_loss_fusion).

    `trainable_modules` are HF modules (embed_tokens, lm_head) that are trained in full beside `lora`. `clip_grad` 0
    turns clipping off. BF16 keeps fp32 master weights and sums gradients in fp32.
    """

    dtype: Literal["F32", "BF16"] = "F32"
    micro_batch_size: int = 1
    cp_comm_type: Literal["p2p", "all_gather", "a2a", "a2a+p2p"] = "p2p"
    optimizer: Literal["adam", "sgd"] = "adam"
    lr: float = 1e-5
    weight_decay: float = 0.1
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_eps: float = 1e-8
    sgd_momentum: float = 0.9
    clip_grad: float = 1.0
    seed: int = 42
    loss_fusion: LossFusion = "auto"
    lora: LoraConfig | None = None
    trainable_modules: tuple[str, ...] = ()


def transformer_config(spec: ModelSpec, dims: ParallelDims, config: EngineConfig) -> TransformerConfig:
    """megatron-core's description of the model on this layout."""
    dtype = DTYPES[config.dtype]
    return TransformerConfig(
        num_layers=spec.num_layers,
        hidden_size=spec.hidden_size,
        num_attention_heads=spec.num_attention_heads,
        num_query_groups=spec.num_kv_heads,
        kv_channels=spec.head_dim,
        ffn_hidden_size=spec.ffn_hidden_size,
        normalization="RMSNorm",
        layernorm_epsilon=spec.norm_eps,
        qk_layernorm=spec.qk_norm == "head",
        gated_linear_unit=spec.gated,
        attention_output_gate=spec.attention_gate,
        softmax_scale=spec.attention_scale,
        activation_func=torch.nn.functional.silu,
        use_te_activation_func=True,  # megatron-core's hook for a module of ours: mswift.parallel.activations
        add_bias_linear=False,  # biases of o_proj, gate, up and down: mswift.parallel.megatron.spec
        add_qkv_bias=spec.qkv_bias,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        perform_initialization=False,  # weights are loaded, strictly; nothing is drawn
        tensor_model_parallel_size=dims.tp,
        pipeline_model_parallel_size=dims.pp,
        context_parallel_size=dims.cp,
        cp_comm_type=config.cp_comm_type,
        hierarchical_context_parallel_sizes=list(dims.cp_levels) if dims.cp_levels else None,
        sequence_parallel=dims.sequence_parallel,
        expert_model_parallel_size=dims.ep,
        expert_tensor_parallel_size=dims.sizes["etp"],
        calculate_per_token_loss=True,
        gradient_accumulation_fusion=False,  # apex
        apply_rope_fusion=False,  # Transformer Engine
        persist_layer_norm=False,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        **moe_options(spec.moe),
    )


def ddp_config() -> DistributedDataParallelConfig:
    """Gradients are summed in fp32 and each data-parallel rank owns a share of the optimizer, at every size."""
    return DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True)


def optimizer_config(config: EngineConfig) -> OptimizerConfig:
    """AdamW for megatron-core; `mswift.parallel.megatron.optimizer` puts the wanted rule in its place."""
    return OptimizerConfig(
        optimizer="adam",
        lr=config.lr,
        min_lr=0.0,
        weight_decay=config.weight_decay,
        adam_beta1=config.adam_beta1,
        adam_beta2=config.adam_beta2,
        adam_eps=config.adam_eps,
        clip_grad=config.clip_grad,
        params_dtype=DTYPES[config.dtype],
        bf16=config.dtype == "BF16",
        use_distributed_optimizer=True,
    )
