"""What a checkpoint costs on one rank: seconds that the step loop waits, bytes written, host memory above the state.

    python benchmarks/checkpoint.py [--size 100M] [--rounds 3] [--threads 1] [--write benchmarks/results/checkpoint.md]

In one process, in rotated order, after two steps of training (so that the optimizer has its state): mswift's
synchronous save; its asynchronous one, with training steps until it is published; `torch.save` of the same tensors and
an fsync. Medians; `waits` is what the loop loses, `published` the time until the checkpoint may be used. Memory is the
growth of the resident set's high-water mark during the save (the first of each kind, in a process of its own), read
from Linux. Loading is measured the same way.
"""

import argparse
import multiprocessing
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from measure import cpu_name, peak_bytes, publish, resident_bytes
from train import SEED, SIZES, batches, model_config

KINDS = ("synchronous", "asynchronous", "torch.save")


class Trained:
    """An engine after two steps, and what a save of it needs."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        import torch

        torch.set_num_threads(args.threads)
        from mswift.launchers.environment import RankInfo
        from mswift.parallel import device, groups
        from mswift.topology import ParallelDims

        self.device = device.prepare("cpu")
        from transformers import AutoConfig, AutoModelForCausalLM

        from mswift.converters.reader import WeightReader
        from mswift.parallel.megatron.engine import EngineConfig, MegatronEngine, Microbatch

        dims = ParallelDims()
        groups.init(dims, self.device, RankInfo.single())
        model = folder / "model"
        if not model.exists():
            torch.manual_seed(SEED)
            AutoModelForCausalLM.from_config(AutoConfig.for_model(**model_config(args.size))).save_pretrained(model)
        self._reader, self._dims = WeightReader(model), dims
        self._settings = EngineConfig(lr=1e-4, micro_batch_size=args.batch)
        self.engine = MegatronEngine(self._reader.table, dims, self._settings, self.device)
        self.engine.load_weights(self._reader)
        self._data = [
            Microbatch(t[:, :-1].contiguous(), t[:, 1:].contiguous(), torch.ones(t.shape[0], t.shape[1] - 1))
            for t in batches(args.size, args)
        ]
        for _ in range(2):
            self.step()
        self.folder, self.hf_files = folder, self._reader.side_files()
        self.state_bytes = sum(s.tensor.numel() * s.tensor.element_size() for s in self.shards())

    def step(self) -> float:
        """One step of training; its seconds."""
        started = time.perf_counter()
        self.engine.train_step(self._data, 1e-4)
        return time.perf_counter() - started

    def shards(self) -> list[Any]:
        """What one rank writes."""
        from mswift.train.save import state_shards

        return list(state_shards(self.engine, 0))

    def save(self, number: int, shards: Any) -> Any:
        """A save into an empty run directory."""
        from mswift.train.checkpoint import RunState, engine_layout
        from mswift.train.save import CheckpointSave

        state = RunState(number, 0, 2, 1, engine_layout(self.engine), "", 0, {})
        return CheckpointSave(self.folder / "run", state, 0, shards, self.hf_files, keep=1)


def synchronous(trained: Trained, number: int, _: Any) -> dict[str, float]:
    """mswift's save in the step loop."""
    from mswift.train.save import save_now

    started = time.perf_counter()
    path = save_now(trained.save(number, iter(trained.shards())))
    seconds = time.perf_counter() - started
    return {"waits": seconds, "published": seconds, "bytes": _size(path)}


def asynchronous(trained: Trained, number: int, staging: Any) -> dict[str, float]:
    """mswift's save beside training steps."""
    from mswift.train.save import BackgroundSave

    started = time.perf_counter()
    save = BackgroundSave(trained.save(number, staging.copy(trained.shards(), trained.device)))
    waits, steps, done = time.perf_counter() - started, [], False
    while not done:
        steps.append(trained.step())
        before = time.perf_counter()
        done = not save.is_busy and save.advance()
        waits += time.perf_counter() - before
    seconds = time.perf_counter() - started
    step = statistics.median(steps)
    return {"waits": waits, "published": seconds, "bytes": _size(save.destination), "step": step}


