"""A YAML mixture: what it means as flags, how often each sample comes, and every mistake with its line."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mswift.cli.main import main
from mswift.config.train import SftConfig
from mswift.data.mixture import Mixture, read_mixture
from mswift.data.selection import repeated
from mswift.errors import ConfigError
from mswift.refusals import check_train
from mswift.train.dry_run import needs_of
from tests.unit.test_dry_run import LLAMA
from tests.unit.test_refusals import SPEC

SIZES = st.integers(1, 200)


@given(st.lists(st.tuples(SIZES, st.floats(0.01, 9)), min_size=1, max_size=5), st.integers(0, 2**64))
def test_epochs_are_whole_times_and_a_drawn_rest(sources, seed):
    sizes, epochs = zip(*sources, strict=True)
    rows = repeated(sizes, epochs, seed)
    for size, often, chosen in zip(sizes, epochs, rows, strict=True):
        times = np.bincount(chosen, minlength=size)
        assert abs(len(chosen) - size * often) <= 0.5 + 1e-9
        assert set(times) <= {len(chosen) // size, len(chosen) // size + 1}
        assert (np.diff(chosen) >= 0).all()
    assert [r.tolist() for r in rows] == [r.tolist() for r in repeated(sizes, epochs, seed)]


def test_one_and_a_half_epochs_are_all_and_half_of_them_twice():
    (rows,), (other,) = repeated([10], [1.5], 1), repeated([10], [1.5], 2)
    assert sorted(np.bincount(rows)) == [1] * 5 + [2] * 5
    assert rows.tolist() != other.tolist()
    assert repeated([10, 4], [1, 3], 1)[1].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "data" / "books").mkdir(parents=True)
    for name in ("data/a.jsonl", "data/books/train.jsonl"):
        (tmp_path / name).write_text(json.dumps({"text": "one"}) + "\n")
    return tmp_path


def _mixture(folder: Path, text: str) -> str:
    path = folder / "data" / "mixture.yaml"
    path.write_text(text)
    return str(path)


def test_paths_are_relative_to_the_file(folder, monkeypatch):
    monkeypatch.chdir(folder)
    text = "- path: a.jsonl\n  weight: .7\n- {weight: 1, path: 'books:train#3'}\n- path: owner/name\n  weight: 2e-1\n"
    data = folder / "data"
    specs = (f"{data}/a.jsonl", f"{data}/books:train#3", "owner/name")
    assert read_mixture([_mixture(folder, text)]) == Mixture(specs, weights=(0.7, 1.0, 0.2))
    assert read_mixture(["a", "b"], [1, 2]) == Mixture(("a", "b"), (1, 2))
    text = f"- path: {data}/books\n  epochs: 1.5\n"
    assert read_mixture([_mixture(folder, text)]) == Mixture((f"{data}/books",), epochs=(1.5,))
    relative = read_mixture(["data/mixture.yaml"])
    assert relative.specs == (f"{data}/books",)


MISTAKES = [
    ("- path: a\n  weight: 1\n- path: b\n  epochs: 1\n", "line 3: epochs, and line 1 has weight"),
    ("- path: a\n  weight: 1\n  epochs: 1\n", "line 1: a source has a path, and a weight or epochs"),
    ("- path: a\n", "line 1: a source has a path, and a weight or epochs"),
    ("- weight: 1\n", "line 1: a source has a path"),
    ("- path: a\n  wieght: 1\n", "line 2: unknown key wieght; did you mean weight?"),
    ("- path: a\n  weight: 1\n  weight: 2\n", "line 3: weight is given twice"),
    ("- path: a\n  weight: 1\n- path: ./a\n  weight: 2\n", "line 3: .*a is in line 1 too"),
    ("- path: a\n  weight: -1\n", "line 2: weight -1: it must be a number above 0"),
    ("- path: a\n  epochs: 0\n", "line 2: epochs 0: it must be a number above 0"),
    ("- path: a\n  epochs: .nan\n", "line 2: epochs .nan: it must be a number"),
    ("- path: a\n  epochs: inf\n", "line 2: epochs inf: it must be a number"),
    ("- path: a\n  weight: true\n", "line 2: weight true: it must be a number"),
    ("- path: a\n  weight: [1]\n", "line 2: weight must be one value"),
    ("- path:\n  weight: 1\n", "line 1: path must be one value"),
    ("- a\n", "line 1: a source is a mapping"),
    ("path: a\nweight: 1\n", "it must be a list of sources"),
    ("", "it must be a list of sources"),
    ("- [", "it is not YAML"),
]


@pytest.mark.parametrize(("text", "words"), MISTAKES, ids=[words for _, words in MISTAKES])
def test_a_mistake_is_named_with_its_line(folder, text, words):
    with pytest.raises(ConfigError, match=words) as refusal:
        read_mixture([_mixture(folder, text)])
    assert "mixture.yaml" in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_mixture_stands_alone(folder):
    path = _mixture(folder, "- path: a.jsonl\n  weight: 1\n")
    with pytest.raises(ConfigError, match="a mixture stands alone; put the other items into"):
        read_mixture([path, "b.jsonl"])
    with pytest.raises(ConfigError, match="there is no|cannot be read"):
        read_mixture([f"{path}.yml"])
    config = SftConfig(model="m", dataset=(path,), train_iters=1)
    check_train(config, SPEC, 1)
    with pytest.raises(ConfigError, match="--dataset_weights: --dataset .* has the weights of its sources"):
        check_train(replace(config, dataset_weights=(1.0,)), SPEC, 1)


def test_a_dry_run_reads_it(folder, capsys):
    (folder / "config.json").write_text(json.dumps(LLAMA))
    path = _mixture(folder, "- path: a.jsonl\n  epochs: 1.5\n- path: books\n  epochs: 2\n")
    argv = ["pt", "--model", str(folder), "--dry_run", "--train_iters", "1", "--dataset", path]
    assert main(argv) == 0
    data = folder / "data"
    assert f"data           1.5 epochs of {data}/a.jsonl, 2 epochs of {data}/books\n" in capsys.readouterr().out
    files, _ = needs_of(SftConfig(model=str(folder), dataset=(path,), train_iters=1))
    assert {path, f"{data}/a.jsonl", f"{data}/books/train.jsonl"} <= set(files)
    _mixture(folder, "- path: a.jsonl\n  epochs: 1.5\n- path: absent.txt\n  epochs: 2\n")
    assert main(argv) == 2
    assert f"refused: --dataset {data}/absent.txt: there is no file" in capsys.readouterr().out
    _mixture(folder, "- path: a.jsonl\n  epochs: 1.5\n  epoch: 2\n")
    assert main(argv) == 2
    assert "line 3: unknown key epoch; did you mean epochs?" in capsys.readouterr().out
