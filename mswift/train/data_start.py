"""The pass over data before the first step by which EVA and LoRA-GA start adapters; a resumed run has done it."""

from mswift.data.stream import StreamDataset
from mswift.train.batches import training_batch
from mswift.train.parts import Run
from mswift.tuners.data_start import DataStart
from mswift.tuners.settings import FROM_DATA


def start_from_data(run: Run) -> None:
    """Start the adapters of a new run from its first batches, if it is to; they are trained on afterwards as ever."""
    from mswift.parallel.fsdp.engine import FsdpEngine

    config = run.config
    if not config.trains_lora or config.init_weights not in FROM_DATA:
        return
    assert isinstance(run.engine, FsdpEngine)
    assert not isinstance(run.data, StreamDataset)
    size = config.global_batch_size
    places = range(0, config.init_batches * size, size)
    steps = [training_batch(run.data, run.plan, config.seed, place).microbatches for place in places]
    how = DataStart(config.init_weights, config.lora_ga_direction, config.lora_ga_scale, config.lora_ga_stable_gamma)
    done = run.engine.start_from_data(steps, how)
    if run.rank == 0:
        print(f"start      {done}", flush=True)
