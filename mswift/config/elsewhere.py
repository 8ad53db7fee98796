"""Names that other programs have for an option of mswift: ms-swift, Megatron-LM, transformers' Trainer, LLaMA-Factory.

The nearest spelling of such a name is another option (of `--warmup_ratio`: `--lorap_lr_ratio`); these come first.
"""

from collections.abc import Iterable

FLAGS = {
    "train_type": "--tuner_type",
    "sft_type": "--tuner_type",
    "finetuning_type": "--tuner_type",
    "model_id_or_path": "--model",
    "model_name_or_path": "--model",
    "pretrained_model_name_or_path": "--model",
    "load": "--model (a checkpoint to begin with), or --resume_from_checkpoint",
    "load_dir": "--model (a checkpoint to begin with), or --resume_from_checkpoint",
    "ckpt_dir": "--model of a whole model, --adapters of an adapter",
    "save": "--output_dir",
    "save_dir": "--output_dir",
    "logging_dir": "--output_dir",
    "lora_r": "--lora_rank",
    "use_galore": "--optimizer galore",
    "load_in_4bit": "--quant_method bnb --quant_bits 4",
    "quantization_bit": "--quant_method bnb --quant_bits 4",
    "per_device_train_batch_size": "--micro_batch_size",
    "gradient_accumulation_steps": "--global_batch_size (samples of a step, on all ranks)",
    "per_device_eval_batch_size": "--micro_batch_size",
    "max_steps": "--train_iters",
    "max_epochs": "--num_train_epochs",
    "train_samples": "--train_iters (steps of --global_batch_size samples)",
    "seq_length": "--max_length",
    "max_seq_length": "--max_length",
    "max_seq_len": "--max_length",
    "cutoff_len": "--max_length",
    "lr_scheduler_type": "--lr_decay_style",
    "warmup_ratio": "--lr_warmup_iters (steps)",
    "lr_warmup_fraction": "--lr_warmup_iters (steps)",
    "warmup_steps": "--lr_warmup_iters",
    "optim": "--optimizer",
    "max_grad_norm": "--clip_grad",
    "bf16": "--torch_dtype bfloat16",
    "fp16": "--torch_dtype bfloat16",
    "gradient_checkpointing": "--recompute_granularity full --recompute_method uniform --recompute_num_layers 1",
    "recompute_activations": "--recompute_granularity selective",
    "save_interval": "--save_steps",
    "save_strategy": "--save_steps",
    "eval_interval": "--eval_steps",
    "eval_strategy": "--eval_steps",
    "log_interval": "--logging_steps",
    "logging_strategy": "--logging_steps",
    "finetune": "--resume_from_checkpoint with --load_weights_only",
    "resume_only_model": "--load_weights_only",
    "lora_plus": "--lorap_lr_ratio",
    "loraplus_lr_ratio": "--lorap_lr_ratio",
    "data_seed": "--seed",
    "eval_dataset": "--val_dataset",
    "template": "--chat_template (the tokenizer's own without it)",
    "lazy_tokenize": "--streaming",
    "dataloader_num_workers": "--dataset_num_proc (processes that tokenise)",
    "preprocessing_num_workers": "--dataset_num_proc",
    "num_workers": "--dataset_num_proc (processes that tokenise)",
    "tp_size": "--tensor_model_parallel_size",
    "pp_size": "--pipeline_model_parallel_size",
    "cp_size": "--context_parallel_size",
    "ep_size": "--expert_model_parallel_size",
    "ulysses_size": "--sequence_parallel_size",
    "fsdp": "--backend fsdp",
    "config": "RECIPE.yaml without a flag",
    "config_file": "RECIPE.yaml without a flag",
    "merge_lora": "the command mswift merge",
    "report_to": "--tensorboard (and metrics.jsonl)",
}
"""Name of a flag elsewhere -> what it is here, the flag first. A command with a flag of that name means its own."""

VALUES = {
    ("tuner_type", "qlora"): "--tuner_type lora --quant_method bnb --quant_bits 4",
    ("tuner_type", "dora"): "--tuner_type lora --use_dora",
    ("tuner_type", "rslora"): "--tuner_type lora --use_rslora",
    ("tuner_type", "pissa"): "--tuner_type lora --init_weights pissa",
    ("tuner_type", "galore"): "--tuner_type full --optimizer galore",
    ("tuner_type", "lisa"): "--tuner_type full --lisa_activated_layers 2",
    ("tuner_type", "freeze"): "--tuner_type full --freeze_parameters",
    ("tuner_type", "bone"): "--tuner_type miss",
    ("optimizer", "adamw"): "--optimizer adam, which is AdamW",
    ("optimizer", "adamw_torch"): "--optimizer adam, which is AdamW",
    ("torch_dtype", "bf16"): "--torch_dtype bfloat16",
    ("torch_dtype", "fp32"): "--torch_dtype float32",
}
"""Option and value elsewhere -> what it is here."""


def flag_hint(name: str, known: Iterable[str]) -> str:
    """The hint that ends an error line about the flag or key `name`, or nothing: where `known` lacks its flag, too."""
    here = FLAGS.get(name, "")
    there = not here.startswith("--") or here.split()[0].removeprefix("--") in set(known)
    return f"; here that is {here}" if here and there else ""


def value_hint(option: str, value: str, known: Iterable[str]) -> str:
    """The hint that ends an error line about `value` of `option`, or nothing."""
    here = VALUES.get((option, value.lower()), "")
    flags = [word.strip(",").removeprefix("--") for word in here.split() if word.startswith("--")]
    return f"; here that is {here}" if here and set(flags) <= set(known) else ""
