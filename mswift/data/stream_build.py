"""The sources of a stream, and what decides its samples; see `stream`."""

import copy
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from blake3 import blake3

from mswift.data.cache import FORMAT_VERSION, StoreWriter, cache_root
from mswift.data.dataset import DataOptions, Kind, TokenDataset
from mswift.data.documents import proved_cut
from mswift.data.encoding import ConversationEncoder, DocumentEncoder
from mswift.data.hashing import content_hash
from mswift.data.packed import PackedDataset
from mswift.data.packing import Strategy
from mswift.data.places import Bounds, Cursor
from mswift.data.pool import default_num_proc
from mswift.data.portions import PORTION_BYTES, has_portions
from mswift.data.samples import Cut, whole
from mswift.data.sources import HubSplit, Part, Source, parse_source
from mswift.data.stream import SourceStream, StreamDataset
from mswift.data.stream_blocks import Block, BlockMaker, BlockReader, Files
from mswift.data.tokenizer import Tokenizer, tokenizer_identity
from mswift.data.writers import HowToWrite, write_rows
from mswift.errors import ConfigError

BLOCK_BYTES = 1 << 28
_EDGE_BYTES = 1 << 20


@dataclass(frozen=True)
class StreamOptions:
    """What a stream has beside the options of any data set."""

    block_rows: int
    """Rows that are tokenised, shuffled and packed together; fewer where they have more than BLOCK_BYTES."""
    packing: tuple[int, Strategy] | None
    """Positions of a row and how it is filled; None: a sample a row."""
    owner: str
    """The run that the blocks on the disk belong to."""


def build_stream(
    kind: Kind,
    specs: Sequence[str],
    tokenizer: Tokenizer,
    options: DataOptions,
    stream: StreamOptions,
    *,
    is_writer: bool,
    check: Callable[[TokenDataset], None],
    opened: Callable[[int, Block], None],
    say: Callable[[str], None],
) -> StreamDataset:
    """The stream of all sources in `specs`; nothing is read before it starts.

    `check` refuses the samples of a block, `opened` hears of every block by its number, `say` has what the user should
    know. The folder of the blocks is emptied by the writer: all ranks meet after this and before the start.
    """
    sources = _whole_files(specs)
    fingerprint = _fingerprint(kind, sources, tokenizer, options, stream)
    root = cache_root(options.cache_dir)
    folder = root / "streams" / content_hash({"samples": fingerprint, "owner": stream.owner})[:40]
    own = copy.deepcopy(tokenizer) if is_writer else tokenizer  # truncation and padding of a call are a state of it
    fill = _filler(kind, own, options)
    cut = partial(proved_cut, own) if kind == "pt" else None

    def rows_of(number: int, block: Block) -> TokenDataset | PackedDataset | None:
        opened(number, block)
        data = _samples(block, options)
        if data is None:
            return None
        check(data)
        return data if stream.packing is None else PackedDataset(data, *stream.packing)

    def stream_of(number: int, of: Sequence[Source]) -> SourceStream:
        parts = [part for source in of for part in source.parts]
        paths = [path for source in of for path in source.paths]
        place = folder / str(number)
        blocks = BlockReader(place)
        if is_writer:
            blocks = BlockMaker(
                place, lambda start: Cursor(parts, start, say, cut), lambda writer, files: fill(writer, files, paths),
                Bounds(stream.block_rows, BLOCK_BYTES), kind == "sft",
            )  # fmt: skip
        name = ", ".join(source.spec for source in of)
        return SourceStream(blocks, rows_of, options.selection.seed + number, f"--dataset {name}")

    weights = options.weights
    groups = [[source] for source in sources] if weights else [sources]
    streams = [stream_of(number, of) for number, of in enumerate(groups)]
    return StreamDataset(streams, weights or [1.0], fingerprint, _summary(sources, weights, stream))


def _whole_files(specs: Sequence[str]) -> list[Source]:
    """ConfigError for a number of rows of a file."""
    sources = [parse_source(spec) for spec in specs]
    for source in sources:
        if source.count is not None:
            raise ConfigError(
                f"--streaming reads files as a whole, {source.spec} asks for {source.count} rows: name a file with "
                "these rows, or leave out --streaming"
            )
    return sources


def _fingerprint(
    kind: Kind, sources: Sequence[Source], tokenizer: Tokenizer, options: DataOptions, stream: StreamOptions
) -> str:
    """Of all that decides the samples and their order."""
    return content_hash(
        {
            "version": FORMAT_VERSION,
            "kind": kind,
            "sources": [[_identity(part) for part in source.parts] for source in sources],
            "weights": options.weights,
            "seed": options.selection.seed,
            "columns": options.columns,
            "tokenizer": tokenizer_identity(tokenizer),
            "options": asdict(options.of_conversations) if kind == "sft" else options.max_length,
            "block": [stream.block_rows, BLOCK_BYTES],
            "packing": stream.packing,
            **({"portions": PORTION_BYTES} if kind == "pt" and _has_portions(sources) else {}),
            **({} if options.cut == "joined" else {"cut": options.cut}),
        }
    )


def _filler(
    kind: Kind, tokenizer: Tokenizer, options: DataOptions
) -> Callable[[StoreWriter, Files, Sequence[Path]], Mapping[str, Any]]:
    """What tokenises the files of a block, one block at a time."""
    one_at_a_time = threading.Lock()  # transformers keeps the {% generation %} marks of a text in the shared template
    columns, sft = options.columns, options.of_conversations

    def fill(writer: StoreWriter, files: Files, paths: Sequence[Path]) -> Mapping[str, Any]:
        how = HowToWrite(options.strict, False, options.num_proc or default_num_proc(paths))
        with one_at_a_time:
            encoder: DocumentEncoder | ConversationEncoder = (
                DocumentEncoder(tokenizer, columns, strict=how.strict)
                if kind == "pt"
                else ConversationEncoder(tokenizer, columns, sft, strict=how.strict)
            )
            return write_rows(writer, files, encoder, columns, how)

    return fill


def _samples(block: Block, options: DataOptions) -> TokenDataset | None:
    """Of a block; None where it has none, as documents of a single token."""
    if block.store is None:
        return None
    samples = whole(block.store, Cut(options.max_length, options.cut))
    return TokenDataset(block.store, samples) if len(samples.starts) else None


def _has_portions(sources: Sequence[Source]) -> bool:
    return any(has_portions(path) for source in sources for path in source.paths)


def _summary(sources: Sequence[Source], weights: Sequence[float], stream: StreamOptions) -> str:
    shares = [f"{weight:g} " for weight in weights] or [""] * len(sources)
    names = ", ".join(share + source.spec for share, source in zip(shares, sources, strict=True))
    packed = "" if stream.packing is None else f", packs of at most {stream.packing[0]:,} positions in each"
    return f"streamed: {names}; blocks of at most {stream.block_rows:,} rows or {BLOCK_BYTES >> 20} MiB{packed}"


def _identity(part: Part) -> list[Any]:
    """Name, size and the hash of both ends of a file, which is not read as a whole."""
    if isinstance(part, HubSplit):
        from mswift.data.hub import hub_fingerprint

        return [str(part), hub_fingerprint(part.name, part.subset, part.flag)]
    size = part.path.stat().st_size
    with part.path.open("rb") as stream:
        digest = blake3(stream.read(_EDGE_BYTES))
        stream.seek(max(0, size - _EDGE_BYTES))
        digest.update(stream.read(_EDGE_BYTES))
    return [part.name, size, digest.hexdigest()]
