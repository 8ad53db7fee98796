"""Token cache: whole or absent, damage found and mended, and nobody left waiting when the writer fails."""

import fcntl
import json
import os
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mswift.data.batch import Sample
from mswift.data.cache import open_or_build, open_store
from mswift.data.samples import Cut, whole
from mswift.errors import ConfigError, DataError

SAMPLES = [Sample(np.arange(n, dtype=np.int32), (np.arange(n) % 2).astype(np.float32)) for n in (4, 3, 9)]


class Builder:
    """Counts how often the entry is built."""

    def __init__(self):
        self.calls = 0

    def __call__(self, writer):
        self.calls += 1
        for sample in SAMPLES:
            writer.add_sample(sample)
        return {"files": []}


def _open(directory, build, is_writer=True, barrier=lambda: None):
    return open_or_build(lambda: directory, build, with_mask=True, is_writer=is_writer, barrier=barrier)


def test_what_is_written_is_read(tmp_path):
    store = _open(tmp_path / "a", Builder())
    for index, sample in enumerate(SAMPLES):
        cut = slice(store.offsets[index], store.offsets[index + 1])
        assert store.tokens[cut].tolist() == sample.tokens.tolist()
        assert store.weights[store.mask[cut]].tolist() == sample.loss_weights.tolist()
    assert isinstance(store.tokens, np.memmap)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_to_open_a_data_set_its_tokens_are_not_read(tmp_path):
    """They are another 5 bytes for each of billions: numbers of them stand in the index."""
    store = _open(tmp_path / "a", Builder())
    learned = sum(int(np.count_nonzero(sample.loss_weights)) for sample in SAMPLES)
    for name in ("tokens.bin", "mask.bin"):
        path = tmp_path / "a" / name
        path.write_bytes(bytes(path.stat().st_size))
    samples = whole(open_store(tmp_path / "a"), Cut(9))
    assert (samples.num_tokens, samples.num_trained_tokens) == (len(store.mask), learned) == (16, 7)


def test_built_once_and_the_fingerprint_is_of_the_content(tmp_path):
    build = Builder()
    first, second, other = _open(tmp_path / "a", build), _open(tmp_path / "a", build), _open(tmp_path / "b", build)
    assert build.calls == 2
    assert first.fingerprint == second.fingerprint == other.fingerprint

    def shorter(writer):
        writer.add_sample(SAMPLES[0])
        return {"files": []}

    assert _open(tmp_path / "c", shorter).fingerprint != first.fingerprint


def test_a_byte_a_token_names_its_loss_weight(tmp_path):
    weights = np.array([0, 0.1, 1, 2.5, 0.1, 0], dtype=np.float32)

    def with_weights(factor):
        def write(writer):
            for sample in (SAMPLES[0], Sample(np.arange(6, dtype=np.int32), weights * np.float32(factor))):
                writer.add_sample(sample)
            return {"files": []}

        return write

    store = _open(tmp_path / "a", with_weights(1))
    assert store.weights[store.mask[4:]].tolist() == weights.tolist()
    assert store.weights[:2].tolist() == [0, 1]
    assert (tmp_path / "a" / "mask.bin").stat().st_size == 10
    assert store.mask[:4].tolist() == [0, 1, 0, 1]
    other = _open(tmp_path / "b", with_weights(3))
    assert (other.mask == store.mask).sum() < 10  # 1 became 3
    doubled = np.where(weights > 1, weights * 2, weights)

    def heavier(writer):
        for sample in (SAMPLES[0], Sample(np.arange(6, dtype=np.int32), doubled)):
            writer.add_sample(sample)
        return {"files": []}

    same_bytes = _open(tmp_path / "c", heavier)
    assert same_bytes.mask.tolist() == store.mask.tolist()
    assert same_bytes.fingerprint != store.fingerprint


@pytest.mark.parametrize("distinct", [256, 257])
def test_weights_that_a_byte_cannot_name(tmp_path, distinct):
    def write(writer):
        writer.add_sample(Sample(np.arange(distinct, dtype=np.int32), np.arange(distinct, dtype=np.float32)))
        return {"files": []}

    if distinct == 256:
        assert _open(tmp_path / "a", write).weights.tolist() == list(range(256))
        return
    with pytest.raises(
        DataError, match="257 distinct loss weights so far, a data set can have 256: round `loss_scale`"
    ):
        _open(tmp_path / "a", write)


def _of_channels(*names):
    def write(writer):
        for name in names:
            writer.add_sample(replace(SAMPLES[0], channel=name))
        return {"files": []}

    return write


def test_a_byte_a_sample_names_its_channel(tmp_path):
    store = _open(tmp_path / "a", _of_channels("maths", "", "code", "maths"))
    assert [store.channel_names[number] for number in store.channels] == ["maths", "", "code", "maths"]
    assert (tmp_path / "a" / "channels.bin").stat().st_size == 4
    other = _open(tmp_path / "b", _of_channels("physics", "", "code", "physics"))
    assert other.channels.tolist() == store.channels.tolist()
    assert other.fingerprint != store.fingerprint
    none = _open(tmp_path / "c", _of_channels("", ""))
    assert (none.channels, none.channel_names) == (None, ())
    with pytest.raises(DataError, match="--enable_channel_loss: the rows name 256 channels so far, the last 'n255'"):
        _open(tmp_path / "d", _of_channels(*(f"n{number}" for number in range(256))))


