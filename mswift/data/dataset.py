"""Files -> a data set of token samples, through the token cache.

sft: one row is one sample (or several, see `template`), of at most max_length tokens. pt: the documents are joined in
file order, each ended by the end token, and cut every L = max_length tokens: sample i holds the tokens i * L to
(i + 1) * L of the stream, both included, so that it fills L positions of a batch and every token but the very first is
a target exactly once. The last sample is shorter; nothing is left out.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from mswift.data.batch import Sample
from mswift.data.cache import FORMAT_VERSION, TokenStore, content_hash, default_cache_dir, file_hash, open_or_build
from mswift.data.formats import DataFile, parse_spec
from mswift.data.tokenizer import Tokenizer, tokenizer_identity
from mswift.data.writers import FileReport, SftOptions, write_conversations, write_documents
from mswift.errors import ConfigError

Kind = Literal["pt", "sft"]


@dataclass(frozen=True)
class DataOptions:
    """What decides the samples besides the files and the tokenizer."""

    max_length: int
    truncation_strategy: Literal["delete", "right", "raise"] = "delete"
    """sft: what becomes of a sample of more than max_length tokens."""
    system: str | None = None
    """sft: system message of rows that have none."""
    model_positions: int | None = None
    """Longest sample that the model takes; it decides no token, only what errors propose."""
    cache_dir: str | Path | None = None
    """Default: $MSWIFT_CACHE, or ~/.cache/mswift."""


class TokenDataset:
    """Samples in a fixed order, read from memory-mapped files; safe to share between processes."""

    def __init__(self, store: TokenStore, starts: NDArray[np.int64], ends: NDArray[np.int64], fingerprint: str) -> None:
        self._tokens, self._mask = store.tokens, store.mask
        self._starts, self._ends = starts, ends
        self.fingerprint = fingerprint
        """Hash of the samples: two data sets with the same fingerprint give the same samples under the same ids."""
        self.lengths: NDArray[np.int64] = ends - starts - 1
        """int64 [samples]; positions each sample fills in a batch: its tokens less one (the last is only a target)."""
        self.num_tokens = len(self._tokens)
        self.largest_token = store.largest_token
        self.num_trained_tokens = self._count_trained()
        reports = [FileReport(**report) for report in store.report["files"]]
        self.summary = "\n".join(report.line() for report in reports) + "\n" + self._total()
        """One line per file (rows, what was left out and why), and one in all."""

    def __len__(self) -> int:
        return len(self._starts)

    def sample(self, index: int) -> Sample:
        """The sample with the id `index`; IndexError beyond the last."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        start, end = int(self._starts[index]), int(self._ends[index])
        if self._mask is None:
            mask = np.ones(end - start, dtype=np.bool_)
        else:
            mask = np.array(self._mask[start:end])
        mask[0] = False
        return Sample(np.array(self._tokens[start:end]), mask)

    def _count_trained(self) -> int:
        return self.num_tokens - 1 if self._mask is None else int(np.count_nonzero(self._mask))

    def _total(self) -> str:
        return (
            f"{len(self):,} samples, {self.num_tokens:,} tokens, {self.num_trained_tokens:,} of them learned, "
            f"{int(self.lengths.max()) + 1:,} in the longest sample"
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
) -> TokenDataset:
    """The data set of all files in `specs` (`PATH` or `PATH#N`), tokenised by the writer unless the cache has it.

    Every rank calls it with the same arguments, one of them (on each file system) as the writer; `barrier` returns when
    all have come. `flag` is what errors call the list. ConfigError and DataError name flag, file or row.
    """
    if not specs:
        raise ConfigError(f"{flag} names no file: {flag} train.jsonl")
    if options.max_length < 2:
        raise ConfigError(f"--max_length {options.max_length}: a sample needs at least 2 tokens, --max_length 2048")
    files = [parse_spec(spec, flag) for spec in specs]
    sft = SftOptions(options.max_length, options.truncation_strategy, options.system)
    root = Path(options.cache_dir).expanduser() if options.cache_dir else default_cache_dir()
    store = open_or_build(
        root / "tokens" / _key(kind, files, tokenizer, sft),
        lambda writer: (
            write_documents(writer, files, tokenizer, progress)
            if kind == "pt"
            else write_conversations(writer, files, tokenizer, sft, progress, options.model_positions)
        ),
        with_mask=kind == "sft",
        is_writer=is_writer,
        barrier=barrier,
    )
    if kind == "sft":
        return TokenDataset(store, store.offsets[:-1], store.offsets[1:], store.fingerprint)
    starts = np.arange(0, len(store.tokens) - 1, options.max_length, dtype=np.int64)
    ends = np.minimum(starts + options.max_length + 1, len(store.tokens))
    fingerprint = content_hash({"stream": store.fingerprint, "max_length": options.max_length})
    return TokenDataset(store, starts, ends, fingerprint)


def _key(kind: Kind, files: Sequence[DataFile], tokenizer: Tokenizer, sft: SftOptions) -> str:
    """Name of the cache entry; a stream of documents does not depend on the options."""
    parts = {
        "version": FORMAT_VERSION,
        "kind": kind,
        "files": [[file_hash(file.path), file.path.name, file.suffix, file.limit] for file in files],
        "tokenizer": tokenizer_identity(tokenizer),
        "options": asdict(sft) if kind == "sft" else None,
    }
    return content_hash(parts)[:40]
