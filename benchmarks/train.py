"""Tokens per second and memory of one-rank training on the CPU against transformers and plain megatron-core.

    python benchmarks/train.py [--model llama|moe] [--tuner full|lora] [--size 34M] [--rounds 7] [--threads 1]
        [--write benchmarks/results/train.md]

Contenders, each in a process of its own, one running at a time, in rotated order: mswift's engines (megatron; ddp:
transformers' model, LoRA by PEFT, experts not adapted); transformers (SDPA)
in a plain loop with torch.optim.AdamW, as it comes and fused; transformers' Trainer; megatron-core in a plain loop:
its own GPTModel of its local layer specification, its DDP, optimizer and schedule, with the linears that mswift puts
into megatron-core on a CPU, so that the difference is what mswift adds. LoRA: rank 8 on all linears (experts and
router included), by PEFT; megatron-core has none. Same model, batch, clipping, fp32, threads. A round is one optimizer
step; medians, least and most are printed, and the ratios of the medians (above 1: mswift is faster, or holds less).
CPU seconds leave out the time that other processes took. Memory is the peak resident set beyond that before the model
was built.
"""

import argparse
import multiprocessing
import os
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from measure import cpu_name, peak_bytes, publish, resident_bytes, training_table

SIZES: dict[str, dict[str, Any]] = {
    "10M": {"hidden_size": 320, "intermediate_size": 896, "num_hidden_layers": 6, "vocab_size": 4096},
    "34M": {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "vocab_size": 8192},
    "100M": {"hidden_size": 768, "intermediate_size": 2304, "num_hidden_layers": 12, "vocab_size": 8192},
}
HEADS = {"10M": (5, 5), "34M": (8, 4), "100M": (12, 4)}
MOE = {"num_experts": 8, "num_experts_per_tok": 2, "norm_topk_prob": True, "router_aux_loss_coef": 0.0}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
SEED = 11


def model_config(size: str, model: str = "llama") -> dict[str, Any]:
    """config.json of the model; moe: of Qwen3's kind, 8 experts a layer, each half as wide as the dense MLP."""
    heads, groups = HEADS[size]
    if model == "moe":
        return {
            **model_config(size), "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], **MOE,
            "moe_intermediate_size": SIZES[size]["intermediate_size"] // 2, "decoder_sparse_step": 1,
            "mlp_only_layers": [], "head_dim": SIZES[size]["hidden_size"] // heads,
        }  # fmt: skip
    return {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "rms_norm_eps": 1e-5,
        "num_attention_heads": heads, "num_key_value_heads": groups, "max_position_embeddings": 2048,
        "tie_word_embeddings": False, "rope_theta": 10000.0, **SIZES[size],
    }  # fmt: skip


def batches(size: str, args: argparse.Namespace) -> list[Any]:
    """Microbatches [b, s + 1] of one step."""
    import torch

    generator = torch.Generator().manual_seed(SEED)
    shape = (args.microbatches, args.batch, args.length + 1)
    return list(torch.randint(0, SIZES[size]["vocab_size"], shape, generator=generator))


def transformers_model(args: argparse.Namespace) -> Any:
    """The model, with PEFT's adapters if they are what is trained."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(SEED)
    config = AutoConfig.for_model(**model_config(args.size, args.model), use_cache=False)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").train()
    if args.tuner == "lora":
        from peft import LoraConfig, get_peft_model

        experts = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj", "gate.weight"]}
        model = get_peft_model(
            model, LoraConfig(r=8, lora_alpha=32, target_modules="all-linear" if args.model == "llama" else ATTENTION,
                              **(experts if args.model == "moe" else {}))
        )  # fmt: skip
    return model


def transformers_step(args: argparse.Namespace, fused: bool) -> Any:
    """A function that makes one step of the plain loop and returns the loss."""
    import torch

    model = transformers_model(args)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.1, fused=fused or None)
    data = batches(args.size, args)

    def step() -> float:
        total = 0.0
        for tokens in data:
            # transformers shifts labels itself and gives the mean over the microbatch
            inputs, labels = tokens[:, :-1], tokens[:, :-1].clone()
            loss = model(input_ids=inputs, labels=labels).loss / len(data)
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total

    return step


def run_trainer(args: argparse.Namespace, pipe: Connection) -> None:
    """Let Trainer train; each of its steps waits for a message and is answered for."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    model, before = transformers_model(args), [0.0, 0.0]
    rows = [{"input_ids": row[:-1], "labels": row[:-1].clone()} for rows in batches(args.size, args) for row in rows]

    class Waits(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, arguments: Any, state: Any, control: Any, **_: Any) -> None:
            if pipe.recv() is None:
                os._exit(0)
            before[:] = time.perf_counter(), time.process_time()

        def on_step_end(self, arguments: Any, state: Any, control: Any, **_: Any) -> None:
            pipe.send((time.perf_counter() - before[0], time.process_time() - before[1], peak_bytes()))

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, per_device_train_batch_size=args.batch, gradient_accumulation_steps=args.microbatches,
            max_steps=10**6, learning_rate=1e-4, weight_decay=0.1, max_grad_norm=1.0, save_strategy="no",
            report_to=[], logging_strategy="no", disable_tqdm=True, use_cpu=True, dataloader_drop_last=True,
        )  # fmt: skip
        Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[Waits()]).train()


