"""A stream that is stopped anywhere and goes on gives the samples of one that is not; its disk is bounded."""

import codecs
import gzip
import itertools
import json
import os
import random
import re
import shutil
import sys
import tempfile
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mswift.config.streaming import streaming_refusals
from mswift.config.train import PtConfig, SftConfig
from mswift.data import portions, stream_build
from mswift.data.dataset import DataOptions
from mswift.data.formats import has_offsets, read_file
from mswift.data.places import Bounds, Cursor, Place
from mswift.data.selection import Selection
from mswift.data.sources import LocalFile
from mswift.data.stream_build import StreamOptions, build_stream
from mswift.errors import ConfigError, DataError
from mswift.train.prefetch import ahead


class Bytes:
    """A tokenizer: one token a byte."""

    chat_template, eos_token_id, name_or_path = None, 256, "bytes"

    def __call__(self, texts, **_):
        return {"input_ids": [list(text.encode()) for text in texts]}


@pytest.fixture(scope="module", autouse=True)
def identity():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream_build, "tokenizer_identity", lambda _: "bytes")
        patch.setattr(os, "fsync", lambda _: None)  # a busy disk would be the time of these tests
        yield


def _rows(path, texts):
    path.write_text("\ufeff" + "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n\n" for text in texts))
    return str(path)


def _texts(name, count):
    chosen = random.Random(name)
    return [f"{name}{n} " + "wörd " * chosen.randrange(9) for n in range(count)]


def _mixed_files(folder):
    """Every kind of file: with offsets and bad rows, compressed, a table, one document."""
    specs = [_rows(folder / "a.jsonl", _texts("a", 23)), str(folder / "b.jsonl.gz"), str(folder / "c.csv")]
    with (folder / "a.jsonl").open("a") as stream:
        stream.write('{"body": 1}\nno json\n{"text": ""}\n{"text": "after a bad one"}')
    with gzip.open(specs[1], "wt") as stream:
        stream.write("".join(json.dumps({"text": text}) + "\n" for text in _texts("b", 11)))
    Path(specs[2]).write_text("text\n" + "".join(f'"{text}"\n' for text in _texts("c", 9)))
    (folder / "d.txt").write_text("A line of a book.\n" * 20)
    return [*specs, str(folder / "d.txt")]


def _stream(specs, cache, *, rows=5, weights=(), packing=None, max_length=40, is_writer=True, said=None, **more):
    options = DataOptions(max_length, cache_dir=cache, selection=Selection(seed=3), weights=weights, **more)
    return build_stream(
        "pt", specs, Bytes(), options, StreamOptions(rows, packing, "owner"), is_writer=is_writer,
        check=lambda _: None, opened=lambda *_: None, say=(said if said is not None else []).append,
    )  # fmt: skip


def _take(data, consumed, count):
    """What the next rows hold."""
    window = data.window(consumed, count)
    found = []
    for place, number in enumerate(window.numbers):
        samples = list(window.row(place).values())
        assert sum(len(sample.tokens) - 1 for sample in samples) == window.lengths[place]
        assert [s.tokens.tolist() for s in data.row(number).values()] == [s.tokens.tolist() for s in samples]
        found.append((number, [sample.tokens.tolist() for sample in samples]))
    return found


