"""Random Hugging Face checkpoints without torch, and the Megatron tensors they must become, written out by hand.

`megatron_tensors` is an oracle: it states megatron-core's layout with numpy and shares no code with the converter.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mswift.converters.layout import Region

Array = npt.NDArray[Any]
NUMPY = {"F32": np.dtype("<u4"), "BF16": np.dtype("<u2"), "F16": np.dtype("<u2")}
ARCHITECTURES = {
    "llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}  # fmt: skip


def tiny_config(model_type: str = "llama", **changes: Any) -> dict[str, Any]:
    """A config.json as the hub has it: 3 layers, 4 heads in 2 KV groups, vocabulary 103."""
    config: dict[str, Any] = {
        "architectures": [ARCHITECTURES[model_type]], "model_type": model_type, "hidden_size": 24,
        "intermediate_size": 20, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 8, "vocab_size": 103, "max_position_embeddings": 64, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
        "hidden_act": "silu", "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    }  # fmt: skip
    return config | changes


def hf_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes as transformers' classes have them."""
    kind, h, f, v = (config[k] for k in ("model_type", "hidden_size", "intermediate_size", "vocab_size"))
    hd = config["head_dim"]
    q, kv = config["num_attention_heads"] * hd, config["num_key_value_heads"] * hd
    qkv_bias = kind == "qwen2" or config.get("attention_bias", False)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (v, h)}
    for layer in range(config["num_hidden_layers"]):
        p = f"model.layers.{layer}."
        for name, rows in (("q", q), ("k", kv), ("v", kv)):
            shapes[f"{p}self_attn.{name}_proj.weight"] = (rows, h)
            if qkv_bias:
                shapes[f"{p}self_attn.{name}_proj.bias"] = (rows,)
        shapes[p + "self_attn.o_proj.weight"] = (h, q)
        if qkv_bias and kind != "qwen2":
            shapes[p + "self_attn.o_proj.bias"] = (h,)
        if kind == "qwen3":
            shapes |= {f"{p}self_attn.{n}_norm.weight": (hd,) for n in "qk"}
        for name, shape in (("gate", (f, h)), ("up", (f, h)), ("down", (h, f))):
            shapes[f"{p}mlp.{name}_proj.weight"] = shape
            if config.get("mlp_bias"):
                shapes[f"{p}mlp.{name}_proj.bias"] = shape[:1]
        shapes |= {f"{p}{n}_layernorm.weight": (h,) for n in ("input", "post_attention")}
    shapes["model.norm.weight"] = (h,)
    if not config.get("tie_word_embeddings"):
        shapes["lm_head.weight"] = (v, h)
    return shapes


def random_tensors(config: Mapping[str, Any], dtype: str = "BF16", seed: int = 0) -> dict[str, Array]:
    """Random bits, NaNs and infinities included, as unsigned integers."""
    generator = np.random.default_rng(seed)
    top = np.iinfo(NUMPY[dtype]).max
    return {n: generator.integers(0, top, s, NUMPY[dtype], endpoint=True) for n, s in hf_shapes(config).items()}


