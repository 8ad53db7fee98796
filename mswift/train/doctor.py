"""`mswift doctor layout`: prove a layout with the user's own model structure, on this machine, in processes of its own.

This process imports no torch: it refuses what a launch would refuse, starts one rank and then the layout's ranks
(`mswift.train.doctor_rank`), and compares what they wrote.
"""

import json
import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from mswift import rundir
from mswift.config.doctor import DoctorConfig
from mswift.converters.arrays import Arrays
from mswift.converters.catalog import read_config
from mswift.converters.plan import table_for
from mswift.errors import ConfigError
from mswift.launchers import local
from mswift.refusals import dims_of, train_refusals
from mswift.topology import ParallelDims
from mswift.train.proof import TOLERANCE, Difference, ProofJob, compare
from mswift.train.scaled_model import scaled_table

JOB, RESULT = "job.json", "result.npz"
_SHOWN = 12


def main(config: DoctorConfig) -> int:
    """Prove the layout; returns 0 where it holds, 1 where it does not, 2 where a launch would be refused."""
    raw = _model_config(Path(config.model))
    world_size = config.nproc_per_node or config.world_size or _least_ranks(config)
    if refusals := _refusals(config, raw, world_size):
        for refusal in refusals:
            print(f"refused: {refusal}")
        return ConfigError.exit_status
    dims = dims_of(config, world_size)
    job = _job(config, raw, dims)
    _print_plan(config, dims, job)
    with tempfile.TemporaryDirectory(prefix="mswift-doctor-") as home:
        runs = {
            "one rank": (1, job),
            "one rank, sums in another order": (1, replace(job, other_order=True)),
            f"{world_size} ranks": (world_size, job),
        }
        results = [
            _run(Path(home) / str(number), name, ranks, job, config, dims if ranks > 1 else ParallelDims())
            for number, (name, (ranks, job)) in enumerate(runs.items())
        ]
    if any(result is None for result in results):
        return 1
    one, noisy, found = (result or {} for result in results)
    return _report(compare(found, one, noisy), dims)


def _model_config(path: Path) -> dict[str, object]:
    return read_config(path / rundir.HF_FILES if (path / rundir.HF_FILES).is_dir() else path)


def _least_ranks(config: DoctorConfig) -> int:
    """Ranks that the degrees of the layout need, without replicas."""
    dense = config.tensor_model_parallel_size * config.pipeline_model_parallel_size
    etp = config.expert_tensor_parallel_size
    experts = config.expert_model_parallel_size * (config.tensor_model_parallel_size if etp is None else etp)
    return math.lcm(max(dense, 1), max(experts * config.pipeline_model_parallel_size, 1))


def _refusals(config: DoctorConfig, raw: dict[str, object], world_size: int) -> list[ConfigError]:
    """What a launch would refuse, data and length of the run apart; the batch is the proof's own."""
    config = replace(config, dataset=("none",), train_iters=1, num_train_epochs=None, world_size=None, eval_steps=None)
    config = replace(config, micro_batch_size=1, global_batch_size=world_size, lr_decay_style="constant")
    return train_refusals(config, table_for(raw).spec, world_size)


def _job(config: DoctorConfig, raw: dict[str, object], dims: ParallelDims) -> ProofJob:
    unit = math.lcm(8, 2 * dims.cp * dims.tp)
    return ProofJob(
        config=raw,
        scaled_for=asdict(dims),
        target_modules=config.target_modules if config.tuner_type == "lora" else (),
        num_microbatches=dims.dp * max(dims.pp, 2),
        length=-(-24 // unit) * unit,
        seed=config.seed,
        loss_fusion="true" if config.cross_entropy_loss_fusion == "true" else "false",
    )


def _run(home: Path, name: str, ranks: int, job: ProofJob, config: DoctorConfig, dims: ParallelDims) -> Arrays | None:
    """What a job computed, or None where it failed; its ranks have said why."""
    home.mkdir()
    (home / JOB).write_text(json.dumps({"job": asdict(job), "dims": asdict(dims), "device": config.device}))
    print(f"running    {name}", flush=True)
    status = local.run(local.Job(ranks, "mswift.train.doctor_rank", (str(home),)))
    if status:
        print(f"\nnot proved: the job of {name} ended with status {status}")
        return None
    with np.load(home / RESULT) as result:
        return dict(result)


def _print_plan(config: DoctorConfig, dims: ParallelDims, job: ProofJob) -> None:
    spec = scaled_table(dict(job.config), dims).spec
    experts = f", {spec.moe.num_experts} experts" if spec.moe else ""
    print(
        f"layout     {dims.describe()}\n"
        f"model      the structure of {config.model} ({spec.model_type}), scaled down: {spec.num_layers} layers, "
        f"{spec.num_attention_heads} heads, {spec.num_kv_heads} KV heads{experts}; random weights, fp32\n"
        f"trained    {'LoRA on ' + ' '.join(job.target_modules) if job.target_modules else 'in full'}"
    )


def _report(differences: Sequence[Difference], dims: ParallelDims) -> int:
    """Print the table and the verdict."""
    failed = [d for d in differences if not d.proved]
    print("\n".join(_table(differences)))
    worst = max(differences, key=lambda d: d.difference)
    if failed:
        print(f"\nnot proved: {len(failed)} of {len(differences)} tensors differ by more than {TOLERANCE:g} "
              f"from one rank on {dims.describe()}")  # fmt: skip
        return 1
    print(f"\nproved: all {len(differences)} tensors equal one rank's within {TOLERANCE:g} "
          f"(largest {worst.difference:.1e}, {worst.name})")  # fmt: skip
    return 0


def _table(differences: Sequence[Difference]) -> Iterator[str]:
    """The largest differences first; the rest as a number."""
    yield f"\n{'difference':>10} {'noise floor':>12}  max|a - b| / max|b| against one rank"
    ordered = sorted(differences, key=lambda d: -d.difference)
    for d in ordered[:_SHOWN]:
        yield f"{d.difference:>10.1e} {d.noise:>12.1e}  {d.name}"
    if len(ordered) > _SHOWN:
        yield f"{'':>23}  ... and {len(ordered) - _SHOWN} tensors with smaller differences"
