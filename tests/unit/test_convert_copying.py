"""The ways in which bytes move agree, and few files are open at once."""

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mswift.converters import copying, execute
from mswift.converters.engine import convert
from mswift.converters.io import strided
from mswift.converters.io.descriptors import Descriptors, SizedFiles
from mswift.converters.layout import Piece, merge_bytes
from mswift.converters.verify import verify
from mswift.converters.work import FRAME, Schedule, Unit, part_of, spans
from mswift.converters.workers import run_all
from mswift.errors import CheckpointError
from tests.support.checkpoints import random_model, read_model, same

WIDE = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "vocab_size": 1003}


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here looks at durability."""
    for call in ("fsync", "fdatasync"):
        monkeypatch.setattr(os, call, lambda fd: None)


@pytest.mark.parametrize("direct", [1, 1 << 40])
@pytest.mark.parametrize("listed", [1, 1 << 40])
def test_every_way_gives_the_same_bytes(
    direct: int, listed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """copy_file_range or memory; lists of runs or numpy; with and without hashing."""
    monkeypatch.setattr(copying, "DIRECT_RUN_BYTES", direct)
    monkeypatch.setattr(strided, "LIST_RUN_BYTES", listed)
    tensors = random_model(tmp_path / "hf", "qwen2", shards=3, **WIDE)
    for hashing in (True, False):
        m, back = tmp_path / f"m{hashing}", tmp_path / f"back{hashing}"
        convert(tmp_path / "hf", m, "megatron", hash_source=hashing)
        convert(m, back, "hf", hash_source=hashing, max_shard_bytes=10**6)
        assert same(read_model(back), tensors)
        assert verify(tmp_path / "hf", m).equal
        convert(m, tmp_path / f"again{hashing}", "megatron", hash_source=hashing)
        assert (tmp_path / f"again{hashing}/__0_0.distcp").read_bytes() == (m / "__0_0.distcp").read_bytes()


@pytest.mark.parametrize("number", [errno.EXDEV, errno.EOPNOTSUPP, errno.EINVAL])
def test_file_systems_without_copy_file_range(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args: Any) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "copy_file_range", refused)
    random_model(tmp_path / "hf", **WIDE)
    convert(tmp_path / "hf", tmp_path / "m", "megatron", hash_source=False)
    assert verify(tmp_path / "hf", tmp_path / "m").equal


def test_a_source_that_shrinks_meanwhile_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planned, then cut: the copying finds it, whichever way the bytes move."""
    right = execute.run
    for hashing in (True, False):
        source = tmp_path / f"hf{hashing}"
        random_model(source, **WIDE)
        file = source / "model.safetensors"
        monkeypatch.setattr(execute, "run", lambda *args, file=file: (os.truncate(file, 10**6), right(*args)))
        with pytest.raises(CheckpointError, match="model.safetensors: ends at byte"):
            convert(source, tmp_path / "out", "megatron", hash_source=hashing)
    assert not (tmp_path / "out").exists()


@given(st.data())
def test_lists_of_runs_equal_numpy(data: st.DataObject) -> None:
    """A file of permuted blocks, read and written in both ways; runs of 1 to 5 bytes."""
    sizes = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    run = data.draw(st.integers(1, 5))
    order = data.draw(st.permutations(range(len(sizes))))
    unit, steps = run, {}
    for axis in order:  # side 1: the axes in another order, without gaps
        steps[axis] = unit
        unit *= sizes[axis]
    total, dims, mine = unit, [], run
    for axis in reversed(range(len(sizes))):
        dims.append((sizes[axis], mine, steps[axis]))
        mine *= sizes[axis]
    copy = Piece(("a", "b"), ((0,), (3,)), merge_bytes([*dims, (run, 1, 1)]))
    content = bytes(np.random.default_rng(total).integers(0, 256, total + 3, np.uint8))
    results = []
    for limit in (1, 1 << 40):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(strided, "LIST_RUN_BYTES", limit)
            fd = os.memfd_create("file")
            os.pwrite(fd, content, 0)
            memory, tile = memoryview(bytearray(total)), memoryview(bytearray(64))
            assert strided.gather(fd, Path("f"), copy, memory, 0, tile) == total
            out = os.memfd_create("out")
            assert strided.scatter(out, copy, memory, 0, tile) == total
            results.append((bytes(memory), os.pread(out, total + 3, 0)[3:]))
            os.close(fd)
            os.close(out)
    assert results[0] == results[1]
    assert results[0][1] == content[3:]
    runs = {(a, b, n) for a, b, n in strided.runs(copy)}
    assert sum(n for _, _, n in runs) == total
    assert all(results[0][0][a : a + n] == content[b : b + n] for a, b, n in runs)


