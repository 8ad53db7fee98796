"""Token files on disk: written once under the hash of everything that decides them, mapped into memory by every rank.

An entry is a directory: tokens.bin (int32), mask.bin (one byte a token, the place of its loss weight in the index's
table of weights; absent in a plain stream), offsets.bin (int64 [pieces + 1]: where each sample or document starts, and
the end), channels.bin (one byte a sample, the place of its channel in a table likewise; absent in a plain stream),
rejected.jsonl (bad rows) and index.json. It is written in a sibling (see `partial`), fsynced and renamed, so it is
whole or absent. On opening, sizes and the checksums of index and offsets are compared. The content hashes in the index,
taken while writing, and the tables are the fingerprint of the data.
"""

import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from mswift.data.batch import NO_CHANNEL, Sample
from mswift.data.hashing import content_hash, file_hash
from mswift.data.one_writer import WRITER_FAILED, HandOver, made_by_writer
from mswift.data.partial import JOURNAL, read_journal, sole_builder, write_journal
from mswift.errors import DataError

FORMAT_VERSION = 7
MOST_WEIGHTS = MOST_CHANNELS = 256
"""Distinct loss weights in an entry: a token has a byte for its own."""
REJECTED = "rejected.jsonl"
INDEX = "index.json"
CHECKPOINT_BYTES = 16 << 20
"""Written between two checkpoints of a build."""
_EMPTY: dict[str, Any] = {
    "sizes": {}, "num_tokens": 0, "num_pieces": 0, "num_trained_tokens": 0, "largest_token": -1, "weights": [0.0, 1.0],
    "channels": [NO_CHANNEL], "state": None,
}  # fmt: skip
_log = logging.getLogger(__name__)


def cache_root(cache_dir: str | Path | None) -> Path:
    """--cache_dir, else $MSWIFT_CACHE, else ~/.cache/mswift."""
    return Path(cache_dir or os.environ.get("MSWIFT_CACHE") or "~/.cache/mswift").expanduser()


class Tokens(Protocol):
    """A stream of token ids, an array or several that are joined when they are read."""

    def __len__(self) -> int: ...
    def __getitem__(self, where: slice, /) -> NDArray[np.int32]: ...


@dataclass(frozen=True)
class TokenStore:
    """An open entry; the arrays are read-only maps of its files."""

    tokens: Tokens
    """int32 [tokens]"""
    mask: NDArray[np.uint8] | None
    """uint8 [tokens]: the place of the token's loss weight in `weights`; 0 where nothing is learned."""
    weights: NDArray[np.float32]
    """float32 [at most 256]; the first two are 0 and 1."""
    offsets: NDArray[np.int64]
    """int64 [pieces + 1]"""
    channels: NDArray[np.uint8] | None
    """uint8 [pieces]: the place of the sample's channel in `channel_names`; None where no row names one."""
    channel_names: tuple[str, ...]
    largest_token: int
    report: dict[str, Any]
    """What the writer had to say about the data."""
    fingerprint: str
    rejected_path: Path
    """Bad rows, one JSON object a line."""
    num_trained_tokens: int
    """Tokens that are learned, where there is a mask."""


class _HashedFile:
    """A file whose hash and size are known when it is closed; `kept` bytes that it has already stay."""

    def __init__(self, path: Path, kept: int = 0) -> None:
        self._stream: IO[bytes] = path.open("r+b" if kept else "wb")
        self._hash = blake3()
        self.size = kept
        while self._stream.tell() < kept:
            self._hash.update(self._stream.read(min(1 << 20, kept - self._stream.tell())))
        self._stream.truncate()

    def write(self, data: bytes) -> None:
        self._stream.write(data)
        self._hash.update(data)
        self.size += len(data)

    def sync(self) -> None:
        self._stream.flush()
        os.fsync(self._stream.fileno())

    def close(self) -> dict[str, Any]:
        self.sync()
        self._stream.close()
        return {"size": self.size, "blake3": self._hash.hexdigest()}


