"""Converted Mamba-2, Nemotron-H and Qwen3-Next models under megatron-core's own eyes: its MambaModel, and its GPTModel
with gated delta nets, load them at TP1, TP2 and PP2 (weights only: their kernels need Triton and a GPU).
"""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock, patch

import numpy as np
import pytest

from mswift.converters.engine import convert
from mswift.converters.plan import table_for
from tests.cpu import test_convert_megatron_moe as of_moe
from tests.cpu.test_convert_megatron import assert_loaded, load_into
from tests.support.checkpoints import read_model, same, write_model
from tests.support.family_configs import family_config
from tests.support.ranks import join, leaving_groups, run_ranks
from tests.support.spaces import to_megatron
from tests.unit.test_families_ssm import random_bits

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {"tp1": (1, {}), "tp2": (2, {"tp": 2}), "pp2": (2, {"pp": 2})}
EVEN: dict[str, dict[str, Any]] = {  # a number of layers that two stages can share
    "mamba2": {"num_hidden_layers": 2},
    "nemotron_h": {"num_hidden_layers": 4, "hybrid_override_pattern": "M-*E"},
    "qwen3_next": {},
}


def layers_of(config: dict[str, Any]) -> str:
    """In the letters of megatron-core's hybrid pattern; "" for a GPTModel."""
    letters = config.get("hybrid_override_pattern", "M" * config["num_hidden_layers"])
    return "" if config["model_type"] == "qwen3_next" else letters


def core_config(config: dict[str, Any], dims: Any, **values: Any) -> Any:
    """megatron-core's config of the tiny model."""
    import torch
    from megatron.core.transformer.transformer_config import TransformerConfig

    spec = table_for(config).spec
    if spec.mamba is not None:
        m = spec.mamba
        values |= {"mamba_num_heads": m.num_heads, "mamba_head_dim": m.head_dim, "mamba_state_dim": m.state_size}
        values |= {"mamba_num_groups": m.num_groups, "is_hybrid_model": True}
    if spec.delta is not None:
        d = spec.delta
        values |= {"linear_num_key_heads": d.num_key_heads, "linear_num_value_heads": d.num_value_heads}
        values |= {"linear_key_head_dim": d.key_head_dim, "linear_value_head_dim": d.value_head_dim}
        values |= {"linear_conv_kernel_dim": d.conv_kernel, "linear_attention_freq": 4, "attention_output_gate": True}
        values |= {"experimental_attention_variant": "gated_delta_net", "moe_layer_freq": [1, 0, 1, 1]}
        values |= {"moe_shared_expert_gate": True}
    if spec.moe is not None:
        values |= {"num_moe_experts": spec.moe.num_experts, "moe_router_topk": spec.moe.top_k}
        values |= {"moe_ffn_hidden_size": spec.moe.ffn_hidden_size, "moe_router_load_balancing_type": "none"}
        values |= {"moe_shared_expert_intermediate_size": spec.moe.shared_ffn_hidden_size}
        values |= {"moe_router_enable_expert_bias": spec.moe.correction_bias, "moe_router_score_function": "sigmoid"}
    return TransformerConfig(
        num_layers=spec.num_layers, hidden_size=spec.hidden_size, num_attention_heads=spec.num_attention_heads,
        num_query_groups=spec.num_kv_heads, kv_channels=spec.head_dim, ffn_hidden_size=spec.ffn_hidden_size,
        normalization="RMSNorm", gated_linear_unit=spec.gated, activation_func=torch.nn.functional.silu,
        add_bias_linear=False, qk_layernorm=spec.qk_norm == "head", params_dtype=torch.float32,
        pipeline_dtype=torch.float32, tensor_model_parallel_size=dims.tp, pipeline_model_parallel_size=dims.pp,
        use_cpu_initialization=True, gradient_accumulation_fusion=False, persist_layer_norm=False, **values,
    )  # fmt: skip


