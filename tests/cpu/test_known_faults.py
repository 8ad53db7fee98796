"""docs/known-megatron-faults.md: the faults are there in the megatron-core that is installed, and mswift is without.

A fault that a newer megatron-core no longer has fails here, so that its mend goes. Faults that need a whole model are
shown by partner tests elsewhere, which that page names.
"""

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F

from tests.support.matrix import MODELS
from tests.support.ranks import join, leaving_groups, run_ranks


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


def test_a_bias_beside_a_frozen_weight_gets_no_gradient() -> None:
    """By its source, since the function is replaced in every process that prepared a device."""
    found = find_spec("megatron.core")
    assert found is not None
    assert found.origin is not None
    source = (Path(found.origin).parent / "tensor_parallel" / "layers.py").read_text()
    backward = source.partition("class LinearWithFrozenWeight")[2].partition("\ndef ")[0]
    assert "bias is not None" in backward
    assert "return grad_input, None, None, None, None" in backward


@leaving_groups
def prediction_layers(_payload: object) -> dict[str, Any]:
    """What megatron-core's own code of multi-token prediction does, on the model that mswift builds."""
    join(1)
    import warnings

    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionLayer

    model = predicting_model()
    layer, config = model.mtp.layers[0], model.config
    tokens, states = torch.zeros((1, 8), dtype=torch.int64), torch.zeros((8, 1, config.hidden_size))
    rest = dict.fromkeys(("input_ids", "position_ids", "rotary_pos_emb", "rotary_pos_cos", "rotary_pos_sin"))
    found: dict[str, Any] = {
        "logits": error_of(lambda: GPTModel._postprocess(model, torch.cat((states, states)), labels=None, **rest)),
        "positions": error_of(
            lambda: MultiTokenPredictionLayer._get_embeddings(layer, tokens, None, model.embedding, states)
        ),
    }
    calls: list[int] = []

    def double(hidden_states: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return hidden_states * 2

    config.recompute_granularity, config.recompute_method, config.recompute_num_layers = "full", "uniform", 2
    found["uniform"] = error_of(lambda: layer._checkpointed_forward(double, hidden_states=states))
    config.recompute_method, config.recompute_num_layers = "block", 1
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        layer._checkpointed_forward(double, hidden_states=states.requires_grad_()).sum().backward()
    return found | {"block": [str(each.message) for each in said], "computed": len(calls)}


def predicting_model() -> Any:
    """A tied model with a multi-token-prediction layer, of a stage that is the last and not the first."""
    from megatron.core.models.gpt import GPTModel

    from mswift.converters.plan import table_for
    from mswift.parallel.megatron import world
    from mswift.parallel.megatron.config import EngineConfig, transformer_config
    from mswift.parallel.megatron.prediction import prediction_spec
    from mswift.parallel.megatron.spec import block_spec, rotary_tables
    from mswift.topology import ParallelDims

    world.enter(ParallelDims(), 0)
    spec = table_for(MODELS["mtp"] | {"tie_word_embeddings": True}).spec
    config = transformer_config(spec, ParallelDims(), EngineConfig(mtp_num_layers=1))
    rotary = rotary_tables(spec, torch.device("cpu"))
    return GPTModel(
        config,
        block_spec(spec, range(spec.num_layers), rotary, config),
        vocab_size=spec.vocab_size,
        max_sequence_length=64,
        pre_process=False,
        share_embeddings_and_output_weights=True,
        position_embedding_type="none",
        mtp_block_spec=prediction_spec(spec, rotary, config),
    )


def error_of(work: Callable[[], object]) -> str:
    """The message of what it raises, or ""."""
    try:
        work()
    except Exception as error:
        return str(error)
    return ""


def test_prediction_layers_need_labels_and_positions_and_are_not_recomputed_in_blocks() -> None:
    found = run_ranks(1, prediction_layers)[0]
    assert "'NoneType' object has no attribute 'clone'" in found["logits"]
    assert "roll()" in found["positions"]
    assert "recompute_num_layers must be 1" in found["uniform"]
    assert "'block' is not supported for MTP" in found["block"][0]
    assert found["computed"] == 1


@leaving_groups
def two_copies(_payload: object) -> tuple[bool, bool]:
    """(is there a weight of the output layer beside the embedding that is used in its place, does it learn)."""
    join(1)
    from megatron.core.models.gpt import GPTModel

    model = predicting_model()
    for parameter in model.parameters():
        parameter.data.normal_()
    model.compute_language_model_loss = lambda labels, logits: logits.square().sum(-1).t()  # any that depends on them
    states, tokens = torch.randn((16, 1, model.config.hidden_size)), torch.zeros((1, 8), dtype=torch.int64)
    rest = dict.fromkeys(("input_ids", "position_ids", "rotary_pos_emb", "rotary_pos_cos", "rotary_pos_sin"))
    GPTModel._postprocess(model, states, labels=tokens, **rest).sum().backward()
    learned = model.embedding.word_embeddings.weight.grad
    assert learned is not None
    assert learned.abs().max() > 0
    return model.output_layer.weight is not None, model.output_layer.weight.grad is not None


def test_a_tied_last_stage_that_predicts_has_an_output_weight_which_nothing_uses() -> None:
    assert run_ranks(1, two_copies)[0] == (True, False)
