"""--streaming: the stream of a run, and what is said and kept of its rows."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from mswift import rundir
from mswift.config.train import TrainConfig
from mswift.data.dataset import DataOptions, Kind, TokenDataset
from mswift.data.packed import Stored
from mswift.data.stream import StreamDataset
from mswift.data.stream_blocks import Block
from mswift.data.stream_build import StreamOptions, build_stream
from mswift.data.tokenizer import Tokenizer
from mswift.errors import ConfigError
from mswift.launchers.environment import RankInfo
from mswift.train.checkpoint import RunState
from mswift.train.collective import patient_barrier


def training_stream(
    kind: Kind,
    config: TrainConfig,
    specs: Sequence[str],
    info: RankInfo,
    tokenizer: Tokenizer,
    options: DataOptions,
    check: Callable[[TokenDataset], None],
) -> StreamDataset:
    """The stream that the flags mean, which all ranks can start; `check` refuses the samples of a block."""
    if options.epochs:
        raise ConfigError(
            f"--dataset {config.dataset[0]} gives epochs, which need the number of samples, and --streaming does not "
            "count them: give every source a weight"
        )
    rejected = Path(config.output_dir) / rundir.REJECTED

    def opened(number: int, block: Block) -> None:
        if info.rank == 0:
            add_rejected(rejected, block)
            print(f"data block {number}: {'; '.join(report.line() for report in block.reports)}", flush=True)

    stream = StreamOptions(
        config.streaming_block_rows,
        (config.row_length, config.packing_strategy) if config.packing else None,
        str(Path(config.output_dir).absolute()),
    )
    data = build_stream(
        kind, specs, tokenizer, options, stream, is_writer=info.local_rank == 0, check=check, opened=opened,
        say=lambda text: print(text, flush=True),
    )  # fmt: skip
    patient_barrier()  # the writers have emptied the folders of the blocks
    return data


@contextmanager
def started(data: Stored | StreamDataset, state: RunState | None) -> Iterator[None]:
    """A stream goes on where the run stands; it is closed on all ranks when the block ends without an error."""
    if not isinstance(data, StreamDataset):
        yield
        return
    data.start(state.consumed_samples if state else 0, state.stream if state else None)
    yield
    patient_barrier()  # no rank waits for a block any more
    data.close()


def add_rejected(path: Path, block: Block) -> None:
    """Append the bad rows of a block that are not in the file yet: from an earlier pass, or before a resume."""
    if not any(report.rejected.rows for report in block.reports):
        return
    known = set(path.read_bytes().splitlines()) if path.exists() else set()
    with path.open("ab") as stream:
        for line in block.rejected.read_bytes().splitlines():
            if line not in known:
                stream.write(line + b"\n")
