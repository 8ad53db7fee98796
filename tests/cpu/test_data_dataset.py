"""From files to samples: every shared file, pretraining streams, truncation, the cache, and the errors a user meets."""

import itertools
import json
import logging
import subprocess
import sys

import numpy as np
import pytest

from mswift.data import encoding
from mswift.data.dataset import DataOptions, build_dataset, write_rejected
from mswift.data.loss_scale import LossScale
from mswift.data.selection import Selection
from mswift.data.tokenizer import load_tokenizer
from mswift.errors import ConfigError, DataError
from tests.support.shared import shared_file

SFT_FILES = {
    "sft/alpaca_en_demo.json": 999, "sft/alpaca_zh_demo.json": 300, "sft/identity.json": 91,
    "sft/glaive_toolcall_en_demo.json": 300, "sft/kto_en_demo.json": 300, "sft/v1_sft_demo.jsonl": 100,
    "sft/v1_dpo_demo.jsonl": 10, "sft/dpo_en_demo.json#60": 60, "sft/dpo_zh_demo.json": 60,
    "sft/reason_tool_use_demo_50.jsonl": 50,  "agent/toolbench/answer": 3,
    "sft/formats/alpaca.csv": 3, "sft/formats/alpaca.jsonl": 3, "sft/formats/alpaca2.csv": 3,
    "sft/formats/chatml.jsonl": 3, "sft/formats/conversations.jsonl": 3, "sft/formats/sharegpt.jsonl": 3,
    "sft/formats/swift_multi.json": 3, "sft/formats/swift_multi.jsonl": 3, "sft/formats/swift_single.csv": 3,
    "sft/formats/swift_single.jsonl": 3,
}  # fmt: skip
PT_FILES = {"c4_demo.jsonl": 100, "formats/swift_pre.csv": 3, "formats/swift_pre.jsonl": 3}
WITH_IMAGES = {"formats/multi_modal_1.jsonl": 2, "formats/multi_modal_2.jsonl": 3, "formats/multi_modal_3.jsonl": 3,
               "mllm_demo.json": 6}  # fmt: skip
"""Rows with images are read (tests/unit/test_data_shared.py), and rejected by training on text."""


@pytest.fixture(scope="module")
def qwen():
    return load_tokenizer(shared_file("data/tokenizers/qwen2-8k"))


@pytest.fixture
def build(qwen, tmp_path):
    """build_dataset with one process and its own cache."""

    def call(kind, *specs, flag="--dataset", **options):
        options = {"max_length": 16384, "cache_dir": tmp_path / "cache"} | options
        return build_dataset(
            kind, [str(s) for s in specs], qwen, DataOptions(**options),
            is_writer=True, barrier=lambda: None, progress=False, flag=flag,
        )  # fmt: skip

    return call


def _rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def _all_samples(dataset):
    return [dataset.sample(i) for i in range(len(dataset))]


@pytest.mark.parametrize("file", SFT_FILES)
def test_every_conversation_file_loads(build, file):
    name, hash_mark, count = file.partition("#")
    dataset = build("sft", f"{shared_file(f'data/{name}')}{hash_mark}{count}")
    assert len(dataset) == SFT_FILES[file]
    assert "left out" not in dataset.summary
    assert dataset.num_rejected_rows == 0
    samples = _all_samples(dataset)
    assert dataset.lengths.tolist() == [len(s.tokens) - 1 for s in samples]
    assert dataset.num_tokens == sum(len(s.tokens) for s in samples)
    assert dataset.num_trained_tokens == sum(int((s.loss_weights > 0).sum()) for s in samples)
    assert all(s.loss_weights.any() and not s.loss_weights[0] for s in samples)


@pytest.mark.parametrize("file", PT_FILES)
def test_every_text_file_loads(build, file):
    dataset = build("pt", shared_file(f"data/sft/{file}"), max_length=64)
    assert f"{PT_FILES[file]:,} rows" in dataset.summary


def test_an_empty_turn_in_the_shared_preferences_is_rejected_by_name(build):
    dataset = build("sft", shared_file("data/pref/hh_harmless_200.jsonl"))
    assert (len(dataset), dataset.num_rejected_rows) == (199, 1)
    assert "the assistant turn is empty" in dataset.summary


