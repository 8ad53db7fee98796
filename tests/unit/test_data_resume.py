"""A build of a token cache entry that is killed, at any instant, ends with the bytes of one that was not."""

import json
import os
import random
import signal

import pytest

from mswift.data import cache, documents, writers
from mswift.data.cache import open_or_build
from mswift.data.selection import Selection
from mswift.data.sources import parse_source
from mswift.data.writers import HowToWrite, RowOptions, write_documents
from tests.support.kills import content, counting, in_child


class Bytes:
    """A tokenizer: one token a byte."""

    chat_template, eos_token_id, name_or_path = None, 256, "bytes"

    def __call__(self, texts, **_):
        return {"input_ids": [list(text.encode()) for text in texts]}


@pytest.fixture
def specs(tmp_path, monkeypatch):
    """Files with bad and empty rows, a long document, and draws."""
    monkeypatch.setattr(writers, "_BATCH_ROWS", 7)
    monkeypatch.setattr(documents, "LONG_CHARACTERS", 2000)
    monkeypatch.setattr(cache, "CHECKPOINT_BYTES", 4000)
    folder = tmp_path / "data"
    folder.mkdir()
    chosen = random.Random(0)
    for name in "abc":
        rows = [{"text": "word " * chosen.randrange(12)} if n % 9 else {"body": n} for n in range(60)]
        rows[40:40] = [{"text": f"{name} is long. " * 400}]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "book.txt").write_text("A line of a book.\n" * 900)
    return [f"{folder}#70", str(tmp_path / "book.txt"), str(folder)]


def _build(directory, specs, method):
    def build(writer):
        sources = [parse_source(spec) for spec in specs]
        return write_documents(writer, sources, Bytes(), RowOptions(Selection(method, seed=3)), HowToWrite())

    return open_or_build(lambda: directory, build, with_mask=False, is_writer=True, barrier=lambda: None)


@pytest.mark.parametrize("method", ["first", "without_replacement"])
def test_killed_at_any_instant_the_bytes_are_the_same(tmp_path, specs, method):
    def count():
        seen = counting(None)
        _build(tmp_path / "counted", specs, method)
        (tmp_path / "events").write_text(str(seen[0]))

    assert in_child(count) == 0
    total, expected = int((tmp_path / "events").read_text()), content(tmp_path / "counted")
    assert total > 300
    chosen = random.Random(1)
    for case in range(8):
        directory = tmp_path / f"case-{case}"
        points = [total - case] if case < 4 else [chosen.randrange(1, total // 2) for _ in range(3)]

        def die(point, directory=directory):
            counting(point)
            _build(directory, specs, method)

        for point in points:
            assert in_child(lambda point=point: die(point)) in (-signal.SIGKILL, 0)
        _build(directory, specs, method)
        assert content(directory) == expected, points
    assert list(tmp_path.glob(".*.partial")) == []


def _die_late(directory, specs):
    def die():
        counting(300)
        _build(directory, specs, "first")

    assert in_child(die) == -signal.SIGKILL
    return directory.with_name(f".{directory.name}.partial")


def test_what_is_done_is_not_done_again(tmp_path, specs, caplog, monkeypatch):
    _build(tmp_path / "whole", specs, "first")
    partial = _die_late(tmp_path / "a", specs)
    done = json.loads((partial / "journal.json").read_text())["journal"]["num_tokens"]
    assert done > 2000
    encoded, encode = [0], Bytes.__call__

    def counting(self, texts, **options):
        encoded[0] += sum(map(len, texts))
        return encode(self, texts, **options)

    monkeypatch.setattr(Bytes, "__call__", counting)
    _build(tmp_path / "a", specs, "first")
    rest, encoded[0] = encoded[0], 0
    assert f"it goes on after {done:,} tokens" in caplog.text
    _build(tmp_path / "again", specs, "first")
    assert rest < encoded[0] - done / 2
    assert content(tmp_path / "a") == content(tmp_path / "whole")


@pytest.mark.parametrize("damage", ["short", "journal"])
def test_a_partial_build_that_is_damaged_begins_anew(tmp_path, specs, caplog, damage):
    _build(tmp_path / "whole", specs, "first")
    partial = _die_late(tmp_path / "a", specs)
    if damage == "short":
        os.truncate(partial / "tokens.bin", 10)
    else:
        (partial / "journal.json").write_text((partial / "journal.json").read_text().replace("1", "2", 1))
    _build(tmp_path / "a", specs, "first")
    assert "goes on" not in caplog.text
    assert content(tmp_path / "a") == content(tmp_path / "whole")
