"""One small model, one data set, every tuner: what is trained, memory, optimizer state, speed and losses.

    python benchmarks/tuners.py [--seeds 3] [--steps 20] [--threads 2] [--only LoRA LISA] [--write FILE.md]

A Qwen3 with random weights is pretrained on the demo's text, then every tuner fine-tunes it on the demo's conversations
by `mswift sft --backend ddp`, each run in a process of its own that has the libraries loaded: without packing and with
it, once for each seed. Memory is the largest that the process held above what it held before it built anything. Tuners
that this version's configuration does not know, or whose library is missing, are listed. The orderings that the SWIFT
paper (arXiv 2408.05517) reports are checked; those that do not hold here are printed, and the exit status is 0 all the
same: on a small model the ends weigh more. With --write the table is added to a file and a picture is saved beside it.
"""

import argparse
import json
import multiprocessing
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args, get_type_hints

from measure import cpu_name, peak_bytes, publish, resident_bytes

ROOT = Path(__file__).resolve().parents[1]
WHOLE, SMALL = "1e-3", "4e-3"
"""Learning rates of tuners that train weights of the model, and of those that train something beside it."""

TUNERS: Mapping[str, tuple[str, list[str]]] = {
    "full": (WHOLE, []),
    "LoRA": (SMALL, ["--tuner_type", "lora"]),
    "LoRA+": (SMALL, ["--tuner_type", "lora", "--lorap_lr_ratio", "4"]),
    "rsLoRA": (SMALL, ["--tuner_type", "lora", "--use_rslora", "true"]),
    "DoRA": (SMALL, ["--tuner_type", "lora", "--use_dora", "true"]),
    "AdaLoRA": (SMALL, ["--tuner_type", "adalora"]),
    "LongLoRA": (SMALL, ["--tuner_type", "longlora"]),
    "adapter": (SMALL, ["--tuner_type", "adapter"]),
    "ReFT": (SMALL, ["--tuner_type", "reft"]),
    "LLaMA-Pro": (WHOLE, ["--tuner_type", "llamapro", "--llamapro_num_new_blocks", "2"]),
    "GaLore": (WHOLE, ["--optimizer", "galore", "--galore_rank", "32"]),
    "Q-GaLore": (WHOLE, ["--optimizer", "galore", "--galore_quantization", "true", "--galore_rank", "32"]),
    "LISA": (WHOLE, ["--lisa_activated_layers", "1", "--lisa_step_interval", "5"]),
    "NEFTune": (WHOLE, ["--neftune_noise_alpha", "5"]),
}
"""Name -> (learning rate, flags)."""

NEEDS = {"GaLore": "galore_torch", "Q-GaLore": "bitsandbytes"}
"""Name -> the library that it needs (pip install 'mswift[optim]')."""

NOT_PACKED = ("LongLoRA",)
QWEN_7B: Mapping[str, Any] = {
    "model_type": "qwen", "hidden_size": 4096, "intermediate_size": 22016, "num_hidden_layers": 32,
    "num_attention_heads": 32, "kv_channels": 128, "seq_length": 8192, "vocab_size": 151936,
    "tie_word_embeddings": False, "no_bias": True,
}  # fmt: skip
MIB = 2**20


@dataclass(frozen=True)
class Result:
    """Of one run. samples_per_second: of the data set, packed or not."""

    trained: int
    parameters: int
    optimizer_bytes: int
    peak_bytes: int
    samples_per_second: float
    train_loss: float
    eval_loss: float


def is_known(name: str) -> bool:
    """Whether this version's configuration has the tuner's flags and values, and its library is there."""
    from mswift.config.train import SftConfig

    flags = TUNERS[name][1]
    if name in NEEDS and find_spec(NEEDS[name]) is None:
        return False

    hints = get_type_hints(SftConfig)
    for flag, value in zip(flags[::2], flags[1::2], strict=True):
        choices = get_args(hints.get(flag.removeprefix("--")))
        if flag.removeprefix("--") not in hints or (choices and isinstance(choices[0], str) and value not in choices):
            return False
    return True


