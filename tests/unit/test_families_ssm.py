"""Mamba-2, Nemotron-H, Qwen3-Next: config.json, published sizes, shards, and where slices of HF tensors go."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mswift.converters.engine import convert
from mswift.converters.io.torch_dist_reader import TorchDistSource
from mswift.converters.layout import Region, tiling_fault
from mswift.converters.plan import table_for
from mswift.errors import ConfigError, LayoutError
from tests.support.checkpoints import Array, read_model, read_region, same, write_model, write_safetensors
from tests.support.family_configs import family_config

FAMILIES = ("mamba2", "nemotron_h", "qwen3_next")
INF = float("inf")


def random_bits(config: dict[str, Any], seed: int = 0) -> dict[str, Array]:
    """Random fp32 bits for every HF tensor of the table."""
    generator = np.random.default_rng(seed)
    shapes = table_for(config).hf.items()
    return {name: generator.integers(1, 1 << 30, shape, dtype=np.uint32) for name, shape in shapes}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_shards_of_all_ranks_tile_every_tensor(family: str, tp: int) -> None:
    table = table_for(family_config(family))
    if tp == 8:
        with pytest.raises(LayoutError, match="it can be 1, 2, 4$"):
            table.check_tp(tp)
        return
    table.check_tp(tp)
    for key, tensor in table.megatron.items():
        experts = range(table.sizes["experts"]) if tensor.rule.experts else (None,)
        ranks = range(tp if tensor.rule.cut else 1)
        boxes = [box for e in experts for rank in ranks for box in table.shard(key, rank, tp, expert=e)]
        assert tiling_fault(boxes, tensor.shape) is None


def expected_mamba(
    prefix: str, hf: dict[str, Array], heads: int, head_dim: int, groups: int, state: int
) -> dict[str, Array]:
    """A mixer's tensors in megatron-core's naming, cut with numpy."""
    inner, bc = heads * head_dim, groups * state
    names = ("A_log", "D", "dt_bias", "norm.weight", "out_proj.weight")
    out = {name: hf[prefix + name] for name in names}
    parts = np.split(hf[prefix + "in_proj.weight"], np.cumsum([inner, inner, bc, bc]))
    out |= {f"in_proj.weight.{n}": part for n, part in zip(("z", "x", "B", "C", "dt"), parts, strict=True)}
    for leaf in ("weight", "bias"):
        parts = np.split(hf[f"{prefix}conv1d.{leaf}"], np.cumsum([inner, bc]))
        out |= {f"conv1d.{leaf}.{n}": part for n, part in zip("xBC", parts, strict=True)}
    return out


def expected_delta(prefix: str, hf: dict[str, Array], config: dict[str, Any]) -> dict[str, Array]:
    """As transformers' fix_query_key_value_ordering takes the projections apart."""
    keys, values = config["linear_num_key_heads"], config["linear_num_value_heads"]
    dk, dv, r = config["linear_key_head_dim"], config["linear_value_head_dim"], values // keys
    out = {name: hf[prefix + name] for name in ("A_log", "dt_bias", "out_proj.weight")}
    out["out_norm.weight"] = hf[prefix + "norm.weight"]
    for name, cuts, parts in (
        ("in_proj_qkvz", [dk, 2 * dk, 2 * dk + r * dv], ("query", "key", "value", "z")),
        ("in_proj_ba", [r], ("beta", "alpha")),
    ):
        grouped = hf[f"{prefix}{name}.weight"].reshape(keys, -1, config["hidden_size"])
        for part, rows in zip(parts, np.split(grouped, cuts, 1), strict=True):
            out[f"in_proj.weight.{part}"] = rows.reshape(-1, config["hidden_size"])
    parts = np.split(hf[prefix + "conv1d.weight"], [keys * dk, 2 * keys * dk])
    return out | {f"conv1d.weight.{n}": p for n, p in zip(("query", "key", "value"), parts, strict=True)}


