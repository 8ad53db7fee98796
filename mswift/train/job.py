"""One rank of a training job, from configuration to last checkpoint: the place where all parts of a run meet."""

import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch

from mswift import rundir
from mswift.config.loader import dump, to_dict
from mswift.config.train import TrainConfig
from mswift.converters.reader import WeightReader
from mswift.data.dataset import TokenDataset, write_rejected
from mswift.errors import ConfigError
from mswift.parallel import device as devices
from mswift.parallel import groups
from mswift.parallel.megatron.engine import MegatronEngine
from mswift.topology import ParallelDims
from mswift.train import checkpoint
from mswift.train.batches import BatchPlan, training_batch
from mswift.train.build import batch_plan, build_data, built_engine, learning_rate, num_steps, print_banner
from mswift.train.collective import agreed, ended_by, gather_objects
from mswift.train.flops import step_flops
from mswift.train.identity import base_fingerprint, check_adapter, check_base
from mswift.train.loop import FinishedStep, evaluate, train
from mswift.train.metrics import MetricsFile, Progress, StepRecord, TensorBoard, Watcher, plot_loss, watching
from mswift.train.resume import find_resume_point
from mswift.train.run import Start
from mswift.train.side_files import side_files
from mswift.train.untrained import warn_of_untrained_tokens
from mswift.tuners.peft_config import CONFIG_FILE

# What decides the samples of a step, or the meaning of the saved tensors: a resumed run must have the same.
_FIXED = ("seed", "global_batch_size", "max_length", "tuner_type", "optimizer", "lora_rank", "lora_alpha",
          "target_modules", "modules_to_save")  # fmt: skip


@dataclass
class Run:
    """What the steps of one rank share."""

    config: TrainConfig
    rank: int
    dims: ParallelDims
    device: torch.device
    reader: WeightReader
    engine: MegatronEngine
    plan: BatchPlan
    data: TokenDataset
    val_data: TokenDataset | None
    last_step: int
    output_dir: Path
    hf_files: dict[str, bytes]
    base: dict[str, str] = field(default_factory=dict)
    """Fingerprint of the model that the run was started from; on rank 0."""


def run_job(start: Start, device: torch.device) -> int:
    """Train as one rank of the job that this process belongs to. Raises mswift.errors for what the user can mend."""
    groups.init(start.dims, device, start.info)
    with ended_by(groups.destroy, start.dims), ExitStack() as stack:
        _enter_run_directory(start, stack)
        _check_model_files(start)
        _run(start, device)
    return 0


def _run(start: Start, device: torch.device) -> None:
    """Build the parts, continue where there is something to continue, train."""
    config, info, dims, reader, resume = start.config, start.info, start.dims, start.reader, start.resume
    data, val_data, tokenizer = build_data(start.kind, config, reader, info)
    last_step = num_steps(config, len(data))
    with built_engine(config, reader, dims, device, resumed=resume is not None) as engine:
        plan = batch_plan(config, dims, info.rank, tokenizer, reader.table.spec.vocab_size)
        files = side_files(reader, engine.config, config.model)
        run = Run(config, info.rank, dims, device, reader, engine, plan, data, val_data, last_step,
                  Path(config.output_dir), files)  # fmt: skip
        state = _resume(run, resume.checkpoint) if resume else None
        parameters = (engine.num_parameters, engine.trainable_parameters)  # every rank counts its own
        with agreed(f"opening {config.output_dir}"):
            if info.rank == 0:
                run.base = dict(state.base) if state else base_fingerprint(reader)
                _open_run_directory(run, state)
                warn_of_untrained_tokens(config, reader, tokenizer)
                print_banner(start, device, engine.config.dtype, parameters, data, val_data, run.last_step)
        _train(run, state)


