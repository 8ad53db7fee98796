"""What is known after each step, and the places that show it: metrics.jsonl, a progress bar or lines, TensorBoard."""

import contextlib
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, TextIO

from tqdm import tqdm

from mswift import rundir
from mswift.errors import MswiftError


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step of the whole job; one object of metrics.jsonl.

    `loss` is the mean over trained tokens of the global batch, in nats: the sum of their weighted losses divided by
    `loss_weights`, that of their weights (with --loss_normalization sample the number of samples). `channel_loss`: the
    same for each channel, `channel_weights` the parts of the sum (--enable_channel_loss). Token counts are of this
    step, all ranks: `tokens` real ones, `trained_tokens` with a loss, `padding_tokens` the rest of the padded batch.
    `eval_losses`: those of the files of --val_dataset, where there are several.
    `loss` and `grad_norm` are null where they were not finite; `skipped_steps` counts the steps of the run so far that
    made no update for that (--nan_policy skip).
    `mtp_loss` is that of multi-token-prediction layers where they are trained, the mean over them, divided by
    `loss_weights` as the loss is, and no part of `loss`.
    `data_wait` is the share of the step's time in which the rank that waited longest for its batch did so; `seconds`
    are those of rank 0.
    `mfu` is model FLOP/s over the device's dense peak, null where that peak is unknown.
    """

    step: int
    loss: float | None
    grad_norm: float | None
    lr: float
    epoch: float
    consumed_samples: int
    tokens: int
    trained_tokens: int
    loss_weights: float
    padding_tokens: int
    step_seconds: float
    data_wait: float
    seconds: dict[str, float]
    tokens_per_second: float
    tokens_per_second_per_device: float
    model_tflops_per_device: float
    mfu: float | None
    memory_bytes: int
    skipped_steps: int = 0
    mtp_loss: float | None = None
    eval_loss: float | None = None
    channel_loss: dict[str, float | None] | None = None
    channel_weights: dict[str, float] | None = None
    eval_losses: dict[str, float] | None = None

    def as_dict(self) -> dict[str, Any]:
        """JSON-able; what is not measured at every run or step only where it is there."""
        value = asdict(self)
        for name in ("mtp_loss", "eval_loss", "channel_loss", "channel_weights", "eval_losses"):
            if value[name] is None:
                del value[name]
        return value


class Watcher(Protocol):
    """Something that looks at each step; called on rank 0 only."""

    def step(self, record: StepRecord) -> None:
        """One step is done; its checkpoint, if it gets one, comes after this."""

    def saved(self, checkpoint: Path) -> None:
        """A checkpoint is published."""

    def close(self) -> None:
        """The run ends, well or not."""


class MetricsFile:
    """Appends to metrics.jsonl; every line is flushed whole."""

    def __init__(self, output_dir: Path) -> None:
        self._path = output_dir / rundir.METRICS
        self._file: TextIO = self._path.open("a", encoding="utf-8")

    def step(self, record: StepRecord) -> None:
        """Append one line."""
        try:
            self._file.write(json.dumps(record.as_dict()) + "\n")
            self._file.flush()
        except OSError as error:
            raise MswiftError(f"{self._path}: cannot be written ({error.strerror}); free some space") from error

    def saved(self, checkpoint: Path) -> None:
        """Nothing: see `mswift.ledger`."""

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class Progress:
    """A progress bar on a terminal, else a line every `every` steps."""

    def __init__(self, first_step: int, last_step: int, every: int) -> None:
        self._bar = tqdm(
            total=last_step,
            initial=first_step,
            unit="step",
            dynamic_ncols=True,
            miniters=1,
            disable=not sys.stderr.isatty(),
        )
        self._last_step, self._every = last_step, every

    def step(self, record: StepRecord) -> None:
        """Show loss, gradient norm, learning rate and speed."""
        parts = {
            "loss": _number(record.loss),
            "grad_norm": "not finite" if record.grad_norm is None else f"{record.grad_norm:.3f}",
            **{f"loss[{name}]": _number(value) for name, value in (record.channel_loss or {}).items()},
            "lr": f"{record.lr:.2e}",
            "tok/s": f"{record.tokens_per_second:,.0f}",
            "data_wait": f"{record.data_wait:.1%}",
        }
        if record.mtp_loss is not None:
            parts["mtp_loss"] = f"{record.mtp_loss:.4f}"
        if record.mfu is not None:
            parts["mfu"] = f"{record.mfu:.1%}"
        if record.eval_loss is not None:
            parts["eval_loss"] = f"{record.eval_loss:.4f}"
            parts |= {f"eval_loss[{name}]": f"{value:.4f}" for name, value in (record.eval_losses or {}).items()}
        if not self._bar.disable:
            self._bar.set_postfix(parts, refresh=False)
            self._bar.update()
        elif record.step % self._every == 0 or record.step == self._last_step or record.eval_loss is not None:
            width = len(str(self._last_step))
            text = "  ".join(f"{name} {value}" for name, value in parts.items())
            print(f"step {record.step:{width}d}/{self._last_step}  {text}", flush=True)

    def saved(self, checkpoint: Path) -> None:
        """Say so."""
        tqdm.write(f"saved {checkpoint}", file=sys.stdout)
        sys.stdout.flush()

    def close(self) -> None:
        """Leave the bar where it is."""
        self._bar.close()


class TensorBoard:
    """Scalars for TensorBoard in output_dir/runs; a resumed run purges what came after its first step."""

    def __init__(self, output_dir: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(output_dir / rundir.TENSORBOARD), purge_step=first_step + 1)

    def step(self, record: StepRecord) -> None:
        """Write the finite scalars of the record."""
        scalars = {
            "train/loss": record.loss,
            "train/mtp_loss": record.mtp_loss,
            "train/grad_norm": record.grad_norm,
            "train/lr": record.lr,
            "speed/tokens_per_second": record.tokens_per_second,
            "speed/mfu": record.mfu,
            "speed/data_wait": record.data_wait,
            "eval/loss": record.eval_loss,
            **{f"train/loss/{name}": value for name, value in (record.channel_loss or {}).items()},
            **{f"eval/loss/{name}": value for name, value in (record.eval_losses or {}).items()},
        }
        for name, value in scalars.items():
            if value is not None and math.isfinite(value):
                self._writer.add_scalar(name, value, record.step)

    def saved(self, checkpoint: Path) -> None:
        """Nothing to draw."""

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"


def finite(value: float) -> float | None:
    """The value, or None for nan and inf, which JSON does not have."""
    return value if math.isfinite(value) else None


@contextlib.contextmanager
def watching(watchers: list[Watcher]) -> Iterator[list[Watcher]]:
    """Close every watcher at the end, also after an error."""
    with contextlib.ExitStack() as stack:
        for watcher in watchers:
            stack.callback(watcher.close)
        yield watchers


def plot_loss(output_dir: Path) -> Path | None:
    """Draw loss.png from metrics.jsonl: every step, a running mean, evaluations. None if there is nothing to draw."""
    rows = [row for row in rundir.read_metrics(output_dir) if row["loss"] is not None]
    if not rows:
        return None
    from matplotlib.figure import Figure

    steps = [row["step"] for row in rows]
    losses = [row["loss"] for row in rows]
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    axes.plot(steps, losses, color="tab:blue", alpha=0.3, linewidth=0.8, label="loss of each step")
    if len(losses) >= 20:
        axes.plot(steps, _running_mean(losses, max(len(losses) // 50, 2)), color="tab:blue", label="running mean")
    evaluations = [(row["step"], row["eval_loss"]) for row in rows if "eval_loss" in row]
    if evaluations:
        axes.plot(*zip(*evaluations, strict=True), "o-", color="tab:orange", label="evaluation")
    axes.set(xlabel="optimizer step", ylabel="loss (nats per token)", title=output_dir.resolve().name)
    axes.grid(alpha=0.3)
    axes.legend()
    path = output_dir / rundir.LOSS_PLOT
    figure.savefig(path)
    return path


def _running_mean(values: list[float], window: int) -> list[float]:
    """Mean of the last `window` values at each place."""
    result, total = [], 0.0
    for index, value in enumerate(values):
        total += value - (values[index - window] if index >= window else 0.0)
        result.append(total / min(index + 1, window))
    return result
