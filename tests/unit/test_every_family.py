"""Properties of every family in the catalog, found by name: a new family is covered by its entry in the registry."""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mswift.converters import families
from mswift.converters.arrays import Arrays, to_hf, to_megatron
from mswift.converters.catalog import family_names
from mswift.converters.layout import Region, tiling_fault
from mswift.converters.plan import ModelTable, table_for
from mswift.errors import ConfigError, LayoutError
from tests.support.family_configs import FAMILY_CONFIGS, family_config

MAX_LINES = 60


def test_every_family_has_a_tiny_model() -> None:
    assert sorted(FAMILY_CONFIGS) == family_names()


@pytest.mark.parametrize("family", family_names())
def test_a_family_is_a_small_file(family: str) -> None:
    source = Path(next(iter(families.__path__)), f"{family}.py").read_text()
    assert len(source.splitlines()) <= MAX_LINES
    assert source.startswith('"""')


@cache
def tables(family: str) -> list[ModelTable]:
    """The tiny model in every spelling of its family, and with the embedding tied and not, where that is a choice."""
    config = family_config(family)
    found = []
    for tied in (False, True):
        try:
            one = table_for(config | {"tie_word_embeddings": tied})
        except ConfigError as error:
            assert "tie_word_embeddings" in str(error)  # noqa: PT017 - the family has it one way only
            continue
        found += [ModelTable(one.config, one.family, one.spec, spelling) for spelling in one.family.spellings or ("",)]
    return found


def numbered(table: ModelTable) -> Arrays:
    """HF tensors in which no number occurs twice."""
    out, first = {}, 0
    for name, shape in table.hf.items():
        count = int(np.prod(shape))
        out[name] = np.arange(first, first + count, dtype=np.int64).reshape(shape)
        first += count
    return out


@pytest.mark.parametrize("family", family_names())
def test_every_element_moves_once_and_comes_back(family: str) -> None:
    for table in tables(family):
        table.prove_coverage()
        hf = numbered(table)
        megatron = to_megatron(hf, table)
        assert sum(a.size for a in megatron.values()) == sum(a.size for a in hf.values())
        assert len(np.unique(np.concatenate([a.ravel() for a in megatron.values()]))) == sum(
            a.size for a in hf.values()
        )
        back = to_hf(megatron, table)
        assert back.keys() == hf.keys()
        assert all(np.array_equal(back[name], hf[name]) for name in hf)


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("family", family_names())
def test_shards_of_all_ranks_tile_every_tensor(family: str, tp: int) -> None:
    for table in tables(family):
        table.check_tp(tp)
        for key, tensor in table.megatron.items():
            layers: Any = range(table.spec.num_layers) if tensor.stacked else (None,)
            experts: Any = range(table.sizes["experts"]) if tensor.rule.experts else (None,)
            ranks = range(tp if tensor.rule.cut else 1)
            boxes: list[Region] = [
                region
                for layer in layers
                for expert in experts
                for rank in ranks
                for region in table.shard(key, rank, tp, layer, expert)
            ]
            assert tiling_fault(boxes, tensor.shape) is None, key


@pytest.mark.parametrize("family", family_names())
def test_stored_chunks_tile_every_tensor(family: str) -> None:
    for table in tables(family):
        for key, tensor in table.megatron.items():
            assert tiling_fault(table.storage_regions(key), tensor.shape) is None, key


@pytest.mark.parametrize("family", family_names())
def test_a_size_that_does_not_divide_is_refused(family: str) -> None:
    for table in tables(family):
        with pytest.raises(LayoutError, match="--tensor_model_parallel_size 7"):
            table.check_tp(7)


@pytest.mark.parametrize("family", family_names())
def test_an_unknown_field_is_refused_by_name(family: str) -> None:
    with pytest.raises(ConfigError, match="field 'hidden_sizes' is not known"):
        table_for(family_config(family, hidden_sizes=3))


@pytest.mark.parametrize("family", family_names())
def test_unknown_rope_and_quantization_are_refused_by_name(family: str) -> None:
    with pytest.raises(ConfigError, match=r"'rope_scaling(.rope_type)?'"):
        table_for(family_config(family, rope_scaling={"rope_type": "ntk", "factor": 2.0}))
    with pytest.raises(ConfigError, match="'quantization_config'"):
        table_for(family_config(family, quantization_config={"bits": 4}))
