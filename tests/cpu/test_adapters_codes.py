"""LoRA on a base that keeps the codes of GPTQ and AWQ is LoRA on the dequantised base, bit for bit, at any layout."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mswift.errors import CheckpointError, ConfigError, LayoutError
from mswift.parallel.held_codes import CodesWeight, HeldCodes
from tests.support.adapters import load_peft, random_adapter
from tests.support.lora_parity import mswift_run, peft_steps
from tests.support.parity import BASE, differences, model_of
from tests.support.quantised import AWQ, GPTQ, quantise_directory, random_grouped
from tests.support.ranks import join, run_ranks

GROUP = 32
SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 8, "num_key_value_heads": 4}
MODEL = BASE | SIZES | {"model_type": "qwen2", "tie_word_embeddings": True}
EXPERTS = BASE | SIZES | {
    "model_type": "qwen3_moe", "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "num_hidden_layers": 2,
    "moe_intermediate_size": 64, "norm_topk_prob": True,
}  # fmt: skip
KINDS = {"gptq": GPTQ | {"group_size": GROUP}, "awq": AWQ | {"group_size": GROUP}}
LAYOUTS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "one": (1, {}, {}),
    "tp2": (2, {"tp": 2, "sequence_parallel": True}, {}),
    "pp2": (2, {"pp": 2}, {}),
    "ddp": (2, {}, {"backend": "fsdp", "recompute_blocks": 1}),
    "fsdp": (2, {}, {"backend": "fsdp", "shard_size": 2}),
}
PLAIN = "model.layers.1.mlp.down_proj.weight"
"""Not quantised, as modules_to_not_convert has it."""

PACKED = MODEL["num_hidden_layers"] * 3 * (128 * 128 + 256 * 128) - 128 * 256
BYTES = 0.5 + 3 / GROUP
"""Of a weight: its code, an F16 scale and a zero for each group."""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    path: Path = tmp_path_factory.mktemp(request.param)
    return written(path, MODEL, KINDS[request.param])


def written(path: Path, model: dict[str, Any], how: dict[str, Any]) -> Path:
    """A quantised model (`model`), its dequantised one (`model-plain`), and a random adapter."""
    model_of(model).save_pretrained(path / "base")  # type: ignore[operator]
    quantise_directory(path / "base", how, path / "model", PLAIN)
    random_adapter(path / "adapter", path / "model-plain", ("all-linear",))
    return path


def different(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """Names of what is not the same in every bit."""
    parts = ("gradients", "weights", "momentum_buffer")
    names = [f"{part} {name}" for part in parts for name in wanted[part]
             if not np.array_equal(found[part][name], wanted[part][name])]  # fmt: skip
    names += [name for name in ("loss", "grad_norm") if found[name] != wanted[name]]
    return names + ["logits"] * (not np.array_equal(found["logits"], wanted["logits"]))


def cases() -> list[Any]:
    """Each engine and cut by default, all products with -m whole."""
    usual = [("gptq", "F32", layout) for layout in ("tp2", "pp2", "fsdp")] + [("awq", "BF16", "tp2")]
    usual += [("awq", "BF16", "ddp")]
    every = [(kind, dtype, layout) for kind in KINDS for dtype in ("F32", "BF16") for layout in LAYOUTS]
    return [
        pytest.param(*case, marks=[] if case in usual else [pytest.mark.whole], id="-".join(case)) for case in every
    ]


@pytest.mark.parametrize(("home", "dtype", "layout"), cases(), indirect=["home"])
def test_three_steps_are_those_of_the_dequantised_base(home: Path, dtype: str, layout: str) -> None:
    world_size, dims, settings = LAYOUTS[layout]
    held = mswift_run(home, world_size, dims, dtype=dtype, settings=settings | {"four_bit_base": "codes"})
    whole = mswift_run(home, world_size, dims, dtype=dtype, settings=settings)
    assert different(held, whole) == []
    saved = [sum(rank["held"][0].weights for rank in run["ranks"]) for run in (whole, held)]
    copies = 2 if layout == "ddp" else 1
    assert saved[0] - saved[1] == copies * PACKED * ((4 if dtype == "F32" else 2) - BYTES)


@pytest.mark.parametrize("home", ["gptq"], indirect=True)
def test_three_steps_equal_peft(home: Path) -> None:
    wanted = peft_steps(home, load_peft(home / "model-plain", home / "adapter", trainable=True))
    found = mswift_run(home, 1, {}, settings={"four_bit_base": "codes"})
    parts = ("logits", "loss", "grad_norm", "gradients", "weights", "momentum_buffer")
    assert {n: d for n, d in differences(found, wanted, parts).items() if not d <= 1e-5} == {}


def test_experts_keep_their_codes(tmp_path: Path) -> None:
    written(tmp_path, EXPERTS, KINDS["awq"])
    layout = {"ep": 2, "etp": 1}
    held = mswift_run(tmp_path, 2, layout, settings={"four_bit_base": "codes"})
    whole = mswift_run(tmp_path, 2, layout)
    assert different(held, whole) == []
    saved = [sum(rank["held"][0].weights for rank in run["ranks"]) for run in (whole, held)]
    experts, attention = 2 * 4 * 3 * 128 * 64, 2 * 3 * 128 * 128  # experts once, attention on both ranks
    assert saved[0] - saved[1] == (experts + 2 * attention) * (4 - BYTES)


def test_rows_that_ranks_do_not_share_evenly() -> None:
    """Of 5 rows over four ranks: two, two, one, none."""
    found = run_ranks(4, "tests/cpu/test_adapters_codes.py:cut_rows")
    assert [rank["count"] for rank in found] == [2, 2, 1, 0]
    assert all(torch.equal(rank["found"], rank["wanted"]) for rank in found)
    assert found[0]["bytes"] == 2 * 64 * BYTES


BASE_OF_F16 = HeldCodes("gptq", GROUP, "F16", "F16", frozenset({"a", "b"}))


def filled(own: CodesWeight, codes: torch.Tensor, scales: torch.Tensor) -> None:
    """As an engine reads it; codes: code + 256 * zero."""
    parts = {"codes": codes, "scales": scales}
    for values, read, dtype in own.passes(lambda *_, part="": None, torch.float16):
        assert dtype == torch.float32
        values.copy_(parts[read.keywords["part"]][own.first : own.first + own.count])  # type: ignore[attr-defined]


def parts_of(rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[rows, 64] codes with zeros, scales, and values in F16, of the formats' definition."""
    weight = random_grouped(rows, 64, GROUP)
    zeros, scales = (part.astype(np.float32)[weight.group_of].T for part in (weight.zeros, weight.scales))
    of = [weight.codes.astype(np.float32) + 256 * zeros, np.ascontiguousarray(scales), weight.values.astype(np.float16)]
    return torch.from_numpy(of[0]), torch.from_numpy(of[1]), torch.from_numpy(of[2])