def _enter_run_directory(start: Start, stack: ExitStack) -> None:
    """Lock --output_dir until the end, on rank 0; all ranks must continue from the checkpoint that is newest then."""
    output_dir, resume = Path(start.config.output_dir), start.config.resume
    mine = start.resume.step if start.resume else None
    with agreed(f"opening {output_dir}"):
        if start.info.rank == 0:
            stack.enter_context(rundir.locked(output_dir))
            rundir.remove_remains(output_dir)
            if find_resume_point(output_dir, resume) != start.resume:
                raise ConfigError(f"--output_dir {output_dir}: another run has just saved there; start again")
    for rank, step in enumerate(steps := gather_objects(mine)):
        if step != steps[0]:
            seen = [f"checkpoint-{s}" if s is not None else "no checkpoint" for s in (step, steps[0])]
            raise ConfigError(
                f"--output_dir {output_dir}: rank {rank} sees {seen[0]} there, rank 0 {seen[1]}: use an --output_dir "
                "on a file system that all nodes share (if it is, start again in a minute: its caches are behind)"
            )


def _check_model_files(start: Start) -> None:
    """Weights out of a checkpoint of a run are compared with its COMMIT, a share on each rank, as at a resume."""
    model, info = start.reader.hf_files.parent, start.info
    own = start.resume is not None and start.resume.checkpoint == model  # proved when it is loaded
    with agreed(f"reading {model}"):
        if start.reader.hf_files.name == rundir.HF_FILES and (model / rundir.COMMIT).is_file() and not own:
            rundir.check_files(model, sorted(rundir.read_commit(model))[info.rank :: info.world_size])


def _resume(run: Run, path: Path) -> checkpoint.RunState:
    """Load the checkpoint at `path` after proving that data, adapter, dtype and base are the same."""
    with agreed(f"continuing {path}"):
        state, config = checkpoint.read_state(path), to_dict(run.config)
        checkpoint.check_same_data(state, run.data.fingerprint, len(run.data), {name: config[name] for name in _FIXED})
        checkpoint.check_same_dtype(state, run.engine.config.dtype)
        if run.engine.config.lora is not None:
            check_adapter(path, run.hf_files[CONFIG_FILE])
        if run.rank == 0:
            _check_same_base(run, state)
    return checkpoint.load(run.engine, path, run.rank, run.dims.world_size)


def _check_same_base(run: Run, state: checkpoint.RunState) -> None:
    """An adapter continues on the base it began on. A full run has its own weights: another --model is a mistake."""
    model, then = run.config.model, str(state.config["model"])
    if run.engine.config.lora is not None:
        check_base(state.base, base_fingerprint(run.reader), model, then)
    elif model != then and Path(model).is_dir():
        check_base(state.base, base_fingerprint(WeightReader(Path(model))), model, then)


def _open_run_directory(run: Run, state: checkpoint.RunState | None) -> None:
    """The configuration for people to read, the bad rows, and the metrics cut back to where the run continues."""
    (run.output_dir / rundir.CONFIG).write_text(dump(run.config), encoding="utf-8")
    write_rejected(run.output_dir / rundir.REJECTED, [run.data, *([run.val_data] if run.val_data else [])])
    rundir.truncate_metrics(run.output_dir, state.step if state else 0)


