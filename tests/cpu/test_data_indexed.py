"""--data_path: megatron-core writes the files and reads them beside our reader; samples are those of `--dataset`."""

import itertools
import json
import shutil
from dataclasses import replace
from itertools import chain, cycle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder
from megatron.core.datasets.utils import get_blend_from_list

from mswift.cli.main import main
from mswift.config.blend import Blend, parse_blend
from mswift.config.train import PtConfig
from mswift.data.dataset import DataOptions, build_dataset
from mswift.data.indexed import JoinedTokens, open_indexed
from mswift.data.indexed_dataset import build_indexed
from mswift.data.samples import Cut
from mswift.data.selection import Selection
from mswift.data.tokenizer import load_tokenizer
from mswift.errors import ConfigError, DataError
from mswift.refusals import check_train
from mswift.train.dry_run import needs_of
from mswift.train.inputs import blend_of
from tests.support.tiny import tiny_tokenizer
from tests.unit.test_dry_run import LLAMA
from tests.unit.test_refusals import SPEC

DTYPES = [np.uint8, np.int8, np.int16, np.uint16, np.int32, np.int64]
BLENDS = [["a"], ["a", "b"], ["a", "b", "c"], ["0.3", "a", "0.7", "b"], ["1", "a"], ["30", "a", "1e1", "b", ".5", "c"]]


