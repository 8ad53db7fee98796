"""--data_path -> a data set of token samples, straight from .bin files: no tokenising, and no copy.

The documents of all prefixes are one stream in their order, as they are (nothing is put between them), cut as that of
`pt` is (see `dataset`). Once for the content of the files, one process reads them through: hashes, the bounds of all
documents, the largest id. What it found is kept in the cache as indexed/HASH/scan.json.
"""

import json
import uuid
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from mswift.config.blend import Blend
from mswift.data.cache import TokenStore, cache_root
from mswift.data.dataset import TokenDataset
from mswift.data.hashing import FileHashes, content_hash
from mswift.data.indexed import IndexedFile, JoinedTokens, open_indexed
from mswift.data.one_writer import HandOver, made_by_writer
from mswift.data.samples import Cut, mixed, whole
from mswift.data.tokenizer import Tokenizer, end_token_id
from mswift.errors import ConfigError, DataError

FLAG = "--data_path"
_VERSION = 1
_SCAN = "scan.json"
_ENDS_READ = 1000


def build_indexed(
    blend: Blend,
    tokenizer: Tokenizer,
    *,
    cut: Cut,
    seed: int,
    vocab_size: int,
    cache_dir: str | Path | None,
    is_writer: bool,
    barrier: Callable[[], None],
    hand_over: HandOver | None = None,
) -> TokenDataset:
    """The data set of all prefixes of `blend`; every rank calls it, as `build_dataset`.

    DataError for damaged files, ConfigError for a token that a model of `vocab_size` rows does not have.
    """
    if cut.length < 2:
        raise ConfigError(f"--max_length {cut.length}: a sample needs at least 2 tokens, --max_length 2048")
    files = [open_indexed(prefix, FLAG) for prefix in blend.prefixes]
    root = cache_root(cache_dir)

    def locate() -> Path:
        return _entry(root, _hashes(root, files))

    def make() -> Path:
        hashes = _hashes(root, files)
        entry = _entry(root, hashes)
        if _read(entry) is None:
            _write(entry, {"version": _VERSION, "hashes": hashes, "largest": [_scan(file) for file in files]})
        return entry

    entry = made_by_writer(make, locate, is_writer=is_writer, barrier=barrier, hand_over=hand_over)
    scan = _read(entry)
    if scan is None:
        raise DataError(f"{entry / _SCAN} cannot be read: name a --cache_dir that all processes of a machine share")
    for file, largest in zip(files, scan["largest"], strict=True):
        if largest >= vocab_size:
            raise ConfigError(
                f"{FLAG} {file.prefix}: it holds token {largest}, the model has {vocab_size} rows (vocab_size): "
                "tokenise it with the tokenizer of --model"
            )
    store = _store(files, scan, entry)
    samples = whole(store, cut)
    if blend.weights:
        samples = mixed(store, "weights", blend.weights, seed, cut, FLAG)
    if not len(samples.starts):
        raise DataError(f"{FLAG}: every document is a single token, which predicts nothing; leave out --packing")
    lines = [_line(file, tokenizer) for file in files]
    return TokenDataset(store, replace(samples, lines=(*lines, *samples.lines)))


def _store(files: Sequence[IndexedFile], scan: dict[str, Any], entry: Path) -> TokenStore:
    """The documents of all files; each file is a source of a mixture."""
    ends = list(accumulate(len(file.tokens) for file in files))
    if ends[-1] < 2:
        raise DataError(f"{FLAG} {files[0].prefix}: it holds one token, and a sample has at least 2")
    ends_of = [file.ends() + end - len(file.tokens) for file, end in zip(files, ends, strict=True)]
    return TokenStore(
        tokens=JoinedTokens([file.tokens for file in files]),
        mask=None,
        weights=np.array([0, 1], dtype=np.float32),
        offsets=np.concatenate([[0], *ends_of]),
        channels=None,
        channel_names=(),
        largest_token=max(scan["largest"]),
        report={"files": [], "source_ends": list(enumerate(ends, start=1)), "unused_columns": []},
        fingerprint=content_hash({"indexed": scan["hashes"]}),
        rejected_path=entry / "rejected.jsonl",
        num_trained_tokens=0,
    )


def _scan(file: IndexedFile) -> int:
    """Every check that reads all of a file; its largest token."""
    file.check()
    return file.largest_token()


def _hashes(root: Path, files: Sequence[IndexedFile]) -> list[list[str]]:
    """Of the .bin and the .idx file of each."""
    known = FileHashes(root / "files.json")
    hashes = [[known[path] for path in file.paths] for file in files]
    known.save()
    return hashes


def _entry(root: Path, hashes: list[list[str]]) -> Path:
    return root / "indexed" / content_hash({"version": _VERSION, "hashes": hashes})[:40]


def _read(entry: Path) -> dict[str, Any] | None:
    """What an earlier run found; None where there is none, or a damaged one."""
    try:
        envelope = json.loads((entry / _SCAN).read_text(encoding="utf-8"))
        scan: dict[str, Any] = envelope["scan"]
        return scan if content_hash(scan) == envelope["hash"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write(entry: Path, scan: dict[str, Any]) -> None:
    temporary = entry / f".{_SCAN}.{uuid.uuid4().hex}"
    try:
        entry.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps({"scan": scan, "hash": content_hash(scan)}), encoding="utf-8")
        temporary.replace(entry / _SCAN)
    except OSError as error:
        raise DataError(
            f"{entry}: cannot be written ({error.strerror}); name another folder with --cache_dir"
        ) from None


def _line(file: IndexedFile, tokenizer: Tokenizer) -> str:
    """Documents, tokens, and how many of the first documents are ended by a token, which nobody puts there now."""
    num_documents = len(file.documents) - 1
    first = [file.document(n) for n in range(min(num_documents, _ENDS_READ))]
    end = end_token_id(tokenizer)
    ended = sum(bool(len(document)) and int(document[-1]) == end for document in first)
    which = "its documents" if num_documents <= _ENDS_READ else f"its first {_ENDS_READ:,} documents"
    return (
        f"{file.paths[0].name}: {num_documents:,} documents, {len(file.tokens):,} tokens ({file.tokens.dtype.name}); "
        f"{ended:,} of {which} end with {tokenizer.convert_ids_to_tokens(end)} (id {end})"
    )