def by_torch(trained: Trained, number: int, _: Any) -> dict[str, float]:
    """torch.save of the same tensors, on the disk when it returns; no hash, no index, one file of one rank."""
    import torch

    path = trained.folder / "torch.pt"
    started = time.perf_counter()
    with path.open("wb") as file:
        torch.save({f"{s.key}{s.region}": s.tensor for s in trained.shards()}, file)
        file.flush()
        os.fsync(file.fileno())
    seconds = time.perf_counter() - started
    return {"waits": seconds, "published": seconds, "bytes": path.stat().st_size}


WAYS = dict(zip(KINDS, (synchronous, asynchronous, by_torch), strict=True))


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def times(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Medians of `rounds` saves of each kind, and of a step without any."""
    trained = Trained(args, folder)  # before the other imports: it prepares megatron-core for the device
    from mswift.train.save import Staging

    staging = Staging()
    for kind in KINDS:  # the first of each is a warm-up
        WAYS[kind](trained, KINDS.index(kind), staging)
    found: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
    steps: list[float] = []
    for number in range(args.rounds):
        for shift in range(len(KINDS)):
            steps.append(trained.step())
            kind = KINDS[(number + shift) % len(KINDS)]
            found[kind].append(WAYS[kind](trained, 10 * (number + 1) + shift, staging))
    medians: dict[str, Any] = {
        kind: {name: statistics.median(row[name] for row in rows) for name in rows[0]} for kind, rows in found.items()
    }
    return medians | {"step": statistics.median(steps), "state_bytes": trained.state_bytes}


def memory(args: argparse.Namespace, folder: Path, kind: str) -> int:
    """Growth of the high-water mark during one save, or a load ("load": of what lies in the run directory)."""
    trained = Trained(args, folder)
    from mswift import rundir
    from mswift.train import checkpoint
    from mswift.train.save import Staging

    if kind == "load":
        path = rundir.resolve_checkpoint(folder / "run")
        checkpoint.load(trained.engine, path, 0, 1)  # what is allocated once
        before = resident_bytes()
        checkpoint.check_share(path, 0, 1)
        checkpoint.load(trained.engine, path, 0, 1)
        return peak_bytes() - before
    trained.step()
    before = resident_bytes()
    WAYS[kind](trained, 1, Staging())
    return peak_bytes() - before


def _answer(pipe: Any, function: Any, arguments: tuple[Any, ...]) -> None:
    pipe.send(function(*arguments))


def apart(function: Any, *arguments: Any) -> Any:
    """The result of a function in a process of its own."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_answer, args=(theirs, function, arguments))
    process.start()
    theirs.close()
    answer = ours.recv()
    process.join()
    return answer


def report(args: argparse.Namespace, found: dict[str, Any], grown: dict[str, int]) -> str:
    """The table."""
    import torch

    state, mib = found["state_bytes"], 1 << 20
    lines = [
        f"`python benchmarks/checkpoint.py --size {args.size} --rounds {args.rounds} --threads {args.threads}`",
        "",
        f"{cpu_name()}; torch {torch.__version__}; Llama {args.size}, fp32, AdamW, one rank, {args.threads} thread(s): "
        f"state {state / mib:,.0f} MiB, a step takes {found['step']:.3f} s; medians of {args.rounds}.",
        "",
        "| save | loop waits, s | published after, s | bytes written / state | host memory above the state, MiB |",
        "|---|---|---|---|---|",
    ]
    for kind in KINDS:
        row = found[kind]
        lines.append(
            f"| {kind} | {row['waits']:.3f} | {row['published']:.3f} | {row['bytes'] / state:.4f} "
            f"| {grown[kind] / mib:,.0f} |"
        )
    ratio = found["synchronous"]["waits"] / found["asynchronous"]["waits"]
    lines += [
        "",
        f"The loop waits {ratio:.1f} times longer for a synchronous save than for an asynchronous one; a step beside "
        f"the writer takes {found['asynchronous']['step'] / found['step']:.2f} of one without. Verification and load: "
        f"{grown['load'] / mib:,.0f} MiB above the state.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Parse, measure, print, perhaps write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="100M")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--microbatches", type=int, default=1)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--write", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mswift-benchmark-") as name:
        folder = Path(name)
        found = apart(times, args, folder)
        grown = {}
        for kind in KINDS:
            shutil.rmtree(folder / "run", ignore_errors=True)
            grown[kind] = apart(memory, args, folder, kind)
            if kind == "synchronous":
                grown["load"] = apart(memory, args, folder, "load")
    text = report(args, found, grown)
    publish(text, args.write)


if __name__ == "__main__":
    main()