# -- descriptors


def test_few_files_are_open_and_none_in_use_is_closed(tmp_path: Path) -> None:
    paths = [tmp_path / str(n) for n in range(20)]
    for n, path in enumerate(paths):
        path.write_bytes(bytes([n]))
    files = Descriptors(limit=3)
    with files.held(paths[:2]) as kept:
        for n, path in enumerate(paths):
            with files.held([path, path]) as fds:
                assert os.pread(fds[path], 1, 0) == bytes([n])
        assert [os.pread(fd, 1, 0) for fd in kept.values()] == [b"\0", b"\1"]
    assert files.most_open <= 4
    with files.held(paths) as fds:  # more at once than the limit: they are all needed
        assert len(set(fds.values())) == 20
    files.close()
    with pytest.raises(CheckpointError, match="cannot be read"), files.held([tmp_path / "none"]):
        pass


def test_sized_files_keep_their_bytes(tmp_path: Path) -> None:
    files = SizedFiles(tmp_path, {"a": 10, "b": 0}, limit=1)
    for _ in range(2):
        for name, size in files.sizes.items():
            with files.held([tmp_path / name]) as fds:
                assert os.fstat(fds[tmp_path / name]).st_size == size
                os.pwrite(fds[tmp_path / name], b"x" * min(size, 3), 2)
    files.close()
    assert (tmp_path / "a").read_bytes() == b"\0\0xxx" + bytes(5)


# -- units


@given(st.lists(st.integers(0, 100), min_size=1, max_size=30), st.integers(1, 40))
def test_parts_share_the_units(sizes: list[int], parts: int) -> None:
    units = [Unit(f"{n}", 0, size, f"file{n // 3}") for n, size in enumerate(sizes)]
    dealt = [part_of(units, part, parts) for part in range(1, parts + 1)]
    assert [unit for part in dealt for unit in part] == units
    files = [{unit.file for unit in part} for part in dealt]
    assert sum(map(len, files)) == len({unit.file for unit in units})


@given(st.lists(st.integers(0, 50), min_size=1, max_size=40), st.integers(1, 5))
def test_every_unit_is_given_out_once_and_writers_keep_apart(sizes: list[int], workers: int) -> None:
    units = [Unit(f"{n}", 0, size, f"file{n % 7}") for n, size in enumerate(sizes)]
    schedule, seen, current = Schedule(units), [], {}
    for turn in range(len(units) + workers):
        unit = schedule.take(turn % workers)
        if unit is not None:
            seen.append(unit)
            current[turn % workers] = unit.file
    assert sorted(seen, key=lambda u: int(u.name)) == units
    for file in {u.file for u in units}:
        assert [u for u in seen if u.file == file] == [u for u in units if u.file == file]


def test_the_first_error_stops_all_workers() -> None:
    units = [Unit(FRAME + str(n), 0, 0, "f") for n in range(1000)]
    done = []

    def work(unit: Unit, buffers: Any) -> None:
        done.append(unit)
        if len(done) == 5:
            raise ValueError("five")

    with pytest.raises(ValueError, match="five"):
        run_all(Schedule(units), work, 2)
    assert len(done) < 1000


def test_spans() -> None:
    assert list(spans(0, 0, 4)) == [(0, 0)]
    assert list(spans(0, 9, 4)) == [(0, 4), (4, 8), (8, 9)]
    assert list(spans(4, 8, 4)) == [(4, 8)]
