"""--backend deepspeed, as far as no torch is needed: boxes of cut tensors, its JSON, refusals, memory."""

import json
import re
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mswift.config.deepspeed import NAMED, Zero, read_zero
from mswift.config.train import PtConfig, SftConfig
from mswift.converters.plan import table_for
from mswift.errors import ConfigError
from mswift.parallel.deepspeed.fragments import flat_boxes
from mswift.refusals.backend import backend_refusals, describe_layout
from mswift.refusals.deepspeed import check_accumulation, check_adapter_stage, check_modules_in_full, check_precision
from mswift.topology import ParallelDims
from mswift.train.zero_memory import zero_host_bytes, zero_memory

HF = {  # as ms-swift's and Hugging Face's examples have it
    "fp16": {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16},
    "bf16": {"enabled": "auto"},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}},
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": {"device": "none", "pin_memory": True},
        "offload_param": {"device": "none", "pin_memory": True},
        "overlap_comm": False,
        "contiguous_gradients": True,
        "sub_group_size": 1e9,
        "reduce_bucket_size": "auto",
        "zero_quantized_weights": False,
        "zero_quantized_gradients": False,
        "stage3_prefetch_bucket_size": 0,
        "stage3_param_persistence_threshold": "auto",
        "stage3_max_live_parameters": 1e9,
        "stage3_max_reuse_distance": 1e9,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "steps_per_print": 2000,
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "wall_clock_breakdown": False,
}


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.data())
@settings(max_examples=200, deadline=None)
def test_a_run_of_elements_is_its_boxes(shape: list[int], data: st.DataObject) -> None:
    start = data.draw(st.integers(0, prod(shape)))
    count = data.draw(st.integers(0, prod(shape) - start))
    whole = np.arange(prod(shape)).reshape(shape)
    found = np.full(count, -1)
    for region, at in flat_boxes(shape, start, count):
        box = whole[tuple(slice(o, o + s) for o, s in zip(region.offsets, region.sizes, strict=True))]
        assert box.size == region.num_elements
        assert (found[at : at + box.size] == -1).all()
        found[at : at + box.size] = box.reshape(-1)
    assert (found == np.arange(start, start + count)).all()


def written(path: Path, **changes: Any) -> str:
    (path / "own.json").write_text(json.dumps(HF | changes))
    return str(path / "own.json")


def test_the_usual_file_is_taken(tmp_path: Path) -> None:
    zero = read_zero(written(tmp_path))
    assert (zero.stage, zero.offload, zero.says) == (3, "none", {"optimizer.type": "AdamW"})
    assert zero.options["sub_group_size"] == 10**9
    assert zero.options.keys().isdisjoint({"reduce_bucket_size", "stage3_gather_16bit_weights_on_model_save"})
    assert zero.passed_on == {"steps_per_print": 2000, "wall_clock_breakdown": False}
    assert refusals(deepspeed=written(tmp_path)) == []


def zero(**changes: Any) -> dict[str, Any]:
    return {"zero_optimization": HF["zero_optimization"] | changes}  # type: ignore[operator]


