"""Megatron-Bridge's fused and canonical adapters: what they compute, what comes back, what they cannot hold."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mswift.cli.main import main
from mswift.converters.io.torch_dist_reader import TorchDistSource
from mswift.converters.layout import Region
from mswift.tuners import bridge_destination
from mswift.tuners.bridge import run_config
from mswift.tuners.fused import Fusion
from tests.cpu.test_adapters_convert import ALL, CONFIG, FILE, Q_A, SIZES, TOKENS, convert, same_files
from tests.cpu.test_adapters_variants import peft_adapter
from tests.support.adapters import difference, load_peft, random_model


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bridge") / "base"
    random_model(path, **SIZES)
    return path


def apply_by_hand(model: Any, checkpoint: Path, dora: bool = False) -> Any:
    """Fold a fused adapter into a transformers model as Megatron-Bridge computes it, with torch alone.

    W' = W + alpha / dim * linear_out @ linear_in on the fused weight (of a DoRA its rows scaled to the magnitude),
    written out with its own cutting of q, k, v by KV group: nothing of the code under test.
    """
    config = model.config
    heads, groups, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    peft = json.loads((checkpoint / "run_config.yaml").read_text())["peft"]
    assert peft["_target_"] == f"megatron.bridge.peft.{'dora.DoRA' if dora else 'lora.LoRA'}"
    source = TorchDistSource(checkpoint)

    def stored(key: str) -> torch.Tensor:
        shape = source.tensors[key].shape
        out = torch.empty(shape)
        source.read(key, Region.full(shape), memoryview(out.view(-1).view(torch.uint8).numpy()))
        return out

    def fused_of(own: list[torch.Tensor], module: str) -> torch.Tensor:
        if module != "self_attention.linear_qkv":
            return torch.cat(own)
        q, k, v = (w.view(groups, -1, dim, w.shape[1]) for w in own)
        return torch.cat([q, k, v], dim=1).flatten(0, 2)

    def split_of(fused: torch.Tensor, own: list[torch.Tensor], module: str) -> list[torch.Tensor]:
        if module != "self_attention.linear_qkv":
            return list(fused.split([w.shape[0] for w in own]))
        grouped = fused.view(groups, heads // groups + 2, dim, -1)
        return [part.flatten(0, 2) for part in grouped.split([heads // groups, 1, 1], dim=1)]

    for number, layer in enumerate(model.model.layers):
        a, m = layer.self_attn, layer.mlp
        places = {
            "self_attention.linear_qkv": [a.q_proj, a.k_proj, a.v_proj],
            "self_attention.linear_proj": [a.o_proj],
            "mlp.linear_fc1": [m.gate_proj, m.up_proj],
            "mlp.linear_fc2": [m.down_proj],
        }
        for module, linears in places.items():
            key = f"decoder.layers.{module}.adapter."
            if f"{key}linear_in.weight" not in source.tensors:
                continue
            own = [linear.weight.data for linear in linears]
            low, high = stored(f"{key}linear_in.weight")[number], stored(f"{key}linear_out.weight")[number]
            assert low.shape[0] == peft["dim"]
            total = fused_of(own, module) + peft["alpha"] / peft["dim"] * high @ low
            if dora:
                total *= (stored(f"{key}weight_magnitude")[number] / total.norm(dim=1))[:, None]
            for linear, weight in zip(linears, split_of(total, own, module), strict=True):
                linear.weight.data.copy_(weight)
    return model


def base_model(base: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")


def share_a(adapter: Path) -> Path:
    """Give q, k, v one A, and gate, up one."""
    tensors = load_file(adapter / FILE)
    for name in tensors:
        for own, first in (("k_proj", "q_proj"), ("v_proj", "q_proj"), ("up_proj", "gate_proj")):
            if f"{own}.lora_A" in name:
                tensors[name] = tensors[name.replace(own, first)].clone()
    save_file(tensors, adapter / FILE)
    return adapter


STACK = ("--adapter_layout", "fused", "--fuse_adapters", "stack")


@pytest.mark.parametrize(
    ("targets", "settings", "flags", "rank"),
    [
        (ALL, {}, STACK, 12),
        (["q_proj", "v_proj", "down_proj"], {}, STACK, 8),
        (ALL, {"rank_pattern": {"k_proj": 2}, "alpha_pattern": {"k_proj": 5}}, STACK, 10),
        (["q_proj", "k_proj", "v_proj", "o_proj"], {"use_dora": True}, STACK, 12),
        (["k_proj", "o_proj"], {"use_rslora": True}, ("--adapter_layout", "fused"), 4),
        (ALL, {"shared": True}, ("--adapter_layout", "fused"), 4),
    ],
)
def test_fused_adapters_compute_what_peft_computes(
    base: Path, tmp_path: Path, targets: list[str], settings: dict[str, Any], flags: tuple[str, ...], rank: int
) -> None:
    settings, shared = dict(settings), settings.get("shared")
    settings.pop("shared", None)
    adapter = peft_adapter(tmp_path / "a", base, target_modules=targets, **settings)
    if shared:
        share_a(adapter)
    convert(adapter, "megatron", tmp_path / "m", *flags)
    theirs = load_peft(base, adapter)(TOKENS).logits
    ours = apply_by_hand(base_model(base), tmp_path / "m", dora=settings.get("use_dora", False))(TOKENS).logits
    assert difference(ours, theirs) < 5e-6
    assert difference(base_model(base)(TOKENS).logits, theirs) > 0.01
    assert json.loads((tmp_path / "m" / "run_config.yaml").read_text())["peft"]["dim"] == rank
    convert(tmp_path / "m", "hf", tmp_path / "b")
    same_files(adapter, tmp_path / "b")
    assert main(["verify", str(tmp_path / "m"), str(adapter)]) == 0
    assert main(["verify", str(tmp_path / "m")]) == 0


def as_foreign(path: Path, base: Path) -> Path:
    """What Megatron-Bridge leaves: tensors and run_config.yaml alone."""
    shutil.rmtree(path / "hf")
    (path / "mswift_manifest.json").unlink()
    return path


def test_a_foreign_fused_adapter_becomes_peft_s(base: Path, tmp_path: Path) -> None:
    """One A for q, k and v: a copy of it for each."""
    adapter = peft_adapter(tmp_path / "a", base, target_modules=ALL)
    convert(adapter, "megatron", tmp_path / "m", *STACK)
    as_foreign(tmp_path / "m", base)
    convert(tmp_path / "m", "hf", tmp_path / "b", "--base_model", str(base))
    found = load_file(tmp_path / "b" / FILE)
    q, k = (found[Q_A.replace("q_proj", name)] for name in ("q_proj", "k_proj"))
    assert torch.equal(q, k)
    assert q.shape == (12, 64)
    config = json.loads((tmp_path / "b" / CONFIG).read_text())
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (12, 30, ALL)
    theirs = load_peft(base, adapter)(TOKENS).logits
    assert difference(load_peft(base, tmp_path / "b")(TOKENS).logits, theirs) < 5e-6
    convert(tmp_path / "b", "megatron", tmp_path / "again", "--adapter_layout", "fused")
    one, other = (TorchDistSource(tmp_path / name) for name in ("m", "again"))
    for key, info in one.tensors.items():
        blocks = [bytearray(4 * info.shape[0] * info.shape[1] * info.shape[2]) for _ in range(2)]
        for source, block in zip((one, other), blocks, strict=True):
            source.read(key, Region.full(info.shape), memoryview(block))
        assert blocks[0] == blocks[1], key


def test_canonical_adapters(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--adapter_layout", "canonical")
    adapter = peft_adapter(tmp_path / "a", base, target_modules=["q_proj", "k_proj", "v_proj", "down_proj"])
    convert(adapter, "megatron", tmp_path / "m", *flags)
    keys = TorchDistSource(tmp_path / "m").tensors
    assert keys["decoder.layers.self_attention.linear_qkv.adapter.adapter_k.linear_out.weight"].shape == (2, 32, 4)
    assert keys["decoder.layers.mlp.linear_fc2.adapter.linear_in.weight"].shape == (2, 4, 96)
    peft = json.loads((tmp_path / "m" / "run_config.yaml").read_text())["peft"]
    assert peft["target_modules"] == ["linear_q", "linear_k", "linear_v", "linear_fc2"]
    convert(tmp_path / "m", "hf", tmp_path / "b")
    same_files(adapter, tmp_path / "b")
    convert(as_foreign(tmp_path / "m", base), "hf", tmp_path / "c", "--base_model", str(base))
    found, own = load_file(tmp_path / "c" / FILE), load_file(adapter / FILE)
    assert found.keys() == own.keys()
    assert all(torch.equal(found[name], own[name]) for name in own)
    other = peft_adapter(tmp_path / "gate", base, target_modules=["gate_proj"])
    convert(other, "megatron", tmp_path / "x", *flags, status=2)
    assert "depends on its tensor parallel size" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "flags", "message"),
    [
        ({"target_modules": ALL}, (), "q_proj, k_proj, v_proj of layer 0 have different A"),
        ({"modules_to_save": ["lm_head"]}, STACK[2:], "modules_to_save"),
        ({"lora_bias": True}, STACK[2:], "lora_bias"),
        ({"alpha_pattern": {"q_proj": 3}}, STACK[2:], "alpha_pattern"),
        ({"layers_to_transform": [0]}, STACK[2:], "layer 1 has no adapter there"),
        ({"use_dora": True, "target_modules": ["q_proj"]}, STACK[2:], "a fused magnitude needs all of"),
        ({"use_dora": True, "target_modules": ALL}, STACK[2:], "depends on its tensor parallel size"),
        ({"use_rslora": True, "r": 14, "target_modules": ["o_proj"]}, (), "use_rslora"),
    ],
)
def test_what_the_fused_layout_cannot_hold(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], settings: Any, flags: tuple[str, ...], message: str
) -> None:
    adapter = peft_adapter(tmp_path / "a", base, **settings)
    convert(adapter, "megatron", tmp_path / "m", "--adapter_layout", "fused", *flags, status=2)
    assert message in capsys.readouterr().err
    assert not (tmp_path / "m").exists()


def concatenated(fusion: Fusion) -> Fusion:
    """The same linears one behind the other, as if q, k and v were not interleaved by KV group."""
    units = fusion.rule.units
    parts = tuple(replace(part, rows=f"{units}*{part.rows}") for part in fusion.rule.parts)
    return replace(fusion, rule=replace(fusion.rule, units="one", parts=parts))


@pytest.mark.parametrize("broken", ["KV groups", "alpha of the stacked rank"])
def test_the_tolerance_sees_a_wrong_fusion(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    """Partner of the test above: both ways wrong alike, so that only PEFT's logits can tell."""
    adapter = peft_adapter(tmp_path / "a", base, target_modules=["q_proj", "k_proj", "v_proj"])
    fuse, split = Fusion.fuse, Fusion.split
    if broken == "KV groups":
        monkeypatch.setattr(Fusion, "fuse", lambda self, *args, **kw: fuse(concatenated(self), *args, **kw))
        monkeypatch.setattr(Fusion, "split", lambda self, *args, **kw: split(concatenated(self), *args, **kw))
    else:
        wrong = lambda layout, dora, rank, alpha, targets: run_config(layout, dora, rank, alpha / 3, targets)  # noqa: E731
        monkeypatch.setattr(bridge_destination, "run_config", wrong)
    convert(adapter, "megatron", tmp_path / "m", *STACK)
    theirs = load_peft(base, adapter)(TOKENS).logits
    assert difference(apply_by_hand(base_model(base), tmp_path / "m")(TOKENS).logits, theirs) > 1e-3