@pytest.mark.parametrize("file", WITH_IMAGES)
def test_rows_with_images_are_rejected_by_name(build, file):
    path, bad = shared_file(f"data/sft/{file}"), WITH_IMAGES[file]
    reason = "`images` cannot be trained on yet"
    if file != "formats/multi_modal_1.jsonl":
        with pytest.raises(DataError, match=f"none of its {bad} rows can be used; the first: .*row 1: {reason}"):
            build("sft", path)
        return
    dataset = build("sft", path)
    assert (len(dataset), dataset.num_rejected_rows) == (1, bad)
    assert f"2 rejected (row 1, 2), the first: {path}, row 1: {reason}" in dataset.summary


def test_shapes_of_the_same_conversations_give_the_same_samples(build):
    chatml, sharegpt = (shared_file(f"data/sft/formats/{n}.jsonl") for n in ("chatml", "conversations"))
    assert build("sft", chatml).fingerprint == build("sft", sharegpt).fingerprint


@pytest.mark.parametrize("max_length", [7, 64, 100_000])
def test_documents_are_joined_and_every_token_is_a_target_once(build, qwen, tmp_path, max_length):
    texts = ["One two three.", "", "Vier fünf sechs sieben!", "already ended<|im_end|>", "x" * 300]
    book = tmp_path / "book.txt"
    book.write_text("A line.\n\nAnother line.\n", encoding="utf-8")
    dataset = build("pt", _rows(tmp_path / "a.jsonl", [{"text": t} for t in texts]), book, max_length=max_length)
    samples = _all_samples(dataset)
    stream = np.concatenate([samples[0].tokens[:1], *(s.tokens[s.loss_weights > 0] for s in samples)])
    documents = [t.removesuffix("<|im_end|>") for t in texts if t] + ["A line.\n\nAnother line.\n"]
    assert qwen.decode(stream) == "".join(t + "<|im_end|>" for t in documents)
    assert len(stream) == dataset.num_tokens == dataset.num_trained_tokens + 1
    for before, after in itertools.pairwise(samples):
        assert len(before.tokens) == max_length + 1
        assert after.tokens[0] == before.tokens[-1]
        assert not after.loss_weights[0]
    assert 2 <= len(samples[-1].tokens) <= max_length + 1
    assert "a.jsonl: 5 rows; 1 left out (empty: row 2)" in dataset.summary


def test_a_book_is_kept_to_the_letter(build, qwen):
    path = shared_file("data/text/wagahai.300k.txt")
    dataset = build("pt", path, max_length=512)
    stream = np.concatenate([s.tokens[:512] for s in _all_samples(dataset)])
    assert qwen.decode(stream).removesuffix("<|im_end|>") == path.read_bytes().decode()


def test_the_length_of_pieces_needs_no_second_tokenisation(build, monkeypatch):
    path = shared_file("data/sft/c4_demo.jsonl")
    first = build("pt", path, max_length=64)
    monkeypatch.setattr(encoding, "encode", lambda *_: pytest.fail("tokenised again"))
    second = build("pt", path, max_length=100)
    assert first.num_tokens == second.num_tokens
    assert first.fingerprint != second.fingerprint == build("pt", path, max_length=100).fingerprint


def test_the_second_run_reads_the_cache(build, monkeypatch, tmp_path):
    path = shared_file("data/sft/identity.json")
    first = build("sft", path)
    monkeypatch.setattr(encoding, "tokenize", lambda *_: pytest.fail("tokenised again"))
    second = build("sft", path)
    assert (first.fingerprint, first.summary) == (second.fingerprint, second.summary)
    for change in ({"max_length": 30}, {"system": "Be kind."}, {"truncation_strategy": "right"}):
        with pytest.raises(pytest.fail.Exception, match="tokenised again"):
            build("sft", path, **change)


def test_a_changed_file_or_template_is_tokenised_again(build, qwen, monkeypatch, tmp_path):
    path = _rows(tmp_path / "a.jsonl", [{"query": "hi", "response": "hello"}])
    first = build("sft", path).fingerprint
    monkeypatch.setattr(qwen, "chat_template", qwen.chat_template.replace("assistant\\n", "assistant:\\n"))
    second = build("sft", path).fingerprint
    _rows(path, [{"query": "hi", "response": "hullo"}])
    assert len({first, second, build("sft", path).fingerprint}) == 3


def test_a_damaged_cache_is_said_and_mended(build, tmp_path, caplog):
    path = shared_file("data/sft/identity.json")
    before = build("sft", path)
    (tokens,) = (tmp_path / "cache").rglob("tokens.bin")
    tokens.write_bytes(tokens.read_bytes()[:-2])
    with caplog.at_level(logging.WARNING):
        after = build("sft", path)
    assert "tokens.bin has" in caplog.text
    assert before.fingerprint == after.fingerprint
    assert after.sample(90).tokens.tolist() == before.sample(90).tokens.tolist()