def kernels() -> dict[str, Any]:
    """Modules that megatron-core's mixers import for their kernels, empty; the gated norm has its weight."""
    import torch

    class GatedNorm(torch.nn.Module):
        def __init__(self, width: int, **_: Any) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.empty(width))

    norm, scan = ModuleType("layernorm_gated"), MagicMock()
    norm.RMSNorm = GatedNorm  # type: ignore[attr-defined]
    names = ("triton", "triton.language", "mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.triton")
    triton = "mamba_ssm.ops.triton."
    return {name: MagicMock() for name in names} | {
        triton + "layernorm_gated": norm,
        triton + "ssd_combined": scan,
        triton + "selective_state_update": scan,
    }


def layer_specs(config: Any) -> dict[str, Any]:
    """One of megatron-core's layers a letter (D: gated delta net), norms inside the linears as in its TE specs."""
    import torch
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
    from megatron.core.ssm.gated_delta_net import GatedDeltaNet, GatedDeltaNetSubmodules
    from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
    from megatron.core.ssm.mamba_mixer import MambaMixer, MambaMixerSubmodules
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.identity_op import IdentityOp
    from megatron.core.transformer.mlp import MLP, MLPSubmodules
    from megatron.core.transformer.spec_utils import ModuleSpec

    from mswift.parallel.norms import RMSNorm

    class NormAndLinear(ColumnParallelLinear):
        """The parameters of TELayerNormColumnParallelLinear."""

        def __init__(self, input_size: int, *args: Any, **kwargs: Any) -> None:
            super().__init__(input_size, *args, **kwargs)
            self.layer_norm_weight = torch.nn.Parameter(torch.empty(input_size))

    qk_norm = RMSNorm if config.qk_layernorm else None
    attention = SelfAttentionSubmodules(NormAndLinear, IdentityOp, RowParallelLinear, qk_norm, qk_norm)
    mamba = ModuleSpec(MambaMixer, submodules=MambaMixerSubmodules(NormAndLinear, RowParallelLinear))
    experts = get_moe_module_spec(False, config.num_moe_experts or 2, moe_grouped_gemm=False)
    return {
        "M": ModuleSpec(MambaLayer, submodules=MambaLayerSubmodules(mixer=mamba)),
        "*": {"self_attention": ModuleSpec(SelfAttention, {"attn_mask_type": AttnMaskType.causal}, attention)},
        "D": {"self_attention": ModuleSpec(
            GatedDeltaNet, submodules=GatedDeltaNetSubmodules(NormAndLinear, RMSNorm, RowParallelLinear)
        )},
        "-": {"mlp": ModuleSpec(MLP, submodules=MLPSubmodules(NormAndLinear, linear_fc2=RowParallelLinear))},
        "E": {"pre_mlp_layernorm": RMSNorm, "mlp": experts},
    }  # fmt: skip


