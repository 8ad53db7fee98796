"""What training does not compute is refused by the name of the feature, before a model is built."""

from dataclasses import replace
from typing import Any

import pytest

from mswift.converters.plan import table_for
from mswift.converters.spec import ModelSpec
from mswift.errors import ConfigError
from tests.support.family_configs import family_config


def check(spec: ModelSpec) -> None:
    from mswift.parallel import device

    device.prepare("cpu")
    from mswift.parallel.megatron.spec import check_computed

    check_computed(spec)


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("starcoder2", {"residual_dropout": 0.1}, "dropout 0.1 yet; .*trained without dropout once its config.json says 0"),
    ("granite", {"attention_dropout": 0.1}, "model_type 'granite': training does not compute dropout 0.1"),
]


@pytest.mark.parametrize(("family", "changes", "message"), REFUSED)
def test_a_published_feature_that_is_not_computed(family: str, changes: dict[str, Any], message: str) -> None:
    check(table_for(family_config(family)).spec)
    with pytest.raises(ConfigError, match=message):
        check(table_for(family_config(family, **changes)).spec)


def test_an_activation_that_is_not_computed() -> None:
    spec = table_for(family_config("llama")).spec
    with pytest.raises(ConfigError, match="activation 'silu' without a gate yet; the model can be converted"):
        check(replace(spec, gated=False))
