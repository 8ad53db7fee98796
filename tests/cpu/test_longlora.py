"""LongLoRA: shifted sparse attention is the paper's but for the group of both ends; evaluation attends in full."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from mswift.converters.plan import table_for
from mswift.errors import LayoutError
from mswift.parallel.attention.core import SdpaAttention
from mswift.parallel.shifted import shifted_attention
from mswift.tuners.adapter import PeftAdapter
from mswift.tuners.lora import LoraConfig
from mswift.tuners.peft_config import PREFIX, WEIGHTS_FILE, adapter_files
from mswift.tuners.shapes import promised_shapes
from tests.support.family_configs import family_config
from tests.support.parity import differences, megatron_run, random_model, random_steps, reference
from tests.support.spaces import weights_of

SGD: dict[str, Any] = {"optimizer": "sgd", "lr": 0.05, "weight_decay": 0.1, "clip_grad": 1.0}
HEADS = {"as many": (4, 4), "two groups": (4, 2), "one group": (4, 1)}


class OneRank:
    context_parallel_size, cp_comm_type = 1, "p2p"


def paper(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Algorithm 1 of arXiv 2309.12307: [B, N, H, D] each -> [B, N, H, D], causal within groups of a quarter."""
    B, N, H, D = query.shape
    G = N // 4
    qkv = torch.stack((query, key, value), dim=2)  # B, N, 3, H, D
    qkv = torch.cat((qkv.chunk(2, 3)[0], qkv.chunk(2, 3)[1].roll(-G // 2, 1)), 3).reshape(B * N // G, G, 3, H, D)
    q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(B, N, H, D)
    return torch.cat((out.chunk(2, 2)[0], out.chunk(2, 2)[1].roll(G // 2, 1)), 2)


@pytest.mark.parametrize("heads", HEADS)
def test_equals_the_paper_where_its_groups_have_neighbours(heads: str) -> None:
    torch.manual_seed(0)
    h, g = HEADS[heads]
    query, key, value = (torch.randn(2, 32, n, 8) for n in (h, g, g))
    core = SdpaAttention(OneRank())
    found = shifted_attention(core, *(x.transpose(0, 1) for x in (query, key, value))).transpose(0, 1)
    wide = [x.repeat_interleave(h // g, 2) for x in (key, value)]
    wanted = paper(query, *wide)
    torch.testing.assert_close(found[:, :, : h // 2], wanted[:, :, : h // 2], rtol=0, atol=2e-6)
    torch.testing.assert_close(found[:, 4:], wanted[:, 4:], rtol=0, atol=2e-6)
    assert (found[:, :4, h // 2 :] - wanted[:, :4, h // 2 :]).abs().max() > 0.1  # there the paper sees the row's end
    ends = [x[:, :4, h // 2 :].transpose(1, 2) for x in (query, *wide)]
    alone = F.scaled_dot_product_attention(*ends, is_causal=True).transpose(1, 2)
    torch.testing.assert_close(found[:, :4, h // 2 :], alone, rtol=0, atol=2e-6)


def test_no_position_sees_a_later_one() -> None:
    query, key, value = (torch.randn(32, 1, 4, 8, requires_grad=True) for _ in range(3))
    out = shifted_attention(SdpaAttention(OneRank()), query, key, value)
    for position in (0, 3, 7, 8, 20, 31):
        (gradient,) = torch.autograd.grad(out[position].sum(), value, retain_graph=True)
        assert gradient[: position + 1].any()
        assert not gradient[position + 1 :].any()


@pytest.mark.parametrize("shape", [(30, 4), (20, 4), (32, 3)])
def test_rows_and_heads_that_are_not_cut_evenly_are_refused(shape: tuple[int, int]) -> None:
    x = torch.zeros(shape[0], 1, shape[1], 8)
    with pytest.raises(LayoutError, match=f"longlora: {shape[0]} positions and {shape[1]} heads"):
        shifted_attention(SdpaAttention(OneRank()), x, x, x)


def mask(heads: int, length: int) -> torch.Tensor:
    """What is added to scores [1, heads, length, length]: groups of a quarter, of later heads half a group on."""
    size, positions = length // 4, torch.arange(length)
    group = torch.stack([positions // size] * (heads // 2) + [(positions + size // 2) // size] * (heads // 2))
    seen = (group[:, :, None] == group[:, None, :]) & (positions[:, None] >= positions)
    return torch.zeros(1, heads, length, length).masked_fill(~seen, torch.finfo(torch.float32).min)


@pytest.mark.parametrize(("world_size", "settings"), [(1, {}), (2, {"shard_size": 2, "recompute_blocks": 4})])
def test_training_attends_within_groups_and_evaluation_does_not(world_size: int, settings: dict[str, Any]) -> None:
    model = random_model("llama-4-groups")
    weights = {name: weight.copy() for name, weight in weights_of(model).items()}
    own = SGD | {"backend": "fsdp", "shifted_attention": True} | settings
    found = megatron_run(model.config.to_dict(), weights, random_steps(), own, world_size, {})
    plain = megatron_run(model.config.to_dict(), weights, random_steps(), SGD | {"backend": "fsdp"}, 1, {})

    def masked(_module: Any, args: Any, options: Any) -> Any:
        return args, options | ({"attention_mask": mask(8, 24)} if torch.is_grad_enabled() else {})

    model.register_forward_pre_hook(masked, with_kwargs=True)
    worst = differences(
        found, reference(model, random_steps(), SGD), ("logits", "loss", "grad_norm", "gradients", "weights")
    )
    assert {name: value for name, value in worst.items() if not value <= 1e-5} == {}
    assert found["evaluated"] == pytest.approx(plain["evaluated"], rel=5e-6)
    assert abs(found["loss"][0] - plain["loss"][0]) > 1e-3


def test_norms_are_trained_on_where_embeddings_are_tied(tmp_path: Path) -> None:
    table = table_for(family_config("qwen2"))
    assert table.spec.tied_embeddings
    settings = LoraConfig.for_table(table, rank=2, alpha=4, target_modules=["q_proj"]).settings
    for name, content in adapter_files(table, settings, ("norm",), None).items():
        (tmp_path / name).write_bytes(content)
        assert json.loads(content)["ensure_weight_tying"] is False
    shapes = promised_shapes(table, replace(settings, modules_to_save=("norm",)))
    save_file({PREFIX + name: torch.ones(shape) for name, shape in shapes.items()}, tmp_path / WEIGHTS_FILE)
    adapter = PeftAdapter(tmp_path)
    adapter.check(shapes)
    assert adapter.lora_config(table, 0)[1] == ("norm",)
