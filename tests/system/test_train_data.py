"""Runs on --data_path: the steps of the same documents as text, continued, and only with the same files."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from tests.support.commands import command, make_home, run
from tests.support.runs import log


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_home(tmp_path_factory.mktemp("data"))


def _indexed(home: Path, change: int = 0) -> None:
    """The documents in the token cache, written by megatron-core."""
    (entry,) = (home / "cache" / "tokens").iterdir()
    tokens = np.fromfile(entry / "tokens.bin", np.int32)
    tokens[0] += change
    builder = IndexedDatasetBuilder(str(home / "text.bin"), dtype=np.uint16)
    offsets = np.fromfile(entry / "offsets.bin", np.int64).tolist()
    for start, end in itertools.pairwise(offsets):
        builder.add_document(torch.tensor(tokens[start:end]), [end - start])
    builder.finalize(str(home / "text.idx"))


def test_a_run_on_indexed_files_is_that_on_their_text(home: Path) -> None:
    run(command(home, "pt", home / "text", "--train_iters", "4"))
    _indexed(home)
    half = command(home, "pt", home / "indexed", "--data_path", str(home / "text"), "--train_iters")
    at = half.index("--dataset")
    del half[at : at + 2]
    assert "text.bin: 60 documents" in run([*half, "2"])
    run([*half, "4"])
    assert log(home / "indexed") == log(home / "text")
    _indexed(home, change=1)
    assert "the tokenised data differs" in run([*half, "6"], status=2)
