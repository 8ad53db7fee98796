"""`mswift data build` makes the entry that a run with the same flags opens; `info` counts what is in it."""

import json
import random
import re
import signal
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest

from mswift.cli.main import main
from mswift.cli.options import parse
from mswift.config.data import DataConfig
from mswift.config.train import PtConfig, SftConfig
from mswift.data import cache, writers
from mswift.data.dataset import DataOptions, build_dataset
from mswift.data.flags import data_options
from mswift.data.loss_scale import LossScale
from mswift.data.tokenizer import load_tokenizer
from mswift.launchers.environment import RankInfo
from mswift.train import build as train_build
from tests.support.kills import content, counting, in_child
from tests.support.shared import shared_file

MODEL = str(shared_file("data/tokenizers/qwen2-8k"))


@pytest.fixture
def data(capsys, tmp_path):
    def call(*argv):
        status = main(["data", *argv, *(["--cache_dir", str(tmp_path / "cache")] if argv[0] != "show" else [])])
        out, err = capsys.readouterr()
        return status, out, err

    return call


def _rows(tmp_path):
    rows = [{"query": f"q{n}", "response": "word " * (n + 1)} for n in range(20)] + [{"query": "q"}]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_build_info_and_the_entry(data, tmp_path):
    path = _rows(tmp_path)
    status, out, _ = data("build", "--model", MODEL, "--dataset", path, "--split_dataset_ratio", "0.2")
    assert status == 0
    entries = re.findall(r"^(training|validation): (.*)$", out, re.MULTILINE)
    assert [name for name, _ in entries] == ["training", "validation"]
    assert len(re.findall(r"samples, .* of them learned", out)) == 2
    status, of_entry, _ = data("info", "--dataset", *(entry for _, entry in entries))
    assert status == 0
    samples = [int(n) for n in re.findall(r"^samples +(\d+)", of_entry, re.MULTILINE)]
    assert sum(samples) == 20
    bars = re.findall(r"^ +[\d,]+ - [\d,]+ +(\d+)", of_entry, re.MULTILINE)
    assert sum(map(int, bars)) == 20
    assert "has no assistant turn" in of_entry
    status, of_data, _ = data("info", "--model", MODEL, "--dataset", path, "--split_dataset_ratio", "0.2")
    assert all(line in of_data for line in of_entry.splitlines())


def test_wrong_commands(data, tmp_path):
    path = _rows(tmp_path)
    assert "data build needs --model" in data("build", "--dataset", path)[2]
    both = data("build", "--model", MODEL, "--dataset", path, "--split_dataset_ratio", "0.2", "--val_dataset", path)
    assert (both[0], "give one of them" in both[2]) == (2, True)
    assert (
        "--dataset_num_proc 0: at least 1"
        in data("build", "--model", MODEL, "--dataset", path, "--dataset_num_proc", "0")[2]
    )
    entry = re.search("training: (.*)", data("build", "--model", MODEL, "--dataset", path)[1])[1]
    assert "entries of the token cache, or data sets, not both" in data("info", "--dataset", entry, path)[2]


@pytest.mark.parametrize(("kind", "config_class"), [("pt", PtConfig), ("sft", SftConfig)])
def test_the_options_are_those_of_a_run(monkeypatch, tmp_path, kind, config_class):
    common = ["--max_length", "77", "--dataset_sampling", "first", "--seed", "5", "--split_dataset_ratio", "0.3",
              "--columns", '{"a": "query"}', "--cache_dir", str(tmp_path), "--dataset_num_proc", "3",
              "--strict"]  # fmt: skip
    sft = [
        "--truncation_strategy",
        "split",
        "--system",
        "s",
        "--loss_scale",
        "last_round",
        "--agent_template",
        "hermes",
    ]
    flags = ["--model", MODEL, "--dataset", "x", *common, *(sft if kind == "sft" else [])]
    seen = []

    def stop(kind, specs, tokenizer, options, **_):
        seen.append(options)
        raise KeyError

    monkeypatch.setattr(train_build, "build_dataset", stop)
    reader = SimpleNamespace(hf_files=MODEL, table=SimpleNamespace(spec=SimpleNamespace(max_position_embeddings=4096)))
    with pytest.raises(KeyError):
        train_build.build_data(kind, parse(config_class, flags), reader, RankInfo.single(), resumed=False)
    options = data_options(kind, parse(DataConfig, ["build", "--kind", kind, *flags]))
    assert seen == [replace(options, model_positions=4096)]


@pytest.mark.parametrize("kind", ["pt", "sft"])
def test_two_processes_make_the_entry_of_one(tmp_path, kind):
    """Real tokenizers and templates in real workers: bad rows, weights, tools and a long document among the rows."""
    tokenizer = load_tokenizer(MODEL)
    if kind == "pt":
        rows = [{"text": f"Document {n}. " * (n % 50)} if n % 7 else {"body": n} for n in range(1200)]
        rows[700] = {"text": "A line of a long document.\n" * 12_000}
    else:
        rows = json.loads(shared_file("data/sft/glaive_toolcall_en_demo.json").read_text())[:100]
        rows += [{"query": "q", "response": f"a{n}"} if n % 7 else {"query": n} for n in range(800)]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = [
        build_dataset(
            kind,
            [str(path)],
            tokenizer,
            DataOptions(max_length=512, cache_dir=tmp_path / str(num), num_proc=num),
            is_writer=True,
            barrier=lambda: None,
            progress=False,
        )
        for num in (1, 2)
    ]
    one, two = ({file.name: file.read_bytes() for file in data.entry.iterdir()} for data in found)
    assert one == two
    assert found[0].num_rejected_rows > 100


def test_a_build_of_conversations_that_is_killed_at_any_instant_ends_with_the_same_bytes(tmp_path, monkeypatch):
    """SIGKILL to the process that writes, with bad rows, loss weights, channels, tools and pieces of long samples."""
    monkeypatch.setattr(writers, "_BATCH_ROWS", 7)
    monkeypatch.setattr(cache, "CHECKPOINT_BYTES", 8000)
    tokenizer = load_tokenizer(MODEL)
    rows = json.loads(shared_file("data/sft/glaive_toolcall_en_demo.json").read_text())[:40]
    rows += [{"query": "q", "response": f"a{n}", "channel": f"c{n % 5}"} if n % 7 else {"query": n} for n in range(80)]
    answers = [{"role": "assistant", "content": "so", "loss_scale": n / 8} for n in range(1, 20)]
    rows[50:50] = [{"messages": [{"role": "user", "content": "how?"}, answer]} for answer in answers]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def build(name):
        options = DataOptions(
            128, "split", cache_dir=tmp_path / name, loss_scale=LossScale(by_channel=True), num_proc=1
        )  # fmt: skip
        return build_dataset("sft", [str(path)], tokenizer, options, is_writer=True, barrier=lambda: None,
                             progress=False)  # fmt: skip

    def count():
        seen = counting(None)
        build("counted")
        (tmp_path / "events").write_text(str(seen[0]))

    def die(name, at):
        counting(at)
        build(name)

    assert in_child(count) == 0
    total, expected = int((tmp_path / "events").read_text()), content(build("counted").entry)
    assert total > 300
    chosen = random.Random(2)
    for case in range(6):
        points = [total - case] if case < 2 else [chosen.randrange(1, total // 2) for _ in range(2)]
        for point in points:
            assert in_child(partial(die, str(case), point)) in (-signal.SIGKILL, 0)
        data = build(str(case))
        assert content(data.entry) == expected, points
        assert list(data.entry.parent.glob(".*.partial")) == []
    assert (data.num_rejected_rows, len(data.channel_names)) == (12, 6)