def megatron_model(args: argparse.Namespace) -> Any:
    """megatron-core's GPTModel of its local layer specification, which is the same model."""
    import torch
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_config import TransformerConfig

    raw, moe = model_config(args.size, args.model), args.model == "moe"
    experts: dict[str, Any] = {}
    if moe:
        experts = {
            "num_moe_experts": MOE["num_experts"], "moe_router_topk": MOE["num_experts_per_tok"],
            "moe_ffn_hidden_size": raw["moe_intermediate_size"], "moe_router_load_balancing_type": "none",
            "moe_token_dispatcher_type": "alltoall",
        }  # fmt: skip
    config = TransformerConfig(
        num_layers=raw["num_hidden_layers"], hidden_size=raw["hidden_size"], ffn_hidden_size=raw["intermediate_size"],
        num_attention_heads=raw["num_attention_heads"], num_query_groups=raw["num_key_value_heads"],
        normalization="RMSNorm", gated_linear_unit=True, activation_func=torch.nn.functional.silu,
        add_bias_linear=False, hidden_dropout=0.0, attention_dropout=0.0, qk_layernorm=moe,
        persist_layer_norm=False, bias_dropout_fusion=False, bias_activation_fusion=False, masked_softmax_fusion=False,
        apply_rope_fusion=False, gradient_accumulation_fusion=False, params_dtype=torch.float32, **experts,
    )  # fmt: skip
    layers = get_gpt_layer_local_spec(
        num_experts=MOE["num_experts"] if moe else None, moe_grouped_gemm=False, qk_layernorm=moe,
        normalization="RMSNorm",
    )  # fmt: skip
    return GPTModel(
        config, layers, raw["vocab_size"], 2048, share_embeddings_and_output_weights=False,
        position_embedding_type="rope",
    )  # fmt: skip


def megatron_step(args: argparse.Namespace) -> Any:
    """A function that makes one step of megatron-core's own parts and returns the loss."""
    import torch

    from mswift.launchers.environment import RankInfo
    from mswift.parallel import device, groups
    from mswift.topology import ParallelDims

    chosen = device.prepare("cpu")
    groups.init(ParallelDims(), chosen, RankInfo.single())
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(SEED)
    model = megatron_model(args)
    wrapped = DistributedDataParallel(
        model.config, DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True), model
    )
    settings = OptimizerConfig(lr=1e-4, weight_decay=0.1, clip_grad=1.0, use_distributed_optimizer=True)
    optimizer = get_megatron_optimizer(settings, [wrapped])
    data = batches(args.size, args)
    forward_backward = get_forward_backward_func()
    length = args.length
    positions = torch.arange(length).repeat(args.batch, 1)
    mask = torch.ones(1, 1, length, length, dtype=torch.bool).triu(1)

    def forward(iterator: Any, model: Any) -> Any:
        tokens = next(iterator)
        logits = model(tokens[:, :-1].contiguous(), positions, mask).transpose(0, 1).contiguous()
        losses = vocab_parallel_cross_entropy(logits, tokens[:, 1:].t().contiguous())  # works in place: on a copy
        return losses, lambda out: ((loss := out.mean()), {"loss": loss.detach()})

    def step() -> float:
        wrapped.zero_grad_buffer()
        optimizer.zero_grad()
        done = forward_backward(
            forward_step_func=forward, data_iterator=iter(data), model=[wrapped], num_microbatches=len(data),
            seq_length=length, micro_batch_size=args.batch, forward_only=False,
        )  # fmt: skip
        wrapped.finish_grad_sync()
        optimizer.step()
        return float(sum(one["loss"] for one in done)) / len(done)

    return step


def mswift_engine(args: argparse.Namespace, backend: str, micro_batch_size: int) -> Any:
    """mswift's engine with the model's weights."""
    import torch

    from mswift.launchers.environment import RankInfo
    from mswift.parallel import device, groups
    from mswift.topology import ParallelDims

    chosen = device.prepare("cpu") if backend == "megatron" else device.choose("cpu")
    from transformers import AutoConfig, AutoModelForCausalLM

    from mswift.converters.reader import WeightReader

    dims = ParallelDims()
    groups.init(dims, chosen, RankInfo.single())
    torch.manual_seed(SEED)
    with tempfile.TemporaryDirectory() as path:
        raw = model_config(args.size, args.model)
        AutoModelForCausalLM.from_config(AutoConfig.for_model(**raw)).save_pretrained(path)
        reader = WeightReader(Path(path))
        lora = None
        if args.tuner == "lora":
            from mswift.tuners.lora import LoraConfig

            own = tuple(ATTENTION) if backend == "ddp" and args.model == "moe" else ("all-linear",)
            lora = LoraConfig.for_table(reader.table, rank=8, alpha=32, target_modules=own, seed=SEED)
        settings: dict[str, Any] = {"lr": 1e-4, "weight_decay": 0.1, "lora": lora}
        if backend == "megatron":
            from mswift.parallel.megatron.engine import EngineConfig, MegatronEngine

            config = EngineConfig(**settings, micro_batch_size=micro_batch_size)
            engine: Any = MegatronEngine(reader.table, dims, config, chosen)
        else:
            from mswift.parallel.fsdp.config import FsdpConfig
            from mswift.parallel.fsdp.engine import FsdpEngine

            engine = FsdpEngine(reader.table, dims, FsdpConfig(**settings), chosen)
        engine.load_weights(reader)
    return engine


