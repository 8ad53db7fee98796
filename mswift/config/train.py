"""What a training run is: the frozen dataclasses behind `mswift pt` and `mswift sft`.

A field's docstring is its `--help` text. Names and meanings follow ms-swift where it has the same thing.
No field has a side effect; relations between fields are checked by `mswift.refusals`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import tyro

from mswift.config.agents import AgentTemplate
from mswift.config.loss import LossFusion
from mswift.config.optimizers import OptimizerName

_alias = tyro.conf.arg
_Chunks = Annotated[int | None, _alias(aliases=["--num_virtual_stages_per_pipeline_rank"])]


TunerType = Literal[
    "full", "lora", "longlora", "llamapro", "adapter", "reft", "prompt", "ptuning", "prefix", "xlora",
    "adalora", "boft", "fourierft", "hra", "ia3", "loha", "lokr", "miss", "oft", "vblora", "vera",
]  # fmt: skip
"""What is trained; from adalora on they are rows of `mswift.tuners.methods`."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Fields shared by continued pretraining (`pt`) and supervised fine-tuning (`sft`)."""

    # -- model
    model: str
    """Hugging Face directory, or a directory made by `mswift convert`, or a checkpoint-N of a run."""
    torch_dtype: Literal["float32", "bfloat16"] | None = None
    """Parameters and activations; bfloat16 keeps fp32 master weights. Default: what the checkpoint holds."""
    rope_scaling: str | None = None
    """Train (and export) at more positions: '{"rope_type": "yarn", "factor": 4}' in place of the model's own scaling,
    or yarn or linear, whose factor then follows from max_model_len."""
    max_model_len: int | None = None
    """Positions of the trained model (max_position_embeddings). Default: its own x the factor of rope_scaling."""
    new_special_tokens: tuple[str, ...] = ()
    """Control tokens to add to the tokenizer, or a .txt file with one a line. Their rows start as the mean of the
    others; LoRA then trains embed_tokens and lm_head in full."""
    backend: Literal["megatron", "fsdp", "deepspeed", "ddp"] = "megatron"
    """Training engine: megatron-core's layers in any layout; or transformers' own model, its parameters cut over ranks
    (fsdp: PyTorch's FSDP2; deepspeed: ZeRO) or whole on each (ddp). Checkpoints are the same: a run may go on with
    another."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes the GPU where there is one."""

    mtp_num_layers: int | None = None
    """Train the model's multi-token-prediction layers, all of them: their number. Default: they stay as they came."""

    # -- tuner
    tuner_type: TunerType = "full"
    """Train every parameter (full), LoRA adapters on a frozen base (lora), new blocks in a frozen model (llamapro), or,
    not on megatron, LoRA with shifted sparse attention (longlora), Houlsby's adapters (adapter), LoReFT (reft), virtual
    tokens (prompt, ptuning) or keys (prefix) before every sequence, a classifier that mixes LoRAs token by token
    (xlora), adapters of another method of PEFT."""
    tuner_config: str | None = None
    """Fields of PEFT's configuration of a method other than LoRA, as JSON: '{"oft_block_size": 64}'."""
    lora_rank: int = 8
    """Rank r of each adapter."""
    lora_alpha: float = 32
    """Adapters are scaled by lora_alpha / lora_rank. (adalora, loha, lokr too.)"""
    use_rslora: bool = False
    """Adapters are scaled by lora_alpha / sqrt(lora_rank)."""
    use_dora: bool = False
    """DoRA: the length of every row of the adapted weight is trained as well."""
    lora_dropout: float = 0.0
    """Share of the inputs of adapters that are zeroed in training."""
    init_weights: str = "true"
    """Start of adapters: true (A random, B zero), pissa, pissa_niter_N (N iterations), olora; from the first batches of
    the run (fsdp, ddp) eva, lora_ga."""
    init_batches: int = 8
    """eva, lora_ga: global batches to start from, the first ones of the run."""
    lora_ga_direction: Literal["ArB2r", "ArBr", "A2rBr", "random"] = "ArB2r"
    """lora_ga: which singular vectors of a gradient A and B get: A the first r, B the next (ArB2r), ..."""
    lora_ga_scale: Literal["stable", "weight_svd", "gd_scale", "unit"] = "stable"
    """lora_ga: how large A and B start."""
    lora_ga_stable_gamma: int = 16
    """lora_ga: of the scale stable."""
    lorap_lr_ratio: float | None = None
    """LoRA+: B learns this many times faster than A; 16 is usual."""
    quant_method: Literal["bnb", "gptq", "awq"] | None = None
    """QLoRA: the linears of the frozen base are kept in four bits: by bitsandbytes (bnb; pip install 'mswift[quant]'),
    or as the checkpoint has them (gptq, awq)."""
    quant_bits: Literal[4] | None = None
    """Bits of a weight with bnb, which needs it; the output layer, embeddings, routers and norms stay as they are."""
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    """bnb: the 16 values that a 4-bit weight can have; 64 weights share an fp32 scale."""
    target_modules: tuple[str, ...] = ("all-linear",)
    """HF module names that get an adapter (q_proj, down_proj, ...); all-linear: every linear but lm_head, and experts
    with their router."""
    target_parameters: tuple[str, ...] = ()
    """Parameters that get one: stacked experts (experts.gate_up_proj, experts.down_proj) and routers (gate.weight)."""
    modules_to_save: tuple[str, ...] = ()
    """HF modules trained in full beside the adapters: embed_tokens, lm_head; norm (not megatron): all norms."""
    adapters: tuple[str, ...] = ()
    """PEFT adapter directory to continue from (one)."""
    xlora_adapters: tuple[str, ...] = ()
    """xlora: PEFT directories of the LoRAs to mix, by scales from a pass of the base model before every pass. They stay
    as they are, unless tuner_config has '{"use_trainable_adapters": true}'."""

    freeze_parameters_ratio: float = 0.0
    """full: freeze the first parameters of the model, as many as have this share of its elements."""
    freeze_parameters: tuple[str, ...] = ()
    """full: freeze the parameters whose names begin so."""
    freeze_parameters_regex: str | None = None
    """full: freeze the parameters whose names this expression finds."""
    trainable_parameters: tuple[str, ...] = ()
    """full: train the parameters whose names begin so, whatever else is frozen."""
    trainable_parameters_regex: str | None = None
    """full: train the parameters whose names this expression finds, whatever else is frozen."""
    adapter_length: int = 128
    """adapter: width of the bottleneck behind attention and MLP of every layer."""
    adapter_act: Literal["gelu", "relu", "silu", "tanh"] = "gelu"
    """adapter: activation of the bottleneck."""
    reft_rank: int = 4
    """reft: rank of the intervention behind a layer."""
    reft_layers: tuple[int, ...] = ()
    """reft: numbers of the layers with one, from 0. Default: all."""
    lisa_activated_layers: int = 0
    """LISA (full; fsdp, ddp): train this many layers at a time, drawn anew by the seed, and the ends of the model."""
    lisa_step_interval: int = 20
    """LISA: steps with the same layers."""
    llamapro_num_new_blocks: int = 4
    """llamapro: blocks to add, which alone are trained; they start as copies that change nothing."""
    llamapro_num_groups: int | None = None
    """llamapro: groups of layers, behind each of which equally many blocks are added. Default: as many as blocks."""
    neftune_noise_alpha: float = 0.0
    """NEFTune: noise on embeddings of training batches, uniform in +-alpha / sqrt(length x hidden)."""

    # -- data
    dataset: tuple[str, ...] = ()
    """Files, folders or hub data sets to train on; PATH#N takes N rows of it, PATH:SUBSET a subset. Or one YAML file
    that lists them, each with its weight or its epochs."""
    dataset_weights: tuple[float, ...] = ()
    """Shares of the items of dataset in an epoch, one number each. Default: every sample once."""
    dataset_sampling: Literal["without_replacement", "with_replacement", "first"] = "without_replacement"
    """PATH#N: draw the N rows by the seed (more than there are: all, N // rows times, and the rest drawn), draw them
    with replacement, or take the first N."""
    val_dataset: tuple[str, ...] = ()
    """Files to evaluate on, whole, every eval_steps and at the end; PATH#N takes the first N rows."""
    split_dataset_ratio: float = 0.0
    """Share of the rows of dataset that is not trained on but evaluated on; in place of val_dataset."""
    columns: str | None = None
    """Columns with other names, as JSON: '{"my_question": "query", "my_answer": "response"}'."""
    chat_template: str | None = None
    """Chat template in place of the tokenizer's own, saved with the model: a .jinja file, a .json file that holds one,
    or the name of one of the tokenizer's."""
    strict: bool = False
    """The first bad row is an error. Default: bad rows are left out, counted, and written to rejected.jsonl."""
    max_length: int = 2048
    """Tokens in a sample."""
    packing: bool = False
    """Rows of several samples that do not see each other; a batch then counts in such packs. pt: a sample is a document
    (of more than max_length: pieces of it)."""
    packing_strategy: Literal["bestfit", "sequential", "concat-and-split"] = "bestfit"
    """Which samples share a row: the best fit, longest first (least padding); sequential: the next ones in file order,
    as long as they fit; concat-and-split (pt): the next ones, cut where a row ends (no padding)."""
    packing_length: int | None = None
    """Positions of a packed row. Default: max_length; concat-and-split has no other."""
    streaming: bool = False
    """Tokenise while training, a block of rows at a time, for data that is not to be tokenised whole before the first
    step; samples are shuffled (and packed) within a block. Needs train_iters."""
    streaming_block_rows: int = 100_000
    """streaming: rows of a block, in file order; fewer where they have more than 256 MiB."""
    dataset_num_proc: int | None = None
    """Processes that tokenise; decides no token. Default: one a processor, up to 8; 1 for less than 16 MiB of data."""
    cache_dir: str | None = None
    """Where tokenised data sets are kept. Default: $MSWIFT_CACHE or ~/.cache/mswift."""

    # -- batch and length of the run
    micro_batch_size: int = 1
    """Samples in one forward pass of one data-parallel rank."""
    global_batch_size: int = 16
    """Samples in one optimizer step; a multiple of micro_batch_size x data-parallel size."""
    train_iters: int | None = None
    """Optimizer steps; 0 lays the weights out and saves them. Exactly one of train_iters and num_train_epochs."""
    num_train_epochs: float | None = None
    """Passes over the data set."""
    cross_entropy_loss_fusion: LossFusion = "auto"
    """Output layer and loss in pieces, so that a microbatch's logits never exist as a whole. auto: from 8192 tokens."""
    loss_normalization: Literal["token", "sample"] = "token"
    """token: the loss is the weighted sum of a global batch's tokens, divided by the sum of the weights. sample: the
    weights of every sample are first divided by their sum, so that long and short ones count the same."""
    seed: int = 42
    """Order of the data, initialisation of adapters."""

    # -- optimizer
    optimizer: OptimizerName = "adam"
    """adam is AdamW (decoupled weight decay); sgd has momentum. Not megatron: lion. fsdp, ddp: adafactor; adamw_8bit
    (bitsandbytes); and for the matrices of layers, with adam for the rest: muon, galore, apollo (pip install
    'mswift[optim]')."""
    lr: Annotated[float, _alias(aliases=["--learning_rate"])] = 1e-5
    """Peak learning rate."""
    min_lr: float = 0.0
    """Learning rate at the end of the decay."""
    lr_decay_style: Literal["cosine", "linear", "constant", "WSD"] = "cosine"
    """Shape of the decay after the warm-up."""
    lr_decay_iters: int | None = None
    """Steps until min_lr. Default: the length of the run."""
    lr_warmup_iters: int = 0
    """Steps of linear warm-up from 0."""
    lr_wsd_decay_iters: int | None = None
    """WSD: length of the final decay in steps. Default: a tenth of the run."""
    lr_wsd_decay_style: Literal["linear", "cosine", "exponential", "minus_sqrt"] = "linear"
    """WSD: shape of the final decay."""
    weight_decay: float = 0.1
    """Decay of matrices: decoupled, or added to the gradient (sgd). Vectors (norms, biases) have none."""
    adam_beta1: float = 0.9
    """adam, adamw_8bit, galore, apollo; also lion's."""
    adam_beta2: float = 0.95
    """As adam_beta1; 0.99 is usual for lion."""
    adam_eps: float = 1e-8
    """As adam_beta1, but lion has none."""
    sgd_momentum: float = 0.9
    """SGD."""
    muon_momentum: float = 0.95
    """muon."""
    galore_rank: int = 128
    """galore, apollo: rows or columns that a gradient is projected to; smaller matrices have adam."""
    galore_update_proj_gap: int = 200
    """galore, apollo: steps with the same projection."""
    galore_scale: float | None = None
    """galore, apollo: factor of the update (apollo: its square). Default: 0.25, apollo 1."""
    galore_quantization: bool = False
    """galore becomes Q-GaLore: projections in few bits, found anew ever less often where they change little, moments in
    8 bits, those of the rest of the model too, embedding and vectors excepted. Weights stay fp32."""
    galore_proj_quant: bool = True
    """galore_quantization: projections in galore_proj_bits; false: in fp32."""
    galore_proj_bits: Literal[4, 8] = 4
    """galore_quantization: bits of an element of a projection."""
    galore_proj_group_size: int = 256
    """galore_quantization: elements of a projection with one scale."""
    galore_cos_threshold: float = 0.4
    """galore_quantization: |cosine| of successive projections' first directions, on average over galore_queue_size of
    them, from which on galore_update_proj_gap is multiplied by galore_gamma_proj; above 1: never."""
    galore_gamma_proj: int = 2
    """galore_quantization: factor of the gap."""
    galore_queue_size: int = 5
    """galore_quantization: cosines that are averaged."""
    clip_grad: float = 1.0
    """Largest global gradient norm; 0 turns clipping off."""

    # -- layout
    tensor_model_parallel_size: int = 1
    """Ranks that share each layer (TP); divides the KV heads."""
    pipeline_model_parallel_size: int = 1
    """Pipeline stages (PP), 1F1B; divides the layers, unless the flags below cut them otherwise."""
    virtual_pipeline_model_parallel_size: _Chunks = None
    """Model chunks of each stage (VPP), interleaved: less idle time, more messages. Default: 1."""
    num_layers_per_virtual_pipeline_stage: int | None = None
    """VPP by the layers of a chunk instead of by the number of chunks."""
    decoder_first_pipeline_num_layers: int | None = None
    """Layers of the first stage, which has the embedding too; the other stages share the rest equally."""
    decoder_last_pipeline_num_layers: int | None = None
    """Layers of the last stage, which has the logits too."""
    pipeline_model_parallel_layout: str | None = None
    """Where every layer lies, in megatron-core's notation: 'Et|(tt|)*2,L' for E embedding, t layer, L loss; chunks in
    the order in which they compute, chunk c on stage c modulo PP."""
    context_parallel_size: int = 1
    """Ranks that share each sequence (CP)."""
    cp_comm_type: Literal["p2p", "all_gather", "a2a", "a2a+p2p"] = "p2p"
    """How attention crosses CP ranks: keys round a ring, gathered keys, heads for positions, the latter in a ring."""
    hierarchical_context_parallel_sizes: tuple[int, ...] = ()
    """a2a+p2p: CP ranks that exchange heads (next to each other), and how many such groups form the ring."""
    expert_model_parallel_size: int = 1
    """Ranks that share the experts of each layer (EP); divides the number of experts."""
    expert_tensor_parallel_size: int | None = None
    """Ranks that share each expert (ETP). Default: tensor_model_parallel_size."""
    sequence_parallel_size: int | None = None
    """Ranks that share each sequence, in place of the flags of context parallelism: as many as the KV heads allow
    exchange heads (Ulysses), and keys travel round a ring of such groups."""
    sequence_parallel: bool = False
    """Norms and residuals are split along the sequence inside a TP group."""
    use_distributed_optimizer: bool = True
    """Every data-parallel rank updates its share of the weights; the only way there is."""
    overlap_grad_reduce: bool = False
    """Sum gradients over data-parallel ranks while the backward pass goes on."""
    overlap_param_gather: bool = False
    """Gather updated weights while the next forward pass goes on; needs overlap_grad_reduce."""
    gradient_accumulation_fusion: bool = False
    """Add weight gradients to the fp32 sum inside the matrix product; needs a GPU and apex's CUDA extension."""
    fsdp_shard_size: int | None = None
    """fsdp: ranks that share the parameters; groups of as many hold a copy each (HSDP). Default: all ranks."""
    fsdp_reshard_after_forward: bool = True
    """fsdp: let a layer's gathered parameters go after its forward pass, and gather them again for the backward one."""
    fsdp_cpu_offload: bool = False
    """fsdp: parameters, gradients and optimizer state in host memory, where updates are computed too."""
    deepspeed: str | None = None
    """deepspeed: zero1 (optimizer state and fp32 masters cut over ranks), zero2 (gradients too), zero3 (parameters
    too), zero2_offload (state in host memory), zero3_offload (parameters too); or FILE.json, DeepSpeed's own
    configuration, in which "auto" is whatever the flags say. Default: zero2."""
    use_liger_kernel: bool = False
    """fsdp, ddp, on GPUs: norms, rotation and activations by Liger's Triton kernels (pip install 'mswift[liger]'). The
    loss stays mswift's, fused or not (--cross_entropy_loss_fusion)."""
    torch_compile: bool = False
    """fsdp, ddp: compile what is inside of each layer, attention left out; a minute or more before the first step."""
    recompute_granularity: Literal["full", "selective"] | None = None
    """What is computed again in the backward pass instead of kept: whole layers, or some modules of each layer (not
    megatron: all of each layer but products of matrices and attention)."""
    recompute_method: Literal["uniform", "block"] | None = None
    """full: uniform keeps the input of every recompute_num_layers-th layer, block recomputes that many layers."""
    recompute_num_layers: int | None = None
    """full: see recompute_method; counted in each model chunk of a stage."""
    recompute_modules: tuple[Literal["core_attn", "layernorm", "mlp", "moe", "shared_experts"], ...] = ()
    """selective: which modules. Default: core_attn."""
    mcore: Annotated[Mapping[str, Any], tyro.conf.Suppress] = field(default_factory=dict)
    """Fields of megatron-core's TransformerConfig, DistributedDataParallelConfig and OptimizerConfig, by name."""
    nproc_per_node: int | None = None
    """Start this many processes here (torchrun). Default: join torchrun or SLURM if started by one, else one."""

    # -- checkpoints
    output_dir: str = "output"
    """Run directory: checkpoint-N/, metrics.jsonl, run.jsonl, run.yaml, loss.png."""
    save_steps: int | None = None
    """Save every N steps; always at the end, and when SIGTERM or SIGUSR1 stops the run."""
    async_save: bool = False
    """Write checkpoints while training goes on; steps wait only for a copy of the state to host memory."""
    save_total_limit: int | None = None
    """Keep the newest N checkpoints."""
    save_hf_steps: int | None = None
    """Write the model (a LoRA run: its adapter) as Hugging Face files to output_dir/hf-N every N steps."""
    resume: Literal["auto", "true", "false"] = "auto"
    """auto: continue the newest checkpoint in output_dir, or start. true: only continue. false: only start."""
    damaged_checkpoint: Literal["stop", "previous"] = "stop"
    """Where the newest checkpoint is damaged: stop, or set it aside and continue from the one before."""
    resume_from_checkpoint: str | None = None
    """checkpoint-N (or run directory) of another run to go on from while output_dir has no checkpoint of its own."""
    load_weights_only: bool = False
    """Of resume_from_checkpoint take the weights (a LoRA run: the adapter) only: step 0, new schedule and data."""

    # -- faults
    nan_policy: Literal["stop", "skip"] = "stop"
    """A loss or gradient norm of nan or inf: stop, or leave this update out. The batch is kept in output_dir."""
    distributed_timeout_minutes: float = 30.0
    """A rank that others wait for longer than this is hung: stacks are written to output_dir, the job ends."""

    # -- watching
    eval_steps: int | None = None
    """Evaluate every N steps (needs val_dataset); always at the end."""
    logging_steps: int = 1
    """Print a line every N steps where there is no progress bar; metrics.jsonl has every step."""
    tensorboard: bool = True
    """Write TensorBoard events to output_dir/runs."""

    # -- planning
    dry_run: bool = False
    """Print layout, batch arithmetic and memory; start nothing."""
    world_size: int | None = None
    """dry_run: pretend this many ranks."""

    @property
    def trains_adapter(self) -> bool:
        """Whether the base stays as it is, and a checkpoint holds an adapter alone."""
        return self.tuner_type not in ("full", "llamapro")

    @property
    def trains_lora(self) -> bool:
        """Whether that adapter is a LoRA."""
        return self.tuner_type in ("lora", "longlora")

    @property
    def row_length(self) -> int:
        """Most positions of a row of a batch."""
        return self.packing_length or self.max_length


