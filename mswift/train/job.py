"""One rank of a training job, from configuration to last checkpoint: the place where all parts of a run meet."""

import signal
import time
from collections.abc import Generator, Sequence
from contextlib import ExitStack, closing, nullcontext
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from mswift import rundir
from mswift.config.loader import dump, to_dict
from mswift.config.optimizers import LOW_RANK_STATE
from mswift.data.chat_template import with_chat_template
from mswift.data.dataset import write_rejected
from mswift.data.packed import Stored, samples_of
from mswift.data.stream import StreamDataset, epoch_at, num_samples
from mswift.data.tokenizer import Tokenizer
from mswift.ledger import FINISHED, Ledger
from mswift.parallel import device as devices
from mswift.parallel import groups
from mswift.refusals.backend import FREEZING
from mswift.train import checkpoint
from mswift.train.batches import StepBatch, training_batch
from mswift.train.build import batch_plan, build_data, learning_rate, num_steps, print_banner
from mswift.train.collective import agreed, ended_by, largest, lost_ranks_in_words
from mswift.train.data_start import start_from_data
from mswift.train.engines import built_engine
from mswift.train.entry import enter_run_directory
from mswift.train.flops import step_flops
from mswift.train.hang import HangWatch, collective_timeout
from mswift.train.identity import base_fingerprint, check_adapter, check_base, check_chat_template
from mswift.train.inputs import open_model
from mswift.train.loop import NO_NAME, Evaluation, FinishedStep, by_channel, evaluate, train
from mswift.train.metrics import (
    MetricsFile,
    Progress,
    StepRecord,
    TensorBoard,
    Watcher,
    finite,
    plot_loss,
    watching,
)
from mswift.train.not_finite import NotFiniteSteps
from mswift.train.parts import Run
from mswift.train.prefetch import ahead
from mswift.train.resume import ResumePoint
from mswift.train.run import Start
from mswift.train.saver import Saver
from mswift.train.side_files import side_files, tokenizer_files
from mswift.train.signals import STOPPED_STATUS, StopRequest, stop_request
from mswift.train.streaming import started
from mswift.train.untrained import warn_of_untrained_tokens
from mswift.tuners.peft_config import CONFIG_FILE

# What decides the samples of a step, or the meaning of the saved tensors: a resumed run must have the same.
_FIXED = ("seed", "global_batch_size", "max_length", "tuner_type", "optimizer", *LOW_RANK_STATE, "lora_rank",
          "lora_alpha", "quant_method", "bnb_4bit_quant_type", "target_modules", "tuner_config", "modules_to_save",
          "rope_scaling", "max_model_len", "mtp_num_layers", *FREEZING, "lisa_activated_layers", "lisa_step_interval",
          "llamapro_num_new_blocks", "llamapro_num_groups", "adapter_length", "adapter_act", "reft_rank", "reft_layers",
          "new_special_tokens", "packing", "packing_strategy", "packing_length", "loss_normalization",
          "streaming", "streaming_block_rows")  # fmt: skip


def run_job(start: Start, device: torch.device) -> int:
    """Train as one rank of the job that this process belongs to; the exit status.

    Raises mswift.errors for what the user can mend.
    """
    tqdm.monitor_interval = 0  # its thread wakes bars that count too seldom, and may outlive the run
    groups.init(start.dims, device, start.info, collective_timeout(start.config.distributed_timeout_minutes))
    with ended_by(groups.destroy, start.dims), lost_ranks_in_words(), ExitStack() as stack:
        return _run(enter_run_directory(start, stack), device)


def _run(start: Start, device: torch.device) -> int:
    """Build the parts, continue where there is something to continue, train."""
    config, info, dims, reader, point = start.config, start.info, start.dims, start.reader, start.point
    data, val_data, tokenizer = build_data(start.kind, config, reader, info, resumed=start.resume is not None)
    last_step = num_steps(config, num_samples(data))
    output_dir = Path(config.output_dir)
    with built_engine(config, reader, dims, device, last_step, resumed=start.resume is not None) as engine:
        plan = batch_plan(config, dims, info.rank, tokenizer, reader.table.spec.vocab_size)
        files = side_files(reader, engine.config, config.model)
        files |= tokenizer_files(tokenizer) if config.new_special_tokens else {}
        if config.chat_template is not None:
            files = with_chat_template(files, tokenizer.chat_template)
        watch = HangWatch(output_dir, info.rank, dims.world_size, config.distributed_timeout_minutes * 60)
        run = Run(config, info.rank, dims, device, reader, engine, plan, data, val_data, last_step, output_dir, files,
                  watch)  # fmt: skip
        state = _continue(run, point, tokenizer) if point else None
        if point is None:
            start_from_data(run)
        parameters = (engine.num_parameters, engine.trainable_parameters)  # every rank counts its own
        held = [f"{name} {part}" for name, part in zip(("frozen", "trained"), engine.held_bytes(), strict=True)]
        with agreed(f"opening {config.output_dir}"):
            if info.rank == 0:
                run.base = dict(state.base) if state else base_fingerprint(reader)
                _open_run_directory(run, state)
                warn_of_untrained_tokens(config, reader, tokenizer)
                print_banner(start, device, engine.config.dtype, parameters, held, data, val_data, run.last_step)
        with stop_request() as request, watch.watching(), started(data, state):
            return _train(run, state, request)


