"""Every kind of tuner, and every optimizer, learns: the loss of a small task falls, from flags to updates."""

import json
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch

from mswift.config.optimizers import LIBRARIES, OptimizerName
from mswift.config.train import SftConfig, TunerType
from tests.support.parity import BASE, model_of
from tests.support.ranks import join, run_ranks
from tests.support.spaces import Arrays, MemoryReader, weights_of
from tests.support.xlora import make_loras

STEPS, ROWS, LENGTH, WORDS = 40, 4, 16, 8
SHARE = 0.5
"""Of the first loss that the last one may be."""
SHARES = {"prompt": 0.75, "ptuning": 0.75}
"""Of those whose few virtual tokens are all that is added to a model of random weights."""
MODEL = BASE | {
    "model_type": "llama", "vocab_size": 32, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 4,
}  # fmt: skip
TUNERS: dict[str, dict[str, Any]] = {
    **{kind: {"tuner_type": kind} for kind in get_args(TunerType)},
    "rslora": {"tuner_type": "lora", "use_rslora": True},
    "dora": {"tuner_type": "lora", "use_dora": True},
    "lora+": {"tuner_type": "lora", "lorap_lr_ratio": 4.0},
    "pissa": {"tuner_type": "lora", "init_weights": "pissa"},
    "olora": {"tuner_type": "lora", "init_weights": "olora"},
    "lisa": {"lisa_activated_layers": 1, "lisa_step_interval": 3},
    "neftune": {"neftune_noise_alpha": 5.0},
}
FIELDS: dict[str, dict[str, Any]] = {
    "vblora": {"vector_length": 16, "num_vectors": 20}, "oft": {"oft_block_size": 8}, "miss": {"r": 8},
    "xlora": {"use_trainable_adapters": True},
}  # fmt: skip
"""Of PEFT's configurations, for so small a model."""
OPTIMIZERS: dict[str, dict[str, Any]] = {
    **{name: {"optimizer": name} for name in get_args(OptimizerName)},
    "q_galore": {"optimizer": "galore", "galore_quantization": True},
}


def small_task() -> list[Any]:
    """Rows that count: the word behind n is n + 1, of eight."""
    from mswift.parallel.batch import Microbatch

    starts = torch.arange(ROWS)[:, None] * 2
    words = (starts + torch.arange(LENGTH + 1)[None]) % WORDS + 3
    return [Microbatch(words[:, :-1], words[:, 1:], torch.ones(ROWS, LENGTH))]


def losses(given: tuple[dict[str, Any], dict[str, Any], Arrays]) -> list[float]:
    """On a rank: the loss of every step of a run with these flags."""
    from mswift.train.engines import built_engine
    from mswift.tuners.llamapro import ExpandedReader

    flags, model, weights = given
    dims, device = join(1)
    config = SftConfig(model="m", backend="fsdp", train_iters=STEPS, **flags)
    reader: Any = MemoryReader(model, weights)
    if config.tuner_type == "llamapro":
        reader = ExpandedReader(reader, config.llamapro_num_new_blocks, None)
    with built_engine(config, reader, dims, device, STEPS, resumed=False) as engine:
        return [engine.train_step(small_task(), config.lr).loss for _ in range(STEPS)]


def falls(flags: dict[str, Any]) -> tuple[float, float]:
    """(first, last) loss."""
    model = model_of(MODEL)
    given = flags, model.config.to_dict(), {name: weight.copy() for name, weight in weights_of(model).items()}
    (found,) = run_ranks(1, losses, given)
    assert np.isfinite(found).all()
    return found[0], found[-1]


@pytest.mark.parametrize("name", TUNERS)
def test_every_tuner_learns(name: str, tmp_path: Path) -> None:
    own = {"lr": 2e-2, "weight_decay": 0.0, "llamapro_num_new_blocks": 2, "reft_rank": 4} | TUNERS[name]
    if name in FIELDS:
        own["tuner_config"] = json.dumps(FIELDS[name])
    if name == "xlora":
        own["xlora_adapters"] = tuple(make_loras(model_of(MODEL), tmp_path))
    first, last = falls(own)
    assert last < SHARES.get(name, SHARE) * first, (first, last)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "q_galore" else pytest.mark.whole) for name in OPTIMIZERS]
)
def test_every_optimizer_learns(name: str) -> None:
    if name in LIBRARIES:
        pytest.importorskip(LIBRARIES[name], reason="pip install 'mswift[optim]'")
    first, last = falls({"lr": 1e-2, "galore_rank": 4, "galore_update_proj_gap": 5} | OPTIMIZERS[name])
    assert last < SHARE * first, (first, last)


def test_at_no_rate_nothing_falls() -> None:
    first, last = falls({"lr": 0.0})
    assert last == first
