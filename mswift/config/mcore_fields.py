"""Which fields of megatron-core's configurations a run may set with `--mcore.<field>`, and why it may not the others.

Every field of the tested versions stands in exactly one of the groups below; a test compares them with megatron-core.
"""

from collections.abc import Mapping

PASSED = frozenset(
    {
        *("batch_p2p_sync", "microbatch_group_size_per_vp_stage", "variable_seq_lengths"),
        *("distribute_saved_activations", "clone_scatter_output_in_embedding", "deterministic_mode"),
        *("disable_bf16_reduced_precision_matmul", "config_logger_dir"),
        *("moe_shared_expert_overlap", "moe_token_dispatcher_type"),
        *("bucket_size", "check_for_nan_in_grad", "check_for_large_grads", "pad_buckets_for_high_nccl_busbw"),
        "reduce_scatter_with_fp32_accumulation",
        "mtp_loss_scaling_factor",  # the one that is part of what is minimised: --mtp_num_layers says whether
    }
)
"""Fields that keep the function of the model and the update, and have an effect in mswift."""

NEEDS_GPU = frozenset(
    {
        *("use_ring_exchange_p2p", "nccl_ub", "disable_symmetric_registration"),
        "overlap_p2p_comm_warmup_flush",  # on gloo the stages wait for each other for ever
        "deallocate_pipeline_outputs",  # on gloo an interleaved stage lets go of what is still being sent
        *("enable_cuda_graph", "external_cuda_graph", "cuda_graph_impl", "cuda_graph_scope", "cuda_graph_warmup_steps"),
        *("cuda_graph_use_single_mempool", "cuda_graph_retain_backward_graph"),
        *("moe_enable_deepep", "moe_flex_dispatcher_backend", "moe_deepep_num_sms", "moe_hybridep_num_sms"),
    }
)
"""Passed on where there is a GPU."""

FLAGS: Mapping[str, str] = {
    "tensor_model_parallel_size": "tensor_model_parallel_size",
    "pipeline_model_parallel_size": "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size": "virtual_pipeline_model_parallel_size",
    "sequence_parallel": "sequence_parallel",
    "context_parallel_size": "context_parallel_size",
    "cp_comm_type": "cp_comm_type",
    "hierarchical_context_parallel_sizes": "context_parallel_size",
    "hybrid_context_parallel": "context_parallel_size",
    "max_seqlen_per_dp_cp_rank": "context_parallel_size",
    "expert_model_parallel_size": "expert_model_parallel_size",
    "expert_tensor_parallel_size": "expert_tensor_parallel_size",
    "moe_extended_tp": "expert_tensor_parallel_size",
    "fp16": "torch_dtype",
    "bf16": "torch_dtype",
    "params_dtype": "torch_dtype",
    "pipeline_dtype": "torch_dtype",
    "enable_autocast": "torch_dtype",
    "autocast_dtype": "torch_dtype",
    "gradient_accumulation_fusion": "gradient_accumulation_fusion",
    "num_layers_in_first_pipeline_stage": "decoder_first_pipeline_num_layers",
    "num_layers_in_last_pipeline_stage": "decoder_last_pipeline_num_layers",
    "pipeline_model_parallel_layout": "pipeline_model_parallel_layout",
    "account_for_embedding_in_pipeline_split": "pipeline_model_parallel_layout",
    "account_for_loss_in_pipeline_split": "pipeline_model_parallel_layout",
    "overlap_p2p_comm": "virtual_pipeline_model_parallel_size",
    "batch_p2p_comm": "virtual_pipeline_model_parallel_size",
    "mtp_num_layers": "mtp_num_layers",
    "recompute_granularity": "recompute_granularity",
    "recompute_method": "recompute_method",
    "recompute_num_layers": "recompute_num_layers",
    "recompute_modules": "recompute_modules",
    "moe_layer_recompute": "recompute_modules",
    "overlap_grad_reduce": "overlap_grad_reduce",
    "overlap_param_gather": "overlap_param_gather",
    "use_distributed_optimizer": "use_distributed_optimizer",
    "optimizer": "optimizer",
    "lr": "lr",
    "min_lr": "min_lr",
    "weight_decay": "weight_decay",
    "adam_beta1": "adam_beta1",
    "adam_beta2": "adam_beta2",
    "adam_eps": "adam_eps",
    "decoupled_weight_decay": "optimizer",
    "sgd_momentum": "sgd_momentum",
    "clip_grad": "clip_grad",
}
"""Field -> the flag of mswift that says it."""

