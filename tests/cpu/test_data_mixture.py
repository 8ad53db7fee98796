"""Samples of a YAML mixture: with weights those of the flags, with epochs each as often as it says."""

import json
from collections import Counter

import pytest

from mswift.config.data import DataConfig
from mswift.data.commands import main
from mswift.data.dataset import DataOptions, build_dataset
from mswift.data.mixture import read_mixture
from mswift.data.selection import Selection
from mswift.data.stream_build import StreamOptions, build_stream
from mswift.data.tokenizer import load_tokenizer
from mswift.errors import DataError
from tests.support.tiny import tiny_tokenizer


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    path = tmp_path_factory.mktemp("mixture")
    tiny_tokenizer(path)
    for name, count in (("a", 12), ("b", 7)):
        rows = [{"query": f"say {name}{i}", "response": f"{name}{i}", "text": f"{name} {i} " * 9} for i in range(count)]
        (path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _build(home, kind, dataset, weights=(), seed=5):
    mixture = read_mixture(dataset, weights)
    options = DataOptions(
        200, cache_dir=home / "cache", selection=Selection(seed=seed), weights=mixture.weights, epochs=mixture.epochs
    )
    return build_dataset(
        kind, mixture.specs, load_tokenizer(home), options, is_writer=True, barrier=lambda: None, progress=False
    )


def _texts(data):
    return [bytes(data.sample(i).tokens.astype("int16")) for i in range(len(data))]


@pytest.mark.parametrize("kind", ["pt", "sft"])
def test_weights_are_those_of_the_flags(home, kind):
    (home / "m.yaml").write_text("- {path: a.jsonl, weight: 0.7}\n- {path: b.jsonl, weight: 0.3}\n")
    found = _build(home, kind, [str(home / "m.yaml")])
    wanted = _build(home, kind, [str(home / "a.jsonl"), str(home / "b.jsonl")], (0.7, 0.3))
    assert (found.fingerprint, found.summary, found.entry) == (wanted.fingerprint, wanted.summary, wanted.entry)
    assert _texts(found) == _texts(wanted)


@pytest.mark.parametrize("kind", ["pt", "sft"])
def test_epochs_are_honoured(home, kind):
    (home / "m.yaml").write_text("- {path: a.jsonl, epochs: 1.5}\n- {path: b.jsonl, epochs: 3}\n")
    alone = [set(_texts(_build(home, kind, [str(home / f"{name}.jsonl")]))) for name in "ab"]
    found = _build(home, kind, [str(home / "m.yaml")])
    times = Counter(_texts(found))
    of_each = [[times[text] for text in texts] for texts in alone]
    assert set(times) == alone[0] | alone[1]
    assert set(of_each[1]) == {3}
    assert sorted(of_each[0]) == [1] * (len(alone[0]) // 2) + [2] * (len(alone[0]) - len(alone[0]) // 2)
    assert "source 1: epochs 1.5, " in found.summary
    assert found.num_trained_tokens == sum(int((found.sample(i).loss_weights > 0).sum()) for i in range(len(found)))
    again, other = _build(home, kind, [str(home / "m.yaml")]), _build(home, kind, [str(home / "m.yaml")], seed=6)
    assert (again.fingerprint, _texts(again)) == (found.fingerprint, _texts(found))
    assert other.fingerprint != found.fingerprint
    if kind == "sft":
        assert _texts(other) != _texts(found)


def test_too_few_epochs_are_an_error(home):
    (home / "m.yaml").write_text("- {path: a.jsonl, epochs: 1}\n- {path: b.jsonl, epochs: 0.01}\n")
    with pytest.raises(DataError, match=r"source 2: epochs 0\.01, 0 of 7 samples .* give it 0\.143 or more"):
        _build(home, "sft", [str(home / "m.yaml")])


@pytest.mark.parametrize("action", ["show", "build", "info"])
def test_the_data_command_reads_it(home, capsys, action):
    (home / "m.yaml").write_text("- {path: a.jsonl, weight: 0.7}\n- {path: b.jsonl, weight: 0.3}\n")
    config = DataConfig(action=action, model=str(home), dataset=(str(home / "m.yaml"),), cache_dir=str(home / "cache"))
    assert main(config) == 0
    said = capsys.readouterr().out
    assert "a.jsonl" in said
    assert "b.jsonl" in said


def test_a_tokenizer_in_use_elsewhere_changes_no_token_of_a_stream(home, tmp_path):
    """A call with truncation or padding sets a state of the tokenizer, which calls of other threads would meet."""
    rows = [{"text": f"say {i} " * (1 + i % 90)} for i in range(3000)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = load_tokenizer(home)
    data = build_stream(
        "pt", [str(tmp_path / "a.jsonl")], tokenizer, DataOptions(50, cache_dir=tmp_path, num_proc=1),
        StreamOptions(1000, None, "owner"), is_writer=True, check=lambda _: None, say=print, opened=lambda *_: None,
    )  # fmt: skip
    data.start(0, None)
    maker, calls = data._streams[0].blocks, 0
    while not calls or maker._thread.is_alive():
        tokenizer(["another text"] * 3, truncation=True, max_length=2, padding="max_length")
        calls += 1
    options = DataOptions(50, cache_dir=tmp_path, selection=Selection("first"), num_proc=1)
    expected = build_dataset("pt", [f"{tmp_path}/a.jsonl#1000"], load_tokenizer(home), options, is_writer=True,
                             barrier=lambda: None, progress=False)  # fmt: skip
    found = data.window(0, len(expected))
    samples = {number: found.row(place)[row] for place, number in enumerate(found.numbers) for row in found.row(place)}
    assert calls > 5
    assert [samples[n].tokens.tolist() for n in range(len(expected))] == [
        expected.sample(n).tokens.tolist() for n in range(len(expected))
    ]
    data.close()


def test_streams_of_a_mixture_share_a_template_with_marks(home, tmp_path):
    """transformers collects the places of {% generation %} in the compiled template: two threads would mix them."""
    for name in "ab":
        rows = [{"query": f"say {name}{i}", "response": f"{name}{i}" * (1 + i % 9)} for i in range(400)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    specs = [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]
    rejected = []
    data = build_stream(
        "sft", specs, load_tokenizer(home), DataOptions(200, cache_dir=tmp_path, weights=(0.5, 0.5), num_proc=1),
        StreamOptions(400, None, "owner"), is_writer=True, check=lambda _: None, say=print,
        opened=lambda _, block: rejected.append(block.rejected.read_text()),
    )  # fmt: skip
    data.start(0, None)
    data.window(0, 8)
    data.close()
    assert rejected == ["", ""]
