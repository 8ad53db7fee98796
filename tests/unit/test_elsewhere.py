"""Names that other programs have for mswift's flags: told as what they are here, also in a recipe."""

from pathlib import Path

import pytest

from mswift.cli.commands import COMMANDS, load
from mswift.cli.options import parse
from mswift.config.elsewhere import FLAGS, VALUES
from mswift.config.loader import read_recipe
from mswift.config.schema import find, options_of
from mswift.config.train import SftConfig
from mswift.errors import ConfigError


def test_what_a_name_is_here_parses() -> None:
    """Each remedy names flags of `mswift sft`, with values that they take; no name is a flag of sft itself."""
    options = options_of(SftConfig)
    for name, here in FLAGS.items():
        assert find(options, name) is None, name
        words = here.replace(",", " ").split(" (")[0].split()
        assert all(find(options, word[2:]) for word in words if word.startswith("--")), here
    for (option, value), here in VALUES.items():
        words = here.split(",")[0].split()
        values = {"--freeze_parameters": ["model.layers.0."]}
        parse(SftConfig, ["--model", "m", *(w for word in words for w in (word, *values.get(word, [])))])
        with pytest.raises(ConfigError, match=f"--{option} {value}: it takes .*; here that is --{here[2:]}"):
            parse(SftConfig, ["--model", "m", f"--{option}", value])


def test_a_flag_that_the_command_has_not_is_not_named() -> None:
    infer = load(COMMANDS["infer"].config)
    with pytest.raises(ConfigError) as error:
        parse(infer, ["--model", "m", "--warmup_ratio", "0.1"])
    assert "--lr_warmup_iters" not in str(error.value)


def test_a_recipe_of_another_program(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: m\nlr_scheduler_type: cosine\n")
    with pytest.raises(ConfigError, match="line 2: unknown key lr_scheduler_type; here that is --lr_decay_style"):
        read_recipe(recipe, SftConfig)