def write_indexed(prefix, documents, dtype=np.int32):
    """Documents, each a list of sequences, by megatron-core."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for sequences in documents:
        lengths = [len(sequence) for sequence in sequences]
        builder.add_document(torch.tensor([token for sequence in sequences for token in sequence]), lengths)
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer(path)
    return load_tokenizer(path)


@pytest.fixture
def build(tokenizer, tmp_path):
    def build(*items, max_length=16, vocab_size=1000, seed=3, kind="joined"):
        return build_indexed(
            parse_blend(items), tokenizer, cut=Cut(max_length, kind), seed=seed, vocab_size=vocab_size,
            cache_dir=tmp_path / "cache", is_writer=True, barrier=lambda: None,
        )  # fmt: skip

    return build


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_document_is_what_megatron_core_reads(tmp_path, dtype):
    rng = np.random.default_rng(0)
    high = min(np.iinfo(dtype).max, 100_000)
    documents = [
        [rng.integers(0, high, size=n, endpoint=True).tolist() for n in rng.integers(1, 9, size=m)]
        for m in rng.integers(1, 4, size=20)
    ]
    prefix = write_indexed(tmp_path / "a", documents, dtype)
    ours, theirs = open_indexed(prefix, "--data_path"), IndexedDataset(prefix)
    ours.check()
    assert ours.tokens.dtype == theirs.index.dtype == dtype
    assert len(ours.documents) == len(theirs.document_indices) == len(documents) + 1
    for number, sequences in enumerate(documents):
        of_theirs = [theirs[n] for n in range(*theirs.document_indices[number : number + 2])]
        assert ours.document(number).tolist() == np.concatenate(of_theirs).tolist() == list(chain(*sequences))
    assert ours.largest_token() == max(max(sequence) for sequences in documents for sequence in sequences)
    assert DType.code_from_dtype(dtype) in range(1, 9)


@pytest.mark.parametrize("items", BLENDS)
def test_a_blend_is_read_as_megatron_core_reads_it(items):
    prefixes, weights = get_blend_from_list(items)
    assert parse_blend(items) == Blend(tuple(prefixes), tuple(weights or ()))


@pytest.mark.parametrize(
    ("items", "words"),
    [
        (["0.3", "a", "b", "0.7"], "b stands where a weight is due"),
        (["a", "0.3", "b", "0.7"], "0.3 is a weight, a has none"),
        (["0.3", "a", "0.7"], "the weight 0.7 has no prefix"),
        (["0", "a", "1", "b"], "--data_path 0: a weight must be above 0"),
        (["nan", "a"], "--data_path nan: a weight must be above 0"),
        (["inf", "a"], "--data_path inf"),
    ],
)
def test_a_blend_that_makes_no_sense_is_refused(items, words):
    with pytest.raises(ConfigError, match=words):
        parse_blend(items)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.integers(0, 100), min_size=1, max_size=7), min_size=1, max_size=5), st.data())
def test_joined_streams_are_one(parts, data):
    whole = [token for part in parts for token in part]
    dtypes = cycle([np.uint16, np.int64, np.int32])
    joined = JoinedTokens([np.array(part, dtype=dtype) for part, dtype in zip(parts, dtypes, strict=False)])
    start, stop = sorted(data.draw(st.tuples(st.integers(0, len(whole)), st.integers(0, len(whole) + 3))))
    assert joined[start:stop].tolist() == whole[start:stop]
    assert joined[start:stop].dtype == np.int32
    assert len(joined) == len(whole)


@pytest.mark.parametrize(
    ("weights", "kind"), [((), "joined"), ((0.3, 0.7), "joined"), ((), "rows"), ((0.3, 0.7), "documents")]
)
def test_the_samples_are_those_of_the_same_documents_as_text(tokenizer, tmp_path, build, weights, kind):
    """Documents tokenised by `pt`, written by megatron-core: the same samples, whole or as a mixture."""
    rng = np.random.default_rng(1)
    for name in "ab":
        rows = [" ".join(map(str, rng.integers(0, 100, size=n))) for n in rng.integers(1, 30, size=12)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    options = DataOptions(16, cache_dir=tmp_path / "cache", selection=Selection(seed=3), weights=weights, cut=kind)

    def text(names, options):
        files = [str(tmp_path / f"{name}.jsonl") for name in names]
        return build_dataset("pt", files, tokenizer, options, is_writer=True, barrier=lambda: None, progress=False)

    for name, dtype in (("a", np.uint16), ("b", np.int32)):
        alone = text(name, replace(options, weights=()))
        store = np.memmap(alone.entry / "tokens.bin", np.int32, "r")
        offsets = np.memmap(alone.entry / "offsets.bin", np.int64, "r")
        write_indexed(tmp_path / name, [[store[a:b].tolist()] for a, b in itertools.pairwise(offsets)], dtype)
    expected = text("ab", options)
    prefixes = [str(tmp_path / name) for name in "ab"]
    found = build(*(chain(*zip(map(str, weights), prefixes, strict=True)) if weights else prefixes), kind=kind)
    assert len(found) == len(expected) > 20
    for index in range(len(found)):
        ours, theirs = found.sample(index), expected.sample(index)
        assert ours.tokens.tolist() == theirs.tokens.tolist()
        assert ours.loss_weights.tolist() == theirs.loss_weights.tolist()
    assert (found.num_tokens, found.num_trained_tokens) == (expected.num_tokens, expected.num_trained_tokens)
    assert "a.bin: 12 documents" in found.summary
    assert "12 of its documents end with" in found.summary
    assert not list((tmp_path / "cache" / "indexed").rglob("*.bin"))


def test_the_fingerprint_is_of_the_content(tmp_path, build):
    prefix = write_indexed(tmp_path / "a", [[[1, 2, 3]], [[4, 5]]])
    first = build(prefix)
    for suffix in (".bin", ".idx"):
        shutil.copy(f"{prefix}{suffix}", tmp_path / f"b{suffix}")
    assert build(str(tmp_path / "b")).fingerprint == first.fingerprint
    assert build(prefix, max_length=4).fingerprint != first.fingerprint
    assert build("1", prefix).fingerprint != first.fingerprint
    write_indexed(tmp_path / "a", [[[1, 2, 3]], [[4, 6]]])
    assert build(prefix).fingerprint != first.fingerprint


def test_tokens_that_the_model_does_not_have_are_refused(tmp_path, build):
    prefix = write_indexed(tmp_path / "a", [[[1, 2, 1000]]])
    for _ in range(2):  # found, and remembered
        with pytest.raises(ConfigError, match=r"a: it holds token 1000, the model has 1000 rows"):
            build(prefix)
    assert build(prefix, vocab_size=1001).largest_token == 1000
    with pytest.raises(DataError, match=r"a\.bin: token 1 is -2"):
        build(write_indexed(tmp_path / "a", [[[1, -2, 1000]]]))


def test_the_others_take_what_the_writer_found(tmp_path, tokenizer):
    prefix = write_indexed(tmp_path / "a", [[[1, 2, 3]]])
    handed = []

    def hand_over(path):
        handed.append(path)
        return handed[0]

    both = [
        build_indexed(
            Blend((prefix,)), tokenizer, cut=Cut(4), seed=0, vocab_size=9, cache_dir=tmp_path / "c",
            is_writer=is_writer, barrier=lambda: None, hand_over=hand_over,
        )
        for is_writer in (True, False)
    ]  # fmt: skip
    assert both[0].fingerprint == both[1].fingerprint
    assert handed[0].parent == tmp_path / "c" / "indexed"
    assert handed[1] is None


def _change(path, at, data):
    content = bytearray(path.read_bytes())
    content[at : at + len(data)] = data
    path.write_bytes(content)


_LENGTHS, _POINTERS, _DOCUMENTS = 34, 34 + 3 * 4, 34 + 3 * 12
DAMAGE = [
    (".idx", lambda p: _change(p, 0, b"TNTIDX"), "begins with b'TNTIDX"),
    (".idx", lambda p: _change(p, 9, b"\x02"), "version 2 of the format, and 1 is read"),
    (".idx", lambda p: _change(p, 17, b"\x09"), "9 is the code of no dtype"),
    (".idx", lambda p: _change(p, 17, b"\x07"), "float32, and token ids are whole numbers"),
    (".idx", lambda p: _change(p, 17, b"\x08"), "a.bin: it has 24 bytes, a.idx says 20"),
    (".idx", lambda p: p.write_bytes(p.read_bytes()[:20]), "its header alone has 34"),
    (".idx", lambda p: p.write_bytes(p.read_bytes()[:-1]), "has 93 bytes, with 3 sequences, 3 bounds: 94"),
    (".idx", lambda p: p.write_bytes(p.read_bytes() + b"\x00" * 3), "several modes"),
    (".idx", lambda p: _change(p, _LENGTHS, b"\xff\xff\xff\xff"), "sequence 0 has -1 tokens"),
    (".idx", lambda p: _change(p, _POINTERS + 8, b"\x05"), "sequence 1 starts at byte 5, not at 12"),
    (".idx", lambda p: _change(p, _DOCUMENTS + 8, b"\x04"), "document 1 ends at sequence 3 and begins at 4"),
    (".idx", lambda p: _change(p, _DOCUMENTS + 16, b"\x02"), "its documents go from sequence 0 to 2"),
    (".bin", lambda p: p.write_bytes(p.read_bytes()[:-1]), "has 23 bytes, and int32 takes 4"),
    (".bin", lambda p: p.write_bytes(p.read_bytes()[:-4]), "has 20 bytes, a.idx says 24"),
    (".bin", lambda p: p.write_bytes(p.read_bytes() + bytes(4)), "has 28 bytes, a.idx says 24"),
    (".bin", lambda p: p.write_bytes(b""), "it holds no tokens"),
    (".bin", lambda p: p.unlink(), "there is no file"),
    (".idx", lambda p: p.unlink(), "there is no file"),
]


@pytest.mark.parametrize(("suffix", "damage", "words"), DAMAGE, ids=[words for *_, words in DAMAGE])
def test_damage_is_named(tmp_path, build, suffix, damage, words):
    prefix = write_indexed(tmp_path / "a", [[[1, 2, 3]], [[4], [5, 6]]])
    build(prefix)
    damage(tmp_path / f"a{suffix}")
    with pytest.raises(DataError, match=words) as refusal:
        build(prefix)
    assert "\n" not in str(refusal.value)
    assert str(tmp_path / "a") in str(refusal.value)


def test_a_suffix_is_not_part_of_the_prefix(tmp_path):
    prefix = write_indexed(tmp_path / "a", [[[1, 2, 3]]])
    with pytest.raises(DataError, match=f"leave the suffix out, {prefix}$"):
        open_indexed(f"{prefix}.bin", "--data_path")
    with pytest.raises(DataError, match="prefixes there: a$"):
        open_indexed(f"{prefix}x", "--data_path")


def test_a_dry_run_tells_the_mixture_and_opens_the_files(tmp_path, capsys):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(LLAMA))
    prefix = write_indexed(tmp_path / "a", [[[1, 2, 3]]])
    argv = ["pt", "--model", str(tmp_path / "model"), "--dry_run", "--train_iters", "1", "--data_path", "0.3", prefix]
    assert main(argv) == 0
    assert f"data           0.3 {prefix}" in capsys.readouterr().out
    files, _ = needs_of(PtConfig(model=str(tmp_path / "model"), data_path=(prefix,), train_iters=1))
    assert files[f"{prefix}.bin"] == 12
    (tmp_path / "a.bin").write_bytes(bytes(8))
    assert main(argv) == 2
    assert "refused: " + prefix + ".bin: it has 8 bytes, a.idx says 12" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(dataset=("b.jsonl",)), "--dataset b.jsonl and --data_path 0.3 a 0.7 b: give one of them"),
        (dict(dataset_weights=(1.0,)), "--dataset_weights is for --dataset"),
        (dict(columns='{"a": "text"}'), "--columns is for rows"),
        (dict(split_dataset_ratio=0.1), "name text files with --val_dataset"),
        (dict(data_path=("0.3", "a", "b")), "b stands where a weight is due"),
    ],
)
def test_what_does_not_go_together_is_refused(change, words):
    config = PtConfig(model="m", data_path=("0.3", "a", "0.7", "b"), train_iters=10)
    check_train(config, SPEC, 1)
    assert blend_of(config) == Blend(("a", "b"), (0.3, 0.7))
    with pytest.raises(ConfigError, match=words):
        check_train(replace(config, **change), SPEC, 1)
