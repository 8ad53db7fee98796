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
from mswift.errors import ConfigError, LayoutError
from mswift.launchers import local
from mswift.launchers.job import Job
from mswift.refusals import dims_of, train_refusals
from mswift.topology import ParallelDims
from mswift.train.machine import check_machine
from mswift.train.proof import TOLERANCE, Difference, ProofJob, compare
from mswift.train.scaled_model import scaled_dims, scaled_table
from mswift.train.trained import lora_config

JOBS, RESULT = "jobs.json", "result-{}.npz"
_SHOWN = 12
_MOST_RANKS = 1024


def main(config: DoctorConfig) -> int:
    """Prove the layout; returns 0 where it holds, 1 where it does not, 2 where a launch would be refused.

    Or look at the machine.
    """
    if config.check == "machine":
        return check_machine(config)
    if not config.model:
        raise ConfigError("--model is required: doctor layout proves a layout for the structure of a model")
    raw = _model_config(Path(config.model))
    spec = table_for(raw).spec
    world_size = config.nproc_per_node or config.world_size or _least_ranks(config, spec.num_layers)
    if refusals := _refusals(config, raw, world_size):
        for refusal in refusals:
            print(f"refused: {refusal}")
        return ConfigError.exit_status
    dims = scaled_dims(spec, dims_of(config, world_size, spec.num_layers))
    job = _job(config, raw, dims)
    _print_plan(config, dims, job)
    with tempfile.TemporaryDirectory(prefix="mswift-doctor-") as home:
        one = _run(Path(home) / "one", [job, replace(job, other_order=True)], config.device, ParallelDims())
        found = _run(Path(home) / "layout", [job], config.device, dims) if one else []
    return _report(compare(found[0], *one), dims) if found else 1


def _model_config(path: Path) -> dict[str, object]:
    return read_config(path / rundir.HF_FILES if (path / rundir.HF_FILES).is_dir() else path)


def _least_ranks(config: DoctorConfig, num_layers: int) -> int:
    """The fewest ranks that have this layout; 1 where none has, which is refused then."""
    for world_size in range(1, _MOST_RANKS + 1):
        try:
            dims_of(config, world_size, num_layers)
        except LayoutError:
            continue
        return world_size
    return 1


def _refusals(config: DoctorConfig, raw: dict[str, object], world_size: int) -> list[ConfigError]:
    """What a launch would refuse, data and length of the run apart; the batch is the proof's own."""
    config = replace(config, dataset=("none",), train_iters=1, num_train_epochs=None, world_size=None, eval_steps=None)
    config = replace(config, micro_batch_size=1, global_batch_size=world_size)
    config = replace(config, lr_decay_style="constant", min_lr=0.0, lr_decay_iters=None)
    config = replace(config, lr_wsd_decay_iters=None, lr_wsd_decay_style="linear")
    table = table_for(raw)
    refusals = train_refusals(config, table.spec, world_size)
    if config.trains_lora:
        try:
            lora_config(config, table.without_mtp())
        except ConfigError as error:
            refusals.append(error)
    return refusals


def _job(config: DoctorConfig, raw: dict[str, object], dims: ParallelDims) -> ProofJob:
    unit = math.lcm(8, 2 * dims.cp * dims.tp)
    return ProofJob(
        config=raw,
        scaled_for=asdict(dims),
        target_modules=config.target_modules if config.trains_lora else (),
        predicts=bool(config.mtp_num_layers),
        num_microbatches=dims.dp * max(dims.pp, 2),
        length=-(-24 // unit) * unit,
        seed=config.seed,
        cp_comm_type=config.cp_comm_type,
        loss_fusion="true" if config.cross_entropy_loss_fusion == "true" else "false",
    )


def _run(home: Path, jobs: Sequence[ProofJob], device: str, dims: ParallelDims) -> list[Arrays]:
    """What the jobs computed on the ranks of `dims`, one after the other; [] where they failed, after saying why."""
    home.mkdir()
    payload = {"jobs": [asdict(job) for job in jobs], "dims": asdict(dims), "device": device}
    (home / JOBS).write_text(json.dumps(payload))
    ranks = f"{dims.world_size} rank{'s' * (dims.world_size > 1)}"
    print(f"running    on {ranks}", flush=True)
    if status := local.run(Job(dims.world_size, "mswift.train.doctor_rank", (str(home),))):
        print(f"\nnot proved: the job on {ranks} ended with status {status}")
        return []
    results = []
    for number in range(len(jobs)):
        with np.load(home / RESULT.format(number)) as result:
            results.append(dict(result))
    return results


def _print_plan(config: DoctorConfig, dims: ParallelDims, job: ProofJob) -> None:
    spec = scaled_table(dict(job.config), dims).spec
    ahead = f" with {len(spec.mtp_layers)} multi-token-prediction layers" if job.predicts and spec.mtp_layers else ""
    experts = f", {spec.moe.num_experts} experts" if spec.moe else ""
    print(
        f"layout     {dims.describe()}\n"
        f"model      the structure of {config.model} ({spec.model_type}), scaled down: {spec.num_layers} layers, "
        f"{spec.num_attention_heads} heads, {spec.num_kv_heads} KV heads{experts}; random weights, fp32\n"
        f"trained    {'LoRA on ' + ' '.join(job.target_modules) if job.target_modules else 'in full'}{ahead}"
    )


def _report(differences: Sequence[Difference], dims: ParallelDims) -> int:
    """Print the table and the verdict."""
    failed = [d for d in differences if not d.explained]
    print("\n".join(_table(differences)))
    if failed:
        print(f"\nnot proved: {len(failed)} of {len(differences)} tensors differ by more than {TOLERANCE:g} "
              f"from one rank on {dims.describe()}")  # fmt: skip
        return 1
    rounding = [d for d in differences if not d.proved]
    print(f"\nproved: all {len(differences) - len(rounding)} tensors equal one rank's within {TOLERANCE:g}")
    if rounding:
        print(f"{len(rounding)} more differ by rounding alone: their noise floor is above {TOLERANCE:g} itself")
    return 0


def _table(differences: Sequence[Difference]) -> Iterator[str]:
    """The largest differences first; the rest as a number."""
    yield f"\n{'difference':>10} {'noise floor':>12}  max|a - b| / max|b| against one rank"
    ordered = sorted(differences, key=lambda d: -d.difference)
    for d in ordered[:_SHOWN]:
        yield f"{d.difference:>10.1e} {d.noise:>12.1e}  {d.name}"
    if len(ordered) > _SHOWN:
        yield f"{'':>23}  ... and {len(ordered) - _SHOWN} tensors with smaller differences"
