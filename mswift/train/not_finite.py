"""A loss or a gradient norm of nan or inf: the batch is kept for inspection, then the run stops or leaves it out.

The engine has made no update then, on any rank, and all ranks were told the same numbers, so they decide alike.
"""

import json
from pathlib import Path

from mswift.data.packed import Stored
from mswift.data.stream import StreamDataset
from mswift.errors import MswiftError
from mswift.train.collective import agreed
from mswift.train.loop import FinishedStep
from mswift.train.parts import Run

MOST_IN_A_ROW = 10
"""Steps that may be skipped one after the other: weights that are ruined do not heal."""

_REMEDY = "Lower --lr, or lengthen --lr_warmup_iters, and start again from the last checkpoint"
_REMEDY_BEFORE_ANY_UPDATE = (
    "No update was made before it, so the weights that it started from hold nan or inf, or are too large for this "
    "dtype: give another --model, or try --torch_dtype float32"
)


class NotFiniteSteps:
    """What happens to steps whose numbers are not finite; `run.skipped_steps` counts those that were left out."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._in_a_row = self._updates = 0

    def check(self, done: FinishedStep) -> bool:
        """Whether the run may go on after this step; the batch of one without an update is kept."""
        if done.result.updated:
            self._in_a_row = 0
            self._updates += 1
            return True
        run, path = self._run, batch_path(self._run.output_dir, done.step)
        self._in_a_row += 1
        skip = run.config.nan_policy == "skip" and self._in_a_row <= MOST_IN_A_ROW
        with agreed(f"writing {path}"):
            if run.rank == 0:
                save_batch(path, done, run.data)
                if skip:
                    print(f"skipped {self._what(done)}", flush=True)
        run.skipped_steps += skip
        return skip

    def error(self, done: FinishedStep) -> MswiftError:
        """Why the run must not go on."""
        remedy = _REMEDY if self._updates else _REMEDY_BEFORE_ANY_UPDATE
        many = f"; --nan_policy skip leaves out {MOST_IN_A_ROW} steps in a row at most" if self._in_a_row > 1 else ""
        return MswiftError(f"{self._what(done)}; nothing was saved after it{many}. {remedy}")

    def _what(self, done: FinishedStep) -> str:
        last = done.consumed_samples - 1
        return (
            f"step {done.step}: loss {done.result.loss}, gradient norm {done.result.grad_norm} (samples "
            f"{last + 1 - len(done.batch.sample_ids)} to {last}, lr {done.lr:.3g}; the batch is in "
            f"{batch_path(self._run.output_dir, done.step)})"
        )


def batch_path(output_dir: Path, step: int) -> Path:
    """Where the batch of a step without an update is kept."""
    return output_dir / f"not-finite-{step}.jsonl"


def save_batch(path: Path, done: FinishedStep, data: Stored | StreamDataset) -> None:
    """First what was computed, then one line a sample of the global batch: id, tokens, their loss weights.

    Where samples are packed, sample_ids are those of packs.
    """
    head = {
        "step": done.step,
        "loss": str(done.result.loss),
        "grad_norm": str(done.result.grad_norm),
        "lr": done.lr,
        "sample_ids": done.batch.sample_ids,
    }
    with path.open("w", encoding="utf-8") as file:
        file.write(json.dumps(head) + "\n")
        for index in done.batch.sample_ids:
            for number, sample in data.row(index).items():
                row = {"id": number, "tokens": sample.tokens.tolist(), "loss_weights": sample.loss_weights.tolist()}
                file.write(json.dumps(row) + "\n")