def core_model(config: dict[str, Any], world_size: int, layout: dict[str, Any]) -> Any:
    """megatron-core's model on this rank, weights not set. layout: degrees, and whether it has a prediction layer."""
    degrees = dict(layout)
    prediction = degrees.pop("prediction", False)
    dims, _ = join(world_size, **degrees)
    from mswift.parallel.megatron import world

    world.enter(dims, 1)
    fakes = {name: module for name, module in kernels().items() if name not in sys.modules}
    sys.modules.update(fakes)
    from megatron.core.models.mamba import mamba_model
    from megatron.core.ssm import gated_delta_net, mamba_block, mamba_mixer

    assert mamba_mixer.HAVE_MAMBA_SSM
    for name in fakes:
        del sys.modules[name]
    import torch
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
    from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

    from mswift.parallel.norms import RMSNorm

    core = core_config(config, dims, mtp_num_layers=1 if prediction else None)
    stage = dims.coordinate(torch.distributed.get_rank()).pp
    parts = layer_specs(core)

    def layer(*letters: str) -> Any:
        merged = {name: spec for letter in letters for name, spec in parts[letter].items()}
        return ModuleSpec(TransformerLayer, submodules=TransformerLayerSubmodules(**merged))

    ends = {"pre_process": stage == 0, "post_process": stage == dims.pp - 1, "position_embedding_type": "none"}
    sizes = {"vocab_size": -(-config["vocab_size"] // dims.tp) * dims.tp, "max_sequence_length": 64}
    if layers_of(config):
        kinds = mamba_block.MambaStackSubmodules(parts["M"], layer("*"), layer("-"), layer("E"))
        stack = ModuleSpec(mamba_block.MambaStack, submodules=kinds)
        with patch.object(mamba_block, "TENorm", RMSNorm):
            pattern = layers_of(config)
            return mamba_model.MambaModel(core, stack, hybrid_override_pattern=pattern, **sizes, **ends)
    specs = [layer("D", "E"), layer("D", "-"), layer("D", "E"), layer("*", "E")]
    here = [specs[n] for n in dims.stage_layers(4, stage)]
    block = TransformerBlockSubmodules(here, RMSNorm)
    with patch.object(gated_delta_net, "HAVE_FLA", True):
        if not prediction:
            return GPTModel(core, block, **sizes, **ends)
        mtp = of_moe.prediction_layers(core, block)
        return of_moe.with_groups(GPTModel(core, block, mtp_block_spec=mtp, **sizes, **ends))


@leaving_groups
def load_on_rank(payload: tuple[str, dict[str, Any], int, dict[str, int], str]) -> dict[str, Any]:
    """Local tensors by (key, global offset) after dist_checkpointing.load with that strictness."""
    path, config, world_size, layout, strict = payload
    return load_into(core_model(config, world_size, layout), path, strict)


@pytest.mark.parametrize("family", EVEN)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_megatron_core_loads_it(family: str, layout: str, tmp_path: Path) -> None:
    """On one rank nothing may be missing or superfluous; each rank gets its elements, and all ranks every one."""
    config = family_config(family, **EVEN[family] if layout == "pp2" else {})
    tensors = random_bits(config)
    write_model(tmp_path / "hf", config, tensors, "F32", 1)
    convert(tmp_path / "hf", tmp_path / "m", "megatron")
    world_size, degrees = LAYOUTS[layout]
    strict = "raise_all" if world_size == 1 else "assume_ok_unexpected"
    ranks = run_ranks(world_size, load_on_rank, (str(tmp_path / "m"), config, world_size, degrees, strict))
    assert_loaded(ranks, to_megatron(tensors, table_for(config)))


def test_megatron_core_loads_the_prediction_layer_of_qwen3_next(tmp_path: Path) -> None:
    """Of the hub's files; transformers leaves it out, and config.json does not speak of it."""
    config = family_config("qwen3_next")
    table = table_for(config, ["mtp.fc.weight"])
    generator = np.random.default_rng(0)
    tensors = {name: generator.integers(0, 2**30, shape, np.uint32) for name, shape in table.hf.items()}
    write_model(tmp_path / "hf", config, tensors, "F32", 1)
    convert(tmp_path / "hf", tmp_path / "m", "megatron")
    layout = {"tp": 2, "prediction": True}
    payload = (str(tmp_path / "m"), config, 2, layout, "assume_ok_unexpected")
    ranks = run_ranks(2, load_on_rank, payload)
    expected = to_megatron(tensors, table)
    assert sum(key.startswith("mtp.layers.0.") for key in expected) > 10
    assert_loaded(ranks, expected)


@leaving_groups
def save_on_rank(payload: tuple[str, dict[str, Any], int, dict[str, int]]) -> None:
    """Loads a converted directory, then saves it again by megatron-core."""
    path, config, world_size, layout = payload
    model = core_model(config, world_size, layout)
    from megatron.core import dist_checkpointing

    model.load_state_dict(dist_checkpointing.load(model.sharded_state_dict(), path + "/m"))
    dist_checkpointing.save(model.sharded_state_dict(), path + "/core")


@pytest.mark.parametrize("family", EVEN)
def test_what_megatron_core_saves_converts_to_hf(family: str, tmp_path: Path) -> None:
    config = family_config(family, vocab_size=104)
    tensors = random_bits(config)
    write_model(tmp_path / "hf", config, tensors, "F32", 1)
    convert(tmp_path / "hf", tmp_path / "m", "megatron")
    (tmp_path / "core").mkdir()
    run_ranks(2, save_on_rank, (str(tmp_path), config, 2, {"tp": 2}))
    (tmp_path / "m" / "hf").rename(tmp_path / "core" / "hf")
    convert(tmp_path / "core", tmp_path / "back", "hf")
    assert same(read_model(tmp_path / "back"), tensors)