def _continue(run: Run, point: ResumePoint, tokenizer: Tokenizer) -> checkpoint.RunState | None:
    """What a checkpoint brings: everything, or the weights alone, which a full run has from it already."""
    if not point.weights_only:
        return _resume(run, point.checkpoint, tokenizer)
    if run.engine.config.trains_adapter:
        with agreed(f"starting from {point.checkpoint}"):
            check_adapter(point.checkpoint, run.hf_files[CONFIG_FILE])
        checkpoint.load_weights(run.engine, point.checkpoint)
    return None


def _resume(run: Run, path: Path, tokenizer: Tokenizer) -> checkpoint.RunState:
    """Load the checkpoint at `path` after proving that data, chat template, adapter, dtype and base are the same."""
    with agreed(f"continuing {path}"):
        state, config = checkpoint.read_state(path), to_dict(run.config)
        fixed = {name: config[name] for name in _FIXED}
        checkpoint.check_same_data(state, run.data.fingerprint, num_samples(run.data), fixed)
        check_chat_template(path, run.config.chat_template, state.config.get("chat_template"), tokenizer)
        checkpoint.check_same_dtype(state, run.engine.config.dtype)
        if run.engine.config.trains_adapter:
            check_adapter(path, run.hf_files[CONFIG_FILE])
        if run.rank == 0:
            _check_same_base(run, state)
    return checkpoint.load(run.engine, path, run.rank, run.dims.world_size)


def _check_same_base(run: Run, state: checkpoint.RunState) -> None:
    """An adapter continues on the base it began on. A full run has its own weights: another --model is a mistake."""
    model, then = run.config.model, str(state.config["model"])
    if run.engine.config.trains_adapter:
        check_base(state.base, base_fingerprint(run.reader), model, then)
    elif model != then and Path(model).is_dir():
        check_base(state.base, base_fingerprint(open_model(run.config, Path(model))), model, then)


def _open_run_directory(run: Run, state: checkpoint.RunState | None) -> None:
    """The configuration for people to read, the bad rows, and the metrics cut back to where the run continues."""
    (run.output_dir / rundir.CONFIG).write_text(dump(run.config), encoding="utf-8")
    data = [samples_of(data) for data in (run.data, run.val_data) if isinstance(data, Stored)]
    if state is None or not isinstance(run.data, StreamDataset):  # a stream adds to it
        write_rejected(run.output_dir / rundir.REJECTED, data)
    Ledger(run.output_dir).start(state.step if state else 0, run.last_step, run.dims.world_size)


def _train(run: Run, state: checkpoint.RunState | None, request: StopRequest) -> int:
    """All steps that are left, or those until a signal; on rank 0 watched by a bar, metrics.jsonl and TensorBoard."""
    config, first_step = run.config, state.step if state else 0
    run.skipped_steps = state.skipped_steps if state else 0
    consumed = state.consumed_samples if state else 0
    batches = _batches(run, consumed, run.last_step - first_step)
    steps = train(
        run.engine,
        batches,
        learning_rate(config, run.last_step),
        first_step,
        run.last_step,
        consumed,
        run.watch.at,
        len(run.data.channel_names),
    )
    saver = Saver(run)
    not_finite = NotFiniteSteps(run)
    watchers: list[Watcher] = []
    if run.rank == 0:
        watchers = [MetricsFile(run.output_dir), Progress(first_step, run.last_step, config.logging_steps)]
        watchers += [TensorBoard(run.output_dir, first_step)] if config.tensorboard else []
    stopped_by, step = 0, first_step
    ledger = Ledger(run.output_dir)
    failing = ledger.failing(lambda: step) if run.rank == 0 else nullcontext()

    with watching(watchers), failing, lost_ranks_in_words(), closing(batches):
        for done in steps:
            step = done.step
            if not not_finite.check(done):
                started = time.perf_counter()
                _tell(watchers, ledger, saver.finish(), started)
                raise not_finite.error(done)
            started = time.perf_counter()
            evaluation = _evaluate_if_due(run, done)
            seconds = {"evaluation": time.perf_counter() - started}
            mine = (request.number, saver.is_busy, round(1e6 * done.data_seconds / done.seconds))
            stopped_by, any_busy, data_wait = largest(mine, run.device)
            record = _record(run, done, seconds, data_wait / 1e6, evaluation)
            for watcher in watchers:  # before the save: a step whose checkpoint is there is in the metrics
                watcher.step(record)
            run.watch.at(step, "saving")
            started = time.perf_counter()
            is_last = bool(stopped_by) or step == run.last_step
            _tell(watchers, ledger, saver.after_step(done, any_busy=bool(any_busy), last=is_last), started)
            if isinstance(run.data, StreamDataset):
                run.data.finished(done.consumed_samples)
            if stopped_by:
                break
    if state is None and run.last_step == 0:
        saver.save(0, 0, wait=True)  # --train_iters 0: the weights as they came, laid out and saved
    if run.rank == 0:
        ledger.stop(step, signal.Signals(stopped_by).name if step < run.last_step else FINISHED)
        _print_end(run, state, step, stopped_by)
    return STOPPED_STATUS if step < run.last_step else 0


