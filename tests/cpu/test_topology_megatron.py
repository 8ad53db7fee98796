"""Ranks and groups against megatron-core's own RankGenerator, for dense and expert meshes."""

import pytest
from megatron.core.parallel_state import RankGenerator

from mswift.topology import ParallelDims

ORDER = "tp-cp-ep-dp-pp"  # megatron-core's default; a generator holds cp (dense) or ep (experts), never both

LAYOUTS = [
    ParallelDims(world_size=1),
    ParallelDims(world_size=8, tp=2, pp=2),
    ParallelDims(world_size=24, tp=2, cp=3, pp=2),
    ParallelDims(world_size=16, tp=4, pp=2, ep=2, etp=1),
    ParallelDims(world_size=32, tp=2, cp=2, pp=2, ep=4),
    ParallelDims(world_size=36, tp=3, cp=2, pp=2, ep=3, etp=2),
]


def _groups(dims: ParallelDims, axis: str) -> list[tuple[int, ...]]:
    return sorted({dims.members(axis, rank) for rank in range(dims.world_size)})


def _reference(generator: RankGenerator, token: str) -> list[tuple[int, ...]]:
    return sorted(tuple(group) for group in generator.get_ranks(token))


@pytest.mark.parametrize("dims", LAYOUTS, ids=str)
def test_dense_groups_are_megatrons(dims: ParallelDims) -> None:
    generator = RankGenerator(tp=dims.tp, ep=1, dp=dims.dp, pp=dims.pp, cp=dims.cp, order=ORDER)
    for token in ("tp", "cp", "dp", "pp", "dp-cp", "tp-cp", "tp-pp", "tp-dp-cp"):
        assert _groups(dims, token) == _reference(generator, token)


@pytest.mark.parametrize("dims", LAYOUTS, ids=str)
def test_expert_groups_are_megatrons(dims: ParallelDims) -> None:
    generator = RankGenerator(tp=dims.sizes["etp"], ep=dims.ep, dp=dims.edp, pp=dims.pp, cp=1, order=ORDER)
    for ours, theirs in (
        ("etp", "tp"),
        ("ep", "ep"),
        ("edp", "dp"),
        ("etp-ep", "tp-ep"),
        ("etp-ep-pp", "tp-ep-pp"),
    ):
        assert _groups(dims, ours) == _reference(generator, theirs)


def test_the_comparison_notices_another_order() -> None:
    dims = ParallelDims(world_size=8, tp=2, pp=2)
    generator = RankGenerator(tp=2, ep=1, dp=2, pp=2, cp=1, order="tp-pp-dp")
    assert _groups(dims, "dp") != _reference(generator, "dp")
