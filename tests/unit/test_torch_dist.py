"""torch_dist directories without torch: any rank's file, any region, hostile metadata."""

import os
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from mswift.converters.engine import convert, plan
from mswift.converters.io.safe_pickle import load_pickle
from mswift.converters.io.torch_dist import ShardWriter, WrittenFile, split_region, write_index
from mswift.converters.io.torch_dist_reader import TorchDistSource
from mswift.converters.layout import Region, tiling_fault
from mswift.errors import CheckpointError
from tests.support.checkpoints import at, random_model, read_region

U2 = np.dtype("<u2")


def cut(shape: tuple[int, ...], draw: Any) -> list[Region]:
    """A random partition into boxes, as ranks of any layout might hold."""
    boxes = [Region.full(shape)]
    for _ in range(draw(st.integers(0, 5))):
        box = boxes.pop(draw(st.integers(0, len(boxes) - 1)))
        axis = draw(st.integers(0, len(shape) - 1))
        where = draw(st.integers(0, box.sizes[axis]))
        for offset, size in ((0, where), (where, box.sizes[axis] - where)):
            if size:
                offsets, sizes = list(box.offsets), list(box.sizes)
                offsets[axis], sizes[axis] = offsets[axis] + offset, size
                boxes.append(Region(tuple(offsets), tuple(sizes)))
    return boxes


def write(directory: Path, arrays: dict[str, Any], cuts: dict[str, list[Region]], ranks: int = 2) -> list[WrittenFile]:
    directory.mkdir()
    writers = [ShardWriter(directory, f"__{rank}_0.distcp") for rank in range(ranks)]
    for name, array in arrays.items():
        for number, region in enumerate(cuts[name]):
            data = np.ascontiguousarray(at(array, region))
            writers[number % ranks].add(name, "BF16", array.shape, region, data.data)
    return [WrittenFile.from_dict(writer.close().as_dict()) for writer in writers]


@settings(max_examples=30)
@given(data=st.data(), shape=st.lists(st.integers(1, 5), min_size=1, max_size=3))
def test_any_cut_is_read_in_any_other_cut(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, shape: list[int]
) -> None:
    path = tmp_path_factory.mktemp("cut") / "c"
    array = np.random.default_rng(1).integers(0, 2**16, shape, U2)
    files = write(path, {"x": array}, {"x": cut(tuple(shape), data.draw)})
    write_index(path, files)
    source = TorchDistSource(path)
    assert source.tensors["x"].shape == tuple(shape)
    for region in cut(tuple(shape), data.draw):
        assert (read_region(source, "x", region, U2) == at(array, region)).all()
    assert source.bytes_read == array.nbytes


def test_files_have_the_size_and_hash_that_was_reported(tmp_path: Path) -> None:
    array = np.random.default_rng(1).integers(0, 2**16, (3, 1 << 19), U2)  # 1 MiB rows: aligned data
    files = write(tmp_path / "c", {"x": array}, {"x": [Region((i, 0), (1, 1 << 19)) for i in range(3)]})
    more = write_index(tmp_path / "c", files)
    assert {f.name for f in more} == {".metadata", "common.pt", "metadata.json"}
    for file in [*files, *more]:
        content = (tmp_path / "c" / file.name).read_bytes()
        assert (len(content), blake3(content).hexdigest()) == (file.size, file.blake3)
    source = TorchDistSource(tmp_path / "c")
    assert all(source.chunk_data("x", Region((i, 0), (1, 1 << 19)))[1] % 4096 == 0 for i in range(3))


@pytest.mark.parametrize(
    ("cuts", "message"),
    [
        ([Region((0, 0), (2, 3))], r"elements \[2:4, 0:3\] are covered 0 times"),
        ([Region((0, 0), (4, 3)), Region((1, 1), (1, 1))], "covered 2 times"),
        ([Region((0, 0), (4, 3)), Region((0, 0), (4, 3))], "written twice"),
    ],
)
def test_chunks_that_do_not_tile_are_not_indexed(cuts: list[Region], message: str, tmp_path: Path) -> None:
    files = write(tmp_path / "c", {"x": np.zeros((4, 3), U2)}, {"x": cuts})
    with pytest.raises(CheckpointError, match=message):
        write_index(tmp_path / "c", files)
    assert not (tmp_path / "c" / ".metadata").exists()


def test_ranks_that_disagree_are_refused(tmp_path: Path) -> None:
    a = ShardWriter(tmp_path, "a.distcp")
    a.add("x", "BF16", (2, 2), Region((0, 0), (1, 2)), memoryview(bytes(4)))
    b = ShardWriter(tmp_path, "b.distcp")
    b.add("x", "F32", (2, 2), Region((1, 0), (1, 2)), memoryview(bytes(8)))
    with pytest.raises(CheckpointError, match=r"x is F32 \[2, 2\] here, BF16 \[2, 2\] in another file"):
        write_index(tmp_path, [a.close(), b.close()])


def test_large_regions_are_split_in_c_order() -> None:
    region = Region((1, 2, 0), (1, 7, 5))
    parts = split_region(region, 4, limit=60)
    assert [p.sizes for p in parts] == [(1, 3, 5), (1, 3, 5), (1, 1, 5)]
    moved = [Region((0, p.offsets[1] - 2, 0), p.sizes) for p in parts]
    assert tiling_fault(moved, (1, 7, 5)) is None
    assert split_region(Region((0,), (1,)), 4, limit=1) == [Region((0,), (1,))]