def write_safetensors(path: Path, tensors: Mapping[str, Array], dtype: str = "BF16") -> None:
    """One file, packed, without padding of the header."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, array in tensors.items():
        offsets = [position, position + array.nbytes]
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": offsets}
        position += array.nbytes
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(a.tobytes() for a in tensors.values()))


def write_model(
    path: Path, config: Mapping[str, Any], tensors: Mapping[str, Array], dtype: str = "BF16", shards: int = 1
) -> Path:
    """A model directory with a tokenizer file and, for several shards, an index."""
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config, indent=3))
    (path / "tokenizer.json").write_bytes(b'{"version": "1.0"}\n')
    (path / "generation_config.json").write_text('{"eos_token_id": 2}')
    names = list(tensors)
    if shards == 1:
        write_safetensors(path / "model.safetensors", tensors, dtype)
        return path
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = names[shard::shards]
        write_safetensors(path / file, {name: tensors[name] for name in part}, dtype)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


def random_model(
    path: Path, model_type: str = "llama", dtype: str = "BF16", shards: int = 1, **changes: Any
) -> dict[str, Array]:
    """Writes a random model; returns its tensors."""
    config = tiny_config(model_type, **changes)
    tensors = random_tensors(config, dtype)
    write_model(path, config, tensors, dtype, shards)
    return tensors


def read_model(path: Path) -> dict[str, Array]:
    """Tensors of all safetensors files of a directory, read with the safetensors library, as bits."""
    from safetensors import safe_open

    result: dict[str, Array] = {}
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, "np") as opened:
            keys, metadata = set(opened.keys()), opened.metadata()
        assert metadata == {"format": "pt"}
        raw = file.read_bytes()
        size = int.from_bytes(raw[:8], "little")
        for name, entry in json.loads(raw[8 : 8 + size]).items():
            if name == "__metadata__":
                continue
            begin, end = (8 + size + o for o in entry["data_offsets"])
            result[name] = np.frombuffer(raw[begin:end], NUMPY[entry["dtype"]]).reshape(entry["shape"])
            keys.remove(name)
        assert not keys
    return result


def megatron_tensors(config: Mapping[str, Any], hf: Mapping[str, Array]) -> dict[str, Array]:
    """Key -> stacked tensor, as megatron-core 0.16 saves a homogeneous dense GPTModel."""
    groups, hd = config["num_key_value_heads"], config["head_dim"]
    per_group = config["num_attention_heads"] // groups
    layers: list[dict[str, Array]] = []
    for number in range(config["num_hidden_layers"]):
        p = f"model.layers.{number}."
        out: dict[str, Array] = {}
        for leaf in ("weight", "bias"):
            if f"{p}self_attn.q_proj.{leaf}" in hf:
                q, k, v = (hf[f"{p}self_attn.{n}_proj.{leaf}"] for n in "qkv")
                rows = []
                for g in range(groups):
                    rows += [q[g * per_group * hd : (g + 1) * per_group * hd]]
                    rows += [k[g * hd : (g + 1) * hd], v[g * hd : (g + 1) * hd]]
                out[f"self_attention.linear_qkv.{leaf}"] = np.concatenate(rows)
            if f"{p}mlp.gate_proj.{leaf}" in hf:
                out[f"mlp.linear_fc1.{leaf}"] = np.concatenate(
                    [hf[f"{p}mlp.gate_proj.{leaf}"], hf[f"{p}mlp.up_proj.{leaf}"]]
                )
            for ours, theirs in (
                ("self_attention.linear_proj", "self_attn.o_proj"),
                ("mlp.linear_fc2", "mlp.down_proj"),
            ):
                if f"{p}{theirs}.{leaf}" in hf:
                    out[f"{ours}.{leaf}"] = hf[f"{p}{theirs}.{leaf}"]
        out["self_attention.linear_qkv.layer_norm_weight"] = hf[p + "input_layernorm.weight"]
        out["mlp.linear_fc1.layer_norm_weight"] = hf[p + "post_attention_layernorm.weight"]
        for n in "qk":
            if f"{p}self_attn.{n}_norm.weight" in hf:
                out[f"self_attention.{n}_layernorm.weight"] = hf[f"{p}self_attn.{n}_norm.weight"]
        layers.append(out)
    result = {f"decoder.layers.{name}": np.stack([layer[name] for layer in layers]) for name in layers[0]}
    result["embedding.word_embeddings.weight"] = hf["model.embed_tokens.weight"]
    result["decoder.final_layernorm.weight"] = hf["model.norm.weight"]
    if not config.get("tie_word_embeddings"):
        result["output_layer.weight"] = hf["lm_head.weight"]
    return result


def read_region(source: Any, key: str, region: Region, dtype: np.dtype[Any]) -> Array:
    """What a WeightReader or TorchDistSource gives for a region."""
    out = np.empty(region.sizes, dtype)
    source.read(key, region, memoryview(out).cast("B") if out.size else memoryview(bytearray()))
    return out


def at(array: Array, region: Region) -> Array:
    """The same region of an array."""
    return array[tuple(slice(o, o + s) for o, s in zip(region.offsets, region.sizes, strict=True))]


def same(a: Mapping[str, Array], b: Mapping[str, Array]) -> bool:
    """Equal names, shapes and bits."""
    return a.keys() == b.keys() and all(a[n].shape == b[n].shape and (a[n] == b[n]).all() for n in a)
