"""Several LoRA adapters on one model: memory and the time of a switch, all of them held against those set aside.

    python benchmarks/tuner_offload.py [--adapters 8] [--rank 64] [--rounds 3] [--threads 1]
        [--write benchmarks/results/tuner_offload.md]

One adapter computes at a time, the next in turn after every forward pass. Held: all adapters stay in memory,
`activate` alone. Set aside: all but the active one lie in directories (`set_aside`, which writes the adapter and leaves
`meta` tensors behind), `activate` brings one back. PEFT: `delete_adapter` and `load_adapter` from the same directories,
which keeps nothing of what was trained. Every contender is a process of its own, in rotated order; memory is what the
process holds above the base model once all adapters have had their turn. Checked: every adapter's logits after each
switch are those of the process that holds all.
"""

import argparse
import hashlib
import multiprocessing
import statistics
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from measure import cpu_name, resident_bytes

CONTENDERS = ("held", "set aside", "PEFT")


def base_model() -> Any:
    """A Llama of 34 M parameters with fixed weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=8192, hidden_size=512, intermediate_size=1536, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=4,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def settings(rank: int) -> dict[str, Any]:
    return {"r": rank, "lora_alpha": rank, "target_modules": "all-linear", "init_lora_weights": False}


def write_adapters(folder: Path, args: argparse.Namespace) -> None:
    """One directory each."""
    import torch

    from mswift.tuners.library import TunerConfig, prepare_model

    for number in range(args.adapters):
        model = prepare_model(base_model(), TunerConfig("lora", fields=settings(args.rank)), "one")
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for parameter in model.trained_parameters():
                parameter.normal_(std=0.02, generator=generator)
        model.save(folder / str(number), "one")


def measure(contender: str, folder: Path, args: argparse.Namespace, pipe: Connection) -> None:
    """Send (bytes above the base, seconds of every switch, digest of all logits)."""
    import torch

    torch.set_num_threads(args.threads)
    tokens = torch.arange(64).view(1, 64)
    base = base_model()
    with torch.no_grad():
        base(tokens)
    before = resident_bytes()
    switch = switcher(contender, base, folder, args)
    seconds, digest = [], hashlib.sha256()
    for turn in range(2 * args.adapters):
        began = time.perf_counter()
        model = switch(turn % args.adapters)
        seconds.append(time.perf_counter() - began)
        with torch.no_grad():
            digest.update(model(tokens).logits.numpy().tobytes())
    pipe.send((resident_bytes() - before, seconds[args.adapters :], digest.hexdigest()))


def switcher(contender: str, base: Any, folder: Path, args: argparse.Namespace) -> Any:
    """A function that lets adapter n compute and returns the model."""
    if contender == "PEFT":
        from peft import PeftModel

        model = PeftModel.from_pretrained(base, str(folder / "0"), adapter_name="no0")
        active = ["no0"]

        def by_peft(number: int) -> Any:
            name = f"no{number}"
            if name != active[0]:
                model.load_adapter(str(folder / str(number)), name)
                model.set_adapter(name)
                model.delete_adapter(active[0])
                active[0] = name
            return model

        return by_peft
    from mswift.tuners.library import TunerConfig, prepare_model

    tuned = prepare_model(base, TunerConfig("lora", fields=settings(args.rank)), "start")
    for number in range(args.adapters):
        tuned.load(folder / str(number), f"no{number}")
        if contender == "set aside":
            tuned.set_aside(f"no{number}", folder / str(number))

    def by_library(number: int) -> Any:
        last = tuned.active[0]
        tuned.activate(f"no{number}")
        if contender == "set aside" and last not in ("start", f"no{number}"):
            tuned.set_aside(last, folder / last.removeprefix("no"))
        return tuned

    return by_library


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("adapters", 8), ("rank", 64), ("rounds", 3), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--write", type=Path)
    args = parser.parse_args()
    found: dict[str, list[tuple[int, list[float], str]]] = {name: [] for name in CONTENDERS}
    with tempfile.TemporaryDirectory() as folder:
        write_adapters(Path(folder), args)
        size = sum(file.stat().st_size for file in (Path(folder) / "0").iterdir())
        context = multiprocessing.get_context("spawn")
        for turn in range(args.rounds):
            for place in range(len(CONTENDERS)):
                name = CONTENDERS[(turn + place) % len(CONTENDERS)]
                mine, theirs = context.Pipe()
                process = context.Process(target=measure, args=(name, Path(folder), args, theirs))
                process.start()
                theirs.close()
                found[name].append(mine.recv())
                process.join()
    digests = {digest for taken in found.values() for *_, digest in taken}
    if len(digests) != 1:
        raise SystemExit("the contenders' logits differ")
    text = report(found, size, args)
    print(text)
    if args.write:
        args.write.write_text(text)


def report(found: dict[str, list[tuple[int, list[float], str]]], size: int, args: argparse.Namespace) -> str:
    memory = {name: statistics.median(taken[0] for taken in runs) for name, runs in found.items()}
    switch = {name: statistics.median(s for taken in runs for s in taken[1]) for name, runs in found.items()}
    command = " ".join(f"--{name} {getattr(args, name)}" for name in ("adapters", "rank", "rounds", "threads"))
    lines = [
        "# Several adapters on one model: memory and the time of a switch",
        "",
        f"`python benchmarks/tuner_offload.py {command}`",
        "",
        f"{cpu_name()}; {args.adapters} LoRA adapters of {size / 2**20:.1f} MiB on a Llama of 34 M parameters; "
        f"medians of {args.rounds} rounds. A switch of "
        "`set aside` writes one adapter and reads another, PEFT's only reads. All logits are the same bits.",
        "",
        "| | memory above the base | set aside / it | seconds of a switch | set aside / it |",
        "|---|---|---|---|---|",
    ]
    ours = "set aside"
    for name in CONTENDERS:
        lines.append(
            f"| {name} | {memory[name] / 2**20:.0f} MiB | {memory[ours] / memory[name]:.2f} "
            f"| {switch[name]:.4f} | {switch[ours] / switch[name]:.2f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