class StoreWriter:
    """Appends samples (tokens and mask) or plain pieces of a stream (tokens only) to the files of an entry.

    Where `directory` holds a checkpoint, it goes on from there.
    """

    def __init__(self, directory: Path, with_mask: bool) -> None:
        names = ("tokens.bin", "offsets.bin", *(["mask.bin", "channels.bin"] if with_mask else []), REJECTED)
        journal = read_journal(directory) or _EMPTY
        self.resumed: dict[str, Any] | None = journal["state"]
        """What `checkpoint` was given last; None at the beginning."""
        self._directory = directory
        self._files = {name: _HashedFile(directory / name, journal["sizes"].get(name, 0)) for name in names}
        self.num_tokens, self.num_pieces = journal["num_tokens"], journal["num_pieces"]
        self._num_trained_tokens = journal["num_trained_tokens"]
        self._largest_token = journal["largest_token"]
        self._places = {weight: place for place, weight in enumerate(journal["weights"])}
        self._channels = {name: place for place, name in enumerate(journal["channels"])}
        self._goes_on = False
        self._kept_bytes = self._num_bytes()
        if self.resumed is None:
            self._files["offsets.bin"].write(np.zeros(1, dtype=np.int64).tobytes())

    def add(self, tokens: NDArray[np.int32], *, goes_on: bool = False) -> None:
        """Append a piece of a stream, or a part of one that `goes_on` with the next call."""
        self._files["tokens.bin"].write(tokens.astype(np.int32, copy=False).tobytes())
        self.num_tokens += len(tokens)
        self._largest_token = max(self._largest_token, int(tokens.max(initial=-1)))
        self._goes_on = goes_on
        if not goes_on:
            self._end_piece()

    def _end_piece(self) -> None:
        self.num_pieces += 1
        self._files["offsets.bin"].write(np.array([self.num_tokens], dtype=np.int64).tobytes())

    def add_sample(self, sample: Sample) -> None:
        """Append a sample. DataError: with it there are more distinct loss weights than a byte can name."""
        self.add(sample.tokens)
        weights, which = np.unique(sample.loss_weights.astype(np.float32, copy=False), return_inverse=True)
        places = [self._places.setdefault(weight, len(self._places)) for weight in weights.tolist()]
        if len(self._places) > MOST_WEIGHTS:
            raise DataError(
                f"the tokens have {len(self._places)} distinct loss weights so far, a data set can have "
                f"{MOST_WEIGHTS}: round `loss_scale` of the messages to fewer values"
            )
        mask = np.array(places, dtype=np.uint8)[which]
        self._num_trained_tokens += int(np.count_nonzero(mask))
        self._files["mask.bin"].write(mask.tobytes())
        number = self._channels.setdefault(sample.channel, len(self._channels))
        if number >= MOST_CHANNELS:
            raise DataError(
                f"--enable_channel_loss: the rows name {number} channels so far, the last {sample.channel!r}, and "
                f"a data set can have {MOST_CHANNELS - 1}: leave out the flag, or name fewer in `channel`"
            )
        self._files["channels.bin"].write(bytes([number]))

    def reject(self, line: bytes) -> None:
        """Append the description of a bad row to rejected.jsonl."""
        self._files[REJECTED].write(line)

    def is_due(self) -> bool:
        """Whether a checkpoint is worth its time."""
        return self._num_bytes() - self._kept_bytes >= CHECKPOINT_BYTES

    def checkpoint(self, state: Mapping[str, Any]) -> None:
        """Make all of it durable: after a crash the next writer has it, and `state` as `resumed`."""
        for file in self._files.values():
            file.sync()
        values = {
            "sizes": {name: file.size for name, file in self._files.items()},
            "num_tokens": self.num_tokens,
            "num_pieces": self.num_pieces,
            "num_trained_tokens": self._num_trained_tokens,
            "largest_token": self._largest_token,
            "weights": list(self._places),
            "channels": list(self._channels),
            "state": state,
        }
        write_journal(self._directory, values)
        self._kept_bytes = self._num_bytes()

    def _num_bytes(self) -> int:
        return sum(file.size for file in self._files.values())

    def close(self, report: Mapping[str, Any]) -> None:
        """Write the index, last. A piece that goes on elsewhere ends here."""
        if self._goes_on:
            self._end_piece()
        files = {name: file.close() for name, file in self._files.items()}
        index = {
            "version": FORMAT_VERSION,
            "files": files,
            "weights": list(self._places),
            "channels": list(self._channels),
            "num_trained_tokens": self._num_trained_tokens,
            "largest_token": self._largest_token,
            "report": report,
        }
        text = json.dumps({"index": index, "sha256": content_hash(index)}, indent=1)
        with (self._directory / INDEX).open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())