def _truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 4)


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "name", "message"),
    [
        (_truncate, "tokens.bin", r"tokens\.bin has 60 bytes, the index says 64"),
        (_truncate, "mask.bin", r"mask\.bin has 12 bytes, the index says 16"),
        (Path.unlink, "mask.bin", r"mask\.bin has None bytes, the index says 16"),
        (_flip, "offsets.bin", r"offsets\.bin does not match its checksum"),
        (_flip, "index.json", r"index\.json does not match its checksum"),
        (_truncate, "index.json", r"index\.json does not match its checksum"),
        (lambda path: path.write_text("[]"), "index.json", r"index\.json does not match its checksum"),
    ],
)
def test_damage_is_found_said_and_mended(tmp_path, caplog, damage, name, message):
    build = Builder()
    before = _open(tmp_path / "a", build).fingerprint
    damage(tmp_path / "a" / name)
    with pytest.raises(DataError, match=message):
        open_store(tmp_path / "a")
    assert _open(tmp_path / "a", build).fingerprint == before
    assert build.calls == 2
    assert "is damaged" in caplog.text
    assert "built again" in caplog.text
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_an_unfinished_entry_is_never_published(tmp_path):
    def failing(writer):
        writer.add_sample(SAMPLES[0])
        raise DataError("row 2 is bad")

    met = []
    with pytest.raises(DataError, match="row 2 is bad"):
        _open(tmp_path / "a", failing, barrier=lambda: met.append("writer"))
    assert met == ["writer"]
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(DataError, match="that tokenises the data failed, see its message"):
        _open(tmp_path / "a", failing, is_writer=False)


def test_readers_wait_for_the_writer(tmp_path):
    build, refuse = Builder(), pytest.fail
    store = _open(tmp_path / "a", refuse, is_writer=False, barrier=lambda: _open(tmp_path / "a", build) and None)
    assert len(store.offsets) == 4


def test_without_locks_a_second_writer_keeps_what_the_first_published(tmp_path, monkeypatch, caplog):
    inner = Builder()

    def no_locks(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", no_locks)

    def slow(writer):
        _open(tmp_path / "a", inner)  # another job publishes the same entry meanwhile
        (tmp_path / "a" / "witness").touch()
        return Builder()(writer)

    _open(tmp_path / "a", slow)
    assert (tmp_path / "a" / "witness").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert "has no locks (Operation not supported): two processes may build the same entry" in caplog.text


def test_a_second_writer_waits_and_takes_what_the_first_made(tmp_path, caplog):
    second, begun, threads = Builder(), threading.Event(), []

    def first(writer):
        threads.append(threading.Thread(target=lambda: (begun.set(), _open(tmp_path / "a", second))))
        threads[0].start()
        begun.wait()
        deadline = time.monotonic() + 30
        while "waiting for it" not in caplog.text and time.monotonic() < deadline:
            time.sleep(0.01)
        return Builder()(writer)

    _open(tmp_path / "a", first)
    threads[0].join()
    assert second.calls == 0
    assert f"pid {os.getpid()} on " in caplog.text
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_folder_that_cannot_be_written_names_the_flag(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(ConfigError, match="cannot be written to .*bytes free.*--cache_dir /path"):
        _open(blocked / "tokens" / "a", Builder())
    _open(tmp_path / "path" / "tokens" / "a", Builder())


def test_a_full_disk_publishes_nothing(tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ConfigError, match="No space left on device; .* bytes free.: name a folder"):
        _open(tmp_path / "a", Builder())
    assert list(tmp_path.iterdir()) == []


def test_the_index_is_plain_json(tmp_path):
    _open(tmp_path / "a", Builder())
    index = json.loads((tmp_path / "a" / "index.json").read_text())["index"]
    assert index["files"]["tokens.bin"]["size"] == 64


def test_only_the_writer_locates_the_entry(tmp_path):
    store = _open(tmp_path / "a", Builder())
    reader = open_or_build(
        pytest.fail, pytest.fail, with_mask=True, is_writer=False, barrier=lambda: None,
        hand_over=lambda path: path or tmp_path / "a",
    )  # fmt: skip
    assert reader.fingerprint == store.fingerprint


def test_a_writer_that_fails_hands_nothing_over(tmp_path):
    handed = []

    def locate():
        raise DataError("the file is gone")

    def run(is_writer):
        open_or_build(
            locate, pytest.fail, with_mask=True, is_writer=is_writer, barrier=lambda: None, hand_over=handed.append
        )

    with pytest.raises(DataError, match="the file is gone"):
        run(True)
    with pytest.raises(DataError, match="that tokenises the data failed"):
        run(False)
    assert handed == [None, None]