def _train(run: Run, state: checkpoint.RunState | None) -> None:
    """All steps that are left; on rank 0 watched by a progress bar, metrics.jsonl and TensorBoard."""
    config, first_step = run.config, state.step if state else 0
    steps = train(
        run.engine,
        lambda consumed: training_batch(run.data, run.plan, config.seed, consumed),
        learning_rate(config, run.last_step),
        first_step,
        run.last_step,
        state.consumed_samples if state else 0,
    )
    watchers: list[Watcher] = []
    if run.rank == 0:
        watchers = [MetricsFile(run.output_dir), Progress(first_step, run.last_step, config.logging_steps)]
        watchers += [TensorBoard(run.output_dir, first_step)] if config.tensorboard else []
    with watching(watchers):
        for done in steps:
            clock = [time.perf_counter()]
            eval_loss = _evaluate_if_due(run, done)
            clock.append(time.perf_counter())
            saved = _save_if_due(run, done)
            clock.append(time.perf_counter())
            seconds = {"evaluation": clock[1] - clock[0], "checkpoint": clock[2] - clock[1]}
            record = _record(run, done, seconds, eval_loss, saved)
            for watcher in watchers:
                watcher.step(record)
    if state is not None and first_step >= run.last_step and run.rank == 0:
        print(f"nothing to do: the run is at step {first_step} and its length is {run.last_step} steps")
    if state is None and run.last_step == 0:
        _save(run, 0, 0)  # --train_iters 0: the weights as they came, laid out and saved
    if run.rank == 0:
        print(f"checkpoint: {rundir.resolve_checkpoint(run.output_dir)}")
        if picture := plot_loss(run.output_dir):
            print(f"loss curve: {picture}")


def _record(
    run: Run, done: FinishedStep, seconds: dict[str, float], eval_loss: float | None, saved: Path | None
) -> StepRecord:
    """The metrics of a step; speed counts data, forward, backward and optimizer, not evaluation and saving."""
    tokens, world_size = done.batch.tokens, run.dims.world_size
    frozen = run.config.tuner_type == "lora"
    flops = step_flops(run.reader.table.spec, tokens, done.batch.seq_length, frozen_base=frozen)
    per_device = flops / done.seconds / world_size
    peak = devices.peak_flops(run.device, run.engine.config.dtype)
    return StepRecord(
        step=done.step,
        loss=done.result.loss,
        grad_norm=done.result.grad_norm,
        lr=done.lr,
        epoch=done.consumed_samples / len(run.data),
        consumed_samples=done.consumed_samples,
        tokens=tokens,
        trained_tokens=done.result.num_tokens,
        padding_tokens=done.batch.padding_tokens,
        step_seconds=done.seconds,
        seconds={"data": done.data_seconds, **done.result.seconds, **seconds},
        tokens_per_second=tokens / done.seconds,
        tokens_per_second_per_device=tokens / done.seconds / world_size,
        model_tflops_per_device=per_device / 1e12,
        mfu=None if peak is None else per_device / peak,
        memory_bytes=devices.peak_memory_bytes(run.device),
        eval_loss=eval_loss,
        checkpoint=None if saved is None else str(saved),
    )


def _evaluate_if_due(run: Run, done: FinishedStep) -> float | None:
    """Loss on the whole validation data every eval_steps and after the last step."""
    every = run.config.eval_steps
    if run.val_data is None or not (done.step == run.last_step or (every and done.step % every == 0)):
        return None
    return evaluate(run.engine, run.val_data, run.plan)


def _save_if_due(run: Run, done: FinishedStep) -> Path | None:
    """A checkpoint every save_steps and after the last step."""
    every = run.config.save_steps
    if not (done.step == run.last_step or (every and done.step % every == 0)):
        return None
    return _save(run, done.step, done.consumed_samples)


def _save(run: Run, step: int, consumed_samples: int) -> Path:
    """Publish a checkpoint; old ones go only after the new one is committed."""
    state = checkpoint.RunState(
        step=step,
        consumed_samples=consumed_samples,
        optimizer_step=run.engine.optimizer_step,
        world_size=run.dims.world_size,
        layout=checkpoint.engine_layout(run.engine),
        data_fingerprint=run.data.fingerprint,
        num_samples=len(run.data),
        config=to_dict(run.config),
        dtype=run.engine.config.dtype,
        base=run.base,
    )
    path = checkpoint.save(run.engine, run.output_dir, state, run.rank, run.hf_files)
    with agreed("removing old checkpoints"):
        if run.rank == 0 and run.config.save_total_limit is not None:
            rundir.prune(run.output_dir, run.config.save_total_limit)
    return path
