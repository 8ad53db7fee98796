"""The table of commands. A row names modules as text: they are imported when the command is asked for."""

from dataclasses import dataclass
from importlib import import_module
from typing import Any


@dataclass(frozen=True)
class Command:
    """`config` is the dataclass of the options, `run` a function of it that returns the exit status."""

    summary: str
    config: str
    run: str
    example: str


COMMANDS = {
    "pt": Command(
        summary="continue pretraining on plain text",
        config="mswift.config.train:PtConfig",
        run="mswift.train.run:pt",
        example="mswift pt --model Qwen3-0.6B --dataset books.txt --max_length 2048 --train_iters 1000 "
        "--lr 2e-5 --nproc_per_node 2 --tensor_model_parallel_size 2 --output_dir runs/pt",
    ),
    "sft": Command(
        summary="fine-tune on conversations, in full or with LoRA",
        config="mswift.config.train:SftConfig",
        run="mswift.train.run:sft",
        example="mswift sft --model Qwen3-0.6B --dataset chats.jsonl --tuner_type lora --lora_rank 16 "
        "--lr 1e-4 --num_train_epochs 1 --output_dir runs/sft",
    ),
    "launch": Command(
        summary="a recipe here, on several machines, or on a SLURM cluster",
        config="mswift.config.launch:LaunchConfig",
        run="mswift.cli.launch:main",
        example="mswift launch slurm recipe.yaml --nodes 2 --site site.yaml --output_dir runs/sft --dry_run",
    ),
    "status": Command(
        summary="what a run is doing: step, loss, speed, time left, checkpoint, goodput",
        config="mswift.config.status:StatusConfig",
        run="mswift.status:main",
        example="mswift status runs/sft",
    ),
    "doctor": Command(
        summary="prove a layout on this machine: the same loss and gradients as one rank",
        config="mswift.config.doctor:DoctorConfig",
        run="mswift.train.doctor:main",
        example="mswift doctor layout --model Qwen3-0.6B --tensor_model_parallel_size 2 --sequence_parallel true",
    ),
    "convert": Command(
        summary="a Hugging Face checkpoint to Megatron's torch_dist, or back, with its proof",
        config="mswift.config.convert:ConvertConfig",
        run="mswift.converters.commands:convert",
        example="mswift convert --model Qwen3-0.6B --to megatron --output_dir Qwen3-0.6B-megatron",
    ),
    "verify": Command(
        summary="prove two checkpoints equal, or name the first differences",
        config="mswift.config.convert:VerifyConfig",
        run="mswift.converters.commands:verify",
        example="mswift verify Qwen3-0.6B Qwen3-0.6B-megatron",
    ),
    "export": Command(
        summary="a run or checkpoint to a Hugging Face model or a PEFT adapter",
        config="mswift.config.export:ExportConfig",
        run="mswift.handover.export:main",
        example="mswift export --model runs/sft --output_dir Qwen3-0.6B-adapter",
    ),
    "handover": Command(
        summary="prove that vLLM computes an exported model as it was trained",
        config="mswift.config.handover:HandoverConfig",
        run="mswift.handover.gate:main",
        example="mswift handover Qwen3-0.6B-mine --run runs/sft",
    ),
    "merge": Command(
        summary="fold adapters into a copy of their base model",
        config="mswift.config.merge:MergeConfig",
        run="mswift.tuners.merge:main",
        example="mswift merge --model Qwen3-0.6B --adapters Qwen3-0.6B-adapter --output_dir Qwen3-0.6B-merged",
    ),
    "data": Command(
        summary="show rows as training sees them, tokenise a data set ahead, say what is in it",
        config="mswift.config.data:DataConfig",
        run="mswift.data.commands:main",
        example="mswift data show --model Qwen3-0.6B --dataset chats.jsonl --num_rows 3",
    ),
    "infer": Command(
        summary="chat, answer prompts, or answer a data set to a file",
        config="mswift.config.infer:InferConfig",
        run="mswift.infer.run:main",
        example='mswift infer --model Qwen3-0.6B --adapters Qwen3-0.6B-adapter --prompt "Who are you?"',
    ),
    "eval": Command(
        summary="score a model on local files, or compare the scores of two",
        config="mswift.config.eval:EvalConfig",
        run="mswift.eval.run:main",
        example="mswift eval --model Qwen3-0.6B --eval_dataset arc=arc_challenge.jsonl humaneval=HumanEval.jsonl.gz "
        "--eval_output_dir runs/eval",
    ),
    "sample": Command(
        summary="several answers to each row, scored; the best as training data; pass@k",
        config="mswift.config.sample:SampleConfig",
        run="mswift.eval.sample:main",
        example="mswift sample --model Qwen3-0.6B --val_dataset sums.jsonl --num_samples 8 "
        "--result_path samples.jsonl --best_path best.jsonl",
    ),
    "deploy": Command(
        summary="serve a model and its adapters with OpenAI's routes",
        config="mswift.config.deploy:DeployConfig",
        run="mswift.infer.server.run:main",
        example="mswift deploy --model Qwen3-0.6B --adapters mine=Qwen3-0.6B-adapter --port 8000",
    ),
    "app": Command(
        summary="a chat page over a server, or over one that it starts",
        config="mswift.config.app:AppConfig",
        run="mswift.infer.app.run:main",
        example="mswift app --model Qwen3-0.6B --port 7860",
    ),
}


def load(reference: str) -> Any:
    """The object that "module:name" refers to."""
    module, _, name = reference.partition(":")
    return getattr(import_module(module), name)
