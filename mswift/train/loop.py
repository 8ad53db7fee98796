"""The training loop as a generator of finished steps; whoever consumes it logs, evaluates, saves and stops."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass

from mswift.data.packed import Stored
from mswift.parallel.engine import Engine, LossPart, StepResult
from mswift.train.batches import BatchPlan, StepBatch, assemble, evaluation_batches
from mswift.train.prefetch import ahead
from mswift.train.schedule import LearningRate

NO_NAME = "(none)"


@dataclass(frozen=True)
class FinishedStep:
    """`step` counts finished optimizer steps: the first one yielded by a fresh run is 1."""

    step: int
    consumed_samples: int
    lr: float
    batch: StepBatch
    result: StepResult
    data_seconds: float  # waiting for the batch
    seconds: float  # data, forward, backward, optimizer


def train(
    engine: Engine,
    batches: Iterator[StepBatch],
    schedule: LearningRate,
    first_step: int,
    last_step: int,
    consumed_samples: int,
    note: Callable[[int, str], None],
    num_channels: int = 0,
) -> Iterator[FinishedStep]:
    """Run steps first_step+1 .. last_step. `batches`: this rank's share of the batch of each of them.

    `consumed_samples`: before the first of them. `num_channels`: of those in its microbatches, 0 where they have none.

    `note(step, doing)` hears what comes next. A step whose loss or gradient norm is not finite made no update
    (`result.updated`); whoever consumes the steps decides about it.
    """
    for step in range(first_step, last_step):
        note(step + 1, "reading data")
        started = time.perf_counter()
        batch = next(batches)
        data_seconds = time.perf_counter() - started
        note(step + 1, "computing")
        lr = schedule.at(step)
        result = engine.train_step(batch.microbatches, lr, num_channels)
        consumed_samples += len(batch.sample_ids)
        yield FinishedStep(step + 1, consumed_samples, lr, batch, result, data_seconds, time.perf_counter() - started)


@dataclass(frozen=True)
class Evaluation:
    """Mean losses (nats) over a data set, weighted by the loss weights."""

    loss: float
    by_channel: dict[str, float]
    """Of its channels, which are its files; empty where there is one."""


def evaluate(engine: Engine, data: Stored, plan: BatchPlan, note: Callable[[], None] = lambda: None) -> Evaluation:
    """Loss over all of the data; neither generators nor the data position move. `note` is called at each batch."""
    names = data.channel_names
    total, parts = LossPart(0.0, 0.0), [LossPart(0.0, 0.0)] * len(names)
    note()
    with closing(ahead(lambda ids: assemble(data, plan, ids), evaluation_batches(data, plan))) as batches:
        for batch in batches:
            note()
            more, more_parts = engine.evaluate(batch.microbatches, len(names))
            total = total.plus(more)
            parts = [part.plus(further) for part, further in zip(parts, more_parts, strict=True)]
    return Evaluation(total.mean, by_channel(names, parts))


def by_channel(names: Sequence[str], parts: Sequence[LossPart]) -> dict[str, float]:
    """Mean loss of each channel with a learned token; what is in none is called `(none)`."""
    return {name or NO_NAME: part.mean for name, part in zip(names, parts, strict=True) if part.weight_sum}