@pytest.fixture
def good(tmp_path: Path) -> Path:
    array = np.random.default_rng(1).integers(0, 2**16, (4, 6), U2)
    write_index(tmp_path / "c", write(tmp_path / "c", {"x": array}, {"x": [Region((0, 0), (4, 6))]}, ranks=1))
    return tmp_path / "c"


class Call:
    """Calls a function where it is unpickled carelessly."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = (function, args)

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("function", [os.mkdir, exec, eval, Path.mkdir, print, getattr])
@pytest.mark.parametrize("nested", [False, True])
def test_a_malicious_metadata_file_runs_nothing(function: Any, nested: bool, good: Path, tmp_path: Path) -> None:
    victim = tmp_path / "was-here"
    argument = f"__import__('os').mkdir({str(victim)!r})" if function in (exec, eval) else str(victim)
    thing = Call(function, argument)
    content = pickle.dumps({"x": [thing]} if nested else thing)
    if function in (os.mkdir, exec, eval):  # the attack works on a careless reader
        pickle.loads(content)  # noqa: S301
        victim.rmdir()
    (good / ".metadata").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"\.metadata: refused: it asks for .*, which no checkpoint needs"):
        TorchDistSource(good)
    assert not victim.exists()


@settings(max_examples=200)
@given(data=st.binary(max_size=60))
def test_any_bytes_as_a_pickle_are_refused_or_inert(data: bytes) -> None:
    for content in (data, b"\x80\x02" + data, b"ctorch\nSize\n(" + data):
        try:
            load_pickle(content)
        except pickle.UnpicklingError:
            continue


@settings(max_examples=60)
@given(at_byte=st.integers(0, 2**20), bit=st.integers(0, 7), cut_at=st.none() | st.integers(0, 2**20))
def test_a_flipped_or_truncated_metadata_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, at_byte: int, bit: int, cut_at: int | None
) -> None:
    path = tmp_path_factory.mktemp("meta") / "c"
    array = np.arange(24, dtype=U2).reshape(4, 6)
    write_index(path, write(path, {"x": array}, {"x": [Region((0, 0), (2, 6)), Region((2, 0), (2, 6))]}))
    content = bytearray((path / ".metadata").read_bytes())
    content[at_byte % len(content)] ^= 1 << bit
    (path / ".metadata").write_bytes(content[: cut_at % len(content)] if cut_at else content)
    try:
        source = TorchDistSource(path)
        for name, info in source.tensors.items():
            read_region(source, name, Region.full(info.shape), U2)
    except CheckpointError:
        return
    except ValueError as error:  # a flipped dtype: this test asks for 2-byte items
        assert " bytes given, " in str(error)  # noqa: PT017


def test_damage_is_named(good: Path) -> None:
    region = Region((0, 0), (4, 6))
    file = good / "__0_0.distcp"
    content = file.read_bytes()
    file.write_bytes(content[:-900])
    with pytest.raises(CheckpointError, match=r"__0_0.distcp: tensor 'x', .*truncated"):
        read_region(TorchDistSource(good), "x", region, U2)
    file.write_bytes(bytes(len(content)))
    with pytest.raises(CheckpointError, match="tensor 'x', .* is not a BF16 tensor"):
        read_region(TorchDistSource(good), "x", region, U2)
    file.unlink()
    with pytest.raises(CheckpointError, match="__0_0.distcp: cannot be read"):
        read_region(TorchDistSource(good), "x", region, U2)
    (good / ".metadata").unlink()
    with pytest.raises(CheckpointError, match="not a torch_dist checkpoint, or it is incomplete"):
        TorchDistSource(good)


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "common.pt"])
def test_links_that_lead_out_of_the_directory(name: str, tmp_path: Path) -> None:
    """One rule for all weights: a link into the directory or into the blobs of its own hub cache is read."""
    random_model(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "hub" / "snapshots" / "main", "megatron")
    folder, blobs = tmp_path / "hub" / "snapshots" / "main", tmp_path / "hub" / "blobs"
    blobs.mkdir()
    for place in (blobs / "abc", folder / "inside"):
        (folder / name).rename(place)
        (folder / name).symlink_to(os.path.relpath(place, folder))
        verify_open(folder)
        (folder / name).unlink()
        place.rename(folder / name)
    (folder / name).rename(tmp_path / "secret")
    (folder / name).symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match=rf"{re.escape(name)}: is a link to .*secret, outside"):
        verify_open(folder)


def test_a_circle_of_links_is_refused(good: Path) -> None:
    (good / "__0_0.distcp").unlink()
    (good / "__0_0.distcp").symlink_to(good / "__0_0.distcp")
    with pytest.raises(CheckpointError, match="__0_0.distcp"):
        read_region(TorchDistSource(good), "x", Region((0, 0), (4, 6)), U2)


def verify_open(folder: Path) -> None:
    """Opens the checkpoint as a conversion does."""
    source = plan(folder, "hf").source
    source.close()


def test_questions_outside_the_checkpoint(good: Path) -> None:
    source = TorchDistSource(good)
    with pytest.raises(CheckpointError, match="has no tensor 'y'"):
        read_region(source, "y", Region((0, 0), (1, 1)), U2)
    with pytest.raises(CheckpointError, match="lies outside"):
        read_region(source, "x", Region((3, 0), (2, 6)), U2)
