"""docs/known-megatron-faults.md: the faults are there in the megatron-core that is installed, and mswift is without.

A fault that a newer megatron-core no longer has fails here, so that its mend goes. Faults that need a whole model are
shown by partner tests elsewhere, which that page names.
"""

from collections.abc import Mapping
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F

from tests.support.matrix import MODELS
from tests.support.ranks import join, run_ranks


def native_fused_cross_entropy(_payload: object) -> float:
    """How far megatron-core's fused gradient of fp32 logits is from torch's: max|a - b| / max|b|."""
    join(1)
    import torch.distributed as dist
    from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy

    torch.manual_seed(0)
    logits, labels = torch.randn(6, 2, 50), torch.randint(0, 50, (6, 2))
    ours, theirs = (logits.clone().requires_grad_() for _ in range(2))
    fused_vocab_parallel_cross_entropy(ours, labels, dist.group.WORLD).sum().backward()
    F.cross_entropy(theirs.flatten(0, 1), labels.flatten(), reduction="sum").backward()
    assert ours.grad is not None
    assert theirs.grad is not None
    return float((ours.grad - theirs.grad).abs().max() / theirs.grad.abs().max())


def test_the_native_fused_cross_entropy_rounds_fp32_gradients_to_bf16() -> None:
    assert run_ranks(1, native_fused_cross_entropy)[0] > 1e-4


def fusion_of_megatron(_payload: object) -> list[bool]:
    """Whether any --cross_entropy_loss_fusion of ours turns megatron-core's on."""
    dims, _ = join(1)
    from mswift.converters.plan import table_for
    from mswift.parallel.megatron.config import EngineConfig, transformer_config

    spec = table_for(dict(MODELS["dense"])).spec
    return [
        transformer_config(spec, dims, EngineConfig(loss_fusion=fusion)).cross_entropy_loss_fusion  # type: ignore[arg-type]
        for fusion in ("auto", "true", "false")
    ]


def test_it_is_never_used() -> None:
    assert run_ranks(1, fusion_of_megatron)[0] == [False, False, False]


def third_step(payload: Mapping[str, Any]) -> dict[str, Any]:
    """Weights after two steps of Adam, a reload of the state, and a third step; `reload` False: without it."""
    dims, device = join(1)
    from mswift.converters.plan import table_for
    from mswift.parallel.megatron.engine import EngineConfig, MegatronEngine, Microbatch
    from mswift.parallel.megatron.optimizer import ShardedOptimizer
    from mswift.train.proof_tensors import RandomWeights, assemble, gather
    from tests.support.spaces import read_array

    table = table_for(dict(MODELS["dense"]))
    engine = MegatronEngine(table, dims, EngineConfig(), device)
    engine.load_weights(RandomWeights(table, 0))  # type: ignore[arg-type]
    tokens = torch.randint(0, 103, (2, 9), generator=torch.Generator().manual_seed(1))
    batch = Microbatch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), torch.ones(2, 8))
    for _ in range(2):
        engine.train_step([batch], 1e-3)
    state = assemble([gather([*engine.model_shards(), *engine.optimizer_shards()])])
    make, shared = ShardedOptimizer.make_states, torch.tensor(2.0)

    def as_megatron_does(self: Any, parameter: torch.Tensor, step: int) -> None:
        make(self, parameter, step)
        self._of(parameter).optimizer.state[self.master(parameter)]["step"] = shared

    with patch.object(ShardedOptimizer, "make_states", as_megatron_does if payload["shared"] else make):
        if payload["reload"]:
            engine.load_state(lambda key, region, out: read_array(state[key], region, out), 2)
    engine.train_step([batch], 1e-3)
    result = assemble([gather(engine.model_shards())])
    engine.close()
    return result


def same_after_third_step(*, shared: bool) -> bool:
    """Whether a reload changes no bit of the next step."""
    runs = [run_ranks(1, third_step, {"reload": reload, "shared": shared})[0] for reload in (False, True)]
    return all(np.array_equal(runs[0][key], runs[1][key]) for key in runs[0])


def test_each_parameter_counts_its_own_steps_after_a_reload() -> None:
    assert same_after_third_step(shared=False)


def test_one_step_tensor_for_all_parameters_is_seen() -> None:
    assert not same_after_third_step(shared=True)