BAD: list[tuple[dict[str, Any], str]] = [
    (zero(stage=0), "zero_optimization.stage 0: 1, 2 or 3; .* --backend ddp"),
    (zero(stage="3"), 'zero_optimization.stage "3"'),
    ({"zero_optimization": None}, "zero_optimization.stage null"),
    (zero(reduce_bucket=5), "zero_optimization.reduce_bucket is not supported: .* did you mean reduce_bucket_size"),
    (zero(reduce_bucket_size=-1), "reduce_bucket_size -1: a whole number"),
    (zero(reduce_bucket_size=True), "reduce_bucket_size true: a whole number"),
    (zero(overlap_comm="yes"), 'overlap_comm "yes": true or false'),
    (zero(zero_hpz_partition_size=8), "zero_hpz_partition_size 8: it is 1 here"),
    (zero(zero_quantized_weights=True), "zero_quantized_weights true: it is false here"),
    (zero(offload_optimizer={"device": "nvme"}), "offload_optimizer.device nvme is not supported: use cpu or none"),
    (zero(offload_optimizer={"device": "cpu", "ratio": 0.3}), "offload_optimizer.ratio is not supported"),
    (zero(offload_param={"device": "cpu"}), "offload_param is for stage 3, together with offload_optimizer"),
    (zero(offload_optimizer="cpu"), 'offload_optimizer "cpu": an object'),
    ({"scheduler": {"type": "WarmupLR"}}, "scheduler: the learning rate follows --lr_decay_style"),
    ({"activation_checkpointing": {}}, "activation_checkpointing: use --recompute_granularity"),
    ({"data_types": {"grad_accum_dtype": "bf16"}}, "gradients are summed in fp32"),
    ({"communication_data_type": "bf16"}, 'communication_data_type "bf16": it is "fp32" here'),
    ({"zero_force_ds_cpu_optimizer": True}, "zero_force_ds_cpu_optimizer true: it is false here"),
    ({"gradient_cliping": 1.0}, "gradient_cliping is not supported: leave it out; did you mean gradient_clipping"),
    ({"flops_profiler": {"enabled": True}}, "flops_profiler is not supported"),
    ({"optimizer": {"type": "AdamW", "params": {"lrr": 1}}}, "optimizer.params.lrr is not supported"),
    ({"optimizer": "AdamW"}, 'optimizer "AdamW": an object'),
    ({"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}}, "bf16.bf16_master_weights_and_grads is not"),
]


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_what_cannot_be_done_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"--deepspeed .*own.json: .*{message}"):
        read_zero(written(tmp_path, **changes))


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--deepspeed zero4: none of zero1, .* no FILE.json; did you mean zero"):
        read_zero("zero4")
    with pytest.raises(ConfigError, match="No such file"):
        read_zero(str(tmp_path / "no.json"))
    for text, message in (("{", "no JSON"), ("[]", "this is list"), ('{"bf16": {}, "bf16": {}}', "stands there twice")):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(ConfigError, match=message):
            read_zero(str(tmp_path / "a.json"))


def config(**flags: Any) -> SftConfig:
    return SftConfig(**{"model": "m", "dataset": ("d",), "backend": "deepspeed", "train_iters": 1} | flags)


def refusals(*, installed: bool = True, **flags: Any) -> list[str]:
    with patch("mswift.refusals.deepspeed.find_spec", lambda _: object() if installed else None):
        return [str(error) for error in backend_refusals(config(**flags))]


DISAGREEING: list[tuple[dict[str, Any], str]] = [
    ({"train_batch_size": 32}, 'train_batch_size 32, but --global_batch_size means 16: use "auto" there'),
    ({"train_micro_batch_size_per_gpu": 4}, "train_micro_batch_size_per_gpu 4, but --micro_batch_size means 1"),
    ({"gradient_clipping": 0.5}, "gradient_clipping 0.5, but --clip_grad means 1.0"),
    ({"fp16": {"enabled": True}}, "fp16.enabled true, but training in float32 or bfloat16"),
    ({"optimizer": {"type": "Lion"}}, 'optimizer.type "Lion", but --optimizer means "adam"'),
    ({"optimizer": {"params": {"lr": 3e-4}}}, "optimizer.params.lr 0.0003, but --lr means 1e-05"),
    ({"optimizer": {"params": {"betas": [0.9, 0.999]}}}, "betas .0.9, 0.999., but --adam_beta1 and --adam_beta2 mean"),
]


@pytest.mark.parametrize(("changes", "message"), DISAGREEING)
def test_a_file_that_says_something_else_than_the_flags(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    (found,) = refusals(deepspeed=written(tmp_path, **changes))
    assert re.search(message, found), found


def test_what_depends_on_the_layout_and_the_model(tmp_path: Path) -> None:
    own = config(deepspeed=written(tmp_path, gradient_accumulation_steps=16, bf16={"enabled": True}))
    check_accumulation(own, ParallelDims())
    with pytest.raises(ConfigError, match="gradient_accumulation_steps 16, but .* 2 data-parallel ranks means 8"):
        check_accumulation(own, ParallelDims(world_size=2))
    check_precision(own, "BF16")
    with pytest.raises(ConfigError, match="bf16.enabled true, but training in float32 means false"):
        check_precision(own, "F32")


def test_an_adapter_to_continue_that_needs_whole_weights() -> None:
    with pytest.raises(ConfigError, match="--adapters a, a DoRA, begins with whole weights, .*--deepspeed zero2"):
        check_adapter_stage(config(deepspeed="zero3_offload"), "a", dora=True)
    check_adapter_stage(config(deepspeed="zero3"), "a", dora=False)
    check_adapter_stage(config(deepspeed="zero2"), "a", dora=True)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"fsdp_shard_size": 2}, "--fsdp_shard_size is not for --backend deepspeed: .* --backend fsdp"),
    ({"fsdp_cpu_offload": True}, "--fsdp_cpu_offload is not for --backend deepspeed: .*--deepspeed zero3_offload"),
    ({"torch_compile": True}, "--torch_compile is not for --backend deepspeed"),
    (
        {"quant_method": "bnb", "tuner_type": "lora"},
        "--quant_method bnb is not for .* --backend fsdp",
    ),
    ({"tuner_type": "adalora"}, "--tuner_type adalora is not for --backend deepspeed, .*: use --backend fsdp"),
    (
        {"tuner_type": "xlora", "deepspeed": "zero3"},
        "xlora keeps its LoRAs whole .*--deepspeed zero2, or --backend fsdp",
    ),
    ({"optimizer": "muon"}, "--optimizer muon: ZeRO cuts parameters anywhere"),
    ({"optimizer": "adafactor"}, "--optimizer adafactor: .* use adam, sgd, lion, or --backend fsdp"),
    ({"lisa_activated_layers": 2}, "--lisa_activated_layers 2: .* --backend fsdp"),
    ({"sequence_parallel": True}, "--sequence_parallel true is not for --backend deepspeed: .* --backend megatron"),
    ({"tensor_model_parallel_size": 2}, "--tensor_model_parallel_size 2 is not for --backend deepspeed"),
    ({"deepspeed": "zero3", "use_dora": True, "tuner_type": "lora"}, "--use_dora begins with whole weights"),
    ({"deepspeed": "zero3", "init_weights": "pissa", "tuner_type": "lora"}, "--init_weights pissa begins with whole"),
    ({"backend": "fsdp", "deepspeed": "zero3"}, "--deepspeed zero3 belongs to --backend deepspeed: add it"),
    ({"backend": "megatron", "deepspeed": "zero3"}, "--deepspeed zero3 belongs to --backend deepspeed: add it"),
    ({"backend": "megatron", "deepspeed": "zero2"}, "--deepspeed zero2 belongs to --backend deepspeed: add it"),
]


