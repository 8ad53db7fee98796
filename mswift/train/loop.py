"""The training loop as a generator of finished steps; whoever consumes it logs, evaluates, saves and stops."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from mswift.data.packed import Dataset
from mswift.parallel.megatron.engine import MegatronEngine, StepResult
from mswift.train.batches import BatchPlan, StepBatch, assemble, evaluation_batches
from mswift.train.schedule import LearningRate


@dataclass(frozen=True)
class FinishedStep:
    """`step` counts finished optimizer steps: the first one yielded by a fresh run is 1."""

    step: int
    consumed_samples: int
    lr: float
    batch: StepBatch
    result: StepResult
    data_seconds: float
    seconds: float  # data, forward, backward, optimizer


def train(
    engine: MegatronEngine,
    next_batch: Callable[[int], StepBatch],
    schedule: LearningRate,
    first_step: int,
    last_step: int,
    consumed_samples: int,
    note: Callable[[int, str], None],
) -> Iterator[FinishedStep]:
    """Run steps first_step+1 .. last_step. `next_batch(consumed_samples)` is this rank's share of the next batch.

    `note(step, doing)` hears what comes next. A step whose loss or gradient norm is not finite made no update
    (`result.updated`); whoever consumes the steps decides about it.
    """
    for step in range(first_step, last_step):
        note(step + 1, "reading data")
        started = time.perf_counter()
        batch = next_batch(consumed_samples)
        data_seconds = time.perf_counter() - started
        note(step + 1, "computing")
        lr = schedule.at(step)
        result = engine.train_step(batch.microbatches, lr)
        consumed_samples += len(batch.sample_ids)
        yield FinishedStep(step + 1, consumed_samples, lr, batch, result, data_seconds, time.perf_counter() - started)


def evaluate(engine: MegatronEngine, data: Dataset, plan: BatchPlan, note: Callable[[], None] = lambda: None) -> float:
    """Mean loss per trained token (nats) over the whole data set; neither generators nor the data position move.

    `note` is called before each batch.
    """
    loss_sum, weight_sum = 0.0, 0.0
    for ids in evaluation_batches(data, plan):
        note()
        loss, weight = engine.evaluate(assemble(data, plan, ids).microbatches)
        loss_sum += loss
        weight_sum += weight
    return loss_sum / weight_sum
