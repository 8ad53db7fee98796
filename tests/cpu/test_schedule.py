"""The learning rate of every step equals megatron-core's own scheduler."""

from types import SimpleNamespace

import pytest
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from mswift.train.schedule import LearningRate

STYLES = [("cosine", "linear"), ("linear", "linear"), ("constant", "linear")]
STYLES += [("WSD", wsd) for wsd in ("linear", "cosine", "exponential", "minus_sqrt")]


@pytest.mark.parametrize(("style", "wsd_style"), STYLES)
@pytest.mark.parametrize("warmup", [0, 7])
def test_equals_megatron(style: str, wsd_style: str, warmup: int) -> None:
    group: dict = {"default_config": True}
    oracle = OptimizerParamScheduler(
        SimpleNamespace(param_groups=[group]), 0.0, 3e-3, 1e-4, warmup, 40, style, 0.0, 0.0, 0, "constant",
        wsd_decay_steps=12, lr_wsd_decay_style=wsd_style,
    )  # fmt: skip
    ours = LearningRate(3e-3, 1e-4, style, warmup, 40, 12, wsd_style)  # type: ignore[arg-type]
    for step in range(50):
        assert ours.at(step) == pytest.approx(group["lr"], rel=1e-12, abs=1e-18), step
        oracle.step(1)