def _tell(watchers: Sequence[Watcher], ledger: Ledger, published: Sequence[Path], started: float) -> None:
    """What was published since `started` (perf_counter) to the watchers, which rank 0 alone has, and to the ledger."""
    waited = time.perf_counter() - started
    for number, saved in enumerate(published if watchers else (), 1):
        for watcher in watchers:
            watcher.saved(saved)
        # of several, the steps waited for the last one
        ledger.saved(int(saved.name.rpartition("-")[2]), waited if number == len(published) else 0.0)


def _batches(run: Run, consumed_samples: int, num_steps: int) -> Generator[StepBatch, None, None]:
    """This rank's share of the batches of the steps that are left, the next one read while one is computed."""
    size = run.config.global_batch_size
    places = range(consumed_samples, consumed_samples + num_steps * size, size)
    return ahead(lambda place: training_batch(run.data, run.plan, run.config.seed, place), places)


def _print_end(run: Run, state: checkpoint.RunState | None, step: int, stopped_by: int) -> None:
    """Where the run stands, its newest checkpoint, its curve."""
    if step < run.last_step:
        print(
            f"stopped by {signal.Signals(stopped_by).name} after step {step} of {run.last_step}, saved: the same "
            f"command continues it (exit status {STOPPED_STATUS})"
        )
    elif state is not None and state.step >= run.last_step:
        print(f"nothing to do: the run is at step {state.step} and its length is {run.last_step} steps")
    share = rundir.data_wait(rundir.read_metrics(run.output_dir))
    if share is not None:
        print(f"waiting for data: {share:.2%} of the time of all steps")
    print(f"checkpoint: {rundir.resolve_checkpoint(run.output_dir)}")
    if picture := plot_loss(run.output_dir):
        print(f"loss curve: {picture}")


def _record(
    run: Run, done: FinishedStep, seconds: dict[str, float], data_wait: float, evaluation: Evaluation | None
) -> StepRecord:
    """The metrics of a step; speed counts data, forward, backward and optimizer, not evaluation and saving."""
    tokens, world_size = done.batch.tokens, run.dims.world_size
    frozen = run.config.tuner_type != "full"
    ahead = run.config.mtp_num_layers or 0
    squares, spec = done.batch.squared_lengths, run.reader.table.spec
    flops = step_flops(spec, tokens, squares, frozen_base=frozen, num_ahead=ahead)
    per_device = flops / done.seconds / world_size
    peak = devices.peak_flops(run.device, run.engine.config.dtype)
    return StepRecord(
        step=done.step,
        loss=finite(done.result.loss),
        grad_norm=finite(done.result.grad_norm),
        lr=done.lr,
        epoch=epoch_at(run.data, done.consumed_samples),
        consumed_samples=done.consumed_samples,
        tokens=tokens,
        trained_tokens=done.result.num_tokens,
        loss_weights=done.result.weight_sum,
        padding_tokens=done.batch.padding_tokens,
        step_seconds=done.seconds,
        data_wait=data_wait,
        seconds={"data": done.data_seconds, **done.result.seconds, **seconds},
        tokens_per_second=tokens / done.seconds,
        tokens_per_second_per_device=tokens / done.seconds / world_size,
        model_tflops_per_device=per_device / 1e12,
        mfu=None if peak is None else per_device / peak,
        memory_bytes=devices.peak_memory_bytes(run.device),
        skipped_steps=run.skipped_steps,
        mtp_loss=None if done.result.mtp_loss is None else finite(done.result.mtp_loss),
        eval_loss=None if evaluation is None else evaluation.loss,
        eval_losses=(evaluation.by_channel or None) if evaluation is not None else None,
        **_channels(run, done),
    )


def _channels(run: Run, done: FinishedStep) -> dict[str, Any]:
    """Loss and loss weights of each channel of the step's samples."""
    names, parts = run.data.channel_names, done.result.channels
    if not names:
        return {}
    losses = {name: finite(value) for name, value in by_channel(names, parts).items()}
    weights = {name or NO_NAME: part.weight_sum for name, part in zip(names, parts, strict=True) if part.weight_sum}
    return {"channel_loss": losses, "channel_weights": weights}


def _evaluate_if_due(run: Run, done: FinishedStep) -> Evaluation | None:
    """Loss on the whole validation data every eval_steps and after the last step."""
    every = run.config.eval_steps
    if run.val_data is None or not (done.step == run.last_step or (every and done.step % every == 0)):
        return None
    return evaluate(run.engine, run.val_data, run.plan, lambda: run.watch.at(done.step, "evaluating"))
