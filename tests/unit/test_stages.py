"""Cuts of a pipeline: every layer lies on exactly one chunk, in order; a cut that fails says what would do."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mswift.errors import LayoutError
from mswift.stages import Cut, cut_layers, describe_cut
from mswift.topology import ParallelDims


@given(st.integers(2, 5), st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(1, 4))
def test_uneven_ends_share_the_rest(pp: int, vpp: int, depth: int, first: int, last: int) -> None:
    """In units of VPP layers, as each stage is cut in VPP equal chunks."""
    num_layers = vpp * (first + last + depth * (pp - 2))
    chunks = cut_layers(num_layers, Cut(pp, vpp=vpp, first=first * vpp, last=last * vpp))
    assert chunks == (first, *(depth,) * (pp - 2), last) * vpp
    dims = ParallelDims(pp, pp=pp, vpp=vpp, chunk_layers=chunks)
    order = [(chunk, stage) for chunk in range(vpp) for stage in range(pp)]
    layers = [layer for chunk, stage in order for layer in dims.stage_layers(num_layers, stage, chunk)]
    assert layers == list(range(num_layers))
    held = [layer for stage in range(pp) for layer in dims.held_layers(num_layers, stage)]
    assert sorted(held) == layers


def test_the_flags_that_mean_one_cut_agree() -> None:
    assert cut_layers(8, Cut(2, vpp=2)) == cut_layers(8, Cut(2, layers_per_chunk=2)) == (2, 2, 2, 2)
    assert cut_layers(8, Cut(2, layout="Ett|tt|tt|ttL")) == (2, 2, 2, 2)
    assert cut_layers(7, Cut(3, first=1, last=2)) == cut_layers(7, Cut(3, layout="Et|t*4,|ttL")) == (1, 4, 2)
    assert cut_layers(4, Cut(2, layout="E|(tt|)*2L")) == (0, 2, 2, 0)
    assert cut_layers(5, Cut(2, last=1)) == (4, 1)


@pytest.mark.parametrize(
    ("num_layers", "cut", "words"),
    [
        (8, {"vpp": 3}, "--virtual_pipeline_model_parallel_size 3 does not divide the 4 layers"),
        (8, {"vpp": 0}, "--virtual_pipeline_model_parallel_size 0 must be at least 1"),
        (8, {"vpp": 2, "pp": 1}, "--pipeline_model_parallel_size is 1"),
        (8, {"layers_per_chunk": 3}, "does not divide the 4 layers of each of the 2 stages: it can be 1, 2, 4"),
        (8, {"layers_per_chunk": 2, "vpp": 2}, "do not go together"),
        (8, {"layers_per_chunk": 2, "first": 2}, "do not go together"),
        (8, {"first": 8}, "leave 0 of the model's 8 layers"),
        (8, {"first": 2, "last": 3}, "leave 3 of the model's 8 layers, which no other stage can take"),
        (8, {"first": 2, "pp": 4}, None),
        (
            8,
            {"first": 3, "pp": 4},
            "leave 5 .* 3 other stages cannot share equally: use numbers that leave a multiple of 3",
        ),
        (8, {"first": 5, "vpp": 2}, "does not divide the stages of 5 3 layers"),
        (8, {"layout": "Et*4|t*4L", "first": 3}, "leave out --decoder_first_pipeline_num_layers 3"),
        (8, {"layout": "Et*4|t*3L"}, "has 7 decoder layers .t., the model 8"),
        (8, {"layout": "t*4|t*4L"}, "begins with the one E"),
        (8, {"layout": "Et*4|t*4LE"}, "ends with the one L"),
        (8, {"layout": "Et*4|t*4"}, "ends with the one L"),
        (8, {"layout": "Et*4|t*4mL"}, "m is a multi-token-prediction layer"),
        (8, {"layout": "Ex*4|t*4L"}, "'x' is no part of a model"),
        (8, {"layout": "Et*4|t*2|ttL"}, "has 3 chunks, which --pipeline_model_parallel_size 2 does not divide"),
        (8, {"layout": "Et*4|t*4L", "vpp": 2}, "leave --virtual_pipeline_model_parallel_size out"),
        (8, {"layout": "Et*4||tt|ttL"}, "chunk 1 is empty"),
        (8, {"layout": "E(t*99999)*99999|L"}, "letters long"),
    ],
)
def test_a_cut_that_fails_says_why(num_layers: int, cut: dict[str, Any], words: str | None) -> None:
    if words is None:
        assert sum(cut_layers(num_layers, Cut(**{"pp": 2} | cut))) == num_layers
        return
    with pytest.raises(LayoutError, match=words):
        cut_layers(num_layers, Cut(**{"pp": 2} | cut))


def test_what_a_stage_holds_is_said() -> None:
    assert describe_cut((0, 2, 1, 1), 2) == ["embedding | layer 2", "layers 0-1 | layer 3, final norm and logits"]
