"""`--new_special_tokens`: control tokens that the model has no trained row for, and how their rows begin. No torch.

A new token takes the next id of the tokenizer. Its row of the embedding, and of the head, begins as the mean of the
rows of all tokens that the tokenizer had before (summed in fp64, in the order of the rows, so at every layout the
same). A model with fewer rows than ids gets as many as there are ids.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mswift.converters.decode import CodePart
from mswift.converters.layout import Region
from mswift.converters.plan import ModelTable, table_for
from mswift.converters.reader import WeightReader
from mswift.errors import ConfigError
from mswift.tuners.stored import STORED, as_float32, as_stored

RULE = "the mean of the rows of all older tokens"
_ROWS = ("embedding.word_embeddings.weight", "output_layer.weight")
_BLOCK_ROWS = 4096
_FLAG = "--new_special_tokens"


@dataclass(frozen=True)
class NewTokens:
    """`names` take the ids from `first_id` on."""

    names: tuple[str, ...]
    first_id: int

    @property
    def end(self) -> int:
        """One more than the last id."""
        return self.first_id + len(self.names)


def wanted_tokens(given: Sequence[str]) -> tuple[str, ...]:
    """The tokens that the flag names, those of a text file one a line. ConfigError for an empty or doubled one."""
    names: list[str] = []
    for item in given:
        path = Path(item)
        if path.suffix == ".txt":
            if not path.is_file():
                raise ConfigError(f"{_FLAG} {item}: there is no such file; give a text file with one token a line")
            lines = path.read_text(encoding="utf-8").splitlines()
            names += [line.strip() for line in lines if line.strip()]
        else:
            names.append(item)
    for name in names:
        if not name.strip():
            raise ConfigError(f"{_FLAG}: a token is empty; leave it out")
        if names.count(name) > 1:
            raise ConfigError(f"{_FLAG}: {name!r} is given {names.count(name)} times; give it once")
    return tuple(names)


def new_tokens(hf_files: Path, given: Sequence[str]) -> NewTokens | None:
    """Those that the tokenizer beside the model lacks, or None. ConfigError where there is no tokenizer.json."""
    names = wanted_tokens(given)
    if not names:
        return None
    path = hf_files / "tokenizer.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        vocab, added = content["model"]["vocab"], {entry["content"]: entry["id"] for entry in content["added_tokens"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{_FLAG} needs a tokenizer.json beside the model, which {path} is not ({error!r})") from None
    known = set(vocab) if isinstance(vocab, dict) else {entry[0] for entry in vocab}
    missing = tuple(name for name in names if name not in known and name not in added)
    first = max([len(known), *(number + 1 for number in added.values())])
    return NewTokens(missing, first) if missing else None


class GrownReader(WeightReader):
    """A model whose rows of new tokens are made, and which has as many rows as there are tokens."""

    def __init__(self, path: Path, changes: Mapping[str, Any], tokens: NewTokens) -> None:
        super().__init__(path, changes)
        self.tokens, self._stored = tokens, self.table
        self._rows: dict[str, NDArray[Any]] = {}
        self._vocab_size = max(self._stored.spec.vocab_size, tokens.end)
        if tokens.first_id > self._stored.spec.vocab_size:
            raise ConfigError(
                f"{_FLAG}: the tokenizer beside {path} has {tokens.first_id} tokens, the model "
                f"{self._stored.spec.vocab_size} rows (vocab_size): use the tokenizer that the model was trained with"
            )
        self.config = self.config | {"vocab_size": self._vocab_size}
        self.table: ModelTable = table_for(self.config, self._stored.hf)

    def side_files(self) -> dict[str, bytes]:
        """As of the model, with the new number of rows in config.json."""
        files = super().side_files()
        content = json.loads(files["config.json"])
        if content.get("vocab_size") != self._vocab_size:
            content["vocab_size"] = self._vocab_size
            files["config.json"] = (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
        return files

    def read(self, key: str, region: Region, out: memoryview, part: CodePart | None = None) -> None:
        """Rows of the file, and those of new tokens."""
        if key not in _ROWS or not region.num_elements:
            super().read(key, region, out, part)
            return
        first, stop = region.offsets[0], region.offsets[0] + region.sizes[0]
        row_bytes = len(out) // region.sizes[0]
        for start, end in self._stretches(first, stop):
            stretch = Region((start, *region.offsets[1:]), (end - start, *region.sizes[1:]))
            target = out.cast("B")[(start - first) * row_bytes : (end - first) * row_bytes]
            if self.tokens.first_id <= start < self.tokens.end:
                row = self._new_row(key)[region.offsets[1] : region.offsets[1] + region.sizes[1]]
                target[:] = row.tobytes() * (end - start)
            else:
                super().read(key, stretch, target)

    def _stretches(self, first: int, stop: int) -> list[tuple[int, int]]:
        """first..stop-1 cut at the rows of new tokens."""
        cuts = sorted({first, stop, *(n for n in (self.tokens.first_id, self.tokens.end) if first < n < stop)})
        return list(pairwise(cuts))

    def _new_row(self, key: str) -> NDArray[Any]:
        """The row of every new token, in the dtype of the file (bfloat16 as uint16)."""
        if key not in self._rows:
            width, total = self._stored.megatron[key].shape[1], None
            for start in range(0, self.tokens.first_id, _BLOCK_ROWS):
                rows = min(_BLOCK_ROWS, self.tokens.first_id - start)
                block = np.empty((rows, width), STORED[self.dtype_of(key)])
                super().read(key, Region((start, 0), (rows, width)), memoryview(block.view(np.uint8).reshape(-1)))
                summed = as_float32(block).astype(np.float64).sum(axis=0)
                total = summed if total is None else total + summed
            assert total is not None
            self._rows[key] = as_stored((total / self.tokens.first_id).astype(np.float32), self.dtype_of(key))
        return self._rows[key]
