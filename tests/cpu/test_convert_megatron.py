"""Converted directories under megatron-core's own eyes: its GPTModel loads them at TP, PP and VPP, and what it saves
itself converts to Hugging Face files. Its local layer spec, nothing of mswift's model code.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mswift.converters.catalog import read_config
from mswift.converters.engine import convert
from mswift.converters.io.torch_dist_reader import TorchDistSource
from mswift.converters.verify import verify
from tests.support.checkpoints import Array, megatron_tensors, random_model, read_model, same, tiny_config
from tests.support.ranks import join, leaving_groups, run_ranks
from tests.support.shared import shared_file

LAYOUTS: dict[str, tuple[int, dict[str, int]]] = {"tp1": (1, {}), "tp2": (2, {"tp": 2}), "pp2": (2, {"pp": 2})}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-untied": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-odd-vocabulary": ("llama", {"vocab_size": 1003}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"tie_word_embeddings": True}),
}


def core_model(config: dict[str, Any], world_size: int, layout: dict[str, int], chunk: int = 0) -> Any:
    """megatron-core's GPTModel on this rank (one of its model chunks), random weights."""
    dims, _ = join(world_size, **layout)
    import torch
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_config import TransformerConfig

    from mswift.parallel.megatron import world

    world.enter(dims, 1)
    stage = dims.coordinate(torch.distributed.get_rank()).pp
    kind = config["model_type"]
    core = TransformerConfig(
        num_layers=config["num_hidden_layers"], hidden_size=config["hidden_size"],
        num_attention_heads=config["num_attention_heads"], num_query_groups=config["num_key_value_heads"],
        kv_channels=config["head_dim"], ffn_hidden_size=config["intermediate_size"], normalization="RMSNorm",
        gated_linear_unit=True, activation_func=torch.nn.functional.silu, add_bias_linear=False,
        add_qkv_bias=kind == "qwen2", qk_layernorm=kind == "qwen3", params_dtype=torch.float32,
        pipeline_dtype=torch.float32, tensor_model_parallel_size=dims.tp, pipeline_model_parallel_size=dims.pp,
        virtual_pipeline_model_parallel_size=dims.vpp, overlap_p2p_comm=dims.chunks > 1,
        batch_p2p_comm=dims.chunks == 1, use_cpu_initialization=True, gradient_accumulation_fusion=False,
        persist_layer_norm=False, apply_rope_fusion=False,
    )  # fmt: skip
    spec = get_gpt_layer_local_spec(qk_layernorm=kind == "qwen3", normalization="RMSNorm")
    return GPTModel(
        core, spec, vocab_size=-(-config["vocab_size"] // dims.tp) * dims.tp, max_sequence_length=64,
        pre_process=(stage, chunk) == (0, 0), post_process=(stage, chunk) == (dims.pp - 1, dims.chunks - 1),
        position_embedding_type="rope", vp_stage=chunk if dims.chunks > 1 else None,
        share_embeddings_and_output_weights=bool(config.get("tie_word_embeddings")),
    )  # fmt: skip


@leaving_groups
def load_on_rank(payload: tuple[str, dict[str, Any], int, dict[str, int], str]) -> dict[str, Any]:
    """Local tensors by (key, global offset) after dist_checkpointing.load with that strictness."""
    path, config, world_size, layout, strict = payload
    return load_into(core_model(config, world_size, layout), path, strict)


@leaving_groups
def load_chunks_on_rank(payload: tuple[str, dict[str, Any], int, dict[str, int]]) -> list[dict[str, Any]]:
    """The same for each model chunk of an interleaved pipeline."""
    path, config, world_size, layout = payload
    return load_all([core_model(config, world_size, layout, chunk) for chunk in range(layout["vpp"])], path)


def load_into(model: Any, path: str, strict: str) -> dict[str, Any]:
    """The same for a model of megatron-core that is there."""
    return load_all([model], path, strict)[0]


def load_all(chunks: list[Any], path: str, strict: str = "assume_ok_unexpected") -> list[dict[str, Any]]:
    """The same for each of several model chunks, in one load."""
    import torch
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    with torch.no_grad():
        for parameter in (parameter for chunk in chunks for parameter in chunk.parameters()):
            parameter.fill_(float("nan"))
    states = {f"model{number}": chunk.sharded_state_dict() for number, chunk in enumerate(chunks)}
    loaded = dist_checkpointing.load(states, path, strict=strict)
    results = []
    for number, chunk in enumerate(chunks):
        missing = chunk.load_state_dict(loaded[f"model{number}"], strict=True)
        result: dict[str, Any] = {"keys": (missing.missing_keys, missing.unexpected_keys)}
        for entry in chunk.sharded_state_dict().values():
            for part in entry.build() if isinstance(entry, ShardedTensorFactory) else [entry]:
                if isinstance(part, ShardedTensor):
                    assert part.data is not None
                    result[part.key, part.global_offset] = (part.data.detach().numpy().copy(), part.prepend_axis_num)
        results.append(result)
    return results


@leaving_groups
def save_on_rank(payload: tuple[str, dict[str, Any], int, dict[str, int]]) -> None:
    """Loads a converted directory, then saves it again by megatron-core."""
    path, config, world_size, layout = payload
    model = core_model(config, world_size, layout)
    from megatron.core import dist_checkpointing

    model.load_state_dict(dist_checkpointing.load(model.sharded_state_dict(), path + "/m"))
    dist_checkpointing.save(model.sharded_state_dict(), path + "/core")


def assert_loaded(ranks: list[dict[str, Any]], expected: dict[str, Array]) -> None:
    """Every rank holds the oracle's bits at its offsets, and all ranks together every real element."""
    seen = {key: np.zeros(array.shape, bool) for key, array in expected.items()}
    for rank in ranks:
        assert rank.pop("keys") == ([], [])
        for (key, offset), (local, prepended) in rank.items():
            array = expected[key]
            sizes = (1,) * prepended + local.shape
            index = tuple(slice(o, min(o + s, n)) for o, s, n in zip(offset, sizes, array.shape, strict=True))
            want = array[index]
            got = local.reshape(sizes)[tuple(slice(0, n) for n in want.shape)].view(np.uint32)
            assert (got == want).all(), (key, offset)
            seen[key][index] = True
    assert all(array.all() for array in seen.values())


@pytest.mark.parametrize(
    ("model", "layout"),
    [*((model, "tp2") for model in MODELS), ("llama-untied", "tp1"), ("llama-tied", "pp2"), ("qwen3", "pp2")],
)
def test_megatron_core_loads_it_at_any_layout(model: str, layout: str, tmp_path: Path) -> None:
    family, changes = MODELS[model]
    changes = {"num_hidden_layers": 2, **changes}
    tensors = random_model(tmp_path / "hf", family, "F32", **changes)
    convert(tmp_path / "hf", tmp_path / "m", "megatron")
    config, (world_size, degrees) = tiny_config(family, **changes), LAYOUTS[layout]
    payload = (str(tmp_path / "m"), config, world_size, degrees, "assume_ok_unexpected")
    assert_loaded(run_ranks(world_size, load_on_rank, payload), megatron_tensors(config, tensors))


@pytest.mark.parametrize("model", ["llama-untied", "llama-tied"])
def test_megatron_core_loads_it_in_an_interleaved_pipeline(model: str, tmp_path: Path) -> None:
    family, changes = MODELS[model]
    changes = {"num_hidden_layers": 4, **changes}
    tensors = random_model(tmp_path / "hf", family, "F32", **changes)
    convert(tmp_path / "hf", tmp_path / "m", "megatron")
    config = tiny_config(family, **changes)
    ranks = run_ranks(2, load_chunks_on_rank, (str(tmp_path / "m"), config, 2, {"pp": 2, "vpp": 2}))
    assert_loaded([chunk for rank in ranks for chunk in rank], megatron_tensors(config, tensors))


@pytest.mark.parametrize("model", ["llama-untied", "qwen3"])
def test_nothing_is_missing_or_superfluous(model: str, tmp_path: Path) -> None:
    """With strict=raise_all, megatron-core refuses any key too many or too few."""
    family, changes = MODELS[model]
    tensors = random_model(tmp_path / "hf", family, "F32", **changes)
    convert(tmp_path / "hf", tmp_path / "m", "megatron")
    config = tiny_config(family, **changes)
    payload = (str(tmp_path / "m"), config, 1, {}, "raise_all")
    assert_loaded(run_ranks(1, load_on_rank, payload), megatron_tensors(config, tensors))


def test_real_weights_load_at_tp2(tmp_path: Path) -> None:
    source = shared_file("data/weights/stories260K-hf")
    convert(source, tmp_path / "m", "megatron")
    config, tensors = read_config(source), read_model(source)
    payload = (str(tmp_path / "m"), config, 2, {"tp": 2}, "assume_ok_unexpected")
    assert_loaded(run_ranks(2, load_on_rank, payload), megatron_tensors(config, tensors))


@pytest.mark.parametrize("layout", ["tp2", "pp2"])
def test_what_megatron_core_saves_converts_to_hf(layout: str, tmp_path: Path) -> None:
    changes = {"num_hidden_layers": 2, "vocab_size": 104}
    tensors = random_model(tmp_path / "hf", "qwen3", "F32", **changes)
    convert(tmp_path / "hf", tmp_path / "m", "megatron")
    (tmp_path / "core").mkdir()
    world_size, degrees = LAYOUTS[layout]
    run_ranks(world_size, save_on_rank, (str(tmp_path), tiny_config("qwen3", **changes), world_size, degrees))
    (tmp_path / "m" / "hf").rename(tmp_path / "core" / "hf")
    assert TorchDistSource(tmp_path / "core").tensors.keys() == TorchDistSource(tmp_path / "m").tensors.keys()
    convert(tmp_path / "core", tmp_path / "back", "hf")
    assert same(read_model(tmp_path / "back"), tensors)
    assert verify(tmp_path / "core", tmp_path / "hf").equal