def test_the_default_cache_follows_the_environment(build, monkeypatch, tmp_path):
    monkeypatch.setenv("MSWIFT_CACHE", str(tmp_path / "elsewhere"))
    build("sft", shared_file("data/sft/identity.json"), cache_dir=None)
    assert list((tmp_path / "elsewhere").rglob("tokens.bin"))


def _long_rows(tmp_path):
    rows = [{"query": "hi", "response": "word " * n, "id": n} for n in (3, 60, 5, 80)]
    return _rows(tmp_path / "long.jsonl", rows)


def test_delete_leaves_long_rows_out_and_names_them(build, tmp_path):
    dataset = build("sft", _long_rows(tmp_path), max_length=40)
    assert len(dataset) == 2
    assert dataset.summary.startswith(
        "long.jsonl: 4 rows; 2 samples; 2 left out (longer than --max_length 40: row 2, 4); fields not used: id (4)\n"
    )


def test_right_cuts_the_end(build, tmp_path):
    path = _long_rows(tmp_path)
    whole, cut = build("sft", path), build("sft", path, max_length=40, truncation_strategy="right")
    assert len(cut) == 4
    assert "2 of them cut at the end" in cut.summary
    for a, b in zip(_all_samples(whole), _all_samples(cut), strict=True):
        assert a.tokens[:40].tolist() == b.tokens.tolist()
        assert a.loss_weights[:40].tolist() == b.loss_weights.tolist()


def test_left_cuts_the_beginning(build, tmp_path):
    path = _long_rows(tmp_path)
    whole, cut = build("sft", path), build("sft", path, max_length=40, truncation_strategy="left")
    assert "2 of them cut at the beginning" in cut.summary
    for a, b in zip(_all_samples(whole), _all_samples(cut), strict=True):
        assert a.tokens[-40:].tolist() == b.tokens.tolist()
        assert a.loss_weights[-40:].tolist()[1:] == b.loss_weights.tolist()[1:]


@pytest.mark.parametrize("max_length", [2, 7, 40])
def test_split_keeps_every_learned_token_a_target_once(build, tmp_path, max_length):
    path = _long_rows(tmp_path)
    whole, cut = build("sft", path), build("sft", path, max_length=max_length, truncation_strategy="split")
    learned = [np.concatenate([s.tokens[s.loss_weights > 0] for s in _all_samples(data)]) for data in (whole, cut)]
    assert learned[0].tolist() == learned[1].tolist()
    assert max(len(sample.tokens) for sample in _all_samples(cut)) <= max_length
    assert "pieces of longer ones" in cut.summary
    assert cut.num_trained_tokens == whole.num_trained_tokens


def test_right_leaves_out_what_has_nothing_left_to_learn(build, tmp_path):
    path = _rows(tmp_path / "a.jsonl", [{"query": "word " * 50, "response": "x"}, {"query": "hi", "response": "x"}])
    dataset = build("sft", path, max_length=40, truncation_strategy="right")
    assert len(dataset) == 1
    assert "1 left out (nothing to learn in the first 40 tokens: row 1)" in dataset.summary


def test_raise_names_the_row_and_a_length_that_works(build, tmp_path):
    path = _long_rows(tmp_path)
    with pytest.raises(DataError, match=r"long\.jsonl, row 2 has (\d+) tokens, --max_length is 40: --max_length") as e:
        build("sft", path, max_length=40, truncation_strategy="raise")
    remedy = int(str(e.value).partition("row 2 has ")[2].split()[0])
    only = _rows(tmp_path / "two.jsonl", [json.loads(line) for line in path.read_text().splitlines()[:2]])
    assert len(build("sft", only, max_length=remedy, truncation_strategy="raise")) == 2
    with pytest.raises(DataError, match="row 2"):
        build("sft", only, max_length=remedy - 1, truncation_strategy="raise")


def test_when_no_sample_fits_the_length_of_the_shortest_is_named(build, tmp_path):
    path = _long_rows(tmp_path)
    with pytest.raises(DataError, match=r"no sample fits in --max_length 5; .*--max_length \d+ takes it") as caught:
        build("sft", path, max_length=5)
    assert len(build("sft", path, max_length=int(str(caught.value).split("--max_length ")[2].split()[0]))) == 1


