"""What a run saves and when: checkpoints (at once, or beside the training), Hugging Face snapshots, on signals."""

from pathlib import Path

from mswift.config.loader import to_dict
from mswift.data.order import ORDER_VERSION
from mswift.data.stream import StreamDataset, num_samples
from mswift.train.checkpoint import RunState, engine_layout
from mswift.train.loop import FinishedStep
from mswift.train.parts import Run
from mswift.train.save import BackgroundSave, CheckpointSave, Staging, save_state, state_shards
from mswift.train.snapshot import Snapshot
from mswift.tuners.export import beside_adapter
from mswift.tuners.peft_config import CONFIG_FILE


class Saver:
    """The checkpoints of a run, on one rank; every method is called on all ranks."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._staging = Staging()
        self._under_way: BackgroundSave | None = None

    @property
    def is_busy(self) -> bool:
        """Whether this rank is writing a checkpoint in the background just now."""
        return self._under_way is not None and self._under_way.is_busy

    def after_step(self, done: FinishedStep, *, any_busy: bool, last: bool) -> list[Path]:
        """Save what is due after a step; the checkpoints that were published meanwhile.

        any_busy: whether some rank `is_busy`; last: no step follows, so all must be on the disk on return.
        """
        config = self._run.config
        published = []
        if self._under_way is not None and not any_busy and self._under_way.advance():
            published, self._under_way = [self._under_way.destination], None
        if config.save_hf_steps and done.step % config.save_hf_steps == 0:
            self._snapshot(done.step)
        if last or (config.save_steps and done.step % config.save_steps == 0):
            published += self.save(done.step, done.consumed_samples, wait=last)
        return published

    def save(self, step: int, consumed_samples: int, *, wait: bool) -> list[Path]:
        """Save the state as it is now, behind the one that is under way; what of them is published on return.

        With --async_save and without `wait` this one is not yet.
        """
        published = self.finish()
        run, rank = self._run, self._run.rank
        state, keep = self._state(step, consumed_samples), run.config.save_total_limit
        if wait or not run.config.async_save:
            return [*published, save_state(run.engine, run.output_dir, state, rank, run.hf_files, keep)]
        copies = self._staging.copy(state_shards(run.engine, rank), run.device)
        self._under_way = BackgroundSave(CheckpointSave(run.output_dir, state, rank, copies, run.hf_files, keep))
        return published

    def finish(self) -> list[Path]:
        """Wait for the save that is under way, if there is one; its checkpoint."""
        if self._under_way is None:
            return []
        under_way, self._under_way = self._under_way, None
        return [under_way.finish()]

    def _snapshot(self, step: int) -> None:
        run = self._run
        adapter = run.engine.config.trains_adapter
        files = run.hf_files
        if adapter:
            files = {CONFIG_FILE: files[CONFIG_FILE], **dict(beside_adapter(to_dict(run.config), files))}
        path = Snapshot(run.output_dir, step, run.rank, files).write(run.engine)
        if run.rank == 0:
            print(f"wrote {path}", flush=True)

    def _state(self, step: int, consumed_samples: int) -> RunState:
        run = self._run
        return RunState(
            step=step,
            consumed_samples=consumed_samples,
            optimizer_step=run.engine.optimizer_step,
            world_size=run.dims.world_size,
            layout=engine_layout(run.engine),
            data_fingerprint=run.data.fingerprint,
            num_samples=num_samples(run.data),
            config=to_dict(run.config),
            dtype=run.engine.config.dtype,
            base=run.base,
            skipped_steps=run.skipped_steps,
            order_version=ORDER_VERSION,
            stream=run.data.state_at(consumed_samples) if isinstance(run.data, StreamDataset) else (),
        )