FROM_THE_MODEL = frozenset(
    {
        *("num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "ffn_hidden_size", "kv_channels"),
        *("softmax_scale", "softmax_type", "attention_output_gate", "multi_latent_attention", "no_rope_freq"),
        *("layernorm_epsilon", "layernorm_zero_centered_gamma", "normalization", "qk_layernorm", "qk_l2_norm"),
        *("add_bias_linear", "add_qkv_bias", "gated_linear_unit", "activation_func", "glu_linear_offset"),
        *("activation_func_clamp_value", "rotary_interleaved", "window_size", "window_attn_skip_freq", "mrope_section"),
        *("num_moe_experts", "moe_layer_freq", "moe_ffn_hidden_size", "moe_shared_expert_intermediate_size"),
        *("moe_shared_expert_gate", "moe_router_topk", "moe_router_topk_limited_devices", "moe_router_num_groups"),
        *("moe_router_group_topk", "moe_router_pre_softmax", "moe_router_topk_scaling_factor", "moe_latent_size"),
        *("moe_router_score_function", "moe_router_enable_expert_bias", "moe_apply_probs_on_input"),
        *("experimental_attention_variant", "dsa_indexer_n_heads", "dsa_indexer_head_dim", "dsa_indexer_topk"),
        *("linear_attention_freq", "linear_conv_kernel_dim", "linear_key_head_dim", "linear_value_head_dim"),
        *("linear_num_key_heads", "linear_num_value_heads", "is_hybrid_model", "mamba_state_dim", "mamba_head_dim"),
        *("mamba_num_groups", "mamba_num_heads", "heterogeneous_block_specs", "mtp_standalone"),
        *("apply_residual_connection_post_layernorm",),
    }
)

CHANGES_THE_FUNCTION = frozenset(
    {
        *("hidden_dropout", "attention_dropout", "fp32_residual_connection", "qk_clip", "qk_clip_alpha"),
        *("qk_clip_threshold", "test_mode", "apply_query_key_layer_scaling", "attention_softmax_in_fp32"),
        *("moe_router_load_balancing_type", "moe_aux_loss_coeff", "moe_z_loss_coeff", "moe_input_jitter_eps"),
        *("moe_token_dropping", "moe_expert_capacity_factor", "moe_pad_expert_input_to_capacity"),
        *(
            "moe_token_drop_policy",
            "moe_router_force_load_balancing",
            "moe_router_dtype",
            "moe_router_bias_update_rate",
        ),
        *("dsa_indexer_loss_coeff", "dsa_indexer_use_sparse_loss"),
        *("calculate_per_token_loss", "average_in_collective", "grad_reduce_in_fp32", "apply_wd_to_qk_layernorm"),
        *("cross_entropy_loss_fusion", "cross_entropy_fusion_impl", "decoupled_lr", "decoupled_min_lr"),
        *("symmetric_ar_type", "first_last_layers_bf16"),
    }
)

NEEDS_TRANSFORMER_ENGINE = frozenset(
    {
        *("fp8", "fp8_recipe", "fp8_param", "fp8_quantizer_factory", "fp8_margin", "fp8_interval"),
        *("fp8_amax_history_len", "fp8_amax_compute_algo", "fp8_wgrad", "fp8_dot_product_attention"),
        *(
            "fp8_multi_head_attention",
            "fp8_param_gather",
            "keep_fp8_transpose_cache",
            "activation_func_fp8_input_store",
        ),
        *("reuse_grad_buf_for_mxfp8_param_ag", "tp_only_amax_red", "num_layers_at_start_in_bf16"),
        *("num_layers_at_end_in_bf16", "fp4", "fp4_recipe", "fp4_param", "fp4_quantizer_factory", "quant_recipe"),
        *("use_kitchen", "use_kitchen_attention", "kitchen_attention_backend", "attention_backend"),
        *("tp_comm_overlap", "tp_comm_bulk_wgrad", "tp_comm_bulk_dgrad", "tp_comm_overlap_ag", "tp_comm_overlap_rs"),
        *("tp_comm_overlap_rs_dgrad", "tp_comm_split_ag", "tp_comm_atomic_ag", "tp_comm_split_rs"),
        *("tp_comm_atomic_rs", "tp_comm_overlap_disable_qkv", "tp_comm_overlap_disable_fc1"),
        *("tp_comm_bootstrap_backend", "delay_wgrad_compute", "overlap_moe_expert_parallel_comm"),
        *("ep_overlap_early_attn_memory_release", "cpu_offloading", "cpu_offloading_num_layers"),
        *("cpu_offloading_activations", "cpu_offloading_weights", "cpu_offloading_double_buffering"),
        *("fine_grained_activation_offloading", "offload_modules", "min_offloaded_tensor_size", "apply_rope_fusion"),
        *("fused_single_qkv_rope", "persist_layer_norm", "memory_efficient_layer_norm", "use_te_rng_tracker"),
        *("moe_grouped_gemm", "moe_use_legacy_grouped_gemm", "moe_permute_fusion", "moe_router_fusion"),
        *("moe_router_padding_for_quantization", "moe_router_padding_for_fp8", "use_fused_weighted_squared_relu"),
        *("use_precision_aware_optimizer", "store_param_remainders", "main_grads_dtype", "main_params_dtype"),
        *("exp_avg_dtype", "exp_avg_sq_dtype", "defer_embedding_wgrad_compute", "wgrad_deferral_limit"),
        *("disable_parameter_transpose_cache", "transformer_impl", "use_te_activation_func"),
    }
)

WITHOUT_EFFECT: Mapping[str, str] = {
    **dict.fromkeys(
        ("perform_initialization", "use_cpu_initialization", "init_method", "output_layer_init_method",
         "init_method_std", "embedding_init_method", "embedding_init_method_std", "init_model_with_meta_device"),
        "weights are loaded, nothing is drawn",
    ),
    **dict.fromkeys(
        ("bias_activation_fusion", "masked_softmax_fusion", "bias_dropout_fusion", "log_max_attention_logit",
         "use_mamba_mem_eff_path", "moe_enable_routing_replay", "moe_per_layer_logging"),
        "the layers of mswift have no such part",
    ),
    **dict.fromkeys(
        ("flash_decode", "batch_invariant_mode", "inference_rng_tracker", "inference_sampling_seed",
         "use_inference_optimized_layers", "inference_fuse_tp_communication", "mlp_chunks_for_prefill"),
        "it is for inference",
    ),
    **dict.fromkeys(
        ("optimizer_cpu_offload", "optimizer_offload_fraction", "use_torch_optimizer_for_cpu_offload",
         "overlap_cpu_optimizer_d2h_h2d", "pin_cpu_grads", "pin_cpu_params", "muon_momentum", "muon_split_qkv",
         "muon_use_nesterov", "muon_scale_mode", "muon_fp32_matmul_prec", "muon_num_ns_steps", "muon_tp_mode",
         "muon_extra_scale_factor", "overlap_param_gather_with_optimizer_step", "log_num_zeros_in_grad"),
        "the update is torch's own AdamW or SGD",
    ),
    **dict.fromkeys(
        ("loss_scale", "initial_loss_scale", "min_loss_scale", "loss_scale_window", "hysteresis"),
        "there is no fp16 training, so no loss scale",
    ),
    **dict.fromkeys(
        ("use_megatron_fsdp", "use_custom_fsdp", "data_parallel_sharding_strategy", "preserve_fp32_weights",
         "suggested_communication_unit_size", "fsdp_double_buffer", "outer_dp_sharding_strategy",
         "fsdp_manual_registration", "num_distributed_optimizer_instances", "align_param_gather"),
        "data parallelism is the distributed optimizer over all replicas",
    ),
    **dict.fromkeys(
        ("timers", "finalize_model_grads_func", "grad_scale_func", "no_sync_func", "grad_sync_func",
         "param_sync_func", "pipeline_model_parallel_comm_backend", "async_tensor_model_parallel_allreduce",
         "num_microbatches_with_partial_activation_checkpoints", "hetereogenous_dist_checkpoint",
         "barrier_with_L1_time", "gradient_reduce_div_fusion"),
        "the engine sets it, or megatron-core does not use it any more",
    ),
}  # fmt: skip
"""Field -> why setting it would change nothing."""


def reason_on_cpu(values: Mapping[str, object]) -> str | None:
    """Why these fields cannot be set where there is no GPU; None if they can."""
    for name, value in values.items():
        if name in NEEDS_GPU or (name, value) == ("moe_token_dispatcher_type", "flex"):
            return f"--mcore.{name} {value} needs a GPU, and this run computes on the CPU: leave it out"
    return None


def reason_against(name: str) -> str | None:
    """Why `--mcore.<name>` is refused on every machine; None if it is not."""
    if name in PASSED or name in NEEDS_GPU:
        return None
    if name in FLAGS:
        return f"megatron-core's {name} is what --{FLAGS[name]} says: use that flag"
    if name in FROM_THE_MODEL:
        return f"megatron-core's {name} follows from config.json of --model: another value is another model"
    if name in CHANGES_THE_FUNCTION:
        return f"megatron-core's {name} would change what is computed, which is the model's function: leave it out"
    if name in NEEDS_TRANSFORMER_ENGINE:
        return (
            f"megatron-core's {name} needs Transformer Engine or apex, and the layers here are PyTorch's: leave it out"
        )
    if name in WITHOUT_EFFECT:
        return f"megatron-core's {name} would have no effect: {WITHOUT_EFFECT[name]}; leave it out"
    return f"megatron-core's {name} is not known to this mswift, which cannot tell what it changes: leave it out"