def cut_rows(_: Any) -> dict[str, Any]:
    """On a rank: a weight cut over all, and the whole."""
    join(4)
    import torch.distributed as dist

    parameter = torch.nn.Parameter(torch.empty(5, 64, dtype=torch.float16), requires_grad=False)
    own = CodesWeight(parameter, BASE_OF_F16, "x", dist.group.WORLD)
    codes, scales, wanted = parts_of(5)
    filled(own, codes, scales)
    return {"count": own.count, "bytes": own.nbytes, "found": own.whole(), "wanted": wanted}


def test_groups_that_are_not_neighbours_are_refused() -> None:
    own = CodesWeight(torch.nn.Parameter(torch.empty(8, 64), requires_grad=False), BASE_OF_F16, "layers.0.x", None)
    with pytest.raises(RuntimeError, match="used before it was read"):
        own.whole()
    codes, scales, _ = parts_of(8)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    with pytest.raises(CheckpointError, match=r"--quant_method gptq: layers.0.x has other .* act-order.* leave"):
        filled(own, codes, scales[:, order])


def test_rows_that_are_no_whole_groups_are_refused() -> None:
    assert BASE_OF_F16.group_of(64, "x") == 32
    assert HeldCodes("awq", -1, "F16", "F16", frozenset()).group_of(48, "x") == 48
    with pytest.raises(LayoutError, match="x has 48 inputs on a rank, which are no whole groups of 32: use a smaller"):
        BASE_OF_F16.group_of(48, "x")


def test_a_weight_of_which_a_part_has_codes_is_refused() -> None:
    assert BASE_OF_F16.has(frozenset({"a", "b"}), "x")
    assert not BASE_OF_F16.has(frozenset({"c"}), "x")
    with pytest.raises(LayoutError, match="x is made of a, which has codes, and of c, which has none"):
        BASE_OF_F16.has(frozenset({"a", "c"}), "x")


@pytest.mark.parametrize(
    ("method", "how", "message"),
    [
        (
            "gptq",
            None,
            "has none .no quantization_config.: use --quant_method bnb --quant_bits 4, or a checkpoint of gptq",
        ),
        ("gptq", AWQ, "has those of awq: use --quant_method awq, or"),
        ("gptq", GPTQ | {"bits": 8}, "has codes with 8 bits, which are not kept: leave"),
        ("gptq", GPTQ | {"desc_act": True}, "has codes with act-order .desc_act., which are not kept: leave"),
    ],
)
def test_bases_that_have_no_such_codes_are_refused(method: Any, how: Any, message: str) -> None:
    from mswift.config.train import SftConfig
    from mswift.train.inputs import check_codes

    config = SftConfig(model="m", tuner_type="lora", quant_method=method)
    with pytest.raises(ConfigError, match=message):
        check_codes(config, {"quantization_config": how})
    check_codes(config, {"quantization_config": GPTQ})
