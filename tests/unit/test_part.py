"""Which parameters a part of the model is: by share, by name, by expression; what means nothing is refused."""

from typing import Any

import pytest

from mswift.errors import ConfigError
from mswift.tuners.part import Part

SIZES = {
    "embed.weight": 40,
    "layers.0.a.weight": 20,
    "layers.0.b.weight": 20,
    "layers.1.a.weight": 15,
    "head.weight": 5,
}


@pytest.mark.parametrize(
    ("part", "frozen"),
    [
        ({}, 0), ({"ratio": 0.39}, 0), ({"ratio": 0.4}, 1), ({"ratio": 0.79}, 2), ({"ratio": 0.999}, 4),
        ({"freeze": ("layers.0",)}, 2), ({"freeze_regex": r"a\.weight$"}, 2),
        ({"ratio": 0.8, "trainable": ("embed",)}, 2),
        ({"ratio": 0.8, "trainable_regex": r"\.b\."}, 2), ({"freeze": ("head",), "ratio": 0.4}, 2),
    ],
)  # fmt: skip
def test_frozen(part: dict[str, Any], frozen: int) -> None:
    assert len(Part(**part).frozen(SIZES)) == frozen


@pytest.mark.parametrize(
    ("part", "text"),
    [
        ({"freeze": ("layer.0",)}, "--freeze_parameters layer.0: no parameter's name begins so; near: .*layers.0.a"),
        ({"trainable": ("x",)}, "--trainable_parameters x: no parameter"),
        ({"freeze_regex": "("}, r"--freeze_parameters_regex \(: no regular expression"),
        ({"trainable_regex": "zzz"}, "--trainable_parameters_regex zzz: matches no parameter; the first one is embed"),
        ({"freeze": ("",)}, "nothing is left to train"),
    ],
)
def test_refused(part: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        Part(**part).frozen(SIZES)
