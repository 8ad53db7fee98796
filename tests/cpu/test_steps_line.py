"""What a start says of its steps."""

import re

import pytest

from mswift.config.train import SftConfig
from mswift.train.build import steps_line


@pytest.mark.parametrize(
    ("held", "packing", "text"),
    [
        (16, False, "2"),
        (0, False, "2"),  # a stream
        (
            3,
            True,
            r"2, 10.7 epochs: a step takes 16 packs and the data has 3, .*; --global_batch_size 3 \(or less\) would .*",
        ),
        (15, False, "2, 2.13 epochs: a step takes 16 samples and the data has 15, .*"),
    ],
)
def test_a_step_with_samples_more_than_once_is_told(held: int, packing: bool, text: str) -> None:
    config = SftConfig(model="m", dataset=("a",), train_iters=2, global_batch_size=16, packing=packing)
    line = steps_line(config, held, 2)
    assert re.fullmatch(text, line)
