"""What the engine needs to know beside the model and the layout, and its translation into megatron-core's configs."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from dataclasses import fields as dataclass_fields
from typing import Any, Literal, TypeVar

import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.tensor_parallel import layers
from megatron.core.transformer.transformer_config import TransformerConfig

from mswift.config.mcore_fields import reason_on_cpu
from mswift.converters.spec import ModelSpec
from mswift.errors import ConfigError
from mswift.parallel.engine import DTYPES, EngineSettings
from mswift.parallel.four_bit import Kind
from mswift.parallel.held_codes import HeldCodes
from mswift.parallel.megatron.moe import moe_options
from mswift.topology import ParallelDims

_ConfigT = TypeVar("_ConfigT")


@dataclass(frozen=True, kw_only=True)
class EngineConfig(EngineSettings):
    """How a MegatronEngine computes and updates.

    `four_bit_base`: how bitsandbytes keeps the base of `lora`, or which of it keeps the checkpoint's codes. mcore:
    fields of megatron-core's own configurations (`mswift.config.mcore`). mtp_num_layers: all multi-token-prediction
    layers of the model, to train them; 0: they stay.
    """

    micro_batch_size: int = 1
    four_bit_base: Kind | HeldCodes | None = None
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False
    gradient_accumulation_fusion: bool = False
    recompute_granularity: Literal["full", "selective"] | None = None
    recompute_method: Literal["uniform", "block"] | None = None
    recompute_num_layers: int | None = None
    recompute_modules: tuple[str, ...] = ()
    mtp_num_layers: int = 0
    mcore: Mapping[str, Any] = field(default_factory=dict)


def check_device(config: EngineConfig, device: torch.device) -> None:
    """ConfigError for what this kind of device, or what is installed on it, cannot do."""
    if device.type == "cpu" and (reason := reason_on_cpu(config.mcore)):
        raise ConfigError(reason)
    if config.gradient_accumulation_fusion and not (device.type == "cuda" and layers._grad_accum_fusion_available):
        raise ConfigError(
            f"--gradient_accumulation_fusion on {device.type}: it needs a GPU and fused_weight_gradient_mlp_cuda, "
            "which apex builds with --cuda_ext; install that, or leave the flag out"
        )


def transformer_config(spec: ModelSpec, dims: ParallelDims, config: EngineConfig) -> TransformerConfig:
    """megatron-core's description of the model on this layout. ConfigError for mcore fields that it refuses."""
    dtype = DTYPES[config.dtype]
    fields: dict[str, Any] = dict(
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
        virtual_pipeline_model_parallel_size=dims.vpp if dims.chunks > 1 else None,
        pipeline_model_parallel_layout=_pipeline_layout(spec, dims, config.mtp_num_layers),
        # one batch of sends and receives between two stages would match a chunk's message with the other chunk's
        overlap_p2p_comm=dims.chunks > 1,
        batch_p2p_comm=dims.chunks == 1,
        context_parallel_size=dims.cp,
        cp_comm_type=config.cp_comm_type,
        hierarchical_context_parallel_sizes=list(dims.cp_levels) if dims.cp_levels else None,
        sequence_parallel=dims.sequence_parallel,
        expert_model_parallel_size=dims.ep,
        expert_tensor_parallel_size=dims.sizes["etp"],
        calculate_per_token_loss=True,
        gradient_accumulation_fusion=config.gradient_accumulation_fusion,
        apply_rope_fusion=False,  # Transformer Engine
        persist_layer_norm=False,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        recompute_granularity=config.recompute_granularity,
        recompute_method=config.recompute_method,
        recompute_num_layers=config.recompute_num_layers,
        recompute_modules=list(config.recompute_modules) or None,
        mtp_num_layers=config.mtp_num_layers or None,
        **moe_options(spec.moe),
    )
    return _with_mcore(TransformerConfig, fields, config.mcore)


def _with_mcore(kind: type[_ConfigT], fields: Mapping[str, Any], mcore: Mapping[str, Any]) -> _ConfigT:
    """One of megatron-core's dataclasses, with what the user says of its fields; it checks the values itself."""
    known = {part.name for part in dataclass_fields(kind)}  # type: ignore[arg-type]
    given = {name: value for name, value in mcore.items() if name in known}
    try:
        return kind(**{**fields, **given})
    except (AssertionError, ValueError) as error:
        if not given:
            raise
        spelled = " ".join(f"--mcore.{name} {value}" for name, value in given.items())
        raise ConfigError(f"{spelled}: megatron-core refuses it: {' '.join(str(error).split())}") from error


def _pipeline_layout(spec: ModelSpec, dims: ParallelDims, mtp_num_layers: int) -> list[list[str]] | None:
    """The cut as megatron-core numbers its layers by: what each chunk holds."""
    if dims.pp == 1:
        return None
    chunks = [["decoder"] * depth for depth in dims.cut(spec.num_layers)]
    return [["embedding", *chunks[0]], *chunks[1:-1], [*chunks[-1], *["mtp"] * mtp_num_layers, "loss"]]


def ddp_config(config: EngineConfig, dims: ParallelDims) -> DistributedDataParallelConfig:
    """Gradients are summed in fp32 and each data-parallel rank owns a share of the optimizer, at every size.

    Nothing is overlapped where there is nothing to send.
    """
    replicas = max(dims.dp * dims.cp, dims.edp) > 1
    fields = {
        "use_distributed_optimizer": True,
        "grad_reduce_in_fp32": True,
        "overlap_grad_reduce": config.overlap_grad_reduce and replicas,
        "overlap_param_gather": config.overlap_param_gather and replicas,
    }
    return _with_mcore(DistributedDataParallelConfig, fields, config.mcore)


def optimizer_config(config: EngineConfig, *, overlap_param_gather: bool) -> OptimizerConfig:
    """AdamW for megatron-core; `mswift.parallel.megatron.optimizer` puts the wanted rule in its place."""
    fields: dict[str, Any] = dict(
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
        overlap_param_gather=overlap_param_gather,
    )
    return _with_mcore(OptimizerConfig, fields, config.mcore)