def open_or_build(
    locate: Callable[[], Path],
    build: Callable[[StoreWriter], Mapping[str, Any]],
    *,
    with_mask: bool,
    is_writer: bool,
    barrier: Callable[[], None],
    hand_over: HandOver | None = None,
) -> TokenStore:
    """The entry at `locate()`; the writer builds it where it is missing or damaged (see `made_by_writer`).

    `build` fills the writer and returns the report.
    """

    def make() -> Path:
        directory = locate()
        _ensure(directory, build, with_mask)
        return directory

    directory = made_by_writer(make, locate, is_writer=is_writer, barrier=barrier, hand_over=hand_over)
    try:
        return open_store(directory)
    except (FileNotFoundError, DataError) as error:
        raise DataError(
            f"{WRITER_FAILED} (if it did not: it writes to "
            f"another disk than this one reads, name a common one with --cache_dir; {directory}: {error})"
        ) from None


def open_store(directory: Path) -> TokenStore:
    """Map an entry into memory. FileNotFoundError: there is none; DataError: it is damaged."""
    text = (directory / INDEX).read_text(encoding="utf-8")
    try:
        envelope = json.loads(text)
        index = envelope["index"]
        intact = content_hash(index) == envelope["sha256"] and index["version"] == FORMAT_VERSION
    except (ValueError, KeyError, TypeError):
        intact = False
    if not intact:
        raise DataError("index.json does not match its checksum")
    for name, entry in index["files"].items():
        size = (directory / name).stat().st_size if (directory / name).is_file() else None
        if size != entry["size"]:
            raise DataError(f"{name} has {size} bytes, the index says {entry['size']}")
    if file_hash(directory / "offsets.bin") != index["files"]["offsets.bin"]["blake3"]:
        raise DataError("offsets.bin does not match its checksum")
    mask = np.memmap(directory / "mask.bin", np.uint8, "r") if "mask.bin" in index["files"] else None
    channels = np.memmap(directory / "channels.bin", np.uint8, "r") if len(index["channels"]) > 1 else None
    return TokenStore(
        tokens=np.memmap(directory / "tokens.bin", np.int32, "r"),
        mask=mask,
        weights=np.array(index["weights"], dtype=np.float32),
        offsets=np.memmap(directory / "offsets.bin", np.int64, "r"),
        largest_token=index["largest_token"],
        report=index["report"],
        channels=channels,
        channel_names=tuple(index["channels"]) if channels is not None else (),
        fingerprint=content_hash(
            {name: entry for name, entry in index["files"].items() if name != REJECTED}
            | {name: index[name] for name in ("weights", "channels")}
        ),
        rejected_path=directory / REJECTED,
        num_trained_tokens=index["num_trained_tokens"],
    )


def _ensure(directory: Path, build: Callable[[StoreWriter], Mapping[str, Any]], with_mask: bool) -> None:
    if _is_whole(directory):
        return
    with sole_builder(directory) as partial:
        if _is_whole(directory):
            return  # built while this process waited
        writer = StoreWriter(partial, with_mask)
        if writer.resumed is not None:
            _log.warning(
                "a build of %s was interrupted: it goes on after %s tokens", directory, f"{writer.num_tokens:,}"
            )
        writer.close(build(writer))
        (partial / JOURNAL).unlink(missing_ok=True)
        _publish(partial, directory)


def _is_whole(directory: Path) -> bool:
    try:
        open_store(directory)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except DataError as error:
        _log.warning("the token cache %s is damaged (%s): it is built again", directory, error)
        return False
    return True


def _publish(temporary: Path, directory: Path) -> None:
    """Rename into place. What lies there is kept if another writer published it meanwhile, replaced if damaged."""
    if directory.exists():
        try:
            open_store(directory)
            return
        except (FileNotFoundError, DataError):
            aside = temporary.with_name(temporary.name + ".old")
            directory.rename(aside)
            shutil.rmtree(aside, ignore_errors=True)
    try:
        temporary.rename(directory)
    except OSError:
        open_store(directory)  # the other writer was faster between the two lines above