def expected_layers(config: dict[str, Any], hf: dict[str, Array]) -> dict[str, Array]:
    """Mixers (and what is peculiar around them), key by key, by an oracle that shares no code with the tables."""
    family, out = config["model_type"], {}
    if family == "qwen3_next":
        for layer in range(3):
            here = expected_delta(f"model.layers.{layer}.linear_attn.", hf, config)
            out |= {f"decoder.layers.{layer}.self_attention.{name}": array for name, array in here.items()}
        q, k, v = (hf[f"model.layers.3.self_attn.{n}_proj.weight"] for n in "qkv")
        heads = q.reshape(4, 2, 2, 16, -1)  # KV group, head, query or gate
        rows = [
            [heads[g, :, 0], heads[g, :, 1], k.reshape(4, 1, 16, -1)[g], v.reshape(4, 1, 16, -1)[g]] for g in range(4)
        ]
        fused = np.concatenate([part.reshape(-1, q.shape[1]) for group in rows for part in group])
        return out | {"decoder.layers.3.self_attention.linear_qkv.weight": fused}
    for layer in (0, 4) if family == "nemotron_h" else (0, 1, 2):
        here = expected_mamba(f"backbone.layers.{layer}.mixer.", hf, 8, 8, 4, 12)
        here["in_proj.layer_norm_weight"] = hf[f"backbone.layers.{layer}.norm.weight"]
        out |= {f"decoder.layers.{layer}.mixer.{name}": array for name, array in here.items()}
    return out | {"decoder.final_norm.weight": hf["backbone.norm_f.weight"]}


@pytest.mark.parametrize("family", FAMILIES)
def test_there_and_back(family: str, tmp_path: Path) -> None:
    config = family_config(family)
    tensors = random_bits(config)
    write_model(tmp_path / "hf", config, tensors, "F32", 2)
    convert(tmp_path / "hf", tmp_path / "m", "megatron")
    source = TorchDistSource(tmp_path / "m")
    for key, array in expected_layers(config, tensors).items():
        assert (read_region(source, key, Region.full(array.shape), np.dtype(np.uint32)) == array).all(), key
    convert(tmp_path / "m", tmp_path / "back", "hf")
    assert same(read_model(tmp_path / "back"), tensors)
    assert (tmp_path / "back" / "config.json").read_bytes() == (tmp_path / "hf" / "config.json").read_bytes()