@pytest.mark.parametrize(("flags", "message"), REFUSED)
def test_what_this_backend_does_not_do_names_the_one_that_does(flags: dict[str, Any], message: str) -> None:
    assert any(re.search(message, found) for found in refusals(**flags)), refusals(**flags)


@pytest.mark.parametrize("tuner", ["oft", "vera", "reft", "adapter", "ptuning", "prefix", "longlora", "llamapro"])
@pytest.mark.parametrize("stage", ["zero1", "zero3_offload"])
def test_tuners_that_it_trains_at_every_stage(tuner: str, stage: str) -> None:
    assert refusals(tuner_type=tuner, deepspeed=stage) == []
    assert refusals(tuner_type="xlora", deepspeed="zero2_offload") == []


def test_modules_in_full_beside_an_adapter_in_fp32() -> None:
    own = config(tuner_type="oft", modules_to_save=("lm_head",))
    with pytest.raises(ConfigError, match="--tuner_type oft with lm_head in full .*: use --torch_dtype float32, or"):
        check_modules_in_full(own, "BF16", own.modules_to_save)
    check_modules_in_full(own, "F32", own.modules_to_save)
    check_modules_in_full(own, "BF16", ())
    for other in (replace(own, tuner_type="lora"), replace(own, backend="ddp")):
        check_modules_in_full(other, "BF16", own.modules_to_save)


def test_a_missing_package_is_one_line() -> None:
    (found,) = refusals(installed=False)
    assert "pip install 'mswift[deepspeed]'" in found
    assert "\n" not in found
    assert refusals() == []


LLAMA = {
    "model_type": "llama", "vocab_size": 1000, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False,
}  # fmt: skip


def test_memory_of_a_rank_follows_the_stage() -> None:
    table, dims = table_for(LLAMA), ParallelDims(world_size=8)
    configs = {name: PtConfig(model="", backend="deepspeed", deepspeed=name) for name in NAMED}
    found = {name: zero_memory(each, table, dims, 2) for name, each in configs.items()}
    held = found["zero1"].parameters
    assert [found[name].weights_bytes for name in ("zero1", "zero2")] == [2 * held, 2 * held]
    assert found["zero3"].weights_bytes < 2 * held
    assert [found[name].gradients_bytes for name in NAMED] == [4 * held, held // 2, held // 2, 0, 0]
    assert [found[name].optimizer_bytes for name in NAMED] == [12 * held // 8] * 3 + [0, 0]
    in_host = [zero_host_bytes(each, table, dims, 2) for each in configs.values()]
    assert in_host == [0, 0, 0, 16 * held // 8, 18 * held // 8]


def test_an_adapter_that_is_no_lora_is_fp32() -> None:
    table, dims = table_for(LLAMA), ParallelDims(world_size=4)
    own = {"model": "", "backend": "deepspeed", "tuner_type": "prompt"}
    held, cut = (zero_memory(PtConfig(**own, deepspeed=stage), table, dims, 2) for stage in ("zero2", "zero3"))
    trained = 20 * 64
    assert held.trained == trained
    assert held.weights_bytes == 2 * (held.parameters - trained) + 4 * trained
    of_lora = zero_memory(PtConfig(**own | {"tuner_type": "lora"}, deepspeed="zero3"), table, dims, 2)
    assert cut.weights_bytes - of_lora.weights_bytes == (4 * trained - 2 * of_lora.trained) // 4
    offloaded = PtConfig(**own, deepspeed="zero3_offload")
    assert zero_host_bytes(offloaded, table, dims, 2) == (held.weights_bytes + 16 * trained) // 4


def test_the_layout_says_the_stage() -> None:
    dims = ParallelDims(world_size=4)
    lines = {name: describe_layout(PtConfig(model="", backend="deepspeed", deepspeed=name), dims) for name in NAMED}
    assert lines["zero2"] == "4 ranks = DP 4, transformers' model, parameters whole on each, DeepSpeed ZeRO-2"
    assert "cut over 4 ranks, DeepSpeed ZeRO-3, all of it in host memory" in lines["zero3_offload"]
    assert read_zero("zero2") == Zero(2)
