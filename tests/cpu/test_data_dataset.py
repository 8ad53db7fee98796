"""From files to samples: every shared file, pretraining streams, truncation, the cache, and the errors a user meets."""

import itertools
import json
import logging
import subprocess
import sys

import numpy as np
import pytest

from mswift.data import writers
from mswift.data.dataset import DataOptions, build_dataset
from mswift.data.tokenizer import load_tokenizer
from mswift.errors import ConfigError, DataError
from tests.support.shared import shared_file

SFT_FILES = {
    "alpaca_en_demo.json": 999, "alpaca_zh_demo.json": 300, "identity.json": 91, "glaive_toolcall_en_demo.json": 300,
    "kto_en_demo.json": 300, "formats/alpaca.csv": 3, "formats/alpaca.jsonl": 3, "formats/alpaca2.csv": 3,
    "formats/chatml.jsonl": 3, "formats/conversations.jsonl": 3, "formats/multi_modal_1.jsonl": 3,
    "formats/sharegpt.jsonl": 3, "formats/swift_multi.json": 3, "formats/swift_multi.jsonl": 3,
    "formats/swift_single.csv": 3, "formats/swift_single.jsonl": 3,
}  # fmt: skip
PT_FILES = {"c4_demo.jsonl": 100, "formats/swift_pre.csv": 3, "formats/swift_pre.jsonl": 3}
REFUSED_TODAY = {
    "formats/multi_modal_2.jsonl": "`images` cannot be trained on yet",
    "formats/multi_modal_3.jsonl": "`images` cannot be trained on yet",
    "mllm_demo.json": "`images` cannot be trained on yet",
    "v1_sft_demo.jsonl": "field `loss_weight` would change what is learned",
    "reason_tool_use_demo_50.jsonl": "`content` must be a string, it is a list",
    "v1_dpo_demo.jsonl": "unknown shape. Fields found: `chosen_messages`, `rejected_messages`",
    "dpo_en_demo.json": "no assistant turn",
    "dpo_zh_demo.json": "no assistant turn",
}
"""Images, message parts, loss weights and preference rows: refused in words until the data plane takes them."""


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
    dataset = build("sft", shared_file(f"data/sft/{file}"))
    assert len(dataset) == SFT_FILES[file]
    assert "left out" not in dataset.summary
    samples = _all_samples(dataset)
    assert dataset.lengths.tolist() == [len(s.tokens) - 1 for s in samples]
    assert dataset.num_tokens == sum(len(s.tokens) for s in samples)
    assert dataset.num_trained_tokens == sum(int(s.loss_mask.sum()) for s in samples)
    assert all(s.loss_mask.any() and not s.loss_mask[0] for s in samples)


@pytest.mark.parametrize("file", PT_FILES)
def test_every_text_file_loads(build, file):
    dataset = build("pt", shared_file(f"data/sft/{file}"), max_length=64)
    assert f"{PT_FILES[file]:,} rows" in dataset.summary


@pytest.mark.parametrize("file", REFUSED_TODAY)
def test_what_belongs_to_the_data_plane_is_refused_by_name(build, file):
    with pytest.raises(DataError, match=REFUSED_TODAY[file]):
        build("sft", shared_file(f"data/sft/{file}"))


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
    stream = np.concatenate([samples[0].tokens[:1], *(s.tokens[s.loss_mask] for s in samples)])
    documents = [t.removesuffix("<|im_end|>") for t in texts if t] + ["A line.\n\nAnother line.\n"]
    assert qwen.decode(stream) == "".join(t + "<|im_end|>" for t in documents)
    assert len(stream) == dataset.num_tokens == dataset.num_trained_tokens + 1
    for before, after in itertools.pairwise(samples):
        assert len(before.tokens) == max_length + 1
        assert after.tokens[0] == before.tokens[-1]
        assert not after.loss_mask[0]
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
    monkeypatch.setattr(writers, "encode", lambda *_: pytest.fail("tokenised again"))
    second = build("pt", path, max_length=100)
    assert first.num_tokens == second.num_tokens
    assert first.fingerprint != second.fingerprint == build("pt", path, max_length=100).fingerprint


def test_the_second_run_reads_the_cache(build, monkeypatch, tmp_path):
    path = shared_file("data/sft/identity.json")
    first = build("sft", path)
    monkeypatch.setattr(writers, "tokenize", lambda *_: pytest.fail("tokenised again"))
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
        assert a.loss_mask[:40].tolist() == b.loss_mask.tolist()


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
        build("sft", path)
    assert len(build("sft", f"{path}#1")) == 1
    assert len(build("sft", _rows(path, [good]))) == 1


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


def test_more_rows_asked_for_than_there_are_is_said(build):
    summary = build("sft", f"{shared_file('data/sft/identity.json')}#500").summary
    assert summary.startswith("identity.json: 91 rows; 500 were asked for; 91 samples\n")


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