def test_vectors_of_a_mixer_may_have_another_dtype(tmp_path: Path) -> None:
    config = family_config("mamba2")
    bits = {name: (array & 0xFFFF).astype(np.uint16) for name, array in random_bits(config).items()}
    own = {n: a.astype(np.uint32) << 3 for n, a in bits.items() if n.rsplit(".", 1)[1] in ("A_log", "D", "dt_bias")}
    rest = {name: array for name, array in bits.items() if name not in own}
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    write_safetensors(tmp_path / "hf" / "model-00001-of-00002.safetensors", rest, "BF16")
    write_safetensors(tmp_path / "hf" / "model-00002-of-00002.safetensors", own, "F32")
    files = dict.fromkeys(rest, "model-00001-of-00002.safetensors") | dict.fromkeys(
        own, "model-00002-of-00002.safetensors"
    )
    (tmp_path / "hf" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    convert(tmp_path / "hf", tmp_path / "m", "megatron")
    stored = TorchDistSource(tmp_path / "m").tensors
    assert stored["decoder.layers.1.mixer.A_log"].dtype == "F32"
    assert stored["decoder.layers.1.mixer.norm.weight"].dtype == "BF16"
    convert(tmp_path / "m", tmp_path / "back", "hf")
    assert same(read_model(tmp_path / "back"), rest | own)


def test_the_prediction_layer_comes_back(tmp_path: Path) -> None:
    """The hub's checkpoints hold one; neither config.json nor transformers knows of it."""
    config = family_config("qwen3_next")
    inside = [name for name in random_bits(config) if name.startswith("model.layers.3.")]
    names = [name.replace("model.layers.3.", "mtp.layers.0.") for name in inside]
    ends = [f"mtp.{name}.weight" for name in ("fc", "norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden")]
    table = table_for(config, [*table_for(config).hf, *names, *ends])
    assert set(table.hf) == {*table_for(config).hf, *names, *ends}
    generator = np.random.default_rng(0)
    tensors = {n: generator.integers(1, 1 << 30, shape, dtype=np.uint32) for n, shape in table.hf.items()}
    write_model(tmp_path / "hf", config, tensors, "F32", 1)
    convert(tmp_path / "hf", tmp_path / "m", "megatron")
    stored = TorchDistSource(tmp_path / "m")
    for key, name in (("eh_proj.weight", "fc"), ("final_layernorm.weight", "norm")):
        array = tensors[f"mtp.{name}.weight"]
        read = read_region(stored, f"mtp.layers.0.{key}", Region.full(array.shape), np.dtype(np.uint32))
        assert (read == array).all()
    assert "mtp.layers.0.transformer_layer.self_attention.linear_qkv.weight" in stored.tensors
    convert(tmp_path / "m", tmp_path / "back", "hf")
    assert same(read_model(tmp_path / "back"), tensors)


_NEMOTRON = {
    "architectures": ["NemotronHForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_nemotron_h.NemotronHConfig"}, "bos_token_id": 1, "chunk_size": 128,
    "conv_kernel": 4, "eos_token_id": 2, "expand": 2, "hidden_dropout": 0.0, "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05, "mamba_head_dim": 64, "mamba_hidden_act": "silu", "mamba_proj_bias": False,
    "mlp_bias": False, "mlp_hidden_act": "relu2", "model_type": "nemotron_h", "n_groups": 8,
    "num_attention_heads": 32, "num_logits_to_keep": 1, "pad_token_id": 0, "rescale_prenorm_residual": True,
    "residual_in_fp32": False, "sliding_window": None, "ssm_state_size": 128, "tie_word_embeddings": False,
    "time_step_floor": 0.0001, "time_step_limit": [0.0, INF], "time_step_max": 0.1, "time_step_min": 0.001,
    "torch_dtype": "bfloat16", "use_bias": False, "use_cache": True, "use_conv_bias": True,
    "use_mamba_kernels": True, "vocab_size": 131072, "num_hidden_layers": 52,
}  # fmt: skip
_MAMBA2 = {
    "architectures": ["Mamba2ForCausalLM"], "bos_token_id": 0, "chunk_size": 256, "conv_kernel": 4, "eos_token_id": 0,
    "expand": 2, "head_dim": 64, "hidden_act": "silu", "initializer_range": 0.1, "layer_norm_epsilon": 1e-05,
    "model_type": "mamba2", "norm_before_gate": True, "num_hidden_layers": 64, "pad_token_id": 0,
    "rescale_prenorm_residual": False, "residual_in_fp32": True, "rms_norm": True, "state_size": 128,
    "time_step_floor": 0.0001, "time_step_limit": [0.0, INF], "time_step_max": 0.1, "time_step_min": 0.001,
    "use_bias": False, "use_cache": True, "use_conv_bias": True,
}  # fmt: skip
PUBLISHED: dict[str, tuple[dict[str, Any], int]] = {
    "mamba2-2.7b": (_MAMBA2 | {
        "hidden_size": 2560, "n_groups": 1, "num_heads": 80, "tie_word_embeddings": True, "time_step_rank": 160,
        "vocab_size": 50288, "torch_dtype": "float32", "transformers_version": "4.44.0.dev0",
    }, 2_702_599_680),
    "Mamba-Codestral-7B-v0.1": (_MAMBA2 | {
        "hidden_size": 4096, "n_groups": 8, "num_heads": 128, "tie_word_embeddings": False, "time_step_rank": 256,
        "vocab_size": 32768, "torch_dtype": "bfloat16", "transformers_version": "4.44.0.dev0",
    }, 7_285_403_648),
    "Nemotron-H-8B-Base-8K": (_NEMOTRON | {
        "attention_head_dim": 128, "hidden_size": 4096, "intermediate_size": 21504, "mamba_num_heads": 128,
        "hybrid_override_pattern": "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-", "rms_norm_eps": 1e-05,
        "max_position_embeddings": 8192, "num_key_value_heads": 8, "time_step_rank": 256,
        "transformers_version": "4.48.0.dev0",
    }, 8_100_852_736),
    "NVIDIA-Nemotron-3-Nano-30B-A3B": (_NEMOTRON | {
        "head_dim": 128, "hidden_size": 2688, "intermediate_size": 1856, "mamba_num_heads": 64,
        "hybrid_override_pattern": "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
        "mamba_ssm_cache_dtype": "float32", "max_position_embeddings": 262144, "moe_intermediate_size": 1856,
        "moe_shared_expert_intermediate_size": 3712, "n_group": 1, "n_routed_experts": 128, "n_shared_experts": 1,
        "norm_topk_prob": True, "num_experts_per_tok": 6, "num_key_value_heads": 2, "routed_scaling_factor": 2.5,
        "topk_group": 1, "transformers_version": "4.55.4",
    }, 31_577_940_288),
    "Qwen3-Next-80B-A3B-Instruct": ({
        "architectures": ["Qwen3NextForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "bos_token_id": 151643, "decoder_sparse_step": 1, "eos_token_id": 151645, "full_attention_interval": 4,
        "head_dim": 256, "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02,
        "intermediate_size": 5120, "linear_conv_kernel_dim": 4, "linear_key_head_dim": 128,
        "linear_num_key_heads": 16, "linear_num_value_heads": 32, "linear_value_head_dim": 128,
        "max_position_embeddings": 262144, "mlp_only_layers": [], "model_type": "qwen3_next",
        "moe_intermediate_size": 512, "norm_topk_prob": True, "num_attention_heads": 16, "num_experts": 512,
        "num_experts_per_tok": 10, "num_hidden_layers": 48, "num_key_value_heads": 2, "output_router_logits": False,
        "partial_rotary_factor": 0.25, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 10000000,
        "router_aux_loss_coef": 0.001, "shared_expert_intermediate_size": 512, "tie_word_embeddings": False,
        "torch_dtype": "bfloat16", "transformers_version": "4.57.0.dev0", "use_cache": True,
        "vocab_size": 151936,
    }, 79_674_391_296),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_give_the_published_number_of_parameters(name: str) -> None:
    config, parameters = PUBLISHED[name]
    assert sum(map(math.prod, table_for(config).hf.values())) == parameters


def test_the_published_files_of_qwen3_next_have_a_prediction_layer() -> None:
    config, _ = PUBLISHED["Qwen3-Next-80B-A3B-Instruct"]
    assert sum(map(math.prod, table_for(config, ["mtp.fc.weight"]).hf.values())) == 81_324_862_720


def test_layers_in_words_and_in_letters_are_the_same() -> None:
    letters = family_config("nemotron_h")
    words = {k: v for k, v in letters.items() if k != "hybrid_override_pattern"} | {
        "layers_block_type": ["mamba", "mlp", "full_attention", "moe", "linear_attention"],
        "time_step_limit": [0.0, {"__float__": "Infinity"}],
    }
    assert table_for(words).spec == table_for(letters).spec
    assert table_for(words | {"hybrid_override_pattern": "M-*EM"}).spec == table_for(letters).spec


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("mamba2", {"use_bias": True}, "'use_bias' is True"),
    ("mamba2", {"use_conv_bias": False}, "'use_conv_bias' is False"),
    ("mamba2", {"hidden_act": "gelu"}, "'hidden_act' is 'gelu'"),
    ("mamba2", {"expand": 4}, "'expand' is 4; only 2"),
    ("mamba2", {"n_groups": 3}, "'n_groups' holds 3; supported: 1, 2, 4, 8"),
    ("mamba2", {"time_step_limit": [1.0, 0.0]}, "'time_step_limit' must be two numbers"),
    ("mamba2", {"rms_norm": False}, "'rms_norm' is False"),
    ("mamba2", {"ssm_cfg": {}}, "'ssm_cfg' is not known"),
    ("nemotron_h", {"mamba_proj_bias": True}, "'mamba_proj_bias' is True"),
    ("nemotron_h", {"mlp_hidden_act": "silu"}, "'mlp_hidden_act' is 'silu'; only 'relu2'"),
    ("nemotron_h", {"attention_bias": True}, "'attention_bias' is True"),
    ("nemotron_h", {"hybrid_override_pattern": "M-*X"}, "'hybrid_override_pattern' holds 'X'"),
    ("nemotron_h", {"num_hidden_layers": 4}, "'num_hidden_layers' is 4; only 5"),
    ("nemotron_h", {"layers_block_type": ["mlp"] * 5}, "'hybrid_override_pattern' is 'M-*EM'; only '-----'"),
    ("nemotron_h", {"moe_latent_size": 8}, "'moe_latent_size' is 8"),
    ("nemotron_h", {"num_nextn_predict_layers": 1}, "'num_nextn_predict_layers' is 1"),
    ("nemotron_h", {"rms_norm_eps": 1e-6}, "'rms_norm_eps' is 1e-06; only 1e-05"),
    ("nemotron_h", {"sliding_window": 8}, "'sliding_window' is 8"),
    ("qwen3_next", {"linear_num_value_heads": 6}, "'linear_num_value_heads' holds 6; supported: 4"),
    ("qwen3_next", {"layer_types": ["linear_attention"] * 3 + ["sliding"]}, "'layer_types' holds 'sliding'"),
    ("qwen3_next", {"output_router_logits": True}, "'output_router_logits' is True"),
    ("qwen3_next", {"sliding_window": 8}, "'sliding_window'"),
]


@pytest.mark.parametrize(("family", "changes", "message"), REFUSED)
def test_what_the_spec_cannot_express_is_refused_by_name(family: str, changes: dict[str, Any], message: str) -> None:
    base = {k: v for k, v in family_config(family).items() if k != "rms_norm_eps"}
    table_for(base)
    with pytest.raises(ConfigError) as caught:
        table_for(base | changes)
    assert message in str(caught.value)