def mswift_step(args: argparse.Namespace, backend: str) -> Any:
    """A function that makes one step of an engine and returns the loss."""
    import torch

    from mswift.parallel.batch import Microbatch

    engine = mswift_engine(args, backend, args.batch)
    data = [
        Microbatch(t[:, :-1].contiguous(), t[:, 1:].contiguous(), torch.ones(t.shape[0], t.shape[1] - 1))
        for t in batches(args.size, args)
    ]

    def step() -> float:
        return float(engine.train_step(data, 1e-4).loss)

    return step


def contender(name: str, args: argparse.Namespace, pipe: Connection) -> None:
    """Build, then make one step per message and answer with its seconds."""
    import torch

    torch.set_num_threads(args.threads)
    import transformers  # noqa: F401  # everybody's libraries are there before memory counts

    if name in ("mswift", "megatron-core"):
        from mswift.parallel import device

        device.prepare("cpu")
        import mswift.parallel.megatron.engine  # noqa: F401
    pipe.send(resident_bytes())
    if name == "Trainer":
        return run_trainer(args, pipe)
    if name.startswith("mswift"):
        step = mswift_step(args, "ddp" if "ddp" in name else "megatron")
    else:
        step = megatron_step(args) if name == "megatron-core" else transformers_step(args, fused="fused" in name)
    while pipe.recv() is not None:
        started = time.perf_counter(), time.process_time()
        step()
        pipe.send((time.perf_counter() - started[0], time.process_time() - started[1], peak_bytes()))
    return None


NAMES = ("mswift", "mswift, ddp", "transformers", "transformers, fused AdamW", "Trainer", "megatron-core")


def names_of(args: argparse.Namespace) -> tuple[str, ...]:
    """The contenders that can train this."""
    return NAMES if args.tuner == "full" else NAMES[:-1]


def measure(args: argparse.Namespace) -> dict[str, list[tuple[float, float, float]]]:
    """(seconds, CPU seconds, peak bytes) per step of every contender, `rounds` of each after two warm-up steps."""
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    before: dict[str, int] = {}
    names = names_of(args)
    for name in names:
        pipes[name], theirs = context.Pipe()
        context.Process(target=contender, args=(name, args, theirs), daemon=True).start()
        before[name] = pipes[name].recv()
    seconds: dict[str, list[tuple[float, float, float]]] = {name: [] for name in names}
    for number in range(args.rounds + 2):
        for shift in range(len(names)):
            name = names[(number + shift) % len(names)]
            pipes[name].send("step")
            wall, cpu, peak = pipes[name].recv()
            taken = (wall, cpu, peak - before[name])
            if number >= 2:
                seconds[name].append(taken)
    for pipe in pipes.values():
        pipe.send(None)
    return seconds


def report(args: argparse.Namespace, seconds: dict[str, list[tuple[float, float, float]]]) -> str:
    """The table."""
    import torch
    import transformers

    tokens = args.microbatches * args.batch * args.length
    command = f"python benchmarks/train.py --model {args.model} --tuner {args.tuner} --size {args.size}"
    command += f" --rounds {args.rounds} --threads {args.threads}"
    command += f" --microbatches {args.microbatches} --batch {args.batch} --length {args.length}"
    lines = [
        f"`{command}`",
        "",
        f"{cpu_name()}; torch {torch.__version__}, transformers {transformers.__version__}; {args.model} {args.size}, "
        f"{args.tuner}, fp32, {args.microbatches} microbatches of {args.batch} x {args.length} tokens, "
        f"{args.threads} thread(s), {args.rounds} rounds in rotated order.",
        "",
        *training_table(seconds, tokens),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Parse, measure, print, perhaps write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["llama", "moe"], default="llama")
    parser.add_argument("--tuner", choices=["full", "lora"], default="full")
    parser.add_argument("--size", choices=list(SIZES), default="34M")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--microbatches", type=int, default=2)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--write", type=Path)
    args = parser.parse_args()
    text = report(args, measure(args))
    publish(text, args.write)


if __name__ == "__main__":
    main()