@settings(max_examples=8, deadline=None)
@given(
    stops=st.lists(st.integers(0, 16), min_size=1, max_size=4),
    rows=st.integers(2, 60),
    mixed=st.booleans(),
    packed=st.booleans(),
    batch=st.integers(1, 20),
)
def test_stops_anywhere_change_nothing(stops, rows, mixed, packed, batch):
    folder = Path(tempfile.mkdtemp())
    try:
        flags = {
            "rows": rows,
            "weights": (0.5, 1, 2, 0.3) if mixed else (),
            "packing": (90, "bestfit") if packed else None,
            "cut": "documents" if packed else "joined",
        }
        specs, steps = _mixed_files(folder), 16
        whole = _stream(specs, folder / "whole", **flags)
        whole.start(0, None)
        expected = [_take(whole, step * batch, batch) for step in range(steps)]
        whole.close()
        found, states = [], None
        for first, last in zip([0, *sorted(stops)], [*sorted(stops), steps], strict=True):
            data = _stream(specs, folder / "other", **flags)
            assert data.fingerprint == whole.fingerprint
            data.start(first * batch, states)
            for step in range(first, last):
                found.append(_take(data, step * batch, batch))
                if step % 3:  # a save reads the state of a step that another has followed
                    data.finished(step * batch)
            states = json.loads(json.dumps(data.state_at(last * batch)))  # killed: nothing is closed
            for source in data._streams:
                source.blocks._thread.join()
        assert found == expected
    finally:
        shutil.rmtree(folder)