def write_model(folder: Path, texts: list[str], args: argparse.Namespace) -> None:
    """A Qwen3 of some 5 million parameters with the demo's tokenizer."""
    sys.path.insert(0, str(ROOT / "configs" / "demo"))
    import materials
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    materials.write_model(folder, texts, args.seed)
    own = AutoConfig.from_pretrained(folder)
    own.hidden_size, own.num_hidden_layers, own.intermediate_size, own.num_attention_heads = 256, 6, 768, 8
    own.layer_types = None
    content = own.to_dict() | {"layer_types": ["full_attention"] * 6}
    content.pop("transformers_version", None)
    torch.manual_seed(args.seed)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**content)).save_pretrained(folder)


def in_process(argv: list[str], log: Path, answer: Path, threads: int) -> None:
    """Run one mswift command in this process; what it held at most goes to `answer`."""
    import torch

    torch.set_num_threads(threads)
    with log.open("w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
        before = resident_bytes()
        from mswift.cli.main import main

        status = main(argv)
        answer.write_text(json.dumps({"status": status, "peak": peak_bytes() - before}))


class Runner:
    """Starts each command in a fresh process that has the libraries already."""

    def __init__(self, folder: Path, threads: int) -> None:
        self._folder, self._threads, self._count = folder, threads, 0
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(
            ["torch", "transformers", "peft", "mswift.train.job", "mswift.parallel.fsdp.engine", "mswift.cli.main"]
        )

    def run(self, argv: list[str]) -> tuple[int, str]:
        """(largest memory above the start, what it printed); the benchmark ends where the command fails."""
        self._count += 1
        log, answer = (self._folder / f"{self._count}.{kind}" for kind in ("log", "json"))
        process = self._context.Process(target=in_process, args=(argv, log, answer, self._threads))
        process.start()
        process.join()
        found = json.loads(answer.read_text()) if answer.exists() else {"status": process.exitcode}
        if found["status"] != 0:
            sys.exit(f"mswift {' '.join(argv)} ended with {found['status']}:\n{log.read_text()[-3000:]}")
        return found["peak"], log.read_text()


def optimizer_bytes(checkpoint: Path) -> int:
    """Of the optimizer's state in a checkpoint; the weights are fp32, so none of it is masters."""
    from mswift.converters.io.torch_dist_reader import TorchDistSource
    from mswift.converters.plan import DTYPE_BYTES

    total = 0
    for name, info in TorchDistSource(checkpoint).tensors.items():
        if name.startswith("optimizer."):
            size = DTYPE_BYTES[info.dtype]
            for extent in info.shape:
                size *= extent
            total += size
    return total


def one_run(runner: Runner, folder: Path, name: str, seed: int, packed: bool, args: argparse.Namespace) -> Result:
    """Fine-tune once."""
    lr, flags = TUNERS[name]
    output = folder / f"{name}-{seed}-{packed}"
    batch = (
        ["--packing", "--packing_length", "160", "--global_batch_size", "4"]
        if packed
        else ["--global_batch_size", "16"]
    )
    peak, log = runner.run([
        "sft", "--model", str(folder / "base"), "--dataset", str(folder / "data" / "chat.jsonl"), "--val_dataset",
        f"{folder / 'data' / 'held_out.jsonl'}", "--backend", "ddp", "--device", "cpu", "--output_dir", str(output),
        "--train_iters", str(args.steps), "--lr", lr, "--seed", str(seed), "--max_length", "128", "--lr_warmup_iters",
        "3", "--micro_batch_size", "2" if packed else "8", "--cache_dir", str(folder / "cache"), "--tensorboard",
        "false", *batch, *flags,
    ])  # fmt: skip
    from mswift import rundir

    rows = rundir.read_metrics(output)
    counts = re.search(r"\(([\d,]+) parameters, ([\d,]+) trained\)", log)
    assert counts is not None, log
    parameters, trained = (int(text.replace(",", "")) for text in counts.groups())
    rate = statistics.median(row["tokens_per_second"] for row in rows[2:])
    return Result(
        trained,
        parameters,
        optimizer_bytes(rundir.resolve_checkpoint(output)),
        peak,
        rate / args.tokens_per_sample,
        statistics.fmean(row["loss"] for row in rows[-5:]),
        rows[-1]["eval_loss"],
    )


def prepared(folder: Path, runner: Runner, args: argparse.Namespace) -> float:
    """Data and the pretrained base; returns tokens of a conversation."""
    sys.path.insert(0, str(ROOT / "configs" / "demo"))
    import materials

    materials.write_data(folder / "data", args.seed)
    texts = [json.loads(row)["text"] for row in (folder / "data" / "pretrain.jsonl").read_text().splitlines()[:2000]]
    write_model(folder / "random", texts, args)
    runner.run([
        "pt", "--model", str(folder / "random"), "--dataset", str(folder / "data" / "pretrain.jsonl"), "--backend",
        "ddp", "--device", "cpu", "--output_dir", str(folder / "pt"), "--train_iters", str(args.pretrain_steps),
        "--lr", "2e-3", "--lr_warmup_iters", "5", "--max_length", "128", "--micro_batch_size", "16",
        "--global_batch_size", "16", "--cache_dir", str(folder / "cache"), "--tensorboard", "false",
    ])  # fmt: skip
    runner.run(["export", "--model", str(folder / "pt"), "--output_dir", str(folder / "base")])
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    for packed in (False, True):  # tokenises, which is in no measured run
        one_run(runner, folder, "full", 0, packed, argparse.Namespace(steps=4, tokens_per_sample=1))
    rows = [json.loads(row)["messages"] for row in (folder / "data" / "chat.jsonl").read_text().splitlines()[:500]]
    return statistics.fmean(len(tokenizer.encode(tokenizer.apply_chat_template(row, tokenize=False))) for row in rows)


Results = Mapping[str, Sequence[Result]]


def table(results: Results) -> list[str]:
    """Lines of a table; means over seeds, and the spread of the losses."""
    lines = [
        "| tuner | lr | trained | of the model | optimizer state | peak memory | samples/s | training loss "
        "| evaluation loss |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, runs in results.items():
        first = runs[0]
        loss, held_out = (_spread([getattr(run, kind) for run in runs]) for kind in ("train_loss", "eval_loss"))
        lines.append(
            f"| {name} | {TUNERS[name][0]} | {first.trained:,} | {first.trained / first.parameters:.2%} "
            f"| {first.optimizer_bytes / MIB:.2f} MiB | {_mean(runs, 'peak_bytes') / MIB:.0f} MiB "
            f"| {_mean(runs, 'samples_per_second'):.1f} | {loss} | {held_out} |"
        )
    return lines


def _mean(runs: Sequence[Result], what: str) -> float:
    return statistics.fmean(getattr(run, what) for run in runs)


def _spread(values: Sequence[float]) -> str:
    spread = f" +- {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{spread}"


def orderings(results: Results) -> list[str]:
    """What the SWIFT paper reports, and whether it holds here."""
    from mswift.config.train import SftConfig
    from mswift.converters.plan import table_for
    from mswift.train.trained import trained_parameters

    qwen = table_for(dict(QWEN_7B))
    config = SftConfig(model="m", tuner_type="lora", target_modules=("c_attn", "c_proj", "w1", "w2"))
    share = trained_parameters(config, qwen) / (sum(_product(shape) for shape in qwen.hf.values()))
    found = [("LoRA of rank 8 trains 0.23 % of Qwen-7B", 0.00225 <= share < 0.00235, f"{share:.4%}")]
    if {"LISA", "full"} <= results.keys():
        rates = {name: _mean(runs, "samples_per_second") for name, runs in results.items()}
        peaks = {name: _mean(runs, "peak_bytes") / MIB for name, runs in results.items()}
        fastest, smallest = max(rates, key=rates.__getitem__), min(peaks, key=peaks.__getitem__)
        found.append(
            ("LISA is the fastest", fastest == "LISA", f"{rates['LISA']:.1f} samples/s, {fastest} {rates[fastest]:.1f}")
        )
        found.append(
            (
                "LISA needs the least memory",
                smallest == "LISA",
                f"{peaks['LISA']:.0f} MiB, {smallest} {peaks[smallest]:.0f}",
            )
        )
    if {"GaLore", "full"} <= results.keys():
        galore, full = (results[name][0].optimizer_bytes / MIB for name in ("GaLore", "full"))
        found.append(
            ("GaLore's optimizer state is below half of full's", galore < full / 2, f"{galore:.2f} and {full:.2f} MiB")
        )
    if {"Q-GaLore", "GaLore"} <= results.keys():
        ours, galore = (results[name][0].optimizer_bytes / MIB for name in ("Q-GaLore", "GaLore"))
        found.append(
            (
                "Q-GaLore's optimizer state is below half of GaLore's",
                ours < galore / 2,
                f"{ours:.2f} and {galore:.2f} MiB",
            )
        )
    return [f"- {what}: {'holds' if holds else 'DOES NOT HOLD here'} ({numbers})" for what, holds, numbers in found]


def _product(shape: Sequence[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def draw(every: Mapping[str, Results], path: Path) -> None:
    """Peak memory, speed and evaluation loss of every tuner, packed and not."""
    from matplotlib.figure import Figure

    order = [name for name in TUNERS if any(name in results for results in every.values())]
    figure = Figure(figsize=(12, 5), dpi=120, layout="constrained")
    parts = (
        ("peak_bytes", "peak memory (MiB)", MIB),
        ("samples_per_second", "samples/s", 1),
        ("eval_loss", "evaluation loss", 1),
    )
    for axes, (what, label, unit) in zip(figure.subplots(1, 3), parts, strict=True):
        for number, (kind, results) in enumerate(every.items()):
            names = [name for name in order if name in results]
            places = [order.index(name) + 0.4 * number for name in names]
            axes.barh(places, [_mean(results[name], what) / unit for name in names], height=0.38, label=kind)
        axes.set_yticks([n + 0.2 for n in range(len(order))], order)
        axes.invert_yaxis()
        axes.set_xlabel(label)
        axes.grid(axis="x", alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper right", ncols=2)
    figure.savefig(path)


def report(every: Mapping[str, Results], missing: Sequence[str], args: argparse.Namespace, started: float) -> str:
    """The whole text."""
    import torch
    import transformers

    lines = [
        f"`python benchmarks/tuners.py {' '.join(sys.argv[1:])}`",
        "",
        f"{cpu_name()}; torch {torch.__version__}, transformers {transformers.__version__}; {args.steps} steps of 16 "
        f"conversations (packed: 4 rows of 160 positions), {args.seeds} seed(s), fp32, {time.time() - started:.0f} s "
        f"in all; load of the machine {args.load[0]:.1f} at the start, {os.getloadavg()[0]:.1f} at the end.",
    ]
    for kind, results in every.items():
        lines += ["", f"## {kind}", "", *table(results), "", *orderings(results)]
    if missing:
        lines += [
            "",
            f"Not run, since this version's configuration or this environment lacks them: {', '.join(missing)}.",
        ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=1, help="of data, base and the first run")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--pretrain_steps", type=int, default=60)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="*", choices=list(TUNERS))
    parser.add_argument("--write", type=Path)
    args = parser.parse_args()
    args.load, started = os.getloadavg(), time.time()
    os.environ |= {"OMP_NUM_THREADS": str(args.threads), "HF_HUB_OFFLINE": "1"}
    chosen = [name for name in TUNERS if name in (args.only or TUNERS)]
    names = [name for name in chosen if is_known(name)]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        runner = Runner(folder, args.threads)
        args.tokens_per_sample = prepared(folder, runner, args)
        every: dict[str, dict[str, list[Result]]] = {"without packing": {}, "with packing": {}}
        for seed in range(args.seed, args.seed + args.seeds):  # by turns, so that the machine's mood meets all alike
            for kind, results in every.items():
                for name in names:
                    packed = kind == "with packing"
                    if not (packed and name in NOT_PACKED):
                        results.setdefault(name, []).append(one_run(runner, folder, name, seed, packed, args))
                        print(f"{kind}, seed {seed}: {name} {results[name][-1]}", file=sys.stderr, flush=True)
    publish(report(every, [name for name in chosen if name not in names], args, started), args.write)
    if args.write:
        draw(every, args.write.with_suffix(".png"))


if __name__ == "__main__":
    main()