def test_a_row_without_an_assistant_turn_names_file_row_and_remedy(build, tmp_path):
    good = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}
    path = _rows(tmp_path / "chat.jsonl", [good, {"messages": good["messages"][:1]}])
    with pytest.raises(DataError, match=r"chat\.jsonl, row 2 has no assistant turn.*remove the row"):
        build("sft", path, strict=True)
    assert len(build("sft", path)) == 1
    first = Selection("first")
    assert len(build("sft", f"{path}#1", strict=True, selection=first)) == 1
    assert len(build("sft", _rows(path, [good]), strict=True)) == 1


@pytest.mark.parametrize("text", ["", "\n", "[]"])
@pytest.mark.parametrize("kind", ["pt", "sft"])
def test_an_empty_data_set(build, tmp_path, kind, text):
    path = tmp_path / "empty.json"
    path.write_text(text)
    with pytest.raises(DataError, match=r"empty\.json holds no rows: the data set is empty; write at least one row"):
        build(kind, path)
    assert len(build(kind, _rows(path, [{"text": "a"} if kind == "pt" else {"query": "a", "response": "b"}]))) == 1


def test_only_empty_documents(build, tmp_path):
    path = tmp_path / "empty.txt"
    path.write_text("")
    with pytest.raises(DataError, match="every document is empty, there is nothing to train on"):
        build("pt", path)


def test_wrong_commands(build):
    path = shared_file("data/sft/identity.json")
    with pytest.raises(ConfigError, match="--val_dataset names no file"):
        build("sft", flag="--val_dataset")
    with pytest.raises(ConfigError, match=r"--val_dataset .*nothing\.json: there is no file"):
        build("sft", path.with_name("nothing.json"), flag="--val_dataset")
    with pytest.raises(ConfigError, match="--max_length 1: a sample needs at least 2 tokens, --max_length 2048"):
        build("sft", path, max_length=1)
    assert len(build("sft", path, max_length=2048)) == 91


def test_a_number_of_rows_is_drawn_by_the_seed(build):
    path = shared_file("data/sft/identity.json")
    first = build("sft", f"{path}#500")
    assert first.summary.startswith("identity.json: 91 rows; 500 were asked for; 91 samples\n")
    drawn = {seed: build("sft", f"{path}#20", selection=Selection("without_replacement", seed)) for seed in (1, 2)}
    assert drawn[1].summary.startswith("identity.json: 20 rows of 91; 20 samples\n")
    assert drawn[1].fingerprint != drawn[2].fingerprint
    whole = [build("sft", path, selection=Selection("without_replacement", seed)).fingerprint for seed in (1, 2)]
    assert len(set(whole)) == 1  # nothing is drawn
    more = build("sft", f"{path}#200", selection=Selection("without_replacement", 1))
    assert more.summary.startswith("identity.json: 200 rows of 91; 200 samples\n")


def test_a_bad_row_is_counted_named_and_written_down(build, tmp_path):
    path = tmp_path / "a.jsonl"
    good = json.dumps({"query": "hi", "response": "hello"})
    path.write_text("\n".join([good, "{", good, json.dumps({"messages": [{"role": "robot", "content": "x"}]}), good]))
    dataset = build("sft", path)
    assert len(dataset) == 3
    assert "a.jsonl: 5 rows; 3 samples; 2 rejected (row 2, 4), the first:" in dataset.summary
    assert dataset.summary.endswith("; 2 rows rejected")
    target = tmp_path / "rejected.jsonl"
    write_rejected(target, [dataset, build("sft", path)])
    rejected = [json.loads(line) for line in target.read_text().splitlines()]
    assert [(line["file"], line["row"]) for line in rejected] == [("a.jsonl", 2), ("a.jsonl", 4)] * 2
    assert "bad JSON" in rejected[0]["reason"]
    assert "unknown role 'robot'" in rejected[1]["reason"]
    assert json.loads(rejected[1]["content"])["messages"][0]["role"] == "robot"
    write_rejected(target, [build("sft", _rows(tmp_path / "b.jsonl", [json.loads(good)]))])
    assert not target.exists()
    with pytest.raises(DataError, match=r"a\.jsonl, line 2, column 2: bad JSON .*\(--strict; without it"):
        build("sft", path, strict=True)  # from the cache
    with pytest.raises(DataError, match=r"a\.jsonl, line 2, column 2: bad JSON"):
        build("sft", path, strict=True, max_length=99)
    documents = build("pt", _rows(tmp_path / "c.jsonl", [{"text": "a"}, {"body": "b"}, {"text": "c"}]))
    assert "1 rejected (row 2)" in documents.summary
    with pytest.raises(DataError, match="row 2: pt takes rows with a `text` field"):
        build("pt", tmp_path / "c.jsonl", strict=True)


