"""Configurations as files: what is written comes back equal, what is wrong is named with its line."""

from pathlib import Path
from typing import Any, get_args, get_origin

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mswift.cli.options import parse
from mswift.config.loader import dump, from_dict, load, read_recipe, to_arguments, to_dict
from mswift.config.schema import NONE_SPELLINGS, options_of
from mswift.config.train import SftConfig
from mswift.errors import ConfigError

_texts = st.text(st.characters(exclude_categories=["Cs", "Cc"])).filter(lambda s: s.lower() not in NONE_SPELLINGS)


def _values(kind: Any) -> st.SearchStrategy[Any]:
    if get_origin(kind) is tuple:
        return st.lists(_values(get_args(kind)[0]).filter(lambda s: not str(s).startswith("-")), max_size=3).map(tuple)
    if get_args(kind):
        members = [st.just(arg) if not isinstance(arg, type) else _values(arg) for arg in get_args(kind)]
        return st.one_of(members)
    return {
        int: st.integers(-(10**6), 10**6),
        float: st.floats(allow_nan=False, allow_infinity=False),
        bool: st.booleans(),
        str: _texts,
        type(None): st.none(),
    }.get(kind, st.nothing())


def _union(kind: Any) -> st.SearchStrategy[Any]:
    members = get_args(kind) if get_origin(kind) not in (tuple, None) else ()
    nested = [_values(member) for member in members if get_args(member) or isinstance(member, type)]
    return st.one_of(nested) if nested else _values(kind)


_FIELDS = st.fixed_dictionaries(
    {},
    optional={
        "bucket_size": st.one_of(st.none(), st.integers()),
        "check_for_nan_in_grad": st.booleans(),
        "config_logger_dir": _texts,
        "cuda_graph_scope": st.lists(st.sampled_from(["attn", "mlp", "moe"]), min_size=2),
    },
)
_CONFIGS = st.fixed_dictionaries(
    {name: _FIELDS if option.holds_fields else _union(option.kind) for name, option in options_of(SftConfig).items()}
)


@given(_CONFIGS)
def test_a_configuration_survives_yaml_and_the_command_line(values: dict[str, Any]) -> None:
    config = SftConfig(**values)
    assert from_dict(SftConfig, to_dict(config)) == config
    assert load(SftConfig, dump(config)) == config
    assert parse(SftConfig, to_arguments(config)) == config


def test_a_dump_is_a_recipe(tmp_path: Path) -> None:
    config = SftConfig(model="m", dataset=("a#3", "b"), lr=1e-7, system="no", train_iters=3, sequence_parallel=True)
    recipe = tmp_path / "run.yaml"
    recipe.write_text(dump(config))
    assert parse(SftConfig, [str(recipe)]) == config


RECIPES = {
    "lora_rnk: 8": "line 1: unknown key lora_rnk; did you mean lora_rank?",
    "model: m\nlr: 1\nlearning_rate: 2": "line 3: learning_rate is given twice",
    "model: m\nmodel: n": "line 2: model is given twice",
    "model: {a: b}": "line 1: model must be one value or a list of values",
    "model: !!python/object/apply:os.system [ls]": "must be",
    "model: !!python/name:os.system x": "must be",
    "- model": "must be a mapping",
    "model: [": "is not YAML",
}


@pytest.mark.parametrize(("text", "message"), RECIPES.items())
def test_a_wrong_recipe_is_refused_with_its_line(text: str, message: str, tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(text)
    with pytest.raises(ConfigError) as refusal:
        read_recipe(recipe, SftConfig)
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_recipe_values_are_read_as_written(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("lr: 1e-4\nsystem: '010'\ntrain_iters: ~\ndataset:\n  - 2024-01-01\n  - a#3\n")
    expected = {"lr": ["1e-4"], "system": ["010"], "train_iters": ["none"], "dataset": ["2024-01-01", "a#3"]}
    assert read_recipe(recipe, SftConfig) == expected
    recipe.write_text("")
    assert read_recipe(recipe, SftConfig) == {}
    with pytest.raises(ConfigError, match="cannot be read"):
        read_recipe(tmp_path / "absent.yaml", SftConfig)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": "m", "lorarank": 8}, "no lorarank; did you mean lora_rank"),
        ({}, "needs model"),
        ({"model": 3}, "model is 3; it takes text"),
        ({"model": "m", "lora_rank": "8"}, "lora_rank is '8'; it takes a whole number"),
        ({"model": "m", "lora_rank": True}, "lora_rank is True"),
        ({"model": "m", "tuner_type": "x"}, "takes full or lora or longlora"),
        ({"model": "m", "dataset": "a"}, "dataset is 'a'"),
        ({"model": "m", "dataset": [1]}, "dataset is"),
    ],
)
def test_a_saved_configuration_is_read_strictly(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_dict(SftConfig, values)
