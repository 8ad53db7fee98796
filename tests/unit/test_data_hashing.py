"""Digests of data files are kept while the file is the same, and never for one that changed."""

import json
import os
import time

import pytest
from blake3 import blake3

from mswift.data import hashing
from mswift.data.hashing import FileHashes, file_hash


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"old content")
    return path


def _settle(path):
    """Wait until the clock of the file system is past the file's times."""
    time.sleep(0.05)


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr(hashing, "_SETTLED_SECONDS", 0.02)


def _read(kept, path):
    hashes = FileHashes(kept)
    digest = hashes[path]
    hashes.save()
    return digest


def test_the_digest_is_blake3(data):
    assert file_hash(data) == blake3(b"old content").hexdigest()


def test_an_unchanged_file_is_read_once(data, tmp_path, monkeypatch):
    _settle(data)
    first = _read(tmp_path / "kept", data)
    monkeypatch.setattr(hashing, "file_hash", lambda path: pytest.fail("it is read"))
    assert _read(tmp_path / "kept", data) == first
    with pytest.raises(pytest.fail.Exception, match="it is read"):
        _read(tmp_path / "other", data)


@pytest.mark.parametrize("in_place", [True, False])
def test_same_size_and_mtime_is_no_proof(data, tmp_path, in_place):
    _settle(data)
    before = data.stat()
    _read(tmp_path / "kept", data)
    if in_place:
        data.write_bytes(b"new content")
    else:
        other = tmp_path / "b"
        other.write_bytes(b"new content")
        other.replace(data)
    os.utime(data, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = data.stat()
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert _read(tmp_path / "kept", data) == blake3(b"new content").hexdigest()
    _settle(data)
    assert _read(tmp_path / "kept", data) == blake3(b"new content").hexdigest()


def test_a_file_that_just_changed_is_not_kept(data, tmp_path, monkeypatch):
    monkeypatch.setattr(hashing, "_SETTLED_SECONDS", 60)
    _read(tmp_path / "kept", data)
    assert not (tmp_path / "kept").exists()


def test_a_file_that_changes_while_it_is_read_is_not_kept(data, tmp_path, monkeypatch):
    _settle(data)

    def slow(path):
        digest = file_hash(path)
        path.write_bytes(b"new content")
        return digest

    monkeypatch.setattr(hashing, "file_hash", slow)
    _read(tmp_path / "kept", data)
    assert not (tmp_path / "kept").exists()


@pytest.mark.parametrize("text", ["", "[]", "{", '{"files": {}, "hash": "0"}', None])
def test_a_damaged_list_is_ignored(data, tmp_path, text):
    _settle(data)
    right = _read(tmp_path / "kept", data)
    if text is None:  # another digest without its checksum
        envelope = json.loads((tmp_path / "kept").read_text())
        envelope["files"][str(data)][-1] = "0" * 64
        text = json.dumps(envelope)
    (tmp_path / "kept").write_text(text)
    assert _read(tmp_path / "kept", data) == right


def test_a_missing_file_is_an_error_and_an_unwritable_folder_is_none(data, tmp_path):
    with pytest.raises(FileNotFoundError):
        _read(tmp_path / "kept", tmp_path / "none")
    _settle(data)
    assert _read(data / "kept", data) == file_hash(data)