def test_a_row_that_cannot_be_tokenised_is_rejected_alone(build, qwen, tmp_path, monkeypatch):
    rows = [{"query": f"q{n}", "response": "bad" if n == 2 else "good"} for n in range(5)]
    path, tokenize = _rows(tmp_path / "a.jsonl", rows), encoding.tokenize

    def refuse(tokenizer, renderings, places):
        if any("bad" in rendering.text for rendering in renderings):
            raise DataError("a token over the edge")
        return tokenize(tokenizer, renderings, places)

    monkeypatch.setattr(encoding, "tokenize", refuse)
    dataset = build("sft", path)
    assert len(dataset) == 4
    assert "1 rejected (row 3), the first: a token over the edge" in dataset.summary


def test_columns_are_renamed(build, tmp_path):
    plain = build("sft", _rows(tmp_path / "plain.jsonl", [{"query": "hi", "response": "hello"}]))
    path = _rows(tmp_path / "a.jsonl", [{"q": "hi", "response": "hello"}])
    assert build("sft", path, columns=(("q", "query"),)).fingerprint == plain.fingerprint
    with pytest.raises(ConfigError, match="--columns: no row of --dataset has `x`; leave it out"):
        build("sft", path, columns=(("q", "query"), ("x", "system")))
    with pytest.raises(DataError, match="--columns calls `q` `response`, and the row has a `response` besides"):
        build("sft", path, columns=(("q", "response"),))


def test_loss_of_single_messages(build, qwen, tmp_path):
    turns = [{"role": role, "content": f"{role} {n}"} for n in range(3) for role in ("user", "assistant")]
    turns[1]["loss"] = False
    turns[5]["loss_scale"] = 0
    (sample,) = _all_samples(build("sft", _rows(tmp_path / "a.jsonl", [{"messages": turns}])))
    assert qwen.decode(sample.tokens[sample.loss_weights > 0]) == "assistant 1<|im_end|>"
    assert "assistant 0<|im_end|>" in qwen.decode(sample.tokens)


def test_a_message_counts_as_its_loss_scale_says(build, qwen, tmp_path):
    turns = [{"role": role, "content": f"{role} {n}"} for n in range(4) for role in ("user", "assistant")]
    turns[1]["loss_scale"], turns[5]["loss_scale"], turns[7]["loss"] = 0.1, 3, False
    data = build("sft", _rows(tmp_path / "a.jsonl", [{"messages": turns}]))
    (sample,) = _all_samples(data)
    assert sample.loss_weights.dtype == np.float32
    for weight, text in ((0.1, "assistant 0"), (1, "assistant 1"), (3, "assistant 2")):
        there = sample.loss_weights == np.float32(weight)
        assert qwen.decode(sample.tokens[there]) == f"{text}<|im_end|>"
    assert data.num_trained_tokens == np.count_nonzero(sample.loss_weights)
    turns[5]["loss_scale"] = 4
    heavier = build("sft", _rows(tmp_path / "b.jsonl", [{"messages": turns}]))
    assert heavier.fingerprint != data.fingerprint


CHANNELS = [{"query": "q", "response": f"a{n}"} | ({"channel": "even"} if n % 2 == 0 else {}) for n in range(5)]


def test_channels_of_rows(build, tmp_path):
    path = _rows(tmp_path / "a.jsonl", CHANNELS)
    plain = build("sft", path)
    assert plain.channel_names == ()
    assert "channel" in plain.summary
    apart = build("sft", path, loss_scale=LossScale(by_channel=True))
    assert "channel" not in apart.summary
    assert [sample.channel for sample in _all_samples(apart)] == ["even", "", "even", "", "even"]
    mixed = build("sft", path, path, weights=(1.0, 3.0), loss_scale=LossScale(by_channel=True))
    assert all(sample.channel == apart.sample(_same(apart, sample)).channel for sample in _all_samples(mixed))
    numbers = _rows(tmp_path / "b.jsonl", [*CHANNELS, CHANNELS[0] | {"channel": 3}])
    assert build("sft", numbers, loss_scale=LossScale(by_channel=True)).num_rejected_rows == 1