def test_an_epoch_holds_every_row_once_and_the_next_has_another_order(tmp_path):
    """Documents that fit into a sample: a block is one sample, its rows joined as they stand in the file."""
    texts = _texts("t", 40)
    data = _stream([_rows(tmp_path / "t.jsonl", texts)], tmp_path / "cache", rows=8, max_length=10_000)
    data.start(0, None)
    taken = _take(data, 0, 5)
    joined = [[token for text in texts[at : at + 8] for token in [*text.encode(), 256]] for at in range(0, 40, 8)]
    assert taken == [(number, [tokens]) for number, tokens in enumerate(joined)]
    assert [tokens for _, tokens in _take(data, 5, 5)] == [[tokens] for tokens in joined]
    assert (data.epoch_at(5), data.epoch_at(10)) == (0, 1)
    data.close()
    short = _stream([str(tmp_path / "t.jsonl")], tmp_path / "cache", rows=40, max_length=16)
    short.start(0, None)
    count = -(-(sum(len(text.encode()) + 1 for text in texts) - 1) // 16)
    once, again = _take(short, 0, count), _take(short, count, count)
    assert sorted(number for number, _ in once) == list(range(count)) != [number for number, _ in once]
    assert sorted(tokens for _, tokens in again) == sorted(tokens for _, tokens in once)
    assert [tokens for _, tokens in again] != [tokens for _, tokens in once]
    short.close()


def test_a_mixture_keeps_its_shares_at_every_step(tmp_path):
    specs = [_rows(tmp_path / f"{name}.jsonl", _texts(name, 30)) for name in "xyz"]
    data = _stream(specs, tmp_path / "cache", weights=(6, 3, 1))
    data.start(0, None)
    numbers = [number for number, _ in _take(data, 0, 300)]
    for end in range(1, 301):
        counts = [sum(number % 3 == source for number in numbers[:end]) for source in range(3)]
        assert all(abs(count - end * share) < 1.01 for count, share in zip(counts, (0.6, 0.3, 0.1), strict=True))
    data.close()


def test_other_ranks_read_what_the_writer_makes_and_the_disk_is_bounded(tmp_path):
    specs = [_rows(tmp_path / "a.jsonl", _texts("a", 400))]
    writer, reader = (_stream(specs, tmp_path / "cache", is_writer=flag) for flag in (True, False))
    writer.start(0, None)
    reader.start(0, None)
    folder = writer._streams[0].blocks._folder
    for step in range(60):
        expected = _take(writer, step * 4, 4)
        assert _take(reader, step * 4, 4) == expected
        writer.finished(step * 4 + 4)
        assert len([path for path in folder.iterdir() if path.name.isdigit()]) <= 3
    writer.close()
    assert not folder.exists()


def test_a_thread_that_reads_ahead_and_a_loop_that_gives_up_blocks_do_not_meet(tmp_path):
    """As in training: one thread makes blocks, one reads the next batch, the loop saves and removes what is behind."""
    specs = [_rows(tmp_path / f"{name}.jsonl", _texts(name, 90)) for name in "ab"]
    flags = {"weights": (2, 1), "rows": 3, "packing": (90, "bestfit")}
    alone = _stream(specs, tmp_path / "alone", **flags)
    alone.start(0, None)
    expected = [_take(alone, at, 3) for at in range(0, 600, 3)]
    alone.close()
    data, interval = _stream(specs, tmp_path / "cache", **flags), sys.getswitchinterval()
    data.start(0, None)
    sys.setswitchinterval(1e-6)
    try:
        with closing(ahead(lambda at: (at, _take(data, at, 3)), range(0, 600, 3))) as batches:
            for step, (at, found) in enumerate(batches):
                assert found == expected[step]
                states = data.state_at(at + 3)
                assert sum(state["first"] + state["taken"] for state in states) == at + 3
                assert [s.tokens.tolist() for s in data.row(found[0][0]).values()] == found[0][1]
                data.finished(at + 3)
                assert data.state_at(at + 3) == states
    finally:
        sys.setswitchinterval(interval)
    data.close()
    assert list((tmp_path / "cache" / "streams").iterdir()) == []


def test_lines_go_on_at_a_byte_offset_and_other_files_say_how_fast_they_skip(tmp_path):
    said = []
    for spec in _mixed_files(tmp_path):
        path = Path(spec)
        expected = list(read_file(path))
        cursor, records, places = Cursor([LocalFile(path)], Place(), said.append), [], []
        while not cursor.at_end:
            places.append(cursor.place)
            for _, found in cursor.take(Bounds(3, 1 << 30)):
                records += found
        assert [(r.number, r.where, r.row, str(r.error)) for r in records] == [
            (r.number, r.where, r.row, str(r.error)) for r in expected
        ]
        assert said == []  # a file that is open is not opened again
        for place in places:
            files = Cursor([LocalFile(path)], place, said.append).take(Bounds(99, 1 << 30))
            again = [(record.number, record.where, record.row) for _, found in files for record in found]
            assert again == [(record.number, record.where, record.row) for record in expected[place.row :]]
            if has_offsets(path) and place.row:
                assert place.offset == path.stat().st_size or path.read_bytes()[place.offset - 1] == ord("\n")
        assert (said == []) == (has_offsets(path) or len(expected) == 1)
        assert all("rows/s" in line and path.name in line for line in said)
        said.clear()


@pytest.mark.parametrize("cut", ["joined", "documents"])
def test_a_book_is_streamed_in_portions(tmp_path, monkeypatch, cut):
    """A .txt is cut between blocks, which are bounded: every token in its order, and the same after a stop inside."""
    monkeypatch.setattr(portions, "PORTION_BYTES", 9000)
    monkeypatch.setattr(portions, "_WINDOW_BYTES", 8000)
    chosen, book = random.Random(5), tmp_path / "book.txt"
    lines = ["wörd " * chosen.randrange(1, 30) + "ende 𝔘." for _ in range(900)]
    book.write_bytes(codecs.BOM_UTF8 + ("\n".join(lines) + "\n").encode())
    flags = {"rows": 2, "max_length": 64, "cut": cut}
    whole = _stream([str(book)], tmp_path / "whole", **flags)
    whole.start(0, None)
    found, states = [], []
    while not states or states[-1][0]["epoch"] == 0:
        found += _take(whole, len(found), 1)
        states.append(json.loads(json.dumps(whole.state_at(len(found)))))
    whole.close()
    begins = sorted({state["place"]["offset"] for (state,) in states})
    assert len(begins) >= 5
    assert max(end - begin for begin, end in itertools.pairwise(begins)) <= 2 * 9000
    joined = [token for _, (tokens,) in sorted(found[:-1]) for token in tokens[:-1]]  # no last token of a block
    expected = iter([*book.read_bytes()[len(codecs.BOM_UTF8) :], 256])
    assert all(token in expected for token in joined)  # in this order
    assert len(joined) == book.stat().st_size - len(codecs.BOM_UTF8) + 1 - len(begins)
    again = _stream([str(book)], tmp_path / "again", **flags)
    middle = len(found) // 2
    assert 0 < states[middle - 1][0]["place"]["offset"] < book.stat().st_size
    again.start(middle, states[middle - 1])
    assert _take(again, middle, len(found) - middle) == found[middle:]
    again.close()


def test_what_lies_before_the_place_is_not_read(tmp_path):
    """Bytes before the offset may be anything: they are damaged here."""
    path = tmp_path / "a.jsonl"
    _rows(path, _texts("a", 30))
    cursor = Cursor([LocalFile(path)], Place(), print)
    rows = [record.row for _, found in cursor.take(Bounds(12, 1 << 30)) for record in found]
    assert len(rows) == 12
    data = bytearray(path.read_bytes())
    data[1 : cursor.place.offset - 1] = b"\0" * (cursor.place.offset - 2)
    expected = [record.row for record in read_file(path)][12:]
    path.write_bytes(data)
    again = Cursor([LocalFile(path)], cursor.place, print)
    assert [record.row for _, found in again.take(Bounds(99, 1 << 30)) for record in found] == expected


def test_errors(tmp_path):
    good, bad = _rows(tmp_path / "a.jsonl", _texts("a", 12)), tmp_path / "bad.jsonl"
    with pytest.raises(ConfigError, match=r"reads files as a whole, .*a.jsonl#4 asks for 4 rows"):
        _stream([f"{good}#4"], tmp_path / "cache")
    bad.write_text('{"body": 1}\n' * 12)
    writer, reader = (_stream([str(bad)], tmp_path / "cache", is_writer=flag) for flag in (True, False))
    writer.start(0, None)
    with pytest.raises(DataError, match="no row gave a sample in a whole pass"):
        writer.window(0, 1)
    writer.close()
    writer, reader = (_stream([str(bad)], tmp_path / "c", is_writer=flag, strict=True) for flag in (True, False))
    writer.start(0, None)
    reader.start(0, None)
    for data, text in ((writer, "bad.jsonl, row 1"), (reader, "that tokenises the data failed: .*bad.jsonl, row 1")):
        with pytest.raises(DataError, match=text):
            data.window(0, 1)
    data = _stream([good], tmp_path / "cache")
    data.start(6, [{"epoch": 0, "block": 0, "place": asdict(Place()), "first": 0, "taken": 6}])
    with pytest.raises(DataError, match="has taken 6 samples of data block 0, which has only 4 now"):
        data.window(6, 1)
    with pytest.raises(ValueError, match="stands at 0 cannot be read at 8"):
        _stream([good], tmp_path / "cache").window(8, 1)


def test_other_files_are_another_stream(tmp_path):
    path = tmp_path / "a.jsonl"
    specs, found = [_rows(path, _texts("a", 12))], set()
    for change in (lambda: None, lambda: path.write_text(path.read_text()[:-1]), lambda: path.write_text("{}")):
        change()
        found.add(_stream(specs, tmp_path / "cache").fingerprint)
    found.add(_stream(specs, tmp_path / "cache", rows=6).fingerprint)
    found.add(_stream(specs, tmp_path / "cache", weights=(1,)).fingerprint)
    assert len(found) == 5


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (SftConfig(model="m", streaming=True, num_train_epochs=2), "--num_train_epochs 2 .*--train_iters 1000"),
        (SftConfig(model="m", streaming=True, split_dataset_ratio=0.1), "--split_dataset_ratio 0.1 .*--val_dataset"),
        (SftConfig(model="m", streaming=True, enable_channel_loss=True), "--enable_channel_loss .*leave out one"),
        (PtConfig(model="m", streaming=True, data_path=("a",)), "--data_path .*leave out --streaming"),
        (PtConfig(model="m", streaming_block_rows=7), "--streaming_block_rows 7 belongs to --streaming"),
    ],
)
def test_refused_flags(config, text):
    (refusal,) = streaming_refusals(config)
    assert re.search(text, str(refusal))