def test_a_move_that_does_not_come_back_is_refused(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Partner of the proof that every layer goes through."""
    adapter = peft_adapter(tmp_path / "a", base, target_modules=["q_proj", "k_proj", "v_proj"])
    fuse = Fusion.fuse
    monkeypatch.setattr(Fusion, "fuse", lambda self, *args, **kw: fuse(concatenated(self), *args, **kw))
    convert(adapter, "megatron", tmp_path / "m", *STACK, status=1)
    assert "does not come back from decoder.layers.self_attention.linear_qkv.adapter" in capsys.readouterr().err
    assert not (tmp_path / "m").exists()


def test_a_fused_adapter_that_was_trained_further_is_no_stack_any_more(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = peft_adapter(tmp_path / "a", base, target_modules=["q_proj", "k_proj", "v_proj"])
    convert(adapter, "megatron", tmp_path / "m", *STACK)
    file = next((tmp_path / "m").glob("*.distcp"))
    key = "decoder.layers.self_attention.linear_qkv.adapter.linear_out.weight"
    source = TorchDistSource(tmp_path / "m")
    _, offset = source.chunk_data(key, Region((1, 0, 0), (1, 128, 12)))
    data = bytearray(file.read_bytes())
    data[offset + 11 * 4 : offset + 12 * 4] = b"\x00\x00\x80\x3f"  # 1.0 outside the block of q
    file.write_bytes(data)
    convert(tmp_path / "m", "hf", tmp_path / "b", status=1)
    assert "it was trained since mswift wrote it; remove mswift_manifest.json" in capsys.readouterr().err
    (tmp_path / "m" / "mswift_manifest.json").unlink()
    convert(tmp_path / "m", "hf", tmp_path / "b")
    assert load_file(tmp_path / "b" / FILE)[Q_A].shape == (12, 64)
