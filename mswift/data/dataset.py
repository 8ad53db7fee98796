"""Files -> a data set of token samples, through the token cache.

sft: one row is one sample (or several, see `template`), of at most max_length tokens. pt: the documents are joined in
file order, each ended by the end token, and cut every L = max_length tokens: sample i holds the tokens i * L to
(i + 1) * L of the stream, both included, so that it fills L positions of a batch and every token but the very first is
a target exactly once. The last sample is shorter; nothing is left out. With weights, the stream of each source is cut
on its own, and an epoch holds as many samples as without them, shared out among the sources by the weights. Packed
documents stay apart (see `samples`).
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mswift.config.agents import AgentTemplate
from mswift.data.apart import Apart
from mswift.data.batch import NO_CHANNEL, Sample
from mswift.data.cache import (
    FORMAT_VERSION,
    StoreWriter,
    TokenStore,
    cache_root,
    open_or_build,
)
from mswift.data.encoding import SftOptions
from mswift.data.hashing import FileHashes, content_hash
from mswift.data.loss_scale import PLAIN, LossScale
from mswift.data.pool import default_num_proc
from mswift.data.report import FileReport
from mswift.data.samples import Cut, CutKind, Samples, ShareKind, by_source, mixed, whole
from mswift.data.selection import Selection
from mswift.data.sources import HubSplit, Part, Source, parse_source
from mswift.data.tokenizer import Tokenizer, tokenizer_identity
from mswift.data.truncation import Strategy
from mswift.data.writers import HowToWrite, RowOptions, write_conversations, write_documents
from mswift.errors import ConfigError, DataError

Kind = Literal["pt", "sft"]
AGENT_VERSION = 2
"""Goes up when an agent template comes to write another text of a row; 1 wrote results as they stood in it."""


@dataclass(frozen=True)
class DataOptions:
    """What decides the samples besides the files and the tokenizer."""

    max_length: int
    truncation_strategy: Strategy = "delete"
    """sft: what becomes of a sample of more than max_length tokens."""
    cut: CutKind = "joined"
    """pt: whether and how a sample is part of one document."""
    system: str | None = None
    """sft: system message of rows that have none."""
    loss_scale: LossScale = PLAIN
    """sft: which turns are learned, with what weights."""
    agent_template: AgentTemplate | None = None
    """sft: how tools, calls and results become text; None: by the chat template."""
    model_positions: int | None = None
    """Longest sample that the model takes; it decides no token, only what errors propose."""
    cache_dir: str | Path | None = None
    """Default: $MSWIFT_CACHE, or ~/.cache/mswift."""
    selection: Selection = field(default_factory=Selection)
    columns: tuple[tuple[str, str], ...] = ()
    """(name in the file, name that is meant)."""
    weights: tuple[float, ...] = ()
    """Shares of the sources in an epoch; none: every sample once."""
    epochs: tuple[float, ...] = ()
    """How often the samples of each source come in an epoch; in place of weights."""
    by_source: bool = False
    """The channel of a sample is the source that it comes from, where there are several."""
    strict: bool = False
    """The first bad row is an error."""
    num_proc: int | None = None
    """Processes that tokenise; None: see `pool.default_num_proc`."""

    @property
    def of_conversations(self) -> SftOptions:
        """sft: what decides the tokens of a row."""
        return SftOptions(self.max_length, self.truncation_strategy, self.system, self.loss_scale, self.agent_template)


class TokenDataset:
    """Samples in a fixed order, read from memory-mapped files; safe to share between processes."""

    def __init__(self, store: TokenStore, samples: Samples) -> None:
        self._tokens = Apart(store.tokens) if isinstance(store.tokens, np.ndarray) else store.tokens
        self._mask = None if store.mask is None else Apart(store.mask)
        self._weights = store.weights
        self._starts, self._ends = samples.starts, samples.ends
        self._channels = samples.channels
        self.channel_names = samples.channel_names
        """Channels of the samples; () where their loss is not reported apart."""
        self.fingerprint = samples.fingerprint
        """Hash of the samples: two data sets with the same fingerprint give the same samples under the same ids."""
        self.lengths: NDArray[np.int64] = self._ends - self._starts - 1
        """int64 [samples]; positions each sample fills in a batch: its tokens less one (the last is only a target)."""
        self.num_tokens = samples.num_tokens
        self.num_trained_tokens = samples.num_trained_tokens
        self.largest_token = store.largest_token
        reports = [FileReport.load(report) for report in store.report["files"]]
        self.num_rejected_rows = sum(report.rejected.rows for report in reports)
        self.entry = store.rejected_path.parent
        """The directory in the token cache."""
        self.rejected_path = store.rejected_path
        """One JSON object for every bad row (file, row, reason, content), where there is one."""
        self.summary = "\n".join([*(report.line() for report in reports), *samples.lines, self._total()])
        """One line per file (rows, what was left out and why), and one in all."""

    def __len__(self) -> int:
        return len(self._starts)

    def sample(self, index: int) -> Sample:
        """The sample with the id `index`; IndexError beyond the last."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        start, end = int(self._starts[index]), int(self._ends[index])
        if self._mask is None:
            weights = np.ones(end - start, dtype=np.float32)
        else:
            weights = self._weights[self._mask[start:end]]
        weights[0] = 0.0
        channel = NO_CHANNEL if self._channels is None else self.channel_names[self._channels[index]]
        return Sample(np.array(self._tokens[start:end]), weights, channel)

    def row(self, index: int) -> dict[int, Sample]:
        """The samples, by their ids, of row `index` of a batch: that one."""
        return {index: self.sample(index)}

    def _total(self) -> str:
        return (
            f"{len(self):,} samples, {self.num_tokens:,} tokens, {self.num_trained_tokens:,} of them learned, "
            f"{int(self.lengths.max()) + 1:,} in the longest sample"
            + (f"; {self.num_rejected_rows:,} rows rejected" if self.num_rejected_rows else "")
        )


