"""What a training run is: the frozen dataclasses behind `mswift pt` and `mswift sft`.

A field's docstring is its `--help` text. Names and meanings follow ms-swift where it has the same thing.
No field has a side effect; relations between fields are checked by `mswift.refusals`.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

_alias = tyro.conf.arg


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Fields shared by continued pretraining (`pt`) and supervised fine-tuning (`sft`)."""

    # -- model
    model: str
    """Hugging Face directory, or a directory made by `mswift convert`, or a checkpoint-N of a run."""
    torch_dtype: Literal["float32", "bfloat16"] | None = None
    """Parameters and activations; bfloat16 keeps fp32 master weights. Default: what the checkpoint holds."""
    backend: Literal["megatron"] = "megatron"
    """Training engine."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes the GPU where there is one."""

    # -- tuner
    tuner_type: Literal["full", "lora"] = "full"
    """Train every parameter, or LoRA adapters on a frozen base."""
    lora_rank: int = 8
    """Rank r of each adapter."""
    lora_alpha: float = 32
    """Adapters are scaled by lora_alpha / lora_rank."""
    target_modules: tuple[str, ...] = ("all-linear",)
    """HF module names that get an adapter (q_proj, down_proj, ...); all-linear is every linear but lm_head."""
    modules_to_save: tuple[str, ...] = ()
    """HF modules trained in full beside the adapters: embed_tokens, lm_head."""
    adapters: tuple[str, ...] = ()
    """PEFT adapter directory to continue from (one)."""

    # -- data
    dataset: tuple[str, ...] = ()
    """Files, folders or hub data sets to train on; PATH#N takes N rows of it, PATH:SUBSET a subset."""
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
    strict: bool = False
    """The first bad row is an error. Default: bad rows are left out, counted, and written to rejected.jsonl."""
    max_length: int = 2048
    """Tokens in a sample."""
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
    seed: int = 42
    """Order of the data, initialisation of adapters."""

    # -- optimizer
    optimizer: Literal["adam", "sgd"] = "adam"
    """adam is AdamW (decoupled weight decay); sgd has momentum."""
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
    """Decay of matrices: decoupled (adam), or added to the gradient (sgd). Vectors (norms, biases) have none."""
    adam_beta1: float = 0.9
    """Adam."""
    adam_beta2: float = 0.95
    """Adam."""
    adam_eps: float = 1e-8
    """Adam."""
    sgd_momentum: float = 0.9
    """SGD."""
    clip_grad: float = 1.0
    """Largest global gradient norm; 0 turns clipping off."""

    # -- layout
    tensor_model_parallel_size: int = 1
    """Ranks that share each layer (TP); divides the KV heads."""
    pipeline_model_parallel_size: int = 1
    """Pipeline stages (PP), 1F1B; divides the layers."""
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
    sequence_parallel: bool = False
    """Norms and residuals are split along the sequence inside a TP group."""
    nproc_per_node: int | None = None
    """Start this many processes here (torchrun). Default: join torchrun or SLURM if started by one, else one."""

    # -- checkpoints
    output_dir: str = "output"
    """Run directory: checkpoint-N/, metrics.jsonl, loss.png, run.json."""
    save_steps: int | None = None
    """Save every N steps; always at the end."""
    save_total_limit: int | None = None
    """Keep the newest N checkpoints."""
    resume: Literal["auto", "true", "false"] = "auto"
    """auto: continue the newest checkpoint in output_dir, or start. true: only continue. false: only start."""

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


@dataclass(frozen=True, kw_only=True)
class PtConfig(TrainConfig):
    """Continued pretraining on plain text: documents are joined and cut to max_length."""


@dataclass(frozen=True, kw_only=True)
class SftConfig(TrainConfig):
    """Supervised fine-tuning on conversations: the model's chat template, loss on assistant turns."""

    truncation_strategy: Literal["delete", "left", "right", "split", "raise"] = "delete"
    """A sample longer than max_length: leave it out, cut its beginning or its end, split it, or stop. All counted."""
    system: str | None = None
    """System message for rows that have none."""