@dataclass(frozen=True, kw_only=True)
class PtConfig(TrainConfig):
    """Continued pretraining on plain text: documents are joined and cut to max_length, or packed."""

    command: ClassVar[str] = "pt"
    """What a recipe says that is for it: `command: pt`."""

    data_path: tuple[str, ...] = ()
    """In place of dataset: prefixes of megatron-core's .bin and .idx files (documents that are tokens already), or
    weights and prefixes by turns: 0.3 a 0.7 b. Nothing is tokenised or copied."""


@dataclass(frozen=True, kw_only=True)
class SftConfig(TrainConfig):
    """Supervised fine-tuning on conversations: the model's chat template, loss on assistant turns."""

    command: ClassVar[str] = "sft"
    """What a recipe says that is for it: `command: sft`."""

    agent_template: AgentTemplate | None = None
    """How rows with tools, calls and results become text. Default: by the chat template, which gets the tools."""
    truncation_strategy: Literal["delete", "left", "right", "split", "raise"] = "delete"
    """A sample longer than max_length: leave it out, cut its beginning or its end, split it, or stop. All counted."""
    system: str | None = None
    """System message for rows that have none."""
    loss_scale: str = "default"
    """What is learned: default (assistant turns), last_round (those after the user's last message), all (every token);
    and tables of weights (react, hermes, ignore_empty_think, ..., or file.json), joined: last_round+react."""
    enable_channel_loss: bool = False
    """Report the loss of the rows of every `channel` (a text in the row) apart: channel_loss in metrics.jsonl."""