def build_dataset(
    kind: Kind,
    specs: Sequence[str],
    tokenizer: Tokenizer,
    options: DataOptions,
    *,
    is_writer: bool,
    barrier: Callable[[], None],
    progress: bool,
    flag: str = "--dataset",
    hand_over: Callable[[Path | None], Path | None] | None = None,
) -> TokenDataset:
    """The data set of all sources in `specs` (see `sources`), tokenised by the writer unless the cache has it.

    Every rank calls it with the same arguments, one of them (on each file system) as the writer; `barrier` returns when
    all have come; `hand_over` (see `open_or_build`) spares all but the writer the hashes. `flag` is what errors call
    the list. ConfigError and DataError name flag, file or row.
    """
    sources = _sources(specs, options, flag)
    rows, sft = RowOptions(options.selection, options.columns), options.of_conversations
    files = [path for source in sources for path in source.paths]
    how = HowToWrite(options.strict, progress, options.num_proc or default_num_proc(files))
    root = cache_root(options.cache_dir)

    def write(writer: StoreWriter) -> Mapping[str, Any]:
        if kind == "pt":
            return write_documents(writer, sources, tokenizer, rows, how)
        return write_conversations(writer, sources, tokenizer, rows, sft, how, model_positions=options.model_positions)

    def locate() -> Path:
        hashes = FileHashes(root / "files.json")
        key = _key(kind, sources, tokenizer, rows, sft, hashes)
        hashes.save()
        return root / "tokens" / key

    with_mask = kind == "sft"
    store = open_or_build(locate, write, with_mask=with_mask, is_writer=is_writer, barrier=barrier, hand_over=hand_over)
    if flag == "--dataset" and options.selection.part == "train":
        _check_columns(store)
    samples = _samples(store, options, [source.spec for source in sources], flag)
    if not len(samples.starts):
        raise DataError(f"{flag}: every document is a single token, which predicts nothing; write text in them")
    data = TokenDataset(store, samples)
    if options.strict and data.num_rejected_rows:
        first = next(report["reasons"][0] for report in store.report["files"] if report["reasons"])
        raise DataError(f"{first} (--strict; without it the row is left out)")
    return data


def _sources(specs: Sequence[str], options: DataOptions, flag: str) -> list[Source]:
    """ConfigError where there are none, or no sample could be long enough."""
    if not specs:
        raise ConfigError(f"{flag} names no file: {flag} train.jsonl")
    if options.max_length < 2:
        raise ConfigError(f"--max_length {options.max_length}: a sample needs at least 2 tokens, --max_length 2048")
    return [parse_source(spec, flag) for spec in specs]


def _check_columns(store: TokenStore) -> None:
    """ConfigError for one of --columns that no row has."""
    if unused := store.report["unused_columns"]:
        raise ConfigError(
            f"--columns: no row of --dataset has `{unused[0]}`; leave it out, or name a column that is there"
        )


def _samples(store: TokenStore, options: DataOptions, specs: Sequence[str], flag: str) -> Samples:
    """Every sample once, or as weights or epochs say."""
    cut = Cut(options.max_length, options.cut)
    if options.by_source and len(specs) > 1:
        return by_source(store, cut, specs)
    if options.weights or options.epochs:
        kind: ShareKind = "weights" if options.weights else "epochs"
        numbers = options.weights or options.epochs
        return mixed(store, kind, numbers, options.selection.seed, cut, flag)
    return whole(store, cut)


def write_rejected(path: Path, datasets: Sequence[TokenDataset]) -> None:
    """The bad rows of all data sets in one file; no file where there are none."""
    if not any(data.num_rejected_rows for data in datasets):
        path.unlink(missing_ok=True)
        return
    with path.open("wb") as stream:
        for data in (data for data in datasets if data.num_rejected_rows):
            with data.rejected_path.open("rb") as rejected:
                shutil.copyfileobj(rejected, stream)


def _key(
    kind: Kind,
    sources: Sequence[Source],
    tokenizer: Tokenizer,
    rows: RowOptions,
    sft: SftOptions,
    hashes: FileHashes,
) -> str:
    """Name of the cache entry; a stream of documents does not depend on the options of conversations."""
    selection = rows.selection
    if not selection.split_ratio and all(s.count is None or selection.method == "first" for s in sources):
        selection = Selection()  # nothing is drawn, so the seed decides nothing
    parts = {
        "version": FORMAT_VERSION,
        "kind": kind,
        "sources": [[[_identity(part, hashes) for part in source.parts], source.count] for source in sources],
        "selection": asdict(selection),
        "columns": rows.columns,
        "tokenizer": tokenizer_identity(tokenizer),
        "options": asdict(sft) if kind == "sft" else None,
    }
    if kind == "sft" and sft.agent_template is not None:
        parts["agent_version"] = AGENT_VERSION
    return content_hash(parts)[:40]


def _identity(part: Part, hashes: FileHashes) -> list[str]:
    """What decides the rows of a part, and its name, which the report holds."""
    if isinstance(part, HubSplit):
        from mswift.data.hub import hub_fingerprint

        return [str(part), hub_fingerprint(part.name, part.subset, part.flag)]
    return [part.name, hashes[part.path]]