def _same(data, sample):
    return next(n for n in range(len(data)) if data.sample(n).tokens.tolist() == sample.tokens.tolist())


@pytest.mark.parametrize("kind", ["sft", "pt"])
def test_the_channel_is_the_source(build, tmp_path, kind):
    rows = {"sft": [{"query": "q", "response": f"a{n}"} for n in range(3)], "pt": [{"text": "word " * 20}] * 3}[kind]
    paths = [_rows(tmp_path / f"{name}.jsonl", rows[:count]) for name, count in (("a", 3), ("b", 2))]
    apart = [build(kind, path, max_length=16) for path in paths]
    data = build(kind, *paths, max_length=16, by_source=True)
    assert data.channel_names == ("a.jsonl", "b.jsonl")
    assert [sample.channel for sample in _all_samples(data)] == [
        name for name, alone in zip(data.channel_names, apart, strict=True) for _ in range(len(alone))
    ]
    tokens = [sample.tokens.tolist() for alone in apart for sample in _all_samples(alone)]
    assert [sample.tokens.tolist() for sample in _all_samples(data)] == tokens
    assert data.num_trained_tokens == sum(alone.num_trained_tokens for alone in apart)
    assert build(kind, paths[0], max_length=16, by_source=True).channel_names == ()
    with pytest.raises(ConfigError, match="2 files of 1 names"):
        build(kind, paths[0], paths[0], max_length=16, by_source=True)


def test_weights_share_out_an_epoch(build, tmp_path):
    paths = [_rows(tmp_path / f"{name}.jsonl", [{"query": name, "response": str(n)} for n in range(size)])
             for name, size in (("a", 30), ("b", 10))]  # fmt: skip
    plain = build("sft", *paths)
    mixed = build("sft", *paths, weights=(1.0, 3.0))
    assert len(mixed) == len(plain) == 40
    tokens = [tuple(sample.tokens.tolist()) for sample in _all_samples(mixed)]
    whole = [tuple(sample.tokens.tolist()) for sample in _all_samples(plain)]
    assert [tokens.count(sample) for sample in whole[30:]] == [3] * 10
    assert sorted(tokens.count(sample) for sample in whole[:30]) == [0] * 20 + [1] * 10
    assert "source 1: weight 1, 10 of 30 samples (0.333 times)" in mixed.summary
    assert "source 2: weight 3, 30 of 10 samples (3 times)" in mixed.summary
    samples = _all_samples(mixed)
    assert mixed.num_tokens == sum(len(s.tokens) for s in samples)
    assert mixed.num_trained_tokens == sum(int((s.loss_weights > 0).sum()) for s in samples)
    assert mixed.fingerprint not in (plain.fingerprint, build("sft", *paths, weights=(1.0, 2.0)).fingerprint)


def test_weights_of_documents_cut_each_source_on_its_own(build, qwen, tmp_path):
    paths = [_rows(tmp_path / f"{name}.jsonl", [{"text": name * 40}] * 5) for name in ("a ", "b ")]
    mixed = build("pt", *paths, weights=(1.0, 1.0), max_length=16)
    texts = [qwen.decode(sample.tokens) for sample in _all_samples(mixed)]
    assert not any("a" in text and "b" in text for text in texts)
    assert mixed.num_trained_tokens == sum(len(sample.tokens) - 1 for sample in _all_samples(mixed))


def test_the_split_shares_no_row_with_training(build, tmp_path):
    path = _rows(tmp_path / "a.jsonl", [{"query": "q", "response": str(n)} for n in range(40)])
    train, validation = (
        {tuple(sample.tokens.tolist()) for sample in _all_samples(build("sft", path, selection=selection))}
        for selection in (Selection("first", 3, 0.25, part) for part in ("train", "validation"))
    )
    assert (len(train), len(validation), len(train & validation)) == (30, 10, 0)
    with pytest.raises(DataError, match="--split_dataset_ratio 0.01 leaves no row for validation; take another share"):
        build("sft", path, selection=Selection("first", 3, 0.01, "validation"))


def test_a_sample_beyond_the_end(build):
    dataset = build("sft", shared_file("data/sft/identity.json"))
    for index in (-1, 91):
        with pytest.raises(IndexError, match=f"sample {index} of 91"):
            dataset.sample(index)


def test_the_package_loads_without_torch():
    """Reading rows and opening a cache must not cost the seconds of importing torch."""
    code = "import sys, mswift.data.dataset; sys.exit(sorted({'torch', 'transformers'} & set(sys.modules)) or None)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
