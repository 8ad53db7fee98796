"""ParallelDims: ranks and coordinates are inverse, groups partition the ranks, stages partition the layers."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mswift.errors import LayoutError
from mswift.topology import DENSE_AXES, EXPERT_AXES, Coordinate, ParallelDims, divisors

degree = st.sampled_from([1, 2, 3, 4])


@st.composite
def layouts(draw: st.DrawFn) -> ParallelDims:
    tp, cp, pp, dp = (draw(degree) for _ in range(4))
    stage = tp * cp * dp
    etp = draw(st.sampled_from([None, *divisors(stage)]))
    ep = draw(st.sampled_from(divisors(stage // (tp if etp is None else etp))))
    vpp = draw(st.sampled_from([None, 1, 2])) if pp > 1 else None
    return ParallelDims(world_size=stage * pp, tp=tp, cp=cp, pp=pp, ep=ep, etp=etp, vpp=vpp)


@given(layouts())
def test_ranks_and_coordinates_are_inverse(dims: ParallelDims) -> None:
    coordinates = [dims.coordinate(rank) for rank in range(dims.world_size)]
    assert len(set(coordinates)) == dims.world_size
    assert [dims.rank(coordinate) for coordinate in coordinates] == list(range(dims.world_size))


@given(layouts(), st.data())
def test_groups_partition_the_ranks(dims: ParallelDims, data: st.DataObject) -> None:
    mesh = data.draw(st.sampled_from([DENSE_AXES, EXPERT_AXES]))
    axes = data.draw(st.lists(st.sampled_from(mesh), min_size=1, unique=True))
    name = "-".join(axes)
    groups = {dims.members(name, rank) for rank in range(dims.world_size)}
    assert sorted(rank for group in groups for rank in group) == list(range(dims.world_size))
    for group in groups:
        assert all(dims.members(name, rank) == group for rank in group)


@given(layouts())
def test_a_group_differs_in_its_own_axis_only(dims: ParallelDims) -> None:
    for axis in DENSE_AXES:
        for rank in range(dims.world_size):
            group = [dims.coordinate(member) for member in dims.members(axis, rank)]
            assert [getattr(place, axis) for place in group] == list(range(dims.sizes[axis]))
            others = {tuple(getattr(place, a) for a in DENSE_AXES if a != axis) for place in group}
            assert len(others) == 1


@given(layouts(), st.integers(1, 5))
def test_stages_partition_the_layers_in_execution_order(dims: ParallelDims, depth: int) -> None:
    chunks = dims.vpp or 1
    num_layers = depth * dims.pp * chunks
    order = [(chunk, stage) for chunk in range(chunks) for stage in range(dims.pp)]
    layers = [layer for chunk, stage in order for layer in dims.stage_layers(num_layers, stage, chunk)]
    assert layers == list(range(num_layers))


@given(st.integers(1, 64), degree, degree, degree)
def test_a_refused_world_size_names_sizes_that_work(world: int, tp: int, cp: int, pp: int) -> None:
    if world % (tp * cp * pp) == 0:
        assert ParallelDims(world, tp=tp, cp=cp, pp=pp).dp == world // (tp * cp * pp)
        return
    with pytest.raises(LayoutError) as refusal:
        ParallelDims(world, tp=tp, cp=cp, pp=pp)
    text = str(refusal.value)
    assert text.startswith(f"{world} rank")
    assert str(tp * cp * pp) in text
    sizes = re.search(r"use ([\d or]+) ranks", text)
    assert sizes is not None
    for size in re.findall(r"\d+", sizes[1]):
        ParallelDims(int(size), tp=tp, cp=cp, pp=pp)


@given(st.integers(1, 12), st.integers(2, 24))
def test_a_refused_depth_names_every_size_that_works(num_layers: int, pp: int) -> None:
    dims = ParallelDims(pp, pp=pp)
    if num_layers % pp == 0:
        assert len(dims.stage_layers(num_layers, 0)) == num_layers // pp
        return
    with pytest.raises(LayoutError, match=rf"--pipeline_model_parallel_size {pp} .* {num_layers} layers") as refusal:
        dims.stage_layers(num_layers, 0)
    sizes = [int(n) for n in str(refusal.value).rpartition("can be ")[2].split(", ")]
    assert sizes == [n for n in range(1, num_layers + 1) if num_layers % n == 0]
    for size in sizes:
        ParallelDims(size, pp=size).stage_layers(num_layers, 0)


def test_sequence_parallel_needs_tensor_parallel() -> None:
    with pytest.raises(LayoutError, match="--sequence_parallel true .* --tensor_model_parallel_size is 1"):
        ParallelDims(2, sequence_parallel=True)
    assert ParallelDims(2, tp=2, sequence_parallel=True).dp == 1
    assert ParallelDims(2, sequence_parallel=False).dp == 2


def test_chunks_need_stages_and_divide_them() -> None:
    with pytest.raises(
        LayoutError, match="--virtual_pipeline_model_parallel_size 2 .* --pipeline_model_parallel_size is 1"
    ):
        ParallelDims(2, vpp=2)
    with pytest.raises(LayoutError, match=r"size 3 does not divide the 4 layers .* can be 1, 2, 4"):
        ParallelDims(2, pp=2, vpp=3).stage_layers(8, 0, 1)
    assert ParallelDims(2, pp=2, vpp=2).stage_layers(8, 0, 1) == range(4, 6)


def test_a_degree_below_one_is_refused() -> None:
    with pytest.raises(LayoutError, match="--tensor_model_parallel_size 0"):
        ParallelDims(tp=0)
    with pytest.raises(LayoutError, match="--world_size 0"):
        ParallelDims(0)


def test_places_outside_the_mesh_are_our_own_bug() -> None:
    dims = ParallelDims(8, tp=2, pp=2)
    for wrong in (
        lambda: dims.coordinate(8),
        lambda: dims.rank(Coordinate(tp=2)),
        lambda: dims.members("tp-ep", 0),
    ):
        with pytest.raises(ValueError, match="outside|no axis"):
            wrong()
